"""Envoy's CheckRequest to the few facts that a decision needs.

Whatever is not needed is never copied: cookies, authorization headers and bodies stay in the message and go with it.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from google.protobuf.message import DecodeError

from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.policy.attributes import RequestAttributes

EXTERNAL_ADDRESS_HEADER = "x-envoy-external-address"
REQUEST_ID_HEADER = "x-request-id"


class BadCheckRequestError(ValueError):
    """The bytes are not a check request about an HTTP request."""


def read_check_request(data: bytes, tenant_headers: AbstractSet[str], *, with_peer: bool = True) -> RequestAttributes:
    """Read a check request, keeping of its headers only ours and those that name a tenant.

    Nothing is judged here: an address or a tenant that makes no sense is handed on as it came.

    Args:
        data: the message as it came from the wire.
        tenant_headers: the names, in lower case, of the headers that name a tenant.
        with_peer: whether to read `peer_address`, which lies deep within the message and few policies ask for.

    Raises:
        BadCheckRequestError: the bytes cannot be decoded, or are not about an HTTP request.
    """
    try:
        check_request = ext_authz_pb2.CheckRequest.FromString(data)
    except DecodeError as error:
        raise BadCheckRequestError(f"not a CheckRequest: {error}") from None
    attributes = check_request.attributes
    http = attributes.request.http
    method = http.method
    if not method and not attributes.request.HasField("http"):  # asked for only where it may be so
        raise BadCheckRequestError("the CheckRequest has no attributes.request.http")
    # The map form holds lower-case names and joined values already (Envoy's API says so, and Envoy does so).
    headers: Mapping[str, str] = http.headers or _listed_headers(
        http.header_map, tenant_headers | {EXTERNAL_ADDRESS_HEADER, REQUEST_ID_HEADER}
    )
    header = headers.get
    naming = {}
    for name in tenant_headers:
        value = header(name)
        if value is not None:
            naming[name] = value
    # Half of the time would go into the constructor, which is a function in Python.
    return tuple.__new__(
        RequestAttributes,
        (
            method,
            http.host,
            http.path,
            # Unix sockets and Envoy's internal listeners are addresses of other kinds, whose socket_address is unset.
            (attributes.source.address.socket_address.address or None) if with_peer else None,
            header(EXTERNAL_ADDRESS_HEADER),
            naming,
            header(REQUEST_ID_HEADER, ""),
        ),
    )


def _listed_headers(header_map: ext_authz_pb2.HeaderMap, wanted: AbstractSet[str]) -> dict[str, str]:
    """Return the wanted headers of the list form, of a filter with `encode_raw_headers`, in the shape of the map form.

    Names in lower case, the values of repeated ones joined by commas.
    """
    values: dict[str, list[str]] = {}
    for header in header_map.headers:
        name = header.key.lower()
        if name in wanted:
            # Bytes that are not UTF-8 become U+FFFD, which no address and no tenant id may contain.
            value = header.value or header.raw_value.decode("utf-8", errors="replace")
            values.setdefault(name, []).append(value)
    return {name: ",".join(repeated) for name, repeated in values.items()}
