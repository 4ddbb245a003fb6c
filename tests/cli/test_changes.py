"""From a wish to a change: what is written, what is refused, what is asked about. All on a store without a server."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from support.policies import Writer

from authz_server.cli import administration
from authz_server.cli.administration import Done, Order, carry_out, initialise, load_snapshot
from authz_server.cli.changes import (
    AddInstance,
    AddResource,
    AddToList,
    AddToScope,
    Effect,
    MoveTenant,
    PinTenant,
    ReleaseTenant,
    RemoveFromList,
    RemoveFromScope,
    RemoveInstance,
    SetInstance,
    SetScope,
    Together,
    UnpinTenant,
    Wish,
    place_tenant,
)
from authz_server.cli.failures import (
    AuthzctlError,
    BadInputError,
    ChangedMeanwhileError,
    ConfirmationNeededError,
    InterruptedWriteError,
    NotFoundError,
    RefusedError,
    UnknownOutcomeError,
)
from authz_server.policy.access import Enforcement, Entry, Mode, NamedList, Resource, Scope, Side
from authz_server.policy.addresses import parse_network
from authz_server.policy.affinity import Hold, Instance, InstanceState, Tenant, rendezvous
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.records import Record, RecordKey, RecordKind
from authz_server.policy.snapshot import DecisionOptions, Snapshot
from authz_server.store.interface import (
    MAX_WRITES_PER_CHANGE,
    AlreadyInitialisedError,
    Change,
    Store,
    StoreUnavailableError,
    WriteResult,
)
from authz_server.store.memory_store import MemoryStore

NOW = 1_800_000_000.0


def entry(cidr: str, *, reason: str = "scanner", expires_at: int | None = None, owner: str = "") -> Entry:
    return Entry(parse_network(cidr), reason, "alice", int(NOW), owner, expires_at)


def block(*cidrs: str, scope: str = "global") -> AddToScope:
    return AddToScope(Side.BLOCK, scope, tuple(map(entry, cidrs)))


class Desk:
    """An administrator in front of a store."""

    def __init__(self, store: MemoryStore, actor: str = "alice") -> None:
        self.store = store
        self.actor = actor
        self.asked: list[str] = []
        """The dangers that had to be confirmed, and were."""
        self._count = 0

    def order(self, change_id: str | None = None) -> Order:
        self._count += 1
        return Order(
            self.actor, "because", change_id or f"{self.actor}-{self._count}", resent=change_id is not None, now=NOW
        )

    async def do(self, wish: Wish, *, change_id: str | None = None) -> Done:
        async def given(_: object) -> Wish:
            return wish

        return await carry_out(self.store, self.order(change_id), given, self.asked.extend)

    async def refused(self, wish: Wish, kind: type[AuthzctlError]) -> tuple[str, ...]:
        """The problems of a wish that is refused and changes nothing."""
        before = await self.store.load()
        with pytest.raises(kind) as caught:
            await self.do(wish)
        assert await self.store.load() == before
        return caught.value.problems

    async def put(self, *records: tuple[RecordKey, Record]) -> None:
        """Set records that no command of today sets."""
        await Writer(self.store).set(*records)

    async def snapshot(self) -> Snapshot:
        return await load_snapshot(self.store, DecisionOptions())


@pytest.fixture
async def desk() -> Desk:
    store = MemoryStore(clock=lambda: NOW)
    desk = Desk(store)
    await initialise(store, desk.order())
    return desk


async def test_init_creates_an_empty_policy_once() -> None:
    store = MemoryStore()
    desk = Desk(store)
    done = await initialise(store, desk.order("first"))
    assert (done.action, done.position.revision, done.changed, done.repeated) == ("init", 1, True, False)
    assert (await initialise(store, desk.order("first"))).repeated
    with pytest.raises(AlreadyInitialisedError):
        await initialise(store, desk.order("second"))


async def test_a_change_says_what_was_done_and_stands_in_the_history(desk: Desk) -> None:
    done = await desk.do(block("203.0.113.0/24", "2001:db8::/48"))
    assert (done.action, done.position.revision, done.changed, done.repeated) == ("block.add", 2, True, False)
    assert [(step.effect, str(step.key)) for step in done.steps] == [
        (Effect.ADDED, "entry 203.0.113.0/24 in list global/block"),
        (Effect.ADDED, "entry 2001:db8::/48 in list global/block"),
    ]
    (event, _) = await desk.store.history(count=2)
    assert (event.action, event.actor, event.reason) == ("block.add", "alice", "because")
    assert event.position.change_id == done.order.change_id


# Entries that are there already


async def test_what_is_there_already_stays_and_is_told(desk: Desk) -> None:
    await desk.do(block("203.0.113.0/24"))
    done = await desk.do(AddToScope(Side.BLOCK, "global", (entry("203.0.113.0/24", reason="another word"),)))
    assert (done.changed, done.position.revision, [step.effect for step in done.steps]) == (
        False,
        2,
        [Effect.UNCHANGED],
    )
    assert done.steps[0].record == entry("203.0.113.0/24")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"expires_at": int(NOW) + 60}, {}, "2027-01-15T08:01:00Z (in 1m)"),
        ({}, {"expires_at": int(NOW) + 60}, "expires never"),
        ({"owner": "soc"}, {"owner": "netops"}, "owner soc"),
    ],
    ids=["never_for_soon", "soon_for_never", "another_owner"],
)
async def test_other_values_are_not_overwritten_unasked(
    desk: Desk, old: dict[str, int], new: dict[str, int], told: str
) -> None:
    await desk.do(AddToScope(Side.BLOCK, "global", (entry("203.0.113.0/24", **old),)))  # type: ignore[arg-type]
    wished = entry("203.0.113.0/24", **new)  # type: ignore[arg-type]
    (problem,) = await desk.refused(AddToScope(Side.BLOCK, "global", (wished,)), RefusedError)
    assert told in problem
    assert "--replace" in problem
    done = await desk.do(AddToScope(Side.BLOCK, "global", (wished,), replace=True))
    assert [(step.effect, step.record) for step in done.steps] == [(Effect.REPLACED, wished)]


async def test_an_entry_that_has_expired_is_as_good_as_none(desk: Desk) -> None:
    await desk.do(AddToScope(Side.BLOCK, "global", (entry("203.0.113.0/24", expires_at=int(NOW)),)))
    done = await desk.do(block("203.0.113.0/24"))
    assert [step.effect for step in done.steps] == [Effect.REPLACED]


async def test_what_cannot_be_read_is_overwritten_only_on_demand(desk: Desk) -> None:
    await desk.do(block("203.0.113.0/24"))
    desk.store.collections["entries:global/block"]["203.0.113.0/24"] = "{}"
    (problem,) = await desk.refused(block("203.0.113.0/24"), RefusedError)
    assert "cannot be read" in problem
    await desk.do(replace(block("203.0.113.0/24"), replace=True))
    assert not (await desk.snapshot()).problems


async def test_one_refused_entry_keeps_the_others_out(desk: Desk) -> None:
    await desk.do(AddToScope(Side.BLOCK, "global", (entry("203.0.113.0/24", expires_at=int(NOW) + 60),)))
    await desk.refused(block("198.51.100.0/24", "203.0.113.0/24"), RefusedError)


async def test_more_than_one_change_can_hold_is_refused(desk: Desk) -> None:
    entries = tuple(entry(f"10.{number >> 8}.{number & 255}.0/24") for number in range(MAX_WRITES_PER_CHANGE + 1))
    (problem,) = await desk.refused(AddToScope(Side.BLOCK, "global", entries), RefusedError)
    assert f"{len(entries)} records are too many" in problem
    await desk.do(AddToScope(Side.BLOCK, "global", entries[:-1]))


# Removing


async def test_removing_takes_the_entries_out(desk: Desk) -> None:
    await desk.do(block("203.0.113.0/24", "198.51.100.0/24"))
    done = await desk.do(RemoveFromScope(Side.BLOCK, "global", (parse_network("203.0.113.0/24"),)))
    assert [(step.effect, step.record) for step in done.steps] == [(Effect.REMOVED, None)]
    left = [str(network) for network, _ in (await desk.snapshot()).tables["global/block"].items()]
    assert left == ["198.51.100.0/24"]


async def test_removing_what_is_not_there_names_what_is(desk: Desk) -> None:
    await desk.do(block("203.0.113.0/24", "203.0.0.0/16", "203.0.113.7", scope="global"))
    await desk.do(AddToList("office", (entry("203.0.113.0/25"),)))
    wish = RemoveFromScope(Side.BLOCK, "global", tuple(map(parse_network, ("203.0.113.0/25", "2001:db8::/32"))))
    with pytest.raises(NotFoundError) as caught:
        await desk.do(wish)
    assert caught.value.problems == (
        "203.0.113.0/25 is not in list global/block: nothing was removed",
        "2001:db8::/32 is not in list global/block: nothing was removed",
    )
    covered, within, elsewhere = caught.value.hints
    assert "covered by 203.0.113.0/24 (scanner; by alice" in covered
    assert "within 203.0.113.0/25, global/block has 203.0.113.7/32" in within
    assert elsewhere == "203.0.113.0/25 is in office"


async def test_entries_that_cannot_be_read_can_be_removed(desk: Desk) -> None:
    await desk.do(block("203.0.113.0/24"))
    desk.store.collections["entries:global/block"]["203.0.113.0/24"] = "{}"
    await desk.do(RemoveFromScope(Side.BLOCK, "global", (parse_network("203.0.113.0/24"),)))
    assert not (await desk.snapshot()).problems


# Named lists


async def test_adding_to_a_named_list_creates_it(desk: Desk) -> None:
    done = await desk.do(AddToList("office", (entry("198.51.100.0/24"),), "our offices", "it"))
    assert [step.effect for step in done.steps] == [Effect.ADDED, Effect.ADDED]
    done = await desk.do(AddToList("office", (entry("192.0.2.0/24"),)))
    assert [step.effect for step in done.steps] == [Effect.UNCHANGED, Effect.ADDED]
    snapshot = await desk.snapshot()
    assert snapshot.named_lists == {"office": NamedList("office", "our offices", "it")}
    assert len(snapshot.tables["office"]) == 2
    (problem,) = await desk.refused(AddToList("office", (), "another"), RefusedError)
    assert "'our offices'" in problem
    await desk.do(AddToList("office", (), "another", replace=True))
    await desk.do(RemoveFromList("office", (parse_network("192.0.2.0/24"),)))
    snapshot = await desk.snapshot()
    assert snapshot.named_lists == {"office": NamedList("office", "another", "it")}
    assert len(snapshot.tables["office"]) == 1


# Scopes


async def test_entries_of_a_tenant_take_effect_at_once(desk: Desk) -> None:
    """A tenant's scope applies without a record of its own, so the change writes none."""
    done = await desk.do(block("203.0.113.0/24", scope="tenant:acme"))
    assert [str(step.key) for step in done.steps] == ["entry 203.0.113.0/24 in list tenant:acme/block"]
    assert "not registered" in done.notes[0]


