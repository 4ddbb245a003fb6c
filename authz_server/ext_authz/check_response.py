"""A decision to Envoy's CheckResponse.

Every header of ours is either set, overwriting what the client sent, or removed, in every answer that lets a request
through. Never both: Envoy sets first and removes afterwards, so such a header would be lost.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from itertools import product
from types import MappingProxyType
from typing import Final, NamedTuple, Self

from authz_server.policy.access import ListMatch
from authz_server.policy.addresses import Address, address_text
from authz_server.policy.affinity import Affinity
from authz_server.policy.decision import Allowed, Decision, Denied
from authz_server.policy.identifiers import MAX_IDENTIFIER_LENGTH
from authz_server.policy.reasons import Reason

# Tags of fields that have a length (number << 3 | 2), named after protos/authz_server/ext_authz.proto.
_DENIED_RESPONSE: Final = b"\x12"  # CheckResponse 2
_OK_RESPONSE: Final = b"\x1a"  # CheckResponse 3
_DYNAMIC_METADATA: Final = b"\x22"  # CheckResponse 4
_HEADERS: Final = b"\x12"  # OkHttpResponse 2, DeniedHttpResponse 2
_HEADERS_TO_REMOVE: Final = b"\x2a"  # OkHttpResponse 5
_HTTP_STATUS: Final = b"\x0a"  # DeniedHttpResponse 1
_BODY: Final = b"\x1a"  # DeniedHttpResponse 3
_HEADER: Final = b"\x0a"  # HeaderValueOption 1
_HEADER_VALUE: Final = b"\x12"  # HeaderValue 2
_KEY: Final = b"\x0a"  # HeaderValue 1, and the key of a map's entry
_MAP_ENTRY: Final = b"\x0a"  # google.protobuf.Struct 1
_VALUE: Final = b"\x12"  # the value of a map's entry
_STRING_VALUE: Final = b"\x1a"  # google.protobuf.Value 3
_LIST_VALUE: Final = b"\x32"  # google.protobuf.Value 6
_LIST_ITEM: Final = b"\x0a"  # google.protobuf.ListValue 1
_NUMBER_VALUE: Final = b"\x11"  # google.protobuf.Value 2: eight bytes, without a length (number << 3 | 1)
_STATUS_CODE: Final = b"\x08"  # HttpStatus 1: a number (number << 3)
# Small fields as a whole.
_OVERWRITE: Final = b"\x18\x02"  # HeaderValueOption 3: OVERWRITE_IF_EXISTS_OR_ADD
_STATUS_OK: Final = b"\x0a\x00"  # CheckResponse 1, an empty Status: code 0
_STATUS_DENIED: Final = b"\x0a\x02\x08\x07"  # google.rpc.Code.PERMISSION_DENIED; any code but 0 makes Envoy deny

_TRY_AGAIN_REASONS: Final = (
    Reason.TENANT_HELD,
    Reason.UNREADABLE_PIN,
    Reason.UNKNOWN_INSTANCE,
    Reason.NO_ACTIVE_INSTANCE,
)
"""The denials that say nothing against the client: the same request may pass in a moment."""
DEFAULT_DENIED_STATUS: Mapping[Reason, int] = MappingProxyType(
    dict.fromkeys(Reason, HTTPStatus.FORBIDDEN) | dict.fromkeys(_TRY_AGAIN_REASONS, HTTPStatus.SERVICE_UNAVAILABLE)
)
"""The HTTP status that a client gets for each reason."""

_UNKNOWN_TO_ENVOY: Final = (418, 425, 451)
"""Statuses of errors that HTTP has and the enumeration envoy.type.v3.StatusCode does not."""
_HEADER_NAME: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,4}", re.ASCII)
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """The operator's settings that an answer depends on.

    Raises:
        ValueError: naming the setting's offending text and how to mend it.
    """

    routing_header: str = "x-tenant-instance"
    """The request header that names the instance, in lower case."""
    tenant_header: str = "x-tenant-id"
    """The request header that names the tenant, in lower case."""
    denied_status: Mapping[Reason, int] = field(default_factory=dict)
    """HTTP statuses by reason that replace those of DEFAULT_DENIED_STATUS."""
    retry_after_seconds: int = 1
    """What Retry-After says in answers with status 503."""
    show_reason: bool = False
    """Whether the body of a denial tells the client why. It tells an attacker, too."""

    def __post_init__(self) -> None:
        problems = [
            f"{name!r} is not a header to route by: use letters a-z, digits and at most four single hyphens"
            for name in (self.routing_header, self.tenant_header)
            if not _HEADER_NAME.fullmatch(name) or name == "host"
        ]
        if self.routing_header == self.tenant_header:
            problems.append(f"{self.routing_header!r} cannot be both the routing header and the tenant header")
        problems += [
            f"{status!r} is not a status for {reason}: use an error that Envoy knows, such as 403, 404 or 503"
            for reason, status in self.denied_status.items()
            if not _is_denied_status(status)
        ]
        if self.retry_after_seconds < 0:
            problems.append(f"{self.retry_after_seconds} is not a time to retry after: use 0 or more seconds")
        if problems:
            raise ValueError("; ".join(problems))

    def status_of(self, reason: Reason) -> HTTPStatus:
        """Return the HTTP status that a client gets when denied for this reason."""
        return HTTPStatus(self.denied_status.get(reason, DEFAULT_DENIED_STATUS[reason]))


class ResponseWriter:
    """Writes answers to checks.

    Nearly every answer is made of the same few pieces, so these are encoded once, beforehand, and an answer is put
    together from them and from the few texts of its own. The encoding is that of protocol buffers: a field is its tag,
    the length of its value, and the value.
    """

    def __init__(self, options: ResponseOptions) -> None:
        self._options = options
        self._routing_name, self._tenant_name = _text(_KEY, options.routing_header), _text(_KEY, options.tenant_header)
        self._denied = {reason: _Denial.build(reason, options) for reason in Reason}
        # Instances are few, since no client can name one, and so are the lengths of tenants' names.
        self._form = lru_cache(maxsize=4096)(self._write_form)
        self._first_facts = lru_cache(maxsize=len(Reason))(_first_facts)

    def write(self, decision: Decision, *, request_id: str, revision: int) -> bytes:
        """Return the CheckResponse for a decision.

        Args:
            decision: what was decided.
            request_id: the value of x-request-id, whoever wrote it: shown to the client only if it looks like an id.
            revision: of the snapshot that the decision was made from; 0 when it needed none.
        """
        if not isinstance(decision, Allowed):
            return self._write_denial(decision, request_id, revision)
        reason, address, tenant, instance, affinity, _, shadow_denials = decision
        name = b"" if tenant is None else tenant.encode()
        before_name, after_name, routing_facts, routing_bytes = self._form(
            instance, affinity, None if tenant is None else len(name)
        )
        first_facts = self._first_facts(revision, reason, True)
        client_fact = _client_fact(address)
        last_facts = b"" if reason is _ALLOWED and not shadow_denials else _facts_of_scopes(decision)
        about = _length(len(first_facts) + len(client_fact) + routing_bytes + len(last_facts))
        # Joined at once: each of these pieces put to the others by itself would copy them all again.
        return b"".join(
            (before_name, name, after_name, about, first_facts, client_fact, routing_facts, name, last_facts)
        )

    def _write_denial(self, decision: Denied, request_id: str, revision: int) -> bytes:
        facts = [self._first_facts(revision, decision.reason, False)]
        if decision.client_address is not None:
            facts.append(_client_fact(decision.client_address))
        if decision.tenant is not None:
            facts.append(_after_head(_TENANT_HEADS, decision.tenant))
        facts.append(_facts_of_scopes(decision))
        denied = self._denied[decision.reason].of(request_id)
        return _STATUS_DENIED + _field(_DENIED_RESPONSE, denied) + _field(_DYNAMIC_METADATA, b"".join(facts))

    def _write_form(self, instance: str | None, affinity: Affinity, name_bytes: int | None) -> "_Form":
        """Write an allowing answer for a tenant whose name has so many bytes; None: no tenant is named."""
        headers = _removals(self._options, routed=instance is not None, named=name_bytes is not None)
        facts = b""
        if instance is not None:
            headers += _overwrite(self._routing_name, instance)
            facts = _fact("instance", instance) + _fact("affinity", affinity)
        if name_bytes is None:
            return _Form(_STATUS_OK + _field(_OK_RESPONSE, headers), _DYNAMIC_METADATA, facts, len(facts))
        headers += _overwrite(self._tenant_name, "x" * name_bytes)
        ok = _STATUS_OK + _field(_OK_RESPONSE, headers)
        facts += _TENANT_HEADS[name_bytes]
        return _Form(
            ok[: -len(_OVERWRITE) - name_bytes], _OVERWRITE + _DYNAMIC_METADATA, facts, len(facts) + name_bytes
        )


class _Form(NamedTuple):
    """An allowing answer, but for what differs between two requests to one instance."""

    before_name: bytes
    """Up to the tenant's name in its header."""
    after_name: bytes
    """From there to the length of the dynamic metadata."""
    routing_facts: bytes
    """Of the dynamic metadata, where the request goes, up to the tenant's name."""
    routing_bytes: int
    """How long that is, with the name."""


