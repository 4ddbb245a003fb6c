"""What only a real server can show: lost replies, permissions, full memory, damaged keys, secrets in messages."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from support.policies import ACME, Q1, Writer, by_key, network_entry, network_key
from support.proxy import LossyProxy

from authz_server.demo.valkey import Valkey
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.records import RecordKey, RecordKind, Unreadable
from authz_server.store.interface import (
    EVENTS_AT_ONCE,
    MAX_WRITES_PER_CHANGE,
    CollectionTouchedError,
    DurabilityError,
    InconsistentStateError,
    NotDurableError,
    NotInitialisedError,
    PositionLostError,
    Replacement,
    StoreRefusedError,
    StoreUnavailableError,
    UnknownFormatError,
    Write,
)
from authz_server.store.redis_store import RedisStore

pytestmark = pytest.mark.integration


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
async def store(valkey: Valkey, prefix: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(valkey.url, prefix=prefix)
    yield store
    await store.close()


@pytest.fixture
async def client(valkey: Valkey) -> AsyncIterator[Any]:
    async with Redis.from_url(valkey.url, decode_responses=True) as client:
        yield client


async def test_a_write_whose_reply_is_lost_is_applied_once(valkey: Valkey, prefix: str, store: RedisStore) -> None:
    """redis-py sends the command again by itself; the answer then says that it had been applied before."""
    async with LossyProxy(valkey.port) as proxy:
        distant = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix)
        try:
            proxy.marker = b"EVALSHA"
            writer = Writer(distant)
            await writer.init()
            await writer.set((ACME, Tenant("acme", "q1")))
            before = await store.position()
            proxy.lose = 2
            result = await writer.set((Q1, Instance("q1")))
            assert (proxy.lost, result.repeated) == (2, True)
            assert result.position == await store.position()
            assert result.position.revision == before.revision + 1
            events = await store.history(count=100)
            assert [event.action for event in events] == ["test", "test", "init"]
        finally:
            await distant.close()


async def test_a_write_whose_replies_are_all_lost_can_be_sent_again_by_its_author(
    valkey: Valkey, prefix: str, store: RedisStore
) -> None:
    async with LossyProxy(valkey.port) as proxy:
        distant = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix)
        try:
            await Writer(distant).init()
            await Writer(distant).set((ACME, Tenant("acme", "q1")))  # from now on Valkey knows the script
            change = await Writer(distant).change(Write(Q1, None, Instance("q1")))
            proxy.marker, proxy.lose = b"EVALSHA", 1000
            with pytest.raises(StoreUnavailableError):
                await distant.apply(change)
            assert proxy.lost > 1
            proxy.lose = 0
            assert (await distant.apply(change)).repeated is True
            assert (await store.position()).revision == 3
        finally:
            await distant.close()


async def test_a_follower_that_is_cut_off_says_so_at_once_and_then_follows_on(valkey: Valkey, prefix: str) -> None:
    async with LossyProxy(valkey.port) as proxy:
        distant = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix)
        try:
            start = (await Writer(distant).init()).position
            proxy.marker, proxy.lose = b"XREAD", 1
            with pytest.raises(StoreUnavailableError):
                await distant.events_after(start, wait_seconds=0.1)
            await Writer(distant).set((Q1, Instance("q1")))
            [event] = await distant.events_after(start, wait_seconds=0)
            assert event.records[0].record == Instance("q1")
        finally:
            await distant.close()


async def test_scripts_survive_a_server_that_forgot_them(store: RedisStore, client: Any) -> None:
    await Writer(store).init()
    await client.script_flush()
    assert (await Writer(store).set((Q1, Instance("q1")))).position.revision == 2


async def test_no_server_no_answer(prefix: str, own_valkey: Valkey) -> None:
    own_valkey.stop()
    store = RedisStore(own_valkey.url, prefix=prefix)
    try:
        with pytest.raises(StoreUnavailableError, match=f"127.0.0.1:{own_valkey.port} cannot be reached"):
            await store.position()
    finally:
        await store.close()


@pytest.mark.parametrize(
    "key",
    ["meta", "counts", "changes"],
)
async def test_a_lost_key_is_an_incident(store: RedisStore, client: Any, prefix: str, key: str) -> None:
    await Writer(store).init()
    await Writer(store).set((Q1, Instance("q1")), (network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    position = await store.position()
    change = await Writer(store).change(Write(ACME, None, Tenant("acme", "q1")))
    assert await client.delete(f"{{{prefix}}}:{key}")
    with pytest.raises(InconsistentStateError):
        await store.load()
    if key != "counts":  # following needs no counts, and a write does not read them all
        with pytest.raises(InconsistentStateError):
            await store.apply(change)
        with pytest.raises(InconsistentStateError):
            await store.events_after(position, wait_seconds=0)
        assert await client.hget(f"{{{prefix}}}:tenants", "acme") is None
    if key == "meta":
        with pytest.raises(InconsistentStateError):
            await Writer(store).init()


async def test_lost_counts_of_lists_alone_are_noticed(store: RedisStore, client: Any, prefix: str) -> None:
    """Without its counts nobody would know that the list `office` was ever there."""
    await Writer(store).init()
    await Writer(store).set((network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    await client.delete(f"{{{prefix}}}:counts", f"{{{prefix}}}:entries:office")
    with pytest.raises(InconsistentStateError, match="the counts, which are gone"):
        await store.load()


@pytest.mark.parametrize(
    ("key", "field", "text"),
    [
        ("meta", "revision", "many"),
        ("meta", "revision", "7"),
        ("meta", "records", "-1"),
        ("counts", "instances", "many"),
        ("counts", "unheard_of", "1"),
    ],
)
async def test_damaged_bookkeeping_is_an_incident(
    store: RedisStore, client: Any, prefix: str, *, key: str, field: str, text: str
) -> None:
    await Writer(store).init()
    await Writer(store).set((Q1, Instance("q1")))
    await client.hset(f"{{{prefix}}}:{key}", field, text)
    with pytest.raises(InconsistentStateError):
        await store.load()


async def test_events_written_by_hand_are_not_followed(store: RedisStore, client: Any, prefix: str) -> None:
    start = (await Writer(store).init()).position
    change = await Writer(store).change(Write(Q1, None, Instance("q1")))
    await client.xadd(f"{{{prefix}}}:changes", {"hello": "world"}, id="2-0")
    with pytest.raises(PositionLostError):
        await store.events_after(start, wait_seconds=0)
    for attempt in (store.load(), store.apply(change)):
        with pytest.raises(InconsistentStateError):
            await attempt
    assert await client.exists(f"{{{prefix}}}:instances") == 0


async def test_another_format_is_not_touched(store: RedisStore, client: Any, prefix: str) -> None:
    position = (await Writer(store).init()).position
    change = await Writer(store).change(Write(Q1, None, Instance("q1")))
    await client.hset(f"{{{prefix}}}:meta", "format", "99")
    for attempt in (store.load(), store.apply(change), store.events_after(position, wait_seconds=0)):
        with pytest.raises(UnknownFormatError, match="'99'"):
            await attempt


async def test_text_that_is_not_utf_8_is_unreadable_and_can_be_replaced(
    store: RedisStore, client: Any, prefix: str
) -> None:
    await Writer(store).init()
    await Writer(store).set((ACME, Tenant("acme", "q1")))
    await client.hset(f"{{{prefix}}}:tenants", "acme", b'{"instance":"\xff"}')
    assert isinstance(by_key(await store.load())[ACME], Unreadable)
    start = await store.position()
    await Writer(store).set((ACME, Tenant("acme", "q1")))
    assert by_key(await store.load())[ACME] == Tenant("acme", "q1")
    [event] = await store.events_after(start, wait_seconds=0)
    assert event.records[0].previous == '{"instance":"\udcff"}'


@pytest.mark.parametrize("refused", ["-xadd", "-hset", "-hdel", "-set", "-evalsha"])
async def test_a_user_who_may_not_do_all_of_a_change_does_nothing_of_it(
    own_valkey: Valkey, prefix: str, refused: str
) -> None:
    admin: Any = Redis.from_url(own_valkey.url)
    await admin.execute_command("ACL", "SETUSER", "carol", "on", ">sesame", "~*", "+@all", refused)
    store = RedisStore(own_valkey.url, prefix=prefix)
    carol = RedisStore(f"redis://carol:sesame@127.0.0.1:{own_valkey.port}", prefix=prefix)
    try:
        await Writer(store).init()
        await Writer(store).set((Q1, Instance("q1")))
        before = await store.load()
        change = await Writer(carol).change(
            Write(Q1, '{"state":"active","weight":1}', None), Write(ACME, None, Tenant("acme", "q1"))
        )
        with pytest.raises(StoreRefusedError, match="permission"):
            await carol.apply(change)
        assert await store.load() == before
    finally:
        for each in (carol, store):
            await each.close()
        await admin.aclose()


async def test_a_full_server_refuses_a_write_in_its_own_words_and_keeps_answering(
    own_valkey: Valkey, prefix: str
) -> None:
    store = RedisStore(own_valkey.url, prefix=prefix)
    admin: Any = Redis.from_url(own_valkey.url)
    try:
        await Writer(store).init()
        await Writer(store).set((Q1, Instance("q1")))
        await admin.config_set("maxmemory", "1")
        with pytest.raises(StoreRefusedError, match="maxmemory"):
            await Writer(store).set((ACME, Tenant("acme", "q1")), (Q1, None))
        assert by_key(await store.load()) == {Q1: Instance("q1")}
    finally:
        await store.close()
        await admin.aclose()


async def test_a_wrong_password_is_refused_and_not_repeated_in_the_message(own_valkey: Valkey, prefix: str) -> None:
    store = RedisStore(f"redis://carol:open%2Fsesame@127.0.0.1:{own_valkey.port}/0", prefix=prefix)
    try:
        with pytest.raises(StoreRefusedError) as caught:
            await store.position()
        assert "sesame" not in str(caught.value)
        own_valkey.stop()
        with pytest.raises(StoreUnavailableError) as unreachable:
            await store.position()
        assert "sesame" not in str(unreachable.value)
    finally:
        await store.close()


async def test_a_server_that_hangs_is_given_up(
    own_valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisStore(f"{own_valkey.url}?socket_timeout=1", prefix=prefix)
    try:
        start = (await Writer(store).init()).position
        assert await store.events_after(start, wait_seconds=5) == []  # the wait ends before the time-out does
        own_valkey.pause()
        async with asyncio.timeout(5):
            with pytest.raises(StoreUnavailableError):
                await store.events_after(start, wait_seconds=5)
        own_valkey.resume()
        assert await store.events_after(start, wait_seconds=0) == []
    finally:
        await store.close()


async def test_the_stream_is_trimmed_to_the_configured_length(valkey: Valkey, prefix: str, client: Any) -> None:
    store = RedisStore(valkey.url, prefix=prefix, max_events=100)
    try:
        start = (await Writer(store).init()).position
        for weight in range(1, 301):
            await Writer(store).set((Q1, Instance("q1", weight % 100 + 1)))
        assert await client.xlen(f"{{{prefix}}}:changes") == 100
        with pytest.raises(PositionLostError):
            await store.events_after(start, wait_seconds=0)
        await store.load()
    finally:
        await store.close()


async def test_events_are_kept_as_long_as_configured_whatever_their_number(
    valkey: Valkey, prefix: str, client: Any
) -> None:
    stores = [RedisStore(valkey.url, prefix=prefix, max_events=10, keep_seconds=seconds) for seconds in (3600, 2)]
    patient, hasty = stores
    stream = f"{{{prefix}}}:changes"

    async def change(store: RedisStore, number: int) -> None:
        await Writer(store).set((Q1, Instance("q1", number % 100 + 1)))

    try:
        await Writer(patient).init()
        for number in range(1, 50):
            await change(patient, number)
        await patient.replace(await feed(patient, 1500))
        assert await client.xlen(stream) == 51
        number = 50
        async with asyncio.timeout(20):
            while await client.xlen(stream) == 50 + number - 48:  # none of them is two seconds old
                number += 1
                await change(hasty, number)
                await asyncio.sleep(0.05)
        for more in range(100):
            length = await client.xlen(stream)
            await change(patient, number + 1 + more)
            assert await client.xlen(stream) == length + 1
    finally:
        for store in stores:
            await store.close()


async def test_two_policies_share_a_server(valkey: Valkey, prefix: str, store: RedisStore) -> None:
    await Writer(store).init()
    other = RedisStore(valkey.url, prefix=f"{prefix}-2")
    try:
        with pytest.raises(NotInitialisedError):
            await other.load()
    finally:
        await other.close()


async def test_results_of_changes_do_not_stay_for_ever(store: RedisStore, client: Any, prefix: str) -> None:
    change_id = (await Writer(store).init()).position.change_id
    applied_id = (await Writer(store).set((Q1, Instance("q1")))).position.change_id
    for each in (change_id, applied_id):
        assert 86_000 < await client.ttl(f"{{{prefix}}}:change:{each}") <= 86_400


async def test_a_stream_that_would_refuse_the_event_refuses_the_change_first(
    store: RedisStore, client: Any, prefix: str
) -> None:
    """An entry that somebody added by hand and deleted leaves its id behind: XADD takes none that is lower."""
    await Writer(store).init()
    stray = await client.xadd(f"{{{prefix}}}:changes", {"a": "b"}, id="9999-0")
    await client.xdel(f"{{{prefix}}}:changes", stray)
    with pytest.raises(InconsistentStateError, match="change stream"):
        await Writer(store).set((Q1, Instance("q1")))
    assert await client.hget(f"{{{prefix}}}:instances", "q1") is None
    assert await client.hget(f"{{{prefix}}}:meta", "revision") == "1"


async def test_nothing_is_written_onto_a_collection_that_lost_records(
    store: RedisStore, client: Any, prefix: str
) -> None:
    await Writer(store).init()
    await Writer(store).set((Q1, Instance("q1")))
    await client.delete(f"{{{prefix}}}:instances")
    with pytest.raises(InconsistentStateError, match="0 records instead of 1"):
        await Writer(store).set((RecordKey(RecordKind.INSTANCE, "q2"), Instance("q2")))
    assert await client.hlen(f"{{{prefix}}}:instances") == 0


@pytest.mark.parametrize("lost", ["meta", "counts", "changes", "meta changes", "stray"])
async def test_what_is_left_after_a_lost_key_can_be_confirmed(
    store: RedisStore, client: Any, prefix: str, lost: str
) -> None:
    await Writer(store).init()
    await Writer(store).set((Q1, Instance("q1")), (network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    before = await store.load()
    if lost == "stray":
        await client.xadd(f"{{{prefix}}}:changes", {"hello": "world"})
    else:
        assert await client.delete(*(f"{{{prefix}}}:{key}" for key in lost.split()))
    examined = await store.examine()
    assert not examined.sound
    await store.confirm(examined, actor="alice", reason="we know", change_id="c9")
    after = await store.load()
    assert (by_key(after), after.edited) == (by_key(before), ())
    assert after.position.epoch != before.position.epoch
    assert (await store.examine()).sound
    await Writer(store).set((ACME, Tenant("acme", "q1")))
    aside = [key async for key in client.scan_iter(match=f"{{{prefix}}}:changes:until:*")]
    assert len(aside) == (lost == "stray")
    for key in ("meta", "counts", "changes", "instances", "tenants", "entries:office"):
        assert await client.ttl(f"{{{prefix}}}:{key}") == -1, f"{key} would be gone after a while"


async def test_an_edit_during_the_examination_is_seen(store: RedisStore, client: Any, prefix: str) -> None:
    await Writer(store).init()
    writer = Writer(store)
    for weight in range(1, 30):
        examining = asyncio.create_task(store.examine())
        await writer.set((Q1, Instance("q1", weight)), (ACME, Tenant("acme", f"q{weight}")))
        assert (await examining).sound


async def test_a_change_id_whose_result_has_gone_is_found_in_the_history(
    store: RedisStore, client: Any, prefix: str
) -> None:
    await Writer(store).init()
    result = await Writer(store).set((Q1, Instance("q1")))
    await client.delete(f"{{{prefix}}}:change:{result.position.change_id}")
    event = await store.find_change(result.position.change_id)
    assert event
    assert event.position == result.position


async def test_a_change_in_the_append_only_file_is_durable(prefix: str) -> None:
    with Valkey(append_only=True) as valkey:
        store = RedisStore(valkey.url, prefix=prefix)
        try:
            await Writer(store).init()
            durability = await store.durability()
            assert str(durability) == "the append-only file"
            result = await Writer(store).set((Q1, Instance("q1")))
            await store.make_durable(result, durability, seconds=5)
            valkey.kill()
            valkey.start()
            assert await store.position() == result.position
        finally:
            await store.close()


async def test_without_a_copy_nothing_is_called_durable(store: RedisStore) -> None:
    with pytest.raises(DurabilityError, match="no append-only file and has no replica"):
        await store.durability()


async def test_a_lost_change_is_not_called_durable(prefix: str) -> None:
    with Valkey(append_only=True) as valkey:
        store = RedisStore(valkey.url, prefix=prefix)
        client: Any = Redis.from_url(valkey.url)
        try:
            await Writer(store).init()
            result = await Writer(store).set((Q1, Instance("q1")))
            await client.flushall()
            with pytest.raises(NotDurableError, match="was lost"):
                await store.make_durable(result, await store.durability(), seconds=5)
        finally:
            await store.close()
            await client.aclose()


def addresses(count: int) -> dict[RecordKey, Any]:
    cidrs = [f"10.0.{i // 256}.{i % 256}/32" for i in range(count)]
    return {network_key(cidr): network_entry(cidr) for cidr in cidrs}


async def feed(store: RedisStore, count: int) -> Replacement:
    epoch = (await store.position()).epoch
    return Replacement("feed-1", epoch, "feed", "daily", "import", {"entries:office": addresses(count)})


async def test_a_collection_touched_while_its_replacement_is_prepared_is_left_alone(
    store: RedisStore, client: Any, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Writer(store).init()
    staged = RedisStore._stage

    async def stage_slowly(self: RedisStore, name: str, *args: Any, **kwargs: Any) -> None:
        await staged(self, name, *args, **kwargs)
        if name.startswith("difference:"):
            await Writer(store).set((network_key("192.0.2.0/24"), network_entry("192.0.2.0/24")))

    monkeypatch.setattr(RedisStore, "_stage", stage_slowly)
    with pytest.raises(CollectionTouchedError, match="entries:office"):
        await store.replace(await feed(store, 1500))
    assert by_key(await store.load()) == {network_key("192.0.2.0/24"): network_entry("192.0.2.0/24")}
    assert not [key async for key in client.scan_iter(match=f"{{{prefix}}}:staged:*")]


async def test_no_command_works_on_many_records(own_valkey: Valkey) -> None:
    """Redis does one thing after the other: whatever takes it long holds up every server and every writer."""
    store = RedisStore(own_valkey.url)
    async with Redis.from_url(own_valkey.url) as client:
        await client.config_set("slowlog-max-len", 100_000)
        await client.config_set("slowlog-log-slower-than", 0)
        try:
            start = (await Writer(store).init()).position
            for number in range(100):
                await Writer(store).set((Q1, Instance("q1", number + 1)))
            lists = [(network_key("192.0.2.0/24", f"list-{number}"), "192.0.2.0/24") for number in range(1100)]
            for first in range(0, len(lists), MAX_WRITES_PER_CHANGE):
                part = lists[first : first + MAX_WRITES_PER_CHANGE]
                await Writer(store).set(*((key, network_entry(cidr)) for key, cidr in part))
            await store.replace(await feed(store, 1100))
            await store.replace(Replacement("gone", start.epoch, "feed", "daily", "import", {"entries:office": {}}))
            while events := await store.events_after(start, wait_seconds=0):
                start = events[-1].position
            await store.history(count=1000)
            await store.history_after(0, count=1000)
            await store.find_change("nobody's")
            await store.load()
            await store.load({f"entries:list-{number}" for number in range(1100)})
            await store.read_many(key for key, _ in lists)
            await store.verify(0)
            await store.confirm(await store.examine(), actor="ann", reason="a test", change_id="confirmed")
        finally:
            await store.close()
        sent = [entry["command"].decode("utf-8", "replace") for entry in await client.slowlog_get(100_000)]
    assert {command.split()[0] for command in sent} >= {"HSET", "HSCAN", "HMGET", "EVALSHA", "XRANGE", "XREVRANGE"}
    for command in sent:
        name = command.split()[0]
        assert name not in ("HGETALL", "HKEYS", "HVALS", "KEYS"), command
        if count := re.search(r" COUNT (\d+)$", command):
            assert int(count[1]) <= (EVENTS_AT_ONCE if name.startswith("X") else 1000), command
        if more := re.search(r"\((\d+) more arguments\)$", command):
            assert int(more[1]) <= (9 * MAX_WRITES_PER_CHANGE if name == "EVALSHA" else 1000), command


@pytest.mark.parametrize("after", range(1, 9))
async def test_a_writer_killed_between_two_commands_leaves_nothing_that_counts_and_nothing_for_ever(
    store: RedisStore, client: Any, prefix: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Writer(store).init()
    await Writer(store).set((network_key("192.0.2.0/24"), network_entry("192.0.2.0/24")))
    before = await store.load()
    wished = await feed(store, 400)
    commands = 0
    original = Redis.execute_command

    async def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal commands
        if args[0] in ("HSET", "HDEL", "EVALSHA", "UNLINK"):
            commands += 1
        if commands > after:
            raise KeyboardInterrupt
        return await original(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Redis, "execute_command", counted)
        try:
            await store.replace(wished)
            finished = True
        except KeyboardInterrupt:
            finished = False
    if finished or (await store.position()).revision > before.position.revision:
        assert by_key(await store.load()) == addresses(400)
    else:
        assert await store.load() == before
        async for key in client.scan_iter(match=f"{{{prefix}}}:*feed-1*"):
            assert 0 < await client.ttl(key) <= 3600, key
    assert (await store.examine()).sound
    again = await store.replace(wished)
    assert again.result is None or not again.result.repeated
    assert by_key(await store.load()) == addresses(400)


async def test_the_difference_goes_with_its_event(valkey: Valkey, prefix: str, client: Any) -> None:
    store = RedisStore(valkey.url, prefix=prefix, max_events=1)
    try:
        start = (await Writer(store).init()).position
        await store.replace(await feed(store, 1500))
        [event] = await store.events_after(start, wait_seconds=0)
        await client.xtrim(f"{{{prefix}}}:changes", maxlen=1, approximate=False)
        await client.delete(f"{{{prefix}}}:change:feed-1")
        epoch = start.epoch
        for change_id, count in (("feed-2", 3000), ("feed-3", 0)):
            contents = {"entries:office": addresses(count)}
            await store.replace(Replacement(change_id, epoch, "feed", "daily", "import", contents))
            await client.xtrim(f"{{{prefix}}}:changes", maxlen=1, approximate=False)
        with pytest.raises(PositionLostError):
            [part async for part in store.difference(event)]
        assert "feed-1" not in await client.hgetall(f"{{{prefix}}}:differences")
    finally:
        await store.close()