async def test_entries_of_a_resource_need_the_resource(desk: Desk) -> None:
    (problem,) = await desk.refused(block("203.0.113.0/24", scope="resource:docs"), RefusedError)
    assert "resource docs does not exist: `authzctl resource add docs" in problem
    await desk.do(AddResource(Resource("docs", (parse_path_pattern("/docs"),))))
    await desk.do(block("203.0.113.0/24", scope="resource:docs"))


async def test_a_scope_keeps_what_is_not_set(desk: Desk) -> None:
    await desk.do(AddToList("office", (entry("198.51.100.0/24"),)))
    await desk.do(SetScope("global", Mode.RESTRICTED, allow_lists=("office",)))
    await desk.do(SetScope("global", enforcement=Enforcement.SHADOW))
    expected = Scope("global", Mode.RESTRICTED, Enforcement.SHADOW, ("office",))
    assert (await desk.snapshot()).global_scope == expected
    done = await desk.do(SetScope("global", mode=Mode.RESTRICTED))
    assert not done.changed
    await desk.do(SetScope("global", allow_lists=()))
    assert (await desk.snapshot()).global_scope == replace(expected, allow_lists=())
    assert desk.asked == []


async def test_a_scope_names_lists_that_exist_and_not_on_both_sides(desk: Desk) -> None:
    problems = await desk.refused(SetScope("global", allow_lists=("a", "b"), block_lists=("b",)), RefusedError)
    assert [problem.split(":")[0] for problem in problems] == [
        "list a does not exist",
        "list b does not exist",
        "scope global would both allow and block b",
    ]


