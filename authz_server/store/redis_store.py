"""Policy at rest in Redis or Valkey. The only module that imports redis.

Keys, all under one hash tag so that a script may touch them together in a cluster (`authz` is the prefix):

    {authz}:meta                hash    format, epoch, revision, last_change, records (how many there are in all)
    {authz}:counts              hash    collection -> `records revision sum` (see `keys.Count`)
    {authz}:lists, :scopes ...  hash    a collection (see `keys`): field -> JSON
    {authz}:changes             stream  one event for each revision N, under the id N-0
    {authz}:change:<change id>  string  the result of a change, kept for a day
    {authz}:difference:<change id>  hash    what a replacement changed: number of the part -> records, as in an event
    {authz}:differences         hash    change id -> revision, of the differences that are kept
    {authz}:staged:...          hash    what a writer is preparing; goes by itself after an hour
    {authz}:changes:until:...   stream  events that a confirmed incident set aside
    {authz}:replicas            hash    server -> what it has applied, and when (the only key that servers write to)

Every write is one script that compares before it sets. redis-py sends a command again when the connection broke
before the reply; the change id makes that harmless. No command works on more than some thousand records.
"""

import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import EqualJitterBackoff, NoBackoff

from authz_server.policy.access import Entry
from authz_server.policy.records import Record, RecordKey, Unreadable
from authz_server.store.address import RedisAddress
from authz_server.store.batches import batched
from authz_server.store.interface import (
    EVENTS_AT_ONCE,
    MAX_WRITES_PER_CHANGE,
    AlreadyInitialisedError,
    Change,
    ChangeIdUsedError,
    CollectionTouchedError,
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
    NotDurableError,
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
    StoreError,
    StoreRefusedError,
    StoreUnavailableError,
    UnknownFormatError,
    VerifiedCounts,
    Write,
    WriteResult,
)
from authz_server.store.keys import (
    NAMED_COLLECTIONS,
    REPLICAS,
    SUM_MODULUS,
    Count,
    change_digest,
    collection,
    count_difference,
    decode_record,
    decode_report,
    encode_event_records,
    encode_readable,
    encode_report,
    is_collection,
    parse_count,
    read_event,
    read_event_records,
    record_key_of,
    replacement_digest,
    reported_by,
    share,
    wished_texts,
)
from authz_server.turns import Turns, short_turns

T = TypeVar("T")
Client = Redis | RedisCluster

FORMAT = "1"
"""Of keys and texts; a version that changes either in a way that older ones would misread counts it up."""

_CONNECT_SECONDS = 2.0
_REPLY_SECONDS = 5.0
_RETRIES = 2
"""How often redis-py sends a command again; each time it may reconnect as often, so few is a lot."""
_HEALTH_CHECK_SECONDS = 15
_RECORDS_AT_ONCE = 20
"""Read at once of what a replacement changed: half a millisecond's work, and few objects."""
_SCAN_COUNT = 1000
"""Fields in one reply, about."""
_LOAD_ATTEMPTS = 5
_RESULT_SECONDS = 24 * 60 * 60
_RESULTS_SEARCHED = 1000
"""How many of the newest events are searched for a change id whose result is no longer kept."""
_STAGED_SECONDS = 60 * 60
"""What a writer prepared and never switched to goes by itself."""
_INIT_DIGEST = "init"
_WAITAOF_SINCE = (7, 2)
_NOT_NOW = (
    exceptions.ClusterDownError,
    exceptions.MovedError,
    exceptions.AskError,
    exceptions.TryAgainError,
    exceptions.SlotNotCoveredError,
    exceptions.ReadOnlyError,
)
"""What servers answer while another one takes over."""
_META_FIELDS = ("format", "epoch", "revision", "last_change", "records")


@dataclass(frozen=True, slots=True)
class _Standing:
    """What the meta key says."""

    position: Position
    records: int
    """How many there are in all collections; a lost counts key is noticed by it."""


@dataclass(slots=True)
class LeanPolicy:
    """A policy at one position."""

    position: Position
    collections: dict[str, dict[str, Any]]
    """Collection -> name -> what is kept of the record; of a readable entry, where it is to be lean, its expiry only
    (see `Entry.expiry`)."""
    edited: tuple[str, ...]
    """As in LoadedPolicy."""


_Read = Record | Unreadable


@dataclass(slots=True)
class _Table:
    """A collection while it is read."""

    records: dict[str, Any] = field(default_factory=dict)
    sum: int | None = 0
    """Of the shares of its texts; None when it is not known, as something came twice or changed meanwhile."""

    def add(self, name: str, text: str, record: Any) -> None:
        if name in self.records:
            self.sum = None
        elif self.sum is not None:
            self.sum = (self.sum + share(name, text)) % SUM_MODULUS
        self.records[name] = record

    def change(self, name: str, record: Any) -> None:
        self.sum = None
        if record is None:
            self.records.pop(name, None)
        else:
            self.records[name] = record


