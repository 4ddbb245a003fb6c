"""Real servers that follow one store, checks of all of them all the time, and a writer who knows what became of what.

Every answer is compared with the model. `heal` waits until the fault is forgotten and then looks at everything that
must hold; what does not is a problem of the row that the scenario ends with.
"""

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import grpc
import grpc.aio
from support.process import ServerProcess

from authz_server.cli.acknowledgement import wait_for_servers
from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.grpcio_transport import SERVICE
from authz_server.policy.access import Entry
from authz_server.policy.addresses import parse_network
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.records import Record, RecordKey, RecordKind, record_key
from authz_server.store.address import RedisAddress
from authz_server.store.interface import Change, Position, Store, StoreError, Write, WriteResult
from authz_server.store.redis_store import RedisStore
from chaos.model import Model, Subject

T = TypeVar("T")

BLOCKS = "global/block"
INSTANCES = ("queue-1", "queue-2", "queue-3")
ADDRESSES = tuple(Subject(f"203.0.113.{number}") for number in range(1, 7))
TENANTS = tuple(Subject(tenant=f"tenant-{number}") for number in range(1, 5))
FEED = "feed"
IN_FEED = Subject("203.0.113.77")
"""Whom only this list names, where there is one."""
ALLOWED, BLOCKED, UNPINNED, HELD = "allowed", "blocked", "no instance", "held"
EMPTY = {**dict.fromkeys(ADDRESSES, ALLOWED), **dict.fromkeys(TENANTS, UNPINNED)}
"""What is answered by an empty policy."""
BEGIN = {
    **EMPTY,
    ADDRESSES[0]: BLOCKED,
    **dict(zip(TENANTS, ("queue-1", "queue-2", "queue-1", "queue-2"), strict=True)),
}
"""What is answered by the policy that every scenario begins with."""

HEAL_SECONDS = 30.0
"""A server that is not in step so long after its store is back stays behind."""
SAYS_SECONDS = 15.0
"""A server that cannot know the newest policy says so within this time; the store knows it again within this time."""
SILENT_SECONDS = 10.0
"""Servers that differ for longer, and all say that they are connected, disagree silently."""
_CHECK_SECONDS = 5.0
_PAUSE_SECONDS = 0.004
_WATCH_SECONDS = 0.5
_ASKERS = 2


@dataclass
class Acknowledged:
    """A change that the store has acknowledged."""

    change_id: str
    what: str
    durable: bool


