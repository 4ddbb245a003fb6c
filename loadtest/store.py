"""Measures the store on a real Valkey: a large import, how soon a change is everywhere, and what idle followers cost.

    python -m loadtest.store [NETWORKS]

The followers are Refreshers with connections of their own in one process, not server processes: their share of the
time is that of one event loop for all, so a change is there sooner in real servers on machines of their own.
"""

import asyncio
import secrets
import statistics
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

from redis.asyncio import Redis

from authz_server.demo.valkey import Valkey
from authz_server.policy.access import Entry
from authz_server.policy.addresses import Network
from authz_server.policy.records import Record, RecordKey, RecordKind
from authz_server.policy.snapshot import DecisionOptions
from authz_server.refresher import Refresher
from authz_server.store.interface import Change, Position, Replacement, Write
from authz_server.store.redis_store import RedisStore

FOLLOWERS = 20
CHANGES = 1000
IDLE_SECONDS = 20
LIST = "office"


def records(count: int) -> dict[RecordKey, Record]:
    """Single IPv4 addresses."""
    networks = (Network(4, (10 << 24) + number, 32) for number in range(count))
    return {
        RecordKey(RecordKind.ENTRY, str(network), LIST): Entry(network, "measured", "loadtest", 1_700_000_000)
        for network in networks
    }


async def measure_import(store: RedisStore, client: Any, count: int) -> None:
    """Print how long an import takes, and the slowest command that Redis had to run for it."""
    wished = Replacement(
        secrets.token_hex(8), (await store.position()).epoch, "l", "r", "import", {f"entries:{LIST}": records(count)}
    )
    before = time.perf_counter()
    await store.replace(wished)
    seconds = time.perf_counter() - before
    slowest = max((entry["duration"] for entry in await client.slowlog_get(10_000)), default=0) / 1000
    print(f"import of {count:,} networks: {seconds:.1f} s; slowest Redis command {slowest:.1f} ms (aim: 20)")


async def measure_propagation(
    store: RedisStore, refreshers: list[Refresher], arrived: dict[Position, list[float]]
) -> None:
    """Print how soon a change is decided by everywhere."""
    delays = []
    for number in range(CHANGES):
        network = Network(4, (192 << 24) + number, 32)
        key = RecordKey(RecordKind.ENTRY, str(network), "changes")
        write = Write(key, None, Entry(network, "measured", "loadtest", 1_700_000_000))
        epoch = (await store.position()).epoch
        result = await store.apply(Change(secrets.token_hex(8), epoch, "l", "r", "block.add", (write,)))
        returned = time.perf_counter()
        deadline = returned + 5
        while len(arrived.get(result.position, ())) < len(refreshers):
            if time.perf_counter() > deadline:
                raise SystemExit(f"change {number} did not arrive everywhere within 5 s")
            await asyncio.sleep(0.0005)
        delays.append(max(0.0, max(arrived[result.position]) - returned) * 1000)
    ranked = sorted(delays)
    print(
        f"{CHANGES} changes, {len(refreshers)} followers, ms from the write's return until the last one decides by it: "
        f"p50 {statistics.median(ranked):.1f}, p99 {ranked[int(len(ranked) * 0.99)]:.1f} (aim: 100)"
    )


async def measure_idle(client: Any) -> None:
    """Print what Redis sends while nothing happens."""
    before = (await client.info("stats"))["total_net_output_bytes"]
    await asyncio.sleep(IDLE_SECONDS)
    sent = (await client.info("stats"))["total_net_output_bytes"] - before
    print(f"{FOLLOWERS} idle followers: Redis sends {sent / IDLE_SECONDS / 1024:.2f} KiB/s")


async def main(count: int) -> None:
    """Measure everything on one Valkey."""
    settings = {"slowlog-log-slower-than": "500", "slowlog-max-len": "10000"}
    with Valkey(settings=settings) as valkey:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(Redis.from_url(valkey.url, decode_responses=True))
            store = RedisStore(valkey.url)
            stack.push_async_callback(store.close)
            await store.init(actor="l", reason="r", change_id="init")
            arrived: dict[Position, list[float]] = {}
            refreshers = []
            tasks = []
            for _ in range(FOLLOWERS):
                other = RedisStore(valkey.url)
                stack.push_async_callback(other.close)
                refresher = Refresher(
                    other,
                    DecisionOptions(),
                    on_event=lambda event: arrived.setdefault(event.position, []).append(time.perf_counter()),
                )
                refreshers.append(refresher)
                tasks.append(asyncio.create_task(refresher.run()))
            while not all(refresher.current for refresher in refreshers):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await measure_propagation(store, refreshers, arrived)
            await measure_idle(client)
            while tasks := [task for task in tasks if not task.done()]:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=0.1)
            await measure_import(store, client, count)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000))
