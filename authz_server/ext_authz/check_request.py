"""Envoy's CheckRequest to the few facts that a decision needs.

The message is not decoded: a walk over its bytes steps over what is not needed, most of it, and copies the rest. So
cookies, authorization headers and bodies stay in the message and go with it. It reads what any reader of protocol
buffers reads (https://protobuf.dev/programming-guides/encoding/): fields come in any order, unknown ones mean nothing,
of a repeated one the last counts, and a message that comes in parts is what these parts say together. But what is
stepped over is not looked at, be it damaged or not UTF-8; and groups, which are in no message of Envoy's, are refused.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

from google.protobuf.message import DecodeError

from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.policy.attributes import RequestAttributes

EXTERNAL_ADDRESS_HEADER: Final = "x-envoy-external-address"
REQUEST_ID_HEADER: Final = "x-request-id"

# How a value's length is told: the last three bits of a field's tag.
_VARINT: Final = 0
_EIGHT_BYTES: Final = 1
_LENGTH: Final = 2
_FOUR_BYTES: Final = 5
# Tags of fields that have a length (number << 3 | 2), named after protos/authz_server/ext_authz.proto.
_ATTRIBUTES: Final = 0x0A  # CheckRequest 1
_SOURCE: Final = 0x0A  # AttributeContext 1
_REQUEST: Final = 0x22  # AttributeContext 4
_HTTP: Final = 0x12  # Request 2
_METHOD: Final = 0x12  # HttpRequest 2
_HEADERS: Final = 0x1A  # HttpRequest 3
_PATH: Final = 0x22  # HttpRequest 4
_HOST: Final = 0x2A  # HttpRequest 5
_HEADER_MAP: Final = 0x6A  # HttpRequest 13
_KEY: Final = 0x0A  # of a map's entry, 1
_VALUE: Final = 0x12  # of a map's entry, 2

_SMALLEST_TAG: Final = 1 << 3
_LARGEST_TAG: Final = (1 << 32) - 1
_MAX_LENGTH_BYTES: Final = 5
"""Of a tag and of a length, as they are written; of another number ten."""

_NO_SUCH_FIELD: Final = "not a CheckRequest: there is no such field"
_OUTSIDE: Final = "not a CheckRequest: a field ends outside of its message"


class BadCheckRequestError(ValueError):
    """The bytes are not a check request about an HTTP request."""


class CheckRequestReader:
    """Reads check requests, keeping of their headers only ours and those that name a tenant."""

    def __init__(self, tenant_headers: AbstractSet[str], *, with_peer: bool = True) -> None:
        """Make a reader.

        Args:
            tenant_headers: the names, in lower case, of the headers that name a tenant.
            with_peer: whether to read `peer_address`, which few policies ask for.
        """
        self._with_peer = with_peer
        self._tenant_headers = tuple(tenant_headers)
        self._wanted = {name.encode(): name for name in (*tenant_headers, EXTERNAL_ADDRESS_HEADER, REQUEST_ID_HEADER)}
        lengths = {len(name) for name in self._wanted}
        self._may_be_wanted = bytes(length > 127 or length in lengths for length in range(256))
        """By the first byte of a name's length: 0 where no wanted name is so long, which most headers are told by."""

    def read(self, data: bytes) -> RequestAttributes:
        """Read a check request.

        Nothing is judged here: an address or a tenant that makes no sense is handed on as it came.

        Raises:
            BadCheckRequestError: what is needed of the message cannot be read, or it is not about an HTTP request.
        """
        found = _Found()
        try:
            self._read_check_request(data, found)
            if not found.http:
                raise BadCheckRequestError("the CheckRequest has no attributes.request.http")
            headers = found.headers
            if not found.has_headers and found.header_map:
                headers = _listed_headers(found.header_map, self._wanted)
            peer_address = _peer_address(found.source) if self._with_peer else None
        except (IndexError, UnicodeDecodeError, DecodeError) as error:
            raise BadCheckRequestError(f"not a CheckRequest: {error}") from None
        naming = {}
        for name in self._tenant_headers:
            value = headers.get(name)
            if value is not None:
                naming[name] = value
        # Half of the time would go into the constructor, which is a function in Python.
        return tuple.__new__(
            RequestAttributes,
            (
                found.method,
                found.host,
                found.path,
                peer_address,
                headers.get(EXTERNAL_ADDRESS_HEADER),
                naming,
                headers.get(REQUEST_ID_HEADER, ""),
            ),
        )

    def _read_check_request(self, data: bytes, found: "_Found") -> None:
        at, end = 0, len(data)
        while at < end:
            tag, start, at = _field(data, at, end)
            if tag == _ATTRIBUTES:
                self._read_attributes(data, start, at, found)

    def _read_attributes(self, data: bytes, at: int, end: int, found: "_Found") -> None:
        while at < end:
            tag, start, at = _field(data, at, end)
            if tag == _REQUEST:
                self._read_request(data, start, at, found)
            elif tag == _SOURCE and self._with_peer:
                found.source.append(data[start:at])

    def _read_request(self, data: bytes, at: int, end: int, found: "_Found") -> None:
        while at < end:
            tag, start, at = _field(data, at, end)
            if tag == _HTTP:
                found.http = True
                self._read_http(data, start, at, found)

    def _read_http(self, data: bytes, at: int, end: int, found: "_Found") -> None:
        while at < end:
            tag, length, start = data[at], data[at + 1], at + 2
            if tag & 0x87 == _LENGTH and length < 128:  # so it is with most: here, since a call takes as long again
                at = start + length
                if at > end:
                    raise BadCheckRequestError(_OUTSIDE)
            else:
                tag, start, at = _field(data, at, end)
            if tag == _HEADERS:
                found.has_headers = True
                self._read_header(data, start, at, found)
            elif tag == _PATH:
                found.path = data[start:at].decode()
            elif tag == _HOST:
                found.host = data[start:at].decode()
            elif tag == _METHOD:
                found.method = data[start:at].decode()
            elif tag == _HEADER_MAP:
                found.header_map.append(data[start:at])
            elif tag < _SMALLEST_TAG:
                raise BadCheckRequestError(_NO_SUCH_FIELD)

    def _read_header(self, data: bytes, at: int, end: int, found: "_Found") -> None:
        if end - at > 3 and data[at] == _KEY and not self._may_be_wanted[data[at + 1]]:
            after = at + 2 + data[at + 1]
            if after + 2 <= end and data[after] == _VALUE:
                length = data[after + 1]
                if length < 128 and after + 2 + length == end:
                    return  # a key that is as long as no wanted one, a value, and nothing else: so it is with most
        key = value = b""
        while at < end:
            tag, start, at = _field(data, at, end)
            if tag == _KEY:
                key = data[start:at]
            elif tag == _VALUE:
                value = data[start:at]
        name = self._wanted.get(key)
        if name is not None:
            found.headers[name] = value.decode()


