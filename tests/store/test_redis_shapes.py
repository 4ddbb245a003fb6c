"""Where the store can be: behind TLS, under users with few rights, watched by Sentinels, in a cluster."""

import asyncio
import secrets
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, ResponseError
from support.policies import ACME, Q1, Writer, by_key, contents, network_entry, network_key
from support.redis_shapes import Cluster, Watched, call
from support.tls_proxy import TlsProxy
from support.waiting import eventually

from authz_server.demo.valkey import Valkey
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.snapshot import DecisionOptions, build_snapshot
from authz_server.refresher import LostChanges, Refresher
from authz_server.replicas import Registry
from authz_server.store import redis_store
from authz_server.store.address import RedisAddress, RedisTls
from authz_server.store.interface import (
    NotDurableError,
    Position,
    Replacement,
    Report,
    Store,
    StoreError,
    StoreRefusedError,
    StoreUnavailableError,
    WriteResult,
)
from authz_server.store.redis_store import RedisStore

pytestmark = pytest.mark.integration

USERS = Path(__file__).parents[2] / "acl" / "users.acl"


@asynccontextmanager
async def opened(address: RedisAddress | str, **options: Any) -> AsyncIterator[RedisStore]:
    store = RedisStore(address, **options)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def following(store: Store, **options: Any) -> AsyncIterator[Refresher]:
    refresher = Refresher(store, DecisionOptions(), **options)
    task = asyncio.create_task(refresher.run())
    try:
        yield refresher
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=0.1)


async def insist(store: Store, weight: int) -> Position:
    """Write until it is written, as somebody does whose store is failing over."""
    deadline = asyncio.get_running_loop().time() + 20
    while True:
        try:
            return (await Writer(store).set((Q1, Instance("q1", weight)))).position
        except StoreError:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.1)


async def fresh(store: Store) -> dict[str, Any]:
    policy = await store.load()
    position = policy.position
    snapshot = build_snapshot(
        policy.records, epoch=position.epoch, revision=position.revision, options=DecisionOptions()
    )
    return contents(snapshot)


def office(count: int) -> dict[Any, Any]:
    cidrs = [f"10.0.{i // 256}.{i % 256}/32" for i in range(count)]
    return {network_key(cidr): network_entry(cidr) for cidr in cidrs}


# Users with few rights


@pytest.fixture(scope="module")
def guarded() -> Iterator[Valkey]:
    """A Valkey with the users of acl/users.acl."""
    with Valkey(append_only=True, settings={"aclfile": str(USERS)}) as server:
        yield server


def as_user(server: Valkey, user: str) -> str:
    return f"redis://authz-{user}:replace-the-{user}-password@127.0.0.1:{server.port}/0"


async def test_the_product_runs_under_its_users_and_nothing_is_refused(guarded: Valkey) -> None:
    async with (
        opened(as_user(guarded, "admin")) as admin,
        opened(as_user(guarded, "server")) as server,
        following(server) as refresher,
    ):
        writer = Writer(admin)
        await writer.init()
        await writer.set((Q1, Instance("q1")), (ACME, Tenant("acme", "q1")))
        await writer.set((ACME, None))
        epoch = (await admin.position()).epoch
        result = (
            await admin.replace(Replacement("c1", epoch, "a", "r", "import", {"entries:office": office(1500)}))
        ).result
        assert result
        await admin.make_durable(result, await admin.durability(), seconds=5)
        await eventually(lambda: refresher.current and refresher.current.revision == 4)
        assert contents(refresher.current) == await fresh(server) == await fresh(admin)
        assert (await server.verify(0)).counts
        assert await server.history(count=2) == await admin.history(count=2)
        report = Report("pod-a", "p1", 1.0, await server.position())
        assert await server.report(report, take_over=True)
        assert [one.report for one in await admin.replicas()] == [report]
        registry = await Registry.read(server)
        assert [registry.is_newest(one) for one in registry.replicas] == [True]
        assert await server.forget("pod-a")
        examined = await admin.examine()
        assert examined.sound
        await admin.confirm(examined, actor="a", reason="r", change_id="c2")
        await eventually(lambda: refresher.current and refresher.current.revision == 5)
        assert await admin.find_change("c1")


