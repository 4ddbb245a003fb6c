"""Names and texts in Redis: which hash keeps a record, under which field, spelled how. Pure.

Kinds of record are kept in *collections*, one Redis hash each: `lists`, `scopes`, `resources`, `tenants`,
`instances`, and `entries:<list name>` for each list. A field is the record's name (of an entry, its network as
canonical CIDR text), its value a JSON object without the name, so that the two cannot disagree.

Reading is strict and never raises: what this version does not understand in full it must not half apply.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from authz_server.policy.access import (
    GLOBAL_SCOPE,
    Enforcement,
    Entry,
    Mode,
    NamedList,
    Resource,
    Scope,
    Side,
    normalize_host,
)
from authz_server.policy.addresses import InvalidNetworkError, parse_network
from authz_server.policy.affinity import MAX_WEIGHT, Hold, Instance, InstanceState, Tenant
from authz_server.policy.identifiers import parse_identifier
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.records import Record, RecordKey, RecordKind, Unreadable
from authz_server.store.interface import Change, Difference, Event, EventRecord, Position, Replacement, Replica, Report

ENTRIES = "entries:"
"""What the collection of a list's entries begins with."""

REPLICAS = "replicas"
"""The hash in which servers report what they have applied: server -> JSON. The only key that a server writes to, and
no part of the policy."""

NAMED_COLLECTIONS = {
    RecordKind.LIST: "lists",
    RecordKind.SCOPE: "scopes",
    RecordKind.RESOURCE: "resources",
    RecordKind.TENANT: "tenants",
    RecordKind.INSTANCE: "instances",
}
"""The collections that every policy has, if only empty."""

SUM_MODULUS = 1 << 48
"""Sums of shares are taken modulo this: Lua's numbers hold 53 bits exactly."""

_COUNT = re.compile(r"([0-9]+) ([0-9]+) ([0-9]+)", re.ASCII)
_KINDS = {name: kind for kind, name in NAMED_COLLECTIONS.items()}
_LATEST_SECOND = 253_402_300_799
"""9999-12-31T23:59:59Z, the last second that calendars print with four digits."""
_LARGEST_REVISION = 1 << 53
"""Lua counts in double precision."""

T = TypeVar("T")


class _ProblemError(ValueError):
    """What is wrong with a stored text; stays within this module."""


def collection(key: RecordKey) -> str:
    """Return the name of the collection that keeps the record."""
    if key.kind is RecordKind.ENTRY:
        return f"{ENTRIES}{key.list_name}"
    return NAMED_COLLECTIONS[key.kind]


def record_key_of(collection_name: str, field: str) -> RecordKey:
    """Return the key of the record under a field of a collection.

    Raises:
        ValueError: there is no such collection.
    """
    if collection_name.startswith(ENTRIES):
        return RecordKey(RecordKind.ENTRY, field, collection_name.removeprefix(ENTRIES))
    kind = _KINDS.get(collection_name)
    if kind is None:
        known = ", ".join(sorted(_KINDS))
        raise ValueError(f"{collection_name!r} is not a collection: they are {known} and {ENTRIES}<list name>")
    return RecordKey(kind, field)


def is_collection(name: str) -> bool:
    """Tell whether a collection can have this name."""
    return name in _KINDS or name.startswith(ENTRIES)


def share(field: str, text: str) -> int:
    """Return what a record adds to the sum of its collection: 48 bits of SHA-1, which scripts in Redis have too.

    It notices accidents; whoever wants to deceive it can write the sum as well.
    """
    data = f"{field}\0{text}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha1(data, usedforsecurity=False).digest()[:6])


@dataclass(frozen=True, slots=True)
class Count:
    """What the store knows of a collection."""

    records: int
    revision: int
    """Of the last change that touched it."""
    sum: int
    """Of the shares of its records, modulo SUM_MODULUS."""

    def __str__(self) -> str:
        return f"{self.records} {self.revision} {self.sum}"


def parse_count(text: str) -> Count:
    """Read the text of a Count.

    Raises:
        ValueError: the text is something else.
    """
    match = _COUNT.fullmatch(text)
    if not match:
        raise ValueError(f"{text[:200]!r} is not a count: records, revision and sum")
    return Count(*map(int, match.groups()))


def change_digest(change: Change, new_texts: Iterable[str | None]) -> str:
    """Return what two changes have in common only if they would write the same."""
    rows = [
        (write.key.kind, write.key.name, write.key.list_name, text)
        for write, text in zip(change.writes, new_texts, strict=True)
    ]
    return hashlib.sha256(json.dumps([change.action, rows]).encode()).hexdigest()[:32]