class RedisStore:
    """Policy at rest in one Redis or Valkey; see `interface.Store`.

    Args:
        where: an address, or the URL of one server as redis-py reads it (`redis://[user:password@]host:port/db`).
        prefix: what all keys begin with; two policies can share a server under two prefixes.
        client_name: what CLIENT LIST shows.
        max_events: how many events the change stream keeps; a follower that is further behind loads in full.
        keep_seconds: how long it keeps each event at least, even when there are more.

    Raises:
        ValueError: the address or the prefix cannot be read.
    """

    def __init__(
        self,
        where: str | RedisAddress,
        *,
        prefix: str = "authz",
        client_name: str = "authz-server",
        max_events: int = 100_000,
        keep_seconds: float = 0,
    ) -> None:
        if not prefix or any(sign in prefix for sign in "{} \t\r\n"):
            raise ValueError(f"{prefix!r} is not a prefix for keys: use letters, digits, '-', '_', ':'")
        self._tag = f"{{{prefix}}}"
        self._max_events = max_events
        self._keep_seconds = keep_seconds
        # People want a write to survive a hiccup. A follower must notice at once, and comes back anyway.
        patient = Retry(EqualJitterBackoff(cap=0.5, base=0.05), _RETRIES)
        self._address = where if isinstance(where, RedisAddress) else RedisAddress(where)
        self._client_name = client_name
        self._client = _connect(self._address, client_name, patient)
        # A cluster's client looks for the new primary only when it may try again.
        hasty = Retry(NoBackoff(), 1 if self._address.cluster else 0)
        self._follower = _connect(self._address, client_name, hasty)
        self._where = str(self._address)
        self._reply_seconds = _reply_seconds(self._follower)
        scripts = resources.files("authz_server.store") / "scripts"
        keep = (scripts / "keep.lua").read_text("utf-8")
        self._apply = self._client.register_script(keep + (scripts / "apply.lua").read_text("utf-8"))
        self._init = self._client.register_script((scripts / "init.lua").read_text("utf-8"))
        self._switch = self._client.register_script(keep + (scripts / "switch.lua").read_text("utf-8"))
        self._confirm = self._client.register_script((scripts / "confirm.lua").read_text("utf-8"))

    async def init(self, *, actor: str, reason: str, change_id: str) -> WriteResult:
        """See `Store.init`."""
        epoch = secrets.token_hex(16)
        keys = [self._key(name) for name in ("meta", "counts", "changes", f"change:{change_id}")]
        keys += [self._key(name) for name in NAMED_COLLECTIONS.values()]
        with self._errors():
            kind, *details = await self._init(
                keys=keys, args=[FORMAT, epoch, change_id, actor, reason, _RESULT_SECONDS, _INIT_DIGEST]
            )
        if kind == "applied":
            return WriteResult(Position(epoch, 1, change_id), repeated=False)
        if kind == "repeated":
            return self._repeated(details[0], change_id, _INIT_DIGEST)
        if kind == "present":
            raise AlreadyInitialisedError(f"there is a policy under {self._tag} in {self._where} already")
        raise self._inconsistent(details[0])

    async def position(self) -> Position:
        """See `Store.position`."""
        standing, _ = await self._look(self._client)
        return standing.position

    async def read(self, key: RecordKey) -> StoredRecord | None:
        """See `Store.read`."""
        _, (text,) = await self._look(self._client, lambda pipe: pipe.hget(self._key(collection(key)), key.name))
        return None if text is None else StoredRecord(decode_record(key, text), text)

    async def read_many(self, keys: Iterable[RecordKey]) -> dict[RecordKey, StoredRecord | None]:
        """See `Store.read_many`."""
        by_collection: dict[str, list[RecordKey]] = {}
        for key in dict.fromkeys(keys):
            by_collection.setdefault(collection(key), []).append(key)
        found: dict[RecordKey, StoredRecord | None] = {}
        for name, members in by_collection.items():
            for part in batched(members, _SCAN_COUNT):
                _, (texts,) = await self._look(
                    self._client,
                    lambda pipe, name=name, part=part: pipe.hmget(  # type: ignore[misc]
                        self._key(name), [key.name for key in part]
                    ),
                )
                for key, text in zip(part, texts, strict=True):
                    found[key] = None if text is None else StoredRecord(decode_record(key, text), text)
        return found

    async def record_counts(self) -> dict[str, int]:
        """See `Store.record_counts`."""
        await self.position()
        return {name: count.records for name, count in (await self._counts()).items()}

    async def apply(self, change: Change) -> WriteResult:
        """See `Store.apply`."""
        writes = [(write.key, write.expected, _new_text(write.key, write.new)) for write in change.writes]
        digest = change_digest(change, [after for _, _, after in writes])
        items = [(key, before, "delete" if after is None else "set", after) for key, before, after in writes]
        items += [(check.key, check.expected, "check", None) for check in change.checks]
        numbers: dict[str, int] = {}
        arguments: list[str | int] = []
        for key, before, act, after in items:
            number = numbers.setdefault(collection(key), len(numbers) + 1)
            arguments += [number, key.name, "absent" if before is None else "present", before or "", act, after or ""]
        fixed = [FORMAT, change.epoch, change.change_id, change.actor, change.reason, change.action]
        fixed += [encode_event_records(writes), str(self._max_events), str(_RESULT_SECONDS), digest]
        fixed += ["" if change.at_revision is None else str(change.at_revision), str(self._keep_seconds)]
        names = ["meta", "counts", "changes", f"change:{change.change_id}", *numbers]
        with self._errors():
            kind, *details = await self._apply(
                keys=[self._key(name) for name in names], args=[*fixed, *numbers, *arguments]
            )
        if kind == "conflict":
            key, before, _, _ = items[int(details[0]) - 1]
            raise ConflictError(key, before, details[1] if len(details) > 1 else None)
        if kind == "revision":
            raise RevisionChangedError(f"the policy is at revision {details[0]}, not {change.at_revision}")
        return await self._written(kind, details, change.epoch, change.change_id, digest)

    async def _written(self, kind: str, details: list[str], epoch: str, change_id: str, digest: str) -> WriteResult:
        """Read the reply of a script that writes."""
        match kind:
            case "applied":
                return WriteResult(Position(epoch, int(details[0]), change_id), repeated=False)
            case "repeated":
                return self._repeated(details[0], change_id, digest)
            case "epoch":
                raise self._epoch_changed(details[0])
            case "format":
                raise self._unknown_format(details[0])
            case "absent":
                await self.position()  # knows whether all is gone, or only the meta key
                raise NotInitialisedError(f"the policy under {self._tag} came into being meanwhile: repeat the change")
            case _:
                raise self._inconsistent(details[0])

    async def replace(
        self, replacement: Replacement, approve: Callable[[Difference], bool] = lambda _: True
    ) -> Replaced:
        """See `Store.replace`; a difference that one change can hold is written as one."""
        standing = await self.position()
        lines = await self._counts(replacement.contents)
        difference: list[tuple[RecordKey, str | None, str | None]] = []
        counted: dict[str, tuple[int, int]] = {}
        texts: dict[str, dict[str, str]] = {}
        for name, records in replacement.contents.items():
            if stray := next((key for key in records if collection(key) != name), None):
                raise ValueError(f"{stray} does not belong into {name}")
            old = {member: text async for member, text in self._scan(name)}
            new = texts[name] = wished_texts(replacement, name, old)
            difference += (
                (record_key_of(name, member), old.get(member), new.get(member))
                for member in sorted(old.keys() | new.keys())
                if old.get(member) != new.get(member)
            )
            counted[name] = (len(new), sum(share(*item) for item in new.items()) % SUM_MODULUS)
        told = count_difference(((before, after) for _, before, after in difference), sum(map(len, texts.values())))
        if not difference or not approve(told):
            return Replaced(None, told)
        if standing.epoch != replacement.epoch:
            raise self._epoch_changed(standing.epoch)
        if len(difference) <= MAX_WRITES_PER_CHANGE:
            contents = {key: record for records in replacement.contents.values() for key, record in records.items()}
            writes = tuple(Write(key, before, contents.get(key)) for key, before, _ in difference)
            change = Change(
                replacement.change_id,
                replacement.epoch,
                replacement.actor,
                replacement.reason,
                replacement.action,
                writes,
            )
            return Replaced(await self.apply(change), told)
        try:
            result = await self._switch_to(replacement, lines, texts, counted, difference)
        except StoreError:
            await self._give_up(replacement)
            raise
        with self._errors():
            await self._forget_differences()
        return Replaced(result, told)

    async def _switch_to(
        self,
        replacement: Replacement,
        lines: Mapping[str, Count],
        texts: Mapping[str, Mapping[str, str]],
        counted: Mapping[str, tuple[int, int]],
        difference: list[tuple[RecordKey, str | None, str | None]],
    ) -> WriteResult:
        """Stage the texts and the difference, and switch. The script compares the lines of the counts, which were read
        first: so nobody touched what the difference was taken of."""
        change_id = replacement.change_id
        for name, new in texts.items():
            await self._stage(f"staged:{change_id}:{name}", new.items())
        parts = [encode_event_records(part) for part in batched(difference, MAX_WRITES_PER_CHANGE)]
        numbered = ((str(number), part) for number, part in enumerate(parts))
        await self._stage(f"difference:{change_id}", numbered, at_once=1)
        names = ["meta", "counts", "changes", f"change:{change_id}", "differences", f"difference:{change_id}"]
        digest = replacement_digest(replacement.action, counted)
        arguments: list[str | int] = [FORMAT, replacement.epoch, change_id, replacement.actor, replacement.reason]
        arguments += [replacement.action, self._max_events, _RESULT_SECONDS, digest, len(parts), len(difference)]
        arguments.append(str(self._keep_seconds))
        for name, (number, total) in counted.items():
            names += [name, f"staged:{change_id}:{name}"]
            arguments += [name, str(lines.get(name, "")), number, total]
        with self._errors():
            kind, *details = await self._switch(keys=[self._key(name) for name in names], args=arguments)
        if kind == "touched":
            raise CollectionTouchedError(f"{details[0]} was changed by somebody else meanwhile: ask again")
        return await self._written(kind, details, replacement.epoch, change_id, digest)

    async def _give_up(self, replacement: Replacement) -> None:
        """Remove what was staged, if that can be; else it goes by itself. Of a replacement that was applied after all
        nothing is staged any more."""
        with suppress(StoreError), self._errors():
            for name in replacement.contents:
                await self._client.unlink(self._key(f"staged:{replacement.change_id}:{name}"))

    async def _stage(
        self, name: str, lines: Iterable[tuple[str, str]], *, at_once: int = MAX_WRITES_PER_CHANGE
    ) -> None:
        """Write a hash in small commands; one that its writer gives up goes by itself."""
        key = self._key(name)
        with self._errors():
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.execute_command("UNLINK", key)  # redis-py has no `unlink` in a pipeline to a cluster
                pipe.hset(key, "", "")
                pipe.expire(key, _STAGED_SECONDS)
                await pipe.execute()
            for part in batched(lines, at_once):
                await self._client.hset(key, mapping=dict(part))
            await self._client.hdel(key, "")

    async def _forget_differences(self) -> None:
        """Remove the differences whose events have been trimmed."""
        oldest: Any = await self._client.xrange(self._key("changes"), count=1)
        first = int(oldest[0][0].partition("-")[0]) if oldest else 0
        for change_id, revision in [line async for line in self._scan("differences")]:
            if int(revision) < first:
                await self._client.unlink(self._key(f"difference:{change_id}"))
                await self._client.hdel(self._key("differences"), change_id)

    async def difference(self, event: Event) -> AsyncIterator[tuple[EventRecord, ...]]:
        """See `Store.difference`."""
        key = self._key(f"difference:{event.position.change_id}")
        turns = Turns()
        for number in range(event.parts):
            with self._errors():
                text: Any = await self._follower.hget(key, str(number))
            if text is None:
                raise PositionLostError(f"what revision {event.position.revision} changed is not kept any more")
            try:
                for some in batched(read_event_records(text), _RECORDS_AT_ONCE):
                    yield tuple(some)
                    await turns.take()
            except ValueError as error:
                raise PositionLostError(f"what revision {event.position.revision} changed: {error}") from None

    async def load(self, only: Collection[str] | None = None) -> LoadedPolicy:
        """See `Store.load`."""
        loaded = await self._load(only, lambda record: record)
        records = [
            (record_key_of(name, member), record)
            for name, members in loaded.collections.items()
            for member, record in members.items()
        ]
        return LoadedPolicy(loaded.position, records, loaded.edited)

    async def load_lean(self) -> LeanPolicy:
        """Load all as `load` does, in a fraction of the memory.

        Raises:
            StoreError: as `load`.
        """
        return await self._load(None, lambda record: record.expiry if isinstance(record, Entry) else record)

    async def _load(self, only: Collection[str] | None, keep: Callable[[_Read], Any]) -> LeanPolicy:
        for _ in range(_LOAD_ATTEMPTS):
            try:
                return await self._load_once(only, keep)
            except PositionLostError as error:
                why = error
        raise self._inconsistent(f"the history, looked at {_LOAD_ATTEMPTS} times: {why}")

    async def _load_once(self, only: Collection[str] | None, keep: Callable[[_Read], Any]) -> LeanPolicy:
        """Scan while others write, then apply the events of that time on top: they hold whole records.

        Whatever a scan returned was true at some time between the two looks at the meta key, so after the events
        up to the second look every record is as it was there.
        """
        start, (newest,) = await self._look(self._follower, lambda pipe: pipe.xrevrange(self._key("changes"), count=1))
        revision = start.position.revision
        if not newest or newest[0][0] != f"{revision}-0" or newest[0][1].get("change") != start.position.change_id:
            raise PositionLostError(f"the change stream does not end with revision {revision}")
        lines = await self._counts(only)
        counts = {name: line.records for name, line in lines.items()}
        tables: dict[str, _Table] = {}
        for name in {*NAMED_COLLECTIONS.values(), *counts} if only is None else only:
            table = tables[name] = _Table()
            async for member, text in self._scan(name):
                table.add(member, text, keep(decode_record(record_key_of(name, member), text)))
        end, _ = await self._look(self._follower)
        position = start.position
        # It may run dry too early: a failover can go back in history.
        while position.revision < end.position.revision and (events := await self._events_now(position)):
            for event in events:
                if position.revision == end.position.revision:
                    break
                position = event.position
                if event.parts and not tables.keys().isdisjoint(event.counts):
                    raise PositionLostError(f"revision {position.revision} replaced what was being read")
                counts.update((name, count) for name, count in event.counts.items() if only is None or name in only)
                for record in event.records:
                    name = collection(record.key)
                    if only is None or name in only:
                        kept = None if record.record is None else keep(record.record)
                        tables.setdefault(name, _Table()).change(record.key.name, kept)
        if position != end.position:
            raise PositionLostError(f"the history in {self._where} is not the one that reading began with")
        found = {name: len(table.records) for name, table in tables.items()}
        wrong = sorted(name for name in {*found, *counts} if found.get(name, 0) != counts.get(name, 0))
        if wrong:
            details = "; ".join(f"{name}: {found.get(name, 0)} instead of {counts.get(name, 0)}" for name in wrong)
            raise self._inconsistent(f"the number of records in {details}")
        if only is None and sum(counts.values()) != end.records:
            raise self._inconsistent(f"the counts: {sum(counts.values())} records in all instead of {end.records}")
        edited = sorted(
            name for name, table in tables.items() if table.sum and name in lines and table.sum != lines[name].sum
        )
        return LeanPolicy(position, {name: table.records for name, table in tables.items()}, tuple(edited))

    async def _counts(self, only: Collection[str] | None = None) -> dict[str, Count]:
        counts = {}
        if only is None:
            lines = [line async for line in self._scan("counts")]
        else:
            lines = []
            for names in batched(only, _SCAN_COUNT):
                with self._errors():
                    texts: Any = await self._follower.hmget(self._key("counts"), names)
                lines += [(name, text) for name, text in zip(names, texts, strict=True) if text is not None]
        for name, text in lines:
            try:
                record_key_of(name, "")
                counts[name] = parse_count(text)
            except ValueError as error:
                raise self._inconsistent(f"the count of {name!r}: {error}") from None
        return counts

    async def verify(self, cursor: int) -> VerifiedCounts:
        """See `Store.verify`."""
        with self._errors():
            await self._look_for_the_primary()
        before, (page,) = await self._look(
            self._follower, lambda pipe: pipe.hscan(self._key("counts"), cursor, count=_SCAN_COUNT)
        )
        following, lines = int(page[0]), dict(page[1])
        if cursor == 0:
            lines = dict.fromkeys(NAMED_COLLECTIONS.values()) | lines
        names = list(lines)

        def lengths(pipe: Any) -> None:
            for name in names:
                pipe.hlen(self._key(name))

        after, replies = await self._look(self._follower, lengths, lambda pipe: pipe.hmget(self._key("counts"), names))
        *found, again = replies
        counts = {}
        wrong = []
        for name, number, text in zip(names, found, again, strict=True):
            if text != lines[name]:
                continue  # somebody changed it between the two looks
            try:
                counts[name] = 0 if text is None else parse_count(text).records
            except ValueError as error:
                raise self._inconsistent(f"the count of {name!r}: {error}") from None
            if number != counts[name]:
                wrong.append(f"{name}: {number} instead of {counts[name]}")
        if wrong:
            raise self._inconsistent(f"the number of records in {'; '.join(wrong)}")
        complete = cursor == 0 and following == 0 and before.position == after.position
        if complete and sum(counts.values()) != after.records:
            raise self._inconsistent(f"the counts: {sum(counts.values())} records in all instead of {after.records}")
        return VerifiedCounts(after.position, counts if before.position == after.position else {}, following)

    async def _look_for_the_primary(self) -> None:
        """Ask the Sentinels whether we still talk to the primary.

        One that was cut off from them goes on answering us, and would confirm what is no longer the newest.
        """
        if isinstance(self._follower, Redis) and isinstance(self._follower.connection_pool, SentinelConnectionPool):
            await self._follower.connection_pool.get_master_address()  # type: ignore[no-untyped-call]

    async def examine(self) -> Examination:
        """See `Store.examine`."""
        scanned: dict[str, tuple[str | None, tuple[int, int]]] = {}
        unreadable: dict[str, list[str]] = {}
        for _ in range(_LOAD_ATTEMPTS):
            meta, problems = await self._bookkeeping()
            lines = {name: text async for name, text in self._scan("counts")}
            names = {*NAMED_COLLECTIONS.values(), *filter(is_collection, lines), *await self._collections()}
            for name in names:
                if name not in scanned or scanned[name][0] != lines.get(name):
                    counted, unreadable[name] = await self._examine_collection(name)
                    scanned[name] = (lines.get(name), counted)
            if meta == (await self._bookkeeping())[0]:
                break
        else:
            raise RevisionChangedError(
                f"others keep changing the policy in {self._where}: ask again when they have finished"
            )
        findings = []
        expected_in_all = 0
        for name in sorted(scanned):
            records, total = scanned[name][1]
            try:
                line = parse_count(lines.get(name, "0 0 0"))
            except ValueError as error:
                problems.append(f"the count of {name}: {error}")
                findings.append(Finding(name, None, records))
                continue
            expected_in_all += line.records
            if (line.records, line.sum) != (records, total):
                findings.append(Finding(name, line.records if lines else None, records))
        problems += [f"the count of {name!r}, which is not a collection" for name in lines if not is_collection(name)]
        _, epoch, revision, change_id, in_all = meta
        if in_all.isdecimal() and int(in_all) != expected_in_all:
            problems.append(f"the counts are of {expected_in_all} records, and the meta key says {in_all}")
        known = bool(epoch and change_id and revision.isdecimal())
        return Examination(
            Position(epoch, int(revision), change_id) if known else None,
            tuple(problems),
            tuple(findings),
            tuple(problem for name in sorted(unreadable) for problem in unreadable[name]),
            {name: counted for name, (_, counted) in scanned.items() if counted[0]},
            meta,
        )

    async def _bookkeeping(self) -> tuple[tuple[str, ...], list[str]]:
        """Return the fields of the meta key ('' for one that is missing) and what is wrong with them or the stream."""
        with self._errors():
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.exists(*(self._key(name) for name in ("changes", "counts", *NAMED_COLLECTIONS.values())))
                pipe.hmget(self._key("meta"), *_META_FIELDS)
                pipe.xrevrange(self._key("changes"), count=1)
                others, found, newest = await pipe.execute()
        meta = tuple(text or "" for text in found)
        policy_format, _, revision, change_id, records = meta
        if not others and not any(meta):
            raise self._not_initialised()
        if policy_format not in ("", FORMAT):
            raise self._unknown_format(policy_format)
        if not any(meta):
            return meta, ["the meta key is gone"]
        problems = []
        if "" in meta or not revision.isdecimal() or not records.isdecimal():
            problems.append(f"the fields of the meta key: {dict(zip(_META_FIELDS, meta, strict=True))}")
        if not newest:
            problems.append("the change stream is gone")
        elif newest[0][0] != f"{revision}-0" or newest[0][1].get("change") != change_id:
            problems.append(f"the change stream ends with {newest[0][0]}, and the meta key says revision {revision}")
        return meta, problems

    async def _collections(self) -> set[str]:
        """Return the collections that are there, whether or not anything counts them."""
        found = set()
        with self._errors():
            async with self._primary() as connection:
                async for key in connection.scan_iter(match=self._key("*"), count=_SCAN_COUNT):
                    name = key.removeprefix(self._key(""))
                    if is_collection(name):
                        found.add(name)
        return found

    async def _examine_collection(self, name: str) -> tuple[tuple[int, int], list[str]]:
        shares: dict[str, int] = {}
        problems = []
        async for member, text in self._scan(name):
            shares[member] = share(member, text)
            record = decode_record(record_key_of(name, member), text)
            if isinstance(record, Unreadable):
                problems.append(record.problem)
        return (len(shares), sum(shares.values()) % SUM_MODULUS), problems

    async def records(self, name: str) -> AsyncIterator[tuple[RecordKey, str]]:
        """See `Store.records`."""
        async for member, text in self._scan(name):
            yield record_key_of(name, member), text

    async def confirm(
        self, examined: Examination, *, actor: str, reason: str, change_id: str, action: str = "confirm"
    ) -> WriteResult:
        """See `Store.confirm`."""
        epoch = secrets.token_hex(16)
        revision = examined.position.revision + 1 if examined.position else 0
        lines = {name: str(Count(records, revision, total)) for name, (records, total) in examined.counted.items()}
        anew = f"staged:{change_id}:counts"
        await self._stage(anew, lines.items())
        names = ("meta", "counts", "changes", f"change:{change_id}", anew, f"changes:until:{epoch}")
        arguments: list[str | int] = [FORMAT, epoch, change_id, actor, reason, _RESULT_SECONDS, action]
        arguments += [examined.records, len(lines)]
        with self._errors():
            kind, *details = await self._confirm(
                keys=[self._key(name) for name in names], args=[*arguments, *examined.bookkeeping]
            )
        match kind:
            case "applied":
                return WriteResult(Position(epoch, int(details[0]), change_id), repeated=False)
            case "repeated":
                return self._repeated(details[0], change_id, action)
            case _:
                raise EpochChangedError(f"the policy in {self._where} was changed while it was examined: ask again")

    async def facts(self) -> ServerFacts:
        """See `Store.facts`. What the user may not ask for is left empty."""
        with self._errors():
            async with self._primary() as connection:
                info = await _info(connection, "server", "replication", "persistence", "memory", "stats")
                seconds, microseconds = await connection.time()
                user = await connection.acl_whoami()
                config: dict[Any, Any] = {}
                with suppress(exceptions.NoPermissionError):
                    config = await connection.config_get("save", "lazyfree-lazy-expire", "min-replicas-to-write")
        failing = [
            f"{name} is {info[name]}"
            for name in ("rdb_last_bgsave_status", "aof_last_bgrewrite_status", "aof_last_write_status")
            if info.get(name, "ok") != "ok"
        ]
        return ServerFacts(
            version=str(info.get("redis_version", "0")),
            role=str(info.get("role", "")),
            replicas=_online(info),
            min_replicas_to_write=int(config.get("min-replicas-to-write", 0)),
            eviction_policy=str(info.get("maxmemory_policy", "")),
            evicted_keys=int(info.get("evicted_keys", 0)),
            used_memory=int(info.get("used_memory", 0)),
            max_memory=int(info.get("maxmemory", 0)),
            append_only_file=str(info.get("aof_enabled")) == "1",
            save_points=config.get("save", ""),
            failing_writes=", ".join(failing),
            user=str(user),
            time=seconds + microseconds / 1e6,
            lazy_expire=config.get("lazyfree-lazy-expire", ""),
        )

    async def durability(self) -> Durability:
        """See `Store.durability`."""
        with self._errors():
            async with self._primary() as connection:
                info = await _info(connection, "server", "replication", "persistence")
        replicas = _online(info)
        append_only_file = str(info.get("aof_enabled")) == "1"
        version = str(info.get("redis_version", "0"))
        if append_only_file and tuple(map(int, re.findall(r"\d+", version)[:2])) < _WAITAOF_SINCE:
            raise DurabilityError(
                f"{self._where} is version {version}: --durable needs WAITAOF, which is there since Redis 7.2. "
                "Nothing was written; without --durable it can be"
            )
        if not append_only_file and not replicas:
            raise DurabilityError(
                f"{self._where} keeps no append-only file and has no replica: nothing written there can be called "
                "durable. Nothing was written; set `appendonly yes`, or add a replica"
            )
        return Durability(append_only_file, replicas)

    async def make_durable(self, result: WriteResult, durability: Durability, *, seconds: float) -> None:
        """See `Store.make_durable`.

        A write on the connection that waits makes WAIT and WAITAOF speak of all that was written before, by whomever.
        """
        key = self._key(f"change:{result.position.change_id}")
        milliseconds = max(1, int(seconds * 1000))
        with self._errors():
            async with self._primary() as connection:
                known = await connection.expire(key, _RESULT_SECONDS)
                copies: int = await connection.wait(durability.replicas, milliseconds)
                local = 1
                if durability.append_only_file:
                    local = (await connection.waitaof(1, 0, milliseconds))[0]
        if not known:
            raise NotDurableError(
                f"{self._where} does not know the change {result.position.change_id} any more: it was lost, as in a "
                "failover. Send it again"
            )
        if copies < durability.replicas or not local:
            raise NotDurableError(
                f"revision {result.position.revision} was applied, and within {seconds:g} seconds it reached "
                f"{copies} of {durability.replicas} replicas and {'' if local else 'not '}the append-only file"
            )

    async def events_after(self, position: Position, *, wait_seconds: float) -> list[Event]:
        """See `Store.events_after`; it may return [] some seconds earlier than asked."""
        if wait_seconds <= 0:
            return await self._events_now(position)
        with self._errors():
            replies: Any = await self._follower.xread(
                {self._key("changes"): f"{position.revision}-0"},
                count=EVENTS_AT_ONCE,
                # The reply must come before redis-py gives the connection up.
                block=max(1, int(min(wait_seconds, self._reply_seconds * 0.8) * 1000)),
            )
        if not replies:
            return await self._events_now(position)
        return await self._events(position, replies[0][1])

    async def _events_now(self, position: Position) -> list[Event]:
        """Return the events that are there now, or [] once it is proven that none follows.

        The proof costs little, as followers ask for it every few seconds: either the meta key still names our own
        change, or the next event names it as the one before.
        """
        standing, (entries,) = await self._look(
            self._follower,
            lambda pipe: pipe.xrange(self._key("changes"), min=f"({position.revision}-0", count=EVENTS_AT_ONCE),
        )
        events = await self._events(position, entries)
        if not events and standing.position != position:
            raise PositionLostError(
                f"{self._where} is at revision {standing.position.revision} of epoch {standing.position.epoch} "
                f"and does not know revision {position.revision} of epoch {position.epoch} as we do"
            )
        return events

    async def _events(self, position: Position, entries: list[tuple[str, dict[str, str]]]) -> list[Event]:
        """Read stream entries and prove that they follow on each other and on the position."""
        turns = short_turns(behind=len(entries) >= EVENTS_AT_ONCE)
        events: list[Event] = []
        for entry_id, fields in entries:
            await turns.take()
            try:
                event = await _read_event(entry_id, fields, turns)
            except ValueError as error:
                raise PositionLostError(f"the event {entry_id} in {self._where} cannot be read: {error}") from None
            follows = (position.epoch, position.revision + 1, position.change_id)
            if (event.position.epoch, event.position.revision, event.previous_change_id) != follows:
                raise PositionLostError(
                    f"the event {entry_id} in {self._where} does not follow on revision {position.revision}"
                )
            position = event.position
            events.append(event)
        return events

    async def history(self, *, count: int, before: int | None = None) -> list[Event]:
        """See `Store.history`."""
        return await self._history(
            count,
            before,
            lambda some, last, pipe: pipe.xrevrange(
                self._key("changes"), max="+" if last is None else f"({last}-0", count=some
            ),
        )

    async def history_after(self, revision: int, *, count: int) -> list[Event]:
        """See `Store.history_after`."""
        return await self._history(
            count,
            revision,
            lambda some, last, pipe: pipe.xrange(self._key("changes"), min=f"({last}-0", count=some),
        )

    async def _history(
        self, count: int, last: int | None, ask: Callable[[int, int | None, Any], object]
    ) -> list[Event]:
        """Read events in small replies; `ask` is told how many, and the revision that they follow on, and a pipe."""
        events: list[Event] = []
        while len(events) < count:
            some = min(EVENTS_AT_ONCE, count - len(events))
            _, (entries,) = await self._look(self._client, partial(ask, some, last))
            events += await self._read_events(entries)
            if len(entries) < some:
                break
            last = events[-1].position.revision
        return events

    async def find_change(self, change_id: str) -> Event | None:
        """See `Store.find_change`."""
        _, (result,) = await self._look(self._client, lambda pipe: pipe.get(self._key(f"change:{change_id}")))
        if result is None:
            events = await self.history(count=_RESULTS_SEARCHED)
        else:
            entry_id = f"{_position_of(result, change_id).revision}-0"
            _, (entries,) = await self._look(
                self._client, lambda pipe: pipe.xrange(self._key("changes"), min=entry_id, max=entry_id)
            )
            events = await self._read_events(entries)
        return next((event for event in events if event.position.change_id == change_id), None)

    async def _read_events(self, entries: Sequence[tuple[str, dict[str, str]]]) -> list[Event]:
        turns = Turns()
        try:
            return [await _read_event(entry_id, fields, turns) for entry_id, fields in entries]
        except ValueError as error:
            raise self._inconsistent(f"an event in the change stream: {error}") from None

    async def report(self, report: Report, *, take_over: bool) -> bool:
        """See `Store.report`. No script: a server needs no more than the right to HGET and HSET this one key."""
        key = self._key(REPLICAS)
        with self._errors():
            now, before = await self._time_and_report(key, report.replica)
            if before is not None and not take_over and not reported_by(report, before):
                return False
            await self._client.hset(key, report.replica, encode_report(report, now))
        return True

    async def replicas(self) -> list[Replica]:
        """See `Store.replicas`."""
        with self._errors():
            texts: Any = await self._client.hgetall(self._key(REPLICAS))
            now = await self._time()
        return [decode_report(name, texts[name], now) for name in sorted(texts)]

    async def _time_and_report(self, key: str, replica: str) -> tuple[float, str | None]:
        """Return what `_time` does, and what a server has reported last; at once, as each position is reported."""
        if isinstance(self._client, RedisCluster):  # its pipelines take no commands without a key
            known: Any = await self._client.hget(key, replica)
            return await self._time(), known
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hget(key, replica)
            moment, before = await pipe.execute()
        return _seconds(moment), before

    async def _time(self) -> float:
        """Return the clock of the server that holds our keys, in seconds since the Unix epoch."""
        if isinstance(self._client, RedisCluster):
            await self._client.initialize()
            node = self._client.get_node_from_key(self._key("meta"))
            reply: Any = await self._client.execute_command("TIME", target_nodes=node)
        else:
            reply = await self._client.time()
        return _seconds(reply)

    async def forget(self, replica: str) -> bool:
        """See `Store.forget`."""
        with self._errors():
            return bool(await self._client.hdel(self._key(REPLICAS), replica))

    async def close(self) -> None:
        """See `Store.close`."""
        for client in (self._client, self._follower):
            await client.aclose()
            if isinstance(client, Redis) and isinstance(client.connection_pool, SentinelConnectionPool):
                await client.connection_pool.sentinel_manager.aclose()

    @asynccontextmanager
    async def _primary(self) -> AsyncIterator["Redis"]:
        """Open a connection to the server that takes our writes, for what is asked of a server and not of keys."""
        if not isinstance(self._client, RedisCluster):
            async with self._client.client() as connection:
                yield connection
            return
        await self._client.initialize()
        node = self._client.get_node_from_key(self._key("meta"))
        if node is None:
            raise exceptions.ConnectionError("no node of the cluster holds the policy's keys")
        options = _options(self._address, self._client_name, Retry(NoBackoff(), 0))
        async with Redis(host=node.host, port=int(node.port), single_connection_client=True, **options) as connection:
            yield connection

    async def _look(self, client: "Client", *more: Callable[[Any], object]) -> tuple[_Standing, list[Any]]:
        """Read the meta key, then the replies of `more`, which may already know of a later change.

        No MULTI: Redis 7.0 refuses even reads in it while its memory is full. What must be there with the meta key
        is asked for after it, what must not be there without it before.
        """
        with self._errors():
            async with client.pipeline(transaction=False) as pipe:
                pipe.exists(*(self._key(name) for name in ("changes", "counts", *NAMED_COLLECTIONS.values())))
                pipe.hmget(self._key("meta"), *_META_FIELDS)
                pipe.exists(self._key("changes"))
                pipe.exists(self._key("counts"))
                for command in more:
                    command(pipe)
                others, meta, stream, counts, *answers = await pipe.execute()
        return self._standing(meta, stream=bool(stream), counts=bool(counts), others=bool(others)), answers

    def _standing(self, meta: list[str | None], *, stream: bool, counts: bool, others: bool) -> _Standing:
        policy_format, epoch, revision, change_id, records = meta
        if policy_format is None:
            if others:
                raise self._inconsistent("the meta key, which is gone while others are there")
            raise self._not_initialised()
        if policy_format != FORMAT:
            raise self._unknown_format(policy_format)
        if not (epoch and change_id and revision and revision.isdecimal() and records and records.isdecimal()):
            raise self._inconsistent(f"the fields of the meta key: {dict(zip(_META_FIELDS, meta, strict=True))}")
        if not stream:
            raise self._inconsistent("the change stream, which is gone")
        if int(records) and not counts:
            raise self._inconsistent("the counts, which are gone")
        return _Standing(Position(epoch, int(revision), change_id), int(records))

    async def _scan(self, name: str) -> AsyncIterator[tuple[str, str]]:
        """Yield the fields of a hash in small replies; what changes meanwhile may or may not be seen."""
        cursor = 0
        while True:
            with self._errors(name):
                reply: Any = await self._follower.hscan(self._key(name), cursor, count=_SCAN_COUNT)
            cursor, page = reply
            for name_in_it, text in page.items():
                yield name_in_it, text
            if cursor == 0:
                return

    def _key(self, name: str) -> str:
        return f"{self._tag}:{name}"

    def _inconsistent(self, what: str, first: str = "") -> InconsistentStateError:
        return InconsistentStateError(
            f"the policy under {self._tag} in {self._where} is damaged; what does not fit: {what}. "
            f"Nothing was changed: {first}restore a backup, or make what is left the policy (`authzctl confirm`)"
        )

    def _not_initialised(self) -> NotInitialisedError:
        return NotInitialisedError(
            f"there is no policy under {self._tag} in {self._where}: if there was one, restore it from a backup; "
            "if not, run `authzctl init`, which makes an empty one that lets everybody in"
        )

    def _epoch_changed(self, found: str) -> EpochChangedError:
        return EpochChangedError(
            f"the policy under {self._tag} in {self._where} was replaced as a whole meanwhile (epoch {found}): "
            "look at it again, then repeat the change"
        )

    def _repeated(self, stored: str, change_id: str, digest: str) -> WriteResult:
        position = _position_of(stored, change_id)
        if stored.rpartition(" ")[2] != digest:
            raise ChangeIdUsedError(
                f"the change id {change_id!r} was applied as revision {position.revision}, for a change that is not "
                "exactly this one. Nothing was written now: choose another change id"
            )
        return WriteResult(position, repeated=True)

    def _unknown_format(self, found: str) -> UnknownFormatError:
        return UnknownFormatError(
            f"the policy under {self._tag} in {self._where} has format {found!r}; this version reads {FORMAT!r}"
        )

    @contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        """Say in the interface's errors what redis-py says in its own; `name` is of the key that is read."""
        try:
            yield
        except _NOT_NOW as error:
            raise StoreUnavailableError(f"{self._where} cannot be used now: {error}") from error
        except exceptions.ResponseError as error:
            if "WRONGTYPE" in str(error):  # hides in the middle of what a pipeline or a script says
                raise self._inconsistent(
                    f"{name or 'a key'}, which is something else: another product's? ({error})",
                    "take that key away (RENAME), then ",
                ) from error
            raise StoreRefusedError(f"{self._where} refused: {error}") from error
        except (exceptions.AuthenticationError, exceptions.AuthorizationError) as error:
            raise StoreRefusedError(f"{self._where} refused: {error}") from error
        except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
            raise StoreUnavailableError(f"{self._where} cannot be reached: {error}") from error
        except (exceptions.RedisError, exceptions.RedisClusterException) as error:
            raise StoreError(f"{self._where}: {error!r}") from error


