"""Keeps the snapshot fresh: one full load, then the store's events, each time by one assignment.

Whatever happens to the store, the last snapshot stays in use. A snapshot is *confirmed* when the store has proven
that no event follows it; how long ago that was is the snapshot's age.

Now and then the store's counts are compared with what is there and with the snapshot. Counts that do not fit are an
*incident*: it is told until it is over, and the snapshot goes on following what can be followed. A store that has gone
back in its history (a failover, a copy of yesterday) is followed too, for it is what there is; the changes that it no
longer knows, and this process does, are told as *lost*.
"""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from authz_server.loader import Loaded, Loader, Source, StoreLoader, release
from authz_server.policy.records import Record, RecordKey, RecordKeys, Unreadable
from authz_server.policy.snapshot import DecisionOptions, Snapshot, SnapshotDraft
from authz_server.store.batches import batched
from authz_server.store.interface import (
    EVENTS_AT_ONCE,
    Event,
    InconsistentStateError,
    Position,
    PositionLostError,
    Store,
    StoreError,
    UnknownFormatError,
)
from authz_server.store.keys import record_key_of
from authz_server.tasks import cancel
from authz_server.turns import Turns, short_turns

_WAIT_SECONDS = 5.0
_FIRST_DELAY_SECONDS = 0.05
_LONGEST_DELAY_SECONDS = 2.0
_VERIFY_SECONDS = 30.0
_VERIFY_AN_INCIDENT_SECONDS = 5.0
"""People are mending it and want to see that it is over."""
_LARGEST_DIFFERENCE = 50_000
"""A replacement of more records is not applied but loaded: that is done beside the checks, this between them."""
_RECORDS_AT_ONCE = 50
"""So many records become one snapshot, which by itself is some 0.1 ms of work."""
_COALESCE_SECONDS = 0.02
"""The first event of a burst is applied at once; those within this time after it are asked for together, since a
question costs the time of some ten events."""
_REMEMBERED = 1000
"""Events that can be named should the store lose them."""
_RECORDS_REMEMBERED = 20
"""Of each of them."""
_HISTORY_PAGE = 100
_LONGEST_DELAY_OF_AN_INCIDENT_SECONDS = 10.0
"""People have to end an incident, and until then every attempt reads everything."""
_FIRST_LOOK_SECONDS = 1.0
"""So long the store may take to confirm a snapshot of an earlier process before that is used unconfirmed."""


@dataclass(frozen=True, slots=True)
class RefresherStatus:
    """How the refresher fares; a new value replaces the old one at every change."""

    connected: bool = False
    """Whether the store answered the last time, and with a policy."""
    problem: str = "not loaded yet"
    """What is wrong, for people; empty when nothing is."""
    position: Position | None = None
    """Of the last snapshot."""
    source: Source | None = None
    """FILE: the last snapshot is that of an earlier process, and the store has not confirmed it yet."""
    confirmed_at: float = -math.inf
    """When the last snapshot was last proven to be the newest, in seconds of the refresher's (monotonic) clock."""
    loads: int = 0
    """Full loads that succeeded."""
    events: int = 0
    """Events applied."""
    incident: str = ""
    """What does not fit in the store, for people, as long as it does not; part of `problem`."""
    edited: tuple[str, ...] = ()
    """Collections that had been edited behind the stream's back when they were loaded."""
    lost: int = 0
    """Changes that this process had applied and that the store has lost since."""

    def age_seconds(self, now: float) -> float:
        """Return for how long the last snapshot has not been confirmed at `now`; infinite when there is none."""
        return now - self.confirmed_at


@dataclass(frozen=True, slots=True)
class LostChanges:
    """The store has gone back in its history."""

    applied: Position
    """Where we stood by it."""
    found: Position
    """Where it stands now."""
    events: tuple[Event, ...]
    """The changes that are gone, oldest first, as far as this process remembers them; of each, some records."""

    @property
    def count(self) -> int:
        """How many changes are gone, at least."""
        gone_back = self.applied.revision - self.found.revision if self.applied.epoch == self.found.epoch else 0
        return max(len(self.events), gone_back)


