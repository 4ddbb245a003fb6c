"""The fast transport: HTTP/2 by `http2`, on the event loop.

Checks are read, decided and answered in one thread, without a lock, a queue between threads or a task for each: what
came in one look at the sockets waits in a bounded backlog (`admission`), is decided in slices, and goes out in one
write for each connection. Health and reflection are grpcio's, behind a Unix socket that nobody else can reach.
"""

import asyncio
import contextlib
import re
import resource
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import grpc
from grpc_reflection.v1alpha import reflection

from authz_server.ext_authz.admission import Backlog, Memory
from authz_server.ext_authz.checker import NO_SNAPSHOT, Checker
from authz_server.ext_authz.grpcio_transport import SERVICE
from authz_server.ext_authz.health_service import SERVICE as HEALTH_SERVICE
from authz_server.ext_authz.health_service import HealthService, Readiness
from authz_server.ext_authz.http2 import (
    ENHANCE_YOUR_CALM,
    NO_ERROR,
    OTHER_CALL_BYTES,
    UNAVAILABLE,
    Call,
    ClientError,
    Connection,
    Heads,
    goaway,
)
from authz_server.ext_authz.reflection import build_pool
from authz_server.ext_authz.transport import (
    OVERLOADED,
    ObserveWait,
    TlsFiles,
    TransportError,
    ignore_wait,
    open_tls,
    parse_address,
)

MAX_CONNECTIONS = 1024
"""An Envoy has one for each of its workers, and more when it has many calls open. When there are more, the one that has
been idle for the longest goes."""
STALL_SECONDS = 10.0
"""So long may a greeting, a message or the reading of an answer take; then its connection ends."""
_EVICT_AFTER_SECONDS = 0.1
"""An unfinished message that is older than this makes its connection the one to end when memory is short."""
_FILES_SPARE = 256
READ_BYTES = 256 * 1024
"""So much is read of one connection at a time."""
_SWEEP_SECONDS = 1.0
SLICE = 32
"""So many checks are decided between two looks at the sockets: about a millisecond."""
_LONG_SLICE = 256
"""The same when there is no room for more."""
_METHOD = re.compile(r"/[\w.]{1,128}/\w{1,128}", re.ASCII)
_NO_METHOD = "/none/none"
"""What grpcio is asked for instead of something that is no method: it knows best how to say that there is none."""
_QUIET_TICK_SECONDS = 0.005
_QUIET_TICKS = 4


