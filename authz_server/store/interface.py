"""What every store can do, in words that do not know Redis. Both stores pass one contract suite.

Every change is one small atomic write that names who, why and what it expects to replace. It raises the revision by
one and appends an event to the change stream, so whoever holds the state at revision N and reads the events after N
holds the same state as the store.
"""

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from authz_server.policy.records import Record, RecordKey, Unreadable

MAX_WRITES_PER_CHANGE = 250
"""A change is one script in Redis, and no script may hold Redis up for more than some milliseconds."""

EVENTS_AT_ONCE = 32
"""In one reply, for the largest have some hundred kilobytes; so many from `events_after` mean that more may follow."""

MAX_COLLECTIONS_REPLACED = 100
"""As above: they are switched by one script."""

SILENT_SECONDS = 30.0
"""A server reports at least every ten seconds; after so many without a word nobody knows what it decides by."""

VANISHED_SECONDS = 3600.0
"""A server that has been silent for so long is no longer counted, and its report may be removed."""


class StoreError(Exception):
    """Something about the store that people have to know; the message says what and how to mend it."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached, or broke off. Whether a write under way was applied is not known: send it again
    with the same change id."""


class StoreRefusedError(StoreError):
    """The store answered and refused, in words that the message repeats (permissions, memory, a read-only replica,
    a wrong password); nothing was written."""


class NotInitialisedError(StoreError):
    """There is no policy: `authzctl init` was never run, or its keys are gone."""


class AlreadyInitialisedError(StoreError):
    """`init` where there is a policy already; it was left as it is."""


class UnknownFormatError(StoreError):
    """The policy was written by a version whose format this one does not know."""


class EpochChangedError(StoreError):
    """The state was replaced as a whole (restore, a confirmed incident) since the change was prepared."""


class ConflictError(StoreError):
    """A record was not what the change expected; nothing was written."""

    def __init__(self, key: RecordKey, expected: str | None, found: str | None) -> None:
        super().__init__(f"{key} was changed by somebody else meanwhile: expected {expected}, found {found}")
        self.key = key
        self.expected = expected
        self.found = found


class CollectionTouchedError(StoreError):
    """A collection was changed by somebody else while a replacement of it was prepared; nothing was written."""


class RevisionChangedError(StoreError):
    """The policy is not at the revision that the change was prepared for; nothing was written."""


class ChangeIdUsedError(StoreError):
    """The change id was applied for a change that is not exactly this one; nothing was written now."""


class DurabilityError(StoreError):
    """A change cannot be made durable here: the server keeps no copy, or is too old to tell. Nothing was written."""


class NotDurableError(StoreError):
    """A change was applied, and is not known to survive the loss of the server."""


class PositionLostError(StoreError):
    """The events after a position cannot be had (another epoch, trimmed, or a failover): load in full."""


class InconsistentStateError(StoreError):
    """The records do not fit their counts: some were lost without a change. An incident, not a policy."""


@dataclass(frozen=True, slots=True)
class Position:
    """A point in the history of a policy."""

    epoch: str
    revision: int
    change_id: str
    """Of the event that led to this revision; proves that two histories are the same one."""


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as it stands in the store."""

    record: Record | Unreadable
    text: str
    """The stored text; a change that replaces the record names it as what it expects."""


@dataclass(frozen=True, slots=True)
class Write:
    """One record set or removed within a change."""

    key: RecordKey
    expected: str | None
    """The record's stored text before the change; None: there must be no such record."""
    new: Record | None
    """The record to store; None removes it (then `expected` says what)."""


