"""Whatever we write, Envoy's own messages read the same."""

import json
import re
from http import HTTPStatus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.envoy_api import auth, core, envoy_type

from authz_server.ext_authz.check_response import (
    DEFAULT_DENIED_STATUS,
    ResponseOptions,
    ResponseWriter,
    underscore_spellings,
)
from authz_server.policy.access import Enforcement, ListMatch, ScopeOutcome
from authz_server.policy.addresses import Address, Network, parse_address, parse_network
from authz_server.policy.affinity import Affinity
from authz_server.policy.decision import Allowed, Decision, Denied
from authz_server.policy.reasons import Reason

CLIENT = parse_address("203.0.113.7")
OVERWRITE = core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
ENVOY_ERRORS = {int(code) for code in envoy_type.StatusCode if code >= 400}

identifiers = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
header_names = st.from_regex(r"[a-z0-9]{1,6}(-[a-z0-9]{1,6}){0,4}", fullmatch=True).filter(lambda name: name != "host")
addresses = st.ip_addresses(v=4).map(lambda ip: Address(4, int(ip))) | st.ip_addresses(v=6).map(
    lambda ip: parse_address(str(ip))
)
networks = addresses.map(lambda address: Network(address.version, address.value, 32 if address.version == 4 else 128))
matches = st.builds(
    ListMatch,
    identifiers | st.sampled_from(["global/block", "tenant:acme/allow"]),
    networks,
)
scope_reasons = st.sampled_from([Reason.ALLOWED, Reason.ALLOWLISTED, Reason.BLOCKED, Reason.NOT_ALLOWLISTED])
scopes = st.lists(
    st.builds(
        ScopeOutcome,
        st.sampled_from(["global"]) | identifiers.map("tenant:{}".format) | identifiers.map("resource:{}".format),
        st.sampled_from(Enforcement),
        scope_reasons,
        st.none() | matches,
    ),
    max_size=4,
).map(tuple)


def with_shadow_denials(decision: Decision) -> Decision:
    """As `decide` makes them."""
    shadow = [outcome for outcome in decision.scopes if outcome.enforcement is Enforcement.SHADOW and outcome.denies]
    return decision._replace(shadow_denials=tuple(shadow))


allowed_reasons = (Reason.ALLOWED, Reason.ALLOWLISTED)
allowed = st.builds(
    Allowed,
    st.sampled_from(allowed_reasons),
    addresses,
    st.none() | identifiers,
    st.none() | identifiers,
    st.sampled_from(Affinity),
    scopes,
).map(with_shadow_denials)
denied = st.builds(
    Denied,
    st.sampled_from([reason for reason in Reason if reason not in allowed_reasons]),
    st.none() | addresses,
    st.none() | identifiers,
    scopes,
).map(with_shadow_denials)
options = st.builds(
    ResponseOptions,
    routing_header=header_names,
    tenant_header=header_names.map(lambda name: name + "t"),
    denied_status=st.dictionaries(st.sampled_from(Reason), st.sampled_from(sorted(ENVOY_ERRORS)), max_size=3),
    retry_after_seconds=st.integers(0, 3600),
    show_reason=st.booleans(),
).filter(lambda made: made.routing_header != made.tenant_header)


def read(answer: bytes) -> auth.CheckResponse:
    """Read an answer as Envoy does, sure that nothing in it is unknown to Envoy."""
    check_response = auth.CheckResponse.parse(answer)
    assert not check_response._unknown_fields
    return check_response


def written(decision: Decision, *, request_id: str = "", **fields: object) -> auth.CheckResponse:
    return read(ResponseWriter(ResponseOptions(**fields)).write(decision, request_id=request_id, revision=7))


def set_headers(options: list[core.HeaderValueOption]) -> dict[str, str]:
    """Return the headers set; each must overwrite, once, and leave the deprecated `append` alone."""
    for option in options:
        assert option.append_action is OVERWRITE
        assert option.append is None
    headers = {option.header.key: option.header.value for option in options}
    assert len(headers) == len(options)
    return headers


