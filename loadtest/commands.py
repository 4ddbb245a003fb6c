"""How long Redis works on single commands of what administrators and servers do with a large policy.

    python -m loadtest.commands [NETWORKS]

By default 10^6 networks and 10^5 tenants (some ten minutes, 3 GB). Each row is something that is done by `authzctl` or
by a server's own store, on a real Valkey; SLOWLOG tells its slowest command. SLOWLOG also counts the time that the
process waits for a core, so Valkey is given one at once whenever it wants it (SCHED_RR), where that is permitted.
"""

import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from redis import Redis

from authz_server.demo.valkey import Valkey
from authz_server.policy.access import Entry
from authz_server.policy.addresses import Network
from authz_server.policy.records import entry_key
from authz_server.store.interface import MAX_WRITES_PER_CHANGE, Change, Store, Write
from loadtest.large_policy import FEED, NETWORKS, LargePolicy
from loadtest.match_table import MIXES, random_networks

AIM_MILLISECONDS = 20
SLOW_MILLISECONDS = 5
_LOGGED_MICROSECONDS = 500
_BEHIND, _HISTORY = 300, 1000


class Slowlog:
    """The slow commands of a Valkey, which waits for no core where that can be had."""

    def __init__(self, valkey: Valkey, client: "Redis") -> None:
        self._client = client
        client.config_set("slowlog-log-slower-than", _LOGGED_MICROSECONDS)
        client.config_set("slowlog-max-len", 100_000)
        self.waits = ""
        """What its times hold besides work."""
        try:
            os.sched_setscheduler(valkey.pid, os.SCHED_RR, os.sched_param(1))
        except PermissionError:
            self.waits = " (times hold waiting for a core: only root may have Valkey wait for none)"

    def reset(self) -> None:
        """Forget what has been logged."""
        self._client.slowlog_reset()

    def commands(self) -> list[tuple[float, str]]:
        """Milliseconds and beginning of each command since then, the slowest first; also of those in scripts."""
        logged: Any = self._client.slowlog_get(100_000)
        commands = [(entry["duration"] / 1000, entry["command"][:50].decode("ascii", "replace")) for entry in logged]
        return sorted((each for each in commands if not each[1].startswith("SLOWLOG")), reverse=True)


class Report:
    """A row for each thing that is done."""

    def __init__(self, slowlog: Slowlog) -> None:
        self._slowlog = slowlog
        self.slowest = 0.0
        print(
            f"{'work of Valkey on single commands':40}  seconds  slowest ms  over {SLOW_MILLISECONDS} ms{slowlog.waits}"
        )

    @contextmanager
    def row(self, what: str) -> Iterator[None]:
        """Do something and see what the slowest command was."""
        self._slowlog.reset()
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        commands = self._slowlog.commands()
        milliseconds, command = commands[0] if commands else (0.0, f"all under {_LOGGED_MICROSECONDS / 1000} ms")
        self.slowest = max(self.slowest, milliseconds)
        slow = sum(each > SLOW_MILLISECONDS for each, _ in commands)
        print(f"{what:40} {seconds:8.1f} {milliseconds:11.2f} {slow:10}  {command}", flush=True)


def authzctl(policy: LargePolicy, *words: str) -> None:
    """As an administrator does it."""
    command = [sys.executable, "-m", "authz_server.cli.authzctl", *words, "--redis-url", policy.valkey.url]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def add(store: Store, networks: list[Network], lists: list[str], *, expires_at: int | None = None) -> None:
    """Add entries in changes that are as large as can be, to these lists in turn."""
    epoch = (await store.position()).epoch
    made = [
        Entry(network, "abuse, as seen in INC-1234", "ann", 1_700_000_000, expires_at=expires_at)
        for network in networks
    ]
    writes = [Write(entry_key(name, entry), None, entry) for name, entry in zip(cycle(lists), made, strict=False)]
    for start in range(0, len(writes), MAX_WRITES_PER_CHANGE):
        part = tuple(writes[start : start + MAX_WRITES_PER_CHANGE])
        await store.apply(Change(secrets.token_hex(8), epoch, "ann", "measured", "block.add", part))


async def follow(store: Store) -> None:
    """Read events as a server does that was away for a while."""
    newest = (await store.position()).revision
    (before,) = await store.history(count=1, before=max(newest - _BEHIND, 2))
    position = before.position
    while events := await store.events_after(position, wait_seconds=0):
        position = events[-1].position


async def verify(store: Store) -> None:
    """Compare all counts, as a server does now and then."""
    cursor = -1
    while cursor:
        cursor = (await store.verify(max(cursor, 0))).cursor


def measure(policy: LargePolicy, report: Report, count: int, folder: Path) -> None:
    """Do one thing after the other."""
    mix = next(iter(MIXES.values()))
    for seed, what in ((11, "import of a feed"), (12, "import of another one in its place")):
        feed = folder / str(seed)
        feed.write_text("".join(f"{network}\n" for network in random_networks(mix, count, random.Random(seed))))
        with report.row(what):
            authzctl(policy, "list", "import", FEED, str(feed), "--reason", "measured", "--yes")
    few = list(random_networks(mix, count // 10, random.Random(13)))
    own = [f"tenant:tenant-{number}/block" for number in range(count // 20)]
    with report.row(f"{MAX_WRITES_PER_CHANGE} entries a change, one list"):
        policy.ask(lambda store: add(store, few, ["passing"], expires_at=1_700_000_100))
    with report.row("the same, as many lists"):
        policy.ask(lambda store: add(store, few, own))
    with report.row("a server that has fallen behind"):
        policy.ask(follow)
    with report.row("an old change id is looked for"):
        policy.ask(lambda store: store.find_change("nobody's"))
    with report.row("history show"):
        authzctl(policy, "history", "show", "--count", str(_HISTORY))
    with report.row("history export"):
        authzctl(policy, "history", "export", "--file", str(folder / "exported"))
    with report.row("cleanup"):
        authzctl(policy, "cleanup")
    with report.row("a server compares the counts"):
        policy.ask(verify)
    with report.row("full load"):
        policy.ask(lambda store: store.load_lean())
    with report.row("reconcile"):
        authzctl(policy, "reconcile")
    with report.row("reload"):
        authzctl(policy, "reload", "--reason", "measured")
    with report.row("drain of an instance"):
        authzctl(policy, "instance", "drain", "queue-1", "--apply", "--at-once", "--yes", "--reason", "measured")


def main(count: int = NETWORKS) -> None:
    """Fill a store, do everything, and print the table."""
    with tempfile.TemporaryDirectory() as folder, LargePolicy(count // 10, count // 10) as policy:
        with Redis.from_url(policy.valkey.url) as client:
            report = Report(Slowlog(policy.valkey, client))
            measure(policy, report, count, Path(folder))
        print(f"slowest command: {report.slowest:.1f} ms (aim: {AIM_MILLISECONDS})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
