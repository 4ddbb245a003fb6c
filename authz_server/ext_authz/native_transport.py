"""The fast transport: pygrpc-native (HTTP/2 and gRPC in Rust, outside the interpreter lock) behind a filter of ours.

Each client's connection is relayed, frame by frame (`frame_filter`), to a connection of its own to the Rust server on a
Unix socket that nobody else can reach. Checks come from there in batches, wait in a bounded backlog (`admission`) and
are decided on the event loop, between reading and writing: one thread needs no lock, and none waits for the
interpreter's. Health and reflection are grpcio's, on another Unix socket behind the Rust server.
"""

import asyncio
import contextlib
import resource
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import cast

import grpc
from grpc_reflection.v1alpha import reflection
from pygrpc_native import EVENT_CALL, NativeGrpcFront

from authz_server.ext_authz.admission import Backlog, Call, Memory
from authz_server.ext_authz.checker import CannotDecideError, Checker
from authz_server.ext_authz.frame_filter import (
    CHECK_PATH,
    ENHANCE_YOUR_CALM,
    NO_ERROR,
    ClientError,
    Connection,
    Markers,
    goaway,
)
from authz_server.ext_authz.grpcio_transport import SERVICE
from authz_server.ext_authz.health_service import SERVICE as HEALTH_SERVICE
from authz_server.ext_authz.health_service import HealthService, Readiness
from authz_server.ext_authz.reflection import build_pool
from authz_server.ext_authz.transport import (
    ObserveWait,
    TlsFiles,
    TransportError,
    ignore_wait,
    open_tls,
    parse_address,
)

MAX_CONNECTIONS = 1024
"""An Envoy has one for each of its workers. When there are more, the one that has been idle for the longest goes."""
STALL_SECONDS = 10.0
"""So long may a greeting, a message or the reading of an answer take; then its connection ends."""
_EVICT_AFTER_SECONDS = 0.1
"""An unfinished message that is older than this makes its connection the one to end when memory is short."""
_FILES_EACH = 3
_FILES_SPARE = 256
_SWEEP_SECONDS = 1.0
_SLICE = 32
"""So many checks are decided between two looks at the sockets: about a millisecond."""
_BATCH = 256
_SERVER_STREAMS = 1 << 20
"""The Rust server's own limit on streams, out of the way: the filter has one."""
_MAX_METADATA_BYTES = 64 * 1024
"""The filter passes no head on that decodes to more, unless its client cheats."""
_MAX_OTHER_MESSAGE_BYTES = 64 * 1024
_QUIET_TICK_SECONDS = 0.005
_QUIET_TICKS = 4
_UNAVAILABLE = 14


