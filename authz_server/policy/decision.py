"""The decision: who is asking, may they, where do they go.

A pure function of the request, the snapshot and the time. What a request causes is always a denial; this function
has no way to say "I cannot decide", because not being able to is a matter of our state, not of a request.
"""

from typing import Final, NamedTuple

from authz_server.policy.access import (
    Enforcement,
    Scope,
    ScopeOutcome,
    judge,
    normalize_host,
)
from authz_server.policy.addresses import Address, InvalidAddressError, any_contains, parse_address
from authz_server.policy.affinity import Affinity, rendezvous
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.paths import RequestPath
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import MissingClientAddress, MissingTenant, Snapshot, UnknownTenant
from authz_server.policy.tenant import name_tenant

MAX_QUERY_LENGTH: Final = 16384
"""Characters of a query; longer ones are refused. Common backends refuse request lines beyond 8 KiB anyway."""


class Allowed(NamedTuple):
    """The request may pass, to this instance if one is named."""

    reason: Reason
    client_address: Address
    tenant: str | None = None
    """The tenant that the request names; whether it is registered is told by `affinity`."""
    instance: str | None = None
    affinity: Affinity = Affinity.NONE
    scopes: tuple[ScopeOutcome, ...] = ()
    """What every scope that applies says, shadow ones included: global, tenant, resources by name.

    A tenant's scope that has neither a record nor lists has nothing to say, and is not in here.
    """
    shadow_denials: tuple[ScopeOutcome, ...] = ()
    """What scopes in shadow say that would have denied, had they been enforced; beforehand, for every check asks."""

    @property
    def deciding(self) -> ScopeOutcome | None:
        """The first enforced scope that says what `reason` says; None when no list decided."""
        return _deciding(self.reason, self.scopes)


class Denied(NamedTuple):
    """The request may not pass."""

    reason: Reason
    client_address: Address | None = None
    tenant: str | None = None
    scopes: tuple[ScopeOutcome, ...] = ()
    """As in Allowed; empty when the denial came before any scope was asked."""
    shadow_denials: tuple[ScopeOutcome, ...] = ()
    """As in Allowed."""

    @property
    def deciding(self) -> ScopeOutcome | None:
        """The first enforced scope that says what `reason` says; None when no list decided."""
        return _deciding(self.reason, self.scopes)


Decision = Allowed | Denied

_ALLOWED: Final = Reason.ALLOWED
_SHADOW: Final = Enforcement.SHADOW
_PINNED: Final = Affinity.PINNED
_DENYING: Final = (Reason.BLOCKED, Reason.NOT_ALLOWLISTED)
_WEIGHTS: Final = {reason: weight for weight, reason in enumerate((_ALLOWED, Reason.ALLOWLISTED, *reversed(_DENYING)))}
"""Of all that enforced scopes say, the weightiest is what they say together."""


def decide(attributes: RequestAttributes, snapshot: Snapshot, now: float) -> Decision:
    """Decide about one request at `now`, seconds since the Unix epoch."""
    path = RequestPath(attributes.path)
    text = path.text
    if not attributes.method or (text[:1] != "/" and text != "*"):
        return Denied(Reason.BAD_REQUEST)
    if path.is_too_long() or len(path.query) > MAX_QUERY_LENGTH:
        return Denied(Reason.REQUEST_TOO_LARGE)

    address = client_address(attributes, snapshot)
    if not isinstance(address, Address):  # to ask for an enumeration takes four times as long
        return Denied(address)

    tenant_id, problem = name_tenant(attributes, path, snapshot.options.tenant_sources)
    if problem:
        return Denied(problem, address)

    tables = snapshot.tables
    scopes: tuple[ScopeOutcome, ...] = (judge(snapshot.global_scope, tables, address, now),)
    tenant_scope = None if tenant_id is None else snapshot.tenant_scopes.get(tenant_id)
    if tenant_scope is not None:
        scopes += (judge(tenant_scope, tables, address, now),)
    if snapshot.guarded_resources:
        for scope in _guarding(attributes.host, path, snapshot):
            scopes += (judge(scope, tables, address, now),)
    reason, shadow_denials = _over_all(scopes)
    if reason is not _ALLOWED and reason in _DENYING:
        return Denied(reason, address, tenant_id, scopes, shadow_denials)
    instance, affinity, problem = _find_instance(tenant_id, snapshot)
    if problem:
        return Denied(problem, address, tenant_id, scopes, shadow_denials)
    # In half the time that the constructor takes.
    return tuple.__new__(Allowed, (reason, address, tenant_id, instance, affinity, scopes, shadow_denials))


