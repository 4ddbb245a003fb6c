"""`authzctl cleanup`: only what ended, only long ago, nothing that was renewed; and servers that vanished."""

import asyncio
import time
from dataclasses import replace

import pytest
from support.authzctl import run, write
from support.policies import Writer, network_entry, network_key

from authz_server.cli.administration import Order
from authz_server.cli.changes import RemoveExpired
from authz_server.cli.moves import Mover
from authz_server.demo.valkey import Valkey
from authz_server.policy.access import Entry
from authz_server.policy.records import RecordKey
from authz_server.store.interface import MAX_WRITES_PER_CHANGE
from authz_server.store.memory_store import MemoryStore
from authz_server.store.redis_store import RedisStore

NOW = 1_800_000_000.0


def ending(cidr: str, expires_at: float | None) -> tuple[RecordKey, Entry]:
    return network_key(cidr), replace(network_entry(cidr), expires_at=None if expires_at is None else int(expires_at))


async def test_one_that_was_renewed_meanwhile_stays() -> None:
    store = MemoryStore()
    writer = Writer(store)
    await writer.init()
    await writer.set(ending("10.0.0.0/8", NOW), ending("11.0.0.0/8", NOW))
    wishes = [RemoveExpired(network_key(cidr), NOW) for cidr in ("10.0.0.0/8", "11.0.0.0/8", "12.0.0.0/8")]
    await writer.set(ending("11.0.0.0/8", NOW + 1))
    order = Order("cron", "cleanup", "c", resent=False, now=NOW)
    done = await Mover(store, order, batch=MAX_WRITES_PER_CHANGE, on_progress=lambda *_: None, noun="network").at_once(
        wishes
    )
    assert (done.action, done.records) == ("cleanup", 1)
    assert [key.name for key, _ in (await store.load()).records] == ["11.0.0.0/8"]
    (event,) = await store.history(count=1)
    assert event.action == "cleanup"


@pytest.mark.integration
def test_what_ended_long_ago_is_taken_out(valkey: Valkey, policy: str) -> None:
    now = time.time()

    async def put() -> None:
        store = RedisStore(valkey.url, prefix=policy)
        try:
            records = [ending(f"10.0.{number // 256}.{number % 256}/32", now - 7200) for number in range(300)]
            writer = Writer(store)
            await writer.set(*records[:200])
            await writer.set(*records[200:], ending("10.1.0.0/16", now - 60), ending("10.2.0.0/16", now + 60))
            await writer.set(ending("10.3.0.0/16", None))
        finally:
            await store.close()

    asyncio.run(put())
    shown = run("cleanup", "--dry-run", "-o", "json").json["expired"]
    assert (len(shown), shown[0]["list"], shown[0]["network"]) == (300, "office", "10.0.0.0/32")
    assert "10.0.1.43/32" in run("cleanup", "--dry-run").out
    assert "Done: cleanup of 300 networks, 3 changes, revisions 5 to 7." in run("cleanup").out
    assert "Nothing to do for cleanup" in run("cleanup").out
    assert "Nothing has expired for so long." in run("cleanup", "--dry-run").out
    assert "Done: cleanup of 1 network, revision 8." in write("cleanup", "--older-than", "0").out
    left = run("list", "show", "office", "-o", "json")
    assert left.code == 1, "no list of this name was made, only its entries"
    assert "'soon' is not a span" in run("cleanup", "--older-than", "soon").err
