"""Policy at rest in Redis or Valkey. The only module that imports redis.

Keys, all under one hash tag so that a script may touch them together in a cluster (`authz` is the prefix):

    {authz}:meta                hash    format, epoch, revision, last_change, records (how many there are in all)
    {authz}:counts              hash    collection -> number of its records
    {authz}:lists, :scopes ...  hash    a collection (see `keys`): field -> JSON
    {authz}:changes             stream  one event for each revision N, under the id N-0
    {authz}:change:<change id>  string  the result of a change, kept for a day

Every write is one script that compares before it sets. redis-py sends a command again when the connection broke
before the reply; the change id makes that harmless. No command works on more than some thousand records.
"""

import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff, NoBackoff

from authz_server.policy.records import Record, RecordKey, Unreadable
from authz_server.store.interface import (
    AlreadyInitialisedError,
    Change,
    ConflictError,
    EpochChangedError,
    Event,
    InconsistentStateError,
    LoadedPolicy,
    NotInitialisedError,
    Position,
    PositionLostError,
    StoredRecord,
    StoreError,
    StoreRefusedError,
    StoreUnavailableError,
    UnknownFormatError,
    WriteResult,
)
from authz_server.store.keys import (
    NAMED_COLLECTIONS,
    collection,
    decode_record,
    encode_event_records,
    encode_readable,
    parse_event_records,
    record_key_of,
)

FORMAT = "1"
"""Of keys and texts; a version that changes either in a way that older ones would misread counts it up."""

_CONNECT_SECONDS = 2.0
_REPLY_SECONDS = 5.0
_RETRIES = 2
"""How often redis-py sends a command again; each time it may reconnect as often, so few is a lot."""
_HEALTH_CHECK_SECONDS = 15
_PAGE = 64
"""Events in one reply; the largest events are some hundred kilobytes."""
_SCAN_COUNT = 1000
"""Fields in one reply, about."""
_LOAD_ATTEMPTS = 5
_RESULT_SECONDS = 24 * 60 * 60
_META_FIELDS = ("format", "epoch", "revision", "last_change", "records")


@dataclass(frozen=True, slots=True)
class _Standing:
    """What the meta key says."""

    position: Position
    records: int
    """How many there are in all collections; a lost counts key is noticed by it."""


