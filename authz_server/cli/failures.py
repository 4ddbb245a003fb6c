"""What can go wrong for an administrator, and the exit code of each."""

from collections.abc import Iterable

EXIT_CODES = (
    "Exit codes: 0 done (or it was so already); 1 refused, in conflict or not found: nothing was changed; "
    "2 bad usage or input; 3 the store is unavailable or not initialised; 4 written, and not every server is known to "
    "have it (--wait), or it is not known to be durable (--durable); 130 interrupted. "
    "Also 1, with a word on what was done, if the output cannot be written."
)


class AuthzctlError(Exception):
    """A command did not do what was asked; every problem is told at once."""

    exit_code = 1
    kind = "refused"
    """A stable word for scripts (`-o json`)."""

    def __init__(self, problems: Iterable[str], hints: Iterable[str] = ()) -> None:
        self.problems = tuple(problems)
        self.hints = tuple(hints)
        """What may have been meant."""
        super().__init__("; ".join(self.problems))


class RefusedError(AuthzctlError):
    """What was asked for does not fit the policy; nothing was changed."""


class NotFoundError(AuthzctlError):
    """What was named is not there; nothing was changed."""

    kind = "not_found"


class ConfirmationNeededError(AuthzctlError):
    """The wish is dangerous and nobody confirmed it; nothing was changed."""

    kind = "confirmation_needed"


class InterruptedQuestionError(ConfirmationNeededError):
    """Somebody was asked and went away; nothing was changed."""

    exit_code = 130


class ChangedMeanwhileError(AuthzctlError):
    """Somebody else changed what the change relies on; nothing was changed."""

    kind = "conflict"


class BadInputError(AuthzctlError):
    """The input cannot be read; nothing was sent."""

    exit_code = 2
    kind = "bad_input"


class NoStoreError(AuthzctlError):
    """The store does not answer, or does not hold a policy that can be used."""

    exit_code = 3
    kind = "store_unavailable"


class StoreNotUsableError(NoStoreError):
    """The store answers, and refuses or holds what cannot be used; nothing was changed."""

    kind = "store_not_usable"


class NoPolicyError(NoStoreError):
    """The store answers and holds no policy."""

    kind = "not_initialised"


class UnknownOutcomeError(NoStoreError):
    """A write did not come to its end: it may or may not have been applied."""

    kind = "outcome_unknown"

    def __init__(self, change_id: str, why: str) -> None:
        super().__init__([f"it is not known whether the change was applied: {why}"])
        self.change_id = change_id


class InterruptedWriteError(UnknownOutcomeError):
    """Somebody interrupted the command during a write: it may or may not have been applied."""

    exit_code = 130  # 128 and SIGINT, as shells count

    def __init__(self, change_id: str) -> None:
        super().__init__(change_id, "interrupted before the answer came")


class NotAcknowledgedError(AuthzctlError):
    """The change is written, and not every server is known to have it."""

    exit_code = 4
    kind = "not_acknowledged"


class InterruptedWaitError(NotAcknowledgedError):
    """The change is written; somebody interrupted the wait for the servers."""

    exit_code = 130


class MoveStoppedError(AuthzctlError):
    """A command of several changes did not come to its end; what was done by then is done."""

    kind = "stopped"

    def __init__(self, problems: Iterable[str], hints: Iterable[str], *, exit_code: int) -> None:
        super().__init__(problems, hints)
        self.exit_code = exit_code


class ChangeLostError(AuthzctlError):
    """The change was written, and the store's history no longer has it: a failover, or a restored backup."""

    kind = "change_lost"


class NotDurableFailure(AuthzctlError):  # noqa: N818 - `NotDurableError` is the store's
    """The change was written, and may not survive the loss of the server."""

    exit_code = 4
    kind = "not_durable"


class NotSoundError(AuthzctlError):
    """The store is not as it must be; nothing was changed."""

    kind = "not_sound"


class OutputLostError(AuthzctlError):
    """What the command found out or did could not be printed."""

    kind = "output_lost"
