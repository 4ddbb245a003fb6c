"""A strict move as it happens: two server processes, a real Valkey, `authzctl`, and checks all the time."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest
from support.authzctl import AuthzctlProcess
from support.process import ServerProcess, apply_writes, init_policy, start_together
from support.waiting import eventually

from authz_server.cli.acknowledgement import Acknowledgement, wait_for_servers
from authz_server.demo.valkey import Valkey
from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.grpcio_transport import SERVICE
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.records import record_key
from authz_server.store.interface import Write
from authz_server.store.redis_store import RedisStore

pytestmark = pytest.mark.integration

OLD, NEW, DENIED = "queue-1", "queue-2", "held"
DELAY_SECONDS = 2.0


@dataclass
class Checks:
    """What the servers answered about acme, with the times at which the answers arrived."""

    seen: list[tuple[float, str, str]] = field(default_factory=list)
    """(time, server, instance or DENIED)"""

    def times(self, what: str, server: str | None = None) -> list[float]:
        return [at for at, name, told in self.seen if told == what and server in (None, name)]

    async def until(self, what: str, server: str) -> None:
        await eventually(lambda: self.times(what, server), seconds=30)


@pytest.fixture
def servers(own_valkey: Valkey, tmp_path: Path) -> Iterator[dict[str, ServerProcess]]:
    init_policy(own_valkey.url)
    records = (Instance(OLD), Instance(NEW), Tenant("acme", OLD))
    apply_writes(own_valkey.url, "c1", *(Write(record_key(record), None, record) for record in records))
    with ExitStack() as stack:
        servers = {}
        for name in ("pod-a", "pod-b"):
            (tmp_path / name).mkdir()
            environ = {
                "AUTHZ_REDIS_URL": own_valkey.url,
                "AUTHZ_REPLICA_NAME": name,
                # A server that was paused would else shed, by right, what it had read and not decided yet.
                "AUTHZ_MAX_WAIT_SECONDS": "10",
            }
            servers[name] = ServerProcess(tmp_path / name, environ)
        start_together(stack, *servers.values())
        for server in servers.values():
            server.wait_ready()
        reported = asyncio.run(all_reported(own_valkey))
        assert reported.complete, reported
        yield servers


async def all_reported(valkey: Valkey) -> Acknowledgement:
    store = RedisStore(valkey.url)
    try:
        return await wait_for_servers(store, await store.position(), seconds=20)
    finally:
        await store.close()


@asynccontextmanager
async def checking(servers: dict[str, ServerProcess]) -> AsyncIterator[Checks]:
    """Ask each server about acme again and again, several questions at a time."""
    message = ext_authz_pb2.CheckRequest()
    http = message.attributes.request.http
    http.method, http.host, http.path = "GET", "www.example.com", "/"
    http.headers["x-envoy-external-address"] = "203.0.113.7"
    http.headers["x-tenant-id"] = "acme"
    data = message.SerializeToString()
    checks = Checks()

    async def ask(name: str, channel: grpc.aio.Channel) -> None:
        call = channel.unary_unary(f"/{SERVICE}/Check")
        while True:
            answer = ext_authz_pb2.CheckResponse.FromString(await call(data))
            headers = {option.header.key: option.header.value for option in answer.ok_response.headers}
            told = headers["x-tenant-instance"] if answer.status.code == 0 else DENIED
            if told == DENIED:
                assert answer.denied_response.status.code == 503
            checks.seen.append((time.monotonic(), name, told))
            await asyncio.sleep(0.002)

    channels = {name: grpc.aio.insecure_channel(server.grpc) for name, server in servers.items()}
    tasks = [asyncio.create_task(ask(name, channel)) for name, channel in channels.items() for _ in range(4)]
    try:
        for name in servers:
            await checks.until(OLD, name)
        yield checks
        assert not any(task.done() for task in tasks), "every check was answered"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in channels.values():
            await channel.close()


MOVE = "affinity move acme queue-2 --strict --wait 30 --settle 0.2"


async def test_no_request_on_the_old_instance_after_the_first_on_the_new(
    own_valkey: Valkey, servers: dict[str, ServerProcess]
) -> None:
    """One server is delayed by seconds: the other holds the tenant back for as long."""
    async with checking(servers) as checks:
        servers["pod-b"].child.pause()
        try:
            async with AuthzctlProcess(own_valkey.url, MOVE) as move:
                await checks.until(DENIED, "pod-a")
                await asyncio.sleep(DELAY_SECONDS)
                assert not checks.times(NEW)
                servers["pod-b"].child.resume()
                assert (await move.ended())[0] == 0
        finally:
            servers["pod-b"].child.resume()
        for name in servers:
            await checks.until(NEW, name)
    assert max(checks.times(OLD)) < min(checks.times(NEW))
    assert min(checks.times(NEW)) - min(checks.times(DENIED, "pod-a")) > DELAY_SECONDS
    assert checks.times(DENIED, "pod-b"), "the delayed one has held it back as well"


async def test_a_server_that_does_not_come_back_ends_the_move_where_it_began(
    own_valkey: Valkey, servers: dict[str, ServerProcess]
) -> None:
    async with checking(servers) as checks:
        servers["pod-b"].child.pause()
        try:
            async with AuthzctlProcess(own_valkey.url, MOVE.replace("--wait 30", "--wait 1")) as move:
                code, out = await move.ended()
        finally:
            servers["pod-b"].child.resume()
        assert code == 4, out
        assert "pod-b: it decides by revision 2" in out
        assert "0 of 1 tenant done" in out
        released = time.monotonic()
        await eventually(lambda: all(max(checks.times(OLD, name)) > released for name in servers))
    assert checks.times(DENIED, "pod-a")
    assert not checks.times(NEW)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
async def test_a_move_that_is_stopped_is_undone_or_gone_on_with(
    own_valkey: Valkey, servers: dict[str, ServerProcess], number: signal.Signals
) -> None:
    async with checking(servers) as checks:
        servers["pod-b"].child.pause()
        try:
            async with AuthzctlProcess(own_valkey.url, MOVE) as move:
                await checks.until(DENIED, "pod-a")
                move.process.send_signal(number)
                code, out = await move.ended()
        finally:
            servers["pod-b"].child.resume()
        if number != signal.SIGKILL:
            assert code == 130, out
            assert "0 of 1 tenant done" in out
            assert "may be held" not in out
        async with AuthzctlProcess(own_valkey.url, MOVE) as move:
            code, out = await move.ended()
        assert code == 0, out
        for name in servers:
            await checks.until(NEW, name)
    assert max(checks.times(OLD)) < min(checks.times(NEW))