def replacement_digest(action: str, counted: Mapping[str, tuple[int, int]]) -> str:
    """Return what two replacements have in common if they leave the same records (by number and sum of shares)."""
    rows = [(name, *counted[name]) for name in sorted(counted)]
    return hashlib.sha256(json.dumps([action, rows]).encode()).hexdigest()[:32]


def wished_texts(replacement: Replacement, name: str, old: Mapping[str, str]) -> dict[str, str]:
    """Return the texts that a collection is to hold, by field; `old` are those that it holds.

    Raises:
        ValueError: a record does not belong under its key, or could not be read again.
    """
    texts = {}
    for key, wished in replacement.contents[name].items():
        text = encode_readable(key, wished)
        before = old.get(key.name)
        if before is not None and before != text and replacement.keeps:
            there = decode_record(key, before)
            if not isinstance(there, Unreadable) and replacement.keeps(there, wished):
                text = before
        texts[key.name] = text
    return texts


def count_difference(changed: Iterable[tuple[str | None, str | None]], wished: int) -> Difference:
    """Count records that differ, each a (text before, text after), where so many in all are wished."""
    kinds = Counter(
        "added" if before is None else "removed" if after is None else "changed" for before, after in changed
    )
    return Difference(**kinds, unchanged=wished - kinds["added"] - kinds["changed"])


