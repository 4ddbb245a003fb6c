"""What every transport must do, whatever it is made of. A second one is added to TRANSPORTS."""

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest
import trustme
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.waiting import eventually

from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.asyncio_transport import AsyncioTransport
from authz_server.ext_authz.check_response import ResponseOptions
from authz_server.ext_authz.checker import Checked, Checker, Checks
from authz_server.ext_authz.choice import Transport
from authz_server.ext_authz.grpcio_transport import GrpcioTransport
from authz_server.ext_authz.transport import ObserveWait, TlsFiles, TransportError, ignore_wait
from authz_server.health import ComponentName, HealthState
from authz_server.policy.access import Entry
from authz_server.policy.addresses import parse_network
from authz_server.policy.reasons import Reason
from authz_server.policy.records import entry_key
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot

pytestmark = pytest.mark.integration

AUTHORIZATION = "envoy.service.auth.v3.Authorization"
CHECK = f"/{AUTHORIZATION}/Check"
MAX_REQUEST_BYTES = 1024 * 1024
MEBIBYTE = 1024 * 1024
DEADLINE_SECONDS = 10
BLOCK = Entry(parse_network("198.51.100.0/24"), reason="abuse", author="ann", created_at=1)
SNAPSHOT = build_snapshot([(entry_key("global/block", BLOCK), BLOCK)], epoch="e", revision=5, options=DecisionOptions())


class TransportFactory(Protocol):
    def __call__(
        self, checker: Checker, *, listen: str, tls: TlsFiles | None, health: HealthState, observe_wait: ObserveWait
    ) -> Transport: ...


TRANSPORTS = [
    pytest.param(GrpcioTransport, id="grpcio"),
    # A stall of this machine sheds nothing.
    pytest.param(partial(AsyncioTransport, max_wait_seconds=DEADLINE_SECONDS), id="asyncio"),
]


@dataclass
class Served:
    """A transport that is listening, and what stands behind it."""

    make: TransportFactory
    snapshot: Snapshot | None = SNAPSHOT
    tls: TlsFiles | None = None
    listen: str = "127.0.0.1:0"
    health: HealthState = field(default_factory=HealthState)
    seen: list[Checked] = field(default_factory=list)
    waits: list[tuple[float, int]] = field(default_factory=list)
    in_flight: int = 0
    """The most calls that the transport had while it had one decided."""
    port: int = 0
    transport: Transport | None = None

    async def start(self) -> None:
        checker = Checker(
            lambda: self.snapshot, ResponseOptions(), max_request_bytes=MAX_REQUEST_BYTES, observe=self.observe
        )
        self.transport = self.make(
            checker,
            listen=self.listen,
            tls=self.tls,
            health=self.health,
            observe_wait=lambda seconds, checks: self.waits.append((seconds, checks)),
        )
        self.port = await self.transport.start()

    def observe(self, checks: Checks) -> None:
        assert self.transport is not None
        self.seen += checks
        self.in_flight = max(self.in_flight, self.transport.in_flight)

    async def drain(self, grace_seconds: float) -> None:
        assert self.transport is not None
        await self.transport.drain(grace_seconds)

    def set_ready(self, ready: bool) -> None:
        for name in ComponentName:
            self.health.set(name, ready=ready, detail="the test says so")

    @asynccontextmanager
    async def channel(self, credentials: grpc.ChannelCredentials | None = None) -> AsyncIterator[grpc.aio.Channel]:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
        target = f"localhost:{self.port}"
        if credentials:
            opened = grpc.aio.secure_channel(target, credentials, options=options)
        else:
            opened = grpc.aio.insecure_channel(target, options=options)
        async with opened as channel:
            yield channel

    async def check(self, data: bytes, credentials: grpc.ChannelCredentials | None = None) -> "Answer":
        async with self.channel(credentials) as channel:
            return await check(channel, data)


@dataclass(frozen=True)
class Answer:
    code: int
    reason: str


async def check(channel: grpc.aio.Channel, data: bytes, metadata: Sequence[tuple[str, str]] = ()) -> Answer:
    call = channel.unary_unary(CHECK)(data, timeout=DEADLINE_SECONDS, metadata=metadata)
    answer = ext_authz_pb2.CheckResponse.FromString(await call)
    return Answer(answer.status.code, answer.dynamic_metadata.fields["reason"].string_value)


ALLOWED = Answer(0, Reason.ALLOWED)
BLOCKED = Answer(7, Reason.BLOCKED)


