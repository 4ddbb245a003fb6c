"""Bad data in the store, each kind through the real server: what it decides then, says in /readyz and counts.

Each kind is met twice: by a server that starts and knows nothing else, and by one that starts with the snapshot file of
an earlier one. The first must not be open where the policy was closed, unless it says so; the second decides as before.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis import Redis
from support.process import ServerProcess, apply_writes, init_policy, start_together

from authz_server.demo.valkey import Valkey
from authz_server.policy.access import Entry, Mode, NamedList, Scope
from authz_server.policy.addresses import parse_network
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.records import entry_key, record_key
from authz_server.store.interface import Write

pytestmark = pytest.mark.integration

BLOCK = Entry(parse_network("198.51.100.0/24"), "scraper", "ann", 1)
DESK = Entry(parse_network("203.0.113.0/24"), "desks", "ann", 1)
BLOCKS, OFFICE = "{authz}:entries:global/block", "{authz}:entries:office"
META, COUNTS, CHANGES, SCOPES, TENANTS = (
    f"{{authz}}:{name}" for name in ("meta", "counts", "changes", "scopes", "tenants")
)

PROBES: dict[str, tuple[str, dict[str, str]]] = {
    "blocked": ("198.51.100.7", {}),
    "anybody": ("192.0.2.1", {}),
    "office to acme": ("203.0.113.7", {"x_tenant_id": "acme"}),
    "anybody to acme": ("192.0.2.1", {"x_tenant_id": "acme"}),
    "anybody to beta": ("192.0.2.1", {"x_tenant_id": "beta"}),
}
SOUND = {
    "blocked": "denied",
    "anybody": "ok",
    "office to acme": "ok at q1",
    "anybody to acme": "denied",
    "anybody to beta": "ok at q2",
}
NO_DECISION = dict.fromkeys(PROBES, "UNAVAILABLE")
SAID_BY_NAME = "edited behind the stream's back: "


def fill(valkey: Valkey) -> None:
    init_policy(valkey.url)
    records: list[Any] = [
        NamedList("office"),
        Scope("tenant:acme", Mode.RESTRICTED, allow_lists=("office",)),
        Instance("q1"),
        Instance("q2"),
        Tenant("acme", "q1"),
        Tenant("beta", "q2"),
    ]
    writes = [Write(record_key(record), None, record) for record in records]
    writes += [
        Write(entry_key(name, entry), None, entry) for name, entry in (("global/block", BLOCK), ("office", DESK))
    ]
    apply_writes(valkey.url, "fill", *writes)


def decisions(server: ServerProcess) -> dict[str, str]:
    told = {}
    for name, (address, headers) in PROBES.items():
        try:
            answer = server.check(address, **headers)
        except grpc.RpcError as error:
            told[name] = error.code().name  # type: ignore[attr-defined]
            continue
        headers_set = {each.header.key: each.header.value for each in answer.ok_response.headers}
        instance = headers_set.get("x-tenant-instance")
        told[name] = "denied" if answer.status.code else f"ok at {instance}" if instance else "ok"
    return told


@dataclass
class Store:
    """A Valkey with a sound policy, to be damaged and mended, and the snapshot file of a server that has seen it."""

    valkey: Valkey
    client: Any
    file: Path
    sound: dict[bytes, bytes] = field(default_factory=dict)

    def mend(self) -> None:
        self.client.flushall()
        for key, value in self.sound.items():
            self.client.restore(key, 0, value)

    def environ(self, file: Path | None) -> dict[str, str]:
        environ = {"AUTHZ_REDIS_URL": self.valkey.url, "AUTHZ_TENANT_FROM": "header:x-tenant-id"}
        return environ | ({"AUTHZ_SNAPSHOT_FILE": str(file)} if file else {})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("sound")
    with Valkey() as valkey, Redis.from_url(valkey.url) as client:
        store = Store(valkey, client, folder / "snapshot")
        fill(valkey)
        with ServerProcess(folder, store.environ(store.file)) as server:
            server.wait_ready()
            server.child.wait_until(store.file.exists, what="a snapshot file", timeout=10)
            assert decisions(server) == SOUND
        store.sound = {key: client.dump(key) for key in client.scan_iter() if key != b"{authz}:replicas"}
        yield store


def rename_field(client: Any, key: str, old: str, new: str) -> None:
    client.hset(key, new, client.hget(key, old))
    client.hdel(key, old)


def evict(client: Any) -> None:
    """Let the server throw away the block list, as the key that was used the longest ago."""
    client.restore(BLOCKS, 0, client.dump(BLOCKS), replace=True, idletime=1_000_000)
    client.set("filler", "x" * 100_000)
    client.restore("filler", 0, client.dump("filler"), replace=True, idletime=500_000)
    before = client.config_get("maxmemory*")
    client.config_set("maxmemory-samples", 64)
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", client.info("memory")["used_memory"] - 1)
    while client.exists(BLOCKS):
        client.ping()
    for name, value in before.items():
        client.config_set(name, value)
    assert client.info("stats")["evicted_keys"] > 0
    assert client.exists(META, CHANGES, COUNTS, OFFICE, SCOPES, TENANTS) == 6


def take_over(key: str, value: str = "somebody's") -> Callable[[Any], None]:
    def damage(client: Any) -> None:
        client.delete(key)
        client.set(key, value)

    return damage


def other_keys(client: Any) -> None:
    client.set("session:1", "x")
    client.set("authz:meta", "x")
    client.hset("{authz}:sessions", "a", "b")
    client.xadd("{authz}:jobs", {"order": "7"})


@dataclass(frozen=True)
class Kind:
    """A kind of bad data, and what servers make of it."""

    damage: Callable[[Any], Any]
    decides: dict[str, str]
    """By a server that knows nothing else."""
    says: str
    """In /readyz, of the store."""
    unreadable: int = 0
    edited: int = 0
    incident: int = 0
    degraded: tuple[str, ...] = ()
    """Scopes that use a list with an unreadable entry, by /snapshot."""
    told_to_all: bool = True
    """Whether a server that has the policy in its file says it too."""


HAND_EDITED = {"edited": 1, "told_to_all": False}
"""Who goes on with a sound snapshot reads nothing anew: that is `authzctl reconcile`'s work."""

