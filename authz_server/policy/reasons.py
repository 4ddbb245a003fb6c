"""Why a decision came out as it did: stable words that log, metrics, dynamic metadata and `explain` share."""

from enum import StrEnum


class Reason(StrEnum):
    """The reason of a decision. Values are an interface: dashboards and alerts are built on them."""

    ALLOWED = "allowed"
    """Nothing that applies speaks against the request."""
    ALLOWLISTED = "allowlisted"
    """An enforced scope found the client address in its allow lists, and none speaks against the request."""

    BLOCKED = "blocked"
    """The longest match in an enforced scope is a block."""
    NOT_ALLOWLISTED = "not_allowlisted"
    """An enforced scope is restricted and its own and named allow lists do not hold the client address."""

    NO_CLIENT_ADDRESS = "no_client_address"
    """x-envoy-external-address is absent, or the peer that sent it is not trusted."""
    INVALID_CLIENT_ADDRESS = "invalid_client_address"
    """x-envoy-external-address is not exactly one address."""

    AMBIGUOUS_TENANT = "ambiguous_tenant"
    """The request names two tenants."""
    INVALID_TENANT = "invalid_tenant"
    """The request names a tenant by something that is not a tenant id."""
    NO_TENANT = "no_tenant"
    """The request names no tenant, and the setting says that it must."""
    UNKNOWN_TENANT = "unknown_tenant"
    """The tenant is not registered, and the setting says that it must be."""
    TENANT_HELD = "tenant_held"
    """The tenant is being moved: for this moment no instance may see its requests."""
    UNREADABLE_PIN = "unreadable_pin"
    """The tenant is registered, but its record cannot be read, so its instance is not known."""
    UNKNOWN_INSTANCE = "unknown_instance"
    """The tenant is pinned to an instance that is not registered."""
    NO_ACTIVE_INSTANCE = "no_active_instance"
    """An unregistered tenant is to be hashed to an active instance, and there is none."""

    BAD_REQUEST = "bad_request"
    """The check request cannot be read, or lacks what every HTTP request has."""
    REQUEST_TOO_LARGE = "request_too_large"
    """The check request, or the path or query in it, is longer than this server reads."""
    INTERNAL_ERROR = "internal_error"
    """Deciding raised an exception: a fault of ours, denied because a client may have provoked it."""