@dataclass(frozen=True, slots=True)
class Check:
    """A record that a change relies on and does not touch, such as the instance that a tenant is pinned to."""

    key: RecordKey
    expected: str | None
    """As in Write."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change as an administrator asks for it.

    Raises:
        ValueError: no writes, more writes and checks than MAX_WRITES_PER_CHANGE, one key twice, a write that removes
            nothing, or no change id.
    """

    change_id: str
    """Random, chosen once for the change: the same id sent again returns the stored result and writes nothing."""
    epoch: str
    """The epoch that the expectations were read in."""
    actor: str
    reason: str
    action: str
    """What was asked for, such as `block.add`; for people who read the history."""
    writes: tuple[Write, ...]
    checks: tuple[Check, ...] = ()
    at_revision: int | None = None
    """Where the policy must stand, for a change that relies on more than it names; None: anywhere."""

    def __post_init__(self) -> None:
        if not self.change_id:
            raise ValueError("a change needs a change id: choose a random one for each change")
        if not self.writes:
            raise ValueError("a change needs at least one record to write")
        parts: tuple[Write | Check, ...] = (*self.writes, *self.checks)
        if len(parts) > MAX_WRITES_PER_CHANGE:
            raise ValueError(f"{len(parts)} records are too many for one change: split it at {MAX_WRITES_PER_CHANGE}")
        seen: set[RecordKey] = set()
        for part in parts:
            if part.key in seen:
                raise ValueError(f"{part.key} is twice in one change")
            seen.add(part.key)
        for write in self.writes:
            if write.expected is None and write.new is None:
                raise ValueError(f"{write.key}: nothing to remove; use a Check to make sure that it is not there")


@dataclass(frozen=True, slots=True)
class Replacement:
    """A change of any size: what some collections are to hold, and nothing else.

    It is written beside what counts, in small commands, and put in its place by one small script: nobody sees half of
    it, and a writer that dies on the way leaves nothing behind.

    Raises:
        ValueError: no collection, more than MAX_COLLECTIONS_REPLACED, a record of another collection, no change id.
    """

    change_id: str
    """As in Change."""
    epoch: str
    actor: str
    reason: str
    action: str
    contents: Mapping[str, Mapping[RecordKey, Record]]
    """Collection (see `keys.collection`) -> its records afterwards."""
    keeps: Callable[[Record, Record], bool] | None = None
    """Whether a record that is there (the first) stays as it is in place of the one wished; None: only an equal one."""

    def __post_init__(self) -> None:
        if not self.change_id:
            raise ValueError("a replacement needs a change id: choose a random one for each")
        if not 0 < len(self.contents) <= MAX_COLLECTIONS_REPLACED:
            raise ValueError(f"{len(self.contents)} collections: replace 1 to {MAX_COLLECTIONS_REPLACED} at once")


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What became of a change."""

    position: Position
    repeated: bool
    """Whether this change id had been applied before, so that nothing was written now."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What a replacement comes to, in records."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0

    @property
    def before(self) -> int:
        """How many there were."""
        return self.changed + self.removed + self.unchanged

    def __bool__(self) -> bool:
        """Tell whether there is anything to write."""
        return bool(self.added or self.changed or self.removed)


@dataclass(frozen=True, slots=True)
class Replaced:
    """What became of a replacement."""

    result: WriteResult | None
    """None: everything was as wished, or it was not approved, and nothing was written."""
    difference: Difference


@dataclass(frozen=True, slots=True)
class EventRecord:
    """What an event says of one record."""

    key: RecordKey
    previous: str | None
    """The stored text before."""
    new: str | None
    """The stored text after; None: removed."""
    record: Record | Unreadable | None
    """`new`, read."""


@dataclass(frozen=True, slots=True)
class Event:
    """A change as it was applied: the audit's record, and what followers apply."""

    position: Position
    previous_change_id: str
    actor: str
    reason: str
    action: str
    at: float
    """The store's own clock, seconds since the Unix epoch."""
    records: tuple[EventRecord, ...]
    counts: dict[str, int] = field(default_factory=dict)
    """After the change, the number of records in each collection that it touched (see `keys.collection`)."""
    parts: int = 0
    """Of a replacement, how many parts its records have, which `difference` reads; `records` is empty then."""
    size: int = 0
    """Of a replacement, how many records it changed."""


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """Records at one position: all of the policy, or those of the collections that were asked for."""

    position: Position
    records: list[tuple[RecordKey, Record | Unreadable]]
    edited: tuple[str, ...] = ()
    """Collections whose texts are not those that changes have left there: somebody wrote to them by hand."""


@dataclass(frozen=True, slots=True)
class VerifiedCounts:
    """A part of the collections, each of which holds as many records as changes have left there."""

    position: Position
    counts: Mapping[str, int]
    """Collection -> number of its records, for those that nobody changed meanwhile."""
    cursor: int
    """Where to go on; 0: that was the last part."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A collection that does not fit what changes have left there."""

    collection: str
    expected: int | None
    """The number of records that there should be; None: nobody knows any more."""
    found: int


