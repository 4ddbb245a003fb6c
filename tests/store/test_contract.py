"""What every store does. Each test runs in memory and on real servers: alone, behind Sentinels, as a cluster."""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any, Protocol

import pytest
from redis.asyncio import Redis
from support.policies import ACME, OFFICE, Q1, Writer, by_key, network_entry, network_key
from support.redis_shapes import Cluster, Watched, debian_redis

from authz_server.demo.valkey import Valkey
from authz_server.policy.access import Entry, NamedList
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.records import Record, RecordKey, RecordKind, Unreadable
from authz_server.store.address import RedisAddress
from authz_server.store.interface import (
    EVENTS_AT_ONCE,
    MAX_WRITES_PER_CHANGE,
    AlreadyInitialisedError,
    Change,
    ChangeIdUsedError,
    Check,
    ConflictError,
    Difference,
    EpochChangedError,
    Finding,
    InconsistentStateError,
    NotInitialisedError,
    Position,
    PositionLostError,
    Replacement,
    Report,
    RevisionChangedError,
    Store,
    Write,
)
from authz_server.store.keys import encode_record
from authz_server.store.memory_store import MemoryStore
from authz_server.store.redis_store import RedisStore


class Backdoor(Protocol):
    """What people do to a store behind its back."""

    async def edit(self, collection: str, field: str, text: str) -> None: ...

    async def lose(self, collection: str) -> None: ...

    async def trim(self, keep: int) -> None: ...

    async def wipe(self) -> None: ...

    async def rewrite_report(self, replica: str, old: str, new: str) -> None: ...


class MemoryBackdoor:
    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def edit(self, collection: str, field: str, text: str) -> None:
        self._store.collections.setdefault(collection, {})[field] = text

    async def lose(self, collection: str) -> None:
        del self._store.collections[collection]

    async def trim(self, keep: int) -> None:
        del self._store.events[:-keep]

    async def wipe(self) -> None:
        for kept in (self._store.collections, self._store.counts, self._store.events):
            kept.clear()
        await self._store.wake()

    async def rewrite_report(self, replica: str, old: str, new: str) -> None:
        self._store.reports[replica] = re.sub(old, new, self._store.reports[replica])


class RedisBackdoor:
    def __init__(self, client: Any, tag: str) -> None:
        self._client = client
        self._tag = tag

    async def edit(self, collection: str, field: str, text: str) -> None:
        await self._client.hset(f"{self._tag}:{collection}", field, text)

    async def lose(self, collection: str) -> None:
        assert await self._client.delete(f"{self._tag}:{collection}")

    async def trim(self, keep: int) -> None:
        await self._client.xtrim(f"{self._tag}:changes", maxlen=keep, approximate=False)

    async def wipe(self) -> None:
        await self._client.delete(*await self._client.keys(f"{self._tag}:*"))

    async def rewrite_report(self, replica: str, old: str, new: str) -> None:
        key = f"{self._tag}:replicas"
        await self._client.hset(key, replica, re.sub(old, new, await self._client.hget(key, replica)))


@pytest.fixture(scope="session")
def watched() -> Iterator[Watched]:
    with Watched() as servers:
        yield servers


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Cluster() as nodes:
        yield nodes


@pytest.fixture(scope="session")
def redis_7() -> Iterator[Valkey]:
    binary = debian_redis()
    if binary is None:
        pytest.skip("Debian's redis-server is not installed")
    with Valkey(binary=binary) as server:
        yield server


def shape(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.integration)


@pytest.fixture(params=["memory", shape("valkey"), shape("sentinel"), shape("cluster"), shape("redis_7")])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Store, Backdoor]]:
    client: Any
    prefix = f"test-{secrets.token_hex(4)}"
    match request.param:
        case "memory":
            memory = MemoryStore()
            yield memory, MemoryBackdoor(memory)
            return
        case "sentinel":
            servers: Watched = request.getfixturevalue("watched")
            address = servers.address
            client = Redis(port=servers.primary().port, decode_responses=True)
        case "cluster":
            nodes: Cluster = request.getfixturevalue("cluster")
            address = nodes.address
            client = Redis(port=nodes.primary(f"{{{prefix}}}:meta").port, decode_responses=True)
        case name:
            valkey: Valkey = request.getfixturevalue(name)
            address = RedisAddress(valkey.url)
            client = Redis.from_url(valkey.url, decode_responses=True)
    redis_store = RedisStore(address, prefix=prefix)
    try:
        yield redis_store, RedisBackdoor(client, f"{{{prefix}}}")
    finally:
        await redis_store.close()
        await client.aclose()


