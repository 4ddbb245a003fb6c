"""Moves of many tenants: what would be moved, and that a strict one never has two instances in use."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

import pytest
from support.policies import Writer
from support.waiting import eventually

from authz_server.cli.administration import Order
from authz_server.cli.changes import HoldTenant, MoveTenant, PinTenant
from authz_server.cli.failures import (
    MoveStoppedError,
    NotAcknowledgedError,
    RefusedError,
)
from authz_server.cli.moves import Moved, Mover, Strictly, plan_drain, plan_rebalance, require_sound
from authz_server.policy.affinity import Hold, Instance, InstanceState, Tenant, rendezvous
from authz_server.policy.records import record_key
from authz_server.policy.snapshot import DecisionOptions
from authz_server.refresher import Refresher
from authz_server.replicas import Reporter
from authz_server.store.interface import Change, Event, Position, StoreUnavailableError, WriteResult
from authz_server.store.memory_store import MemoryStore

NOW = 1_800_000_000.0
INSTANCES = (Instance("q1"), Instance("q2"), Instance("q3", 2))
TENANTS = tuple(Tenant(f"t{number}", "q1") for number in range(30))


def ways(moves: Sequence[MoveTenant]) -> dict[str, tuple[str | None, str]]:
    return {move.tenant: (move.origin, move.instance) for move in moves}


# Plans


def test_a_drain_places_each_tenant_where_the_hash_does_among_the_others() -> None:
    there = [*TENANTS, Tenant("elsewhere", "q2")]
    found = ways(plan_drain("q1", there, INSTANCES))
    assert found == {each.id: ("q1", rendezvous(each.id, INSTANCES[1:])) for each in TENANTS}
    assert {instance for _, instance in found.values()} == {"q2", "q3"}


def test_a_drain_goes_on_with_what_is_held_already() -> None:
    hold = Hold("alice", "q2", 1, "r")
    (move,) = plan_drain(
        "q1", [Tenant("t", "q1", held=True, hold=hold)], [Instance("q1"), Instance("q2"), Instance("q3", 99)]
    )
    assert (move.origin, move.instance) == ("q1", "q2")


@pytest.mark.parametrize(
    "others", [(), (Instance("q2", state=InstanceState.DOWN), Instance("q3", state=InstanceState.DRAINING))]
)
def test_a_drain_without_another_active_instance_is_refused(others: tuple[Instance, ...]) -> None:
    with pytest.raises(RefusedError, match="no active instance"):
        plan_drain("q1", TENANTS, [Instance("q1"), *others])


def test_a_rebalance_moves_only_what_the_hash_places_elsewhere() -> None:
    placed = [Tenant(each.id, rendezvous(each.id, INSTANCES)) for each in TENANTS]
    assert plan_rebalance(placed, INSTANCES) == ()
    grown = [*INSTANCES, Instance("q4")]
    moves = plan_rebalance(placed, grown)
    assert 0 < len(moves) < 20
    assert {move.instance for move in moves} == {"q4"}, "one that comes takes only its own"
    assert plan_rebalance(placed, grown, onto={"q2"}) == ()
    assert plan_rebalance([Tenant("x", None)], INSTANCES) == (), "a pin that cannot be read is not moved"


# Carrying out


@dataclass
class Server:
    """A server in this process: what it decides by, and its reports."""

    store: MemoryStore
    name: str
    behind: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared: it applies nothing."""

    def __post_init__(self) -> None:
        self.behind.set()
        self.reporter = Reporter(self.store, self.name, "p", on_problem=lambda _: None)
        self.refresher = Refresher(
            Delayed(self), DecisionOptions(), on_status=lambda status: self._applied(status.position)
        )

    def _applied(self, position: Position | None) -> None:
        if position:
            self.reporter.applied(position)

    def instance_of(self, tenant: str) -> str | None:
        """Where this server sends the tenant's requests; None: they are denied."""
        snapshot = self.refresher.current
        assert snapshot
        found = snapshot.tenants[tenant]
        return None if found.held else found.instance