class Refresher:
    """Follows a store.

    Args:
        store: what to follow.
        options: the operator's settings that go into every snapshot.
        loader: gets whole policies; by default within this process.
        on_event: called with each event that was applied, after the snapshot that holds it is in use. Must not block.
        on_status: called with each new status. Must not block.
        on_lost: called when the store has lost changes that were applied here. Must not block.
        max_age_seconds: from this age on `current` is None, until the snapshot is confirmed again; None: never.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        options: DecisionOptions,
        *,
        loader: Loader | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_status: Callable[[RefresherStatus], None] | None = None,
        on_lost: Callable[[LostChanges], None] | None = None,
        max_age_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.current: Snapshot | None = None
        """What decisions are made from; None before the first load, and when it is too old."""
        self.status = RefresherStatus()
        self._store = store
        self._loader = loader or StoreLoader(store, options, clock)
        self._on_event = on_event
        self._on_status = on_status
        self._on_lost = on_lost
        self._max_age_seconds = max_age_seconds
        # A quiet store confirms once per wait: that must be often enough for the maximum age.
        self._wait_seconds = _WAIT_SECONDS if max_age_seconds is None else min(_WAIT_SECONDS, max_age_seconds / 3)
        self._clock = clock
        self._last: Snapshot | None = None
        """The last snapshot, in use or too old."""
        self._position: Position | None = None
        """Where to follow on; None: load in full."""
        self._expiry: asyncio.TimerHandle | None = None
        self._remembered: deque[Event] = deque(maxlen=_REMEMBERED)
        self._verify_cursor = 0
        self._verify_at = -math.inf
        self._verifying: asyncio.Task[None] | None = None
        self._incident = ""
        self._edited: tuple[str, ...] = ()
        self._changed = RecordKeys()
        """The records that changed since the loader was last at work."""
        self._changed_since = -math.inf
        self._repacking: asyncio.Task[Loaded] | None = None
        self._repacked = RecordKeys()
        """What the loader takes into account at the moment."""
        self._releasing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Follow the store until cancelled; troubles are told in `status`, never raised."""
        failures = 0
        try:
            await self._restore()
            while True:
                try:
                    if self._last is None or self._position is None:
                        await self._load()
                    else:
                        self._verify_when_due()
                        await self._follow(self._last, self._position)
                        self._end_verifying()
                        failures = 0
                        await self._keep_packed()
                except Exception as error:  # noqa: BLE001 - a refresher that died would freeze the policy unseen
                    await self._stop_verifying()
                    if not isinstance(error, StoreError) or isinstance(error, PositionLostError):
                        self._position = None
                    self._report(error)
                    await asyncio.sleep(_delay_seconds(error, failures))
                    failures += 1
        finally:
            if self._expiry:
                self._expiry.cancel()
            await self._stop_verifying()
            await self._stop_repacking()

    async def _restore(self) -> None:
        """Begin with the last good snapshot of an earlier process, if there is one, and see what the store says."""
        try:
            loaded = await self._loader.restore()
        except Exception as error:  # noqa: BLE001 - as in `run`; the store may have it all
            self._report(error)
            return
        if loaded is None:
            return
        self._changed_since = self._clock()
        self._last, self._position = loaded.snapshot, loaded.position
        try:
            async with asyncio.timeout(_FIRST_LOOK_SECONDS):
                await self._follow(loaded.snapshot, loaded.position)
        except Exception as error:  # noqa: BLE001 - as in `run`
            trouble = _told(error)
            self._use(loaded.snapshot, loaded.position, loaded.confirmed_at, source=Source.FILE, trouble=trouble)
            if isinstance(error, PositionLostError):
                self._position = None

    async def _load(self) -> None:
        await self._stop_repacking()
        await self._store.position()  # a store that is away, or has no policy, is not worth a process
        loaded = await self._loader.load(self._last)
        lost = await self._lost(loaded.position)
        self._incident, self._edited = "", loaded.edited
        self._verify_later()
        self._replace(loaded.snapshot)
        self._use(loaded.snapshot, loaded.position, loaded.confirmed_at, loads=1, lost=lost.count if lost else 0)
        if lost:
            self._remembered.clear()
            if self._on_lost:
                self._on_lost(lost)

    async def _lost(self, found: Position) -> LostChanges | None:
        """Return what the store has lost of what was applied here, if anything."""
        applied = self.status.position
        if applied is None or applied == found:
            return None
        oldest = min((event.position.revision for event in self._remembered), default=applied.revision)
        kept: list[Position] = []
        with suppress(InconsistentStateError):  # an event that cannot be read; those after it are known
            while page := await self._store.history(count=_HISTORY_PAGE, before=kept[-1].revision if kept else None):
                kept += (event.position for event in page)
                if kept[-1].revision <= oldest:
                    break
        first = kept[-1].revision if kept else 0  # what was before it may have been trimmed
        known = set(kept)
        lost = tuple(
            event for event in self._remembered if event.position not in known and event.position.revision >= first
        )
        gone_back = applied.epoch == found.epoch and applied.revision > found.revision
        return LostChanges(applied, found, lost) if lost or gone_back else None

    def _verify_when_due(self) -> None:
        """Now and then, begin to compare; beside following, for it asks questions that a slow store answers late."""
        if self._verifying is None and self.status.connected and self._clock() >= self._verify_at:
            self._verifying = asyncio.create_task(self._verify(), name="verify")

    def _end_verifying(self) -> None:
        """If the comparison is over, raise what it raised."""
        if self._verifying is not None and self._verifying.done():
            task, self._verifying = self._verifying, None
            task.result()

    async def _stop_verifying(self) -> None:
        """Leave a comparison: what it finds about a store that was away, or another snapshot, means nothing."""
        task, self._verifying = self._verifying, None
        if task is not None:
            await cancel(task)

    async def _verify(self) -> None:
        """Compare a part of the store's counts with what is there, and with the snapshot."""
        try:
            part = await self._store.verify(self._verify_cursor)
        except InconsistentStateError as error:
            self._verify_cursor = 0
            self._verify_at = self._clock() + _VERIFY_AN_INCIDENT_SECONDS
            self._report(error, connected=True)
            return
        self._verify_cursor = part.cursor
        self._verify_later()
        if self._incident and not part.cursor:
            self._incident = ""
            self._set_status(replace(self.status, problem=self._problem(), incident=""))
        if self._last and part.position == self._position:
            _require_counts(self._last, part.counts, part.position)

    def _verify_later(self) -> None:
        seconds = _VERIFY_AN_INCIDENT_SECONDS if self._incident else _VERIFY_SECONDS
        self._verify_at = self._clock() + seconds * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret

    def _problem(self) -> str:
        """Say what is wrong while the store can be followed."""
        if self._incident:
            return self._incident
        if self._edited:
            return (
                f"edited behind the stream's back: {', '.join(self._edited)}; servers that loaded earlier may decide "
                "by something else (`authzctl reconcile` says more)"
            )
        return ""

    async def _keep_packed(self) -> None:
        """Have the loader take up what has changed, when it is time, and go over to its result."""
        assert self._last is not None  # noqa: S101 - nothing is kept before it is loaded
        assert self._position is not None  # noqa: S101
        task = self._repacking
        if task is None:
            if self._loader.is_repack_due(len(self._changed), self._clock() - self._changed_since):
                self._repacked, self._changed = self._changed, RecordKeys()
                self._changed_since = self._clock()
                loaded = Loaded(self._last, self._position, self.status.confirmed_at, Source.REDIS)
                self._repacking = asyncio.create_task(self._loader.repack(loaded, self._repacked))
            return
        if not task.done():
            return
        self._repacking = None
        packed, self._repacked = self._repacked, RecordKeys()
        try:
            repacked = task.result()
        except Exception:  # noqa: BLE001 - the loader told why, and the snapshot in use is none the worse
            self._changed.update(packed)
            return
        snapshot = repacked.snapshot.with_changes(self._last.revision, ())
        turns = Turns()
        for some in batched(self._changed, _RECORDS_AT_ONCE):
            draft = SnapshotDraft(snapshot)
            for key in some:
                draft.copy(key, self._last)
            snapshot = draft.done(snapshot.revision)
            await turns.take()
        self._replace(snapshot)
        self.current = snapshot if self.current is not None else None

    def _replace(self, snapshot: Snapshot) -> None:
        """Let another snapshot take the place of the last one."""
        before, self._last = self._last, snapshot
        if before is not None:
            task = asyncio.create_task(release(before))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _stop_repacking(self) -> None:
        self._changed = RecordKeys()
        self._changed_since = self._clock()
        if self._repacking is not None:
            self._repacking.cancel()
            await asyncio.wait({self._repacking})
            self._repacking = None

    async def _follow(self, snapshot: Snapshot, position: Position) -> None:
        # After a trouble, first see whether we may trust the snapshot again; then wait for news.
        wait_seconds = self._wait_seconds if self.status.connected else 0.0
        events = await self._store.events_after(position, wait_seconds=wait_seconds)
        confirmed_at = self._clock()
        behind = len(events) >= EVENTS_AT_ONCE
        turns = short_turns(behind=behind)
        counts: dict[str, int] = {}
        changes: list[tuple[RecordKey, Record | Unreadable | None]] = []
        for event in events:
            if event.parts:
                snapshot = await self._apply(snapshot, position.revision, changes, turns)
                snapshot = await self._apply_parts(snapshot, event)
                changes.clear()
            changes += ((item.key, item.record) for item in event.records)
            counts.update(event.counts)
            position = event.position
        if events:
            snapshot = await self._apply(snapshot, position.revision, changes, turns)
        _require_counts(snapshot, counts, position)
        self._use(snapshot, position, confirmed_at, events=len(events))
        await self._tell(events, turns)
        if events and not behind:  # else the rest is asked for at once
            await asyncio.sleep(_COALESCE_SECONDS - (self._clock() - confirmed_at))

    async def _tell(self, events: list[Event], turns: Turns) -> None:
        """Tell of events that were applied; checks have their turn in between."""
        for event in events:
            if len(event.records) > _RECORDS_REMEMBERED:
                self._remembered.append(replace(event, records=event.records[:_RECORDS_REMEMBERED]))
            else:
                self._remembered.append(event)
        if not self._on_event:
            return
        untold = iter(events)
        try:
            await turns.take()
            for event in untold:
                self._on_event(event)
                await turns.take()
        finally:
            for event in untold:  # we were cancelled, and these are applied all the same
                self._on_event(event)

    async def _apply_parts(self, snapshot: Snapshot, event: Event) -> Snapshot:
        revision = event.position.revision
        turns = Turns()
        if event.size > _LARGEST_DIFFERENCE:
            raise PositionLostError(f"revision {revision} changed {event.size} records: loading them is cheaper")
        async for some in self._store.difference(event):
            snapshot = await self._apply(snapshot, revision, [(item.key, item.record) for item in some], turns)
        return snapshot

    async def _apply(
        self,
        snapshot: Snapshot,
        revision: int,
        changes: list[tuple[RecordKey, Record | Unreadable | None]],
        turns: Turns,
    ) -> Snapshot:
        """Return the snapshot after changes; checks have their turn between them."""
        for start in range(0, len(changes) or 1, _RECORDS_AT_ONCE):
            some = changes[start : start + _RECORDS_AT_ONCE]
            draft = SnapshotDraft(snapshot)
            for key, record in some:
                draft.put(key, record)
                await turns.take()
            self._changed.update(key for key, _ in some)
            snapshot = draft.done(revision)
            await turns.take()
        return snapshot

    def _use(
        self,
        snapshot: Snapshot,
        position: Position,
        confirmed_at: float,
        *,
        source: Source = Source.REDIS,
        trouble: str = "",
        loads: int = 0,
        events: int = 0,
        lost: int = 0,
    ) -> None:
        self._last = self.current = snapshot
        self._position = position
        if self._max_age_seconds is not None:
            if self._expiry:
                self._expiry.cancel()
            left = self._max_age_seconds - (self._clock() - confirmed_at)
            if left <= 0:
                self.current = None
            self._expiry = asyncio.get_running_loop().call_later(left, self._expire)
        self._set_status(
            RefresherStatus(
                connected=not trouble,
                problem=trouble or self._problem(),
                position=position,
                source=source,
                confirmed_at=confirmed_at,
                loads=self.status.loads + loads,
                events=self.status.events + events,
                incident=self._incident,
                edited=self._edited,
                lost=self.status.lost + lost,
            )
        )

    def _expire(self) -> None:
        self.current = None
        self._set_status(self.status)

    def _report(self, error: Exception, *, connected: bool = False) -> None:
        problem = _told(error)
        if isinstance(error, InconsistentStateError):
            self._incident = problem
        self._set_status(replace(self.status, connected=connected, problem=problem, incident=self._incident))

    def _set_status(self, status: RefresherStatus) -> None:
        self.status = status
        if self._on_status:
            self._on_status(status)


def _require_counts(snapshot: Snapshot, counts: Mapping[str, int], position: Position) -> None:
    """Raise PositionLostError when the snapshot does not hold as many records as the store says."""
    for name, expected in counts.items():
        key = record_key_of(name, "")
        if (found := snapshot.count(key.kind, key.list_name)) != expected:
            raise PositionLostError(f"at revision {position.revision} {name} has {found} records, not {expected}")


def _told(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"the store did not answer within {_FIRST_LOOK_SECONDS:g} seconds"
    return str(error) if isinstance(error, StoreError) else f"internal error: {error!r}"


def _delay_seconds(error: Exception, failures: int) -> float:
    """Exponential, with jitter: after an outage a fleet must not come back in one moment."""
    incident = isinstance(error, InconsistentStateError | UnknownFormatError)
    longest = _LONGEST_DELAY_OF_AN_INCIDENT_SECONDS if incident else _LONGEST_DELAY_SECONDS
    delay = min(longest, _FIRST_DELAY_SECONDS * (1 << min(failures, 20)))
    return delay * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