KINDS = {
    "a value edited by hand": Kind(
        lambda client: client.hset(TENANTS, "beta", '{"instance":"q1"}'),
        SOUND | {"anybody to beta": "ok at q1"},
        SAID_BY_NAME + "tenants",
        **HAND_EDITED,
    ),
    "JSON of a pin cut off": Kind(
        lambda client: client.hset(TENANTS, "beta", '{"instance":"q'),
        SOUND | {"anybody to beta": "denied"},
        SAID_BY_NAME + "tenants",
        unreadable=1,
        **HAND_EDITED,
    ),
    "JSON of a scope cut off": Kind(
        lambda client: client.hset(SCOPES, "tenant:acme", '{"mode":"restri'),
        SOUND | {"office to acme": "denied"},
        SAID_BY_NAME + "scopes",
        unreadable=1,
        **HAND_EDITED,
    ),
    "bytes that are no text": Kind(
        lambda client: client.hset(TENANTS, "beta", b"\xff\xfe"),
        SOUND | {"anybody to beta": "denied"},
        SAID_BY_NAME + "tenants",
        unreadable=1,
        **HAND_EDITED,
    ),
    "host bits in an allow": Kind(
        lambda client: rename_field(client, OFFICE, "203.0.113.0/24", "203.0.113.7/24"),
        SOUND | {"office to acme": "denied"},
        SAID_BY_NAME + "entries:office",
        unreadable=1,
        degraded=("tenant:acme",),
        **HAND_EDITED,
    ),
    "JSON of a block cut off": Kind(
        lambda client: client.hset(BLOCKS, "198.51.100.0/24", '{"author":"a'),
        SOUND,
        SAID_BY_NAME + "entries:global/block",
        unreadable=1,
        degraded=("global",),
        **HAND_EDITED,
    ),
    "JSON of an allow cut off": Kind(
        lambda client: client.hset(OFFICE, "203.0.113.0/24", '{"author":"a'),
        SOUND | {"office to acme": "denied"},
        SAID_BY_NAME + "entries:office",
        unreadable=1,
        degraded=("tenant:acme",),
        **HAND_EDITED,
    ),
    # The one kind that opens something: a block of which nobody can read the network. Its scope is degraded.
    "host bits in a block": Kind(
        lambda client: rename_field(client, BLOCKS, "198.51.100.0/24", "198.51.100.7/24"),
        SOUND | {"blocked": "ok"},
        SAID_BY_NAME + "entries:global/block",
        unreadable=1,
        degraded=("global",),
        **HAND_EDITED,
    ),
    "an unknown format": Kind(
        lambda client: client.hset(META, "format", "2"), NO_DECISION, "has format '2'; this version reads '1'"
    ),
    "a missing list": Kind(
        lambda client: client.delete(OFFICE), NO_DECISION, "entries:office: 0 instead of 1", incident=1
    ),
    "a missing meta key": Kind(
        lambda client: client.delete(META), NO_DECISION, "the meta key, which is gone", incident=1
    ),
    "a missing stream": Kind(
        lambda client: client.delete(CHANGES), NO_DECISION, "the change stream, which is gone", incident=1
    ),
    "nothing left": Kind(lambda client: client.flushall(), NO_DECISION, "there is no policy under {authz}"),
    "an evicted list": Kind(evict, NO_DECISION, "entries:global/block: 0 instead of 1", incident=1),
    "other products' keys": Kind(other_keys, SOUND, "connected"),
    "another product's value under a collection's key": Kind(
        take_over(TENANTS), NO_DECISION, "which is something else: another product's?", incident=1
    ),
    "another product's value under the meta key": Kind(
        take_over(META), NO_DECISION, "which is something else: another product's?", incident=1
    ),
    "another product's entry in the stream": Kind(
        lambda client: client.xadd(CHANGES, {"order": "7"}), NO_DECISION, "does not end with revision 2", incident=1
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_bad_data(store: Store, kind: Kind, tmp_path: Path) -> None:
    store.mend()
    kind.damage(store.client)
    file = tmp_path / "snapshot"
    file.write_bytes(store.file.read_bytes())
    file.chmod(0o600)
    folders = tmp_path / "knows nothing", tmp_path / "has a file"
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        new, kept = (
            ServerProcess(folder, store.environ(has)) for folder, has in zip(folders, (None, file), strict=True)
        )
        start_together(stack, new, kept)
        wait_for_saying(new, kind.says)
        counted = {
            "authz_ready": int(kind.decides is not NO_DECISION),
            "authz_store_incident": kind.incident,
            "authz_store_edited_collections": kind.edited,
        }
        if kind.decides is not NO_DECISION:
            counted["authz_snapshot_unreadable_records"] = kind.unreadable
        assert new.get("/readyz")[0] == (503 if kind.decides is NO_DECISION else 200)
        assert decisions(new) == kind.decides
        assert {name: new.metric(name) for name in counted} == counted
        if kind.decides is not NO_DECISION:
            assert new.get_json("/snapshot")["degraded_scopes"] == list(kind.degraded)

        wait_for_saying(kept, kind.says if kind.told_to_all else "connected")
        assert kept.get("/readyz")[0] == 200
        assert decisions(kept) == SOUND
        assert kept.metric("authz_store_incident") == kind.incident


def wait_for_saying(server: ServerProcess, words: str) -> None:
    def said() -> bool:
        return words in server.component("redis")["detail"]

    server.child.wait_until(said, what=f"{words!r} in /readyz", timeout=20)