class Delayed(MemoryStore):
    """The store as a server sees it that may be behind."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def __getattribute__(self, name: str) -> object:
        if name in ("server", "events_after"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "server").store, name)

    async def events_after(self, position: Position, *, wait_seconds: float) -> list[Event]:
        events = await self.server.store.events_after(position, wait_seconds=wait_seconds)
        await self.server.behind.wait()
        return events


class Mesh:
    """A policy with tenants on q1, servers that follow it, and a watch over where they send requests."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.servers: list[Server] = []
        self.seen: dict[str, list[str]] = {}
        """Tenant -> the instances that it was sent to, in order of time."""
        self.progress: list[tuple[int, int, str]] = []

    def watch(self) -> None:
        for server in self.servers:
            for each in TENANTS:
                instance = server.instance_of(each.id)
                if instance and (not self.seen.get(each.id) or self.seen[each.id][-1] != instance):
                    self.seen.setdefault(each.id, []).append(instance)

    async def see_all_moved(self) -> None:
        """Wait until every server uses the new instances, and see that none was used before the old one was left."""
        await eventually(lambda: all(s.instance_of(t) == TARGETS[t] for s in self.servers for t in TARGETS))
        self.watch()
        assert self.seen == {tenant: ["q1", instance] for tenant, instance in TARGETS.items()}

    def mover(self, batch: int = 7) -> Mover:
        order = Order("alice", "a move", "unused", resent=False, now=NOW)
        return Mover(self.store, order, batch=batch, on_progress=lambda *told: self.progress.append(told))

    async def pins(self) -> dict[str, str | None]:
        return {
            record.id: record.instance for _, record in (await self.store.load()).records if isinstance(record, Tenant)
        }

    async def held(self) -> list[str]:
        return sorted(
            record.id for _, record in (await self.store.load()).records if isinstance(record, Tenant) and record.held
        )


@pytest.fixture(params=[MemoryStore])
async def mesh(request: pytest.FixtureRequest) -> AsyncIterator[Mesh]:
    mesh = Mesh(request.param())
    writer = Writer(mesh.store)
    await writer.init()
    await writer.set(*((record_key(record), record) for record in (*INSTANCES, *TENANTS)))
    tasks = []
    async with AsyncExitStack() as stack:
        for name in ("a", "b"):
            server = Server(mesh.store, name)
            mesh.servers.append(server)
            tasks += [asyncio.create_task(server.refresher.run()), asyncio.create_task(server.reporter.run())]
            stack.callback(tasks[-1].cancel)
            stack.callback(tasks[-2].cancel)
        await eventually(lambda: all(server.refresher.current for server in mesh.servers))

        async def watching() -> None:
            while True:
                mesh.watch()
                await asyncio.sleep(0)

        stack.callback(asyncio.create_task(watching()).cancel)
        yield mesh


DRAIN = plan_drain("q1", TENANTS, INSTANCES)
TARGETS: dict[str, str | None] = {move.tenant: move.instance for move in DRAIN}
QUICKLY = Strictly(wait_seconds=10, settle_seconds=0.01)


async def test_a_strict_move_never_has_two_instances_in_use(mesh: Mesh) -> None:
    moved = await mesh.mover().strictly(DRAIN, QUICKLY)
    assert (moved.records, len(moved.changes)) == (30, 10)
    assert await mesh.pins() == TARGETS
    await mesh.see_all_moved()
    assert await mesh.held() == []


async def test_a_server_that_is_behind_holds_the_switch_up(mesh: Mesh) -> None:
    mesh.servers[1].behind.clear()
    moving = asyncio.create_task(mesh.mover(batch=30).strictly(DRAIN, QUICKLY))
    await eventually(lambda: mesh.servers[0].instance_of("t0") is None)
    await asyncio.sleep(0.2)
    assert not moving.done()
    assert len(await mesh.held()) == 30
    assert mesh.servers[1].instance_of("t0") == "q1"
    mesh.servers[1].behind.set()
    assert (await moving).records == 30
    await mesh.see_all_moved()


async def test_when_one_does_not_acknowledge_in_time_the_batch_stays_where_it_was(mesh: Mesh) -> None:
    mesh.servers[1].behind.clear()
    with pytest.raises(MoveStoppedError) as caught:
        await mesh.mover(batch=30).strictly(DRAIN, Strictly(0.1, 0.01))
    assert caught.value.exit_code == 4
    assert "b: it decides by revision 2" in caught.value.problems
    assert "0 of 30 tenants done" in caught.value.problems[-1]
    assert await mesh.held() == []
    assert set((await mesh.pins()).values()) == {"q1"}


