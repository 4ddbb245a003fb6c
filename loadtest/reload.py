"""What checks notice of a full load and of changes, and how soon a server is ready, with a million networks.

    python -m loadtest.reload [load] [replacement] [changes] [start]

By default all parts (some twenty-five minutes, 3 GB). A real Valkey holds the policy, a real server follows it, and
clients ask without pause. Each figure under work stands beside the same client's figure just before, on the same
server. In `load` and `replacement` one client asks a server that follows nothing, and answers every check alike, in
turn with it: what that one's figures do is the machine's doing, which has two cores for all. In `changes` the server
has one of them; h2load, Valkey and the writers have the other, where h2load runs as soon as it can (as root). It has as
many checks in flight as in other measurements; then a single one, which notices most of what holds the server up.
Replacing more records than a server takes over one by one is what leads to a full load; as many as it takes is the part
`replacement`.
"""

import asyncio
import math
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from authz_server.policy.access import Entry
from authz_server.policy.addresses import Network
from authz_server.policy.records import entry_key
from authz_server.store.interface import Change, Write
from authz_server.store.keys import encode_record
from authz_server.store.redis_store import RedisStore
from loadtest.cores import apart
from loadtest.large_policy import BLOCKED, FEED, RUNS, ClosedLoop, LargePolicy, RealServer, entries, replace
from loadtest.match_table import random_networks
from loadtest.processes import IN_FLIGHT, Server, Waits, closed_loop, h2load, read_calls

PARTS = ("load", "replacement", "changes", "start")
FEED_NETWORKS = 60_000
REPLACED_NETWORKS = 25_000
"""As many go as come: twice this number of records differ, the most that a server applies by itself."""
QUIET_SECONDS = 10.0
CHANGES, CHANGE_SECONDS = 60_000, 0.001
_WRITERS = 4

T = TypeVar("T")


