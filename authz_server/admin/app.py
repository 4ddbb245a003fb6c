"""The routes of the admin port."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from authz_server.admin.page import SECURITY_HEADERS, Page
from authz_server.decision_log import DecisionLog
from authz_server.health import HealthState
from authz_server.policy.snapshot import Snapshot
from authz_server.replicas import Registry

_UNREADABLE_SHOWN = 1000
"""Of the unreadable records, so many are named; all are counted."""

_THIS_MACHINE = ("127.0.0.1", "::1")
"""Exactly these: Istio's sidecar hands on other pods' connections from 127.0.0.6."""
_THIS_MACHINE_NAMES = ("localhost", *_THIS_MACHINE)
"""No other name, or a web site whose name resolves to 127.0.0.1 could read the page in an administrator's browser."""
_ONLY_HERE = (
    "The page shows client addresses, so it is only for this machine: kubectl port-forward this pod's admin port, "
    "and open http://localhost:PORT/\n"
)


def build_admin_app(
    *,
    health: HealthState,
    registry: CollectorRegistry,
    current: Callable[[], Snapshot | None],
    age_seconds: Callable[[], float | None],
    log: DecisionLog,
    servers: Callable[[], Awaitable[Registry]],
) -> Starlette:
    """Build the routes.

    Args:
        health: what /readyz tells.
        registry: what /metrics tells.
        current: returns the snapshot that decisions are made from.
        age_seconds: returns how long ago the store last confirmed that snapshot; None: never.
        log: holds the last denials, for the page.
        servers: asks the store for those that have reported, for the page.
    """
    page = Page(
        health=health,
        current=current,
        age_seconds=age_seconds,
        log=log,
        servers=servers,
        clock=time.time,
    )

    async def index(request: Request) -> Response:
        peer = request.client.host if request.client else ""
        if peer not in _THIS_MACHINE or request.url.hostname not in _THIS_MACHINE_NAMES:
            return PlainTextResponse(_ONLY_HERE, status_code=403)
        return HTMLResponse(await page.render(request.query_params), headers=SECURITY_HEADERS)

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
            Route("/", index),
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
