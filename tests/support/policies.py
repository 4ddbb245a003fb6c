"""Writing to a store in tests, and comparing what came of it."""

import random
import secrets
from typing import Any

from authz_server.policy.access import Enforcement, Entry, Mode, NamedList, Resource, Scope
from authz_server.policy.addresses import Network, parse_network
from authz_server.policy.affinity import Instance, InstanceState, Tenant
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.records import Record, RecordKey, RecordKind
from authz_server.policy.snapshot import Snapshot
from authz_server.store.interface import Change, Check, LoadedPolicy, Store, Write, WriteResult

OFFICE = RecordKey(RecordKind.LIST, "office")
Q1 = RecordKey(RecordKind.INSTANCE, "q1")
ACME = RecordKey(RecordKind.TENANT, "acme")


def network_key(cidr: str, list_name: str = "office") -> RecordKey:
    return RecordKey(RecordKind.ENTRY, cidr, list_name)


def network_entry(cidr: str, reason: str = "because") -> Entry:
    return Entry(parse_network(cidr), reason=reason, author="alice", created_at=1_700_000_000)


class Writer:
    """Sets and removes records, whatever is there now."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def init(self) -> WriteResult:
        return await self.store.init(actor="alice", reason="a test", change_id=secrets.token_hex(8))

    async def change(self, *writes: Write, checks: tuple[Check, ...] = (), **fields: Any) -> Change:
        """A change made ready, and not applied."""
        named = {"change_id": secrets.token_hex(8), "actor": "alice", "reason": "a test", "action": "test"} | fields
        if "epoch" not in named:
            named["epoch"] = (await self.store.position()).epoch
        return Change(writes=writes, checks=checks, **named)

    async def set(self, *records: tuple[RecordKey, Record | None]) -> WriteResult:
        """Set records, or remove those whose value is None, in one change."""
        writes = []
        for key, record in records:
            stored = await self.store.read(key)
            writes.append(Write(key, stored.text if stored else None, record))
        return await self.store.apply(await self.change(*writes))


def random_change(rng: random.Random) -> tuple[RecordKey, Record]:
    """A record from a small world, so that changes meet again and again."""
    name = f"n{rng.randrange(4)}"
    named = rng.choice([(), ("n0",), ("n1", "n2")])
    match rng.choice(list(RecordKind)):
        case RecordKind.LIST:
            return RecordKey(RecordKind.LIST, name), NamedList(name, description=rng.choice(["", "said twice"]))
        case RecordKind.ENTRY:
            list_name = rng.choice(["n0", "n1", "global/block", "tenant:n0/allow"])
            length = rng.choice([0, 8, 24, 32])
            network = Network(4, (rng.randrange(3) + 10 << 24) >> 32 - length << 32 - length, length)
            record = Entry(network, "r", "a", rng.randrange(9), expires_at=rng.choice([None, 7]))
            return RecordKey(RecordKind.ENTRY, str(network), list_name), record
        case RecordKind.SCOPE:
            scope = rng.choice(["global", f"tenant:{name}", f"resource:{name}"])
            fields = (rng.choice(list(Mode)), rng.choice(list(Enforcement)), named)
            return RecordKey(RecordKind.SCOPE, scope), Scope(scope, *fields)
        case RecordKind.RESOURCE:
            return RecordKey(RecordKind.RESOURCE, name), Resource(name, (parse_path_pattern(f"/Docs{name}"),))
        case RecordKind.TENANT:
            return RecordKey(RecordKind.TENANT, name), Tenant(name, rng.choice(["q1", "q2"]), rng.random() < 0.5)
        case RecordKind.INSTANCE:
            return RecordKey(RecordKind.INSTANCE, name), Instance(name, rng.randrange(1, 9), InstanceState.ACTIVE)


def contents(snapshot: Snapshot) -> dict[str, Any]:
    """Everything in a snapshot, in a form that can be compared."""
    return {
        "epoch": snapshot.epoch,
        "revision": snapshot.revision,
        "options": snapshot.options,
        "tables": {name: sorted(table.items()) for name, table in snapshot.tables.items()},
        "named_lists": dict(snapshot.named_lists),
        "scopes": dict(snapshot.scopes),
        "resources": dict(snapshot.resources),
        "tenants": dict(snapshot.tenants),
        "instances": dict(snapshot.instances),
        "problems": dict(snapshot.problems),
        "unreadable": dict(snapshot.unreadable),
        "missing": dict(snapshot.missing),
        "global_scope": snapshot.global_scope,
        "guarded_resources": snapshot.guarded_resources,
    }


def by_key(policy: LoadedPolicy) -> dict[RecordKey, Any]:
    """The records of a load; each key must be there once."""
    records = dict(policy.records)
    assert len(records) == len(policy.records)
    return records