def metadata(check_response: auth.CheckResponse) -> dict[str, object]:
    return check_response.dynamic_metadata.to_dict()


@settings(max_examples=100, deadline=None)
@given(allowed, options, st.integers(0, 2**53))
def test_envoy_reads_an_allowed_answer_as_it_was_meant(decision: Allowed, made: ResponseOptions, revision: int) -> None:
    check_response = read(ResponseWriter(made).write(decision, request_id="id", revision=revision))
    assert check_response.status.code == 0
    assert check_response.denied_response is None
    assert check_response.error_response is None
    ok = check_response.ok_response
    ours = {made.routing_header: decision.instance, made.tenant_header: decision.tenant}
    assert set_headers(ok.headers) == {name: value for name, value in ours.items() if value is not None}
    removed = ok.headers_to_remove
    assert len(removed) == len(set(removed))
    assert {name for name in removed if "_" not in name} == {name for name, value in ours.items() if value is None}
    assert {name for name in removed if "_" in name} == {
        spelling for name in ours for spelling in underscore_spellings(name)
    }
    facts = metadata(check_response)
    assert facts["outcome"] == "ok"
    assert facts["revision"] == revision
    assert facts.get("instance") == decision.instance
    check_facts(facts, decision)


@settings(max_examples=100, deadline=None)
@given(denied, options, st.text(st.characters(exclude_categories=["Cs"]), max_size=150) | st.uuids().map(str))
def test_envoy_reads_a_denied_answer_as_it_was_meant(decision: Denied, made: ResponseOptions, request_id: str) -> None:
    check_response = read(ResponseWriter(made).write(decision, request_id=request_id, revision=9))
    assert check_response.status.code == 7
    assert check_response.ok_response is None
    response = check_response.denied_response
    status = made.denied_status.get(decision.reason, DEFAULT_DENIED_STATUS[decision.reason])
    assert int(response.status.code) == status
    expected_headers = {"content-type": "application/problem+json", "cache-control": "no-store"}
    if status == 503:
        expected_headers["retry-after"] = str(made.retry_after_seconds)
    assert set_headers(response.headers) == expected_headers
    expected_body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    if re.fullmatch("[A-Za-z0-9._-]{1,128}", request_id):
        expected_body["request_id"] = request_id
    if made.show_reason:
        expected_body["reason"] = decision.reason
    assert json.loads(response.body) == expected_body
    assert len(response.body) < 400
    facts = metadata(check_response)
    assert facts["outcome"] == "denied"
    assert "instance" not in facts
    check_facts(facts, decision)


def check_facts(facts: dict[str, object], decision: Decision) -> None:
    """Compare what both kinds of decision tell the access log."""
    assert facts["reason"] == decision.reason
    assert facts.get("client_address") == (None if decision.client_address is None else str(decision.client_address))
    assert facts.get("tenant") == decision.tenant
    deciding = decision.deciding
    match = deciding.match if deciding else None
    assert facts.get("scope") == (deciding.scope if deciding else None)
    assert facts.get("list") == (match.list_name if match else None)
    assert facts.get("entry") == (str(match.network) if match else None)
    assert facts.get("shadow", []) == [
        f"{outcome.scope}:{outcome.reason}"
        for outcome in decision.scopes
        if outcome.enforcement is Enforcement.SHADOW and outcome.reason in (Reason.BLOCKED, Reason.NOT_ALLOWLISTED)
    ]


