"""The whole policy at one (epoch, revision): immutable and consistent.

A snapshot is built from records once, then carried forward by changes; both ways give the same snapshot. A record
that cannot be read keeps its last good value. Without one the policy closes: an unreadable scope is restricted and
enforced, an unreadable resource is the whole site, an unreadable pin denies. Of an unreadable entry the network is
known, unless it is that which cannot be read: it blocks, and allows nothing. It is named in `problems`, and the scopes
that use its list in `degraded_scopes`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from authz_server.policy.access import (
    GLOBAL_SCOPE,
    Enforcement,
    Entry,
    Mode,
    NamedList,
    Resource,
    Scope,
    Side,
    own_list,
    resource_scope,
    scope_of_own_list,
    tenant_of_scope,
)
from authz_server.policy.addresses import InvalidNetworkError, Network, parse_network
from authz_server.policy.affinity import Instance, InstanceState, Tenant
from authz_server.policy.networks import UNREADABLE, ColumnsDraft, NetworkTable, NetworkTableDraft
from authz_server.policy.paths import PathPattern, first_name, fold_case, parse_path_pattern
from authz_server.policy.records import Record, RecordKey, RecordKind, Unreadable
from authz_server.policy.sharded import Sharded, ShardedDraft
from authz_server.policy.tenant import TenantSource

_FIELDS = {
    RecordKind.LIST: "named_lists",
    RecordKind.SCOPE: "scopes",
    RecordKind.RESOURCE: "resources",
    RecordKind.TENANT: "tenants",
    RecordKind.INSTANCE: "instances",
}
"""Where a snapshot keeps its records, by kind; entries are in `tables`."""


Kept = NamedList | Scope | Resource | Tenant | Instance
"""A record that a snapshot keeps whole."""

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

    @property
    def needs_peer(self) -> bool:
        """Whether any decision depends on the connection's peer."""
        return bool(self.trusted_peers) or self.missing_client_address is MissingClientAddress.PEER


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
    tables: Sharded[str, NetworkTable] = field(default_factory=Sharded)
    """List name -> its networks; a scope's own lists are here as `global/allow`, `tenant:acme/block` and so on."""
    named_lists: Sharded[str, NamedList] = field(default_factory=Sharded)
    scopes: Sharded[str, Scope] = field(default_factory=Sharded)
    resources: Sharded[str, Resource] = field(default_factory=Sharded)
    tenants: Sharded[str, Tenant] = field(default_factory=Sharded)
    instances: Sharded[str, Instance] = field(default_factory=Sharded)
    problems: Sharded[RecordKey, str] = field(default_factory=Sharded)
    """The records that could not be read, and why."""
    unreadable: Mapping[str, int] = field(default_factory=dict)
    """List name -> how many of its entries cannot be read; lists that have none are left out."""
    missing: Mapping[str, int] = field(default_factory=dict)
    """The same of those that nothing stands in for: they are in no table."""
    networks: int = 0
    """In all tables."""
    degraded: frozenset[str] = frozenset()
    """Scopes that use a list with an unreadable entry, or a list that does not exist."""
    global_scope: Scope = _OPEN_EVERYWHERE
    tenant_scopes: Sharded[str, Scope] = field(default_factory=Sharded)
    """Tenant id -> its scope, by its record or by defaults, of those that have a record or lists of their own. Other
    tenants' scopes are open and enforced, and have no lists."""
    guarded_resources: tuple[GuardedResource, ...] = ()
    """By resource name; patterns are ready for comparison with readings (case folded when the options say so)."""
    guarded_names: frozenset[str] | None = frozenset()
    """The `first_name` of every path in `guarded_resources`: paths that begin with others are in none of them. None:
    one of them can begin with anything."""
    entries: Mapping[str, Mapping[Network, Entry]] = field(default_factory=dict)
    """List name -> what people say of each network, which no decision needs: only where `build_snapshot` was asked
    to keep it, and not carried forward."""

    def with_changes(
        self, revision: int, changes: Iterable[tuple[RecordKey, Record | Unreadable | None]]
    ) -> "Snapshot":
        """Return the snapshot after changes one after the other; None removes a record. This one stays as it is."""
        draft = SnapshotDraft(self)
        for key, value in changes:
            draft.put(key, value)
        return draft.done(revision)

    def with_last_good(self, last_good: "Snapshot", keys: Iterable[RecordKey]) -> "Snapshot":
        """Return the snapshot with the records of an older one under some keys of those that cannot be read."""
        draft = SnapshotDraft(self)
        for key in keys:
            if key.kind is RecordKind.ENTRY:
                if (expiry := last_good.expiry(key)) is not None:
                    draft.keep(key, expiry)
            elif (record := last_good.get(key)) is not None:
                draft.keep(key, record)
        return draft.done(self.revision)

    def get(self, key: RecordKey) -> Kept | None:
        """Return the record that counts under the key of another kind than ENTRY (it may stand in for an unreadable
        one), or None."""
        mapping: Mapping[str, Any] = getattr(self, _FIELDS[key.kind])
        record: Kept | None = mapping.get(key.name)
        return record

    def expiry(self, key: RecordKey) -> int | None:
        """Return the expiry that counts under the key of an entry (UNREADABLE: see there), or None when there is no
        such network."""
        table = self.tables.get(key.list_name)
        network = _network(key)
        return table.get(network) if table is not None and network else None

    def count(self, kind: RecordKind, list_name: str = "") -> int:
        """Return how many records of a kind (of entries: in one list) this snapshot was made from.

        An unreadable entry of an unreadable network is counted too, though it is in no table.
        """
        if kind is not RecordKind.ENTRY:
            return len(getattr(self, _FIELDS[kind]))
        return len(self.tables.get(list_name) or ()) + self.missing.get(list_name, 0)

    def degraded_scopes(self) -> tuple[str, ...]:
        """Return the scopes that use a list with an unreadable entry, or a list that does not exist, sorted."""
        return tuple(sorted(self.degraded))

    def counts(self) -> dict[str, int]:
        """Return how many records of each kind the snapshot holds."""
        return {
            "lists": len(self.named_lists),
            "entries": self.networks,
            "scopes": len(self.scopes),
            "resources": len(self.resources),
            "tenants": len(self.tenants),
            "instances": len(self.instances),
            "unreadable": len(self.problems),
        }


