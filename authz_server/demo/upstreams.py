"""The instances behind Envoy: small HTTP servers that say who they are and what they were asked."""

import asyncio
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Self

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_HOST = "127.0.0.1"
_MAX_ARRIVALS = 200_000
_MAX_SLOW_SECONDS = 5.0
_START_SECONDS = 10.0
# Longer than the hour after which Envoy itself closes an idle connection to an upstream. With uvicorn's five seconds,
# a request that Envoy sends at the moment of closing is lost, and "none lost" could not be shown.
_KEEP_ALIVE_SECONDS = 7200
# Above any limit that Envoy is given here: what Envoy lets through, the instance must answer.
_MAX_HEAD_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request as it reached an instance."""

    instance: str
    """Name of the instance that it reached."""
    monotonic: float
    """`time.monotonic()`, in seconds, when its head had been read."""
    method: str
    """HTTP method."""
    path: str
    """Path and query as sent, nothing decoded."""
    headers: tuple[tuple[str, str], ...]
    """Names in lower case with values, in order, repeated ones repeated; bytes read as Latin-1."""

    def header(self, name: str) -> str | None:
        """The value of a header; None when absent, comma-joined when repeated."""
        values = [value for key, value in self.headers if key == name.lower()]
        return ", ".join(values) if values else None


class Upstreams:
    """Named HTTP instances on ports of the loopback, all in one background thread.

    Any method and path is answered with 200 and ``{"instance", "method", "path", "headers"}``, and with the header
    ``x-served-by: <instance>``. ``/slow?ms=250`` is answered after that time (5 s at most).
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        around: Callable[[str, ASGIApp], ASGIApp] | None = None,
        websockets: bool = False,
    ) -> None:
        """Describe the instances; nothing listens until `start`.

        Args:
            names: theirs.
            around: given an instance's name and what answers for it, returns what is to answer instead.
            websockets: whether connections can be upgraded, for `around` to serve; needs the package of that name.
        """
        self._names = tuple(names)
        self._around = around
        self._websockets = websockets
        self._lock = threading.Lock()
        self._arrivals: deque[Arrival] = deque(maxlen=_MAX_ARRIVALS)
        self._servers: list[uvicorn.Server] = []
        self._thread: threading.Thread | None = None
        self.addresses: Mapping[str, tuple[str, int]] = MappingProxyType({})

    def arrivals(self, instance: str | None = None) -> list[Arrival]:
        """Requests that have arrived since the last `clear`, in order; of one instance or of all.

        The newest 200,000 are kept.
        """
        with self._lock:
            return [arrival for arrival in self._arrivals if instance in (None, arrival.instance)]

    def clear(self) -> None:
        """Forget the arrivals so far."""
        with self._lock:
            self._arrivals.clear()

    def start(self) -> None:
        """Listen and serve; `addresses` then holds name -> (host, port). Raises RuntimeError when they do not start."""
        sockets: list[socket.socket] = []
        addresses: dict[str, tuple[str, int]] = {}
        for name in self._names:
            # The protocol is named because asyncio turns Nagle's algorithm off only for sockets that name it; with it,
            # the head and the body of an answer would be 40 ms apart.
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            listener.bind((_HOST, 0))
            sockets.append(listener)
            addresses[name] = (_HOST, listener.getsockname()[1])
            self._servers.append(uvicorn.Server(self._config(name)))
        # Outside the main thread uvicorn leaves signal handlers alone: SIGINT and SIGTERM stay the demo's.
        # A daemon, for the case that the interpreter ends without unwinding the `with` block.
        self._thread = threading.Thread(target=self._serve, args=(sockets,), name="upstreams", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not all(server.started for server in self._servers):
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the upstream instances {', '.join(self._names)} did not start")
            time.sleep(0.01)
        self.addresses = MappingProxyType(addresses)

    def stop(self) -> None:
        """Stop serving; requests in flight get one second."""
        if self._thread is None:
            return
        for server in self._servers:
            server.should_exit = True
        self._thread.join()
        self._thread = None
        self._servers.clear()

    def _config(self, name: str) -> uvicorn.Config:
        instance = self._instance(name)
        return uvicorn.Config(
            instance if self._around is None else self._around(name, instance),
            http="h11",
            ws="websockets-sansio" if self._websockets else "none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        )

    def _serve(self, sockets: list[socket.socket]) -> None:
        async def serve_all() -> None:
            pairs = zip(self._servers, sockets, strict=True)
            await asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in pairs))

        asyncio.run(serve_all())

    def _instance(self, name: str) -> ASGIApp:
        async def instance(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive)
            arrival = _arrival(name, request)
            with self._lock:
                self._arrivals.append(arrival)
            async for _ in request.stream():
                pass
            if scope["path"] == "/slow":
                await asyncio.sleep(_slow_seconds(request))
            answer = {
                "instance": name,
                "method": arrival.method,
                "path": arrival.path,
                "headers": [list(header) for header in arrival.headers],
            }
            await JSONResponse(answer, headers={"x-served-by": name})(scope, receive, send)

        return instance

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _arrival(instance: str, request: Request) -> Arrival:
    query: bytes = request.scope["query_string"]
    raw_path: bytes = request.scope["raw_path"] + (b"?" + query if query else b"")
    headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw)
    return Arrival(instance, time.monotonic(), request.method, raw_path.decode("latin-1"), headers)


def _slow_seconds(request: Request) -> float:
    try:
        wanted = int(request.query_params.get("ms", "0")) / 1000
    except (ValueError, OverflowError):
        return 0.0
    return min(max(wanted, 0.0), _MAX_SLOW_SECONDS)
