"""The scenarios: what happens, and what must come of it.

Each is a function of a `Play`; the first line of its docstring stands in the table. `SCENARIOS` names them all.
"""

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from support.redis_shapes import PRIMARY, Cluster, Watched, call, info, wait_until

from authz_server.demo.valkey import Valkey
from authz_server.store.address import RedisAddress
from authz_server.store.redis_store import RedisStore
from chaos.faults import CuttingProxy
from chaos.fleet import (
    ADDRESSES,
    ALLOWED,
    BEGIN,
    BLOCKED,
    EMPTY,
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


@dataclass(frozen=True)
class Scale:
    """How long to go on."""

    rounds: int
    """How often the same happens."""
    seconds: float
    """How long a fault lasts that can last."""


SHORT = Scale(rounds=1, seconds=1.5)
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
                await asyncio.to_thread(valkey.start)
                await fleet.heal()
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
                await asyncio.to_thread(valkey.start)
                await fleet.heal()
                play.must(play.row.lost == before + 2, "what was not durable is lost with the end of the file")


async def older_copy(play: Play) -> None:
    """Valkey comes back from an older copy, which was written to since: less, as much, and more than before"""
    with Valkey() as valkey:
        async with play.fleet_on(valkey) as fleet:
            for _ in range(play.scale.rounds):
                for more in (0, 3, 5):
                    await fleet.write(ADDRESSES[1], toggled(fleet, ADDRESSES[1]))
                    call(valkey.port, "SAVE")
                    copy = shutil.copy(valkey.directory / "dump.rdb", play.directory / "copy.rdb")
                    kept = settled(fleet)
                    for subject in (ADDRESSES[1], ADDRESSES[2], TENANTS[0]):
                        await fleet.write(subject, toggled(fleet, subject))
                    await asyncio.to_thread(valkey.kill)
                    fleet.model.widen(time.monotonic(), kept)
                    await _write_into_copy(Path(copy), fleet, more)
                    shutil.copy(copy, valkey.directory / "dump.rdb")
                    before = play.row.lost
                    await asyncio.to_thread(valkey.start)
                    await fleet.heal(may_lose_durable=True)
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
                answer = (BLOCKED, ALLOWED)[number % 2]
                fleet.model.widen(time.monotonic(), {ADDRESSES[5]: answer})
                await write_to(store, ADDRESSES[5], answer)
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
                await writing
                await fleet.heal()
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
                ends = time.monotonic() + play.scale.seconds
                while time.monotonic() < ends:
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
            for kind in ("cut_requests", "cut_replies"):
                play.must(all(getattr(proxy, kind) for proxy in proxies), f"{kind} on each way")


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
    await asyncio.to_thread(primary.kill)
    if loses:
        replica.resume()
    await fleet.write(TENANTS[1], toggled(fleet, TENANTS[1]))
    await fleet.heal()
    play.must(play.row.lost == before + loses, "what was not copied is lost, and nothing else")


def _wait_for_link(server: Valkey) -> None:
    wait_until(lambda: info(server.port, "replication").get("master_link_status") == "up", "the old primary follows")


SCENARIOS: dict[str, Callable[[Play], Awaitable[None]]] = {
    scenario.__name__: scenario for scenario in (emptied, append_only, older_copy, stopped, cut, sentinel, cluster)
}


def title(name: str) -> str:
    """What happens in a scenario, in a line."""
    return (SCENARIOS[name].__doc__ or "").partition("\n")[0]


async def play(name: str, directory: Path, scale: Scale) -> Row:
    """Play one scenario; what it shows is in the row, also when it breaks off."""
    row = Row(name)
    try:
        async with asyncio.timeout(scale.rounds * 120):
            await SCENARIOS[name](Play(row, directory, scale))
    except Exception as error:  # noqa: BLE001 - the others are still to be played
        row.problems.append(f"broken off: {error!r}"[:2000])
    return row