@pytest.fixture
def store(stores: tuple[Store, Backdoor]) -> Store:
    return stores[0]


@pytest.fixture
def backdoor(stores: tuple[Store, Backdoor]) -> Backdoor:
    return stores[1]


@pytest.fixture
def writer(store: Store) -> Writer:
    return Writer(store)


async def test_without_init_everything_says_so(store: Store) -> None:
    read = [store.position, store.load, lambda: store.read(Q1), lambda: store.history(count=1)]
    for method in read:
        with pytest.raises(NotInitialisedError):
            await method()
    with pytest.raises(NotInitialisedError):
        await store.apply(await Writer(store).change(Write(Q1, None, Instance("q1")), epoch="e"))


async def test_init_makes_an_empty_policy_at_revision_1(store: Store) -> None:
    result = await store.init(actor="alice", reason="new here", change_id="c1")
    assert (result.position.revision, result.position.change_id, result.repeated) == (1, "c1", False)
    assert await store.position() == result.position
    loaded = await store.load()
    assert (loaded.position, loaded.records) == (result.position, [])
    [event] = await store.history(count=10)
    assert (event.position, event.actor, event.reason, event.action) == (result.position, "alice", "new here", "init")


async def test_init_again_leaves_the_policy_alone_and_the_same_init_again_is_repeated(store: Store) -> None:
    first = await store.init(actor="alice", reason="r", change_id="c1")
    assert await store.init(actor="alice", reason="r", change_id="c1") == replace(first, repeated=True)
    with pytest.raises(AlreadyInitialisedError):
        await store.init(actor="bob", reason="r", change_id="c2")
    assert await store.position() == first.position


async def test_init_with_the_id_of_another_change_is_not_taken_for_repeated(store: Store, writer: Writer) -> None:
    await writer.init()
    change = await writer.change(Write(Q1, None, Instance("q1")))
    applied = await store.apply(change)
    with pytest.raises(AlreadyInitialisedError):
        await store.init(actor="alice", reason="r", change_id=change.change_id)
    assert await store.position() == applied.position


async def test_two_policies_have_two_epochs(store: Store) -> None:
    result = await Writer(store).init()
    assert result.position.epoch != (await Writer(MemoryStore()).init()).position.epoch


async def test_a_change_sets_replaces_and_removes_records_and_tells_who_and_why(store: Store, writer: Writer) -> None:
    initial = (await writer.init()).position
    change = await writer.change(
        Write(OFFICE, None, NamedList("office")),
        Write(network_key("10.0.0.0/8"), None, network_entry("10.0.0.0/8")),
        actor="bob",
        reason="they moved in",
        action="list.add",
    )
    first = await store.apply(change)
    assert (first.position.epoch, first.position.revision, first.repeated) == (initial.epoch, 2, False)
    office = await store.read(OFFICE)
    assert office
    assert office.record == NamedList("office")
    assert office.text == encode_record(NamedList("office"))
    second = await store.apply(
        await writer.change(
            Write(OFFICE, office.text, NamedList("office", "Berlin")),
            Write(network_key("10.0.0.0/8"), encode_record(network_entry("10.0.0.0/8")), None),
        )
    )
    loaded = await store.load()
    assert (loaded.position, by_key(loaded)) == (second.position, {OFFICE: NamedList("office", "Berlin")})
    newest, event, _ = await store.history(count=10)
    assert (event.actor, event.reason, event.action) == ("bob", "they moved in", "list.add")
    assert (event.position, event.previous_change_id) == (first.position, initial.change_id)
    assert [(item.key, item.previous, item.record) for item in event.records] == [
        (OFFICE, None, NamedList("office")),
        (network_key("10.0.0.0/8"), None, network_entry("10.0.0.0/8")),
    ]
    assert event.counts == {"lists": 1, "entries:office": 1}
    assert newest.counts == {"lists": 1, "entries:office": 0}
    assert [(item.previous, item.new) for item in newest.records] == [
        (office.text, encode_record(NamedList("office", "Berlin"))),
        (encode_record(network_entry("10.0.0.0/8")), None),
    ]
    assert newest.at >= event.at > 1_700_000_000