@dataclass(frozen=True, slots=True)
class _Denial:
    """What a client gets for one reason: a problem document (RFC 9457) that no cache keeps."""

    anonymous: bytes
    """The DeniedHttpResponse without a request id."""
    head: bytes
    """The DeniedHttpResponse up to its body."""
    body: tuple[bytes, bytes]
    """The body before and after the request id."""

    @classmethod
    def build(cls, reason: Reason, options: ResponseOptions) -> Self:
        status = options.status_of(reason)
        headers = [("content-type", "application/problem+json"), ("cache-control", "no-store")]
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append(("retry-after", str(options.retry_after_seconds)))
        head = _field(_HTTP_STATUS, _STATUS_CODE + _varint(status))
        head += b"".join(_overwrite(_text(_KEY, name), value) for name, value in headers)
        problem: dict[str, str | int] = {"type": "about:blank", "title": status.phrase, "status": status.value}
        if options.show_reason:
            problem["reason"] = reason
        body = json.dumps(problem).encode()
        return cls(head + _field(_BODY, body), head, (body[:-1] + b', "request_id": "', b'"}'))

    def of(self, request_id: str) -> bytes:
        """Return the DeniedHttpResponse. Nothing that matches the pattern needs escaping in JSON."""
        if not _REQUEST_ID.fullmatch(request_id):
            return self.anonymous
        return self.head + _field(_BODY, self.body[0] + request_id.encode() + self.body[1])