async def test_a_scope_that_cannot_be_read_is_set_in_full_or_not(desk: Desk) -> None:
    await desk.do(SetScope("global", mode=Mode.OPEN))
    desk.store.collections["scopes"]["global"] = '{"mode":"ajar","enforcement":"enforce"}'
    (problem,) = await desk.refused(SetScope("global", enforcement=Enforcement.SHADOW), RefusedError)
    assert "ajar" in problem
    await desk.do(SetScope("global", Mode.OPEN, Enforcement.ENFORCE, (), ()))
    assert not (await desk.snapshot()).problems


# Resources


async def test_a_resource_is_restricted_in_the_change_that_registers_it(desk: Desk) -> None:
    await desk.do(AddToList("office", (entry("198.51.100.0/24"),)))
    docs = Resource("docs", (parse_path_pattern("/docs"),))
    done = await desk.do(AddResource(docs, restricted=True, allow_lists=("office",)))
    assert [str(step.key) for step in done.steps] == ["resource docs", "scope resource:docs"]
    assert done.notes == ()
    (guarded,) = (await desk.snapshot()).guarded_resources
    assert guarded.scope == Scope("resource:docs", Mode.RESTRICTED, allow_lists=("office",))

    wider = Resource("docs", (parse_path_pattern("/docs"), parse_path_pattern("/api")))
    (problem,) = await desk.refused(AddResource(wider), RefusedError)
    assert "for paths /docs on any host" in problem
    await desk.do(AddResource(wider, replace=True))
    (guarded,) = (await desk.snapshot()).guarded_resources
    assert (guarded.resource, guarded.scope.mode) == (wider, Mode.RESTRICTED)