class NativeTransport:
    """Serves a checker on one port."""

    def __init__(
        self,
        checker: Checker,
        *,
        listen: str,
        tls: TlsFiles | None,
        health: Readiness,
        max_request_bytes: int = 1 << 20,
        max_wait_seconds: float = 0.1,
        observe_wait: ObserveWait = ignore_wait,
    ) -> None:
        """Make a transport that is not listening yet.

        Args:
            checker: answers the checks.
            listen: `host:port`, with an IPv6 host in brackets; port 0 takes a free one.
            tls: None serves plain text.
            health: what the health service reports.
            max_request_bytes: the checker's own limit; of longer messages it gets a stand-in that it denies as well.
            max_wait_seconds: checks that would wait for longer are answered UNAVAILABLE.
            observe_wait: is told how long checks have waited, from when the Rust server had them whole.
        """
        self._checker = checker
        self._listen = listen
        self._tls = tls
        self._readiness = health
        self._observe_wait = observe_wait
        self.max_request_bytes = max_request_bytes
        self._oversize = bytes(max_request_bytes + 1)
        self.backlog = Backlog(max_wait_seconds)
        self.memory = Memory(self._evict)
        self.markers = Markers()
        self.clients: dict[_Client, None] = {}
        self.hearing: _Client | None = None
        """Whose data is being passed on."""
        self._max_connections = MAX_CONNECTIONS
        self._arrived: deque[tuple[float, list[Call]]] = deque()
        self._woken = False
        self._busy_since: float | None = None
        self._draining = False
        self._front: NativeGrpcFront | None = None

    @property
    def shed(self) -> int:
        """Calls answered UNAVAILABLE for lack of time or memory, so far."""
        return self.backlog.shed

    @property
    def in_flight(self) -> int:
        """Checks that the Rust server has and that are not answered yet."""
        return sum(client.connection.unanswered_checks for client in self.clients)

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            TransportError: the port cannot be had, or the TLS files cannot be used.
        """
        host, port = parse_address(self._listen)
        tls = open_tls(self._tls) if self._tls else None
        self._max_connections = _connections_possible()
        async with contextlib.AsyncExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="authz-")))
            self.path = str(directory / "native")
            behind_path = str(directory / "grpcio")
            health = HealthService(self._readiness, ("", SERVICE))
            behind = grpc.aio.server(
                handlers=(health.handler(),),
                options=(("grpc.max_receive_message_length", _MAX_OTHER_MESSAGE_BYTES),),
            )
            reflection.enable_server_reflection(
                (SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), behind, pool=build_pool()
            )
            behind.add_insecure_port(f"unix:{behind_path}")
            front = NativeGrpcFront(
                f"unix:{self.path}",
                [(CHECK_PATH, False)],
                io_threads=1,
                max_concurrent_streams=_SERVER_STREAMS,
                max_metadata_size=_MAX_METADATA_BYTES,
            )
            front.set_fallback(behind_path)
            self._loop = asyncio.get_running_loop()
            try:
                listening = await self._loop.create_server(
                    lambda: _Client(self),
                    host,
                    port,
                    backlog=MAX_CONNECTIONS,
                    ssl=tls,
                    ssl_handshake_timeout=STALL_SECONDS if tls else None,
                )
            except OSError as error:
                front.close()
                raise TransportError(f"cannot listen on {self._listen!r}: {error.strerror or error}") from None
            await behind.start()
            front.start()
            self._listening, self._front, self._behind, self._health = listening, front, behind, health
            self._receiver = threading.Thread(target=self._receive, args=(front,), name="checks", daemon=True)
            self._receiver.start()
            self._sweeper = asyncio.create_task(self._sweep(), name="sweeper")
            self._directory = stack.pop_all()
        bound: int = listening.sockets[0].getsockname()[1]
        return bound

    async def drain(self, grace_seconds: float) -> None:
        """Finish what is in flight, then close the port and tell clients to go elsewhere (GOAWAY).

        A client that has more calls than streams would take those that wait in it elsewhere at once on a GOAWAY, and
        there may be nowhere yet. So this goes on answering until a moment comes in which there is no call. Under a load
        that leaves no such moment it says GOAWAY anyway, after a third of `grace_seconds`, and reads nothing more after
        two: have the process report that it is not ready, and give clients time to see it, before draining. What is not
        answered when `grace_seconds` are over is broken off. Draining twice does nothing more.
        """
        if self._front is None:
            return
        front, self._front = self._front, None
        self._health.close()
        started = self._loop.time()
        await self._behind.stop(min(grace_seconds, 1.0))  # ends the watches
        await self._quiet(started + grace_seconds / 3)
        self._draining = True
        self._listening.close()
        for client in list(self.clients):
            client.send(goaway(NO_ERROR))
        if not await self._quiet(started + grace_seconds * 2 / 3):
            for client in list(self.clients):
                client.hold("draining", True)
            await self._quiet(started + grace_seconds)
        for client in list(self.clients):
            client.leave()
        self._sweeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._sweeper
        front.close()
        await asyncio.to_thread(self._receiver.join)
        await self._listening.wait_closed()
        await self._directory.aclose()

    async def _quiet(self, until: float) -> bool:
        """Wait for a moment without a call; False: none came in time."""
        quiet_ticks = 0
        while quiet_ticks < _QUIET_TICKS:
            if self._loop.time() >= until:
                return False
            before = self._answered()
            await asyncio.sleep(_QUIET_TICK_SECONDS)
            quiet = self._answered() == before and not any(client.connection.unanswered for client in self.clients)
            quiet_ticks = quiet_ticks + 1 if quiet else 0
        return True

    def _answered(self) -> int:
        return sum(client.connection.answered for client in self.clients)

    # ---- Checks -----------------------------------------------------------------------------------------------------

    def _receive(self, front: NativeGrpcFront) -> None:
        """Hand checks over to the event loop; runs in a thread of its own, for there is nothing to select on."""
        while (events := front.recv_batch(_BATCH)) is not None:
            calls = [
                (call, data) for kind, call, _method, data, _key in events if kind == EVENT_CALL and data is not None
            ]
            self._arrived.append((time.monotonic(), calls))
            if not self._woken:
                self._woken = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for these
                    self._loop.call_soon_threadsafe(self._decide, front)

    def _decide(self, front: NativeGrpcFront) -> None:
        """Decide about some of the checks that wait, and come back for the others when sockets were looked at."""
        self._woken = True
        backlog = self.backlog
        while self._arrived:
            backlog.add(*self._arrived.popleft())
        now = time.monotonic()
        calls, late = backlog.take(now, _SLICE)
        for call, _data in late:
            front.fail(call, _UNAVAILABLE, "overloaded")
        if calls:
            self._observe_wait(backlog.waited, len(calls))
        check, respond = self._checker.check, front.respond
        too_large, unavailable = self.markers.too_large, self.markers.unavailable
        for call, data in calls:
            if data == unavailable:
                front.fail(call, _UNAVAILABLE, "overloaded")
                continue
            try:
                respond(call, check(self._oversize if data == too_large else data))
            except CannotDecideError as error:
                front.fail(call, _UNAVAILABLE, str(error))
        if calls and self._busy_since is not None:
            backlog.note_pace(len(calls), time.monotonic() - self._busy_since)
        if backlog.waiting or self._arrived:
            self._busy_since = time.monotonic()
            self._loop.call_soon(self._decide, front)
        else:
            self._busy_since = None
            self._woken = False
            if self._arrived:  # came in between
                self._woken = True
                self._loop.call_soon(self._decide, front)

    # ---- Connections -------------------------------------------------------------------------------------------------

    def admit(self, client: "_Client") -> bool:
        """Make room for a new connection; False: there is none."""
        if self._draining:
            return False
        if len(self.clients) >= self._max_connections:
            idle = [other for other in self.clients if not other.connection.unanswered]
            if not idle:
                return False
            min(idle, key=lambda other: other.heard_at).end(goaway(ENHANCE_YOUR_CALM))
        self.clients[client] = None
        return True

    def _evict(self) -> bool:
        """End the connection that has kept an unfinished message for the longest, if it is old enough."""
        now = time.monotonic()
        oldest, since = None, now - _EVICT_AFTER_SECONDS
        for client in self.clients:
            unfinished_since = client.connection.unfinished_since
            if client is not self.hearing and unfinished_since is not None and unfinished_since < since:
                oldest, since = client, unfinished_since
        if oldest is None:
            return False
        oldest.end(goaway(ENHANCE_YOUR_CALM))
        return True

    async def _sweep(self) -> None:
        """End what stalls."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            before = time.monotonic() - STALL_SECONDS
            for client in list(self.clients):
                if client.stalled_since(before):
                    client.end(goaway(ENHANCE_YOUR_CALM))


