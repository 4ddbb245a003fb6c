"""The snapshot follows the store, and outlives it."""

import asyncio
import math
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from support.policies import ACME, OFFICE, Q1, Writer, contents, network_entry, network_key, random_change
from support.waiting import eventually

from authz_server.demo.valkey import Valkey
from authz_server.policy.access import NamedList
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.networks import UNREADABLE
from authz_server.policy.records import RecordKey, RecordKind
from authz_server.policy.snapshot import DecisionOptions, UnknownTenant, build_snapshot
from authz_server.refresher import LostChanges, Refresher, RefresherStatus
from authz_server.store.interface import Event, LoadedPolicy, Position, Replacement, Store, VerifiedCounts
from authz_server.store.memory_store import MemoryStore
from authz_server.store.redis_store import RedisStore

OPTIONS = DecisionOptions(unknown_tenant=UnknownTenant.HASH)


@asynccontextmanager
async def running(store: Store, **options: Any) -> AsyncIterator[Refresher]:
    refresher = Refresher(store, OPTIONS, **options)
    task = asyncio.create_task(refresher.run())
    try:
        yield refresher
    finally:
        while not task.done():  # as the server does: Python 3.11 may swallow a cancellation
            task.cancel()
            await asyncio.wait({task}, timeout=0.1)
        assert task.cancelled()


def at_revision(refresher: Refresher, revision: int) -> Callable[[], bool]:
    return lambda: refresher.current is not None and refresher.current.revision == revision


async def fresh(store: Store) -> dict[str, Any]:
    policy = await store.load()
    position = policy.position
    return contents(build_snapshot(policy.records, epoch=position.epoch, revision=position.revision, options=OPTIONS))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def writer(store: MemoryStore) -> Writer:
    return Writer(store)


async def test_before_the_first_load_there_is_no_snapshot(store: MemoryStore) -> None:
    refresher = Refresher(store, OPTIONS)
    assert (refresher.current, refresher.status) == (None, RefresherStatus())
    assert refresher.status.age_seconds(0) == math.inf