async def test_a_resource_that_nobody_may_enter_is_told(desk: Desk) -> None:
    done = await desk.do(AddResource(Resource("docs", (parse_path_pattern("/docs"),)), restricted=True))
    assert done.notes == (
        "no entry in the allow lists of scope resource:docs counts now: the scope denies every address",
    )
    assert desk.asked == []


# Dangers


@pytest.mark.parametrize(
    ("cidr", "asked"),
    [
        ("0.0.0.0/0", "covers every address there is of IPv4"),
        ("::/0", "covers every address there is of IPv6"),
        ("10.0.0.0/7", "covers 33,554,432 addresses of IPv4"),
        ("10.0.0.0/8", None),
        ("2000::/15", "addresses of IPv6"),
        ("2001::/16", None),
    ],
)
async def test_a_wide_network_is_asked_about(desk: Desk, cidr: str, asked: str | None) -> None:
    await desk.do(block(cidr))
    assert len(desk.asked) == (asked is not None)
    if asked:
        assert asked in desk.asked[0]


@pytest.mark.parametrize(
    ("expires_at", "enforcement", "asked"),
    [
        (None, Enforcement.ENFORCE, False),
        (int(NOW), Enforcement.ENFORCE, True),
        ("no entry", Enforcement.ENFORCE, True),
        ("no entry", Enforcement.SHADOW, False),
    ],
    ids=["an_entry_counts", "it_has_expired", "there_is_none", "only_recorded"],
)
async def test_closing_the_global_scope_to_everybody_is_asked_about(
    desk: Desk, expires_at: int | str | None, enforcement: Enforcement, asked: bool
) -> None:
    if not isinstance(expires_at, str):
        await desk.do(AddToScope(Side.ALLOW, "global", (entry("203.0.113.0/24", expires_at=expires_at),)))
    await desk.do(SetScope("global", Mode.RESTRICTED, enforcement))
    assert len(desk.asked) == asked
    if asked:
        assert "every request is denied" in desk.asked[0]


async def test_what_nobody_confirms_is_not_done(desk: Desk) -> None:
    async def given(_: object) -> Wish:
        return block("0.0.0.0/0")

    def refuse(concerns: tuple[str, ...]) -> None:
        raise ConfirmationNeededError(concerns)

    with pytest.raises(ConfirmationNeededError, match="every address"):
        await carry_out(desk.store, desk.order(), given, refuse)
    assert (await desk.store.position()).revision == 1


# Tenants and instances


async def test_a_tenant_is_placed_by_the_hash_over_active_instances(desk: Desk) -> None:
    instances = [Instance("q1", weight=3), Instance("q2"), Instance("q3", state=InstanceState.DRAINING)]
    for number in range(50):
        wish = place_tenant(f"t{number}", {}, instances)
        assert wish.instance == rendezvous(f"t{number}", instances)
        assert wish.instance != "q3"


def test_without_an_active_instance_no_tenant_is_placed() -> None:
    with pytest.raises(RefusedError, match="none is registered"):
        place_tenant("acme", {}, [])
    with pytest.raises(RefusedError, match="q1 is down"):
        place_tenant("acme", {}, [Instance("q1", state=InstanceState.DOWN)])


