"""The store without a server: for unit tests of whatever stands on a store. Passes the contract suite of RedisStore.

Like Redis it keeps texts, so what a caller gets back has been written and read. For one event loop.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable

from authz_server.policy.records import Record, RecordKey, Unreadable
from authz_server.store.interface import (
    EVENTS_AT_ONCE,
    AlreadyInitialisedError,
    Change,
    ChangeIdUsedError,
    Check,
    ConflictError,
    Difference,
    Durability,
    DurabilityError,
    EpochChangedError,
    Event,
    EventRecord,
    Examination,
    Finding,
    InconsistentStateError,
    LoadedPolicy,
    NotInitialisedError,
    Position,
    PositionLostError,
    Replaced,
    Replacement,
    Replica,
    Report,
    RevisionChangedError,
    ServerFacts,
    StoredRecord,
    StoreUnavailableError,
    VerifiedCounts,
    Write,
    WriteResult,
)
from authz_server.store.keys import (
    SUM_MODULUS,
    change_digest,
    collection,
    count_difference,
    decode_record,
    decode_report,
    encode_readable,
    encode_report,
    record_key_of,
    replacement_digest,
    reported_by,
    share,
    wished_texts,
)

_INIT_DIGEST = "init"


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
        self.sums: dict[str, int] = {}
        """Collection -> sum of the shares of the records that changes have left there."""
        self.events: list[Event] = []
        """The newest last; the last one is where the policy stands. Empty: there is none."""
        self.reports: dict[str, str] = {}
        """Server -> the text of its report."""
        self.available = True
        """False: every method raises StoreUnavailableError, as if the connection were cut."""
        self._clock = clock
        self._max_events = max_events
        self._results: dict[str, tuple[Position, str]] = {}
        self._changed = asyncio.Condition()

    async def init(self, *, actor: str, reason: str, change_id: str) -> WriteResult:
        """See `Store.init`."""
        self._check_available()
        earlier = self._results.get(change_id)
        if earlier and earlier[1] == _INIT_DIGEST:  # else it is the id of a later change
            return WriteResult(earlier[0], repeated=True)
        if self.events:
            raise AlreadyInitialisedError("there is a policy in memory already")
        if self.collections or self.counts:
            raise InconsistentStateError("there are records in memory without a policy")
        position = Position(secrets.token_hex(16), 1, change_id)
        await self._append(Event(position, "", actor, reason, "init", self._clock(), ()), _INIT_DIGEST)
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
        digest = change_digest(change, texts)
        self._check_available()
        if change.change_id in self._results:
            return self._repeated(change.change_id, digest)
        before = await self.position()
        if before.epoch != change.epoch:
            raise EpochChangedError(f"the policy was replaced as a whole meanwhile (epoch {before.epoch})")
        if change.at_revision not in (None, before.revision):
            raise RevisionChangedError(f"the policy is at revision {before.revision}, not {change.at_revision}")
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
            for each, sign in ((write.expected, -1), (text, 1)):
                if each is not None:
                    self.sums[name] = (self.sums.get(name, 0) + sign * share(write.key.name, each)) % SUM_MODULUS
            if not fields:
                del self.collections[name]
            if not counts[name]:
                del self.counts[name], self.sums[name]
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
            ),
            digest,
        )
        return WriteResult(position, repeated=False)

    async def replace(
        self, replacement: Replacement, approve: Callable[[Difference], bool] = lambda _: True
    ) -> Replaced:
        """See `Store.replace`; in one change, however many records it touches."""
        before = await self.position()
        if before.epoch != replacement.epoch:
            raise EpochChangedError(f"the policy was replaced as a whole meanwhile (epoch {before.epoch})")
        records: list[EventRecord] = []
        contents: dict[str, dict[str, str]] = {}
        for name, wished in replacement.contents.items():
            if stray := next((key for key in wished if collection(key) != name), None):
                raise ValueError(f"{stray} does not belong into {name}")
            old = self.collections.get(name, {})
            new = contents[name] = wished_texts(replacement, name, old)
            for field in sorted(old.keys() | new.keys()):
                if old.get(field) != new.get(field):
                    key = record_key_of(name, field)
                    records.append(EventRecord(key, old.get(field), new.get(field), wished.get(key)))
        wished_in_all = sum(len(new) for new in contents.values())
        difference = count_difference(((record.previous, record.new) for record in records), wished_in_all)
        if not difference or not approve(difference):
            return Replaced(None, difference)
        self._compare(contents)
        counted = {name: (len(new), sum(share(*item) for item in new.items())) for name, new in contents.items()}
        digest = replacement_digest(replacement.action, counted)
        if replacement.change_id in self._results:
            return Replaced(self._repeated(replacement.change_id, digest), difference)
        for name, new in contents.items():
            for kept in (self.collections, self.counts, self.sums):
                kept.pop(name, None)
            if new:
                self.collections[name] = new
                self.counts[name], self.sums[name] = len(new), self._sum(name)
        position = Position(before.epoch, before.revision + 1, replacement.change_id)
        event = Event(
            position,
            before.change_id,
            replacement.actor,
            replacement.reason,
            replacement.action,
            self._clock(),
            tuple(records),
            {name: len(new) for name, new in contents.items()},
        )
        await self._append(event, digest)
        return Replaced(WriteResult(position, repeated=False), difference)

    async def difference(self, event: Event) -> AsyncIterator[tuple[EventRecord, ...]]:
        """See `Store.difference`."""
        yield event.records

    async def read_many(self, keys: Iterable[RecordKey]) -> dict[RecordKey, StoredRecord | None]:
        """See `Store.read_many`."""
        return {key: await self.read(key) for key in keys}

    async def record_counts(self) -> dict[str, int]:
        """See `Store.record_counts`."""
        await self.position()
        return dict(self.counts)

    async def load(self, only: Collection[str] | None = None) -> LoadedPolicy:
        """See `Store.load`."""
        position = await self.position()
        self._compare(only)
        names = [name for name in self.collections if only is None or name in only]
        records: list[tuple[RecordKey, Record | Unreadable]] = []
        for name in names:
            for field, text in self.collections[name].items():
                key = record_key_of(name, field)
                records.append((key, decode_record(key, text)))
        edited = sorted(name for name in names if self._sum(name) != self.sums.get(name, 0))
        return LoadedPolicy(position, records, tuple(edited))

    async def verify(self, cursor: int) -> VerifiedCounts:
        """See `Store.verify`; all in one part."""
        del cursor
        position = await self.position()
        self._compare(None)
        return VerifiedCounts(position, dict(self.counts), 0)

    async def examine(self) -> Examination:
        """See `Store.examine`."""
        position = await self.position()
        names = sorted({*self.collections, *self.counts})
        counted = {name: (len(self.collections[name]), self._sum(name)) for name in self.collections}
        findings = [
            Finding(name, self.counts.get(name, 0), counted.get(name, (0, 0))[0])
            for name in names
            if counted.get(name, (0, 0)) != (self.counts.get(name, 0), self.sums.get(name, 0))
        ]
        records = (await self._records(names)) if names else []
        unreadable = tuple(record.problem for record in records if isinstance(record, Unreadable))
        return Examination(position, (), tuple(findings), unreadable, counted, (str(position),))

    async def _records(self, names: Iterable[str]) -> list[Record | Unreadable]:
        return [
            decode_record(record_key_of(name, field), text)
            for name in names
            for field, text in self.collections.get(name, {}).items()
        ]

    async def records(self, name: str) -> AsyncIterator[tuple[RecordKey, str]]:
        """See `Store.records`."""
        self._check_available()
        for member, text in self.collections.get(name, {}).items():
            yield record_key_of(name, member), text

    async def confirm(
        self, examined: Examination, *, actor: str, reason: str, change_id: str, action: str = "confirm"
    ) -> WriteResult:
        """See `Store.confirm`."""
        before = await self.position()
        if change_id in self._results:
            return self._repeated(change_id, action)
        if examined.bookkeeping != (str(before),):
            raise EpochChangedError("the policy in memory was changed while it was examined: ask again")
        self.counts = {name: count for name, (count, _) in examined.counted.items()}
        self.sums = {name: total for name, (_, total) in examined.counted.items()}
        position = Position(secrets.token_hex(16), before.revision + 1, change_id)
        await self._append(Event(position, before.change_id, actor, reason, action, self._clock(), ()), action)
        return WriteResult(position, repeated=False)

    async def facts(self) -> ServerFacts:
        """See `Store.facts`."""
        self._check_available()
        return ServerFacts("7.2", "master", 0, 0, "noeviction", 0, 0, 0, False, "", "", "memory", self._clock(), "")

    async def durability(self) -> Durability:
        """See `Store.durability`."""
        raise DurabilityError("memory does not outlive its process: nothing can be made durable there")

    async def make_durable(self, result: WriteResult, durability: Durability, *, seconds: float) -> None:
        """See `Store.make_durable`."""
        del result, durability, seconds
        raise DurabilityError("memory does not outlive its process: nothing can be made durable there")

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
            following = self.events[index + 1 :]
            if event.position == position and all(each.position.epoch == position.epoch for each in following):
                return following[:EVENTS_AT_ONCE]
        raise PositionLostError(f"revision {position.revision} as we know it is not in memory")

    async def history(self, *, count: int, before: int | None = None) -> list[Event]:
        """See `Store.history`."""
        await self.position()
        events = [event for event in self.events if before is None or event.position.revision < before]
        return events[-count:][::-1]

    async def history_after(self, revision: int, *, count: int) -> list[Event]:
        """See `Store.history_after`."""
        await self.position()
        return [event for event in self.events if event.position.revision > revision][:count]

    async def find_change(self, change_id: str) -> Event | None:
        """See `Store.find_change`."""
        await self.position()
        return next((event for event in self.events if event.position.change_id == change_id), None)

    async def report(self, report: Report, *, take_over: bool) -> bool:
        """See `Store.report`."""
        self._check_available()
        before = self.reports.get(report.replica)
        if before is not None and not take_over and not reported_by(report, before):
            return False
        self.reports[report.replica] = encode_report(report, self._clock())
        return True

    async def replicas(self) -> list[Replica]:
        """See `Store.replicas`."""
        self._check_available()
        now = self._clock()
        return [decode_report(name, self.reports[name], now) for name in sorted(self.reports)]

    async def forget(self, replica: str) -> bool:
        """See `Store.forget`."""
        self._check_available()
        return self.reports.pop(replica, None) is not None

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

    def _sum(self, name: str) -> int:
        return sum(share(field, text) for field, text in self.collections.get(name, {}).items()) % SUM_MODULUS

    def _compare(self, only: Collection[str] | None) -> None:
        found = {name: len(fields) for name, fields in self.collections.items()}
        names = {*found, *self.counts} if only is None else only
        if wrong := sorted(name for name in names if found.get(name) != self.counts.get(name)):
            raise InconsistentStateError(f"records were lost or added without a change: {', '.join(wrong)}")

    def _repeated(self, change_id: str, digest: str) -> WriteResult:
        position, applied = self._results[change_id]
        if applied != digest:
            raise ChangeIdUsedError(
                f"the change id {change_id!r} was applied as revision {position.revision}, for another change"
            )
        return WriteResult(position, repeated=True)

    async def _append(self, event: Event, digest: str) -> None:
        self.events.append(event)
        del self.events[: -self._max_events]
        self._results[event.position.change_id] = (event.position, digest)
        await self.wake()
