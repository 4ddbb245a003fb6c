"""What every store can do, in words that do not know Redis. Both stores pass one contract suite.

Every change is one small atomic write that names who, why and what it expects to replace. It raises the revision by
one and appends an event to the change stream, so whoever holds the state at revision N and reads the events after N
holds the same state as the store.
"""

from dataclasses import dataclass, field
from typing import Protocol

from authz_server.policy.records import Record, RecordKey, Unreadable

MAX_WRITES_PER_CHANGE = 1000
"""A change is one script in Redis, and no script may hold Redis up for more than some milliseconds."""


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
class WriteResult:
    """What became of a change."""

    position: Position
    repeated: bool
    """Whether this change id had been applied before, so that nothing was written now."""


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


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """All records at one position."""

    position: Position
    records: list[tuple[RecordKey, Record | Unreadable]]


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

    async def apply(self, change: Change) -> WriteResult:
        """Apply a change in full or not at all.

        Raises:
            ConflictError: a record is not what the change expects.
            EpochChangedError: the policy is not the one that the change was prepared for.
            ValueError: a record does not belong under its key, or could not be read again.
        """

    async def load(self) -> LoadedPolicy:
        """Return all records, consistent at one position.

        Raises:
            InconsistentStateError: records do not fit their counts.
        """

    async def events_after(self, position: Position, *, wait_seconds: float) -> list[Event]:
        """Return the events that follow, oldest first; wait for one up to `wait_seconds`, then return [].

        Raises:
            PositionLostError: the position is not in this history, or the events after it were trimmed.
        """

    async def history(self, *, count: int) -> list[Event]:
        """Return the newest events, newest first."""

    async def close(self) -> None:
        """Close the connections."""
