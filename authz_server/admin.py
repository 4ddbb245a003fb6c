"""The admin port: probes, metrics and what the snapshot is. Plain HTTP, read-only, shows no secret."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from authz_server.health import HealthState
from authz_server.policy.snapshot import Snapshot

_UNREADABLE_SHOWN = 1000
"""Of the unreadable records, so many are named; all are counted."""
_CLOSE_SECONDS = 1
"""How long answers under way may take once the port closes."""


class CannotListenError(Exception):
    """The port cannot be had; the message says which and why."""


def build_admin_app(
    *,
    health: HealthState,
    registry: CollectorRegistry,
    current: Callable[[], Snapshot | None],
    age_seconds: Callable[[], float | None],
) -> Starlette:
    """Build the routes.

    Args:
        health: what /readyz tells.
        registry: what /metrics tells.
        current: returns the snapshot that decisions are made from.
        age_seconds: returns how long ago the store last confirmed that snapshot; None: never.
    """

    async def livez(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        ready = health.is_ready()
        components = {
            str(name): {"ready": component.ready, "required": component.required, "detail": component.detail}
            for name, component in health.components.items()
        }
        body = {"ready": ready, "snapshot_age_seconds": _rounded(age_seconds()), "components": components}
        return JSONResponse(body, status_code=200 if ready else 503)

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    async def snapshot(_request: Request) -> Response:
        loaded = current()
        if loaded is None:
            return JSONResponse({"problem": "no snapshot is loaded"}, status_code=503)
        return JSONResponse(_describe(loaded) | {"age_seconds": _rounded(age_seconds())})

    return Starlette(
        routes=[
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/snapshot", snapshot),
        ]
    )


def _describe(snapshot: Snapshot) -> dict[str, Any]:
    unreadable = [
        {"record": str(key), "problem": snapshot.problems[key]} for key in sorted(snapshot.problems)[:_UNREADABLE_SHOWN]
    ]
    return {
        "epoch": snapshot.epoch,
        "revision": snapshot.revision,
        "counts": snapshot.counts(),
        "unreadable": unreadable,
        "degraded_scopes": snapshot.degraded_scopes(),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


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
