"""Bytes in, bytes out: one check, whatever the transport. Synchronous; nothing here waits, locks or reads a socket.

What a request causes is a denial; what our own state causes is CannotDecideError, which transports turn into the RPC
error UNAVAILABLE, and then Envoy's fail-open setting has the word. Keep the two apart: a client that could make us
raise would walk through every mesh that fails open.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, cast

from authz_server.ext_authz.check_request import BadCheckRequestError, CheckRequestReader
from authz_server.ext_authz.check_response import ResponseOptions, ResponseWriter
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Decision, Denied, decide
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import DecisionOptions, Snapshot
from authz_server.policy.tenant import SourceKind

_log: Final = logging.getLogger(__name__)
NO_SNAPSHOT: Final = "there is no policy snapshot, or it is too old"
"""What clients are told that cannot have a decision."""
_INTERNAL_ERROR: Final = Denied(Reason.INTERNAL_ERROR)


class CannotDecideError(Exception):
    """This server cannot decide about anything now; the message says why. Never caused by a request."""


class Checked(NamedTuple):
    """A check that was answered, for metrics and logs."""

    decision: Decision
    attributes: RequestAttributes | None
    """None when the check request could not be read."""
    revision: int
    """Of the snapshot that the decision was made from; 0 when it needed none."""
    seconds: float
    """From the first byte read to the last byte written; of checks that were answered together, a share of that."""
    error: Exception | None = None
    """What was raised, when the reason is INTERNAL_ERROR."""


class Checks:
    """Checks that came together. To iterate yields what was answered, each as a Checked; who needs less saves that."""

    __slots__ = ("asked", "decisions", "errors", "revision", "seconds")

    def __init__(self, size: int) -> None:
        self.asked: list[RequestAttributes | None] = [None] * size
        """None where the check request cannot be read, or led to a fault."""
        self.decisions: list[Decision | None] = [None] * size
        """None where there is none (yet)."""
        self.errors: dict[int, Exception] = {}
        """What was raised, by the number of the check."""
        self.revision = 0
        """Of the snapshot, if there is one."""
        self.seconds = 0.0
        """What each took, when all are answered."""

    def __len__(self) -> int:
        return len(self.decisions)

    def __iter__(self) -> Iterator[Checked]:
        for number, (decision, attributes) in enumerate(zip(self.decisions, self.asked, strict=True)):
            if decision is not None:
                revision = self.revision if attributes else 0
                # Without the constructor, which takes twice the time.
                checked = (decision, attributes, revision, self.seconds, self.errors.get(number))
                yield tuple.__new__(Checked, checked)

    @property
    def decided(self) -> list[Decision]:
        """The decisions, once there is one for each check."""
        return cast(list[Decision], self.decisions)

    def deny(self, number: int, error: Exception) -> None:
        """Deny a check that led to a fault."""
        self.asked[number], self.decisions[number], self.errors[number] = None, _INTERNAL_ERROR, error

    def drop_undecided(self) -> int:
        """Keep those with a decision, and return how many have none."""
        answered = [number for number, decision in enumerate(self.decisions) if decision is not None]
        undecided = len(self.decisions) - len(answered)
        self.asked = [self.asked[number] for number in answered]
        self.decisions = [self.decisions[number] for number in answered]
        self.errors = {new: self.errors[old] for new, old in enumerate(answered) if old in self.errors}
        return undecided


class Checker:
    """Answers checks from whatever snapshot is current at that moment."""

    def __init__(
        self,
        current: Callable[[], Snapshot | None],
        options: ResponseOptions,
        *,
        max_request_bytes: int,
        kept_headers: frozenset[str] = frozenset(),
        observe: Callable[[Checks], None],
        observe_unavailable: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make a checker.

        Args:
            current: returns the snapshot to decide from; None while there is none.
            options: of the answers.
            max_request_bytes: longer check requests are denied without being read.
            kept_headers: names, in lower case, of headers that `observe` wants to see beside those that name a tenant.
            observe: gets the checks that were answered together, at least one. What it raises changes no answer.
            observe_unavailable: called for every check that ends in CannotDecideError instead. Must not raise.
            clock: returns seconds since the Unix epoch, for entries that expire.
        """
        self._current = current
        self._writer = ResponseWriter(options)
        self._max_request_bytes = max_request_bytes
        self._kept_headers = kept_headers
        self._observe = observe
        self._observe_unavailable = observe_unavailable
        self._clock = clock
        self._options: DecisionOptions | None = None
        """What the reader was made for: the same object in one snapshot after the other."""
        self._reader = CheckRequestReader(kept_headers, with_peer=False)
        # Written beforehand, so that nothing of a request can make this answer fail too.
        self._internal_error_answer = self._writer.write(_INTERNAL_ERROR, request_id="", revision=0)
        self._observer_failed = False

    def check(self, data: bytes) -> bytes:
        """Answer one CheckRequest with one CheckResponse, both as bytes.

        Raises:
            CannotDecideError: there is no snapshot to decide from.
        """
        (answer,) = self.check_all((data,))
        if answer is None:
            raise CannotDecideError(NO_SNAPSHOT)
        return answer

    def check_all(self, messages: Sequence[bytes]) -> list[bytes | None]:
        """Answer CheckRequests that came together, in their order; None: there is no snapshot to decide it from.

        A check request that is too long or cannot be read is denied with or without a snapshot: no policy would let
        it pass, and an error instead would hand it to fail-open, which lets it pass. A fault at one touches no other.

        All are read, then all are decided, then all are answered: a processor that does the same for one check after
        the other predicts better what comes next, and takes a sixth less time (loadtest/NOTES.md).
        """
        started = time.perf_counter()
        snapshot = self._current()
        if snapshot is not None and snapshot.options is not self._options:
            self._take_options(snapshot.options)
        checks = Checks(len(messages))
        self._read(messages, checks)
        if snapshot is not None:
            self._decide(checks, snapshot)
            checks.revision = snapshot.revision
        answers = self._write(checks)
        checks.seconds = (time.perf_counter() - started) / max(1, len(messages))
        if snapshot is None:
            for _ in range(checks.drop_undecided()):
                self._observe_unavailable()
        try:
            if checks.decisions:
                self._observe(checks)
        except Exception:  # noqa: BLE001  (the answers stand: who counts checks has no say in them)
            if not self._observer_failed:  # said once: at thousands of checks a second the log is the next fault
                self._observer_failed = True
                _log.exception("checks are answered but not observed any more, or not all of them")
        return answers

    def _take_options(self, options: DecisionOptions) -> None:
        self._options = options
        naming = {source.name for source in options.tenant_sources if source.kind is SourceKind.HEADER}
        self._reader = CheckRequestReader(self._kept_headers | naming, with_peer=options.needs_peer)

    def _read(self, messages: Iterable[bytes], checks: Checks) -> None:
        """Read what is asked, and decide about what cannot be read."""
        reader, longest = self._reader, self._max_request_bytes
        asked, decisions = checks.asked, checks.decisions
        for number, data in enumerate(messages):
            try:
                if len(data) > longest:
                    decisions[number] = Denied(Reason.REQUEST_TOO_LARGE)
                else:
                    asked[number] = reader.read(data)
            except BadCheckRequestError:
                decisions[number] = Denied(Reason.BAD_REQUEST)
            except Exception as error:  # noqa: BLE001  (a fault that a request can provoke must deny it)
                checks.deny(number, error)

    def _decide(self, checks: Checks, snapshot: Snapshot) -> None:
        """Decide about all that could be read."""
        clock, decisions = self._clock, checks.decisions
        for number, attributes in enumerate(checks.asked):
            if attributes is not None:
                try:
                    decisions[number] = decide(attributes, snapshot, clock())
                except Exception as error:  # noqa: BLE001  (as above)
                    checks.deny(number, error)

    def _write(self, checks: Checks) -> list[bytes | None]:
        """Return the answers; None where there is no decision."""
        writer, asked, revision = self._writer, checks.asked, checks.revision
        answers: list[bytes | None] = []
        for number, decision in enumerate(checks.decisions):
            answer: bytes | None = None
            attributes = asked[number]
            try:
                if attributes is not None and decision is not None:
                    answer = writer.write(decision, request_id=attributes.request_id, revision=revision)
                elif decision is not None:
                    answer = writer.write(decision, request_id="", revision=0)
            except Exception as error:  # noqa: BLE001  (as above)
                answer = self._internal_error_answer
                checks.deny(number, error)
            answers.append(answer)
        return answers