def underscore_spellings(name: str) -> tuple[str, ...]:
    """Return the header names that CGI, WSGI and their like cannot tell from this one.

    They turn hyphens into underscores (RFC 3875, section 4.1.18), so a client's `x_tenant-instance` and our
    `x-tenant-instance` are one variable to them, and which value it holds is a matter of luck.
    """
    first, *rest = name.split("-")
    return tuple(
        first + "".join(sign + word for sign, word in zip(signs, rest, strict=True))
        for signs in product("-_", repeat=len(rest))
        if "_" in signs
    )


def _is_denied_status(status: int) -> bool:
    return 400 <= status <= 511 and status in list(HTTPStatus) and status not in _UNKNOWN_TO_ENVOY


def _removals(options: ResponseOptions, *, routed: bool, named: bool) -> bytes:
    """Return the fields that remove our headers, but for those which the answer sets."""
    names = [
        *(() if routed else (options.routing_header,)),
        *(() if named else (options.tenant_header,)),
        *underscore_spellings(options.routing_header),
        *underscore_spellings(options.tenant_header),
    ]
    return b"".join(_text(_HEADERS_TO_REMOVE, name) for name in names)


def _overwrite(name: bytes, value: str) -> bytes:
    """Return a header that replaces any of the same name, which is given as an encoded key.

    The action is said explicitly: unset, it would keep the client's value beside ours, and the older field `append`
    means different things to different versions of Envoy.
    """
    return _field(_HEADERS, _field(_HEADER, name + _text(_HEADER_VALUE, value)) + _OVERWRITE)


