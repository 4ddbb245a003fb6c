"""Many tenants at once: what a drain or a rebalance would move, and how moves are carried out in batches.

A **strict** move goes in three steps for each batch: hold (the tenants' requests are denied with 503), wait until every
server has acknowledged the hold, switch. So no request reaches the old instance after the first has reached the new.
Whatever stops it in between, the batch is released: its tenants stay where they were. What is left when not even that
can be done (the process was killed, the store is away) are holds that `affinity holds` lists; the same command, sent
again, goes on with them, and `affinity release` ends them.
"""

import asyncio
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from authz_server.cli.acknowledgement import Acknowledgement, end_if_interrupted, wait_for_servers
from authz_server.cli.administration import Done, Order, carry_out
from authz_server.cli.changes import (
    Effect,
    HoldTenant,
    Known,
    MoveTenant,
    ReleaseTenant,
    SwitchTenant,
    Together,
    Wish,
    counted,
)
from authz_server.cli.failures import AuthzctlError, MoveStoppedError, NotAcknowledgedError, RefusedError
from authz_server.policy.affinity import Hold, Instance, InstanceState, Tenant, rendezvous
from authz_server.policy.records import RecordKey, RecordKind
from authz_server.store.interface import MAX_WRITES_PER_CHANGE, Position, Store, StoreError

LARGEST_BATCH = MAX_WRITES_PER_CHANGE // 2
"""Wishes in one change: each may need its own instance checked."""

_RELEASE_SECONDS = 5.0
_CONCERNS_SHOWN = 5

OnProgress = Callable[[int, int, str], None]
"""Called with how many are done, of how many, and what goes on (may be empty). Must not raise."""


@dataclass(frozen=True, slots=True)
class Strictly:
    """How a strict move waits."""

    wait_seconds: float
    """For all servers to acknowledge the hold of a batch."""
    settle_seconds: float
    """After that, for requests that were let through before to arrive."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of many wishes."""

    action: str
    records: int
    """How many were changed."""
    changes: tuple[Position, ...]
    """What was written, in order."""
    notes: tuple[str, ...] = ()
    noun: str = "tenant"
    """What one of the records is."""
    acknowledgement: Acknowledgement | None = None
    """Which servers have the last change, when that was waited for."""


def plan_drain(name: str, tenants: Iterable[Tenant], instances: Iterable[Instance]) -> tuple[MoveTenant, ...]:
    """Return where the tenants of an instance go: where the hash places them among the other active instances.

    One that is held already goes where it is held for.

    Raises:
        RefusedError: there is no other active instance.
    """
    others = [instance for instance in instances if instance.name != name]
    return _plan((tenant for tenant in tenants if tenant.instance == name), others)


def plan_rebalance(
    tenants: Iterable[Tenant], instances: Iterable[Instance], *, onto: Collection[str] = ()
) -> tuple[MoveTenant, ...]:
    """Return the tenants that the hash places elsewhere than they are pinned; with `onto`, only those it places there.

    Raises:
        RefusedError: there is no active instance.
    """
    moves = _plan((tenant for tenant in tenants if tenant.instance is not None), list(instances))
    return tuple(move for move in moves if move.instance != move.origin and (not onto or move.instance in onto))


def _plan(tenants: Iterable[Tenant], instances: Sequence[Instance]) -> tuple[MoveTenant, ...]:
    if not any(instance.state is InstanceState.ACTIVE for instance in instances):
        states = ", ".join(f"{instance.name} is {instance.state}" for instance in instances) or "there is no other"
        raise RefusedError([f"there is no active instance to move tenants to ({states})"])
    moves = []
    for tenant in sorted(tenants, key=lambda each: each.id):
        target = tenant.hold.to if tenant.hold else rendezvous(tenant.id, instances)
        if target is not None:
            moves.append(MoveTenant(tenant.id, target, tenant.instance))
    return tuple(moves)


async def require_sound(
    store: Store, order: Order, wishes: Sequence[Wish], confirm: Callable[[tuple[str, ...]], None]
) -> None:
    """Plan all wishes as if they were one change, so that all problems and dangers are told before anything is written.

    Raises:
        RefusedError: one of them does not fit the policy.
    """
    together = Together(tuple(wishes))
    plan = together.plan(Known(await store.read_many(together.keys())), order.now)
    concerns = plan.concerns
    if len(concerns) > _CONCERNS_SHOWN:
        concerns = (*concerns[:_CONCERNS_SHOWN], f"and {len(concerns) - _CONCERNS_SHOWN:,} more like that")
    if concerns:
        confirm(concerns)