@pytest.mark.parametrize(
    "command",
    [
        ("HSET", "{authz}:meta", "epoch", "x"),
        ("HSET", "{authz}:scopes", "global", "{}"),
        ("HDEL", "{authz}:tenants", "acme"),
        ("DEL", "{authz}:counts"),
        ("XADD", "{authz}:changes", "*", "a", "b"),
        ("SET", "{authz}:change:x", "y"),
        ("HGET", "{other}:replicas", "a"),
        ("EVAL", "return 1", "0"),
        ("FLUSHALL",),
        ("CONFIG", "SET", "maxmemory", "1"),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("SHUTDOWN",),
        ("ACL", "LIST"),
    ],
    ids=" ".join,
)
async def test_a_server_can_write_nothing_but_reports(guarded: Valkey, command: tuple[str, ...]) -> None:
    client: Any = Redis.from_url(as_user(guarded, "server"))
    async with client:
        with pytest.raises((NoPermissionError, ResponseError), match=r"(?i)permission"):
            await client.execute_command(*command)


@pytest.mark.parametrize(
    "command",
    [
        ("SET", "others", "x"),
        ("HSET", "{authz2}:meta", "epoch", "x"),
        ("EVAL", "return redis.call('SET', 'others', 'x')", "0"),
        ("FLUSHALL",),
        ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"),
        ("ACL", "SETUSER", "authz-server", "allcommands"),
        ("SHUTDOWN",),
        ("KEYS", "*"),
    ],
    ids=" ".join,
)
async def test_an_administrator_can_touch_nothing_but_the_policy(guarded: Valkey, command: tuple[str, ...]) -> None:
    client: Any = Redis.from_url(as_user(guarded, "admin"))
    async with client:
        with pytest.raises((NoPermissionError, ResponseError), match=r"(?i)permission"):
            await client.execute_command(*command)


async def test_a_server_s_user_cannot_change_the_policy(guarded: Valkey) -> None:
    async with opened(as_user(guarded, "server"), prefix="authz") as server:
        with pytest.raises(StoreRefusedError, match="permission"):
            await server.init(actor="a", reason="r", change_id="c")


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def written(pem: Any, path: Path) -> Path:
    pem.write_to_path(path)
    return path