async def test_a_record_that_is_not_there_is_none(store: Store, writer: Writer) -> None:
    await writer.init()
    assert await store.read(Q1) is None


@pytest.mark.parametrize(
    ("there", "expected", "found"),
    [
        (None, '{"state":"active","weight":9}', None),
        (Instance("q1", 2), None, '{"state":"active","weight":2}'),
        (Instance("q1", 2), '{"state":"active","weight":9}', '{"state":"active","weight":2}'),
    ],
    ids=["gone", "came", "changed"],
)
@pytest.mark.parametrize("only_checked", [False, True], ids=["write", "check"])
async def test_a_record_that_is_not_as_expected_stops_the_whole_change(
    store: Store, writer: Writer, *, there: Instance | None, expected: str | None, found: str | None, only_checked: bool
) -> None:
    await writer.init()
    if there:
        await writer.set((Q1, there))
    before = await store.load()
    writes = [Write(ACME, None, Tenant("acme", "q1"))]
    checks = []
    if only_checked:
        checks.append(Check(Q1, expected))
    else:
        writes.append(Write(Q1, expected, Instance("q1", 5)))
    change = await writer.change(*writes, checks=tuple(checks))
    with pytest.raises(ConflictError) as caught:
        await store.apply(change)
    assert (caught.value.key, caught.value.expected, caught.value.found) == (Q1, expected, found)
    assert await store.load() == before
    # A change that was refused has not been applied: its id is still good.
    mended = replace(change, writes=(Write(ACME, None, Tenant("acme", "q1")),), checks=(Check(Q1, found),))
    assert (await store.apply(mended)).repeated is False


async def test_the_same_change_id_again_writes_nothing_and_returns_the_first_result(
    store: Store, writer: Writer
) -> None:
    await writer.init()
    change = await writer.change(Write(Q1, None, Instance("q1")))
    first = await store.apply(change)
    await writer.set((Q1, None))
    assert await store.apply(change) == replace(first, repeated=True)
    assert await store.read(Q1) is None
    assert (await store.position()).revision == 3


async def test_a_change_for_another_epoch_is_refused(store: Store, writer: Writer) -> None:
    await writer.init()
    with pytest.raises(EpochChangedError):
        await store.apply(await writer.change(Write(Q1, None, Instance("q1")), epoch="another"))
    assert (await store.position()).revision == 1


async def test_as_many_records_as_a_change_may_hold(store: Store, writer: Writer) -> None:
    await writer.init()
    cidrs = [f"10.0.{i // 256}.{i % 256}/32" for i in range(MAX_WRITES_PER_CHANGE)]
    added = await writer.change(*(Write(network_key(cidr), None, network_entry(cidr)) for cidr in cidrs))
    await store.apply(added)
    assert len((await store.load()).records) == MAX_WRITES_PER_CHANGE
    [event] = await store.history(count=1)
    assert event.counts == {"entries:office": MAX_WRITES_PER_CHANGE}
    gone = await writer.change(*(Write(write.key, encode_record(write.new), None) for write in added.writes))
    await store.apply(gone)
    assert (await store.load()).records == []


@pytest.mark.parametrize(
    "record",
    [Instance("q2"), Instance("q1", 0), Tenant("q1", "x")],
    ids=["another name", "cannot be read again", "another kind"],
)
async def test_a_record_that_does_not_fit_its_key_is_not_stored(store: Store, writer: Writer, record: Any) -> None:
    await writer.init()
    with pytest.raises(ValueError, match="instance q1 cannot be stored"):
        await store.apply(await writer.change(Write(Q1, None, record)))
    assert (await store.position()).revision == 1


async def test_events_follow_a_position_in_order(store: Store, writer: Writer) -> None:
    start = (await writer.init()).position
    results = [await writer.set((Q1, Instance("q1", weight))) for weight in range(1, 100)]
    events = []
    position = start
    while page := await store.events_after(position, wait_seconds=0):
        events += page
        position = page[-1].position
    assert [event.position for event in events] == [result.position for result in results]
    assert [event.records[0].record for event in events] == [Instance("q1", weight) for weight in range(1, 100)]
    newest = await store.history(count=3)
    assert newest == events[:-4:-1]


async def test_events_are_waited_for(store: Store, writer: Writer) -> None:
    start = (await writer.init()).position
    waiting = asyncio.create_task(store.events_after(start, wait_seconds=5))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    result = await writer.set((Q1, Instance("q1")))
    async with asyncio.timeout(1):
        [event] = await waiting
    assert event.position == result.position


