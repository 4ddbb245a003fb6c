"""What the transports have in common: their errors, the TLS files, and where they listen."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

MAX_PORT = 65535
"""C-core takes larger numbers modulo 65536."""

OVERLOADED = "overloaded"
"""What clients are told with UNAVAILABLE when there is no time or no memory for their call."""

ObserveWait = Callable[[float, int], None]
"""Gets the seconds that checks had waited when their decision began, and how many checks they were. Must not raise."""


def ignore_wait(_seconds: float, _checks: int) -> None:
    """Observe nothing."""


class TransportName(Enum):
    """What an operator can ask for."""

    AUTO = "auto"
    """The one that costs least: `asyncio`."""
    ASYNCIO = "asyncio"
    GRPCIO = "grpcio"


class TransportError(Exception):
    """The server cannot listen; the message says where, why and how to mend it."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files, read once at start."""

    certificate: Path
    """The server's certificate, followed by the intermediate ones."""
    key: Path
    client_ca: Path | None = None
    """Mutual TLS: only clients with a certificate from one of these authorities may connect. None: any client."""


def parse_address(listen: str) -> tuple[str, int]:
    """Read `host:port`, with an IPv6 host in brackets.

    Raises:
        TransportError: it is neither.
    """
    host, _, port = listen.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and int(port[:6]) <= MAX_PORT):
        raise TransportError(f"{listen!r} is not host:port with a port from 0 to {MAX_PORT}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def open_tls(tls: TlsFiles) -> ssl.SSLContext:
    """Read the TLS files into a context that speaks HTTP/2.

    Raises:
        TransportError: naming the file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    for path in (tls.certificate, tls.key, tls.client_ca):
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            raise TransportError(f"cannot read the TLS file {path}: {error.strerror}") from None
    try:
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except ssl.SSLError as error:
        raise TransportError(
            f"{tls.certificate} and {tls.key} are not a PEM certificate and its unencrypted key: {error}"
        ) from None
    if tls.client_ca:
        try:
            context.load_verify_locations(tls.client_ca)
        except ssl.SSLError as error:
            raise TransportError(f"{tls.client_ca} is not a PEM file of certificate authorities: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context
