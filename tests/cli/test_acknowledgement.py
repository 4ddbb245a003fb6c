"""Whether every server has a change: what counts as yes, what as no, and what is told."""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from support.policies import Q1, Writer

from authz_server.cli.acknowledgement import Acknowledgement, wait_for_servers
from authz_server.policy.affinity import Instance
from authz_server.store.interface import Position, Replica, Report
from authz_server.store.memory_store import MemoryStore


class Fleet:
    """A store with a policy at revision 3, and servers that report to it."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.store = MemoryStore(clock=lambda: self.now)
        self.writer = Writer(self.store)
        self.positions: list[Position] = []

    async def write(self) -> Position:
        position = (await self.writer.set((Q1, Instance("q1", len(self.positions) + 1)))).position
        self.positions.append(position)
        return position

    async def report(self, replica: str, position: Position | None, *, silent_seconds: float = 0) -> None:
        self.now -= silent_seconds
        await self.store.report(Report(replica, "p", self.now, position), take_over=True)
        self.now += silent_seconds

    async def ask(self, seconds: float = 0) -> Acknowledgement:
        return await wait_for_servers(self.store, self.positions[1], seconds=seconds)


@pytest.fixture
async def fleet() -> Fleet:
    fleet = Fleet()
    await fleet.writer.init()
    await fleet.write()
    await fleet.write()
    return fleet


async def test_all_that_have_it_or_what_follows_on_it_is_a_yes(fleet: Fleet) -> None:
    _, second = fleet.positions
    await fleet.report("a", second)
    await fleet.report("b", await fleet.write())
    told = await fleet.ask()
    assert (told.complete, told.acknowledged, told.lagging) == (True, ("a", "b"), ())


async def test_nobody_is_no_yes(fleet: Fleet) -> None:
    told = await fleet.ask()
    assert not told.complete
    assert "no server has reported" in told.problem


LAGGING = {
    "behind": (lambda first, _: first, 0, "it decides by revision 2"),
    "cut_off": (lambda first, _: first, 125, "it decides by revision 2, silent for 2m 5s"),
    "without_a_policy": (lambda *_: None, 0, "it has no policy yet"),
    "another_epoch": (lambda _, second: replace(second, epoch="x", revision=99), 0, "another epoch (x)"),
    "another_history": (lambda _, second: replace(second, change_id="lost"), 0, "not in the store's history"),
    "ahead_of_the_history": (lambda _, second: replace(second, revision=4), 0, "not in the store's history"),
}


@pytest.mark.parametrize(("position", "silent", "why"), LAGGING.values(), ids=LAGGING)
async def test_one_that_may_not_have_it_is_named(fleet: Fleet, position: object, silent: float, why: str) -> None:
    assert callable(position)
    await fleet.report("a", fleet.positions[1])
    await fleet.report("b", position(*fleet.positions), silent_seconds=silent)
    told = await fleet.ask()
    assert (told.complete, told.acknowledged) == (False, ("a",))
    (lagging,) = told.lagging
    assert lagging.replica == "b"
    assert why in lagging.why


async def test_one_whose_report_cannot_be_read_is_named(fleet: Fleet) -> None:
    await fleet.report("a", fleet.positions[1])
    fleet.store.reports["b"] = "{"
    told = await fleet.ask()
    assert [lagging.replica for lagging in told.lagging] == ["b"]
    assert "cannot be read" in told.lagging[0].why


async def test_silence_does_not_matter_once_it_has_it_and_ends_after_an_hour(fleet: Fleet) -> None:
    await fleet.report("a", fleet.positions[1], silent_seconds=600)
    await fleet.report("b", fleet.positions[0], silent_seconds=3601)
    told = await fleet.ask()
    assert (told.complete, told.acknowledged) == (True, ("a",))


async def test_the_last_one_is_waited_for(fleet: Fleet) -> None:
    await fleet.report("a", fleet.positions[0])
    asking = asyncio.create_task(fleet.ask(seconds=30))
    await asyncio.sleep(0.05)
    assert not asking.done()
    await fleet.report("a", fleet.positions[1])
    async with asyncio.timeout(5):
        assert (await asking).complete


async def test_the_wait_ends_in_time_also_when_the_store_is_away(fleet: Fleet) -> None:
    fleet.store.available = False
    began = time.monotonic()
    told = await fleet.ask(seconds=0.1)
    assert 0.1 <= time.monotonic() - began < 5
    assert (told.complete, told.problem) == (False, "the memory store was made unavailable")


async def test_a_store_that_comes_back_in_time_is_asked_again(fleet: Fleet) -> None:
    await fleet.report("a", fleet.positions[1])
    fleet.store.available = False
    asking = asyncio.create_task(fleet.ask(seconds=30))
    await asyncio.sleep(0.05)
    fleet.store.available = True
    async with asyncio.timeout(5):
        assert (await asking).complete


async def test_a_store_that_hangs_does_not_prolong_the_wait(fleet: Fleet) -> None:
    class Hanging(MemoryStore):
        async def replicas(self) -> list[object]:  # type: ignore[override]
            await asyncio.Event().wait()
            return []

    async with asyncio.timeout(5):
        told = await wait_for_servers(Hanging(), fleet.positions[1], seconds=0.1)
    assert not told.complete
    assert told.problem


@pytest.mark.parametrize("seconds", [0, 0.02], ids=["one_look", "the_last_of_two"])
async def test_a_look_is_not_cut_short_by_the_end_of_the_wait(fleet: Fleet, seconds: float) -> None:
    class Slow(MemoryStore):
        async def replicas(self) -> list[Replica]:
            await asyncio.sleep(0.1)
            return await fleet.store.replicas()

        events_after = fleet.store.events_after

    await fleet.report("a", fleet.positions[0])
    told = await wait_for_servers(Slow(), fleet.positions[1], seconds=seconds)
    assert ([lagging.replica for lagging in told.lagging], told.problem) == (["a"], "")


async def test_a_change_that_a_failover_lost_is_told(fleet: Fleet) -> None:
    await fleet.report("a", fleet.positions[1])
    fleet.store.events.pop()
    told = await fleet.ask()
    assert (told.complete, told.lost) == (False, True)


async def test_an_interruption_that_the_store_swallows_ends_the_wait_all_the_same(fleet: Fleet) -> None:
    looking = asyncio.Event()

    class Swallowing(MemoryStore):
        async def replicas(self) -> list[Replica]:
            looking.set()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)
            return await fleet.store.replicas()

        events_after = fleet.store.events_after

    await fleet.report("a", fleet.positions[0])
    asking = asyncio.create_task(wait_for_servers(Swallowing(), fleet.positions[1], seconds=30))
    await looking.wait()
    asking.cancel()
    await asyncio.wait({asking}, timeout=10)
    assert asking.done()
    told = await asking
    assert (told.complete, told.interrupted, told.lagging[0].replica) == (False, True, "a")


async def test_an_interruption_is_told_and_not_raised(fleet: Fleet) -> None:
    await fleet.report("a", fleet.positions[0])
    asking = asyncio.create_task(fleet.ask(seconds=30))
    await asyncio.sleep(0.05)
    asking.cancel()
    told = await asking
    assert (told.complete, told.interrupted, told.lagging[0].replica) == (False, True, "a")
