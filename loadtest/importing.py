"""An import of many networks while servers decide: what the store and the checks notice of it, and where it ends.

    python -m loadtest.importing [NETWORKS]

By default 10^6 networks (some five minutes, 3 GB). `authzctl list import` makes an empty list hold them, on a real
Valkey that three servers follow. One client asks the first of them without pause: its waits during the import stand
beside those just before it. As each of them would have cores of its own, those two have one here, and everybody else
the other (as root). The store's SLOWLOG tells its slowest command (see `loadtest.commands`). At the end what each
server decides by, as its snapshot file has it, is compared with what the store holds, by checksums.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from redis import Redis

from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.snapshot_file import open_packed
from authz_server.store.keys import SUM_MODULUS, share
from loadtest.commands import AIM_MILLISECONDS, Slowlog
from loadtest.cores import apart
from loadtest.large_policy import BLOCKED, FEED, NETWORKS, ClosedLoop, LargePolicy, RealServer
from loadtest.match_table import MIXES, random_networks

SERVERS = 3
BEFORE_NETWORKS, BEFORE_TENANTS = 100_000, 10_000
QUIET_SECONDS = 20.0
_FILE_SECONDS = 120.0


def checksum(snapshot: Snapshot) -> str:
    """What two snapshots have in common only if they decide by the same records."""
    total = 0
    for name in (BLOCKED, FEED):
        for network, expiry in snapshot.tables[name].items():
            total += share(f"{name} {network}", str(expiry))
    for tenant in snapshot.tenants.values():
        total += share(tenant.id, str(tenant))
    return f"{total % SUM_MODULUS:012x} over {sum(snapshot.counts().values()):,} records"


def checksum_of_file(path: Path, revision: int) -> str:
    """That of the snapshot file of a server, once it is of a revision."""
    deadline = time.monotonic() + _FILE_SECONDS
    while True:
        packed = open_packed(memoryview(path.read_bytes()))
        if packed.stamp.position.revision == revision:
            *_, snapshot = packed.unpack(DecisionOptions())
            assert snapshot is not None
            return checksum(snapshot)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path} did not come to revision {revision}")
        time.sleep(1.0)


async def checksum_of_store(store: Any) -> str:
    """That of what the store holds."""
    policy = await store.load()
    position = policy.position
    return checksum(
        build_snapshot(policy.records, epoch=position.epoch, revision=position.revision, options=DecisionOptions())
    )


def import_feed(policy: LargePolicy, file: Path) -> None:
    """As an administrator does it."""
    words = ["list", "import", FEED, str(file), "--reason", "measured", "--redis-url", policy.valkey.url]
    subprocess.run([sys.executable, "-m", "authz_server.cli.authzctl", *words], check=True)


def main(count: int = NETWORKS) -> None:
    """Fill a store, import, and compare."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        feed = folder / "feed"
        networks = random_networks(next(iter(MIXES.values())), count, random.Random(11))
        feed.write_text("".join(f"{network}\n" for network in networks))
        policy = stack.enter_context(LargePolicy(BEFORE_NETWORKS, BEFORE_TENANTS))
        client = stack.enter_context(Redis.from_url(policy.valkey.url))
        slowlog = Slowlog(policy.valkey, client)
        files = [folder / str(number) for number in range(SERVERS)]
        asked, *others = servers = [stack.enter_context(RealServer(policy.valkey, file)) for file in files]
        ask = stack.enter_context(ClosedLoop(asked.port))
        everybody_else = (policy.valkey.pid, os.getpid(), *(server.pid for server in others))
        stack.enter_context(apart((asked.pid, ask.pid), everybody_else, first=ask.pid))
        quiet = ask(QUIET_SECONDS)
        slowlog.reset()
        began = time.monotonic()
        import_feed(policy, feed)
        imported = time.monotonic() - began
        during = ask(None)
        position = policy.ask(lambda store: store.position())
        for server in servers:
            server.wait_for_revision(position.revision)
        everywhere = time.monotonic() - began
        after = ask(None)
        print(
            f"import of {count:,} networks: {imported:.1f} s; {SERVERS} servers decide by it after {everywhere:.1f} s"
        )
        for milliseconds, command in slowlog.commands()[:1]:
            print(f"slowest command: {milliseconds:.1f} ms{slowlog.waits} (aim: {AIM_MILLISECONDS}): {command}")
        for what, waits in (("while it was written", during), ("while the servers loaded it", after)):
            print(
                f"checks {what}: p99 {waits.p99:.2f} ms, {waits.p99 / quiet.p99:.2f} x {quiet.p99:.2f} (aim: 3); "
                f"longest {waits.longest:.1f}, before {quiet.longest:.1f}; {waits.refused} of {waits.count} refused"
            )
        wanted = policy.ask(checksum_of_store)
        found = [checksum_of_file(file, position.revision) for file in files]
        print(f"the store: {wanted}; the servers: {', '.join(found)}")
        if set(found) != {wanted}:
            sys.exit("the servers do not decide by what the store holds")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