def test_one_allowed_answer_in_full() -> None:
    shadow = ScopeOutcome("global", Enforcement.SHADOW, Reason.BLOCKED, None)
    decision = Allowed(
        Reason.ALLOWLISTED,
        CLIENT,
        tenant="acme",
        instance="queue-3",
        affinity=Affinity.PINNED,
        scopes=(
            shadow,
            ScopeOutcome(
                "tenant:acme",
                Enforcement.ENFORCE,
                Reason.ALLOWLISTED,
                ListMatch("office", parse_network("203.0.113.0/24")),
            ),
        ),
        shadow_denials=(shadow,),
    )
    check_response = written(decision)
    assert set_headers(check_response.ok_response.headers) == {"x-tenant-instance": "queue-3", "x-tenant-id": "acme"}
    assert metadata(check_response) == {
        "outcome": "ok",
        "reason": "allowlisted",
        "client_address": "203.0.113.7",
        "tenant": "acme",
        "instance": "queue-3",
        "affinity": "pinned",
        "scope": "tenant:acme",
        "list": "office",
        "entry": "203.0.113.0/24",
        "shadow": ["global:blocked"],
        "revision": 7,
    }


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason not in allowed_reasons])
def test_denials_that_say_nothing_against_the_client_ask_to_come_back(reason: Reason) -> None:
    """503 with Retry-After for the state of tenant and instances, 403 without for all else."""
    response = written(Denied(reason)).denied_response
    ours = reason in (
        Reason.TENANT_HELD,
        Reason.UNREADABLE_PIN,
        Reason.UNKNOWN_INSTANCE,
        Reason.NO_ACTIVE_INSTANCE,
    )
    assert int(response.status.code) == (503 if ours else 403)
    assert set_headers(response.headers).get("retry-after") == ("1" if ours else None)


@pytest.mark.parametrize(
    ("request_id", "shown"),
    [
        ("5f2f8f0e-7d4c-4a53-9a3f-2a8a4a3f0d11", True),
        ("a" * 128, True),
        ("A.b_c-9", True),
        ("", False),
        ("a" * 129, False),
        ('"},{"', False),
        ("<script>", False),
        ("a b", False),
        ("a\n", False),
        ("é", False),
        ("٣", False),
        ("a,b", False),
    ],
)
def test_a_request_id_is_shown_only_when_it_looks_like_one(request_id: str, shown: bool) -> None:
    body = json.loads(written(Denied(Reason.BLOCKED), request_id=request_id).denied_response.body)
    assert body.get("request_id") == (request_id if shown else None)


def test_the_client_is_told_the_reason_only_when_a_setting_says_so() -> None:
    assert "blocked" not in written(Denied(Reason.BLOCKED)).denied_response.body
    body = json.loads(written(Denied(Reason.BLOCKED), show_reason=True).denied_response.body)
    assert body["reason"] == "blocked"


def test_every_spelling_that_a_cgi_variable_cannot_tell_from_ours() -> None:
    assert set(underscore_spellings("x-tenant-id")) == {"x_tenant-id", "x-tenant_id", "x_tenant_id"}
    assert underscore_spellings("tenant") == ()


def test_statuses_of_denials_are_errors_that_envoy_knows() -> None:
    for status in range(-1, 700):
        if status in ENVOY_ERRORS:
            assert ResponseOptions(denied_status={Reason.BLOCKED: status}).status_of(Reason.BLOCKED) == status
        else:
            with pytest.raises(ValueError, match=f"^{status} is not a status for blocked"):
                ResponseOptions(denied_status={Reason.BLOCKED: status})


@pytest.mark.parametrize(
    ("fields", "offending"),
    [
        ({"routing_header": ""}, "''"),
        ({"routing_header": "X-Instance"}, "X-Instance"),
        ({"routing_header": "x_instance"}, "x_instance"),
        ({"routing_header": ":path"}, ":path"),
        ({"routing_header": "host"}, "host"),
        ({"routing_header": "x-instance\n"}, "x-instance"),
        ({"routing_header": "a-b-c-d-e-f"}, "a-b-c-d-e-f"),
        ({"tenant_header": "x--tenant"}, "x--tenant"),
        ({"tenant_header": "x-tenant "}, "x-tenant "),
        ({"routing_header": "x-one", "tenant_header": "x-one"}, "x-one"),
        ({"retry_after_seconds": -1}, "-1"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(fields: dict[str, object], offending: str) -> None:
    with pytest.raises(ValueError, match=re.escape(offending)):
        ResponseOptions(**fields)


def test_all_problems_of_options_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"X-A.*x_b.*200.*-5"):
        ResponseOptions("X-A", "x_b", {Reason.BLOCKED: 200}, -5)