class AsyncioTransport:
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
            observe_wait: is told how long checks have waited since they were read.
        """
        self._checker = checker
        self._listen = listen
        self._tls = tls
        self._readiness = health
        self._observe_wait = observe_wait
        self._max_request_bytes = max_request_bytes
        self._too_large = bytes(max_request_bytes + 1)
        self._backlog: Backlog[Call] = Backlog(max_wait_seconds)
        self._memory = Memory(self._evict)
        self._heads = Heads()
        self.read_buffer = memoryview(bytearray(READ_BYTES))
        """What clients send comes here."""
        self._clients: dict[Connection, _Client] = {}
        self._hearing: Connection | None = None
        """Whose data is being read."""
        self._max_connections = MAX_CONNECTIONS
        self._working = False
        """Whether `_work` will be called soon."""
        self._worked_since: float | None = None
        """When the last slice of checks was answered, if there are more to decide."""
        self._draining = False
        self._health: HealthService | None = None

    @property
    def shed(self) -> int:
        """Calls answered UNAVAILABLE for lack of time or memory, so far."""
        return self._backlog.shed

    @property
    def in_flight(self) -> int:
        """Checks that were read and are not answered yet."""
        return sum(len(connection.waiting) for connection in self._clients)

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            TransportError: the port cannot be had, or the TLS files cannot be used.
        """
        host, port = parse_address(self._listen)
        tls = open_tls(self._tls) if self._tls else None
        self._max_connections = _connections_possible()
        self._loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="authz-")))
            path = f"unix:{directory / 'grpcio'}"
            health = HealthService(self._readiness, ("", SERVICE))
            behind = grpc.aio.server(
                handlers=(health.handler(),), options=(("grpc.max_receive_message_length", OTHER_CALL_BYTES),)
            )
            reflection.enable_server_reflection(
                (SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), behind, pool=build_pool()
            )
            behind.add_insecure_port(path)
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
                raise TransportError(f"cannot listen on {self._listen!r}: {error.strerror or error}") from None
            await behind.start()
            self._others = _Relay(grpc.aio.insecure_channel(path), self.flush)
            stack.push_async_callback(self._others.close)
            self._listening, self._behind, self._health = listening, behind, health
            self._sweeper = asyncio.create_task(self._sweep(), name="sweeper")
            self._left = stack.pop_all()
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
        if self._health is None:
            return
        health, self._health = self._health, None
        health.close()
        started = self._loop.time()
        await self._behind.stop(min(grace_seconds, 1.0))  # ends the watches
        await self._quiet(started + grace_seconds / 3)
        self._draining = True
        self._listening.close()
        for client in list(self._clients.values()):
            client.send(goaway(NO_ERROR))
        if not await self._quiet(started + grace_seconds * 2 / 3):
            for client in list(self._clients.values()):
                client.hold("draining", True)
            await self._quiet(started + grace_seconds)
        for client in list(self._clients.values()):
            client.end(goaway(NO_ERROR, client.connection.last_stream))
        self._sweeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._sweeper
        await self._listening.wait_closed()
        await self._left.aclose()

    async def _quiet(self, until: float) -> bool:
        """Wait for a moment without a call; False: none came in time."""
        quiet_ticks = 0
        while quiet_ticks < _QUIET_TICKS:
            if self._loop.time() >= until:
                return False
            before = self._answered()
            await asyncio.sleep(_QUIET_TICK_SECONDS)
            quiet = self._answered() == before and not any(connection.unanswered for connection in self._clients)
            quiet_ticks = quiet_ticks + 1 if quiet else 0
        return True

    def _answered(self) -> int:
        return sum(connection.answered for connection in self._clients)

    # ---- Checks -----------------------------------------------------------------------------------------------------

    def receive(self, connection: Connection, data: bytes, *, more: bool) -> None:
        """Read what a client sent, and see to it that its checks are decided.

        Args:
            connection: the client's.
            data: what came.
            more: whether the client has sent more than that, which is newer.

        Raises:
            ClientError: the connection has to end.
        """
        self._hearing = connection
        # In need the newest are taken on, and those are not in here.
        shut = more and self._backlog.shut(time.monotonic())
        try:
            connection.receive(data)
        finally:
            self._hearing = None
            if shut:
                self._backlog.open(time.monotonic())
            if self._backlog.waiting and not self._working:
                self._working = True
                self._loop.call_soon(self._work)

    def _work(self) -> None:
        """Decide about some of the checks that wait, and come back for the others when sockets were looked at."""
        began = self._worked_since or time.monotonic()
        taken = 0
        try:
            taken = self._decide()
        finally:  # whatever happens: else no check would ever be decided again
            backlog, now = self._backlog, time.monotonic()
            if taken:
                backlog.note_pace(taken, now - began)
            if backlog.waiting:
                self._worked_since = now
                self._loop.call_soon(self._work)
            else:
                self._worked_since = None
                self._working = False

    def _decide(self) -> int:
        """Decide about a slice of the checks that wait, answer them, and return how many they were."""
        backlog = self._backlog
        now = time.monotonic()
        # In need the sockets are looked at less often: what a look costs is shared by more calls then.
        groups, late = backlog.take(now, SLICE if backlog.room else _LONG_SLICE)
        touched = set()
        for connection, stream, _, _ in late:
            touched.add(connection)
            connection.fail(stream, UNAVAILABLE, OVERLOADED)
        taken = 0
        asking: list[tuple[Connection, int]] = []
        messages: list[bytes] = []
        for arrived, calls in groups:
            taken += len(calls)
            self._observe_wait(now - arrived, len(calls))
            soonest = now - arrived + backlog.seconds_each
            for connection, stream, message, timeout in calls:
                if stream not in connection.waiting:  # its client has reset it
                    continue
                if timeout is not None and soonest > timeout:
                    backlog.shed += 1
                    touched.add(connection)
                    connection.fail(stream, UNAVAILABLE, OVERLOADED)
                else:
                    asking.append((connection, stream))
                    messages.append(message)
        for (connection, stream), answer in zip(asking, self._checker.check_all(messages), strict=True):
            touched.add(connection)
            if answer is None:
                connection.fail(stream, UNAVAILABLE, NO_SNAPSHOT)
            else:
                connection.answer(stream, answer)
        for connection in touched:
            self.flush(connection)
        return taken

    def flush(self, connection: Connection) -> None:
        """Send what a connection has to say."""
        client = self._clients.get(connection)
        if client:
            client.flush()

    # ---- Connections -------------------------------------------------------------------------------------------------

    def admit(self, client: "_Client") -> Connection | None:
        """Make room for a new connection, and make its state; None: there is no room."""
        if self._draining:
            return None
        if len(self._clients) >= self._max_connections:
            idle = [other for other in self._clients.values() if not other.connection.unanswered]
            if not idle:
                return None
            min(idle, key=lambda other: other.heard_at).end(goaway(ENHANCE_YOUR_CALM))
        connection = Connection(
            self._backlog,
            self._memory,
            self._others,
            self._heads,
            max_message_bytes=self._max_request_bytes,
            too_large=self._too_large,
        )
        self._clients[connection] = client
        return connection

    def forget(self, connection: Connection) -> None:
        """Take note that a connection is over."""
        self._clients.pop(connection, None)
        connection.close()

    def _evict(self) -> bool:
        """End the connection that has kept an unfinished message for the longest, if it is old enough."""
        oldest, since = None, time.monotonic() - _EVICT_AFTER_SECONDS
        for connection, client in self._clients.items():
            unfinished_since = connection.unfinished_since
            if connection is not self._hearing and unfinished_since is not None and unfinished_since < since:
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
            for connection, client in list(self._clients.items()):
                connection.rest()
                if client.stalled_since(before):
                    client.end(goaway(ENHANCE_YOUR_CALM))