class RedisStore:
    """Policy at rest in one Redis or Valkey; see `interface.Store`.

    Args:
        url: `redis://[user:password@]host:port/db`, `rediss://...` for TLS, or `unix://...`, as redis-py reads them.
        prefix: what all keys begin with; two policies can share a server under two prefixes.
        client_name: what CLIENT LIST shows.
        max_events: about how many events the change stream keeps; a follower that is further behind loads in full.

    Raises:
        ValueError: the URL or the prefix cannot be read.
    """

    def __init__(
        self, url: str, *, prefix: str = "authz", client_name: str = "authz-server", max_events: int = 100_000
    ) -> None:
        if not prefix or any(sign in prefix for sign in "{} \t\r\n"):
            raise ValueError(f"{prefix!r} is not a prefix for keys: use letters, digits, '-', '_', ':'")
        self._tag = f"{{{prefix}}}"
        self._max_events = max_events
        # People want a write to survive a hiccup. A follower must notice at once, and comes back anyway.
        patient = Retry(EqualJitterBackoff(cap=0.5, base=0.05), _RETRIES)
        self._client = _connect(url, client_name, patient)
        self._follower = _connect(url, client_name, Retry(NoBackoff(), 0))
        self._where = _where(self._client)
        self._reply_seconds: float = self._follower.connection_pool.connection_kwargs["socket_timeout"]
        scripts = resources.files("authz_server.store") / "scripts"
        self._apply = self._client.register_script((scripts / "apply.lua").read_text("utf-8"))
        self._init = self._client.register_script((scripts / "init.lua").read_text("utf-8"))

    async def init(self, *, actor: str, reason: str, change_id: str) -> WriteResult:
        """See `Store.init`."""
        epoch = secrets.token_hex(16)
        keys = [self._key(name) for name in ("meta", "counts", "changes", f"change:{change_id}")]
        keys += [self._key(name) for name in NAMED_COLLECTIONS.values()]
        with self._errors():
            kind, *details = await self._init(
                keys=keys, args=[FORMAT, epoch, change_id, actor, reason, _RESULT_SECONDS]
            )
        if kind == "applied":
            return WriteResult(Position(epoch, 1, change_id), repeated=False)
        if kind == "repeated":
            return _repeated(details[0], change_id)
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

    async def apply(self, change: Change) -> WriteResult:
        """See `Store.apply`."""
        writes = [(write.key, write.expected, _new_text(write.key, write.new)) for write in change.writes]
        items = [(key, before, "delete" if after is None else "set", after) for key, before, after in writes]
        items += [(check.key, check.expected, "check", None) for check in change.checks]
        numbers: dict[str, int] = {}
        arguments: list[str | int] = []
        for key, before, act, after in items:
            number = numbers.setdefault(collection(key), len(numbers) + 1)
            arguments += [number, key.name, "absent" if before is None else "present", before or "", act, after or ""]
        fixed = [FORMAT, change.epoch, change.change_id, change.actor, change.reason, change.action]
        fixed += [encode_event_records(writes), str(self._max_events), str(_RESULT_SECONDS)]
        names = ["meta", "counts", "changes", f"change:{change.change_id}", *numbers]
        with self._errors():
            kind, *details = await self._apply(
                keys=[self._key(name) for name in names], args=[*fixed, *numbers, *arguments]
            )
        match kind:
            case "applied":
                return WriteResult(Position(change.epoch, int(details[0]), change.change_id), repeated=False)
            case "repeated":
                return _repeated(details[0], change.change_id)
            case "conflict":
                key, before, _, _ = items[int(details[0]) - 1]
                raise ConflictError(key, before, details[1] if len(details) > 1 else None)
            case "epoch":
                raise EpochChangedError(
                    f"the policy was replaced as a whole meanwhile (epoch {details[0]}, not {change.epoch}): "
                    "look at it again, then repeat the change"
                )
            case "format":
                raise self._unknown_format(details[0])
            case "absent":
                await self.position()  # knows whether all is gone, or only the meta key
                raise NotInitialisedError(f"the policy under {self._tag} came into being meanwhile: repeat the change")
            case _:
                raise self._inconsistent(details[0])

    async def load(self) -> LoadedPolicy:
        """See `Store.load`."""
        for _ in range(_LOAD_ATTEMPTS):
            try:
                return await self._load_once()
            except PositionLostError as error:
                why = error
        raise self._inconsistent(f"the history, looked at {_LOAD_ATTEMPTS} times: {why}")

    async def _load_once(self) -> LoadedPolicy:
        """Scan while others write, then apply the events of that time on top: they hold whole records.

        Whatever a scan returned was true at some time between the two looks at the meta key, so after the events
        up to the second look every record is as it was there.
        """
        start, (newest,) = await self._look(self._follower, lambda pipe: pipe.xrevrange(self._key("changes"), count=1))
        revision = start.position.revision
        if not newest or newest[0][0] != f"{revision}-0" or newest[0][1].get("change") != start.position.change_id:
            raise PositionLostError(f"the change stream does not end with revision {revision}")
        counts = await self._counts()
        tables: dict[str, dict[str, Record | Unreadable]] = {}
        for name in {*NAMED_COLLECTIONS.values(), *counts}:
            tables[name] = {
                field: decode_record(record_key_of(name, field), text) async for field, text in self._scan(name)
            }
        end, _ = await self._look(self._follower)
        position = start.position
        # It may run dry too early: a failover can go back in history.
        while position.revision < end.position.revision and (events := await self._events_now(position)):
            for event in events:
                if position.revision == end.position.revision:
                    break
                position = event.position
                counts.update(event.counts)
                for record in event.records:
                    table = tables.setdefault(collection(record.key), {})
                    if record.record is None:
                        table.pop(record.key.name, None)
                    else:
                        table[record.key.name] = record.record
        if position != end.position:
            raise PositionLostError(f"the history in {self._where} is not the one that reading began with")
        found = {name: len(table) for name, table in tables.items()}
        wrong = sorted(name for name in {*found, *counts} if found.get(name, 0) != counts.get(name, 0))
        if wrong:
            details = "; ".join(f"{name}: {found.get(name, 0)} instead of {counts.get(name, 0)}" for name in wrong)
            raise self._inconsistent(f"the number of records in {details}")
        if sum(counts.values()) != end.records:
            raise self._inconsistent(f"the counts: {sum(counts.values())} records in all instead of {end.records}")
        records = [
            (record_key_of(name, field), record) for name, table in tables.items() for field, record in table.items()
        ]
        return LoadedPolicy(position, records)

    async def _counts(self) -> dict[str, int]:
        counts = {}
        async for name, text in self._scan("counts"):
            try:
                record_key_of(name, "")
                counts[name] = int(text)
            except ValueError as error:
                raise self._inconsistent(f"the count of {name!r}: {error}") from None
        return counts

    async def events_after(self, position: Position, *, wait_seconds: float) -> list[Event]:
        """See `Store.events_after`; it may return [] some seconds earlier than asked."""
        events = await self._events_now(position)
        # The reply must come before redis-py gives the connection up.
        wait_seconds = min(wait_seconds, self._reply_seconds * 0.8)
        if events or wait_seconds <= 0:
            return events
        with self._errors():
            replies: Any = await self._follower.xread(
                {self._key("changes"): f"{position.revision}-0"}, count=_PAGE, block=max(1, int(wait_seconds * 1000))
            )
        if not replies:
            return await self._events_now(position)
        return self._events(position, replies[0][1])

    async def _events_now(self, position: Position) -> list[Event]:
        """Return the events that are there now, or [] once it is proven that none follows.

        The proof costs little, as followers ask for it often: either the meta key still names our own change, or the
        next event names it as the one before.
        """
        standing, (entries,) = await self._look(
            self._follower,
            lambda pipe: pipe.xrange(self._key("changes"), min=f"({position.revision}-0", count=_PAGE),
        )
        events = self._events(position, entries)
        if not events and standing.position != position:
            raise PositionLostError(
                f"{self._where} is at revision {standing.position.revision} of epoch {standing.position.epoch} "
                f"and does not know revision {position.revision} of epoch {position.epoch} as we do"
            )
        return events

    def _events(self, position: Position, entries: list[tuple[str, dict[str, str]]]) -> list[Event]:
        """Read stream entries and prove that they follow on each other and on the position."""
        events = []
        for entry_id, fields in entries:
            try:
                event = _event(entry_id, fields)
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

    async def history(self, *, count: int) -> list[Event]:
        """See `Store.history`."""
        _, (entries,) = await self._look(self._client, lambda pipe: pipe.xrevrange(self._key("changes"), count=count))
        try:
            return [_event(entry_id, fields) for entry_id, fields in entries]
        except ValueError as error:
            raise self._inconsistent(f"an event in the change stream: {error}") from None

    async def close(self) -> None:
        """See `Store.close`."""
        await self._client.aclose()
        await self._follower.aclose()

    async def _look(self, client: "Redis", *more: Callable[["Pipeline"], object]) -> tuple[_Standing, list[Any]]:
        """Read the meta key, then the replies of `more`, which may already know of a later change.

        No MULTI: Redis 7.0 refuses even reads in it while its memory is full. What must be there with the meta key
        is asked for after it, what must not be there without it before.
        """
        with self._errors():
            async with client.pipeline(transaction=False) as pipe:
                pipe.exists(*(self._key(name) for name in ("changes", "counts", *NAMED_COLLECTIONS.values())))
                pipe.hmget(self._key("meta"), *_META_FIELDS)
                pipe.exists(self._key("changes"))
                for command in more:
                    command(pipe)
                others, meta, stream, *replies = await pipe.execute()
        return self._standing(meta, bool(stream), bool(others)), replies

    def _standing(self, meta: list[str | None], stream: bool, others: bool) -> _Standing:
        policy_format, epoch, revision, change_id, records = meta
        if policy_format is None:
            if others:
                raise self._inconsistent("the meta key, which is gone while others are there")
            raise NotInitialisedError(
                f"there is no policy under {self._tag} in {self._where}: if there was one, restore it from a backup; "
                "if not, run `authzctl init`, which makes an empty one that lets everybody in"
            )
        if policy_format != FORMAT:
            raise self._unknown_format(policy_format)
        if not (epoch and change_id and revision and revision.isdecimal() and records and records.isdecimal()):
            raise self._inconsistent(f"the fields of the meta key: {dict(zip(_META_FIELDS, meta, strict=True))}")
        if not stream:
            raise self._inconsistent("the change stream, which is gone")
        return _Standing(Position(epoch, int(revision), change_id), int(records))

    async def _scan(self, name: str) -> AsyncIterator[tuple[str, str]]:
        """Yield the fields of a hash in small replies; what changes meanwhile may or may not be seen."""
        cursor = 0
        while True:
            with self._errors():
                reply: Any = await self._follower.hscan(self._key(name), cursor, count=_SCAN_COUNT)
            cursor, page = reply
            for field, text in page.items():
                yield field, text
            if cursor == 0:
                return

    def _key(self, name: str) -> str:
        return f"{self._tag}:{name}"

    def _inconsistent(self, what: str) -> InconsistentStateError:
        return InconsistentStateError(
            f"the policy under {self._tag} in {self._where} is damaged; what does not fit: {what}. "
            "Nothing was changed: restore a backup"
        )

    def _unknown_format(self, found: str) -> UnknownFormatError:
        return UnknownFormatError(
            f"the policy under {self._tag} in {self._where} has format {found!r}; this version reads {FORMAT!r}"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say in the interface's errors what redis-py says in its own."""
        try:
            yield
        except (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.ResponseError) as error:
            raise StoreRefusedError(f"{self._where} refused: {error}") from error
        except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
            raise StoreUnavailableError(f"{self._where} cannot be reached: {error}") from error
        except exceptions.RedisError as error:
            raise StoreError(f"{self._where}: {error!r}") from error


def _connect(url: str, client_name: str, retry: Retry) -> "Redis":
    try:
        parts = urlsplit(url)
        if parts.scheme in ("redis", "rediss") and not re.fullmatch(r"(/[0-9]*)?", parts.path):
            raise ValueError("redis-py would ignore it, and the password may have a '/'")  # noqa: TRY301
        client: Redis = Redis.from_url(
            url,
            protocol=2,
            decode_responses=True,
            # Texts that somebody wrote by hand need not be UTF-8: they arrive as records that cannot be read.
            encoding_errors="surrogateescape",
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_timeout=_REPLY_SECONDS,
            health_check_interval=_HEALTH_CHECK_SECONDS,
            client_name=client_name,
            retry=retry,
        )
        # Connects to nothing, but refuses unknown options now and not at the first command.
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, exceptions.RedisError):
        # Its message may hold a part of a password that was not escaped.
        raise ValueError(
            "the URL of Redis cannot be read: write redis://[user:password@]host:port/db, or rediss:// for TLS; "
            "signs such as '/', '@', '#' in a password are written %2F, %40, %23"
        ) from None
    return client


def _where(client: "Redis") -> str:
    """Return which server it is, without the user and the password."""
    options = client.connection_pool.connection_kwargs
    if "path" in options:
        return f"Redis at {options['path']}"
    return f"Redis at {options.get('host', 'localhost')}:{options.get('port', 6379)}"


def _new_text(key: RecordKey, record: Record | None) -> str | None:
    return None if record is None else encode_readable(key, record)


def _repeated(stored: str, change_id: str) -> WriteResult:
    epoch, _, revision = stored.partition(" ")
    return WriteResult(Position(epoch, int(revision), change_id), repeated=True)


def _event(entry_id: str, fields: Mapping[str, str]) -> Event:
    """Read a stream entry; ValueError when it is not one of ours."""
    revision, _, sequence = entry_id.partition("-")
    if sequence != "0":
        raise ValueError("its id is not a revision")
    try:
        return Event(
            Position(fields["epoch"], int(revision), fields["change"]),
            previous_change_id=fields["previous"],
            actor=fields["actor"],
            reason=fields["reason"],
            action=fields["action"],
            at=float(fields["at"]),
            records=parse_event_records(fields["records"]),
            counts={str(name): int(count) for name, count in json.loads(fields["counts"]).items()},
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{error!r}") from None
