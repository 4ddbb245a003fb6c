"""How soon a change is decided by everywhere: server processes that follow one Valkey with a large policy.

    python -m loadtest.followers [SERVERS [NETWORKS [TENANTS]]]

By default 20 servers, 10^6 networks, 10^5 pinned tenants: some five minutes and 10 GB. The first server loads from the
store; the others begin with a copy of its snapshot file, as restarted containers do, and follow the store from there.
Each server logs a change once it decides by it; the time from a write's return to the last of these lines is what is
told. The aim's time after each return all servers are asked about the address that was blocked, one after the other.
"""

import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
from redis.asyncio import Redis

from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.policy.access import Entry
from authz_server.policy.addresses import Address, Network
from authz_server.policy.records import entry_key
from authz_server.store.interface import Change, Write
from authz_server.store.redis_store import RedisStore
from loadtest.large_policy import BLOCKED, NETWORKS, TENANTS, LargePolicy, RealServer
from loadtest.processes import CHECK
from loadtest.served import build_request

SERVERS = 20
CHANGES = 1000
AIM_SECONDS = 0.1
IDLE_SECONDS = 30.0
_DENIED = 7

Ask = Callable[[bytes], Any]


class LargestLoader(threading.Thread):
    """Notes how much memory the loading processes take at most, from start to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0
        self._over = threading.Event()

    def run(self) -> None:
        """Look until stopped."""
        while not self._over.wait(0.05):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if b"authz_server.packing" in (folder / "cmdline").read_bytes():
                        fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                        self.mib = max(self.mib, int(fields.get("VmHWM", "0 kB").split()[0]) / 1024)
                except (OSError, ValueError):
                    continue

    def stop(self) -> float:
        """Stop looking; returns the most that was seen."""
        self._over.set()
        self.join()
        return self.mib


def ranked(times: list[float]) -> str:
    """The middle and the end of some times, given in seconds."""
    milliseconds = sorted(seconds * 1000 for seconds in times)
    p99 = milliseconds[int(len(milliseconds) * 0.99)]
    return f"p50 {statistics.median(milliseconds):.1f}, p99 {p99:.1f}, longest {milliseconds[-1]:.1f} ms"


async def denies(ask: Ask, request: bytes) -> bool:
    """Whether a server denies."""
    code: int = ext_authz_pb2.CheckResponse.FromString(await ask(request)).status.code
    return code == _DENIED


async def measure_changes(store: RedisStore, servers: list[RealServer], asks: list[Ask]) -> None:
    """Print how soon blocked addresses are denied by all servers."""
    epoch = (await store.position()).epoch
    returned: dict[int, float] = {}
    late = 0
    value = 198 << 24
    while len(returned) < CHANGES:
        value += 257
        request = build_request(str(Address(4, value)), "tenant-1", "/")
        if await denies(asks[0], request):
            continue  # the policy blocks it already
        entry = Entry(Network(4, value, 32), "measured", "loadtest", 1_700_000_000)
        write = Write(entry_key(BLOCKED, entry), None, entry)
        change = Change(f"followers-{value}", epoch, "loadtest", "measured", "block.add", (write,))
        result = await store.apply(change)
        returned[result.position.revision] = time.time()
        await asyncio.sleep(AIM_SECONDS)
        late += sum([not await denies(ask, request) for ask in asks])
    used = [in_use(server, returned.keys()) for server in servers]
    delays = [max(0.0, max(one[revision] for one in used) - at) for revision, at in returned.items()]
    print(f"{CHANGES} changes, from the write's return until the last of {len(asks)} uses it: {ranked(delays)}")
    print(f"asked {AIM_SECONDS * 1000:.0f} ms after the return, {late} of {CHANGES * len(asks)} answers were of before")


def in_use(server: RealServer, revisions: Collection[int]) -> dict[int, float]:
    """When a server began to decide by revisions, in seconds since the Unix epoch, as it has logged it."""
    lines = (json.loads(line) for line in server.log.read_text().splitlines())
    moments = {
        line["revision"]: datetime.fromisoformat(line["timestamp"]).timestamp()
        for line in lines
        if line["event"] == "change applied"
    }
    return {revision: moments[revision] for revision in revisions}


async def measure_idle(client: Any, servers: int) -> None:
    """Print what the store sends while nothing happens."""
    before = (await client.info("stats"))["total_net_output_bytes"]
    await asyncio.sleep(IDLE_SECONDS)
    sent = (await client.info("stats"))["total_net_output_bytes"] - before
    print(f"{servers} idle servers: the store sends {sent / IDLE_SECONDS / 1024:.2f} KiB/s to all of them")


async def measure(policy: LargePolicy, servers: list[RealServer]) -> None:
    """Print what can be told once all servers follow."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Redis.from_url(policy.valkey.url, decode_responses=True))
        used = (await client.info("memory"))["used_memory"]
        print(f"the store uses {used / 2**20:.0f} MiB")
        await asyncio.sleep(IDLE_SECONDS)  # what servers do after a start is not what they do when idle
        await measure_idle(client, len(servers))
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")) for server in servers
        ]
        store = RedisStore(policy.valkey.url)
        stack.push_async_callback(store.close)
        await measure_changes(store, servers, [channel.unary_unary(CHECK) for channel in channels])


def main(count: int = SERVERS, networks: int = NETWORKS, tenants: int = TENANTS) -> None:
    """Fill a store, start the servers, and measure."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        began = time.monotonic()
        policy = stack.enter_context(LargePolicy(networks, tenants))
        print(f"{networks:,} networks and {tenants:,} tenants written in {time.monotonic() - began:.0f} s")
        loader = LargestLoader()
        loader.start()
        servers = [stack.enter_context(RealServer(policy.valkey, folder / "0"))]
        first = servers[0]
        print(
            f"loaded from the store and ready after {first.ready_seconds:.1f} s; {first.resident_mib():.0f} MiB, "
            f"at most {first.resident_mib('VmHWM'):.0f}, and {loader.stop():.0f} in the loading process meanwhile"
        )
        for number in range(1, count):
            shutil.copy(folder / "0", folder / str(number))
            servers.append(stack.enter_context(RealServer(policy.valkey, folder / str(number))))
        sizes = [server.resident_mib() for server in servers]
        slowest = max(server.ready_seconds for server in servers[1:] or servers)
        print(
            f"{count} servers follow; the others were ready from a copy of its snapshot file after at most "
            f"{slowest:.1f} s; {min(sizes):.0f} to {max(sizes):.0f} MiB each, {sum(sizes) / 1024:.1f} GiB in all"
        )
        asyncio.run(measure(policy, servers))
        print(f"afterwards {max(server.resident_mib() for server in servers):.0f} MiB at most in a server")
        states = {json.dumps(server.ready()["ready"]) for server in servers}
        print(f"ready at the end: {', '.join(sorted(states))}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