class _Client(asyncio.Protocol):
    """The side of a connection where the client is."""

    def __init__(self, transport: NativeTransport) -> None:
        self._transport = transport
        self.connection = Connection(
            transport.backlog, transport.memory, transport.markers, max_message_bytes=transport.max_request_bytes
        )
        self.heard_at = time.monotonic()
        self._connected_at = self.heard_at
        self._answered = 0
        self._answered_at = self.heard_at
        self._server: _Server | None = None
        self._early = b""
        """What came before there was a server to pass it on to."""
        self._holds: set[str] = set()
        """Why nothing is read from the client now."""
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connect to the server behind."""
        self._socket = cast(asyncio.Transport, transport)
        if not self._transport.admit(self):
            self._socket.abort()
            return
        self.hold("connecting", True)
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            _, self._server = await asyncio.get_running_loop().create_unix_connection(
                lambda: _Server(self), self._transport.path
            )
        except OSError:
            self.end()
            return
        if self._ended:
            self._server.close()
            return
        self.hold("connecting", False)
        if self._early:
            early, self._early = self._early, b""
            self.data_received(early)

    def data_received(self, data: bytes) -> None:
        """Pass on what may pass."""
        self.heard_at = time.monotonic()
        if self._ended:
            return
        if self._server is None:
            self._early += data
            return
        connection = self.connection
        self._transport.hearing = self
        try:
            connection.from_client(data)
        except ClientError as error:
            self._flush()
            self.end(goaway(error.code))
            return
        self._flush()
        if connection.to_server:
            self._server.write(b"".join(connection.to_server))
            connection.to_server.clear()

    def from_server(self, data: bytes) -> None:
        """Pass on what the server behind sent."""
        self.connection.from_server(data)
        self._flush()

    def _flush(self) -> None:
        to_client = self.connection.to_client
        if to_client:
            self._socket.write(to_client[0] if len(to_client) == 1 else b"".join(to_client))
            to_client.clear()

    def send(self, frames: bytes) -> None:
        """Send frames of ours, between those of the server."""
        if not self._ended and self.connection.greeted:
            self._socket.write(frames)

    def pause_writing(self) -> None:
        """Stop all that makes more for a client that does not read."""
        self.hold("client does not read", True)
        if self._server:
            self._server.pause(True)

    def resume_writing(self) -> None:
        """Go on."""
        self.hold("client does not read", False)
        if self._server:
            self._server.pause(False)

    def hold(self, why: str, on: bool) -> None:
        """Read nothing from the client, as long as there is a reason not to."""
        if on:
            self._holds.add(why)
        else:
            self._holds.discard(why)
        if self._socket.is_closing():
            return
        if self._holds:
            self._socket.pause_reading()
        else:
            self._socket.resume_reading()

    def leave(self) -> None:
        """Say goodbye and close, once what was answered is written."""
        self.end(goaway(NO_ERROR, self.connection.last_stream))

    def stalled_since(self, before: float) -> bool:
        """Tell whether something that should have come or gone by now did not."""
        connection = self.connection
        now = time.monotonic()
        if connection.answered != self._answered or not connection.unanswered_checks:
            self._answered, self._answered_at = connection.answered, now
        unfinished_since = connection.unfinished_since
        return (
            (not connection.greeted and self._connected_at < before)
            or (unfinished_since is not None and unfinished_since < before)
            or self._answered_at < before
        )

    def end(self, last_words: bytes = b"") -> None:
        """End the connection."""
        if self._ended:
            return
        if last_words:
            self.send(last_words)
        self._ended = True
        self._forget()
        self._socket.close()
        if self._server:
            self._server.close()
        # A client that does not read keeps the connection no longer than this.
        asyncio.get_running_loop().call_later(1.0, self._socket.abort)

    def _forget(self) -> None:
        self._transport.clients.pop(self, None)
        self.connection.close()

    def connection_lost(self, _error: Exception | None) -> None:
        """Let the server behind know."""
        self._ended = True
        self._forget()
        if self._server:
            self._server.close()


class _Server(asyncio.Protocol):
    """The side of a connection where the Rust server is."""

    def __init__(self, client: _Client) -> None:
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self._socket = cast(asyncio.Transport, transport)
        self.write = self._socket.write

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        self._client.from_server(data)

    def pause_writing(self) -> None:
        """Stop reading from the client."""
        self._client.hold("server does not read", True)

    def resume_writing(self) -> None:
        """Go on."""
        self._client.hold("server does not read", False)

    def pause(self, paused: bool) -> None:
        """Stop reading while the client does not."""
        if self._socket.is_closing():
            return
        if paused:
            self._socket.pause_reading()
        else:
            self._socket.resume_reading()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def connection_lost(self, _error: Exception | None) -> None:
        """Hang up on the client too."""
        self._client.end()


def _connections_possible() -> int:
    """As many connections as there may be open files for, having asked for as many as are needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS * _FILES_EACH + _FILES_SPARE
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MAX_CONNECTIONS, max(1, (soft - _FILES_SPARE) // _FILES_EACH))