async def test_a_registered_tenant_stays_where_it_is(desk: Desk) -> None:
    await desk.do(AddInstance("q1", 1))
    await desk.do(AddInstance("q2", 1))
    await desk.do(PinTenant("affinity.pin", "acme", "q1"))
    assert not (await desk.do(PinTenant("affinity.pin", "acme", "q1"))).changed
    registered = (await desk.snapshot()).tenants
    assert not (await desk.do(place_tenant("acme", registered, [Instance("q2")]))).changed
    (problem,) = await desk.refused(PinTenant("affinity.pin", "acme", "q2"), RefusedError)
    assert "pinned to q1" in problem
    assert "authzctl affinity move acme q2" in problem


async def test_a_move_writes_the_pin_anew(desk: Desk) -> None:
    await desk.do(AddInstance("q1", 1))
    await desk.do(AddInstance("q2", 1))
    (problem,) = await desk.refused(MoveTenant("acme", "q2"), NotFoundError)
    assert "authzctl affinity pin acme q2" in problem
    await desk.do(PinTenant("tenant.add", "acme", "q1"))
    done = await desk.do(MoveTenant("acme", "q2"))
    assert [(step.previous, step.record) for step in done.steps] == [(Tenant("acme", "q1"), Tenant("acme", "q2"))]
    assert not (await desk.do(MoveTenant("acme", "q2"))).changed


async def test_a_held_tenant_is_not_moved_by_somebody_else(desk: Desk) -> None:
    await desk.do(AddInstance("q2", 1))
    await desk.put((RecordKey(RecordKind.TENANT, "acme"), Tenant("acme", "q1", held=True)))
    (problem,) = await desk.refused(MoveTenant("acme", "q2"), RefusedError)
    assert "is held" in problem


async def test_several_wishes_are_one_change_or_none(desk: Desk) -> None:
    await desk.do(AddInstance("q1", 1))
    await desk.do(PinTenant("affinity.pin", "bolt", "q1"))
    pins = [PinTenant("affinity.pin", name, "q1") for name in ("acme", "bolt", "coop")]
    bad = [PinTenant("affinity.pin", "dove", "q8"), PinTenant("affinity.pin", "bolt", "q9")]
    problems = await desk.refused(Together((*pins, *bad)), RefusedError)
    assert [problem.split(",")[0].split(":")[0] for problem in problems] == [
        "instance q8 does not exist",
        "tenant bolt is registered already",
    ]
    done = await desk.do(Together(tuple(pins)))
    assert [step.effect for step in done.steps] == [Effect.ADDED, Effect.UNCHANGED, Effect.ADDED]
    assert done.position.revision == 4
    assert (await desk.do(Together(tuple(pins)), change_id=done.order.change_id)).repeated


async def test_an_unpinned_tenant_is_forgotten(desk: Desk) -> None:
    await desk.do(AddInstance("q1", 1))
    await desk.do(PinTenant("affinity.pin", "acme", "q1"))
    done = await desk.do(UnpinTenant("acme"))
    assert [(step.effect, step.record) for step in done.steps] == [(Effect.REMOVED, None)]
    assert "AUTHZ_UNKNOWN_TENANT" in done.notes[0]
    await desk.refused(UnpinTenant("acme"), NotFoundError)


HELD = Tenant("acme", "q1", held=True, hold=Hold("bob", "q2", int(NOW), "more room"))


async def test_a_held_tenant_is_released_by_its_holder_or_after_a_question(desk: Desk) -> None:
    await desk.put((RecordKey(RecordKind.TENANT, "acme"), HELD))
    (problem,) = await desk.refused(UnpinTenant("acme"), RefusedError)
    assert "held by bob since 2027-01-15T08:00:00Z for a move to q2 (pinned to q1)" in problem
    await desk.do(ReleaseTenant("acme", "alice"))
    assert "may still be under way" in desk.asked[0]
    assert (await desk.snapshot()).tenants["acme"] == Tenant("acme", "q1")
    await desk.put((RecordKey(RecordKind.TENANT, "acme"), HELD))
    await desk.do(ReleaseTenant("acme", "bob"))
    assert len(desk.asked) == 1
    assert not (await desk.do(ReleaseTenant("acme", "bob"))).changed
    await desk.refused(ReleaseTenant("nobody", "bob"), NotFoundError)