def _first_facts(revision: int, reason: Reason, allowed: bool) -> bytes:
    """Return the facts that are the same for very many answers."""
    revision_fact = _fact_of("revision", _NUMBER_VALUE + struct.pack("<d", revision))
    return revision_fact + _fact("reason", reason) + _fact("outcome", "ok" if allowed else "denied")


def _facts_of_scopes(decision: Decision) -> bytes:
    """Return which scope and entry decided, and what scopes in shadow would have decided."""
    deciding = None if decision.reason is _ALLOWED else decision.deciding
    facts = _facts_of_scope(deciding.scope, deciding.match) if deciding else b""
    if shadow := decision.shadow_denials:
        said = (_text(_STRING_VALUE, f"{outcome.scope}:{outcome.reason}") for outcome in shadow)
        facts += _fact_of("shadow", _field(_LIST_VALUE, b"".join(_field(_LIST_ITEM, value) for value in said)))
    return facts


@lru_cache(maxsize=1024)
def _facts_of_scope(scope: str, match: ListMatch | None) -> bytes:
    """Return which scope and entry decided; an attack comes from the same networks again and again."""
    facts = _fact("scope", scope)
    if match:
        facts += _fact("list", match.list_name) + _fact("entry", str(match.network))
    return facts


def _client_fact(address: Address) -> bytes:
    version, value = address
    return _after_head(_CLIENT_ADDRESS_HEADS, address_text(version, value))


def _fact(name: str, value: str) -> bytes:
    return _fact_of(name, _text(_STRING_VALUE, value))


def _fact_of(name: str, value: bytes) -> bytes:
    """Return an entry of a google.protobuf.Struct, given the field of google.protobuf.Value that holds its value."""
    return _field(_MAP_ENTRY, _KEYS[name] + _field(_VALUE, value))


def _heads(name: str, longest: int) -> tuple[bytes, ...]:
    """Return what stands before a text in the fact of this name, by the text's length in bytes."""
    return tuple(_fact(name, "x" * size)[: -size or None] for size in range(longest + 1))


def _after_head(heads: tuple[bytes, ...], text: str) -> bytes:
    """Return a fact, given what `_heads` returned for its name."""
    value = text.encode()
    return heads[len(value)] + value


def _text(tag: bytes, value: str) -> bytes:
    return _field(tag, value.encode())


def _field(tag: bytes, value: bytes) -> bytes:
    return tag + _length(len(value)) + value


def _length(size: int) -> bytes:
    return _LENGTHS[size] if size < _USUAL_LENGTHS else _varint(size)


def _varint(number: int) -> bytes:
    """Return a number as protocol buffers write it: seven bits a byte, lowest first, all but the last marked."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


_USUAL_LENGTHS: Final = 1024
_LENGTHS: Final = tuple(_varint(size) for size in range(_USUAL_LENGTHS))
_KEYS: Final = {
    name: _text(_KEY, name)
    for name in (
        *("revision", "reason", "outcome", "client_address", "tenant", "instance", "affinity"),
        *("scope", "list", "entry", "shadow"),
    )
}
_MAX_ADDRESS_LENGTH: Final = 39  # eight groups of IPv6
_CLIENT_ADDRESS_HEADS: Final = _heads("client_address", _MAX_ADDRESS_LENGTH)
_TENANT_HEADS: Final = _heads("tenant", MAX_IDENTIFIER_LENGTH)
_ALLOWED: Final = Reason.ALLOWED