@dataclass(frozen=True, slots=True)
class Examination:
    """What a look at everything found out."""

    position: Position | None
    """Where the policy says that it stands; None: it does not say."""
    problems: tuple[str, ...]
    """What is wrong with the bookkeeping, for people."""
    findings: tuple[Finding, ...]
    """Collections with records lost or added, or (same number) edited, behind the stream's back."""
    unreadable: tuple[str, ...]
    """Problems of single records."""
    counted: Mapping[str, tuple[int, int]]
    """Collection -> how many records it holds, and the sum of their shares (see `keys.share`)."""
    bookkeeping: tuple[str, ...]
    """What the bookkeeping said, so that `confirm` can tell whether it still does."""

    @property
    def records(self) -> int:
        """How many records there are in all."""
        return sum(count for count, _ in self.counted.values())

    @property
    def sound(self) -> bool:
        """Whether everything is as changes have left it."""
        return not self.problems and not self.findings


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the server that keeps the policy says of itself."""

    version: str
    """As Redis counts its versions; Valkey says which Redis it is compatible with."""
    role: str
    """`master`, or `slave`: Redis's words."""
    replicas: int
    """Connected ones."""
    min_replicas_to_write: int
    eviction_policy: str
    evicted_keys: int
    """Since the server started."""
    used_memory: int
    """In bytes."""
    max_memory: int
    """In bytes; 0: no limit."""
    append_only_file: bool
    save_points: str
    """When it writes snapshots; empty: never, or it does not say."""
    failing_writes: str
    """What of persistence failed last; empty: nothing."""
    user: str
    """As whom we are logged in."""
    time: float
    """Its clock, in seconds since the Unix epoch."""
    lazy_expire: str
    """`yes`, `no`, or empty: it does not say."""


@dataclass(frozen=True, slots=True)
class Durability:
    """What a change has to reach before it is called durable."""

    append_only_file: bool
    """Whether the server keeps one."""
    replicas: int
    """How many copies are connected."""

    def __str__(self) -> str:
        parts = ["the append-only file"] if self.append_only_file else []
        if self.replicas:
            parts.append(f"{self.replicas} replica{'s' if self.replicas > 1 else ''}")
        return " and ".join(parts)


@dataclass(frozen=True, slots=True)
class Report:
    """What a server says of itself."""

    replica: str
    """Its name, which no other server has."""
    process: str
    """Random, chosen once at the start of the process."""
    started_at: float
    """By the server's own clock, seconds since the Unix epoch."""
    position: Position | None
    """What it decides by; None: it has no policy yet."""
    lost: int = 0
    """Changes that this process had applied and that the store has lost since."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A server as the store knows it."""

    name: str
    report: Report | None
    """None: it cannot be read."""
    silent_seconds: float
    """How long ago it reported, by the store's own clock; 0 if that cannot be read."""
    problem: str = ""
    """Why the report cannot be read; names the offending text."""

    @property
    def unknown(self) -> bool:
        """Whether nobody knows what it decides by: it may be gone, or cut off and serving."""
        return self.report is None or self.silent_seconds > SILENT_SECONDS

    @property
    def vanished(self) -> bool:
        """Whether it has been silent for so long that it no longer counts."""
        return self.report is not None and self.silent_seconds > VANISHED_SECONDS


