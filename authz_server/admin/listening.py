"""Listening on a port, and serving the admin app inside a running event loop."""

import contextlib
import os
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

_CLOSE_SECONDS = 1
"""How long answers under way may take once the port closes."""


class CannotListenError(Exception):
    """The port cannot be had; the message says which and why."""


def open_socket(host: str, port: int) -> socket.socket:
    """Listen on a TCP port; 0 takes a free one.

    Raises:
        CannotListenError: naming host, port and why.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # As gRPC does: [::] also takes IPv4, which kubelet's probes may come by.
        dual_stack = family is socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, dualstack_ipv6=dual_stack)
    except socket.gaierror as error:
        raise CannotListenError(f"cannot listen on host {host}: {error.strerror}") from None
    except UnicodeError:  # what the codec of host names raises for a label of more than 63 characters
        raise CannotListenError(f"cannot listen on host {host}: it is not a host name") from None
    except OSError as error:
        raise CannotListenError(f"cannot listen on host {host}, port {port}: {os.strerror(error.errno or 0)}") from None


class AdminServer(uvicorn.Server):
    """Serves the admin port inside a running event loop, and leaves signals to whoever runs that loop."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    def stop(self) -> None:
        """Make `serve` return soon."""
        self.should_exit = True