def _connect(address: RedisAddress, client_name: str, retry: Retry) -> "Client":
    """Return a client that has not connected yet; ValueError when the address cannot be used."""
    options = _options(address, client_name, retry)
    if address.cluster:
        nodes = [ClusterNode(host, port) for host, port in address.cluster]
        return RedisCluster(startup_nodes=nodes, **options)
    if address.sentinels:
        credentials = {"username": address.sentinel_username or None, "password": address.sentinel_password or None}
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            address.sentinels, sentinel_kwargs=options | credentials
        )
        client: Redis = sentinel.master_for(address.primary, db=address.database, **options)
        return client
    return _connect_url(address, options)


def _connect_url(address: RedisAddress, options: dict[str, Any]) -> "Redis":
    try:
        parts = urlsplit(address.url)
        if parts.scheme in ("redis", "rediss") and not re.fullmatch(r"(/[0-9]*)?", parts.path):
            raise ValueError("redis-py would ignore it, and the password may have a '/'")  # noqa: TRY301
        client: Redis = Redis.from_url(address.url, **options)
        # Connects to nothing, but refuses unknown options now and not at the first command.
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, exceptions.RedisError):
        # Its message may hold a part of a password that was not escaped.
        raise ValueError(
            "the URL of Redis cannot be read: write redis://[user:password@]host:port/db, or rediss:// for TLS; "
            "signs such as '/', '@', '#' in a password are written %2F, %40, %23"
        ) from None
    return client


