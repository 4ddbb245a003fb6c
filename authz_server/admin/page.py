"""The page for people: how this server is, whom it denied, and what it would decide about a request.

Read-only, works without scripts, loads nothing from elsewhere. Most of what it shows was written by clients, so the
templates escape everything, and a Content-Security-Policy forbids whatever could slip through.
"""

import asyncio
import base64
import hashlib
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from authz_server.decision_log import Decided, DecisionLog
from authz_server.explanation import CannotDescribeError, Explanation, describe_request, explain
from authz_server.health import HealthState
from authz_server.policy.decision import Allowed
from authz_server.policy.snapshot import Snapshot
from authz_server.replicas import Registry
from authz_server.store.interface import Replica, StoreError

_HERE = files("authz_server.admin")
_STYLE = _HERE.joinpath("page.css").read_text(encoding="utf-8")
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
SECURITY_HEADERS: Mapping[str, str] = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Nothing but this page's own style may load (CSP level 3), and no other site may frame or embed it."""

_TEMPLATE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    _HERE.joinpath("page.html").read_text(encoding="utf-8")
)

SHOWN = 50
"""Denials on the page."""
FIELDS = ("address", "method", "host", "path", "tenant")
"""What the form asks for."""
_STORE_SECONDS = 1.0
"""How long the page waits for the store; it is needed most while the store is away."""
_LONGEST_FIELD = 9000
"""Characters of a form's field: a little more than the longest path that is decided about."""


@dataclass(frozen=True, slots=True)
class Page:
    """Builds the page.

    Args:
        health: what the server is made of.
        current: returns the snapshot that decisions are made from.
        age_seconds: returns how long ago the store last confirmed that snapshot; None: never.
        log: holds the last denials.
        servers: asks the store for the servers that have reported.
        clock: seconds since the Unix epoch.
    """

    health: HealthState
    current: Callable[[], Snapshot | None]
    age_seconds: Callable[[], float | None]
    log: DecisionLog
    servers: Callable[[], Awaitable[Registry]]
    clock: Callable[[], float]

    async def render(self, query: Mapping[str, str]) -> str:
        """Return the page as HTML.

        Args:
            query: the query parameters: the form's fields, and `find`, which denials must contain.
        """
        given = {name: query.get(name, "").strip()[:_LONGEST_FIELD] for name in FIELDS}
        find = query.get("find", "").strip()
        registry, registry_problem = await self._ask_servers()
        snapshot = self.current()
        explanation, problem = self._explain(given, snapshot)
        denials = [self._row(decided) for decided in reversed(self.log.recent)]
        found = [row for row in denials if find in row["text"]] if find else denials
        return _TEMPLATE.render(
            host=socket.gethostname(),
            ready=self.health.is_ready(),
            components=self.health.components,
            snapshot=snapshot,
            counts=snapshot.counts() if snapshot else {},
            degraded=snapshot.degraded_scopes() if snapshot else [],
            problems=sorted(snapshot.problems.items())[:SHOWN] if snapshot else [],
            age_seconds=self.age_seconds(),
            given=given,
            explanation=explanation,
            allowed=explanation is not None and isinstance(explanation.decision, Allowed),
            problem=problem,
            find=find,
            denials=found[:SHOWN],
            denials_found=len(found),
            anonymized=self.log.anonymizes,
            replicas=[_replica_row(replica, registry) for replica in registry.replicas] if registry else [],
            replicas_problem=registry_problem,
            now=datetime.fromtimestamp(self.clock(), UTC),
            style=_STYLE,
        )

    def _explain(self, given: Mapping[str, str], snapshot: Snapshot | None) -> tuple[Explanation | None, str]:
        if not given["address"]:
            return None, ""
        if snapshot is None:
            return None, "there is no snapshot to decide from"
        try:
            attributes = describe_request(
                given["address"],
                method=given["method"] or "GET",
                host=given["host"],
                path=given["path"] or "/",
                headers=(),
                tenant=given["tenant"] or None,
                options=snapshot.options,
            )
        except CannotDescribeError as error:
            return None, str(error)
        return explain(attributes, snapshot, self.clock()), ""

    async def _ask_servers(self) -> tuple[Registry | None, str]:
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                return await self.servers(), ""
        except TimeoutError:
            return None, f"the store did not answer within {_STORE_SECONDS:g} s"
        except StoreError as error:
            return None, str(error)

    def _row(self, decided: Decided) -> dict[str, Any]:
        facts = self.log.describe(decided)
        shown = {name: str(value) for name, value in facts.items() if name not in ("event", "outcome")}
        ago = max(0, round(self.clock() - decided.at))
        return {**shown, "ago": _ago(ago), "text": " ".join(shown.values())}


def _replica_row(replica: Replica, registry: Registry) -> dict[str, Any]:
    return {
        "name": replica.name,
        "state": registry.state(replica),
        "decides_by": registry.decides_by(replica),
        "newest": registry.is_newest(replica),
        "heard": _ago(round(replica.silent_seconds)) if replica.report else "not known",
    }


def _ago(seconds: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