async def test_when_nothing_happens_the_wait_ends_empty(store: Store, writer: Writer) -> None:
    start = (await writer.init()).position
    assert await store.events_after(start, wait_seconds=0.05) == []


@pytest.mark.parametrize(
    "change",
    [{"epoch": "another"}, {"revision": 3}, {"revision": 1}, {"change_id": "another"}],
    ids=["another epoch", "revision of the future", "a revision that another change led to", "another history"],
)
async def test_a_position_of_another_history_is_lost(store: Store, writer: Writer, change: dict[str, Any]) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")))
    with pytest.raises(PositionLostError):
        await store.events_after(replace(await store.position(), **change), wait_seconds=0)


async def test_the_same_number_of_revisions_in_another_history_is_noticed(
    store: Store, backdoor: Backdoor, writer: Writer
) -> None:
    await writer.init()
    before = (await writer.set((Q1, Instance("q1")))).position
    await backdoor.wipe()
    await writer.init()
    await writer.set((Q1, Instance("q1")))
    with pytest.raises(PositionLostError):
        await store.events_after(before, wait_seconds=0)


async def test_trimmed_events_are_noticed(store: Store, backdoor: Backdoor, writer: Writer) -> None:
    start = (await writer.init()).position
    for weight in range(1, 6):
        end = (await writer.set((Q1, Instance("q1", weight)))).position
    await backdoor.trim(2)
    with pytest.raises(PositionLostError):
        await store.events_after(start, wait_seconds=0)
    assert await store.events_after(end, wait_seconds=0) == []
    assert by_key(await store.load()) == {Q1: Instance("q1", 5)}


async def test_wiped_while_a_follower_waits(store: Store, backdoor: Backdoor, writer: Writer) -> None:
    start = (await writer.init()).position
    waiting = asyncio.create_task(store.events_after(start, wait_seconds=0.3))
    await asyncio.sleep(0.05)
    await backdoor.wipe()
    with pytest.raises(NotInitialisedError):
        await waiting


async def test_a_value_written_by_hand_is_unreadable_and_can_be_replaced(
    store: Store, backdoor: Backdoor, writer: Writer
) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (ACME, Tenant("acme", "q1")))
    await backdoor.edit("tenants", "acme", '{"instance":"Q1"}')
    stored = await store.read(ACME)
    assert stored
    assert isinstance(stored.record, Unreadable)
    loaded = by_key(await store.load())
    assert loaded == {Q1: Instance("q1"), ACME: stored.record}
    assert "'Q1'" in stored.record.problem
    await writer.set((ACME, Tenant("acme", "q1")))
    assert by_key(await store.load())[ACME] == Tenant("acme", "q1")
    [event] = await store.history(count=1)
    assert event.records[0].previous == '{"instance":"Q1"}'


async def test_a_lost_collection_is_an_incident(store: Store, backdoor: Backdoor, writer: Writer) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    await backdoor.lose("entries:office")
    with pytest.raises(InconsistentStateError, match="entries:office"):
        await store.load()


async def test_a_record_added_by_hand_is_an_incident(store: Store, backdoor: Backdoor, writer: Writer) -> None:
    await writer.init()
    await backdoor.edit("tenants", "acme", '{"instance":"q1"}')
    with pytest.raises(InconsistentStateError, match="tenants"):
        await store.load()


async def test_records_without_a_policy_are_not_taken_over_by_init(
    store: Store, backdoor: Backdoor, writer: Writer
) -> None:
    await backdoor.edit("tenants", "acme", '{"instance":"q1"}')
    with pytest.raises(InconsistentStateError):
        await writer.init()