async def test_an_instance_is_set_and_keeps_the_rest(desk: Desk) -> None:
    await desk.do(AddInstance("q1", 3))
    done = await desk.do(SetInstance("instance.down", "q1", state=InstanceState.DOWN, tenants=2))
    assert done.steps[0].record == Instance("q1", 3, InstanceState.DOWN)
    assert "2 tenants pinned to q1" in done.notes[0]
    assert desk.asked == []
    done = await desk.do(SetInstance("instance.weight", "q1", weight=5, tenants=2, others_active=False))
    assert done.steps[0].record == Instance("q1", 5, InstanceState.DOWN)
    assert not (await desk.do(SetInstance("instance.weight", "q1", weight=5))).changed
    await desk.refused(SetInstance("instance.down", "q9", state=InstanceState.DOWN), NotFoundError)


async def test_taking_the_last_active_instance_out_of_use_is_asked_about(desk: Desk) -> None:
    await desk.do(AddInstance("q1", 1))
    await desk.do(SetInstance("instance.down", "q1", state=InstanceState.DOWN, others_active=False))
    assert "no other instance is active" in desk.asked[0]


async def test_an_instance_with_tenants_is_not_removed(desk: Desk) -> None:
    await desk.do(AddInstance("q1", 1))
    (problem,) = await desk.refused(RemoveInstance("q1", tuple(f"t{number}" for number in range(1200))), RefusedError)
    assert problem.startswith("instance q1 has 1,200 tenants (t0, t1, t2, t3, t4 and 1,195 more)")
    await desk.do(RemoveInstance("q1", ()))
    assert "is active" in desk.asked[0]
    assert (await desk.snapshot()).instances == {}


async def test_an_instance_is_not_removed_when_anybody_changed_anything_meanwhile(desk: Desk) -> None:
    """A tenant could have been pinned to it after all tenants were looked at."""
    await desk.do(AddInstance("q1", 1))

    async def removal(store: Store) -> Wish:
        del store
        await desk.do(PinTenant("affinity.pin", "acme", "q1"))
        return RemoveInstance("q1", ())

    with pytest.raises(ChangedMeanwhileError, match="ask again"):
        await carry_out(desk.store, desk.order(), removal, lambda _: None)
    assert set((await desk.snapshot()).instances) == {"q1"}


async def test_a_pin_that_cannot_be_read_is_mended_by_a_move(desk: Desk) -> None:
    await desk.do(AddInstance("q1", 1))
    await desk.do(PinTenant("tenant.add", "acme", "q1"))
    desk.store.collections["tenants"]["acme"] = "{}"
    (problem,) = await desk.refused(PinTenant("tenant.add", "acme", "q1"), RefusedError)
    assert "cannot be read" in problem
    await desk.do(MoveTenant("acme", "q1"))
    assert (await desk.snapshot()).tenants == {"acme": Tenant("acme", "q1")}


async def test_tenants_are_pinned_to_instances_that_exist(desk: Desk) -> None:
    (problem,) = await desk.refused(PinTenant("tenant.add", "acme", "q9"), RefusedError)
    assert "instance q9 does not exist: `authzctl instance add q9`" in problem


async def test_pinning_to_an_instance_that_is_not_active_is_asked_about(desk: Desk) -> None:
    await desk.put((RecordKey(RecordKind.INSTANCE, "q1"), Instance("q1", state=InstanceState.DRAINING)))
    await desk.do(PinTenant("tenant.add", "acme", "q1"))
    assert desk.asked == ["instance q1 is draining: it takes no new tenants by itself"]


async def test_another_weight_is_set_on_demand_and_the_state_stays(desk: Desk) -> None:
    await desk.put((RecordKey(RecordKind.INSTANCE, "q1"), Instance("q1", 1, InstanceState.DRAINING)))
    (problem,) = await desk.refused(AddInstance("q1", 5), RefusedError)
    assert "with weight 1, draining" in problem
    await desk.do(AddInstance("q1", 5, replace=True))
    assert (await desk.snapshot()).instances == {"q1": Instance("q1", 5, InstanceState.DRAINING)}


# Two administrators, and changes that are sent again


class Meeting(MemoryStore):
    """A store in which another administrator's change arrives just before the next one."""

    rival: Callable[[], Awaitable[object]] | None = None

    async def apply(self, change: Change) -> WriteResult:
        rival, self.rival = self.rival, None
        if rival:
            await rival()
        return await super().apply(change)