class SnapshotDraft:
    """A snapshot in the making, from an earlier one, which stays as it is."""

    def __init__(self, before: Snapshot) -> None:
        self._before = before
        self._drafts: dict[RecordKind, ShardedDraft[str, Any]] = {}
        self._problems = before.problems.draft()
        self._unreadable = Counter(before.unreadable)
        self._missing = Counter(before.missing)
        self._tables = before.tables.draft()
        self._table_drafts: dict[str, NetworkTableDraft] = {}
        """By list name; of a snapshot that has tables."""
        self._entries: dict[str, dict[Network, int | None]] = {}
        """List name -> expiries, or None for removed entries; of a snapshot that has none."""
        self._networks = before.networks
        self._changed_scopes: set[str] = set()
        self._changed_tables: list[str] = []
        self._lists_changed = False
        """Whether some list came or went: any scope may be degraded by it or no more."""

    def put(self, key: RecordKey, value: Record | Unreadable | None) -> None:
        """Set a record, or remove it where the value is None."""
        if self._problems.get(key) is not None:
            self._count_problem(key, -1)
            self._problems.put(key, None)
        if isinstance(value, Unreadable):
            self.put_problem(key, value.problem)
            if self._is_missing(key):
                self.keep(key, _closed(key))
        elif isinstance(value, Entry):
            self._put_entry(key.list_name, value.network, value.expiry)
        elif key.kind is RecordKind.ENTRY:
            self._set(key, None)
        else:
            self._set(key, value)

    def keep(self, key: RecordKey, value: Kept | int | None) -> None:
        """Set what counts under a key, of an entry its expiry, whether or not there is a problem with the record."""
        if self._problems.get(key) is None:
            self._set(key, value)
        else:
            self._count_problem(key, -1)
            self._set(key, value)
            self._count_problem(key, 1)

    def _set(self, key: RecordKey, value: Kept | int | None) -> None:
        if key.kind is not RecordKind.ENTRY:
            self._draft(key.kind).put(key.name, value)
            if key.kind is RecordKind.SCOPE:
                self._changed_scopes.add(key.name)
            elif key.kind is RecordKind.LIST:
                self._lists_changed = True
        elif network := _network(key):
            self._put_entry(key.list_name, network, value if isinstance(value, int) else None)

    def _put_entry(self, list_name: str, network: Network, expiry: int | None) -> None:
        if not len(self._before.tables):
            self._entries.setdefault(list_name, {})[network] = expiry
            return
        draft = self._table_drafts.get(list_name)
        if draft is None:
            draft = self._table_drafts[list_name] = (self._tables.get(list_name) or NetworkTable()).draft()
        draft.put(network, expiry)

    def _count_problem(self, key: RecordKey, number: int) -> None:
        """Count an entry that cannot be read, or, with -1, no more."""
        if key.kind is not RecordKind.ENTRY:
            return
        self._unreadable[key.list_name] += number
        if self._is_missing(key):
            self._missing[key.list_name] += number

    def _is_missing(self, key: RecordKey) -> bool:
        """Tell whether nothing counts under a key."""
        if key.kind is not RecordKind.ENTRY:
            return self._draft(key.kind).get(key.name) is None
        network = _network(key)
        if network is None:
            return True
        entries = self._entries.get(key.list_name, {})
        if network in entries:
            return entries[network] is None
        table = self._table_drafts.get(key.list_name) or self._tables.get(key.list_name)
        return table is None or table.get(network) is None

    def copy(self, key: RecordKey, other: Snapshot) -> None:
        """Set what another snapshot has under a key: the record or none, and what is wrong with it."""
        self.put(key, None)
        if (problem := other.problems.get(key)) is not None:
            self.put_problem(key, problem)
        value = other.expiry(key) if key.kind is RecordKind.ENTRY else other.get(key)
        if value is not None:
            self.keep(key, value)

    def put_problem(self, key: RecordKey, problem: str) -> None:
        """Say that a record cannot be read, and leave what counts under its key."""
        if self._problems.get(key) is None:
            self._count_problem(key, 1)
        self._problems.put(key, problem)

    def put_table(self, list_name: str, table: NetworkTable) -> None:
        """Set all networks of a list, of which the earlier snapshot has none."""
        self._tables.put(list_name, table)
        self._changed_tables.append(list_name)
        self._networks += len(table)

    def done(self, revision: int) -> Snapshot:
        """Return the snapshot; the draft must not be used any more."""
        self._apply_entries()
        tables = self._tables.done()
        changed: dict[str, Any] = {_FIELDS[kind]: draft.done() for kind, draft in self._drafts.items()}
        snapshot = replace(
            self._before,
            revision=revision,
            tables=tables,
            tenant_scopes=self._tenant_scopes(changed.get("scopes", self._before.scopes), tables),
            problems=self._problems.done(),
            unreadable=+self._unreadable,
            missing=+self._missing,
            networks=self._networks,
            entries={},
            **changed,
        )
        degraded = self._degraded(snapshot)
        if RecordKind.RESOURCE in self._drafts or any(tenant_of_scope(name) is None for name in self._changed_scopes):
            return replace(snapshot, degraded=degraded, **_derived(snapshot))
        return snapshot if degraded == snapshot.degraded else replace(snapshot, degraded=degraded)

    def _draft(self, kind: RecordKind) -> "ShardedDraft[str, Any]":
        draft = self._drafts.get(kind)
        if draft is None:
            mapping: Sharded[str, Any] = getattr(self._before, _FIELDS[kind])
            draft = self._drafts[kind] = mapping.draft()
        return draft

    def _apply_entries(self) -> None:
        made = {name: draft.done() for name, draft in self._table_drafts.items()}
        if self._entries:
            made |= self._build_tables()
        for name, table in made.items():
            self._networks += len(table) - len(self._tables.get(name) or ())
            self._tables.put(name, table if len(table) else None)
            self._changed_tables.append(name)

    def _build_tables(self) -> dict[str, NetworkTable]:
        """Return the tables with `_entries`, of which there may be very many."""
        made = {}
        columns = ColumnsDraft()  # all new tables share them
        places = []
        for name, items in self._entries.items():
            table = self._tables.get(name)
            if table is None:
                kept = ((network, expiry) for network, expiry in items.items() if expiry is not None)
                places.append((name, columns.add(kept)))
            else:
                made[name] = table.with_changes(items.items())
        shared = columns.columns()
        return made | {name: NetworkTable(shared, *place) for name, place in places}

    def _tenant_scopes(self, scopes: Mapping[str, Scope], tables: Mapping[str, NetworkTable]) -> Sharded[str, Scope]:
        changed = self._changed_scopes.union(filter(None, map(scope_of_own_list, self._changed_tables)))
        tenants = [(tenant, name) for name in changed if (tenant := tenant_of_scope(name)) is not None]
        if not tenants:
            return self._before.tenant_scopes
        draft = self._before.tenant_scopes.draft()
        for tenant, name in tenants:
            scope = scopes.get(name)
            if scope is None and any(own_list(name, side) in tables for side in Side):
                scope = Scope(name)
            draft.put(tenant, scope)
        return draft.done()

    def _degraded(self, snapshot: Snapshot) -> frozenset[str]:
        unreadable = snapshot.unreadable.keys()
        lists_changed = self._lists_changed or unreadable != self._before.unreadable.keys()
        if not lists_changed and not self._changed_scopes:
            return snapshot.degraded
        by_own_list = set(filter(None, map(scope_of_own_list, unreadable)))

        def is_degraded(scope: Scope | None) -> bool:
            named = {*scope.allow_lists, *scope.block_lists} if scope else set()
            return not named.isdisjoint(unreadable) or any(name not in snapshot.named_lists for name in named)

        if lists_changed:
            return frozenset(by_own_list.union(scope.name for scope in snapshot.scopes.values() if is_degraded(scope)))
        now = {name for name in self._changed_scopes if name in by_own_list or is_degraded(snapshot.scopes.get(name))}
        return snapshot.degraded - self._changed_scopes | now