async def change_often(store: RedisStore) -> float:
    """Add and remove entries, one change in CHANGE_SECONDS if the store keeps up; returns the changes a second."""
    epoch = (await store.position()).epoch
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def write(writer: int) -> None:
        for number in range(writer, CHANGES, _WRITERS):
            await asyncio.sleep(max(0.0, began + number * CHANGE_SECONDS - loop.time()))
            # The policy has no network of this length.
            entry = Entry(Network(4, number // (2 * _WRITERS) * _WRITERS + writer << 1, 31), "why", "who", 1)
            key, text = entry_key(BLOCKED, entry), encode_record(entry)
            adding = number // _WRITERS % 2 == 0
            one = Write(key, None, entry) if adding else Write(key, text, None)
            await store.apply(Change(secrets.token_hex(8), epoch, "loadtest", "measured", "loadtest", (one,)))

    await asyncio.gather(*map(write, range(_WRITERS)))
    return CHANGES / (loop.time() - began)


def tell(console: Console, what: str, quiet: Waits, busy: Waits) -> None:
    """Print one comparison."""
    for who, now, before in (("", busy, quiet), ("    constant answers", busy.reference, quiet.reference)):
        if now is None or before is None:
            continue
        console.print(
            f"{who or what}: p99 {now.p99:.2f} ms, {now.p99 / before.p99:.2f} x {before.p99:.2f}; longest "
            f"{now.longest:.1f} ms, before {before.longest:.1f}; {now.refused} of {now.count:,} refused",
            soft_wrap=True,
        )


@dataclass(frozen=True, slots=True)
class Disturbed:
    """What a client noticed of one disturbance."""

    busy: Waits
    live_seconds: float
    """Until the server decided by it."""
    what: str = ""
    """More about this one."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What is measured, and by whom."""

    policy: LargePolicy
    server: RealServer
    console: Console

    def replacements(self, ask: ClosedLoop, what: str, list_name: str, networks: int) -> None:
        """Replace all networks of a list by as many others."""

        def disturb(number: int) -> Disturbed:
            feed = entries(list_name, random_networks(((4, 32, 1.0),), networks, random.Random(number % 2)))
            revision = self.policy.ask(lambda store: replace(store, feed))
            ask(None)
            live = self.server.wait_for_revision(revision, ask_every_seconds=1.0)
            return Disturbed(ask(None), live)

        self._often(lambda: ask(QUIET_SECONDS), what, disturb)

    def changes(self, in_flight: int) -> None:
        """Change one entry after the other, while so many checks are in flight all the time."""

        def quiet() -> Waits:
            return self._flood(in_flight, QUIET_SECONDS, lambda: time.sleep(QUIET_SECONDS))[0]

        def disturb(_number: int) -> Disturbed:
            busy, rate = self._flood(in_flight, CHANGES * CHANGE_SECONDS, lambda: self.policy.ask(change_often))
            revision = self.policy.ask(lambda store: store.position()).revision
            behind = self.server.wait_for_revision(revision, ask_every_seconds=0.02)
            return Disturbed(busy, behind, f" {rate:.0f} a second,")

        self._often(quiet, f"changes, {in_flight} in flight", disturb)

    def _flood(self, in_flight: int, seconds: float, during: Callable[[], T]) -> tuple[Waits, T]:
        """Do something that takes so long, and tell how long h2load waited for answers to what it asked meanwhile."""
        shed = self.server.metric("authz_shed_total")
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            lasts = f"-D{math.ceil(seconds) + 3}"
            with h2load(self.server.port, *closed_loop(in_flight), lasts, f"--log-file={log}") as client:
                others = (self.policy.valkey.pid, os.getpid(), client.pid)
                with apart((self.server.pid,), others, first=client.pid):
                    time.sleep(1)
                    since = time.time()
                    done = during()
                    until = time.time()
                client.wait()
            calls, _ = read_calls(log, since, until)
        refused = int(self.server.metric("authz_shed_total") - shed) + sum(status != "200" for status, _ in calls)
        return Waits.of((micros / 1e3 for _, micros in calls), refused), done

    def _often(self, ask_quietly: Callable[[], Waits], what: str, disturb: Callable[[int], Disturbed]) -> None:
        """Compare with the quiet just before, RUNS times; `disturb` gets the number of the run."""
        ratios, longest, lives = [], [], []
        for number in range(RUNS):
            quiet = ask_quietly()
            disturbed = disturb(number)
            tell(
                self.console,
                f"{what},{disturbed.what} live after {disturbed.live_seconds:.2f} s",
                quiet,
                disturbed.busy,
            )
            ratios.append(disturbed.busy.p99 / quiet.p99)
            longest.append(disturbed.busy.longest)
            lives.append(disturbed.live_seconds)
        p99, most, seconds = map(statistics.median, (ratios, longest, lives))
        self.console.print(
            f"{what}, medians of {RUNS}: p99 {p99:.2f} x, longest {most:.1f} ms, live after {seconds:.2f} s; "
            f"at most {self.server.resident_mib('VmHWM'):.0f} MiB in the server"
        )


def start_often(policy: LargePolicy, file: Path, console: Console) -> None:
    """Start servers that have a snapshot file, with the store and without it, which is stopped for good."""
    for kind in ("with", "without"):
        if kind == "without":
            policy.valkey.stop()
        seconds_to_ready = []
        for _ in range(RUNS):
            with RealServer(policy.valkey, file) as server:
                seconds_to_ready.append(server.ready_seconds)
        middle = statistics.median(seconds_to_ready)
        console.print(f"ready from the file, {kind} the store: {middle:.1f} s (median of {RUNS})")


def main(parts: Sequence[str]) -> None:
    """Fill a store, and measure."""
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    with LargePolicy() as policy, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "snapshot"
        with RealServer(policy.valkey, file) as server:
            console.print(
                f"ready from the store after {server.ready_seconds:.1f} s, {server.resident_mib():.0f} MiB, "
                f"file of {file.stat().st_size / 1e6:.1f} MB"
            )
            measured = Measured(policy, server, console)
            with Server("asyncio", "constant") as constant, ClosedLoop(server.port, constant.port) as ask:
                if "load" in parts:
                    measured.replacements(ask, "full load", FEED, FEED_NETWORKS)
                if "replacement" in parts:
                    measured.replacements(ask, "replacement", "tenant:tenant-1/block", REPLACED_NETWORKS)
            if "changes" in parts:
                for in_flight in (IN_FLIGHT, 1):
                    measured.changes(in_flight)
        if "start" in parts:
            start_often(policy, file, console)


if __name__ == "__main__":
    main(sys.argv[1:] or PARTS)
