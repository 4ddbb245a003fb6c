"""RequestAttributes: the few facts of a request that a decision needs."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class RequestAttributes(NamedTuple):
    """What Envoy says about one request, as text that has not been judged yet.

    Who can write what: Envoy alone writes `peer_address`; it writes `external_address` at the edge; everything
    else is the client's word.
    """

    method: str
    host: str
    """The Host or :authority header, with a port if the client sent one."""
    path: str
    """The path with its query string, as Envoy forwards it."""
    peer_address: str | None = None
    """The connection's peer as Envoy saw it; None for a peer without an IP address (a Unix socket), and where the
    policy does not ask for it (`DecisionOptions.needs_peer`)."""
    external_address: str | None = None
    """The value of x-envoy-external-address; None when it is absent. Repeated headers arrive joined by a comma."""
    headers: Mapping[str, str] = MappingProxyType({})
    """The headers that name a tenant, under lower-case names; the others are not needed and not kept."""
    request_id: str = ""
    """The value of x-request-id; only for people who read logs, never for the decision."""