async def test_tls_with_a_certificate_of_our_own(valkey: Valkey, authority: trustme.CA, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    ours = authority.issue_cert("authz-server")
    ca = written(authority.cert_pem, tmp_path / "ca.pem")
    certificate = written(ours.cert_chain_pems[0], tmp_path / "certificate.pem")
    key = written(ours.private_key_pem, tmp_path / "key.pem")
    async with TlsProxy(valkey.port, context) as proxy:
        prefix = f"test-{secrets.token_hex(4)}"
        url = f"rediss://127.0.0.1:{proxy.port}"
        async with opened(RedisAddress(url, tls=RedisTls(ca, certificate, key)), prefix=prefix) as store:
            await Writer(store).init()
            async with following(store) as refresher:
                await Writer(store).set((Q1, Instance("q1")))
                await eventually(lambda: refresher.current and refresher.current.revision == 2)
        for tls in (
            RedisTls(ca),
            RedisTls(certificate=certificate, key=key),
        ):  # shows no certificate; trusts another CA
            async with opened(RedisAddress(url, tls=tls), prefix=prefix) as store:
                with pytest.raises(StoreUnavailableError):
                    await store.position()


async def test_tls_to_a_server_of_another_name_is_refused(
    valkey: Valkey, authority: trustme.CA, tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("valkey.example.com").configure_cert(context)
    ca = written(authority.cert_pem, tmp_path / "ca.pem")
    async with (
        TlsProxy(valkey.port, context) as proxy,
        opened(RedisAddress(f"rediss://127.0.0.1:{proxy.port}", tls=RedisTls(ca))) as store,
    ):
        with pytest.raises(StoreUnavailableError, match=r"(?i)certificate"):
            await store.position()


# Sentinel


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_a_failover_by_sentinels_is_followed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "_REPLY_SECONDS", 1.5)  # a primary that hangs is asked three times
    with Watched() as servers:
        async with opened(servers.address) as store, opened(servers.address) as other, following(other) as refresher:
            await Writer(store).init()
            position = await insist(store, 2)
            await store.make_durable(WriteResult(position, repeated=False), await store.durability(), seconds=5)
            await eventually(lambda: refresher.status.position == position)
            last = refresher.current
            before = await asyncio.to_thread(servers.fail_over, how)
            assert refresher.current is last
            after = await insist(store, 3)
            assert after.revision == position.revision + 1
            await eventually(lambda: refresher.status.position == after, seconds=20)
            assert contents(refresher.current) == await fresh(store)
            assert (refresher.status.lost, refresher.status.connected) == (0, True)
            if how == "pause":
                before.resume()


async def test_a_change_that_a_failover_loses_is_told_by_those_who_had_it() -> None:
    """Acknowledged by the primary, applied by servers, and never seen by the replica that took over."""
    told: list[LostChanges] = []
    with Watched() as servers:
        async with (
            opened(servers.address) as store,
            opened(servers.address) as other,
            following(other, on_lost=told.append) as refresher,
        ):
            await Writer(store).init()
            kept = await insist(store, 2)
            await store.make_durable(WriteResult(kept, repeated=False), await store.durability(), seconds=5)
            await eventually(lambda: refresher.status.position == kept)
            replica = next(server for server in servers.servers if server is not servers.primary())
            durability = await store.durability()
            # What is in the buffers of a connection when the primary dies would still arrive.
            replica.pause()
            call(servers.primary().port, "CLIENT", "KILL", "TYPE", "replica")
            lost = await insist(store, 3)
            await eventually(lambda: refresher.status.position == lost)
            with pytest.raises(NotDurableError, match="0 of 1 replicas"):
                await store.make_durable(WriteResult(lost, repeated=False), durability, seconds=0.2)
            servers.primary().kill()
            replica.resume()
            after = await insist(store, 4)
            await eventually(lambda: refresher.status.position == after, seconds=20)
            assert contents(refresher.current) == await fresh(store)
            (report,) = told
            assert [event.position for event in report.events] == [lost]
            assert [event.records[0].record for event in report.events] == [Instance("q1", 3)]
            with pytest.raises(NotDurableError, match="was lost"):
                await store.make_durable(WriteResult(lost, repeated=False), durability, seconds=1)


# Cluster


async def test_a_failover_in_a_cluster_is_followed() -> None:
    prefix = f"test-{secrets.token_hex(4)}"
    key = f"{{{prefix}}}:meta"
    with Cluster() as nodes:
        nodes.protect(key)
        async with (
            opened(nodes.address, prefix=prefix) as store,
            opened(nodes.address, prefix=prefix) as other,
            following(other) as refresher,
        ):
            await Writer(store).init()
            position = await insist(store, 2)
            await store.make_durable(WriteResult(position, repeated=False), await store.durability(), seconds=5)
            await eventually(lambda: refresher.status.position == position)
            nodes.primary(key).kill()
            after = await insist(store, 3)
            assert after.revision == position.revision + 1
            await eventually(lambda: refresher.status.position == after, seconds=20)
            assert contents(refresher.current) == await fresh(store)
            assert refresher.status.lost == 0
            assert call(nodes.nodes[3].port, "EXISTS", key) == 1
            assert Q1 in by_key(await store.load())