def _options(address: RedisAddress, client_name: str, retry: Retry) -> dict[str, Any]:
    """Return what every connection is made with."""
    options: dict[str, Any] = {
        "protocol": 2,
        "decode_responses": True,
        # Texts that somebody wrote by hand need not be UTF-8: they arrive as records that cannot be read.
        "encoding_errors": "surrogateescape",
        "socket_connect_timeout": _CONNECT_SECONDS,
        "socket_timeout": _REPLY_SECONDS,
        "health_check_interval": _HEALTH_CHECK_SECONDS,
        "client_name": client_name,
        "retry": retry,
    }
    if not address.url:
        options |= {"username": address.username or None, "password": address.password or None}
        options["ssl"] = address.tls is not None
    if address.tls is not None:
        files = {
            "ssl_ca_certs": address.tls.ca,
            "ssl_certfile": address.tls.certificate,
            "ssl_keyfile": address.tls.key,
        }
        options |= {name: str(path) for name, path in files.items() if path is not None}
    return options


def _reply_seconds(client: "Client") -> float:
    """Return how long the client waits for a reply; a URL may say so itself."""
    if isinstance(client, RedisCluster):
        return _REPLY_SECONDS
    seconds: float = client.connection_pool.connection_kwargs["socket_timeout"]
    return seconds


