"""Carries out wishes: reads what each must know, plans, has dangers confirmed, applies. No I/O but the store's."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from authz_server.cli.acknowledgement import Acknowledgement
from authz_server.cli.changes import (
    Effect,
    Known,
    MissingEntriesError,
    Plan,
    Step,
    Wish,
    closing_concerns,
    missing_hints,
)
from authz_server.cli.failures import (
    BadInputError,
    ChangedMeanwhileError,
    InterruptedWriteError,
    RefusedError,
    UnknownOutcomeError,
)
from authz_server.policy.records import RecordKey
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.store.interface import (
    AlreadyInitialisedError,
    Change,
    ChangeIdUsedError,
    ConflictError,
    Difference,
    EpochChangedError,
    Event,
    EventRecord,
    InconsistentStateError,
    NotInitialisedError,
    Position,
    RevisionChangedError,
    Store,
    StoredRecord,
    StoreUnavailableError,
    WriteResult,
)
from authz_server.store.keys import decode_record

FIRST_LOOK_SECONDS = 10.0
"""How long a store may be silent before somebody at a terminal is told; the store's own patience is longer."""

WRITE_SECONDS = 15.0
"""How long a change may be under way before its outcome is called unknown: that leaves the store time to try again."""


@dataclass(frozen=True, slots=True)
class Order:
    """Who wants a change and why."""

    actor: str
    reason: str
    change_id: str
    resent: bool
    """Whether the change id was given, so that the change may have been applied before."""
    now: float
    """Seconds since the Unix epoch."""


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a wish."""

    action: str
    order: Order
    position: Position
    """Of the change; where nothing was to be done, of the policy that was read."""
    steps: tuple[Step, ...]
    changed: bool
    """Whether the policy differs from before, because of this change id."""
    repeated: bool = False
    """Whether this change id had been applied before, so that nothing was written now."""
    notes: tuple[str, ...] = ()
    acknowledgement: Acknowledgement | None = None
    """Which servers have it, when that was waited for."""
    difference: Difference | None = None
    """Of a change of any size, which has no steps."""


async def first_look(store: Store) -> None:
    """Find out soon whether the store answers; a policy it need not hold, nor a sound one.

    What fails here leaves nothing in doubt.

    Raises:
        StoreError: it cannot be used; StoreUnavailableError after FIRST_LOOK_SECONDS of silence.
    """
    try:
        async with asyncio.timeout(FIRST_LOOK_SECONDS):
            with suppress(NotInitialisedError, InconsistentStateError):
                await store.position()
    except TimeoutError as error:
        raise StoreUnavailableError(
            f"the store does not answer: nothing came back within {FIRST_LOOK_SECONDS:g} seconds"
        ) from error


async def initialise(store: Store, order: Order, *, if_missing: bool = False) -> Done:
    """Create an empty policy (AlreadyInitialisedError: there is one, unless that is fine: `if_missing`)."""
    try:
        async with telling_outcome(order.change_id):
            result = await store.init(actor=order.actor, reason=order.reason, change_id=order.change_id)
    except AlreadyInitialisedError:
        if not if_missing:
            raise
        position = await store.position()
        return Done("init", order, position, (), changed=False)
    return _done("init", order, result, Plan((), ()))


async def carry_out(
    store: Store,
    order: Order,
    prepare: Callable[[Store], Awaitable[Wish]],
    confirm: Callable[[tuple[str, ...]], None],
) -> Done:
    """Do what a wish asks for, in one change, or nothing.

    Args:
        store: where the policy is.
        order: who and why.
        prepare: makes the wish; it may look into the store for it.
        confirm: called with the dangers of the plan, if there are any; raises when nobody accepts them.

    Raises:
        AuthzctlError: it was not done; the kinds are in `failures`.
        StoreError: the store could not be read.
    """
    position = await store.position()
    wish = await prepare(store)
    keys = tuple(dict.fromkeys(wish.keys()))
    # Planning it again would find its own outcome ("is there already").
    if order.resent and (event := await store.find_change(order.change_id)):
        if event.action != wish.action or not {record.key for record in event.records} <= set(keys):
            raise BadInputError(
                [f"the change id {order.change_id!r} belongs to another change: {event.action} by {event.actor}"]
            )
        await _require_no_more(store, wish, event, order)
        return _repeated(order, event)

    known = Known(await store.read_many(keys))
    try:
        plan = wish.plan(known, order.now)
    except MissingEntriesError as error:
        entries = (await load_snapshot(store, DecisionOptions())).entries
        hints = missing_hints(error.list_name, error.missing, entries, order.now)
        raise MissingEntriesError(error.list_name, error.missing, hints) from error
    if plan.closes:
        entries = (await load_snapshot(store, DecisionOptions())).entries
        plan = closing_concerns(plan, entries, order.now)
    if not plan.writes:
        return Done(wish.action, order, position, plan.steps, changed=False, notes=plan.notes)
    if plan.concerns:
        confirm(plan.concerns)
    change = Change(
        order.change_id,
        position.epoch,
        order.actor,
        order.reason,
        wish.action,
        plan.writes,
        plan.checks,
        position.revision if plan.alone else None,
    )
    try:
        async with telling_outcome(order.change_id):
            result = await store.apply(change)
    except ConflictError as error:
        raise ChangedMeanwhileError(
            [f"{error.key} was changed by somebody else at this moment: look at it, and ask again if it is still right"]
        ) from error
    except RevisionChangedError as error:
        raise ChangedMeanwhileError(["somebody changed the policy at this moment: ask again"]) from error
    except ChangeIdUsedError as error:
        raise BadInputError([str(error)]) from error
    except EpochChangedError as error:
        raise ChangedMeanwhileError([f"the policy as a whole was replaced at this moment: {error}"]) from error
    return _done(wish.action, order, result, plan)


async def load_snapshot(store: Store, options: DecisionOptions, only: Collection[str] | None = None) -> Snapshot:
    """Load the policy as the server would at its start, or only some of its collections; and beside it what people say
    of the entries."""
    policy = await store.load(only)
    return build_snapshot(
        policy.records,
        epoch=policy.position.epoch,
        revision=policy.position.revision,
        options=options,
        keep_entries=True,
    )


async def _require_no_more(store: Store, wish: Wish, event: Event, order: Order) -> None:
    """Refuse a change id that comes back with a wish for more than its change wrote, unless the rest is so already.

    The wish is planned as it was then: on what the change found in the records that it wrote, and on the others as
    they are now.
    """
    found = {record.key: record.previous for record in event.records}
    others = await store.read_many(set(wish.keys()) - found.keys())
    if not others:
        return
    before = {
        key: None if text is None else StoredRecord(decode_record(key, text), text) for key, text in found.items()
    }
    lacking: list[RecordKey] = []
    try:
        plan = wish.plan(Known(before | others), order.now)
        lacking += (write.key for write in plan.writes if write.key in others)
    except MissingEntriesError:  # what is gone is as wished; what is there is not
        lacking += (key for key, stored in others.items() if stored is not None)
    except RefusedError as error:
        raise BadInputError([_other_wish(order, event, problem) for problem in error.problems]) from error
    if lacking:
        raise BadInputError([_other_wish(order, event, f"{key} was not part of it") for key in lacking])


def _other_wish(order: Order, event: Event, problem: str) -> str:
    return (
        f"the change id {order.change_id!r} was applied as revision {event.position.revision}, and this command asks "
        f"for more: {problem}. Nothing was written now: send it with another change id"
    )


@asynccontextmanager
async def telling_outcome(change_id: str, *, small: bool = True) -> AsyncIterator[None]:
    """Say of a write that does not come to its end that nobody knows whether it was applied.

    Args:
        change_id: of the write.
        small: whether it is one command, and may take WRITE_SECONDS; else, as long as the store answers.
    """
    seconds = WRITE_SECONDS if small else None
    try:
        async with asyncio.timeout(seconds):
            yield
    except StoreUnavailableError as error:
        raise UnknownOutcomeError(change_id, str(error)) from error
    except TimeoutError as error:
        raise UnknownOutcomeError(change_id, f"no answer came within {seconds:g} seconds") from error
    except asyncio.CancelledError as error:  # how asyncio passes on Ctrl-C
        raise InterruptedWriteError(change_id) from error


def _done(action: str, order: Order, result: WriteResult, plan: Plan) -> Done:
    return Done(
        action,
        order,
        result.position,
        plan.steps,
        changed=True,
        repeated=result.repeated,
        notes=plan.notes,
    )


def _repeated(order: Order, event: Event) -> Done:
    steps = tuple(Step(record.key, _effect(record), record.record) for record in event.records)
    return Done(event.action, order, event.position, steps, changed=True, repeated=True)


def _effect(record: EventRecord) -> Effect:
    if record.new is None:
        return Effect.REMOVED
    return Effect.REPLACED if record.previous is not None else Effect.ADDED
