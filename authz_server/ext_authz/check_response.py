"""A decision to Envoy's CheckResponse.

Every header of ours is either set, overwriting what the client sent, or removed, in every answer that lets a request
through. Never both: Envoy sets first and removes afterwards, so such a header would be lost.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from itertools import product
from types import MappingProxyType

from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.policy.access import Enforcement
from authz_server.policy.decision import Allowed, Decision, Denied
from authz_server.policy.reasons import Reason

_PERMISSION_DENIED = 7
"""google.rpc.Code.PERMISSION_DENIED; any code but 0 makes Envoy deny."""

_TRY_AGAIN_REASONS = (Reason.TENANT_HELD, Reason.UNREADABLE_PIN, Reason.UNKNOWN_INSTANCE, Reason.NO_ACTIVE_INSTANCE)
"""The denials that say nothing against the client: the same request may pass in a moment."""
DEFAULT_DENIED_STATUS: Mapping[Reason, int] = MappingProxyType(
    dict.fromkeys(Reason, HTTPStatus.FORBIDDEN) | dict.fromkeys(_TRY_AGAIN_REASONS, HTTPStatus.SERVICE_UNAVAILABLE)
)
"""The HTTP status that a client gets for each reason."""

_UNKNOWN_TO_ENVOY = (418, 425, 451)
"""Statuses of errors that HTTP has and the enumeration envoy.type.v3.StatusCode does not."""
_HEADER_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,4}", re.ASCII)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)


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


def write_check_response(decision: Decision, *, request_id: str, revision: int, options: ResponseOptions) -> bytes:
    """Write the answer to one check.

    Args:
        decision: what was decided.
        request_id: the value of x-request-id, whoever wrote it: shown to the client only if it looks like an id.
        revision: of the snapshot that the decision was made from; 0 when it needed none.
        options: the operator's settings.
    """
    check_response = ext_authz_pb2.CheckResponse()
    match decision:
        case Allowed():
            check_response.status.SetInParent()  # code 0: OK
            _write_allowed(check_response.ok_response, decision, options)
        case Denied():
            check_response.status.code = _PERMISSION_DENIED
            _write_denied(check_response.denied_response, decision.reason, request_id, options)
    _write_metadata(check_response, decision, revision)
    answer: bytes = check_response.SerializeToString()
    return answer


@cache
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


def _write_allowed(ok: ext_authz_pb2.OkHttpResponse, decision: Allowed, options: ResponseOptions) -> None:
    for name, value in ((options.routing_header, decision.instance), (options.tenant_header, decision.tenant)):
        if value is None:
            ok.headers_to_remove.append(name)
        else:
            _overwrite(ok, name, value)
        ok.headers_to_remove.extend(underscore_spellings(name))


def _write_denied(
    denied: ext_authz_pb2.DeniedHttpResponse, reason: Reason, request_id: str, options: ResponseOptions
) -> None:
    """Write what the client gets: a problem document (RFC 9457) that no cache keeps."""
    status = options.status_of(reason)
    problem: dict[str, str | int] = {"type": "about:blank", "title": status.phrase, "status": status.value}
    if _REQUEST_ID.fullmatch(request_id):
        problem["request_id"] = request_id
    if options.show_reason:
        problem["reason"] = reason
    denied.status.code = status
    denied.body = json.dumps(problem)
    _overwrite(denied, "content-type", "application/problem+json")
    _overwrite(denied, "cache-control", "no-store")
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        _overwrite(denied, "retry-after", str(options.retry_after_seconds))


def _overwrite(answer: ext_authz_pb2.OkHttpResponse | ext_authz_pb2.DeniedHttpResponse, name: str, value: str) -> None:
    """Add a header that replaces any of the same name.

    The action is said explicitly: unset, it would keep the client's value beside ours, and the older field `append`
    means different things to different versions of Envoy.
    """
    option = answer.headers.add(append_action=ext_authz_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD)
    option.header.key = name
    option.header.value = value


def _write_metadata(check_response: ext_authz_pb2.CheckResponse, decision: Decision, revision: int) -> None:
    """Write what access logs get to know, whatever the client does; facts that a decision lacks are left out."""
    facts = {"outcome": "ok" if isinstance(decision, Allowed) else "denied", "reason": str(decision.reason)}
    if decision.client_address is not None:
        facts["client_address"] = str(decision.client_address)
    if decision.tenant is not None:
        facts["tenant"] = decision.tenant
    if isinstance(decision, Allowed) and decision.instance is not None:
        facts["instance"] = decision.instance
        facts["affinity"] = decision.affinity
    if deciding := decision.deciding:
        facts["scope"] = deciding.scope
        if deciding.match:
            facts["list"] = deciding.match.list_name
            facts["entry"] = str(deciding.match.entry.network)
    fields = check_response.dynamic_metadata.fields
    for name, value in facts.items():
        fields[name].string_value = value
    fields["revision"].number_value = revision
    for outcome in decision.scopes:
        if outcome.denies and outcome.enforcement is Enforcement.SHADOW:
            fields["shadow"].list_value.values.add(string_value=f"{outcome.scope}:{outcome.reason}")
