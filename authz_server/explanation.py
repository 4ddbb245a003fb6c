"""`explain`: a request that somebody describes, and what the server's own `decide` makes of it. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

from authz_server.policy.access import Scope, ScopeOutcome, tenant_scope
from authz_server.policy.addresses import Address
from authz_server.policy.affinity import Tenant
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Decision, decide
from authz_server.policy.snapshot import DecisionOptions, Snapshot
from authz_server.policy.tenant import SourceKind, TenantSource


class CannotDescribeError(ValueError):
    """What was given does not make one request; the message says what to leave out."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision, and all it came from."""

    attributes: RequestAttributes
    at: float
    """The time decided for, seconds since the Unix epoch."""
    decision: Decision
    snapshot: Snapshot
    notes: tuple[str, ...] = ()
    """What could make the servers decide otherwise."""

    @property
    def registered(self) -> Tenant | None:
        """The record of the tenant that the request names, if it has one."""
        return self.snapshot.tenants.get(self.decision.tenant or "")

    @property
    def scopes(self) -> tuple[ScopeOutcome, ...]:
        """What every scope that applies says, also that of a tenant which has neither a record nor lists."""
        tenant, told = self.decision.tenant, self.decision.scopes
        if tenant is None or not told or tenant in self.snapshot.tenant_scopes:
            return told
        return told[0], Scope(tenant_scope(tenant)).unmatched, *told[1:]


def describe_request(
    address: str,
    *,
    method: str,
    host: str,
    path: str,
    headers: Iterable[tuple[str, str]],
    tenant: str | None,
    options: DecisionOptions,
) -> RequestAttributes:
    """Return the request of a client at `address` as Envoy would tell it, through a trusted peer where some are set.

    A tenant is named where the server looks first.

    Raises:
        CannotDescribeError: the server would not see the tenant, or it is named in a part of the request that is
            given too.
    """
    joined: dict[str, str] = {}
    for name, value in headers:
        # Envoy hands over repeated headers joined by a comma.
        joined[name] = f"{joined[name]},{value}" if name in joined else value
    peer = None
    if options.trusted_peers:
        first = options.trusted_peers[0]
        peer = str(Address(first.version, first.first))
    attributes = RequestAttributes(
        method=method, host=host, path=path, peer_address=peer, external_address=address, headers=joined
    )
    if tenant is None:
        return attributes
    if not options.tenant_sources:
        raise CannotDescribeError("tenant: the settings name no source of it (AUTHZ_TENANT_FROM), so no server sees it")
    return _name_tenant(attributes, tenant, options.tenant_sources[0])


def explain(attributes: RequestAttributes, snapshot: Snapshot, at: float) -> Explanation:
    """Decide as the server does, and say what else one must know."""
    notes = []
    if snapshot.problems:
        notes.append(
            f"{len(snapshot.problems)} records cannot be read; a server that had read them before still uses what they "
            "said then"
        )
    if degraded := snapshot.degraded_scopes():
        notes.append(f"these scopes use a list that is not complete: {', '.join(degraded)}")
    limited = [guarded.resource.name for guarded in snapshot.guarded_resources if guarded.resource.hosts]
    if limited and not attributes.host:
        notes.append(f"without --host, resources that are limited to hosts do not apply: {', '.join(limited)}")
    return Explanation(attributes, at, decide(attributes, snapshot, at), snapshot, tuple(notes))


def _name_tenant(attributes: RequestAttributes, tenant: str, source: TenantSource) -> RequestAttributes:
    match source.kind:
        case SourceKind.HEADER:
            if source.name in attributes.headers:
                raise CannotDescribeError(f"tenant and header {source.name}: give one of them")
            return attributes._replace(headers={**attributes.headers, source.name: tenant})
        case SourceKind.QUERY:
            mark = "&" if "?" in attributes.path else "?"
            return attributes._replace(path=f"{attributes.path}{mark}{quote(source.name)}={quote(tenant, safe='')}")
        case SourceKind.HOST:
            if attributes.host:
                raise CannotDescribeError(f"tenant and host: the host names the tenant ({source}), give one of them")
            return attributes._replace(host=source.name.replace("{tenant}", tenant))
        case SourceKind.PATH:
            if attributes.path != "/":
                raise CannotDescribeError(f"tenant and path: the path names the tenant ({source}), give one of them")
            return attributes._replace(path=source.name.replace("{tenant}", quote(tenant, safe="")))