def request(address: str = "203.0.113.7", padding: int = 0) -> bytes:
    message = ext_authz_pb2.CheckRequest()
    http = message.attributes.request.http
    http.method, http.host, http.path = "GET", "www.example.com", "/"
    http.headers["x-envoy-external-address"] = address
    http.headers["x-padding"] = "a" * padding
    data: bytes = message.SerializeToString()
    return data


@asynccontextmanager
async def refused(code: grpc.StatusCode) -> AsyncIterator[list[str]]:
    """Expect an RPC error of this code; its details are appended to the list."""
    details: list[str] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield details
    assert caught.value.code() is code, caught.value
    details.append(caught.value.details() or "")


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture(params=TRANSPORTS)
def make(request: pytest.FixtureRequest) -> TransportFactory:
    factory: TransportFactory = request.param
    return factory


@pytest.fixture
async def serve(make: TransportFactory) -> AsyncIterator[Serve]:
    """Start transports, and end them whatever happens."""
    started: list[Served] = []

    async def start(**fields: Any) -> Served:
        served = Served(make, **fields)
        await served.start()
        started.append(served)
        return served

    yield start
    for served in started:
        await served.drain(0)


# ---- Check ------------------------------------------------------------------------------------------------------


async def test_check_allows_and_denies(serve: Serve) -> None:
    served = await serve()
    assert await served.check(request()) == ALLOWED
    assert await served.check(request("198.51.100.1")) == BLOCKED
    assert [checked.revision for checked in served.seen] == [5, 5]


async def test_without_a_snapshot_check_is_unavailable_until_there_is_one(serve: Serve) -> None:
    served = await serve(snapshot=None)
    async with served.channel() as channel:
        async with refused(grpc.StatusCode.UNAVAILABLE) as details:
            await check(channel, request())
        assert "snapshot" in details[0]
        served.snapshot = SNAPSHOT
        assert await check(channel, request()) == ALLOWED


async def test_how_many_calls_are_in_flight(serve: Serve) -> None:
    served = await serve()
    assert served.transport is not None
    before = served.transport.in_flight
    async with served.channel() as channel:
        await asyncio.gather(*(check(channel, request()) for _ in range(50)))
    assert 1 < served.in_flight - before <= 50
    transport = served.transport
    await eventually(lambda: transport.in_flight == before)


async def test_how_long_checks_waited(serve: Serve) -> None:
    served = await serve()
    envoy_s = ("x-envoy-expected-rq-timeout-ms", str(DEADLINE_SECONDS * 1000))
    async with served.channel() as channel:
        await asyncio.gather(*(check(channel, request(), [envoy_s]) for _ in range(50)))
    assert sum(checks for _, checks in served.waits) == 50
    assert all(0 <= seconds < DEADLINE_SECONDS / 2 for seconds, _ in served.waits)
    assert len({seconds for seconds, _ in served.waits}) > 1, "measured, not made up"


@pytest.mark.parametrize("text", ["", "-1", "1.5", "9" * 10, "1e3"])
async def test_a_wait_that_cannot_be_known_is_nobody_s_trouble(serve: Serve, text: str) -> None:
    served = await serve()
    async with served.channel() as channel:
        assert await check(channel, request(), [("x-envoy-expected-rq-timeout-ms", text)]) == ALLOWED


@pytest.mark.parametrize("snapshot", [SNAPSHOT, None], ids=["with a snapshot", "without a snapshot"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", Reason.BAD_REQUEST, id="empty"),
        pytest.param(b"\xff" * 100, Reason.BAD_REQUEST, id="garbage"),
        pytest.param(request(padding=MAX_REQUEST_BYTES), Reason.REQUEST_TOO_LARGE, id="beyond the soft limit"),
        pytest.param(request(padding=4 * MEBIBYTE), Reason.REQUEST_TOO_LARGE, id="4 MiB"),
        pytest.param(request(padding=31 * MEBIBYTE), Reason.REQUEST_TOO_LARGE, id="31 MiB"),
    ],
)
async def test_what_a_request_causes_is_a_denial(
    serve: Serve, snapshot: Snapshot | None, data: bytes, reason: Reason
) -> None:
    served = await serve(snapshot=snapshot)
    assert await served.check(data) == Answer(7, reason)


async def test_no_length_of_a_message_hurts_anybody_else(serve: Serve, make: TransportFactory) -> None:
    """C-core refuses what is beyond its own hard limit by an RPC error; the other transport denies every length."""
    served = await serve()
    async with served.channel() as channel:
        if make is GrpcioTransport:
            async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
                await check(channel, request(padding=32 * MEBIBYTE))
        else:
            assert await check(channel, request(padding=40 * MEBIBYTE)) == Answer(7, Reason.REQUEST_TOO_LARGE)
        assert await check(channel, request()) == ALLOWED