class Mover:
    """Carries out many wishes, a batch in one change, each batch whole or not at all.

    Args:
        store: where the policy is.
        order: who and why; every change gets a change id of its own.
        batch: wishes in one change.
        on_progress: told how far it is.
        noun: what a wish is about, for people.
    """

    def __init__(
        self, store: Store, order: Order, *, batch: int, on_progress: OnProgress, noun: str = "tenant"
    ) -> None:
        self._store = store
        self._order = order
        self._batch = batch
        self._on_progress = on_progress
        self._noun = noun
        self._changed = 0
        self._changes: list[Position] = []
        self._notes: dict[str, None] = {}

    async def at_once(self, wishes: Sequence[Wish]) -> Moved:
        """Carry out wishes of one action as they are."""
        for start in range(0, len(wishes), self._batch):
            try:
                end_if_interrupted()
                await self._do(Together(tuple(wishes[start : start + self._batch])), counts=True)
            except (AuthzctlError, StoreError, asyncio.CancelledError) as error:
                raise self._stopped(error, len(wishes), held=()) from error
            self._on_progress(min(start + self._batch, len(wishes)), len(wishes), "")
        return self._moved(wishes[0].action)

    async def strictly(self, moves: Sequence[MoveTenant], how: Strictly) -> Moved:
        """Move tenants so that no request reaches the old instance after the first has reached the new.

        Raises:
            MoveStoppedError: not all were moved; it says what was, and what is held.
        """
        await self.require_servers(how)
        for start in range(0, len(moves), self._batch):
            batch = moves[start : start + self._batch]
            try:
                end_if_interrupted()
                await self._move_strictly(batch, how, start, len(moves))
            except (AuthzctlError, StoreError, asyncio.CancelledError) as error:
                raise self._stopped(error, len(moves), held=await self._release(batch)) from error
            self._on_progress(start + len(batch), len(moves), "")
        return self._moved("affinity.move")

    async def require_servers(self, how: Strictly) -> None:
        """See to it that every server decides by what the store holds now, before anything is held.

        Raises:
            NotAcknowledgedError: one may not, and would not acknowledge a hold either.
        """
        told = await wait_for_servers(self._store, await self._store.position(), seconds=how.wait_seconds)
        if told.interrupted:
            raise asyncio.CancelledError
        if not told.complete:
            raise NotAcknowledgedError(
                ["nothing was held or moved: not every server would acknowledge a hold", *_lagging(told)],
                ["`authzctl replica forget NAME` is for a server that is gone for good; --at-once waits for none"],
            )

    async def _move_strictly(self, batch: Sequence[MoveTenant], how: Strictly, before: int, total: int) -> None:
        hold = {
            move: Hold(self._order.actor, move.instance, int(self._order.now), self._order.reason) for move in batch
        }
        self._on_progress(before, total, "held; waiting for all servers")
        held = await self._do(Together(tuple(HoldTenant(move, hold[move]) for move in batch)))
        told = await wait_for_servers(self._store, held.position, seconds=how.wait_seconds)
        if told.interrupted:
            raise asyncio.CancelledError
        if not told.complete:
            raise NotAcknowledgedError(["not every server has acknowledged the hold", *_lagging(told)])
        self._on_progress(before, total, "held; letting requests arrive")
        await asyncio.sleep(how.settle_seconds)
        await self._do(Together(tuple(map(SwitchTenant, batch))), counts=True)

    async def _do(self, wish: Wish, *, counts: bool = False) -> Done:
        async def given(_: Store) -> Wish:
            return wish

        done = await carry_out(self._store, self._order_of_its_own(), given, lambda _: None)
        self._notes |= dict.fromkeys(done.notes)
        if done.changed:
            self._changes.append(done.position)
        if counts:
            self._changed += sum(step.effect is not Effect.UNCHANGED for step in done.steps)
        return done

    async def _release(self, batch: Sequence[MoveTenant]) -> tuple[str, ...]:
        """Release what this command holds, and return the tenants that are, or may be, held all the same."""
        keys = {RecordKey(RecordKind.TENANT, move.tenant): move for move in batch}
        try:
            async with asyncio.timeout(_RELEASE_SECONDS):
                ours = []
                for key, stored in (await self._store.read_many(keys)).items():
                    hold = stored.record.hold if stored and isinstance(stored.record, Tenant) else None
                    if hold and (hold.owner, hold.to) == (self._order.actor, keys[key].instance):
                        ours.append(ReleaseTenant(key.name, self._order.actor))
                if ours:
                    await self._do(Together(tuple(ours)))
        except (AuthzctlError, StoreError, TimeoutError, asyncio.CancelledError):
            return tuple(move.tenant for move in batch)
        return ()

    def _order_of_its_own(self) -> Order:
        return replace(self._order, change_id=str(uuid.uuid4()), resent=False)

    def _moved(self, action: str) -> Moved:
        return Moved(action, self._changed, tuple(self._changes), tuple(self._notes), self._noun)

    def _stopped(self, error: BaseException, total: int, *, held: Sequence[str]) -> MoveStoppedError:
        interrupted = isinstance(error, asyncio.CancelledError)
        problems = list(error.problems) if isinstance(error, AuthzctlError) else []
        if not problems:
            problems = ["interrupted"] if interrupted else [str(error)]
        problems.append(
            f"{self._changed:,} of {counted(total, self._noun)} done; sent again, this command does the rest"
        )
        hints = list(error.hints) if isinstance(error, AuthzctlError) else []
        if held:
            problems.append(
                f"{counted(len(held), 'tenant')} may be held, so that their requests get 503: {', '.join(held[:5])}"
                f"{' ...' if len(held) > 5 else ''}. `authzctl affinity holds` lists them, `authzctl affinity release` "
                "ends it"
            )
        exit_code = 130 if interrupted else error.exit_code if isinstance(error, AuthzctlError) else 3
        return MoveStoppedError(problems, hints, exit_code=exit_code)


def _lagging(told: Acknowledgement) -> list[str]:
    return [*([told.problem] if told.problem else []), *(f"{each.replica}: {each.why}" for each in told.lagging)]
