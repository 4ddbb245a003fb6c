"""A server's reports: on a store without a server, and of real processes with a real Valkey."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
from support.policies import network_entry
from support.process import ServerProcess, init_policy, start_together
from support.proxy import LossyProxy
from support.waiting import eventually

from authz_server import replicas
from authz_server.cli.acknowledgement import wait_for_servers
from authz_server.demo.valkey import Valkey
from authz_server.policy.affinity import Instance
from authz_server.policy.records import RecordKey, entry_key, record_key
from authz_server.replicas import Reporter
from authz_server.store.interface import (
    Change,
    InconsistentStateError,
    Position,
    Replica,
    Report,
    StoreUnavailableError,
    Write,
)
from authz_server.store.memory_store import MemoryStore
from authz_server.store.redis_store import RedisStore


def at(revision: int) -> Position:
    return Position("e", revision, f"c{revision}")


class Counting(MemoryStore):
    """A store that counts reports."""

    def __init__(self, **options: Callable[[], float]) -> None:
        super().__init__(**options)
        self.sent: list[Position | None] = []

    async def report(self, report: Report, *, take_over: bool) -> bool:
        self.sent.append(report.position)
        return await super().report(report, take_over=take_over)


@pytest.fixture
def store() -> Counting:
    return Counting()


@asynccontextmanager
async def reporting(
    store: MemoryStore, replica: str = "a", process: str = "p1", problems: list[str] | None = None
) -> AsyncIterator[Reporter]:
    """A reporter that runs; killed at the end, unless it has left."""
    told = [] if problems is None else problems
    reporter = Reporter(store, replica, process, on_problem=told.append)
    task = asyncio.create_task(reporter.run())
    try:
        yield reporter
    finally:
        task.cancel()
        await asyncio.wait({task})


def fresh(instance: str) -> tuple[RecordKey, None, Instance]:
    """What writes an instance that is not there."""
    record = Instance(instance)
    return record_key(record), None, record


def known(store: MemoryStore) -> Callable[[], list[Replica]]:
    """The reports now, for conditions: the store is in memory, so nothing is waited for."""

    def look() -> list[Replica]:
        coroutine = store.replicas()
        try:
            coroutine.send(None)
        except StopIteration as stop:
            found: list[Replica] = stop.value
            return found
        raise AssertionError

    return look


def positions(store: MemoryStore) -> dict[str, Position | None]:
    return {replica.name: replica.report.position for replica in known(store)() if replica.report}


async def test_a_server_is_known_before_it_has_a_policy(store: Counting) -> None:
    async with reporting(store) as reporter:
        await reporter.announced(at_most_seconds=5)
        assert positions(store) == {"a": None}


async def test_what_is_applied_is_reported(store: Counting) -> None:
    async with reporting(store) as reporter:
        for revision in (1, 2):
            reporter.applied(at(revision))
            await eventually(lambda revision=revision: positions(store) == {"a": at(revision)})
        reporter.applied(at(1), 1)
        await eventually(lambda: [each.report.lost for each in known(store)() if each.report] == [1])


async def test_a_burst_is_few_reports_and_its_end_is_told(store: Counting) -> None:
    async with reporting(store) as reporter:
        await reporter.announced(at_most_seconds=5)
        for revision in range(1, 501):
            reporter.applied(at(revision))
            if revision % 50 == 0:
                await asyncio.sleep(0.001)
        await eventually(lambda: positions(store) == {"a": at(500)})
        assert len(store.sent) <= 5


async def test_the_same_position_again_is_not_news(store: Counting) -> None:
    async with reporting(store) as reporter:
        reporter.applied(at(1))
        await eventually(lambda: store.sent == [at(1)])
        for _ in range(5):
            reporter.applied(at(1))
        await asyncio.sleep(0.2)
        assert store.sent == [at(1)]


async def test_a_server_that_nothing_happens_to_reports_all_the_same(
    store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_HEARTBEAT_SECONDS", 0.01)
    async with reporting(store):
        await eventually(lambda: len(store.sent) >= 3)


async def test_a_forgotten_server_that_runs_comes_back(store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_HEARTBEAT_SECONDS", 0.01)
    async with reporting(store) as reporter:
        await reporter.announced(at_most_seconds=5)
        await store.forget("a")
        await eventually(lambda: positions(store) == {"a": None})


async def test_a_server_knows_of_all_once_it_has_a_policy_and_while_the_store_is_there(store: Counting) -> None:
    position = (await store.init(actor="a", reason="r", change_id="c")).position
    await store.report(Report("b", "p2", 1.0, None), take_over=True)
    async with reporting(store) as reporter:
        await reporter.announced(at_most_seconds=5)
        assert reporter.registry is None, "it would find itself behind"
        reporter.applied(position)
        await eventually(lambda: reporter.registry is not None)
        registry = reporter.registry
        assert registry
        assert {one.name: registry.is_newest(one) for one in registry.replicas} == {"a": True, "b": False}
        assert [one.name for one in registry.replicas if registry.is_behind(one)] == ["b"]
        store.available = False
        reporter.again()
        await eventually(lambda: reporter.registry is None)


async def test_a_store_that_is_not_sound_gets_reports_all_the_same() -> None:
    class Unsound(Counting):
        async def position(self) -> Position:
            raise InconsistentStateError("its counts do not fit")

    store = Unsound()
    problems: list[str] = []
    async with reporting(store, problems=problems) as reporter:
        reporter.applied(at(1))
        await eventually(lambda: positions(store) == {"a": at(1)})
        assert (reporter.registry, problems) == (None, [""])


async def test_a_store_that_came_back_empty_is_told_at_once(store: Counting) -> None:
    """Whoever waits for all servers would else take the first one that reports for all of them."""
    async with reporting(store) as reporter:
        reporter.applied(at(1))
        await eventually(lambda: positions(store) == {"a": at(1)})
        await store.forget("a")
        reporter.again()
        await eventually(lambda: positions(store) == {"a": at(1)}, seconds=2)
        await store.forget("a")
        store.available = False
        reporter.again()
        await eventually(lambda: len(store.sent) > 8, seconds=20)  # by now it waits for seconds between two attempts
        store.available = True
        reporter.again()
        await eventually(lambda: positions(store) == {"a": at(1)}, seconds=1)


async def test_leaving_takes_the_report_back(store: Counting) -> None:
    async with reporting(store) as reporter:
        await reporter.announced(at_most_seconds=5)
        reporter.leave()
        await eventually(lambda: positions(store) == {})


async def test_a_server_that_is_killed_stays(store: Counting) -> None:
    async with reporting(store) as reporter:
        await reporter.announced(at_most_seconds=5)
    assert positions(store) == {"a": None}


async def test_without_the_store_nothing_waits_and_the_newest_is_told_later(store: Counting) -> None:
    store.available = False
    problems: list[str] = []
    async with reporting(store, problems=problems) as reporter:
        await reporter.announced(at_most_seconds=5)
        for revision in (1, 2, 3):
            reporter.applied(at(revision))
        assert problems == ["the memory store was made unavailable"]
        store.available = True
        await eventually(lambda: positions(store) == {"a": at(3)})
        assert problems == ["the memory store was made unavailable", ""]


async def test_whatever_the_store_raises_the_reports_go_on() -> None:
    class Broken(Counting):
        async def report(self, report: Report, *, take_over: bool) -> bool:
            await super().report(report, take_over=take_over)
            if len(self.sent) == 1:
                raise RuntimeError("boom")
            return True

    store = Broken()
    problems: list[str] = []
    async with reporting(store, problems=problems):
        await eventually(lambda: len(store.sent) >= 2 and "" in problems)
        assert problems[0] == "internal error: RuntimeError('boom')"


async def test_a_store_that_hangs_holds_nothing_up() -> None:
    class Hanging(MemoryStore):
        async def report(self, report: Report, *, take_over: bool) -> bool:
            del report, take_over
            await asyncio.Event().wait()
            raise StoreUnavailableError("never")

    async with reporting(Hanging()) as reporter, asyncio.timeout(5):
        await reporter.announced(at_most_seconds=0.01)
        reporter.applied(at(1))


async def test_a_restart_under_the_same_name_replaces_the_report(store: Counting) -> None:
    async with reporting(store, process="p1") as before:
        await before.announced(at_most_seconds=5)
    async with reporting(store, process="p2") as reporter:
        reporter.applied(at(5))
        await eventually(lambda: positions(store) == {"a": at(5)})


async def test_two_servers_of_one_name_do_not_hide_each_other(store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_HEARTBEAT_SECONDS", 0.01)
    async with reporting(store, process="p1") as one:
        one.applied(at(1))
        await eventually(lambda: positions(store) == {"a": at(1)})
        async with reporting(store, process="p2") as other:
            other.applied(at(2))
            await eventually(lambda: positions(store) == {"a": at(2), "a-p1": at(1)})
            await asyncio.sleep(0.1)
            assert positions(store) == {"a": at(2), "a-p1": at(1)}
            assert (one.replica, other.replica) == ("a-p1", "a")


async def test_servers_that_vanished_long_ago_are_removed_by_the_next_one() -> None:
    now = [1_700_000_000.0]
    store = Counting(clock=lambda: now[0])
    for name, silent in (("gone", 3601.0), ("unknown", 3599.0)):
        now[0] = 1_700_000_000.0 - silent
        await store.report(Report(name, "p", now[0], at(1)), take_over=True)
    now[0] = 1_700_000_000.0
    async with reporting(store):
        await eventually(lambda: positions(store) == {"a": None, "unknown": at(1)})


@pytest.mark.integration
class TestProcesses:
    """`authz-server serve`, more than once, with a real Valkey."""

    @pytest.fixture
    def servers(self, own_valkey: Valkey, tmp_path: Path) -> Iterator[dict[str, ServerProcess]]:
        init_policy(own_valkey.url)
        with ExitStack() as stack:
            servers = {}
            for name in ("pod-a", "pod-b"):
                (tmp_path / name).mkdir()
                environ = {"AUTHZ_REDIS_URL": own_valkey.url, "AUTHZ_REPLICA_NAME": name}
                servers[name] = ServerProcess(tmp_path / name, environ)
            start_together(stack, *servers.values())
            for server in servers.values():
                server.wait_ready()
            yield servers

    @pytest.fixture
    async def store(self, own_valkey: Valkey) -> AsyncIterator[RedisStore]:
        store = RedisStore(own_valkey.url)
        yield store
        await store.close()

    async def names(self, store: RedisStore) -> list[str]:
        return [replica.name for replica in await store.replicas()]

    async def write(self, store: RedisStore, name: str) -> Position:
        change = Change(name, (await store.position()).epoch, "a", "r", "test", (Write(*fresh(name)),))
        return (await store.apply(change)).position

    async def test_all_acknowledge_but_the_one_that_hangs(
        self, servers: dict[str, ServerProcess], store: RedisStore
    ) -> None:
        told = await wait_for_servers(store, await self.write(store, "q1"), seconds=20)
        assert (told.complete, told.acknowledged) == (True, ("pod-a", "pod-b"))

        servers["pod-b"].child.pause()
        try:
            position = await self.write(store, "q2")
            told = await wait_for_servers(store, position, seconds=0.5)
            assert (told.complete, told.acknowledged) == (False, ("pod-a",))
            assert [(lagging.replica, lagging.why) for lagging in told.lagging] == [
                ("pod-b", "it decides by revision 2")
            ]
        finally:
            servers["pod-b"].child.resume()
        assert (await wait_for_servers(store, position, seconds=20)).complete

    async def test_one_that_leaves_is_gone_and_one_that_is_killed_stays(
        self, servers: dict[str, ServerProcess], store: RedisStore
    ) -> None:
        servers["pod-a"].signal(signal.SIGTERM)
        assert servers["pod-a"].wait_exit() == 0
        assert await self.names(store) == ["pod-b"]
        servers["pod-b"].child.kill()
        assert await self.names(store) == ["pod-b"]
        told = await wait_for_servers(store, await self.write(store, "q1"), seconds=0.2)
        assert [lagging.replica for lagging in told.lagging] == ["pod-b"]

    async def test_one_that_is_cut_off_still_serves_what_was_before_and_is_no_yes(
        self, own_valkey: Valkey, store: RedisStore, tmp_path: Path
    ) -> None:
        """And when it is shut down in that state, it stays: nobody knows what it did."""
        await asyncio.to_thread(init_policy, own_valkey.url)
        with ExitStack() as stack:
            async with LossyProxy(own_valkey.port) as proxy:
                environ = {"AUTHZ_REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0", "AUTHZ_REPLICA_NAME": "pod-a"}
                server = ServerProcess(tmp_path, environ)
                await asyncio.to_thread(stack.enter_context, server)
                await asyncio.to_thread(server.wait_ready)
                assert (await wait_for_servers(store, await self.write(store, "q1"), seconds=20)).complete
            block = network_entry("203.0.113.0/24")
            change = Change(
                "c-block", (await store.position()).epoch, "a", "r", "test",
                (Write(entry_key("global/block", block), None, block),),
            )  # fmt: skip
            position = (await store.apply(change)).position
            told = await wait_for_servers(store, position, seconds=1)
            assert (told.complete, [each.replica for each in told.lagging]) == (False, ["pod-a"])
            answer = await asyncio.to_thread(server.check, "203.0.113.7")
            assert answer.status.code == 0, "it has not heard of the block"
            server.signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.wait_exit) == 0
            assert await self.names(store) == ["pod-a"]
            assert not (await wait_for_servers(store, position, seconds=0)).complete