async def test_nothing_is_held_when_a_server_is_behind_from_the_start(mesh: Mesh) -> None:
    mesh.servers[1].behind.clear()
    await Writer(mesh.store).set((record_key(Instance("q9")), Instance("q9")))
    with pytest.raises(NotAcknowledgedError, match="nothing was held"):
        await mesh.mover().strictly(DRAIN, Strictly(0.05, 0))
    assert (await mesh.store.position()).revision == 3


async def test_an_interruption_releases_what_is_held_and_the_same_again_does_the_rest(mesh: Mesh) -> None:
    moving = asyncio.create_task(mesh.mover().strictly(DRAIN, Strictly(10, 0.05)))
    await eventually(lambda: any(done == 14 for done, _, _ in mesh.progress))
    mesh.servers[1].behind.clear()
    await eventually(lambda: mesh.servers[0].instance_of(DRAIN[14].tenant) is None)
    moving.cancel()
    with pytest.raises(MoveStoppedError, match="14 of 30") as caught:
        await moving
    assert caught.value.exit_code == 130
    assert await mesh.held() == []
    mesh.servers[1].behind.set()
    tenants = [Tenant(name, where) for name, where in (await mesh.pins()).items()]
    rest = plan_drain("q1", tenants, INSTANCES)
    assert len(rest) == 16
    await mesh.mover().strictly(rest, QUICKLY)
    assert await mesh.pins() == TARGETS
    assert all(seen in (["q1"], ["q1", TARGETS[tenant]]) for tenant, seen in mesh.seen.items())


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "at_once"])
async def test_an_interruption_that_is_swallowed_on_the_way_ends_the_moves_all_the_same(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    apply = mesh.store.apply

    async def swallowing(change: Change) -> WriteResult:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)
        return await apply(change)

    monkeypatch.setattr(mesh.store, "apply", swallowing)
    mover = mesh.mover()
    moving = asyncio.create_task(mover.strictly(DRAIN, QUICKLY) if strict else mover.at_once(DRAIN))
    await eventually(lambda: any(done for done, _, _ in mesh.progress))
    moving.cancel()
    with pytest.raises(MoveStoppedError, match="of 30 tenants done") as caught:
        await moving
    assert caught.value.exit_code == 130
    assert await mesh.held() == []


async def hold(mesh: Mesh, tenant: str, to: str, owner: str = "alice") -> None:
    """As a command leaves a tenant that was killed in the middle."""
    record = Tenant(tenant, "q1", held=True, hold=Hold(owner, to, int(NOW), "a move"))
    await Writer(mesh.store).set((record_key(record), record))


async def test_a_move_that_was_killed_is_gone_on_with(mesh: Mesh) -> None:
    await hold(mesh, "t0", "q2")
    moved = await mesh.mover().strictly([MoveTenant("t0", "q2")], QUICKLY)
    assert moved.records == 1
    assert (await mesh.pins())["t0"] == "q2"
    assert await mesh.held() == []


async def test_a_hold_for_another_instance_is_not_taken_over(mesh: Mesh) -> None:
    await hold(mesh, "t0", "q3", "bob")
    with pytest.raises(MoveStoppedError, match="held by bob since 2027-01-15T08:00:00Z for a move to q3"):
        await mesh.mover().strictly([MoveTenant("t0", "q2"), MoveTenant("t1", "q2")], QUICKLY)
    assert await mesh.held() == ["t0"], "and bob's hold is not released"


async def test_a_pin_that_cannot_be_read_is_not_moved_strictly(mesh: Mesh) -> None:
    """Servers that read it before still use what it said."""
    mesh.store.collections["tenants"]["t0"] = "{}"
    with pytest.raises(MoveStoppedError, match="--at-once writes it anew"):
        await mesh.mover().strictly([MoveTenant("t0", "q2")], QUICKLY)
    assert (await mesh.store.position()).revision == 2