@pytest.mark.parametrize("size", [8 * 1024, 60 * 1024, 8 * MEBIBYTE])
async def test_metadata_that_a_client_can_write_is_no_rpc_error(serve: Serve, size: int) -> None:
    """Envoy's tracers copy a client's `tracestate` into their own call to us, and an RPC error may let requests in."""
    served = await serve()
    options = [("grpc.max_metadata_size", 2 * size), ("grpc.absolute_max_metadata_size", 2 * size)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", options=options) as channel:
        assert await check(channel, request("198.51.100.1"), [("tracestate", "a=" + "b" * size)]) == BLOCKED


async def test_calls_at_the_same_time_get_their_own_answers(serve: Serve) -> None:
    served = await serve()
    addresses = ["203.0.113.7", "198.51.100.1"] * 100
    async with served.channel() as one, served.channel() as other:
        calls = [check((one, other)[index % 3 == 0], request(address)) for index, address in enumerate(addresses)]
        assert await asyncio.gather(*calls) == [ALLOWED, BLOCKED] * 100
    assert len(served.seen) == 200


@pytest.mark.parametrize("method", [f"/{AUTHORIZATION}/Chek", "/envoy.service.auth.v2.Authorization/Check", "/x/y"])
async def test_an_unknown_method_is_unimplemented(serve: Serve, method: str) -> None:
    served = await serve()
    async with served.channel() as channel, refused(grpc.StatusCode.UNIMPLEMENTED):
        await channel.unary_unary(method)(request(), timeout=DEADLINE_SECONDS)
    assert served.seen == []


async def test_frequent_pings_are_welcome(serve: Serve) -> None:
    """Envoy keeps connections alive by pings; gRPC's own default calls that abuse and hangs up."""
    served = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    try:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(SETTINGS, 0, b""))
        for number in range(8):
            payload = struct.pack(">Q", number)
            writer.write(http2_frame(PING, 0, payload))
            async with asyncio.timeout(DEADLINE_SECONDS):
                while (frame := await read_http2_frame(reader)) != (PING, ACK, payload):
                    assert frame[0] != GOAWAY, frame
            await asyncio.sleep(0.12)  # the length of the interval is what is tested
    finally:
        writer.close()
        await writer.wait_closed()


SETTINGS, PING, GOAWAY, ACK = 4, 6, 7, 1
"""Frame types and a flag of HTTP/2 (RFC 9113, section 6)."""


def http2_frame(kind: int, flags: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + bytes(4) + payload


async def read_http2_frame(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    head = await reader.readexactly(9)
    return head[3], head[4], await reader.readexactly(int.from_bytes(head[:3], "big"))


# ---- Listening ---------------------------------------------------------------------------------------------------


async def test_listens_on_ipv6_too(serve: Serve) -> None:
    served = await serve(listen="[::1]:0")
    async with grpc.aio.insecure_channel(f"[::1]:{served.port}") as channel:
        assert await check(channel, request()) == ALLOWED


async def test_a_port_that_is_taken_is_an_error_that_names_it(serve: Serve) -> None:
    taken = await serve()
    address = f"127.0.0.1:{taken.port}"
    with pytest.raises(TransportError, match=address):
        await serve(listen=address)
    assert await taken.check(request()) == ALLOWED


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "192.0.2.1:0", "127.0.0.1:port", "127.0.0.1", "127.0.0.1:"])
async def test_an_address_that_cannot_be_had_is_an_error_that_names_it(serve: Serve, listen: str) -> None:
    with pytest.raises(TransportError, match=listen):
        await serve(listen=listen)


# ---- Health ------------------------------------------------------------------------------------------------------

SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


def health_check(channel: grpc.aio.Channel, service: str) -> Awaitable[health_pb2.HealthCheckResponse]:
    call = channel.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    return call(health_pb2.HealthCheckRequest(service=service).SerializeToString(), timeout=DEADLINE_SECONDS)


