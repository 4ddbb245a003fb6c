"""Keeps the snapshot fresh: one full load, then the store's events, each time by one assignment.

Whatever happens to the store, the last snapshot stays in use. A snapshot is *confirmed* when the store has proven
that no event follows it; how long ago that was is the snapshot's age.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from authz_server.policy.records import Record, RecordKey, Unreadable
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.store.interface import (
    Event,
    InconsistentStateError,
    Position,
    PositionLostError,
    Store,
    StoreError,
    UnknownFormatError,
)
from authz_server.store.keys import record_key_of

_WAIT_SECONDS = 5.0
_FIRST_DELAY_SECONDS = 0.05
_LONGEST_DELAY_SECONDS = 2.0
_LONGEST_DELAY_OF_AN_INCIDENT_SECONDS = 10.0
"""People have to end an incident, and until then every attempt reads everything."""


@dataclass(frozen=True, slots=True)
class RefresherStatus:
    """How the refresher fares; a new value replaces the old one at every change."""

    connected: bool = False
    """Whether the store answered the last time, and with a policy."""
    problem: str = "not loaded yet"
    """What is wrong, for people; empty when nothing is."""
    position: Position | None = None
    """Of the last snapshot."""
    confirmed_at: float = -math.inf
    """When the last snapshot was last proven to be the newest, in seconds of the refresher's (monotonic) clock."""
    loads: int = 0
    """Full loads that succeeded."""
    events: int = 0
    """Events applied."""

    def age_seconds(self, now: float) -> float:
        """Return for how long the last snapshot has not been confirmed at `now`; infinite when there is none."""
        return now - self.confirmed_at


class Refresher:
    """Follows a store.

    Args:
        store: what to follow.
        options: the operator's settings that go into every snapshot.
        on_event: called with each event that was applied, after the snapshot that holds it is in use. Must not block.
        on_status: called with each new status. Must not block.
        max_age_seconds: from this age on `current` is None, until the snapshot is confirmed again; None: never.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        options: DecisionOptions,
        *,
        on_event: Callable[[Event], None] | None = None,
        on_status: Callable[[RefresherStatus], None] | None = None,
        max_age_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.current: Snapshot | None = None
        """What decisions are made from; None before the first load, and when it is too old."""
        self.status = RefresherStatus()
        self._store = store
        self._options = options
        self._on_event = on_event
        self._on_status = on_status
        self._max_age_seconds = max_age_seconds
        # A quiet store confirms once per wait: that must be often enough for the maximum age.
        self._wait_seconds = _WAIT_SECONDS if max_age_seconds is None else min(_WAIT_SECONDS, max_age_seconds / 3)
        self._clock = clock
        self._last: Snapshot | None = None
        """The last snapshot, in use or too old."""
        self._position: Position | None = None
        """Where to follow on; None: load in full."""
        self._expiry: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Follow the store until cancelled; troubles are told in `status`, never raised."""
        failures = 0
        try:
            while True:
                try:
                    if self._last is None or self._position is None:
                        await self._load()
                    else:
                        await self._follow(self._last, self._position)
                        failures = 0
                except Exception as error:  # noqa: BLE001 - a refresher that died would freeze the policy unseen
                    if not isinstance(error, StoreError) or isinstance(error, PositionLostError):
                        self._position = None
                    self._report(error)
                    await asyncio.sleep(_delay_seconds(error, failures))
                    failures += 1
        finally:
            if self._expiry:
                self._expiry.cancel()

    async def _load(self) -> None:
        policy = await self._store.load()
        confirmed_at = self._clock()
        snapshot = build_snapshot(
            policy.records,
            epoch=policy.position.epoch,
            revision=policy.position.revision,
            options=self._options,
            last_good=self._last,
        )
        self._use(snapshot, policy.position, confirmed_at, loads=1)

    async def _follow(self, snapshot: Snapshot, position: Position) -> None:
        # After a trouble, first see whether we may trust the snapshot again; then wait for news.
        wait_seconds = self._wait_seconds if self.status.connected else 0.0
        events = await self._store.events_after(position, wait_seconds=wait_seconds)
        confirmed_at = self._clock()
        counts: dict[str, int] = {}
        changes: list[tuple[RecordKey, Record | Unreadable | None]] = []
        for event in events:
            changes += [(item.key, item.record) for item in event.records]
            counts.update(event.counts)
            position = event.position
        if events:
            snapshot = snapshot.with_changes(position.revision, changes)
        for name, expected in counts.items():
            key = record_key_of(name, "")
            if (found := snapshot.count(key.kind, key.list_name)) != expected:
                raise PositionLostError(
                    f"after revision {position.revision} {name} has {found} records, not {expected}"
                )
        self._use(snapshot, position, confirmed_at, events=len(events))
        for event in events:
            if self._on_event:
                self._on_event(event)

    def _use(
        self, snapshot: Snapshot, position: Position, confirmed_at: float, *, loads: int = 0, events: int = 0
    ) -> None:
        self._last = self.current = snapshot
        self._position = position
        if self._max_age_seconds is not None:
            if self._expiry:
                self._expiry.cancel()
            left = self._max_age_seconds - (self._clock() - confirmed_at)
            self._expiry = asyncio.get_running_loop().call_later(left, self._expire)
        self._set_status(
            RefresherStatus(
                connected=True,
                problem="",
                position=position,
                confirmed_at=confirmed_at,
                loads=self.status.loads + loads,
                events=self.status.events + events,
            )
        )

    def _expire(self) -> None:
        self.current = None
        self._set_status(self.status)

    def _report(self, error: Exception) -> None:
        problem = str(error) if isinstance(error, StoreError) else f"internal error: {error!r}"
        self._set_status(replace(self.status, connected=False, problem=problem))

    def _set_status(self, status: RefresherStatus) -> None:
        self.status = status
        if self._on_status:
            self._on_status(status)


def _delay_seconds(error: Exception, failures: int) -> float:
    """Exponential, with jitter: after an outage a fleet must not come back in one moment."""
    incident = isinstance(error, InconsistentStateError | UnknownFormatError)
    longest = _LONGEST_DELAY_OF_AN_INCIDENT_SECONDS if incident else _LONGEST_DELAY_SECONDS
    delay = min(longest, _FIRST_DELAY_SECONDS * (1 << min(failures, 20)))
    return delay * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