def build_snapshot(
    records: Iterable[tuple[RecordKey, Record | Unreadable]],
    *,
    epoch: str,
    revision: int,
    options: DecisionOptions,
    last_good: Snapshot | None = None,
    keep_entries: bool = False,
) -> Snapshot:
    """Build a snapshot from records in any order.

    Args:
        records: each key once.
        epoch: of the state that the records come from.
        revision: at which the records were read.
        options: the operator's settings.
        last_good: the snapshot served before, whose records stand in for unreadable ones.
        keep_entries: whether to fill `entries`.
    """
    draft = SnapshotDraft(Snapshot(epoch, revision, options))
    entries: dict[str, dict[Network, Entry]] = {}
    for key, record in records:
        draft.put(key, record)
        if keep_entries and isinstance(record, Entry):
            entries.setdefault(key.list_name, {})[record.network] = record
    snapshot = draft.done(revision)
    if last_good is not None and len(snapshot.problems):
        snapshot = snapshot.with_last_good(last_good, snapshot.problems)
    return replace(snapshot, entries=entries)


def _derived(snapshot: Snapshot) -> dict[str, Any]:
    """Return what follows from scopes and resources."""
    guarded = []
    for name in sorted(snapshot.resources):
        resource = snapshot.resources[name]
        if snapshot.options.fold_path_case:
            resource = replace(resource, paths=tuple(fold_case(path) for path in resource.paths))
        scope_name = resource_scope(name)
        guarded.append(GuardedResource(resource, snapshot.scopes.get(scope_name) or Scope(scope_name)))
    return {
        "global_scope": snapshot.scopes.get(GLOBAL_SCOPE) or _OPEN_EVERYWHERE,
        "guarded_resources": tuple(guarded),
        "guarded_names": _first_names(path for one in guarded for path in one.resource.paths),
    }


def _first_names(patterns: Iterable[PathPattern]) -> frozenset[str] | None:
    segments = [pattern.segments for pattern in patterns]
    if any(some[:1] in ((), ("*",)) for some in segments):
        return None
    return frozenset(first_name(f"/{some[0]}") for some in segments)


def _network(key: RecordKey) -> Network | None:
    """Return an entry key's network; None when somebody wrote a key by hand that is not one, or spells it in another
    way: such a record is never readable, and must not stand for the one that is spelled well."""
    try:
        network = parse_network(key.name)
    except InvalidNetworkError:
        return None
    return network if str(network) == key.name else None


def _closed(key: RecordKey) -> Kept | int:
    """Return what stands in for a record that cannot be read and has no last good value; of an entry, its expiry."""
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
            return UNREADABLE