class _Found:
    """What has been read of a check request so far."""

    __slots__ = ("has_headers", "header_map", "headers", "host", "http", "method", "path", "source")

    def __init__(self) -> None:
        self.http = False
        """Whether it is about an HTTP request."""
        self.method = ""
        self.host = ""
        self.path = ""
        self.has_headers = False
        """Whether headers came in the map form. Its names are in lower case and its values joined already (Envoy's API
        says so, and Envoy does so)."""
        self.headers: dict[str, str] = {}
        """Of the map form, those that are wanted."""
        self.header_map: list[bytes] = []
        """The list form: a message, in parts."""
        self.source: list[bytes] = []
        """The peer: a message, in parts."""


def _field(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """Return the tag of the field that begins at a byte, where its value begins, and where that ends.

    Raises:
        BadCheckRequestError: it is no field, or goes beyond `end`.
        IndexError: the data end within it.
    """
    tag = data[at]
    at += 1
    if tag > 127:
        tag, at = _varint(data, at - 1, _MAX_LENGTH_BYTES)
        if tag > _LARGEST_TAG:
            raise BadCheckRequestError(_NO_SUCH_FIELD)
    kind = tag & 7
    if kind == _LENGTH:
        length = data[at]
        at += 1
        if length > 127:
            length, at = _varint(data, at - 1, _MAX_LENGTH_BYTES)
        stop = at + length
    elif kind == _VARINT:
        _, stop = _varint(data, at, 10)
    elif kind == _EIGHT_BYTES:
        stop = at + 8
    elif kind == _FOUR_BYTES:
        stop = at + 4
    else:
        raise BadCheckRequestError(_NO_SUCH_FIELD)
    if stop > end:
        raise BadCheckRequestError(_OUTSIDE)
    if tag < _SMALLEST_TAG:
        raise BadCheckRequestError(_NO_SUCH_FIELD)
    return tag, at, stop


def _varint(data: bytes, at: int, longest: int) -> tuple[int, int]:
    """Return the number that begins at a byte, and where it ends: seven bits a byte, lowest first.

    Raises:
        BadCheckRequestError: it has more bytes than `longest`.
        IndexError: the data end within it.
    """
    number = 0
    for shift in range(0, 7 * longest, 7):
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise BadCheckRequestError(f"not a CheckRequest: a number of more than {longest} bytes")


def _peer_address(parts: Iterable[bytes]) -> str | None:
    """Return the address of a Peer. Unix sockets and Envoy's internal listeners have no socket_address."""
    peer = ext_authz_pb2.Peer()
    for part in parts:
        peer.MergeFromString(part)
    return peer.address.socket_address.address or None


def _listed_headers(parts: Iterable[bytes], wanted: Mapping[bytes, str]) -> dict[str, str]:
    """Return the wanted headers of the list form, of a filter with `encode_raw_headers`, in the shape of the map form.

    Names in lower case, the values of repeated ones joined by commas.
    """
    header_map = ext_authz_pb2.HeaderMap()
    for part in parts:
        header_map.MergeFromString(part)
    values: dict[str, list[str]] = {}
    for header in header_map.headers:
        name = header.key.lower()
        if name.encode() in wanted:
            # Bytes that are not UTF-8 become U+FFFD, which no address and no tenant id may contain.
            value = header.value or header.raw_value.decode("utf-8", errors="replace")
            values.setdefault(name, []).append(value)
    return {name: ",".join(repeated) for name, repeated in values.items()}