def health_watch(channel: grpc.aio.Channel, service: str) -> Any:
    call = channel.unary_stream(
        "/grpc.health.v1.Health/Watch", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    return call(health_pb2.HealthCheckRequest(service=service).SerializeToString(), timeout=DEADLINE_SECONDS)


@pytest.mark.parametrize("service", ["", AUTHORIZATION])
async def test_health_follows_readiness(serve: Serve, service: str) -> None:
    served = await serve()
    async with served.channel() as channel:
        for ready in (False, True, False):
            served.set_ready(ready)
            answer = await health_check(channel, service)
            assert answer.status == (SERVING if ready else NOT_SERVING)


@pytest.mark.parametrize("service", ["", AUTHORIZATION])
async def test_a_health_watch_is_told_each_change(serve: Serve, service: str) -> None:
    served = await serve()
    async with served.channel() as channel:
        one, other = health_watch(channel, service), health_watch(channel, service)
        for ready in (False, True, False, True):
            served.set_ready(ready)
            for watch in (one, other):
                assert (await watch.read()).status == (SERVING if ready else NOT_SERVING)
        one.cancel()
        other.cancel()


async def test_health_of_a_service_that_is_not_here(serve: Serve) -> None:
    served = await serve()
    async with served.channel() as channel:
        async with refused(grpc.StatusCode.NOT_FOUND):
            await health_check(channel, "nobody")
        watch = health_watch(channel, "nobody")
        assert (await watch.read()).status == SERVICE_UNKNOWN
        watch.cancel()


async def test_health_lists_its_services(serve: Serve) -> None:
    served = await serve()
    served.set_ready(True)
    async with served.channel() as channel:
        listed = await channel.unary_unary(
            "/grpc.health.v1.Health/List", response_deserializer=health_pb2.HealthListResponse.FromString
        )(b"", timeout=DEADLINE_SECONDS)
    assert {name: answer.status for name, answer in listed.statuses.items()} == {"": SERVING, AUTHORIZATION: SERVING}


# ---- Reflection ----------------------------------------------------------------------------------------------------


async def test_reflection_is_enough_to_list_describe_and_call(serve: Serve) -> None:
    served = await serve()
    listed, answer = await asyncio.to_thread(call_by_reflection, f"127.0.0.1:{served.port}")
    assert listed == {AUTHORIZATION, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert answer.status.code == 7
    assert answer.dynamic_metadata["reason"] == "blocked"


def call_by_reflection(target: str) -> tuple[set[str], Any]:
    """Call Check as grpcurl does, knowing nothing but the server's word; the reflection client blocks."""
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        listed = set(database.get_services())
        for name in listed:
            pool.FindServiceByName(name)
        method = pool.FindMethodByName(f"{AUTHORIZATION}.Check")
        message = GetMessageClass(method.input_type)()
        http = message.attributes.request.http
        http.method, http.path = "GET", "/"
        http.headers["x-envoy-external-address"] = "198.51.100.1"
        data = channel.unary_unary(f"/{AUTHORIZATION}/{method.name}")(
            message.SerializeToString(), timeout=DEADLINE_SECONDS
        )
        return listed, GetMessageClass(method.output_type).FromString(data)


# ---- TLS -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    """Throw-away authorities: one for the server and its clients, one that the server does not know."""

    directory: Path
    ca: trustme.CA = field(default_factory=trustme.CA)
    stranger: trustme.CA = field(default_factory=trustme.CA)

    def server(self, *, mutual: bool) -> TlsFiles:
        issued = self.ca.issue_cert("localhost", "127.0.0.1")
        certificate, key, client_ca = (self.directory / name for name in ("tls.crt", "tls.key", "ca.crt"))
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        self.ca.cert_pem.write_to_path(client_ca)
        return TlsFiles(certificate, key, client_ca if mutual else None)

    def client(self, issuer: trustme.CA | None) -> grpc.ChannelCredentials:
        """Return credentials that trust the server, with a certificate of their own if there is an issuer."""
        root = self.ca.cert_pem.bytes()
        if issuer is None:
            return grpc.ssl_channel_credentials(root)
        issued = issuer.issue_cert("envoy@example.com")
        return grpc.ssl_channel_credentials(
            root, issued.private_key_pem.bytes(), b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        )


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


async def test_tls(serve: Serve, certificates: Certificates) -> None:
    served = await serve(tls=certificates.server(mutual=False))
    assert await served.check(request(), certificates.client(None)) == ALLOWED


@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mutual tls"])
async def test_plain_text_to_a_tls_port_is_refused(serve: Serve, certificates: Certificates, mutual: bool) -> None:
    served = await serve(tls=certificates.server(mutual=mutual))
    async with refused(grpc.StatusCode.UNAVAILABLE):
        await served.check(request())
    assert served.seen == []


async def test_a_client_that_does_not_know_the_authority_hangs_up(serve: Serve, certificates: Certificates) -> None:
    served = await serve(tls=certificates.server(mutual=False))
    root = certificates.stranger.cert_pem.bytes()
    async with refused(grpc.StatusCode.UNAVAILABLE):
        await served.check(request(), grpc.ssl_channel_credentials(root))


async def test_mutual_tls_takes_only_clients_of_its_authority(serve: Serve, certificates: Certificates) -> None:
    served = await serve(tls=certificates.server(mutual=True))
    for issuer in (None, certificates.stranger):
        async with refused(grpc.StatusCode.UNAVAILABLE):
            await served.check(request(), certificates.client(issuer))
    assert served.seen == []
    assert await served.check(request(), certificates.client(certificates.ca)) == ALLOWED


@pytest.mark.parametrize(
    ("spoiled", "contents"),
    [
        ("tls.crt", None),
        ("tls.key", None),
        ("ca.crt", None),
        ("tls.crt", b"not PEM"),
        ("tls.key", b"not PEM"),
        ("ca.crt", b"not PEM"),
        ("tls.key", trustme.CA().issue_cert("other").private_key_pem.bytes()),
    ],
    ids=["no certificate", "no key", "no authority", "bad certificate", "bad key", "bad authority", "another's key"],
)
async def test_tls_files_that_cannot_be_used_are_named(
    serve: Serve, certificates: Certificates, spoiled: str, contents: bytes | None
) -> None:
    tls = certificates.server(mutual=True)
    path = certificates.directory / spoiled
    if contents is None:
        path.unlink()
    else:
        path.write_bytes(contents)
    with pytest.raises(TransportError, match=str(path)):
        await serve(tls=tls)


async def test_tls_offers_http2_by_alpn(serve: Serve, certificates: Certificates) -> None:
    served = await serve(tls=certificates.server(mutual=False))
    context = ssl.create_default_context(cadata=certificates.ca.cert_pem.bytes().decode())
    context.set_alpn_protocols(["http/1.1", "h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", served.port, ssl=context, server_hostname="localhost")
    negotiated = writer.get_extra_info("ssl_object").selected_alpn_protocol()
    writer.transport.abort()
    assert negotiated == "h2"


# ---- Drain ---------------------------------------------------------------------------------------------------------


async def outcomes(calls: Sequence["asyncio.Task[Answer]"]) -> list[Answer | BaseException]:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await asyncio.gather(*calls, return_exceptions=True)


async def test_drain_answers_what_is_in_flight_then_closes_the_port(serve: Serve) -> None:
    served = await serve()
    async with served.channel() as one, served.channel() as other:
        calls = [asyncio.create_task(check((one, other)[index % 2], request())) for index in range(300)]
        await eventually(lambda: bool(served.seen))
        assert len(served.seen) < 300, "the drain comes while calls are in flight"
        await served.drain(DEADLINE_SECONDS)
        assert await outcomes(calls) == [ALLOWED] * 300
        async with refused(grpc.StatusCode.UNAVAILABLE):
            await check(one, request())
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", served.port)


async def test_drain_under_unending_load_ends_in_time(serve: Serve) -> None:
    """Clients that never pause: the port closes within the grace, and each client's calls were answered until then."""
    served = await serve()

    async def call_until_refused() -> int:
        answered = 0
        async with served.channel() as channel:
            try:
                while True:
                    assert await check(channel, request()) == ALLOWED
                    answered += 1
            except grpc.aio.AioRpcError:
                return answered

    clients = [asyncio.create_task(call_until_refused()) for _ in range(8)]
    await eventually(lambda: len(served.seen) > 50)
    async with asyncio.timeout(2):
        await served.drain(1)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert min(await asyncio.gather(*clients)) > 0


async def test_drain_tells_watchers_and_does_not_wait_for_them(serve: Serve) -> None:
    served = await serve()
    served.set_ready(True)
    async with served.channel() as channel:
        watch = health_watch(channel, "")
        assert (await watch.read()).status == SERVING
        async with asyncio.timeout(5):
            await served.drain(60)
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF


async def test_drain_twice_and_without_a_start_is_nothing(serve: Serve, make: TransportFactory) -> None:
    served = await serve()
    await served.drain(1)
    await served.drain(1)
    checker = Checker(lambda: None, ResponseOptions(), max_request_bytes=1, observe=lambda _: None)
    made = make(checker, listen="127.0.0.1:0", tls=None, health=HealthState(), observe_wait=ignore_wait)
    await made.drain(1)
