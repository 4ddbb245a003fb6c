"""The whole policy at one (epoch, revision): immutable and consistent.

A snapshot is built from records once, then carried forward by changes; both ways give the same snapshot. A record
that cannot be read keeps its last good value. Without one the policy closes: an unreadable scope is restricted and
enforced, an unreadable resource is the whole site, an unreadable pin denies. An unreadable entry cannot be
applied; it is named in `problems`, and the scopes that use its list in `degraded_scopes`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

from authz_server.policy.access import (
    GLOBAL_SCOPE,
    Enforcement,
    Entry,
    EntryTable,
    Mode,
    NamedList,
    Resource,
    Scope,
    resource_scope,
)
from authz_server.policy.addresses import InvalidNetworkError, Network, parse_network
from authz_server.policy.affinity import Instance, InstanceState, Tenant
from authz_server.policy.paths import fold_case, parse_path_pattern
from authz_server.policy.records import Record, RecordKey, RecordKind, Unreadable
from authz_server.policy.tenant import TenantSource

_FIELDS = {
    RecordKind.LIST: "named_lists",
    RecordKind.SCOPE: "scopes",
    RecordKind.RESOURCE: "resources",
    RecordKind.TENANT: "tenants",
    RecordKind.INSTANCE: "instances",
}
"""Where a snapshot keeps its records, by kind; entries are in `tables`."""


_OPEN_EVERYWHERE = Scope(GLOBAL_SCOPE)


class MissingClientAddress(StrEnum):
    """What to do when x-envoy-external-address is absent or not to be trusted."""

    DENY = "deny"
    PEER = "peer"
    """Take the connection's peer: right where clients connect directly and Envoy calls them internal."""


class UnknownTenant(StrEnum):
    """What to do with a well-formed tenant id that is not registered."""

    NONE = "none"
    """No routing header: the mesh's default route takes the request."""
    HASH = "hash"
    """An active instance by rendezvous hash."""
    DENY = "deny"


class MissingTenant(StrEnum):
    """What to do with a request that names no tenant."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True)
class DecisionOptions:
    """The operator's settings that a decision depends on."""

    trusted_peers: tuple[Network, ...] = ()
    """The proxies whose x-envoy-external-address counts; empty: whoever calls through Envoy."""
    missing_client_address: MissingClientAddress = MissingClientAddress.DENY
    tenant_sources: tuple[TenantSource, ...] = ()
    unknown_tenant: UnknownTenant = UnknownTenant.NONE
    missing_tenant: MissingTenant = MissingTenant.ALLOW
    fold_path_case: bool = True
    """Whether a backend may ignore the letter case of paths, so that `/DOCS` is a reading of `/docs`."""


