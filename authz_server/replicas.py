"""The servers that report to the store what they decide by, so that `authzctl --wait` can say who has a change.

`Reporter` is one server's part, `Registry` what anybody can know of all of them. Reporting never touches a check. It
has a connection of its own, keeps nothing but the newest position, and whatever fails is tried again; without the store
nothing is lost but the reports.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from authz_server.store.interface import NotInitialisedError, Position, Replica, Report, Store, StoreError

_HEARTBEAT_SECONDS = 10.0
"""A third of interface.SILENT_SECONDS, so that one report that got lost is not taken for silence."""
_COALESCE_SECONDS = 0.05
"""The first position of a burst goes out at once; those within this time after it are one more report."""
_LOOK_SECONDS = 30.0
"""How often each server looks at the reports of all: at two hundred servers some seven times a second."""
_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Registry:
    """The servers that count, and where the store stood when they were read."""

    replicas: tuple[Replica, ...]
    position: Position | None
    """None: it holds no policy."""

    @classmethod
    async def read(cls, store: Store) -> "Registry":
        """Read the reports.

        Raises:
            StoreError: they cannot be read.
        """
        replicas = await counting_replicas(store)
        try:
            return cls(replicas, await store.position())
        except NotInitialisedError:
            return cls(replicas, None)

    def state(self, replica: Replica) -> str:
        """Return whether it is heard of, in a word."""
        if replica.report is None:
            return "unreadable"
        return "unknown" if replica.unknown else "reporting"

    def is_newest(self, replica: Replica) -> bool:
        """Whether it decides by what the store holds."""
        return self.position is not None and _applied(replica) == self.position

    def is_behind(self, replica: Replica) -> bool:
        """Whether it decides by an older revision of what the store holds, or by nothing yet."""
        applied = _applied(replica)
        if replica.report is None or self.position is None:
            return False
        return applied is None or (applied.epoch == self.position.epoch and applied.revision < self.position.revision)

    def disagrees(self, replica: Replica) -> bool:
        """Whether it decides by another policy than the store's: of another epoch."""
        applied = _applied(replica)
        return applied is not None and (self.position is None or applied.epoch != self.position.epoch)

    def decides_by(self, replica: Replica) -> str:
        """Say for people what it decides by."""
        if replica.report is None:
            return replica.problem
        applied = replica.report.position
        if applied is None:
            return "no policy yet"
        if self.position is None or self.disagrees(replica):
            return f"revision {applied.revision} of another epoch, {applied.epoch}"
        if self.is_newest(replica):
            return f"revision {applied.revision}, the newest"
        if self.is_behind(replica):
            return f"revision {applied.revision}, {self.position.revision - applied.revision} behind"
        return f"another revision {applied.revision}"


async def counting_replicas(store: Store) -> tuple[Replica, ...]:
    """Read the reports of the servers that count.

    Raises:
        StoreError: they cannot be read.
    """
    return tuple(replica for replica in await store.replicas() if not replica.vanished)


def _applied(replica: Replica) -> Position | None:
    return replica.report.position if replica.report else None


class Reporter:
    """Reports for one server process.

    Args:
        store: where to report to.
        replica: the name to report under. A report that an earlier process left under it is replaced.
        process: random, of this process alone. Should another process take our name while we live, one of us would be
            hidden: we go on under a name made from both.
        on_problem: called with what is wrong, for people, when that changes; empty when nothing is. Must not block.
        clock: seconds since the Unix epoch.
    """

    def __init__(
        self,
        store: Store,
        replica: str,
        process: str,
        *,
        on_problem: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.replica = replica
        self.registry: Registry | None = None
        """What all servers have reported, some half a minute ago at most; None: not known."""
        self._looked_at = -math.inf
        self._store = store
        self._process = process
        self._on_problem = on_problem
        self._problem = "not reported yet"
        self._started_at = clock()
        self._position: Position | None = None
        self._lost = 0
        self._changed = asyncio.Event()
        self._again = asyncio.Event()
        self._leaving = asyncio.Event()
        self._tried = asyncio.Event()
        self._reported = False

    def applied(self, position: Position, lost: int = 0) -> None:
        """Take note of what the server decides by from now on, and how many changes the store has lost so far; returns
        at once."""
        if (position, lost) != (self._position, self._lost):
            self._position, self._lost = position, lost
            self._changed.set()

    def again(self) -> None:
        """Report once more, and soon; returns at once.

        To be called when the store has come back: it may have lost the reports with the rest, and who waits for all
        servers must know of this one.
        """
        self._again.set()
        self._changed.set()

    async def announced(self, *, at_most_seconds: float) -> None:
        """Wait until the server has reported for the first time, or could not.

        A server that decides before it is known could be overlooked by somebody who waits for all.
        """
        await _wait(self._tried, at_most_seconds)

    def leave(self) -> None:
        """Let `run` take the report back and end; to be called when this server decides nothing any more."""
        self._leaving.set()
        self.again()

    async def run(self) -> None:
        """Report until `leave`; troubles are told to `on_problem`, never raised."""
        failures = 0
        while not self._leaving.is_set():
            self._changed.clear()
            self._again.clear()
            succeeded = await self._attempt()
            self._tried.set()
            if succeeded:
                failures = 0
                await _wait(self._leaving, _COALESCE_SECONDS)
                await _wait(self._changed, _HEARTBEAT_SECONDS)
            else:
                delay = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * (1 << min(failures, 20)))
                await _wait(self._again, delay * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
                failures += 1
        with suppress(StoreError):  # then it stays unknown for as long as one that was killed
            await self._store.forget(self.replica)

    async def _attempt(self) -> bool:
        try:
            await self._report()
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the reports, nor the server
            self.registry, self._looked_at = None, -math.inf
            self._tell(str(error) if isinstance(error, StoreError) else f"internal error: {error!r}")
            return False
        self._tell("")
        # Not before we have a policy: until then we would count ourselves among those that are behind.
        if self._position and (now := time.monotonic()) - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            self.registry = await self._look()
        return True

    async def _look(self) -> Registry | None:
        try:
            return await Registry.read(self._store)
        except StoreError:  # such as an incident, which is told elsewhere
            return None

    async def _report(self) -> None:
        report = Report(self.replica, self._process, self._started_at, self._position, self._lost)
        if not await self._store.report(report, take_over=not self._reported):
            self.replica = f"{self.replica}-{self._process}"
            await self._store.report(replace(report, replica=self.replica), take_over=True)
        if not self._reported:
            self._reported = True
            for replica in await self._store.replicas():
                if replica.vanished:
                    await self._store.forget(replica.name)

    def _tell(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            self._on_problem(problem)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