@pytest.mark.parametrize("held", [0, 1, 7])
async def test_another_ones_hold_for_the_same_move_is_asked_about(mesh: Mesh, held: int) -> None:
    tenants = [move.tenant for move in DRAIN[:10]]
    for tenant in tenants[:held]:
        await hold(mesh, tenant, "q2", "bob")
    await hold(mesh, tenants[9], "q2", "alice")
    asked: list[str] = []
    order = Order("alice", "r", "c", resent=False, now=NOW)
    ours = Hold("alice", "q2", int(NOW), "r")
    wishes = [HoldTenant(MoveTenant(tenant, "q2", "q1"), ours) for tenant in tenants]
    await require_sound(mesh.store, order, wishes, asked.extend)
    theirs = [text for text in asked if "is held by bob" in text and "that move may still be under way" in text]
    assert (len(theirs), asked[len(theirs) :]) == (min(held, 5), ["and 2 more like that"] if held > 5 else [])


async def test_one_that_somebody_moved_meanwhile_is_left_alone(mesh: Mesh) -> None:
    there = Tenant(DRAIN[0].tenant, "q2" if DRAIN[0].instance == "q3" else "q3")
    await Writer(mesh.store).set((record_key(there), there))
    for carry_out in (lambda: mesh.mover().strictly(DRAIN[:1], QUICKLY), lambda: mesh.mover().at_once(DRAIN[:1])):
        moved = await carry_out()
        assert (moved.records, moved.changes) == (0, ())
        assert moved.notes == (f"tenant {there.id} is pinned to {there.instance} by now, and not moved",)


class Failing(MemoryStore):
    """A store that is away for one of our writes, and, on demand, stays so."""

    fail_at = ""
    arrives = True
    stays_away = False

    async def apply(self, change: Change) -> WriteResult:
        if change.action != self.fail_at:
            return await super().apply(change)
        self.fail_at = ""
        if self.arrives:
            await super().apply(change)
        self.available = not self.stays_away
        raise StoreUnavailableError("cut")


@pytest.mark.parametrize("mesh", [Failing], indirect=True)
@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("action", ["affinity.hold", "affinity.move"])
async def test_a_write_whose_answer_was_lost_leaves_no_hold(mesh: Mesh, action: str, *, arrives: bool) -> None:
    assert isinstance(mesh.store, Failing)
    mesh.store.fail_at, mesh.store.arrives = action, arrives
    with pytest.raises(MoveStoppedError) as caught:
        await mesh.mover(batch=30).strictly(DRAIN, QUICKLY)
    assert caught.value.exit_code == 3
    assert await mesh.held() == []
    assert await mesh.pins() == (TARGETS if arrives and action == "affinity.move" else dict.fromkeys(TARGETS, "q1"))


@pytest.mark.parametrize("mesh", [Failing], indirect=True)
async def test_what_cannot_be_released_is_told(mesh: Mesh) -> None:
    assert isinstance(mesh.store, Failing)
    mesh.store.fail_at, mesh.store.arrives, mesh.store.stays_away = "affinity.move", False, True
    with pytest.raises(MoveStoppedError) as caught:
        await mesh.mover(batch=30).strictly(DRAIN, QUICKLY)
    assert "30 tenants may be held" in caught.value.problems[-1]
    assert "authzctl affinity holds" in caught.value.problems[-1]
    mesh.store.available = True
    assert len(await mesh.held()) == 30
    await mesh.mover().strictly(DRAIN, QUICKLY)
    assert await mesh.pins() == TARGETS


async def test_many_wishes_go_in_batches_and_the_same_again_is_nothing(mesh: Mesh) -> None:
    wishes = [PinTenant("affinity.pin", f"new{number}", "q2") for number in range(20)]
    moved = await mesh.mover().at_once(wishes)
    assert (moved.action, moved.records, len(moved.changes)) == ("affinity.pin", 20, 3)
    assert [told[0] for told in mesh.progress] == [7, 14, 20]
    assert await mesh.mover().at_once(wishes) == Moved("affinity.pin", 0, ())


async def test_all_problems_are_told_before_anything_is_written(mesh: Mesh) -> None:
    wishes = [MoveTenant("t0", "q2"), MoveTenant("nobody", "q2"), MoveTenant("t1", "q9")]
    with pytest.raises(RefusedError) as caught:
        await require_sound(mesh.store, Order("alice", "r", "c", resent=False, now=NOW), wishes, lambda _: None)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "tenant nobody is not registered",
        "instance q9 does not exist",
    ]
