"""The records that a policy is made of, and the keys that name them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from authz_server.policy.access import Entry, NamedList, Resource, Scope
from authz_server.policy.affinity import Instance, Tenant


class RecordKind(StrEnum):
    """The kinds of record; the words stand in change events and in error messages."""

    LIST = "list"
    ENTRY = "entry"
    SCOPE = "scope"
    RESOURCE = "resource"
    TENANT = "tenant"
    INSTANCE = "instance"


@dataclass(frozen=True, slots=True, order=True)
class RecordKey:
    """What names a record within a policy."""

    kind: RecordKind
    name: str
    """The list's, scope's, resource's, tenant's or instance's name; of an entry, its network as canonical CIDR text."""
    list_name: str = ""
    """Of an entry, the list that holds it; else empty."""

    def __str__(self) -> str:
        where = f" in list {self.list_name}" if self.list_name else ""
        return f"{self.kind} {self.name}{where}"


class RecordKeys:
    """A set of keys, kept as texts: a hundred thousand objects would hold everything up whenever the garbage collector
    goes through them, and when they are let go of."""

    __slots__ = ("_names",)

    def __init__(self) -> None:
        self._names: dict[tuple[RecordKind, str], set[str]] = {}

    def update(self, keys: Iterable[RecordKey]) -> None:
        """Add keys."""
        for key in keys:
            self._names.setdefault((key.kind, key.list_name), set()).add(key.name)

    def __len__(self) -> int:
        return sum(map(len, self._names.values()))

    def __iter__(self) -> Iterator[RecordKey]:
        for (kind, list_name), names in self._names.items():
            for name in names:
                yield RecordKey(kind, name, list_name)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that is there and cannot be read."""

    problem: str
    """What is wrong with it, for people; names the offending text."""


Record = Entry | NamedList | Scope | Resource | Tenant | Instance


def entry_key(list_name: str, entry: Entry) -> RecordKey:
    """Return the key of an entry in a list."""
    return RecordKey(RecordKind.ENTRY, str(entry.network), list_name)


def record_key(record: NamedList | Scope | Resource | Tenant | Instance) -> RecordKey:
    """Return the key of a record that names itself (an entry does not name its list)."""
    match record:
        case NamedList(name=name):
            return RecordKey(RecordKind.LIST, name)
        case Scope(name=name):
            return RecordKey(RecordKind.SCOPE, name)
        case Resource(name=name):
            return RecordKey(RecordKind.RESOURCE, name)
        case Tenant(id=name):
            return RecordKey(RecordKind.TENANT, name)
        case Instance(name=name):
            return RecordKey(RecordKind.INSTANCE, name)
