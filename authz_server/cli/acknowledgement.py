"""Whether every server has a change: their reports, compared with the history that the change is part of."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from authz_server.cli.times import show_span
from authz_server.store.interface import Position, PositionLostError, Replica, Store, StoreError, StoreUnavailableError

_POLL_SECONDS = 0.02
_LONGEST_POLL_SECONDS = 0.5
_LOOK_SECONDS = 1.0
"""A look at the reports may take so long, also when the wait is over by then: one that is cut short knows nothing."""
_NOBODY = "no server has reported to this store, so nothing shows that any server decides by it"


@dataclass(frozen=True, slots=True)
class Lagging:
    """A server that is not known to have a change."""

    replica: str
    why: str
    """What is known of it, for people."""


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """Which servers have a change, as far as their reports say."""

    acknowledged: tuple[str, ...] = ()
    lagging: tuple[Lagging, ...] = ()
    problem: str = ""
    """Why the servers that are named cannot be the answer; empty if they are."""
    lost: bool = False
    """Whether the change is no longer part of the store's history."""
    interrupted: bool = False
    """Whether somebody stopped waiting before the time was over."""

    @property
    def complete(self) -> bool:
        """Whether there are servers, and all that count have the change."""
        return bool(self.acknowledged) and not self.lagging and not self.problem


async def wait_for_servers(
    store: Store,
    position: Position,
    *,
    seconds: float,
    on_progress: Callable[[Acknowledgement], None] = lambda _: None,
) -> Acknowledgement:
    """Wait until every server decides by the position, or by one that follows on it; at most some seconds and a look.

    A server that has been silent for long counts as well: it may be cut off, and still serve what was before. It no
    longer counts after an hour, or when it is forgotten. An interruption (asyncio.CancelledError) is told in the
    answer: whoever asks has written something, and must say so.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    history = _History(store, position)
    told = Acknowledgement(problem="the servers' reports were not read")
    poll_seconds = _POLL_SECONDS
    try:
        while True:
            try:
                async with asyncio.timeout_at(max(deadline, loop.time() + _LOOK_SECONDS)):
                    replicas = await store.replicas()
                    # After the reports were read, for they must not know of more than the history does.
                    await history.follow()
                told = judge([replica for replica in replicas if not replica.vanished], history.revisions, position)
            except PositionLostError as error:
                return Acknowledgement(problem=str(error), lost=True)
            except StoreUnavailableError as error:
                told = Acknowledgement(problem=str(error))
            except TimeoutError:
                told = Acknowledgement(told.acknowledged, told.lagging, told.problem or "the store does not answer")
            except StoreError as error:
                return Acknowledgement(problem=str(error))
            left = deadline - loop.time()
            if told.complete or left <= 0:
                return told
            end_if_interrupted()
            on_progress(told)
            await asyncio.sleep(min(poll_seconds, left))
            poll_seconds = min(poll_seconds * 1.2, _LONGEST_POLL_SECONDS)
    except asyncio.CancelledError:  # how asyncio passes on Ctrl-C
        return Acknowledgement(told.acknowledged, told.lagging, told.problem, interrupted=True)


def end_if_interrupted() -> None:
    """Raise asyncio.CancelledError also when it was swallowed on the way, as Python 3.11's `asyncio.wait_for` may."""
    task = asyncio.current_task()
    if task and task.cancelling():
        raise asyncio.CancelledError


def judge(replicas: list[Replica], revisions: Mapping[int, str], position: Position) -> Acknowledgement:
    """Say which servers have the position; `revisions` is the history from it on, with the change ids."""
    acknowledged = []
    lagging = []
    for replica in replicas:
        why = _why_not(replica, revisions, position)
        if not why:
            acknowledged.append(replica.name)
            continue
        silence = f", silent for {show_span(replica.silent_seconds)}" if replica.unknown and replica.report else ""
        lagging.append(Lagging(replica.name, why + silence))
    return Acknowledgement(tuple(acknowledged), tuple(lagging), "" if replicas else _NOBODY)


def _why_not(replica: Replica, revisions: Mapping[int, str], position: Position) -> str:
    if replica.report is None:
        return f"its report cannot be read ({replica.problem})"
    applied = replica.report.position
    if applied is None:
        return "it has no policy yet"
    if applied.epoch != position.epoch:
        return f"it decides by another epoch ({applied.epoch})"
    if applied.revision < position.revision:
        return f"it decides by revision {applied.revision}"
    if revisions.get(applied.revision) != applied.change_id:
        return f"it decides by a revision {applied.revision} that is not in the store's history"
    return ""


class _History:
    """The revisions from a position on, as the store has them."""

    def __init__(self, store: Store, position: Position) -> None:
        self.revisions = {position.revision: position.change_id}
        self._store = store
        self._position = position

    async def follow(self) -> None:
        """Read on to the end (PositionLostError: this history is no longer the store's)."""
        while events := await self._store.events_after(self._position, wait_seconds=0):
            for event in events:
                self.revisions[event.position.revision] = event.position.change_id
            self._position = events[-1].position