RIVALS: dict[str, tuple[Wish, Wish]] = {
    "same_entry": (block("203.0.113.0/24"), block("203.0.113.0/24")),
    "same_tenant": (PinTenant("tenant.add", "acme", "q1"), PinTenant("tenant.add", "acme", "q2")),
    "same_move": (MoveTenant("pinned", "q2"), MoveTenant("pinned", "q3")),
    "instance_relied_on": (PinTenant("tenant.add", "acme", "q1"), AddInstance("q1", 9, replace=True)),
    "same_scope": (SetScope("global", Mode.OPEN), SetScope("global", enforcement=Enforcement.SHADOW)),
}


@pytest.mark.parametrize(("mine", "theirs"), RIVALS.values(), ids=RIVALS)
async def test_of_two_administrators_at_once_one_is_told(mine: Wish, theirs: Wish) -> None:
    store = Meeting()
    alice, bob = Desk(store, "alice"), Desk(store, "bob")
    await initialise(store, alice.order())
    for name in ("q1", "q2", "q3"):
        await alice.do(AddInstance(name, 1))
    await alice.do(PinTenant("tenant.add", "pinned", "q1"))
    revision = (await store.position()).revision
    store.rival = lambda: bob.do(theirs)
    with pytest.raises(ChangedMeanwhileError, match="was changed by somebody else"):
        await alice.do(mine)
    assert (await store.position()).revision == revision + 1
    assert (await store.history(count=1))[0].actor == "bob"


async def test_a_change_sent_again_is_applied_once_and_told_so(desk: Desk) -> None:
    first = await desk.do(block("203.0.113.0/24"), change_id="c-1")
    await desk.do(block("198.51.100.0/24"))
    again = await desk.do(block("203.0.113.0/24"), change_id="c-1")
    assert (again.repeated, again.position) == (True, first.position)
    assert [(step.key, step.effect, step.record) for step in again.steps] == [
        (step.key, step.effect, step.record) for step in first.steps
    ]
    assert (await desk.store.position()).revision == 3


async def test_a_removal_sent_again_is_not_reported_as_missing(desk: Desk) -> None:
    await desk.do(block("203.0.113.0/24"))
    wish = RemoveFromScope(Side.BLOCK, "global", (parse_network("203.0.113.0/24"),))
    await desk.do(wish, change_id="c-1")
    again = await desk.do(wish, change_id="c-1")
    assert (again.repeated, [step.effect for step in again.steps]) == (True, [Effect.REMOVED])


@pytest.mark.parametrize(
    "other",
    [
        block("198.51.100.0/24"),
        AddToScope(Side.ALLOW, "global", (entry("203.0.113.0/24"),)),
        RemoveFromScope(Side.BLOCK, "global", (parse_network("203.0.113.0/24"),)),
    ],
    ids=["another_network", "another_side", "another_action"],
)
async def test_a_change_id_is_not_used_for_another_change(desk: Desk, other: Wish) -> None:
    await desk.do(block("203.0.113.0/24"), change_id="c-1")
    with pytest.raises(BadInputError, match="'c-1' belongs to another change"):
        await desk.do(other, change_id="c-1")


def unblock(*cidrs: str) -> RemoveFromScope:
    return RemoveFromScope(Side.BLOCK, "global", tuple(map(parse_network, cidrs)))


async def test_a_change_id_sent_again_for_more_is_refused_and_names_the_rest(desk: Desk) -> None:
    await desk.do(block("203.0.113.0/24"), change_id="c-1")
    for _ in range(2):
        with pytest.raises(BadInputError) as caught:
            await desk.do(block("203.0.113.0/24", "198.51.100.0/24"), change_id="c-1")
        (problem,) = caught.value.problems
        assert "entry 198.51.100.0/24 in list global/block was not part of it" in problem
        assert "203.0.113.0/24" not in problem
    assert (await desk.store.position()).revision == 2


async def test_a_change_id_sent_again_for_more_that_is_there_otherwise_is_refused(desk: Desk) -> None:
    await desk.do(AddToScope(Side.BLOCK, "global", (entry("198.51.100.0/24", expires_at=int(NOW) + 60),)))
    await desk.do(block("203.0.113.0/24"), change_id="c-1")
    with pytest.raises(BadInputError, match=r"198\.51\.100\.0/24 in list global/block is there already"):
        await desk.do(block("203.0.113.0/24", "198.51.100.0/24"), change_id="c-1")


async def test_a_change_sent_again_is_repeated_where_the_rest_was_so_already(desk: Desk) -> None:
    await desk.do(block("198.51.100.0/24"))
    wish = block("203.0.113.0/24", "198.51.100.0/24")
    assert not (await desk.do(wish, change_id="c-1")).repeated
    assert (await desk.do(wish, change_id="c-1")).repeated


