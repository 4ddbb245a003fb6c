"""The store without a server: for unit tests of whatever stands on a store. Passes the contract suite of RedisStore.

Like Redis it keeps texts, so what a caller gets back has been written and read. For one event loop.
"""

import asyncio
import secrets
import time
from collections.abc import Callable

from authz_server.policy.records import Record, RecordKey, Unreadable
from authz_server.store.interface import (
    AlreadyInitialisedError,
    Change,
    Check,
    ConflictError,
    EpochChangedError,
    Event,
    EventRecord,
    InconsistentStateError,
    LoadedPolicy,
    NotInitialisedError,
    Position,
    PositionLostError,
    StoredRecord,
    StoreUnavailableError,
    Write,
    WriteResult,
)
from authz_server.store.keys import collection, decode_record, encode_readable, record_key_of


class MemoryStore:
    """Policy in this process; see `interface.Store`.

    Args:
        clock: returns seconds since the Unix epoch, for events.
        max_events: how many events are kept; a follower that is further behind loads in full.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time, max_events: int = 100_000) -> None:
        self.collections: dict[str, dict[str, str]] = {}
        """Collection -> field -> text. Tests edit it by hand, as people may edit Redis."""
        self.counts: dict[str, int] = {}
        """Collection -> number of records that changes have left there."""
        self.events: list[Event] = []
        """The newest last; the last one is where the policy stands. Empty: there is none."""
        self.available = True
        """False: every method raises StoreUnavailableError, as if the connection were cut."""
        self._clock = clock
        self._max_events = max_events
        self._results: dict[str, Position] = {}
        self._changed = asyncio.Condition()

    async def init(self, *, actor: str, reason: str, change_id: str) -> WriteResult:
        """See `Store.init`."""
        self._check_available()
        earlier = self._results.get(change_id)
        if earlier and earlier.revision == 1:  # else it is the id of a later change
            return WriteResult(earlier, repeated=True)
        if self.events:
            raise AlreadyInitialisedError("there is a policy in memory already")
        if self.collections or self.counts:
            raise InconsistentStateError("there are records in memory without a policy")
        position = Position(secrets.token_hex(16), 1, change_id)
        await self._append(Event(position, "", actor, reason, "init", self._clock(), ()))
        return WriteResult(position, repeated=False)

    async def position(self) -> Position:
        """See `Store.position`."""
        self._check_available()
        if not self.events:
            raise NotInitialisedError("there is no policy in memory: call `init`")
        return self.events[-1].position

    async def read(self, key: RecordKey) -> StoredRecord | None:
        """See `Store.read`."""
        await self.position()
        text = self._text(key)
        return None if text is None else StoredRecord(decode_record(key, text), text)

    async def apply(self, change: Change) -> WriteResult:
        """See `Store.apply`."""
        texts = [None if write.new is None else encode_readable(write.key, write.new) for write in change.writes]
        self._check_available()
        if change.change_id in self._results:
            return WriteResult(self._results[change.change_id], repeated=True)
        before = await self.position()
        if before.epoch != change.epoch:
            raise EpochChangedError(f"the policy was replaced as a whole meanwhile (epoch {before.epoch})")
        parts: tuple[Write | Check, ...] = (*change.writes, *change.checks)
        for part in parts:
            if self._text(part.key) != part.expected:
                raise ConflictError(part.key, part.expected, self._text(part.key))
        records = []
        counts = {}
        for write, text in zip(change.writes, texts, strict=True):
            name = collection(write.key)
            fields = self.collections.setdefault(name, {})
            if text is None:
                del fields[write.key.name]
            else:
                fields[write.key.name] = text
            counts[name] = self.counts.get(name, 0) + (text is not None) - (write.expected is not None)
            self.counts[name] = counts[name]
            if not fields:
                del self.collections[name]
            if not counts[name]:
                del self.counts[name]
            record = None if text is None else decode_record(write.key, text)
            records.append(EventRecord(write.key, write.expected, text, record))
        position = Position(before.epoch, before.revision + 1, change.change_id)
        await self._append(
            Event(
                position,
                before.change_id,
                change.actor,
                change.reason,
                change.action,
                self._clock(),
                tuple(records),
                counts,
            )
        )
        return WriteResult(position, repeated=False)

    async def load(self) -> LoadedPolicy:
        """See `Store.load`."""
        position = await self.position()
        found = {name: len(fields) for name, fields in self.collections.items()}
        if found != self.counts:
            wrong = sorted(name for name in {*found, *self.counts} if found.get(name) != self.counts.get(name))
            raise InconsistentStateError(f"records were lost or added without a change: {', '.join(wrong)}")
        records: list[tuple[RecordKey, Record | Unreadable]] = []
        for name, fields in self.collections.items():
            for field, text in fields.items():
                key = record_key_of(name, field)
                records.append((key, decode_record(key, text)))
        return LoadedPolicy(position, records)

    async def events_after(self, position: Position, *, wait_seconds: float) -> list[Event]:
        """See `Store.events_after`."""
        events = await self._events_now(position)
        if events or wait_seconds <= 0:
            return events
        try:
            async with asyncio.timeout(wait_seconds), self._changed:
                await self._changed.wait()
        except TimeoutError:
            pass
        return await self._events_now(position)

    async def _events_now(self, position: Position) -> list[Event]:
        await self.position()
        for index, event in enumerate(self.events):
            if event.position == position:
                return self.events[index + 1 :]
        raise PositionLostError(f"revision {position.revision} as we know it is not in memory")

    async def history(self, *, count: int) -> list[Event]:
        """See `Store.history`."""
        await self.position()
        return self.events[-count:][::-1]

    async def close(self) -> None:
        """See `Store.close`."""

    async def wake(self) -> None:
        """Let whoever waits for events look now; after a test has changed something by hand."""
        async with self._changed:
            self._changed.notify_all()

    def _check_available(self) -> None:
        if not self.available:
            raise StoreUnavailableError("the memory store was made unavailable")

    def _text(self, key: RecordKey) -> str | None:
        return self.collections.get(collection(key), {}).get(key.name)

    async def _append(self, event: Event) -> None:
        self.events.append(event)
        del self.events[: -self._max_events]
        self._results[event.position.change_id] = event.position
        await self.wake()