class _Client(asyncio.BufferedProtocol):
    """The socket of a connection."""

    def __init__(self, transport: AsyncioTransport) -> None:
        self._transport = transport
        self.heard_at = self._connected_at = time.monotonic()
        self._unread_since: float | None = None
        """Since when the client does not read what it gets."""
        self._holds: set[str] = set()
        """Why nothing is read from the client now."""
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, if there is room."""
        self._socket = cast(asyncio.Transport, transport)
        connection = self._transport.admit(self)
        if connection is None:
            self._ended = True
            self._socket.abort()
        else:
            self.connection = connection
            connection.send_settings()
            self.flush()

    def get_buffer(self, _size_hint: int) -> memoryview:
        """Return where to put what comes; it is taken from there before anything else is read."""
        return self._transport.read_buffer

    def buffer_updated(self, size: int) -> None:
        """Take what came."""
        if self._ended:
            return
        self.heard_at = time.monotonic()
        buffer = self._transport.read_buffer
        try:
            self._transport.receive(self.connection, bytes(buffer[:size]), more=size == len(buffer))
        except ClientError as error:
            self.end(goaway(error.code))
            return
        self.flush()

    def flush(self) -> None:
        """Send what there is to be sent."""
        out = self.connection.out
        if out and not self._ended:
            self._socket.write(b"".join(out))
        out.clear()

    def send(self, frames: bytes) -> None:
        """Send frames of ours."""
        if self.connection.greeted:
            self.connection.out.append(frames)
            self.flush()

    def pause_writing(self) -> None:
        """Take on nothing more from a client that does not read."""
        self._unread_since = time.monotonic()
        self.hold("does not read", True)

    def resume_writing(self) -> None:
        """Go on."""
        self._unread_since = None
        self.hold("does not read", False)

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

    def stalled_since(self, before: float) -> bool:
        """Tell whether something that should have come or gone by now did not."""
        unfinished_since = self.connection.unfinished_since
        return (
            (not self.connection.greeted and self._connected_at < before)
            or (unfinished_since is not None and unfinished_since < before)
            or (self._unread_since is not None and self._unread_since < before)
        )

    def end(self, last_words: bytes) -> None:
        """End the connection, after what was answered and some last words."""
        if self._ended:
            return
        self.send(last_words)
        self._ended = True
        self._transport.forget(self.connection)
        self._socket.close()
        # A client that does not read keeps the connection no longer than this.
        asyncio.get_running_loop().call_later(1.0, self._socket.abort)

    def connection_lost(self, _error: Exception | None) -> None:
        """Forget it."""
        if not self._ended:
            self._ended = True
            self._transport.forget(self.connection)


class _Relay:
    """Passes calls of other methods on to grpcio."""

    def __init__(self, channel: grpc.aio.Channel, flush: Callable[[Connection], None]) -> None:
        self._channel = channel
        self._flush = flush
        self._calls: dict[tuple[Connection, int], _RelayedCall] = {}

    async def close(self) -> None:
        """Break off what there is."""
        for call in list(self._calls.values()):
            call.task.cancel()
        await self._channel.close()

    def begin(self, connection: Connection, stream: int, path: str) -> None:
        """Take on a call."""
        call = _RelayedCall()
        call.task = asyncio.create_task(self._relay(connection, stream, path, call), name=path)
        self._calls[connection, stream] = call

    def data(self, connection: Connection, stream: int, data: bytes) -> None:
        """Take what the client sends in it."""
        call = self._calls.get((connection, stream))
        if call:
            call.data(data)

    def end(self, connection: Connection, stream: int) -> None:
        """Take note that the client sends no more."""
        call = self._calls.get((connection, stream))
        if call:
            call.messages.put_nowait(None)

    def reset(self, connection: Connection, stream: int) -> None:
        """Forget a call."""
        call = self._calls.pop((connection, stream), None)
        if call:
            call.task.cancel()

    async def _relay(self, connection: Connection, stream: int, path: str, call: "_RelayedCall") -> None:
        begun = False
        code, details = grpc.StatusCode.OK, ""
        try:
            if not _METHOD.fullmatch(path):
                path = _NO_METHOD
            # Streams of both kinds: on the wire, a single message is a stream of one.
            async for message in self._channel.stream_stream(path)(call.received()):
                if not begun:
                    connection.send_head(stream)
                    begun = True
                connection.send_message(stream, message)
                self._flush(connection)
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
        finally:
            self._calls.pop((connection, stream), None)
        if begun:
            connection.finish(stream, code.value[0], details)
        else:
            connection.fail(stream, code.value[0], details)
        self._flush(connection)


class _RelayedCall:
    """What the client sends in one of those calls, cut into messages."""

    task: "asyncio.Task[None]"

    def __init__(self) -> None:
        self.messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._rest = b""

    def data(self, data: bytes) -> None:
        """Take a piece of the stream of messages, each with its head of five bytes."""
        self._rest += data
        while len(self._rest) >= 5 and len(self._rest) >= (end := 5 + int.from_bytes(self._rest[1:5], "big")):
            self.messages.put_nowait(self._rest[5:end])
            self._rest = self._rest[end:]

    async def received(self) -> AsyncIterator[bytes]:
        """Yield the messages until the client sends no more."""
        while (message := await self.messages.get()) is not None:
            yield message


def _connections_possible() -> int:
    """As many connections as there may be open files for, having asked for as many as are needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _FILES_SPARE
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MAX_CONNECTIONS, max(1, soft - _FILES_SPARE))