@dataclass
class Row:
    """What one scenario has shown."""

    scenario: str
    checks: int = 0
    failed: int = 0
    wrong: int = 0
    changes: int = 0
    durable: int = 0
    lost: int = 0
    reported: int = 0
    heal_seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why it cannot be played on this machine."""


class Fleet:
    """Servers, checks and a writer. Made by `running`."""

    def __init__(self, row: Row, servers: Mapping[str, ServerProcess], store: RedisStore) -> None:
        self.row = row
        self.servers = servers
        self.store = store
        self.model = Model()
        self.acknowledged: list[Acknowledged] = []
        self._reported: set[str] = set()

    # Checks

    @asynccontextmanager
    async def checking(self) -> AsyncIterator[None]:
        """Ask every server about every subject again and again."""
        channels = {name: grpc.aio.insecure_channel(server.grpc) for name, server in self.servers.items()}
        calls = {name: channel.unary_unary(f"/{SERVICE}/Check") for name, channel in channels.items()}
        tasks = [
            asyncio.create_task(self._ask_on(name, call, start))
            for name, call in calls.items()
            for start in range(_ASKERS)
        ]
        tasks.append(asyncio.create_task(self._watch()))
        try:
            await self.round_of_checks()
            yield
        finally:
            for task in tasks:
                task.cancel()
            for told in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(told, asyncio.CancelledError):
                    self.row.problems.append(f"checks ended: {told!r}")
            for channel in channels.values():
                await channel.close()
            self.row.checks += self.model.checks
            self.row.wrong += self.model.wrong_in_all
            self.row.problems += self.model.wrong

    async def _ask_on(self, name: str, call: Any, start: int) -> None:
        while True:
            for subject in self.model.subjects[start::_ASKERS]:
                await self._ask(name, call, subject)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _ask(self, name: str, call: Any, subject: Subject) -> None:
        started = time.monotonic()
        try:
            answer: bytes = await call(_request(subject), timeout=_CHECK_SECONDS)
        except grpc.aio.AioRpcError as error:
            self.row.failed += 1
            self.row.problems.append(f"{name} failed a check: {error.code().name} {error.details()}")
            await asyncio.sleep(0.1)
            return
        self.model.judge(name, subject, _told(answer), started, time.monotonic())

    async def _watch(self) -> None:
        """Notice servers that differ for long while none says that it may not know the newest policy."""
        since: dict[str, tuple[Any, float]] = {}
        while True:
            standings = {name: await asyncio.to_thread(_standing, server) for name, server in self.servers.items()}
            sound = [await asyncio.to_thread(_is_sound, server) for server in self.servers.values()]
            now = time.monotonic()
            if len(set(standings.values())) == 1 or not all(sound):
                since.clear()
            for name, standing in standings.items():
                before, first = since.setdefault(name, (standing, now))
                if before != standing:
                    since[name] = (standing, now)
                elif now - first > SILENT_SECONDS:
                    self.row.problems.append(f"the servers disagree silently: {standings}")
                    since.clear()
                    break
            await asyncio.sleep(_WATCH_SECONDS)

    async def round_of_checks(self) -> None:
        """Wait until every server has been asked about everything once more."""
        wanted = self.model.checks + (len(self.servers) * _ASKERS + 1) * len(self.model.subjects)
        await self.until(lambda: self.model.checks >= wanted or self.row.failed, "a round of checks")

    # Writing

    async def insist(self, attempt: Callable[[], Awaitable[T]], *, seconds: float = HEAL_SECONDS) -> T:
        """Do something with the store until it answers, as somebody does whose store is failing."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return await attempt()
            except StoreError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def write(
        self, subject: Subject, answer: str, *, durable: bool = False, expires_at: int | None = None
    ) -> None:
        """Have a subject answered so; return once the store has acknowledged it, and every server too.

        Whoever does not get an answer sends the same change again.
        """
        self.model.widen(time.monotonic(), {subject: answer})
        durability = await self.insist(self.store.durability) if durable else None
        change = await self.insist(lambda: _change(self.store, subject, answer, expires_at))
        result = await self.insist(lambda: self.store.apply(change))
        if durability:
            await self.store.make_durable(result, durability, seconds=5)
        self.note(change.change_id, f"{subject}: {answer}", durable=durable)
        await self.in_step(result.position)
        self.model.settle(time.monotonic(), {subject: answer})

    async def reload(self) -> None:
        """Have every server load in full, by a new epoch."""
        change_id = secrets.token_hex(8)

        async def attempt() -> WriteResult:
            examined = await self.store.examine()
            return await self.store.confirm(examined, actor="chaos", reason="reload", change_id=change_id)

        result = await self.insist(attempt)
        await self.in_step(result.position)

    def note(self, change_id: str, what: str, *, durable: bool = False) -> None:
        """Take note of a change that was acknowledged."""
        self.acknowledged.append(Acknowledged(change_id, what, durable))
        self.row.changes += 1
        self.row.durable += durable

    async def note_since(self, revision: int) -> None:
        """Take note of the changes that others have made since a revision."""
        for event in await self.insist(lambda: self.store.history_after(revision, count=100)):
            self.note(event.position.change_id, event.action)

    # Looking

    async def until(self, condition: Callable[[], Any], what: str, *, seconds: float = HEAL_SECONDS) -> None:
        """Wait for a condition; what may block is asked in a thread by `until_all`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.row.scenario}: not within {seconds:g} s: {what}")
            await asyncio.sleep(0.01)

    async def until_all(
        self,
        condition: Callable[[ServerProcess], bool],
        what: str,
        *,
        seconds: float = HEAL_SECONDS,
        names: Sequence[str] = (),
    ) -> None:
        """Wait until a condition holds of every server (or of those named)."""
        deadline = time.monotonic() + seconds
        for name in names or self.servers:
            while not await asyncio.to_thread(condition, self.servers[name]):
                if time.monotonic() > deadline:
                    told = await asyncio.to_thread(self.servers[name].get, "/readyz")
                    raise AssertionError(f"{self.row.scenario}: {name}, not within {seconds:g} s: {what}; {told[1]}")
                await asyncio.sleep(0.02)

    async def in_step(self, position: Position) -> None:
        """Wait until every server says that it decides by this position or what follows on it, as `--wait` does."""
        told = await wait_for_servers(self.store, position, seconds=HEAL_SECONDS)
        assert set(told.acknowledged) == set(self.servers), f"{self.row.scenario}: {position}: {told}"

    async def reported(self) -> None:
        """Wait until the store knows of every server (again), as of one that is there."""
        deadline = time.monotonic() + SAYS_SECONDS
        while {each.name for each in await self.store.replicas() if not each.vanished} != set(self.servers):
            assert time.monotonic() < deadline, f"{self.row.scenario}: the store does not know of all servers"
            await asyncio.sleep(0.02)

    async def says_so(self, *names: str, words: str = "") -> None:
        """Wait until servers say that they cannot know the newest policy: in /readyz, in metrics and in the log."""

        def told(server: ServerProcess) -> bool:
            component = server.component("redis")
            return not component["ready"] and words in component["detail"]

        await self.until_all(told, f"it says that the store is away ({words})", seconds=SAYS_SECONDS, names=names)
        for name in names or self.servers:
            server = self.servers[name]
            if await asyncio.to_thread(server.get, "/readyz") == 503:
                self.row.problems.append(f"{name} became unready by the store's fault")
            if words not in str(server.logged("redis not usable")):
                self.row.problems.append(f"{name} did not log that the store is away: {words}")

    async def truth(self) -> dict[Subject, str]:
        """What the store says, read anew."""
        policy = await self.store.load()
        records = dict(policy.records)
        return {subject: _answer(subject, records.get(record_of(subject))) for subject in self.model.subjects}

    async def heal(self, *, since: float | None = None, may_lose_durable: bool = False) -> None:
        """The fault is over: wait until nothing shows of it, and see that nothing was lost unseen.

        The time that it takes counts from `since` (seconds of time.monotonic), or from now.
        """
        began = time.monotonic() if since is None else since
        position = await self.insist(self.store.position)
        await self.in_step(position)
        await self.until_all(_is_sound, "the store is there and sound")
        self.row.heal_seconds.append(time.monotonic() - began)
        truth = await self.insist(self.truth)
        for subject, answer in truth.items():
            if answer not in self.model.answers(subject):
                self.row.problems.append(f"the store came back with {answer} for {subject}")
        self.model.settle(time.monotonic(), truth)
        await self.round_of_checks()
        await self._see_lost(may_lose_durable=may_lose_durable)
        await self._see_equal()

    async def _see_lost(self, *, may_lose_durable: bool) -> None:
        kept = []
        for change in self.acknowledged:
            if await self.store.find_change(change.change_id) is not None:
                kept.append(change)
                continue
            self.row.lost += 1
            if change.durable and not may_lose_durable:
                self.row.problems.append(f"a durable change is lost: {change.what}")
            if any(change.change_id in _lost_by(server) for server in self.servers.values()):
                self.row.reported += 1
            else:
                self.row.problems.append(f"nobody says that a change is lost: {change.what}")
        self.acknowledged = kept

    async def _see_equal(self) -> None:
        """The servers decide alike, to the byte, and know themselves at the same position."""
        digests = {}
        for name, server in self.servers.items():
            standing = await asyncio.to_thread(server.get_json, "/snapshot")
            facts = {key: standing[key] for key in ("epoch", "revision", "counts", "unreadable", "degraded_scopes")}
            async with grpc.aio.insecure_channel(server.grpc) as channel:
                call = channel.unary_unary(f"/{SERVICE}/Check")
                answers = [await call(_request(subject), timeout=_CHECK_SECONDS) for subject in self.model.subjects]
            whole = b"".join([json.dumps(facts, sort_keys=True).encode(), *answers])
            digests[name] = hashlib.sha256(whole).hexdigest()
        if len(set(digests.values())) != 1:
            self.row.problems.append(f"the servers differ: {digests}")


@asynccontextmanager
async def running(
    row: Row,
    directory: Path,
    address: RedisAddress,
    environs: Mapping[str, Mapping[str, str]],
    within: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> AsyncIterator[Fleet]:
    """Make the policy that scenarios begin with, start a server for each environment, and check all the time."""
    store = RedisStore(address)
    servers: dict[str, ServerProcess] = {}
    try:
        await store.init(actor="chaos", reason="a scenario", change_id=secrets.token_hex(8))
        await furnish(store)
        for name, environ in environs.items():
            (directory / name).mkdir(parents=True)
            # What is tried is the store, not how busy this machine is: a stall of it sheds nothing.
            fixed = {"AUTHZ_REPLICA_NAME": name, "AUTHZ_DECISION_LOG": "off", "AUTHZ_MAX_WAIT_SECONDS": "2"}
            servers[name] = ServerProcess(directory / name, fixed | dict(environ), within=within.get(name, ()))
        starting = [asyncio.to_thread(server.__enter__) for server in servers.values()]
        for told in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(told, BaseException):
                raise told
        fleet = Fleet(row, servers, store)
        await fleet.reported()
        await fleet.in_step(await store.position())
        fleet.model.settle(time.monotonic(), BEGIN)
        async with fleet.checking():
            yield fleet
    finally:
        for server in servers.values():
            server.child.kill()
        await store.close()


async def furnish(store: Store) -> None:
    """Fill an empty policy with what scenarios begin with."""
    records: dict[RecordKey, Record] = {record_key(one): one for one in map(Instance, INSTANCES)}
    for subject, answer in BEGIN.items():
        if record := _record(subject, answer):
            records[record_of(subject)] = record
    writes = tuple(Write(key, None, record) for key, record in records.items())
    epoch = (await store.position()).epoch
    await store.apply(Change(secrets.token_hex(8), epoch, "chaos", "a scenario", "test", writes))


async def write_to(store: Store, subject: Subject, answer: str) -> WriteResult:
    """Have a subject answered so."""
    return await store.apply(await _change(store, subject, answer))


async def _change(store: Store, subject: Subject, answer: str, expires_at: int | None = None) -> Change:
    key = record_of(subject)
    stored = await store.read(key)
    record = _record(subject, answer)
    if isinstance(record, Entry):
        record = replace(record, expires_at=expires_at)
    write = Write(key, stored.text if stored else None, record)
    return Change(secrets.token_hex(8), (await store.position()).epoch, "chaos", "a scenario", "test", (write,))


def record_of(subject: Subject) -> RecordKey:
    """The record that decides about a subject."""
    if subject.tenant:
        return RecordKey(RecordKind.TENANT, subject.tenant)
    return RecordKey(RecordKind.ENTRY, str(parse_network(subject.address)), FEED if subject == IN_FEED else BLOCKS)


def _record(subject: Subject, answer: str) -> Record | None:
    if answer == BLOCKED:
        return Entry(parse_network(subject.address), "a scenario", "chaos", 1_700_000_000)
    return None if answer in (ALLOWED, UNPINNED) else Tenant(subject.tenant, answer)


def _answer(subject: Subject, record: Any) -> str:
    if subject.tenant:
        return UNPINNED if record is None else HELD if record.held else str(record.instance)
    return ALLOWED if record is None else BLOCKED


@lru_cache
def _request(subject: Subject) -> bytes:
    message = ext_authz_pb2.CheckRequest()
    http = message.attributes.request.http
    http.method, http.host, http.path = "GET", "www.example.com", "/"
    http.headers["x-envoy-external-address"] = subject.address
    if subject.tenant:
        http.headers["x-tenant-id"] = subject.tenant
    data: bytes = message.SerializeToString()
    return data


@lru_cache(maxsize=1024)
def _told(data: bytes) -> str:
    """Read an answer in the words of the model."""
    answer = ext_authz_pb2.CheckResponse.FromString(data)
    if answer.status.code:
        return {403: BLOCKED, 503: HELD}.get(answer.denied_response.status.code, "denied")
    headers = {option.header.key: option.header.value for option in answer.ok_response.headers}
    return headers.get("x-tenant-instance", UNPINNED if "x-tenant-id" in headers else ALLOWED)


def _standing(server: ServerProcess) -> tuple[str, int]:
    snapshot = server.get_json("/snapshot")
    return snapshot.get("epoch", ""), snapshot.get("revision", 0)


def _is_sound(server: ServerProcess) -> bool:
    return bool(server.component("redis")["ready"])


def _lost_by(server: ServerProcess) -> set[str]:
    """The changes that a server says are lost, as far as its metrics count as many."""
    told = {line["change_id"] for line in server.logged("change lost")}
    return told if server.metric("authz_changes_lost_total") >= len(told) else set()