async def test_it_loads_and_then_follows_each_change(store: MemoryStore, writer: Writer) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")))
    seen: list[Event] = []
    async with running(store, on_event=seen.append) as refresher:
        await eventually(at_revision(refresher, 2))
        await writer.set((ACME, Tenant("acme", "q1")), (network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
        await writer.set((Q1, None))
        await eventually(at_revision(refresher, 4))
        assert contents(refresher.current) == await fresh(store)
        assert refresher.current.options == OPTIONS
        status = refresher.status
        assert (status.connected, status.problem, status.loads, status.events) == (True, "", 1, 2)
        assert status.position == await store.position()
        assert [event.position.revision for event in seen] == [3, 4]


@settings(max_examples=60, deadline=None)
@given(st.integers(), st.lists(st.lists(st.booleans(), min_size=1, max_size=4), max_size=12))
def test_after_any_changes_it_has_what_a_fresh_load_has(seed: int, plan: list[list[bool]]) -> None:
    async def check() -> None:
        rng = random.Random(seed)
        store = MemoryStore()
        writer = Writer(store)
        await writer.init()
        async with running(store) as refresher:
            await eventually(lambda: refresher.current)
            for removals in plan:
                changes = {}
                for remove in removals:
                    key, record = random_change(rng)
                    changes[key] = None if remove and await store.read(key) else record
                await writer.set(*changes.items())
                if rng.random() < 0.5:
                    await asyncio.sleep(0)
            await eventually(at_revision(refresher, len(plan) + 1))
            assert contents(refresher.current) == await fresh(store)
            assert refresher.status.loads == 1

    asyncio.run(check())


async def test_started_before_the_store_it_waits_for_it_and_for_init(store: MemoryStore, writer: Writer) -> None:
    store.available = False
    async with running(store) as refresher:
        await eventually(lambda: "unavailable" in refresher.status.problem)
        assert (refresher.current, refresher.status.connected) == (None, False)
        store.available = True
        await eventually(lambda: "call `init`" in refresher.status.problem)
        assert refresher.current is None
        await writer.init()
        await eventually(at_revision(refresher, 1))
        assert (refresher.status.connected, refresher.status.problem) == (True, "")


async def test_a_store_that_goes_away_leaves_the_last_snapshot_and_is_followed_on(
    store: MemoryStore, writer: Writer
) -> None:
    await writer.init()
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        last = refresher.current
        store.available = False
        await store.wake()
        await eventually(lambda: not refresher.status.connected)
        assert refresher.current is last
        assert refresher.status.position == store.events[-1].position
        store.available = True
        await writer.set((Q1, Instance("q1")))
        await eventually(at_revision(refresher, 2))
        assert refresher.status.loads == 1


async def test_an_emptied_store_leaves_the_last_snapshot_and_a_new_policy_replaces_it(
    store: MemoryStore, writer: Writer
) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")))
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        last = refresher.current
        for kept in (store.collections, store.counts, store.events):
            kept.clear()
        await store.wake()
        await eventually(lambda: "no policy" in refresher.status.problem)
        assert refresher.current is last
        await writer.init()
        await eventually(lambda: refresher.current is not last)
        assert contents(refresher.current) == await fresh(store)
        assert refresher.status.loads == 2


async def test_another_history_with_as_many_revisions_is_loaded(store: MemoryStore, writer: Writer) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")))
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        for kept in (store.collections, store.counts, store.events):
            kept.clear()
        await writer.init()
        await writer.set((ACME, Tenant("acme", "q1")))
        await eventually(lambda: refresher.status.loads == 2)
        assert contents(refresher.current) == await fresh(store)


async def test_a_lost_collection_leaves_the_last_snapshot_until_it_is_back(store: MemoryStore, writer: Writer) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (ACME, Tenant("acme", "q1")))
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        last = refresher.current
        lost = store.collections.pop("tenants")
        store.events.clear()
        store.events.append(Event(Position("e2", 3, "restored"), "", "", "", "restore", 0.0, ()))
        await store.wake()
        await eventually(lambda: "tenants" in refresher.status.problem)
        assert refresher.current is last
        store.collections["tenants"] = lost
        await eventually(at_revision(refresher, 3))
        assert refresher.current.epoch == "e2"


async def test_an_unreadable_record_keeps_its_last_good_value_over_a_full_load(
    store: MemoryStore, writer: Writer
) -> None:
    await writer.init()
    await writer.set((ACME, Tenant("acme", "q1")))
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        store.collections["tenants"]["acme"] = "?"
        store.events[:] = [Event(Position("e2", 3, "restored"), "", "", "", "restore", 0.0, ())]
        await store.wake()
        await eventually(at_revision(refresher, 3))
        assert refresher.current.tenants["acme"] == Tenant("acme", "q1")
        assert refresher.current.problems.keys() == {ACME}
        # Counts take unreadable records into account: following goes on without another load.
        await writer.set((RecordKey(RecordKind.TENANT, "beta"), Tenant("beta", "q1")))
        await eventually(at_revision(refresher, 4))
        assert refresher.status.loads == 2


async def test_an_unreadable_entry_that_nothing_stands_in_for_is_counted(store: MemoryStore, writer: Writer) -> None:
    await writer.init()
    await writer.set((network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    store.collections["entries:office"]["10.0.0.0/8"] = "?"
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        assert refresher.current.expiry(network_key("10.0.0.0/8")) == UNREADABLE
        await writer.set((network_key("11.0.0.0/8"), network_entry("11.0.0.0/8")))
        await eventually(at_revision(refresher, 3))
        await writer.set((network_key("10.0.0.0/8"), None))
        await eventually(at_revision(refresher, 4))
        assert contents(refresher.current) == await fresh(store)
        assert refresher.status.loads == 1


async def test_counts_of_an_event_that_do_not_fit_lead_to_a_full_load(store: MemoryStore, writer: Writer) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")))
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        # As after a bug in an older version of a follower: a record that it never heard of.
        store.collections["instances"]["q2"] = '{"state":"active","weight":1}'
        store.counts["instances"] = 2
        await writer.set((Q1, Instance("q1", 2)))
        await eventually(lambda: refresher.status.loads == 2)
        assert contents(refresher.current) == await fresh(store)


async def test_a_snapshot_that_is_too_old_is_not_served_until_it_is_confirmed(
    store: MemoryStore, writer: Writer
) -> None:
    await writer.init()
    async with running(store, max_age_seconds=0.2) as refresher:
        await eventually(lambda: refresher.current)
        snapshot = refresher.current
        confirmed_at = refresher.status.confirmed_at
        await eventually(lambda: refresher.status.confirmed_at > confirmed_at + 0.3)
        assert refresher.current is snapshot, "a quiet store confirms often enough"
        store.available = False
        await eventually(lambda: refresher.current is None)
        assert refresher.status.position == store.events[-1].position
        store.available = True
        await eventually(lambda: refresher.current is snapshot)


async def test_without_a_maximum_age_the_last_snapshot_stays(store: MemoryStore, writer: Writer) -> None:
    await writer.init()
    now = 0.0
    async with running(store, clock=lambda: now) as refresher:
        await eventually(lambda: refresher.current)
        store.available = False
        await store.wake()
        await eventually(lambda: not refresher.status.connected)
        now = 1e9
        assert refresher.status.age_seconds(now) == 1e9
        assert refresher.current


async def test_every_new_status_is_told(store: MemoryStore, writer: Writer) -> None:
    told: list[RefresherStatus] = []
    store.available = False
    async with running(store, on_status=told.append) as refresher:
        await eventually(lambda: told)
        store.available = True
        await writer.init()
        await eventually(lambda: refresher.current)
        assert told[-1] == refresher.status
        assert (told[0].connected, told[-1].connected) == (False, True)


class Faulty(MemoryStore):
    """Its loads and events fail as no store should."""

    broken = True

    async def load(self, only: Collection[str] | None = None) -> LoadedPolicy:
        if self.broken:
            raise RuntimeError("a bug")
        return await super().load(only)


async def test_a_bug_is_told_and_does_not_end_the_following() -> None:
    store = Faulty()
    await Writer(store).init()
    async with running(store) as refresher:
        await eventually(lambda: "internal error: RuntimeError('a bug')" in refresher.status.problem)
        store.broken = False
        await eventually(lambda: refresher.current)


async def test_a_listener_that_raises_does_not_stop_the_snapshot(store: MemoryStore, writer: Writer) -> None:
    def listener(event: Event) -> None:
        raise RuntimeError("no disk")

    await writer.init()
    async with running(store, on_event=listener) as refresher:
        await eventually(lambda: refresher.current)
        await writer.set((Q1, Instance("q1")))
        await eventually(at_revision(refresher, 2))
        await writer.set((Q1, None))
        await eventually(at_revision(refresher, 3))


class CountedStore(MemoryStore):
    """Counts how often it is asked for events."""

    asked = 0

    async def events_after(self, position: Position, *, wait_seconds: float) -> list[Event]:
        self.asked += 1
        return await super().events_after(position, wait_seconds=wait_seconds)


async def test_changes_that_follow_each_other_closely_are_asked_for_together() -> None:
    store = CountedStore()
    writer = Writer(store)
    await writer.init()
    seen: list[Event] = []
    async with running(store, on_event=seen.append) as refresher:
        await eventually(lambda: refresher.current)
        asked_before = store.asked
        for number in range(60):
            await writer.set((Q1, Instance("q1", number + 1)))
            await asyncio.sleep(0.001)
        await eventually(at_revision(refresher, 61))
        assert store.asked - asked_before < 30
        await eventually(lambda: len(seen) == 60)
        assert [event.position.revision for event in seen] == list(range(2, 62))


async def test_cancelled_while_it_tells_of_changes_it_tells_of_all_that_it_applied(
    store: MemoryStore, writer: Writer
) -> None:
    await writer.init()
    seen: list[int] = []

    def listener(event: Event) -> None:
        seen.append(event.position.revision)
        if len(seen) == 1:
            asyncio.get_running_loop().call_soon(task.cancel)

    refresher = Refresher(store, OPTIONS, on_event=listener)
    task = asyncio.create_task(refresher.run())
    await eventually(lambda: refresher.current)
    for number in range(20):
        await writer.set((Q1, Instance("q1", number + 1)))
    await asyncio.wait({task})
    assert refresher.status.events > 3
    assert seen == list(range(2, refresher.status.events + 2))


# Counts, incidents, lost changes


@pytest.fixture
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are compared all the time."""
    monkeypatch.setattr("authz_server.refresher._VERIFY_SECONDS", 0.01)
    monkeypatch.setattr("authz_server.refresher._VERIFY_AN_INCIDENT_SECONDS", 0.01)
    monkeypatch.setattr("authz_server.refresher._WAIT_SECONDS", 0.02)


@pytest.mark.usefixtures("quick_look")
async def test_records_lost_without_a_change_are_an_incident_until_they_are_back(
    store: MemoryStore, writer: Writer
) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (ACME, Tenant("acme", "q1")))
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        last = refresher.current
        lost = store.collections.pop("tenants")
        await eventually(lambda: "tenants" in refresher.status.incident)
        assert refresher.current is last
        # What can be followed is followed, and the incident does not flicker.
        await writer.set((Q1, Instance("q1", 2)))
        await eventually(at_revision(refresher, 3))
        assert refresher.current.tenants == last.tenants
        assert refresher.status.connected
        assert "tenants" in refresher.status.problem
        store.collections["tenants"] = lost
        await eventually(lambda: not refresher.status.problem)
        assert refresher.status.incident == ""
        assert refresher.status.loads == 1


@pytest.mark.usefixtures("quick_look")
async def test_an_incident_that_is_confirmed_is_over(store: MemoryStore, writer: Writer) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (ACME, Tenant("acme", "q1")))
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        del store.collections["tenants"]
        await eventually(lambda: refresher.status.incident)
        await store.confirm(await store.examine(), actor="alice", reason="we know", change_id="c9")
        await eventually(at_revision(refresher, 3))
        assert refresher.current.tenants == {}
        assert (refresher.status.incident, refresher.status.problem, refresher.status.lost) == ("", "", 0)


@pytest.mark.usefixtures("quick_look")
async def test_a_snapshot_that_differs_from_the_store_is_loaded_anew(store: MemoryStore, writer: Writer) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")))
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        # As if this process had missed something: in the store it is all in order.
        store.collections["instances"]["q2"] = '{"state":"active","weight":1}'
        store.counts["instances"] = 2
        await eventually(lambda: refresher.status.loads == 2)
        assert contents(refresher.current) == await fresh(store)


class SlowlyVerified(MemoryStore):
    """Answers what is asked for the comparison of counts only when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answers = 0, asyncio.Event()

    async def verify(self, cursor: int) -> VerifiedCounts:
        self.asked += 1
        await self.answers.wait()
        return await super().verify(cursor)


@pytest.mark.usefixtures("quick_look")
async def test_a_comparison_that_takes_long_holds_up_no_change() -> None:
    store = SlowlyVerified()
    writer = Writer(store)
    await writer.init()
    async with running(store) as refresher:
        await eventually(lambda: store.asked == 1)
        await writer.set((Q1, Instance("q1")))
        await eventually(at_revision(refresher, 2))
        del store.collections["instances"]
        store.answers.set()
        await eventually(lambda: "instances" in refresher.status.incident)


@pytest.mark.usefixtures("quick_look")
async def test_a_comparison_that_was_asked_for_before_a_trouble_is_left() -> None:
    store = SlowlyVerified()
    await Writer(store).init()
    async with running(store) as refresher:
        await eventually(lambda: store.asked == 1)
        store.available = False
        await eventually(lambda: not refresher.status.connected)
        store.available = True
        await eventually(lambda: store.asked == 2)
        assert refresher.status.connected


async def test_texts_edited_by_hand_are_told_where_they_are_loaded(store: MemoryStore, writer: Writer) -> None:
    await writer.init()
    await writer.set((ACME, Tenant("acme", "q1")))
    store.collections["tenants"]["acme"] = '{"instance":"q2"}'
    async with running(store) as refresher:
        await eventually(lambda: refresher.current)
        assert refresher.status.edited == ("tenants",)
        assert "authzctl reconcile" in refresher.status.problem
        assert refresher.status.connected


async def test_changes_that_the_store_has_lost_are_told(store: MemoryStore, writer: Writer) -> None:
    """As after a failover to a replica that had not received them."""
    await writer.init()
    told: list[LostChanges] = []
    async with running(store, on_lost=told.append) as refresher:
        await eventually(lambda: refresher.current)
        await writer.set((Q1, Instance("q1")))
        await eventually(at_revision(refresher, 2))
        kept = (dict(store.collections["instances"]), dict(store.counts), dict(store.sums), list(store.events))
        for weight in (2, 3):
            await writer.set((Q1, Instance("q1", weight)))
        await eventually(at_revision(refresher, 4))
        store.collections["instances"], store.counts, store.sums, store.events = kept
        await writer.set((ACME, Tenant("acme", "q1")))
        await eventually(lambda: told)
        assert refresher.current.revision == 3
        assert contents(refresher.current) == await fresh(store)
        (lost,) = told
        assert [event.records[0].record for event in lost.events] == [Instance("q1", 2), Instance("q1", 3)]
        assert (lost.applied.revision, lost.found.revision, lost.count) == (4, 3, 2)
        assert refresher.status.lost == 2


async def test_a_follower_that_fell_behind_the_trimmed_stream_has_lost_nothing(
    store: MemoryStore, writer: Writer
) -> None:
    await writer.init()
    told: list[LostChanges] = []
    async with running(store, on_lost=told.append) as refresher:
        await eventually(lambda: refresher.current)
        await writer.set((Q1, Instance("q1")))
        await eventually(at_revision(refresher, 2))
        store.available = False
        await store.wake()
        await eventually(lambda: not refresher.status.connected)
        store.available = True
        for weight in range(2, 8):
            await writer.set((Q1, Instance("q1", weight)))
            del store.events[:-1]
        await eventually(at_revision(refresher, 8))
        assert (told, refresher.status.lost) == ([], 0)


# With a real Valkey.


@asynccontextmanager
async def redis_store(valkey: Valkey) -> AsyncIterator[RedisStore]:
    store = RedisStore(valkey.url, prefix=f"test-{secrets.token_hex(4)}")
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.integration
async def test_valkey_changes_arrive_while_many_are_written(valkey: Valkey) -> None:
    rng = random.Random(7)
    async with redis_store(valkey) as store:
        writer = Writer(store)
        await writer.init()
        async with running(store) as one, running(store) as another:
            await eventually(lambda: one.current and another.current)
            for _ in range(150):
                key, record = random_change(rng)
                await writer.set((key, None if rng.random() < 0.3 and await store.read(key) else record))
            for refresher in (one, another):
                await eventually(at_revision(refresher, 151))
                assert contents(refresher.current) == await fresh(store)
                assert (refresher.status.loads, refresher.status.events) == (1, 150)


@pytest.mark.integration
async def test_valkey_stopped_and_back_with_its_data() -> None:
    with Valkey(append_only=True) as valkey:
        async with redis_store(valkey) as store, running(store) as refresher:
            await Writer(store).init()
            await Writer(store).set((Q1, Instance("q1")))
            await eventually(at_revision(refresher, 2))
            last = refresher.current
            valkey.stop()
            await eventually(lambda: "cannot be reached" in refresher.status.problem)
            assert refresher.current is last
            valkey.start()
            await eventually(lambda: refresher.status.connected)
            loads = refresher.status.loads
            await Writer(store).set((OFFICE, NamedList("office")))
            await eventually(at_revision(refresher, 3))
            assert contents(refresher.current) == await fresh(store)
            assert refresher.status.loads == loads == 1


@pytest.mark.integration
async def test_valkey_stopped_and_back_empty_keeps_the_last_snapshot_until_a_new_policy(own_valkey: Valkey) -> None:
    async with redis_store(own_valkey) as store, running(store) as refresher:
        await Writer(store).init()
        await Writer(store).set((Q1, Instance("q1")))
        await eventually(at_revision(refresher, 2))
        last = refresher.current
        own_valkey.stop()
        own_valkey.start()
        await eventually(lambda: "authzctl init" in refresher.status.problem)
        assert refresher.current is last
        await Writer(store).init()
        await eventually(lambda: refresher.current is not last)
        assert contents(refresher.current) == await fresh(store)


@pytest.mark.integration
async def test_valkey_flushed_keeps_the_last_snapshot(own_valkey: Valkey) -> None:
    # An emptied Valkey says nothing: it is noticed when the wait is over, here after 2 s.
    async with redis_store(own_valkey) as store, running(store, max_age_seconds=6) as refresher:
        await Writer(store).init()
        await eventually(at_revision(refresher, 1))
        last = refresher.current
        client: Any = Redis.from_url(own_valkey.url)
        async with client:
            await client.flushall()
        await eventually(lambda: "authzctl init" in refresher.status.problem)
        assert refresher.current is last


@pytest.mark.integration
async def test_started_before_valkey(own_valkey: Valkey) -> None:
    own_valkey.stop()
    async with redis_store(own_valkey) as store, running(store) as refresher:
        await eventually(lambda: "cannot be reached" in refresher.status.problem)
        own_valkey.start()
        await eventually(lambda: "authzctl init" in refresher.status.problem)
        await Writer(store).init()
        await eventually(at_revision(refresher, 1))


@pytest.mark.integration
@pytest.mark.parametrize("wait", ["stop", "pause"])
async def test_cancelled_while_valkey_does_not_answer_it_ends_at_once(own_valkey: Valkey, wait: str) -> None:
    async with redis_store(own_valkey) as store:
        await Writer(store).init()
        async with running(store) as refresher:
            await eventually(lambda: refresher.current)
            getattr(own_valkey, wait)()
            cancelled_at = time.monotonic()
        assert time.monotonic() - cancelled_at < 1


def office(count: int) -> dict[RecordKey, Any]:
    cidrs = [f"10.{i // 65536}.{i // 256 % 256}.{i % 256}/32" for i in range(count)]
    return {network_key(cidr): network_entry(cidr) for cidr in cidrs}


@pytest.mark.integration
@pytest.mark.parametrize(("most", "loads"), [(50_000, 1), (2000, 2)], ids=["applied", "loaded"])
async def test_valkey_a_replacement_is_followed(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch, most: int, loads: int
) -> None:
    monkeypatch.setattr("authz_server.refresher._LARGEST_DIFFERENCE", most)
    async with redis_store(valkey) as store, running(store) as refresher:
        await Writer(store).init()
        await Writer(store).set((network_key("192.0.2.0/24"), network_entry("192.0.2.0/24")))
        await eventually(at_revision(refresher, 2))
        epoch = refresher.current.epoch
        wished = Replacement("c1", epoch, "feed", "daily", "import", {"entries:office": office(2500)})
        await store.replace(wished)
        await Writer(store).set((Q1, Instance("q1")))
        await eventually(at_revision(refresher, 4))
        assert contents(refresher.current) == await fresh(store)
        assert refresher.status.loads == loads


@pytest.mark.integration
@pytest.mark.usefixtures("quick_look")
async def test_valkey_evicts_a_key(valkey: Valkey) -> None:
    async with redis_store(valkey) as store, running(store) as refresher:
        await Writer(store).init()
        await Writer(store).set((ACME, Tenant("acme", "q1")))
        await eventually(at_revision(refresher, 2))
        last = refresher.current
        client: Any = Redis.from_url(valkey.url)
        async with client:
            await client.delete(store._key("tenants"))
        await eventually(lambda: "tenants: 0 instead of 1" in refresher.status.incident)
        assert refresher.current is last