class Store(Protocol):
    """Policy at rest.

    Every method may raise StoreUnavailableError, StoreRefusedError and InconsistentStateError; all but `init`
    NotInitialisedError and UnknownFormatError.
    """

    async def init(self, *, actor: str, reason: str, change_id: str) -> WriteResult:
        """Create an empty policy with a new random epoch, at revision 1.

        Raises:
            AlreadyInitialisedError: there is one (unless this very change id created it: then its result).
        """

    async def position(self) -> Position:
        """Return where the policy stands now."""

    async def read(self, key: RecordKey) -> StoredRecord | None:
        """Return one record, or None."""

    async def read_many(self, keys: Iterable[RecordKey]) -> dict[RecordKey, StoredRecord | None]:
        """Return records, each as it was at some moment of the reading; None where there is none."""

    async def record_counts(self) -> dict[str, int]:
        """Return how many records each collection holds that holds any, as changes have left it."""

    async def verify(self, cursor: int) -> VerifiedCounts:
        """Compare the counts of some collections with what is there: cheap enough for every follower now and then.

        Args:
            cursor: 0, then what the last part returned.

        Raises:
            InconsistentStateError: they do not fit.
        """

    async def examine(self) -> Examination:
        """Read everything and say what is not as changes have left it. Damage is told, not raised.

        Raises:
            InconsistentStateError: there is something else under a key of the policy.
            RevisionChangedError: others keep changing it.
        """

    def records(self, name: str) -> AsyncIterator[tuple[RecordKey, str]]:
        """Yield the records of a collection and their texts as they are there, sound or not; one may come twice.

        Raises:
            InconsistentStateError: there is something else under its key.
        """

    async def confirm(
        self, examined: Examination, *, actor: str, reason: str, change_id: str, action: str = "confirm"
    ) -> WriteResult:
        """Make what is there the policy, under a new epoch: the end of an incident.

        Raises:
            EpochChangedError: the policy is no longer the one that was examined.
            ChangeIdUsedError: the change id belongs to another change.
        """

    async def facts(self) -> ServerFacts:
        """Return what the server says of itself; a policy it need not hold."""

    async def durability(self) -> Durability:
        """Return what a durable change would wait for.

        Raises:
            DurabilityError: there is nothing to wait for, or the server is too old to wait.
        """

    async def make_durable(self, result: WriteResult, durability: Durability, *, seconds: float) -> None:
        """Wait until a change has reached what it has to.

        Raises:
            NotDurableError: it did not within the time, or the server does not know the change any more.
        """

    async def apply(self, change: Change) -> WriteResult:
        """Apply a change in full or not at all.

        Raises:
            ConflictError: a record is not what the change expects.
            EpochChangedError: the policy is not the one that the change was prepared for.
            RevisionChangedError: somebody changed something, and the change demands that nobody has.
            ChangeIdUsedError: the change id was applied for another change.
            ValueError: a record does not belong under its key, or could not be read again.
        """

    async def replace(
        self, replacement: Replacement, approve: Callable[[Difference], bool] = lambda _: True
    ) -> Replaced:
        """Make collections hold what is wished, in full or not at all.

        Args:
            replacement: what is wished.
            approve: called with what is to be written, before anything is; False: leave it. May raise.

        Raises:
            CollectionTouchedError: somebody changed one of them meanwhile; ask again.
            EpochChangedError: the policy is not the one that the replacement was prepared for.
            ChangeIdUsedError: the change id was applied for another change.
            ValueError: a record does not belong into its collection, or could not be read again.
        """

    def difference(self, event: Event) -> AsyncIterator[tuple[EventRecord, ...]]:
        """Yield the records of a replacement, some at a time.

        Raises:
            PositionLostError: they are not kept any more: load in full.
        """

    async def load(self, only: Collection[str] | None = None) -> LoadedPolicy:
        """Return the records, consistent at one position.

        Args:
            only: the collections to read (see `keys.collection`); None: all.

        Raises:
            InconsistentStateError: records do not fit their counts.
        """

    async def events_after(self, position: Position, *, wait_seconds: float) -> list[Event]:
        """Return the events that follow, oldest first, at most EVENTS_AT_ONCE; wait for one up to `wait_seconds`, then
        return [].

        Raises:
            PositionLostError: the position is not in this history, or the events after it were trimmed.
        """

    async def history(self, *, count: int, before: int | None = None) -> list[Event]:
        """Return the newest events, newest first; with `before`, the newest that led to a lower revision."""

    async def history_after(self, revision: int, *, count: int) -> list[Event]:
        """Return the oldest events that led to a higher revision, oldest first."""

    async def find_change(self, change_id: str) -> Event | None:
        """Return the event of a change id that was applied; None when it is not known, or no longer."""

    async def report(self, report: Report, *, take_over: bool) -> bool:
        """Put down what a server says of itself, in place of what stood there under its name.

        It needs no policy, and changes none. Returns False, and writes nothing, when another process has reported
        under this name, unless it is to be taken over (the name is that process's successor's).
        """

    async def replicas(self) -> list[Replica]:
        """Return every server that has reported and was not forgotten, by name; it needs no policy."""

    async def forget(self, replica: str) -> bool:
        """Remove the report of a server, and tell whether there was one."""

    async def close(self) -> None:
        """Close the connections."""
