"""Envoy's CheckRequest to the few facts that a decision needs.

Whatever is not needed is never copied: cookies, authorization headers and bodies stay in the message and go with it.
"""

from collections.abc import Set as AbstractSet

from google.protobuf.message import DecodeError

from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.policy.attributes import RequestAttributes

EXTERNAL_ADDRESS_HEADER = "x-envoy-external-address"
REQUEST_ID_HEADER = "x-request-id"


class BadCheckRequestError(ValueError):
    """The bytes are not a check request about an HTTP request."""


def read_check_request(data: bytes, tenant_headers: AbstractSet[str]) -> RequestAttributes:
    """Read a check request, keeping of its headers only ours and those that name a tenant.

    Nothing is judged here: an address or a tenant that makes no sense is handed on as it came.

    Args:
        data: the message as it came from the wire.
        tenant_headers: the names, in lower case, of the headers that name a tenant.

    Raises:
        BadCheckRequestError: the bytes cannot be decoded, or are not about an HTTP request.
    """
    try:
        check_request = ext_authz_pb2.CheckRequest.FromString(data)
    except DecodeError as error:
        raise BadCheckRequestError(f"not a CheckRequest: {error}") from None
    attributes = check_request.attributes
    if not attributes.request.HasField("http"):
        raise BadCheckRequestError("the CheckRequest has no attributes.request.http")
    http = attributes.request.http
    headers = _headers(http, tenant_headers | {EXTERNAL_ADDRESS_HEADER, REQUEST_ID_HEADER})
    return RequestAttributes(
        method=http.method,
        host=http.host,
        path=http.path,
        # Unix sockets and Envoy's internal listeners are addresses of other kinds, whose socket_address is unset.
        peer_address=attributes.source.address.socket_address.address or None,
        external_address=headers.get(EXTERNAL_ADDRESS_HEADER),
        headers={name: headers[name] for name in tenant_headers if name in headers},
        request_id=headers.get(REQUEST_ID_HEADER, ""),
    )


def _headers(http: ext_authz_pb2.HttpRequest, wanted: AbstractSet[str]) -> dict[str, str]:
    """Return the wanted headers that the request has; repeated ones joined by commas.

    The map form holds lower-case names and joined values already (Envoy's API says so, and Envoy does so). The list
    form, of a filter with `encode_raw_headers`, is brought to the same shape.
    """
    if http.headers:
        return {name: http.headers[name] for name in wanted if name in http.headers}
    values: dict[str, list[str]] = {}
    for header in http.header_map.headers:
        name = header.key.lower()
        if name in wanted:
            # Bytes that are not UTF-8 become U+FFFD, which no address and no tenant id may contain.
            value = header.value or header.raw_value.decode("utf-8", errors="replace")
            values.setdefault(name, []).append(value)
    return {name: ",".join(repeated) for name, repeated in values.items()}