def encode_record(record: Record) -> str:
    """Return the record's text: one line of JSON, fields sorted, values that are the default left out."""
    fields: dict[str, Any]
    match record:
        case Entry():
            fields = {
                "reason": record.reason,
                "author": record.author,
                "created_at": record.created_at,
                "owner": record.owner or None,
                "expires_at": record.expires_at,
            }
        case NamedList():
            fields = {"description": record.description or None, "owner": record.owner or None}
        case Scope():
            fields = {
                "mode": record.mode.value,
                "enforcement": record.enforcement.value,
                "allow_lists": record.allow_lists or None,
                "block_lists": record.block_lists or None,
            }
        case Resource():
            fields = {"paths": [pattern.text for pattern in record.paths], "hosts": record.hosts or None}
        case Tenant():
            hold = record.hold
            fields = {
                "instance": record.instance,
                "held": record.held or None,
                "hold": {"owner": hold.owner, "to": hold.to, "since": hold.since, "reason": hold.reason}
                if hold
                else None,
            }
        case Instance():
            fields = {"weight": record.weight, "state": record.state.value}
    present = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(present, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def encode_readable(key: RecordKey, record: Record) -> str:
    """Return the record's text for storing it under a key.

    Raises:
        ValueError: the record does not belong under the key, or could not be read again.
    """
    text = encode_record(record)
    read = decode_record(key, text)
    if isinstance(read, Unreadable):
        raise ValueError(f"{key} cannot be stored: {read.problem}")  # noqa: TRY004 - it is the value that is wrong
    if read != record:
        raise ValueError(f"{key} cannot be stored: {record} is not the record of that name, or is not spelled plainly")
    return text


def decode_record(key: RecordKey, text: str) -> Record | Unreadable:
    """Read a stored text; whatever is wrong with it, or with the key that it stands under, makes it Unreadable."""
    try:
        reader = _Fields(_json_object(text))
        record = _READERS[key.kind](key, reader)
        reader.end()
    except _ProblemError as problem:
        return Unreadable(f"{key}: {problem}")
    return record


def encode_event_records(changes: Iterable[tuple[RecordKey, str | None, str | None]]) -> str:
    """Return what an event says of its records, each a (key, text before, text after)."""
    rows = [(key.kind.value, key.name, key.list_name, before, after) for key, before, after in changes]
    return json.dumps(rows, separators=(",", ":"))


def read_event_records(text: str) -> Iterator[EventRecord]:
    """Read what `encode_event_records` wrote, one record at a time: a thousand take tens of milliseconds.

    Raises:
        ValueError: the text is something else.
    """
    try:
        for kind, name, list_name, before, after in json.loads(text):
            key = RecordKey(RecordKind(kind), name, list_name)
            yield EventRecord(key, before, after, None if after is None else decode_record(key, after))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{text[:200]!r} are not the records of an event: {error}") from None


def read_event(entry_id: str, fields: Mapping[str, str], records: tuple[EventRecord, ...]) -> Event:
    """Read an entry of the change stream, whose records have been read.

    Raises:
        ValueError: it is not one of ours.
    """
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
            records=records,
            counts={str(name): int(count) for name, count in json.loads(fields["counts"]).items()},
            parts=int(fields.get("parts", "0")),
            size=int(fields.get("size", "0")),
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{error!r}") from None


def encode_report(report: Report, now: float) -> str:
    """Return the text of a server's report, made at `now` by the store's clock."""
    position = report.position
    fields = {
        "process": report.process,
        "started_at": round(report.started_at, 3),
        "at": round(now, 3),
        "epoch": position.epoch if position else None,
        "revision": position.revision if position else None,
        "change": position.change_id if position else None,
        "lost": report.lost or None,
    }
    present = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(present, separators=(",", ":"), sort_keys=True)


def reported_by(report: Report, text: str) -> bool:
    """Tell whether the text is a report of the same process; one that cannot be read may be overwritten."""
    earlier = decode_report(report.replica, text, 0.0).report
    return earlier is None or earlier.process == report.process


def decode_report(name: str, text: str, now: float) -> Replica:
    """Read a server's report at `now` by the store's clock; one that cannot be read says so, and still counts."""
    try:
        fields = _Fields(_json_object(text))
        process, started_at = fields.take("process", _text), fields.take("started_at", _moment)
        at = fields.take("at", _moment)
        epoch = fields.take_optional("epoch", _text)
        position = None
        if epoch is not None:
            revision = fields.take("revision", lambda value: _integer(value, 1, _LARGEST_REVISION))
            position = Position(epoch, revision, fields.take("change", _text))
        lost = fields.take("lost", lambda value: _integer(value, 0, _LARGEST_REVISION), 0)
        fields.end()
    except _ProblemError as problem:
        return Replica(name, None, 0.0, str(problem))
    return Replica(name, Report(name, process, started_at, position, lost), max(0.0, now - at))


class _Fields:
    """The fields of a stored text, each to be asked for once."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)

    def take(self, name: str, read: Callable[[Any], T], default: T | None = None) -> T:
        """Return one field as `read` reads it; without a default it must be there."""
        value = self.take_optional(name, read)
        if value is None:
            value = default
        if value is None:
            raise _ProblemError(f"{name!r} is missing")
        return value

    def take_optional(self, name: str, read: Callable[[Any], T]) -> T | None:
        """Return one field as `read` reads it, or None when it is not there."""
        if name not in self._fields:
            return None
        try:
            return read(self._fields.pop(name))
        except ValueError as error:
            raise _ProblemError(f"{name!r}: {error}") from None

    def end(self) -> None:
        """Refuse what nobody asked for: a newer version may have meant something by it."""
        if self._fields:
            raise _ProblemError(f"unknown fields: {', '.join(map(repr, sorted(self._fields)))}")


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(items)
    if len(fields) != len(items):
        raise _ProblemError("a field twice")
    return fields


_decode_json = json.JSONDecoder(object_pairs_hook=_unique).decode
"""`json.loads` with a hook makes a decoder for each text, which takes as long as reading one."""


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = _decode_json(text)
    except _ProblemError as problem:
        raise _ProblemError(f"{problem} in {text!r}") from None
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of opening brackets
        raise _ProblemError(f"{text[:200]!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _ProblemError(f"{text[:200]!r} is not a JSON object")
    return value


def _entry(key: RecordKey, fields: _Fields) -> Entry:
    _check(_list_name, key.list_name)
    try:
        network = parse_network(key.name)
    except InvalidNetworkError as error:
        raise _ProblemError(str(error)) from None
    if str(network) != key.name:
        raise _ProblemError(f"{key.name!r} must be spelled {str(network)!r}")
    return Entry(
        network,
        reason=fields.take("reason", _text),
        author=fields.take("author", _text),
        created_at=fields.take("created_at", _second),
        owner=fields.take("owner", _text, ""),
        expires_at=fields.take_optional("expires_at", _second),
    )


def _named_list(key: RecordKey, fields: _Fields) -> NamedList:
    _check(_identifier("a list"), key.name)
    return NamedList(key.name, fields.take("description", _text, ""), fields.take("owner", _text, ""))


def _scope(key: RecordKey, fields: _Fields) -> Scope:
    _check(parse_scope_name, key.name)
    names = _array_of(_identifier("a list"))
    return Scope(
        key.name,
        fields.take("mode", _choice(Mode)),
        fields.take("enforcement", _choice(Enforcement)),
        fields.take("allow_lists", names, ()),
        fields.take("block_lists", names, ()),
    )


def _resource(key: RecordKey, fields: _Fields) -> Resource:
    _check(_identifier("a resource"), key.name)
    paths = fields.take("paths", _array_of(lambda value: parse_path_pattern(_text(value))))
    if not paths:
        raise _ProblemError("'paths': a resource without a path protects nothing")
    return Resource(key.name, paths, fields.take("hosts", _array_of(parse_host_pattern), ()))


def _tenant(key: RecordKey, fields: _Fields) -> Tenant:
    _check(_identifier("a tenant"), key.name)
    instance, held = fields.take("instance", _identifier("an instance")), fields.take("held", _flag, False)
    hold = fields.take_optional("hold", _hold)
    if hold and not held:
        raise _ProblemError("'hold' says who holds it, and 'held' that nobody does")
    return Tenant(key.name, instance, held, hold)


def _instance(key: RecordKey, fields: _Fields) -> Instance:
    _check(_identifier("an instance"), key.name)
    return Instance(key.name, fields.take("weight", _weight), fields.take("state", _choice(InstanceState)))


_READERS: dict[RecordKind, Callable[[RecordKey, _Fields], Record]] = {
    RecordKind.LIST: _named_list,
    RecordKind.ENTRY: _entry,
    RecordKind.SCOPE: _scope,
    RecordKind.RESOURCE: _resource,
    RecordKind.TENANT: _tenant,
    RecordKind.INSTANCE: _instance,
}


def parse_scope_name(text: str) -> str:
    """Return the text when it names a scope.

    Raises:
        ValueError: naming the text and how scopes are named.
    """
    kind, colon, name = text.partition(":")
    if text != GLOBAL_SCOPE:
        if not colon or kind not in ("tenant", "resource"):
            raise ValueError(f"{text!r} is not a scope: write {GLOBAL_SCOPE}, tenant:<id> or resource:<name>")
        parse_identifier(name, f"a {kind}")
    return text


def parse_host_pattern(value: Any) -> str:
    """Return the text when it can match a normalized Host: `www.example.com` or `*.example.com` in lower case.

    Raises:
        ValueError: naming the text and how to mend it.
    """
    text = _text(value)
    host = text.removeprefix("*.")
    if not host or normalize_host(host) != host or any(sign in host for sign in "*/@ \t"):
        raise ValueError(
            f"{text!r} is not a host: write www.example.com or *.example.com, in lower case, without port and last dot"
        )
    return text


@lru_cache(maxsize=1024)
def _list_name(text: str) -> str:
    """Let pass a list's name, or that of a scope's own list such as `tenant:acme/block`."""
    scope, slash, side = text.rpartition("/")
    if not slash:
        return parse_identifier(text, "a list")
    if side not in tuple(Side):
        raise ValueError(f"{text!r} is not a scope's own list: it must end with /allow or /block")
    parse_scope_name(scope)
    return text


def _check(parse: Callable[[str], str], name: str) -> None:
    try:
        parse(name)
    except ValueError as error:
        raise _ProblemError(str(error)) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")  # noqa: TRY004 - one error type for whatever a record holds
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{value!r} is not Unicode text") from None
    return value


def _integer(value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{value!r} is not a whole number from {low} to {high}")
    return value


def _hold(value: Any) -> Hold:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not an object")  # noqa: TRY004 - as in _text
    fields = _Fields(value)
    hold = Hold(
        fields.take("owner", _text),
        fields.take("to", _identifier("an instance")),
        fields.take("since", _second),
        fields.take("reason", _text),
    )
    fields.end()
    return hold


def _second(value: Any) -> int:
    return _integer(value, 0, _LATEST_SECOND)


def _moment(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _LATEST_SECOND:
        raise ValueError(f"{value!r} is not a time in seconds since 1970")
    return float(value)


def _weight(value: Any) -> int:
    return _integer(value, 1, MAX_WEIGHT)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")  # noqa: TRY004 - as in _text
    return value


def _identifier(kind: str) -> Callable[[Any], str]:
    return lambda value: parse_identifier(_text(value), kind)


def _choice(choices: Callable[[str], T]) -> Callable[[Any], T]:
    return lambda value: choices(_text(value))


def _array_of(read: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    def read_array(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is not an array")  # noqa: TRY004 - as in _text
        return tuple(read(item) for item in value)

    return read_array
