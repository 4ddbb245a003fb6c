"""A server's reports: what it decides by, told to the store, so that `authzctl --wait` can say who has a change.

Reporting never touches a check. It has a connection of its own, keeps nothing but the newest position, and whatever
fails is tried again; without the store nothing is lost but the reports.
"""

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress

from authz_server.store.interface import Position, Report, Store, StoreError

_HEARTBEAT_SECONDS = 10.0
"""A third of interface.SILENT_SECONDS, so that one report that got lost is not taken for silence."""
_COALESCE_SECONDS = 0.05
"""The first position of a burst goes out at once; those within this time after it are one more report."""
_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 5.0


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
        self._store = store
        self._process = process
        self._on_problem = on_problem
        self._problem = "not reported yet"
        self._started_at = clock()
        self._position: Position | None = None
        self._changed = asyncio.Event()
        self._leaving = asyncio.Event()
        self._tried = asyncio.Event()
        self._reported = False

    def applied(self, position: Position) -> None:
        """Take note of what the server decides by from now on; returns at once."""
        if position != self._position:
            self._position = position
            self._changed.set()

    async def announced(self, *, at_most_seconds: float) -> None:
        """Wait until the server has reported for the first time, or could not.

        A server that decides before it is known could be overlooked by somebody who waits for all.
        """
        await _wait(self._tried, at_most_seconds)

    def leave(self) -> None:
        """Let `run` take the report back and end; to be called when this server decides nothing any more."""
        self._leaving.set()
        self._changed.set()

    async def run(self) -> None:
        """Report until `leave`; troubles are told to `on_problem`, never raised."""
        failures = 0
        while not self._leaving.is_set():
            self._changed.clear()
            succeeded = await self._attempt()
            self._tried.set()
            if succeeded:
                failures = 0
                await _wait(self._leaving, _COALESCE_SECONDS)
                await _wait(self._changed, _HEARTBEAT_SECONDS)
            else:
                delay = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * (1 << min(failures, 20)))
                await _wait(self._leaving, delay * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
                failures += 1
        with suppress(StoreError):  # then it stays unknown for as long as one that was killed
            await self._store.forget(self.replica)

    async def _attempt(self) -> bool:
        try:
            await self._report()
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the reports, nor the server
            self._tell(str(error) if isinstance(error, StoreError) else f"internal error: {error!r}")
            return False
        self._tell("")
        return True

    async def _report(self) -> None:
        report = Report(self.replica, self._process, self._started_at, self._position)
        if not await self._store.report(report, take_over=not self._reported):
            self.replica = f"{self.replica}-{self._process}"
            await self._store.report(
                Report(self.replica, self._process, self._started_at, self._position), take_over=True
            )
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