async def test_a_load_while_others_write_is_the_state_at_its_position(
    store: Store, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaying all events up to the position gives the same records."""
    monkeypatch.setattr("authz_server.store.redis_store._SCAN_COUNT", 10)
    start = (await writer.init()).position
    cidrs = [f"10.0.{i // 256}.{i % 256}/32" for i in range(1500)]
    for first in range(0, 900, 100):
        await writer.set(*((network_key(cidr), network_entry(cidr)) for cidr in cidrs[first : first + 100]))
    done = asyncio.Event()

    async def keep_writing() -> None:
        step = 0
        while not done.is_set():
            step += 1
            cidr = cidrs[step * 7919 % len(cidrs)]
            there = await store.read(network_key(cidr))
            await writer.set(
                (network_key(cidr), None if there else network_entry(cidr, f"step {step}")),
                (network_key("192.0.2.0/24", f"list-{step % 5}"), network_entry("192.0.2.0/24", f"step {step}")),
            )
            await asyncio.sleep(0)

    writing = asyncio.create_task(keep_writing())
    try:
        loads = [await store.load() for _ in range(5)]
    finally:
        done.set()
        await writing
    state: dict[RecordKey, Any] = {}
    states = {start: {}}
    for event in reversed(await store.history(count=100_000)):
        for item in event.records:
            if item.record is None:
                del state[item.key]
            else:
                state[item.key] = item.record
        states[event.position] = dict(state)
    for loaded in loads:
        assert by_key(loaded) == states[loaded.position]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"writes": ()}, "at least one"),
        ({"change_id": ""}, "change id"),
        ({"writes": tuple(Write(RecordKey(RecordKind.TENANT, f"t{i}"), "x", None) for i in range(1001))}, "1001"),
        ({"checks": (Check(Q1, None),)}, "instance q1 is twice"),
        ({"writes": (Write(Q1, None, None),)}, "nothing to remove"),
    ],
    ids=["no write", "no change id", "too many", "one key twice", "removes nothing"],
)
def test_a_change_that_makes_no_sense_cannot_be_made(fields: dict[str, Any], problem: str) -> None:
    good: dict[str, Any] = {"change_id": "c", "epoch": "e", "actor": "a", "reason": "r", "action": "x"}
    good["writes"] = (Write(Q1, None, Instance("q1")),)
    Change(**good)
    with pytest.raises(ValueError, match=problem):
        Change(**good | fields)


async def test_many_records_are_read_at_once(store: Store, writer: Writer) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    found = await store.read_many([Q1, ACME, network_key("10.0.0.0/8"), network_key("10.0.0.0/8", "elsewhere")])
    assert {key: stored and stored.record for key, stored in found.items()} == {
        Q1: Instance("q1"),
        ACME: None,
        network_key("10.0.0.0/8"): network_entry("10.0.0.0/8"),
        network_key("10.0.0.0/8", "elsewhere"): None,
    }
    assert found[Q1] == await store.read(Q1)


async def test_a_load_of_some_collections_reads_and_judges_no_others(
    store: Store, backdoor: Backdoor, writer: Writer
) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (ACME, Tenant("acme", "q1")))
    await backdoor.lose("tenants")
    loaded = await store.load({"instances", "lists"})
    assert by_key(loaded) == {Q1: Instance("q1")}
    with pytest.raises(InconsistentStateError, match="tenants"):
        await store.load({"tenants"})
    assert await store.record_counts() == {"instances": 1, "tenants": 1}


async def test_a_change_id_does_not_stand_for_another_change(store: Store, writer: Writer) -> None:
    await writer.init()
    change = await writer.change(Write(Q1, None, Instance("q1")))
    first = await store.apply(change)
    for other in (
        replace(change, writes=(Write(Q1, None, Instance("q1", 2)),)),
        replace(change, writes=(Write(ACME, None, Tenant("acme", "q1")),)),
        replace(change, action="something.else"),
    ):
        with pytest.raises(ChangeIdUsedError, match=f"{change.change_id}.*revision 2"):
            await store.apply(other)
    assert await store.position() == first.position
    event = await store.find_change(change.change_id)
    assert event
    assert event.position == first.position
    assert await store.find_change("never heard of") is None


async def test_history_is_read_in_pages(store: Store, writer: Writer) -> None:
    await writer.init()
    for weight in range(1, 6):
        await writer.set((Q1, Instance("q1", weight)))
    pages = [await store.history(count=4), await store.history(count=4, before=3)]
    assert [[event.position.revision for event in page] for page in pages] == [[6, 5, 4, 3], [2, 1]]


async def test_more_events_than_come_in_one_reply(store: Store, writer: Writer) -> None:
    position = (await writer.init()).position
    for weight in range(1, 80):
        await writer.set((Q1, Instance("q1", weight)))
    for page, revisions in (
        (await store.history(count=1000), range(80, 0, -1)),
        (await store.history(count=70, before=78), range(77, 7, -1)),
        (await store.history_after(3, count=70), range(4, 74)),
        (await store.history_after(3, count=1000), range(4, 81)),
    ):
        assert [event.position.revision for event in page] == list(revisions)
    followed = []
    while events := await store.events_after(position, wait_seconds=0):
        followed.append(len(events))
        position = events[-1].position
    assert (followed, position.revision) == ([EVENTS_AT_ONCE, EVENTS_AT_ONCE, 79 - 2 * EVENTS_AT_ONCE], 80)


async def verified(store: Store) -> dict[str, int]:
    counts: dict[str, int] = {}
    cursor = 0
    while True:
        part = await store.verify(cursor)
        counts |= part.counts
        if not (cursor := part.cursor):
            return {name: count for name, count in counts.items() if count}


async def test_counts_that_fit_are_verified(store: Store, writer: Writer) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    assert await verified(store) == {"instances": 1, "entries:office": 1}


@pytest.mark.parametrize("how", ["lost", "added"])
async def test_counts_that_do_not_fit_are_noticed(store: Store, backdoor: Backdoor, writer: Writer, how: str) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    if how == "lost":
        await backdoor.lose("entries:office")
    else:
        await backdoor.edit("tenants", "acme", '{"instance":"q1"}')
    with pytest.raises(InconsistentStateError, match="entries:office" if how == "lost" else "tenants"):
        await verified(store)


async def test_a_sound_policy_is_examined(store: Store, writer: Writer) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    await writer.set((Q1, Instance("q1", 7)), (network_key("10.0.0.0/8"), None))
    examined = await store.examine()
    assert (examined.sound, examined.problems, examined.findings, examined.records) == (True, (), (), 1)
    assert examined.position == await store.position()


async def test_a_text_edited_by_hand_is_noticed_where_everything_is_read(
    store: Store, backdoor: Backdoor, writer: Writer
) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (ACME, Tenant("acme", "q1")))
    assert (await store.load()).edited == ()
    await backdoor.edit("tenants", "acme", encode_record(Tenant("acme", "q2")))
    assert (await store.load()).edited == ("tenants",)
    examined = await store.examine()
    assert (examined.sound, examined.findings) == (False, (Finding("tenants", 1, 1),))
    # An honest change of another record of the collection does not cover it up.
    await writer.set((RecordKey(RecordKind.TENANT, "beta"), Tenant("beta", "q1")))
    assert (await store.load()).edited == ("tenants",)


async def test_confirming_makes_what_is_left_the_policy_under_a_new_epoch(
    store: Store, backdoor: Backdoor, writer: Writer
) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    await backdoor.lose("entries:office")
    await backdoor.edit("tenants", "acme", encode_record(Tenant("acme", "q1")))
    before = await store.position()
    examined = await store.examine()
    assert set(examined.findings) == {Finding("entries:office", 1, 0), Finding("tenants", 0, 1)}
    assert [record async for record in store.records("tenants")] == [(ACME, encode_record(Tenant("acme", "q1")))]
    assert [record async for record in store.records("entries:office")] == []
    result = await store.confirm(examined, actor="alice", reason="we know", change_id="c9")
    assert (result.position.revision, result.repeated) == (before.revision + 1, False)
    assert result.position.epoch != before.epoch
    again = await store.confirm(examined, actor="alice", reason="we know", change_id="c9")
    assert again == replace(result, repeated=True)
    loaded = await store.load()
    assert by_key(loaded) == {Q1: Instance("q1"), ACME: Tenant("acme", "q1")}
    assert (loaded.position, loaded.edited) == (result.position, ())
    assert (await store.examine()).sound
    with pytest.raises(PositionLostError):
        await store.events_after(before, wait_seconds=0)
    [event] = await store.history(count=1)
    assert (event.action, event.actor, event.reason, event.previous_change_id) == (
        "confirm",
        "alice",
        "we know",
        before.change_id,
    )
    await writer.set((network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    examined = await store.examine()
    await store.confirm(examined, actor="alice", reason="to be sure", change_id="c10", action="reload")
    assert (await store.history(count=1))[0].action == "reload"


async def test_a_policy_that_changed_since_it_was_examined_is_not_confirmed(store: Store, writer: Writer) -> None:
    await writer.init()
    examined = await store.examine()
    after = (await writer.set((Q1, Instance("q1")))).position
    with pytest.raises(EpochChangedError):
        await store.confirm(examined, actor="alice", reason="r", change_id="c9")
    assert await store.position() == after


async def test_a_change_that_demands_a_revision_is_refused_at_another(store: Store, writer: Writer) -> None:
    await writer.init()
    change = await writer.change(Write(Q1, None, Instance("q1")), at_revision=1)
    await writer.set((ACME, Tenant("acme", "q2")))
    before = await store.load()
    with pytest.raises(RevisionChangedError, match="revision 2, not 1"):
        await store.apply(change)
    assert await store.load() == before
    applied = await store.apply(replace(change, at_revision=2))
    assert applied.position.revision == 3
    assert (await store.apply(replace(change, at_revision=2))).repeated, "sent again, it is the same change"


# Servers' reports

AT_7 = Position("e", 7, "c7")


def report(replica: str = "a", process: str = "p1", position: Position | None = AT_7) -> Report:
    return Report(replica, process, 1_700_000_000.5, position)


async def test_servers_report_without_a_policy_and_are_listed_by_name(store: Store) -> None:
    assert await store.replicas() == []
    assert await store.report(report("b", position=None), take_over=True)
    first_report = replace(report("a"), lost=2)
    assert await store.report(first_report, take_over=True)
    first, second = await store.replicas()
    assert (first.report, second.report) == (first_report, report("b", position=None))
    assert 0 <= first.silent_seconds < 5
    assert (first.unknown, first.vanished, first.problem) == (False, False, "")
    with pytest.raises(NotInitialisedError):
        await store.position()


async def test_a_report_replaces_the_one_before_and_is_no_change(store: Store, writer: Writer) -> None:
    await writer.init()
    await store.report(report(), take_over=True)
    newer = replace(report(), position=Position("e", 8, "c8"))
    assert await store.report(newer, take_over=False)
    (found,) = await store.replicas()
    assert found.report == newer
    assert (await store.position()).revision == 1


async def test_a_name_that_another_process_uses_is_taken_over_only_on_demand(store: Store) -> None:
    await store.report(report(process="p1"), take_over=True)
    assert not await store.report(report(process="p2"), take_over=False)
    (found,) = await store.replicas()
    assert found.report == report(process="p1")
    assert await store.report(report(process="p2"), take_over=True)
    (found,) = await store.replicas()
    assert found.report == report(process="p2")


async def test_a_forgotten_server_is_gone_until_it_reports_again(store: Store) -> None:
    await store.report(report(), take_over=True)
    assert await store.forget("a")
    assert not await store.forget("a")
    assert await store.replicas() == []
    assert await store.report(report(), take_over=False)
    assert len(await store.replicas()) == 1


@pytest.mark.parametrize(
    ("seconds", "unknown", "vanished"), [(20, False, False), (40, True, False), (3500, True, False), (3700, True, True)]
)
async def test_a_silent_server_is_unknown_for_an_hour(
    store: Store, backdoor: Backdoor, *, seconds: int, unknown: bool, vanished: bool
) -> None:
    await store.report(report(), take_over=True)
    reported_at = time.time() - seconds
    await backdoor.rewrite_report("a", r'"at":[0-9.]+', f'"at":{reported_at}')
    (found,) = await store.replicas()
    assert (found.unknown, found.vanished) == (unknown, vanished)
    assert abs(found.silent_seconds - seconds) < 5


async def test_a_report_that_cannot_be_read_counts_as_unknown_and_can_be_replaced(
    store: Store, backdoor: Backdoor
) -> None:
    await store.report(report(), take_over=True)
    await backdoor.rewrite_report("a", '"revision":7', '"revision":"many"')
    (found,) = await store.replicas()
    assert (found.report, found.unknown, found.vanished) == (None, True, False)
    assert "'many'" in found.problem
    assert await store.report(report(), take_over=False)
    (found,) = await store.replicas()
    assert found.report == report()


def many(numbers: range, reason: str = "fed") -> dict[RecordKey, Record]:
    cidrs = (f"10.{i // 65536}.{i // 256 % 256}.{i % 256}/32" for i in numbers)
    return {network_key(cidr): network_entry(cidr, reason) for cidr in cidrs}


async def replacement(store: Store, records: dict[RecordKey, Record], **fields: Any) -> Replacement:
    named: dict[str, Any] = {"change_id": secrets.token_hex(8), "actor": "feed", "reason": "daily", "action": "import"}
    named |= {"epoch": (await store.position()).epoch, "contents": {"entries:office": records}} | fields
    return Replacement(**named)


@pytest.mark.parametrize("size", [3, 2500], ids=["small", "large"])
async def test_a_collection_is_replaced_by_another(store: Store, writer: Writer, size: int) -> None:
    await writer.init()
    await writer.set((Q1, Instance("q1")), (network_key("192.0.2.0/24"), network_entry("192.0.2.0/24")))
    before = await store.position()
    wished = await replacement(store, many(range(size)))
    replaced = await store.replace(wished)
    assert replaced.result
    assert replaced.difference == Difference(added=size, removed=1)
    assert replaced.result.position.revision == before.revision + 1
    loaded = await store.load()
    assert by_key(loaded) == {Q1: Instance("q1")} | many(range(size))
    assert (loaded.position, loaded.edited) == (replaced.result.position, ())
    assert (await store.examine()).sound
    assert await verified(store) == {"instances": 1, "entries:office": size}

    # Followers take the difference.
    [event] = await store.events_after(before, wait_seconds=0)
    state = {network_key("192.0.2.0/24"): network_entry("192.0.2.0/24")}
    records = event.records if not event.parts else [one async for part in store.difference(event) for one in part]
    assert len(records) == size + 1
    for record in records:
        if record.record is None:
            del state[record.key]
        else:
            state[record.key] = record.record
    assert state == many(range(size))
    assert (event.action, event.actor, event.counts) == ("import", "feed", {"entries:office": size})

    # The same wish again changes nothing; the same change id is known.
    assert (await store.replace(replace(wished, change_id="another"))).result is None
    assert await store.find_change(wished.change_id) == event

    # Ordinary changes go on from there, and it can be emptied again.
    await writer.set((network_key("10.0.0.1/32"), network_entry("10.0.0.1/32", "by hand")))
    emptied = await store.replace(await replacement(store, {}))
    assert emptied.difference == Difference(removed=size)
    assert by_key(await store.load()) == {Q1: Instance("q1")}
    assert (await store.examine()).sound


async def test_a_replacement_changes_what_differs_and_nothing_else(store: Store, writer: Writer) -> None:
    await writer.init()
    await store.replace(await replacement(store, many(range(2500))))
    before = await store.position()
    wished = many(range(500, 1500)) | many(range(1500, 3000), "anew")
    replaced = await store.replace(await replacement(store, wished))
    assert replaced.difference == Difference(added=500, changed=1000, removed=500, unchanged=1000)
    assert by_key(await store.load()) == wished
    [event] = await store.events_after(before, wait_seconds=0)
    if event.parts:
        assert event.size == 2000
        assert sum([len(part) async for part in store.difference(event)]) == 2000


async def test_a_replacement_for_another_epoch_is_refused(store: Store, writer: Writer) -> None:
    await writer.init()
    with pytest.raises(EpochChangedError):
        await store.replace(await replacement(store, many(range(1500)), epoch="another"))
    assert (await store.load()).records == []


async def test_a_record_of_another_collection_is_refused(store: Store, writer: Writer) -> None:
    await writer.init()
    with pytest.raises(ValueError, match="instance q1 does not belong into entries:office"):
        await store.replace(await replacement(store, {Q1: Instance("q1")}))


@pytest.mark.parametrize("size", [3, 2500], ids=["small", "large"])
async def test_records_that_may_stay_as_they_are_do(store: Store, writer: Writer, size: int) -> None:
    await writer.init()
    await store.replace(await replacement(store, many(range(size))))

    def keeps(old: Record, _: Record) -> bool:
        return isinstance(old, Entry) and old.network.first % 2 == 0

    wished = await replacement(store, many(range(1, size + 1), "anew"), keeps=keeps)
    replaced = await store.replace(wished)
    kept = (size - 1) // 2
    assert replaced.difference == Difference(added=1, changed=size - 1 - kept, removed=1, unchanged=kept)
    stayed = many(range(2, size, 2))
    assert by_key(await store.load()) == many(range(1, size + 1), "anew") | stayed


@pytest.mark.parametrize("size", [3, 2500], ids=["small", "large"])
async def test_a_replacement_that_is_not_approved_writes_nothing(store: Store, writer: Writer, size: int) -> None:
    await writer.init()
    before = await store.load()
    told = []

    def refuse(difference: Difference) -> bool:
        told.append(difference)
        return False

    assert (await store.replace(await replacement(store, many(range(size))), refuse)).result is None
    assert told == [Difference(added=size)]
    assert await store.load() == before