async def _info(connection: "Redis", *sections: str) -> dict[str, Any]:
    """Return sections of INFO; one by one, as Redis 7.0 takes several and others before it do not."""
    info: dict[str, Any] = {}
    for section in sections:
        info |= await connection.info(section)
    return info


def _online(info: Mapping[str, Any]) -> int:
    """Return how many replicas INFO says are connected and up to date."""
    return sum(
        isinstance(value, dict) and value.get("state") == "online"
        for name, value in info.items()
        if re.fullmatch(r"slave\d+", name)
    )


def _new_text(key: RecordKey, record: Record | None) -> str | None:
    return None if record is None else encode_readable(key, record)


def _position_of(result: str, change_id: str) -> Position:
    """Read the stored result of a change."""
    epoch, revision, _ = result.split(" ")
    return Position(epoch, int(revision), change_id)


def _seconds(moment: Sequence[Any]) -> float:
    """Return the reply to TIME in seconds since the Unix epoch."""
    return int(moment[0]) + int(moment[1]) / 1e6


async def _read_event(entry_id: str, fields: Mapping[str, str], turns: Turns) -> Event:
    """Read a stream entry, ValueError when it is not one of ours; a follower answers checks meanwhile."""
    records = []
    for record in read_event_records(fields.get("records", "")):
        records.append(record)
        await turns.take()
    return read_event(entry_id, fields, tuple(records))