@dataclass(frozen=True, slots=True)
class GuardedResource:
    """A resource together with its scope."""

    resource: Resource
    scope: Scope


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a decision looks up. Build it with `build_snapshot`, carry it forward with `with_changes`."""

    epoch: str
    revision: int
    options: DecisionOptions = DecisionOptions()
    tables: Mapping[str, EntryTable] = field(default_factory=dict)
    """List name -> its entries; a scope's own lists are here as `global/allow`, `tenant:acme/block` and so on."""
    named_lists: Mapping[str, NamedList] = field(default_factory=dict)
    scopes: Mapping[str, Scope] = field(default_factory=dict)
    resources: Mapping[str, Resource] = field(default_factory=dict)
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    instances: Mapping[str, Instance] = field(default_factory=dict)
    problems: Mapping[RecordKey, str] = field(default_factory=dict)
    """The records that could not be read, and why."""
    global_scope: Scope = _OPEN_EVERYWHERE
    guarded_resources: tuple[GuardedResource, ...] = ()
    """By resource name; patterns are ready for comparison with readings (case folded when the options say so)."""

    def with_changes(self, revision: int, changes: Iterable[tuple[RecordKey, Record | Unreadable | None]]) -> Self:
        """Return the snapshot after changes one after the other; None removes a record. This one stays as it is."""
        changed: dict[RecordKind, dict[str, Any]] = {}
        entries: dict[str, list[tuple[Network, Entry | None]]] = {}
        problems = dict(self.problems)
        latest: dict[RecordKey, Record | None] = {}
        for key, value in changes:
            problems.pop(key, None)
            record: Record | None
            if isinstance(value, Unreadable):
                problems[key] = value.problem
                record = (latest[key] if key in latest else self.get(key)) or _closed(key)
                if record is None:
                    continue
            else:
                record = value
            latest[key] = record
            if key.kind is not RecordKind.ENTRY:
                if key.kind not in changed:
                    changed[key.kind] = dict(getattr(self, _FIELDS[key.kind]))
                if record is None:
                    changed[key.kind].pop(key.name, None)
                else:
                    changed[key.kind][key.name] = record
            elif isinstance(record, Entry):
                entries.setdefault(key.list_name, []).append((record.network, record))
            elif network := _network(key):
                entries.setdefault(key.list_name, []).append((network, None))
        tables = dict(self.tables)
        for name, items in entries.items():
            tables[name] = tables.get(name, EntryTable()).with_changes(items)
            if not len(tables[name]):
                del tables[name]
        fields: dict[str, Any] = {_FIELDS[kind]: mapping for kind, mapping in changed.items()}
        return replace(self, revision=revision, tables=tables, problems=problems, **fields)._indexed()

    def get(self, key: RecordKey) -> Record | None:
        """Return the record that counts under this key (it may stand in for an unreadable one), or None."""
        if key.kind is not RecordKind.ENTRY:
            mapping: Mapping[str, Record] = getattr(self, _FIELDS[key.kind])
            return mapping.get(key.name)
        table = self.tables.get(key.list_name)
        network = _network(key)
        return table.get(network) if table is not None and network else None

    def count(self, kind: RecordKind, list_name: str = "") -> int:
        """Return how many records of a kind (of entries: in one list) this snapshot was made from.

        An unreadable entry that nothing stands in for is counted too, though it is in no table.
        """
        if kind is not RecordKind.ENTRY:
            return len(getattr(self, _FIELDS[kind]))
        missing = [
            key
            for key in self.problems
            if key.kind is RecordKind.ENTRY and key.list_name == list_name and self.get(key) is None
        ]
        return len(self.tables.get(list_name, ())) + len(missing)

    def degraded_scopes(self) -> tuple[str, ...]:
        """Return the scopes that use a list with an unreadable entry, or a list that does not exist, sorted."""
        unreadable = {key.list_name for key in self.problems if key.kind is RecordKind.ENTRY}
        degraded = {name.rpartition("/")[0] for name in unreadable if "/" in name}
        for scope in (self.global_scope, *self.scopes.values()):
            named = {*scope.allow_lists, *scope.block_lists}
            if named & unreadable or not named <= self.named_lists.keys():
                degraded.add(scope.name)
        return tuple(sorted(degraded))

    def counts(self) -> dict[str, int]:
        """Return how many records of each kind the snapshot holds."""
        return {
            "lists": len(self.named_lists),
            "entries": sum(len(table) for table in self.tables.values()),
            "scopes": len(self.scopes),
            "resources": len(self.resources),
            "tenants": len(self.tenants),
            "instances": len(self.instances),
            "unreadable": len(self.problems),
        }

    def _indexed(self) -> Self:
        """Return the snapshot with what is derived from scopes and resources."""
        guarded = []
        for name in sorted(self.resources):
            resource = self.resources[name]
            if self.options.fold_path_case:
                resource = replace(resource, paths=tuple(fold_case(path) for path in resource.paths))
            scope_name = resource_scope(name)
            guarded.append(GuardedResource(resource, self.scopes.get(scope_name, Scope(scope_name))))
        return replace(
            self,
            global_scope=self.scopes.get(GLOBAL_SCOPE, _OPEN_EVERYWHERE),
            guarded_resources=tuple(guarded),
        )


def build_snapshot(
    records: Iterable[tuple[RecordKey, Record | Unreadable]],
    *,
    epoch: str,
    revision: int,
    options: DecisionOptions,
    last_good: Snapshot | None = None,
) -> Snapshot:
    """Build a snapshot from records in any order.

    Args:
        records: each key once.
        epoch: of the state that the records come from.
        revision: at which the records were read.
        options: the operator's settings.
        last_good: the snapshot served before, whose records stand in for unreadable ones.
    """
    readable: list[tuple[RecordKey, Record]] = []
    unreadable: list[tuple[RecordKey, Unreadable]] = []
    for key, record in records:
        if not isinstance(record, Unreadable):
            readable.append((key, record))
            continue
        unreadable.append((key, record))
        if last_good and (kept := last_good.get(key)):
            readable.append((key, kept))
    snapshot = Snapshot(epoch, revision, options).with_changes(revision, readable)
    return snapshot.with_changes(revision, unreadable)


def _network(key: RecordKey) -> Network | None:
    """Return an entry key's network; None when somebody wrote a key by hand that is not one."""
    try:
        return parse_network(key.name)
    except InvalidNetworkError:
        return None


def _closed(key: RecordKey) -> Record | None:
    """Return what stands in for a record that cannot be read and has no last good value; None if nothing can."""
    match key.kind:
        case RecordKind.SCOPE:
            return Scope(key.name, Mode.RESTRICTED, Enforcement.ENFORCE)
        case RecordKind.RESOURCE:
            return Resource(key.name, paths=(parse_path_pattern("/"),))
        case RecordKind.TENANT:
            return Tenant(key.name, instance=None)
        case RecordKind.INSTANCE:
            return Instance(key.name, state=InstanceState.DOWN)
        case RecordKind.LIST:
            return NamedList(key.name)
        case RecordKind.ENTRY:
            return None
