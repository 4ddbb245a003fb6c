"""Which transport serves: the fast one, or the reference if the operator wants it."""

from typing import Protocol

from authz_server.ext_authz.asyncio_transport import AsyncioTransport
from authz_server.ext_authz.checker import Checker
from authz_server.ext_authz.grpcio_transport import GrpcioTransport
from authz_server.ext_authz.health_service import Readiness
from authz_server.ext_authz.transport import ObserveWait, TlsFiles, TransportName


class Transport(Protocol):
    """Serves a checker on one port."""

    @property
    def shed(self) -> int:
        """Calls answered UNAVAILABLE for lack of time or memory, so far."""

    @property
    def in_flight(self) -> int:
        """Calls received and not answered yet, those that wait included."""

    async def start(self) -> int:
        """Listen, and return the port."""

    async def drain(self, grace_seconds: float) -> None:
        """Answer what was received, tell clients to go elsewhere, and close."""


def choose_transport(
    wanted: TransportName,
    checker: Checker,
    *,
    listen: str,
    tls: TlsFiles | None,
    health: Readiness,
    max_request_bytes: int,
    max_wait_seconds: float,
    observe_wait: ObserveWait,
) -> tuple[Transport, TransportName, str]:
    """Make a transport that is not listening yet; return it, its name, and why it was taken.

    Args:
        wanted: the operator's wish.
        checker: answers the checks.
        listen: `host:port`.
        tls: None serves plain text.
        health: what the health service reports.
        max_request_bytes: the checker's own limit.
        max_wait_seconds: checks that would wait for longer are answered UNAVAILABLE.
        observe_wait: is told how long checks have waited.
    """
    why = "asked for" if wanted is not TransportName.AUTO else "the one that costs least"
    if wanted is TransportName.GRPCIO:
        reference = GrpcioTransport(checker, listen=listen, tls=tls, health=health, observe_wait=observe_wait)
        return reference, TransportName.GRPCIO, why
    fast = AsyncioTransport(
        checker,
        listen=listen,
        tls=tls,
        health=health,
        max_request_bytes=max_request_bytes,
        max_wait_seconds=max_wait_seconds,
        observe_wait=observe_wait,
    )
    return fast, TransportName.ASYNCIO, why