async def test_a_removal_sent_again_for_more_is_refused_unless_the_rest_is_gone(desk: Desk) -> None:
    await desk.do(block("203.0.113.0/24", "198.51.100.0/24"))
    await desk.do(unblock("203.0.113.0/24"), change_id="c-1")
    for more in (["198.51.100.0/24"], ["198.51.100.0/24", "192.0.2.0/24"]):
        with pytest.raises(
            BadInputError, match=r"entry 198\.51\.100\.0/24 in list global/block was not part"
        ) as caught:
            await desk.do(unblock("203.0.113.0/24", *more), change_id="c-1")
        assert len(caught.value.problems) == 1
    assert (await desk.do(unblock("203.0.113.0/24", "192.0.2.0/24"), change_id="c-1")).repeated


@pytest.mark.parametrize(
    "wish",
    [
        AddToScope(Side.ALLOW, "resource:docs", (entry("203.0.113.0/24"),)),
        AddToScope(Side.ALLOW, "tenant:acme", (entry("203.0.113.0/24"),)),
        AddToList("office", (entry("203.0.113.0/24"),)),
        PinTenant("tenant.add", "bolt", "q1"),
        MoveTenant("acme", "q2"),
        SetScope("resource:docs", Mode.RESTRICTED, allow_lists=("office",)),
        AddResource(Resource("api", (parse_path_pattern("/api"),)), restricted=True, allow_lists=("office",)),
    ],
    ids=lambda wish: type(wish).__name__,
)
async def test_a_change_that_relies_on_other_records_is_repeated_all_the_same(desk: Desk, wish: Wish) -> None:
    for name in ("q1", "q2"):
        await desk.do(AddInstance(name, 1))
    await desk.do(PinTenant("tenant.add", "acme", "q1"))
    await desk.do(AddToList("office"))
    await desk.do(AddResource(Resource("docs", (parse_path_pattern("/docs"),))))
    assert not (await desk.do(wish, change_id="c-1")).repeated
    assert (await desk.do(wish, change_id="c-1")).repeated


class Stuck(MemoryStore):
    """A store that applies a change and never says so."""

    def __init__(self) -> None:
        super().__init__()
        self.applied = asyncio.Event()

    async def apply(self, change: Change) -> WriteResult:
        await super().apply(change)
        self.applied.set()
        await asyncio.Event().wait()
        raise AssertionError


async def test_an_interrupted_write_says_that_its_outcome_is_not_known() -> None:
    store = Stuck()
    desk = Desk(store)
    await initialise(store, desk.order())
    writing = asyncio.create_task(desk.do(block("203.0.113.0/24"), change_id="c-1"))
    await asyncio.wait_for(store.applied.wait(), 10)
    writing.cancel()
    with pytest.raises(InterruptedWriteError, match="not known whether") as caught:
        await writing
    assert (caught.value.change_id, caught.value.exit_code) == ("c-1", 130)


async def test_a_write_that_hangs_ends_and_says_that_its_outcome_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(Stuck())
    await initialise(desk.store, desk.order())
    monkeypatch.setattr(administration, "WRITE_SECONDS", 0.05)
    with pytest.raises(UnknownOutcomeError, match=r"not known whether .* within 0\.05 seconds") as caught:
        await desk.do(block("203.0.113.0/24"), change_id="c-1")
    assert caught.value.exit_code == 3


class Cut(MemoryStore):
    """A store whose connection breaks while a change is on its way."""

    def __init__(self, *, arrives: bool) -> None:
        super().__init__()
        self._arrives = arrives
        self._cut = False

    async def apply(self, change: Change) -> WriteResult:
        if not self._cut and not self._arrives:
            self._cut = True
            raise StoreUnavailableError("the connection broke")
        result = await super().apply(change)
        if not self._cut:
            self._cut = True
            raise StoreUnavailableError("the connection broke")
        return result


@pytest.mark.parametrize("arrives", [True, False])
async def test_after_a_broken_connection_the_same_change_id_settles_it(arrives: bool) -> None:
    desk = Desk(Cut(arrives=arrives))
    await initialise(desk.store, desk.order())
    with pytest.raises(UnknownOutcomeError, match="not known whether") as caught:
        await desk.do(block("203.0.113.0/24"))
    again = await desk.do(block("203.0.113.0/24"), change_id=caught.value.change_id)
    assert (again.changed, again.repeated, again.position.revision) == (True, arrives, 2)