def client_address(attributes: RequestAttributes, snapshot: Snapshot) -> Address | Reason:
    """Return the address that the decision is about, or the reason to deny.

    Only Envoy's own x-envoy-external-address is read, never X-Forwarded-For: a client can write the latter.
    """
    options = snapshot.options
    external = attributes.external_address
    if options.trusted_peers:
        try:
            peer = parse_address(attributes.peer_address or "")
        except InvalidAddressError:
            external = None
        else:
            if not any_contains(options.trusted_peers, peer):
                external = None
    if external is None:
        if options.missing_client_address is MissingClientAddress.DENY:
            return Reason.NO_CLIENT_ADDRESS
        external = attributes.peer_address
        if external is None:
            return Reason.NO_CLIENT_ADDRESS
    try:
        return parse_address(external)
    except InvalidAddressError:
        return Reason.INVALID_CLIENT_ADDRESS


def _guarding(host: str, path: RequestPath, snapshot: Snapshot) -> list[Scope]:
    """Return the scopes of the resources that a request may be for, by name."""
    fold_case, names = snapshot.options.fold_path_case, snapshot.guarded_names
    if names is not None and not path.may_begin_with(names, fold_case=fold_case):
        return []  # so it is with most requests, however many resources there are
    host = normalize_host(host)
    on_host = [guarded for guarded in snapshot.guarded_resources if guarded.resource.is_on(host)]
    if not on_host:
        return []
    readings = path.readings(fold_case=fold_case)
    return [guarded.scope for guarded in on_host if guarded.resource.holds(readings)]


def _over_all(scopes: tuple[ScopeOutcome, ...]) -> tuple[Reason, tuple[ScopeOutcome, ...]]:
    """Return what all scopes together say: each enforced one must agree; and the denials of those in shadow."""
    over_all = _ALLOWED
    shadow_denials: tuple[ScopeOutcome, ...] = ()
    for outcome in scopes:
        _, enforcement, reason, _ = outcome
        if reason is _ALLOWED:
            continue  # so it is with most requests
        if enforcement is _SHADOW:
            if outcome.denies:
                shadow_denials += (outcome,)
        elif _WEIGHTS[reason] > _WEIGHTS[over_all]:
            over_all = reason
    return over_all, shadow_denials


def _find_instance(tenant_id: str | None, snapshot: Snapshot) -> tuple[str | None, Affinity, Reason | None]:
    """Return the instance, how it was found, and the reason to deny, if any."""
    options = snapshot.options
    if tenant_id is None:
        missing_denied = options.missing_tenant is MissingTenant.DENY
        return None, Affinity.NONE, Reason.NO_TENANT if missing_denied else None
    tenant = snapshot.tenants.get(tenant_id)
    if tenant is None:
        if options.unknown_tenant is UnknownTenant.DENY:
            return None, Affinity.NONE, Reason.UNKNOWN_TENANT
        if options.unknown_tenant is UnknownTenant.NONE:
            return None, Affinity.NONE, None
        instance = rendezvous(tenant_id, snapshot.instances.values())
        return instance, Affinity.HASHED, None if instance else Reason.NO_ACTIVE_INSTANCE
    instance = tenant.instance
    if instance is None:
        return None, _PINNED, Reason.UNREADABLE_PIN
    if tenant.held:
        return None, _PINNED, Reason.TENANT_HELD
    if snapshot.instances.get(instance) is None:
        return None, _PINNED, Reason.UNKNOWN_INSTANCE
    return instance, _PINNED, None


def _deciding(reason: Reason, scopes: tuple[ScopeOutcome, ...]) -> ScopeOutcome | None:
    if reason is _ALLOWED:
        return None  # scopes say so when no list holds the address
    for outcome in scopes:
        if outcome.reason is reason and outcome.enforcement is Enforcement.ENFORCE:
            return outcome
    return None
