"""Long work leaves the event loop to others, by time and not by number."""

import asyncio

from authz_server.turns import Turns, short_turns


async def steps_of(
    piece_seconds: float, pieces: int, *, short: bool = False, behind: bool = False, others_seconds: float = 0.0
) -> list[int]:
    """Do so many pieces of work that take so long, and return how many others saw done whenever they had a turn."""
    now = 0.0
    done = 0
    seen: list[int] = []
    turns = short_turns(lambda: now, behind=behind) if short else Turns(lambda: now)

    async def watch() -> None:
        nonlocal now
        while True:
            seen.append(done)
            now += others_seconds
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    for _ in range(pieces):
        now += piece_seconds
        done += 1
        await turns.take()
    watching.cancel()
    assert not short or all(seen.count(steps) >= 2 for steps in seen)  # a check takes two turns
    return sorted(set(seen))


async def test_a_step_ends_when_it_has_lasted_a_millisecond() -> None:
    assert await steps_of(0.0003, 12) == [4, 8, 12]


async def test_each_piece_that_takes_longer_is_a_step() -> None:
    assert await steps_of(0.005, 3) == [1, 2, 3]


async def test_short_work_is_one_step() -> None:
    assert await steps_of(0.0001, 5) == []


async def test_a_short_step_is_one_piece() -> None:
    assert await steps_of(0.000001, 3, short=True) == [1, 2, 3]


async def test_a_short_step_after_others_took_their_time_lasts_a_seventh_of_a_millisecond() -> None:
    assert await steps_of(0.00004, 12, short=True, others_seconds=0.001) == [1, 5, 9]


async def test_a_short_step_of_whoever_is_behind_ends_when_it_has_lasted_a_seventh_of_that() -> None:
    assert await steps_of(0.00004, 12, short=True, behind=True) == [4, 8, 12]
