"""The reference transport: grpcio (C-core) with TLS, mutual TLS, health and reflection."""

import asyncio
import re
from collections.abc import Iterable

import grpc
from grpc_channelz.v1 import channelz_pb2
from grpc_channelz.v1.channelz import ChannelzServicer
from grpc_reflection.v1alpha import reflection

from authz_server.ext_authz.checker import CannotDecideError, Checker
from authz_server.ext_authz.health_service import SERVICE as HEALTH_SERVICE
from authz_server.ext_authz.health_service import HealthService, Readiness
from authz_server.ext_authz.reflection import AUTHORIZATION_PACKAGE, AUTHORIZATION_SERVICE, build_pool
from authz_server.ext_authz.transport import (
    OVERLOADED,
    ObserveWait,
    TlsFiles,
    TransportError,
    ignore_wait,
    open_tls,
    parse_address,
)

SERVICE = f"{AUTHORIZATION_PACKAGE}.{AUTHORIZATION_SERVICE}"

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""Longer messages never reach the checker: gRPC itself answers them with the RPC error RESOURCE_EXHAUSTED, and a mesh
that fails open lets those requests pass. So the limit that counts is the checker's own, far below this one, which
denies; this one only bounds the memory that one message can take. It must be more than a client can bring Envoy to
send: request heads are at most 8 MiB (`max_request_headers_kb`; 60 KiB by default), and the path stands in a check
request twice. Bodies come on top, and only if the filter is told to send them (`with_request_body`): keep its
`max_request_bytes` below 8 MiB."""

_PING_INTERVAL_MS = 100
"""Envoy's `connection_keepalive` may ping this often. C-core's own limit is 300 s, and two hours without a call; it
hangs up on who pings more often."""

_STREAMS = 256
"""Calls that a client may have open on one connection. C-core refuses more also from a client that has not heard of it
yet, and Envoy sends at once what was waiting for a connection: so it cannot be low."""
_RESERVE_SECONDS = 0.01
"""A check whose deadline is nearer than this is shed: its answer would come too late."""
_EXPECTED_HEADER = "x-envoy-expected-rq-timeout-ms"
"""Envoy's router writes into each of its calls how long it will wait. C-core tells how much of that is left, and so how
long the call has waited here; of other clients' calls it does not tell when they came."""
_MILLISECONDS = re.compile("[0-9]{1,9}", re.ASCII)

_QUIET_TICK_SECONDS = 0.005
_QUIET_TICKS = 4
"""So many ticks in a row without a check mean that none is waiting; several, as one may be lost to a busy loop."""


