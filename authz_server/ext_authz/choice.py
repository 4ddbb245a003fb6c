"""Which transport serves: the fast one where it can, else the reference."""

import importlib
from typing import Protocol

from authz_server.ext_authz.checker import Checker
from authz_server.ext_authz.grpcio_transport import GrpcioTransport
from authz_server.ext_authz.health_service import Readiness
from authz_server.ext_authz.transport import ObserveWait, TlsFiles, TransportError, TransportName

_NATIVE_MODULE = "authz_server.ext_authz.native_transport"


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

    Raises:
        TransportError: `native` was asked for and cannot be loaded.
    """
    why = "asked for"
    if wanted is not TransportName.GRPCIO:
        try:
            native = importlib.import_module(_NATIVE_MODULE)
        except ImportError as error:
            if wanted is TransportName.NATIVE:
                raise TransportError(
                    f"transport native cannot be loaded ({error}): install pygrpc-native, or ask for auto or grpcio"
                ) from None
            why = f"the faster one, native, cannot be loaded ({error})"
        else:
            fast: Transport = native.NativeTransport(
                checker,
                listen=listen,
                tls=tls,
                health=health,
                max_request_bytes=max_request_bytes,
                max_wait_seconds=max_wait_seconds,
                observe_wait=observe_wait,
            )
            return fast, TransportName.NATIVE, why if wanted is TransportName.NATIVE else "the fastest there is"
    reference = GrpcioTransport(checker, listen=listen, tls=tls, health=health, observe_wait=observe_wait)
    return reference, TransportName.GRPCIO, why