class GrpcioTransport:
    """Serves a checker on one port."""

    def __init__(
        self,
        checker: Checker,
        *,
        listen: str,
        tls: TlsFiles | None,
        health: Readiness,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        observe_wait: ObserveWait = ignore_wait,
    ) -> None:
        """Make a transport that is not listening yet.

        Args:
            checker: answers the checks.
            listen: `host:port`, with an IPv6 host in brackets; port 0 takes a free one.
            tls: None serves plain text.
            health: what the health service reports.
            max_message_bytes: see MAX_MESSAGE_BYTES.
            observe_wait: is told how long checks have waited, those of Envoy at least (see _EXPECTED_HEADER).
        """
        self._checker = checker
        self._listen = listen
        self._tls = tls
        self._readiness = health
        self._max_message_bytes = max_message_bytes
        self._observe_wait = observe_wait
        self._received = 0
        self.shed = 0
        """Calls answered UNAVAILABLE for lack of time, so far."""
        self._health: HealthService | None = None
        self._server: grpc.aio.Server | None = None

    @property
    def in_flight(self) -> int:
        """Calls that C-core has and that are not answered yet, watches of the health included.

        Of all transports of this kind in the process: C-core does not say which one is which.
        """
        listed = ChannelzServicer.GetServers(channelz_pb2.GetServersRequest(), None)
        data = [server.data for server in listed.server]
        return sum(each.calls_started - each.calls_succeeded - each.calls_failed for each in data)

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            TransportError: the port cannot be had, or the TLS files cannot be used.
        """
        parse_address(self._listen)
        credentials = _server_credentials(self._tls) if self._tls else None
        health = HealthService(self._readiness, ("", SERVICE))
        server = grpc.aio.server(
            handlers=(
                grpc.method_handlers_generic_handler(
                    SERVICE, {"Check": grpc.unary_unary_rpc_method_handler(self._check)}
                ),
                health.handler(),
            ),
            options=(
                ("grpc.max_receive_message_length", self._max_message_bytes),
                # Envoy copies a client's `tracestate` (OpenTelemetry) into its own call to us. C-core refuses metadata
                # from 8 KiB on by chance and from 16 KiB on always, by an RPC error: with fail-open, a way past us.
                ("grpc.max_metadata_size", self._max_message_bytes),
                ("grpc.absolute_max_metadata_size", self._max_message_bytes),
                # The queue of calls is C-core's own, and nothing tells how long it is: what clients may have open
                # bounds it, and those that want more wait on their side, where it costs nothing here.
                ("grpc.max_concurrent_streams", _STREAMS),
                # Two processes on one port would share its connections, and Envoy has only one for each worker.
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.enable_channelz", 1),  # C-core counts its calls, for `in_flight`
            ),
        )
        reflection.enable_server_reflection(
            (SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), server, pool=build_pool()
        )
        try:
            port: int
            if credentials:
                port = server.add_secure_port(self._listen, credentials)
            else:
                port = server.add_insecure_port(self._listen)
        except RuntimeError:
            raise TransportError(
                f"cannot listen on {self._listen!r}: the port is taken or not allowed, or the host is not one of ours"
            ) from None
        await server.start()
        self._health, self._server = health, server
        return port

    async def drain(self, grace_seconds: float) -> None:
        """Finish what is in flight, then close the port and tell clients to go elsewhere (GOAWAY).

        grpcio does the latter two at once, and breaks off (CANCELLED) every call that it has received and not yet
        handed to Python: under load, most of them. So this goes on answering until a moment comes in which no call
        is waiting. Under a load that leaves no such moment it closes anyway, after half of `grace_seconds`: have the
        process report that it is not ready, and give clients time to see it, before draining. Calls that still run
        when `grace_seconds` are over are broken off. Draining twice does nothing more.
        """
        if self._health is None or self._server is None:
            return
        self._health.close()
        loop = asyncio.get_running_loop()
        started = loop.time()
        quiet_ticks = 0
        while quiet_ticks < _QUIET_TICKS and loop.time() - started < grace_seconds / 2:
            received = self._received
            await asyncio.sleep(_QUIET_TICK_SECONDS)
            quiet_ticks = quiet_ticks + 1 if self._received == received else 0
        await self._server.stop(max(0.0, started + grace_seconds - loop.time()))

    async def _check(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self._received += 1
        seconds_left = context.time_remaining()
        if seconds_left is not None:
            self._note_wait(seconds_left, context.invocation_metadata())
        if seconds_left is not None and seconds_left < _RESERVE_SECONDS:
            self.shed += 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, OVERLOADED)
        try:
            return self._checker.check(data)
        except CannotDecideError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            raise  # not reached: abort raises

    def _note_wait(self, seconds_left: float, metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        for name, value in metadata or ():
            if name == _EXPECTED_HEADER:
                if isinstance(value, str) and _MILLISECONDS.fullmatch(value):
                    self._observe_wait(max(0.0, int(value) / 1000 - seconds_left), 1)
                return


def _server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Read the TLS files.

    Raises:
        TransportError: naming the file, for C-core says nothing but that the port could not be bound.
    """
    open_tls(tls)
    client_ca = tls.client_ca.read_bytes() if tls.client_ca else None
    return grpc.ssl_server_credentials(
        ((tls.key.read_bytes(), tls.certificate.read_bytes()),),
        root_certificates=client_ca,
        require_client_auth=client_ca is not None,
    )
