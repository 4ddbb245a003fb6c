"""`explain` describes a request as Envoy would, and decides as the server does."""

import pytest

from authz_server.explanation import CannotDescribeError, describe_request, explain
from authz_server.policy.access import Entry, Mode, Resource, Scope
from authz_server.policy.addresses import parse_network
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Allowed, decide
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.reasons import Reason
from authz_server.policy.records import RecordKey, RecordKind, Unreadable, entry_key, record_key
from authz_server.policy.snapshot import DecisionOptions, build_snapshot
from authz_server.policy.tenant import parse_tenant_source

NOW = 1_800_000_000.0


def describe(address: str = "203.0.113.7", **fields: object) -> RequestAttributes:
    given = {"method": "GET", "host": "", "path": "/", "headers": (), "tenant": None, "options": DecisionOptions()}
    return describe_request(address, **(given | fields))  # type: ignore[arg-type]


def options(*sources: str) -> DecisionOptions:
    return DecisionOptions(tenant_sources=tuple(map(parse_tenant_source, sources)))


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("header:x-tenant-id", "/"),
        ("query:tenant[id]", "/"),
        ("query:tenant", "/a?b=c"),
        ("host:{tenant}.example.com", "/"),
        ("path:/t/{tenant}/", "/"),
    ],
)
def test_a_tenant_is_named_where_the_server_finds_it(source: str, path: str) -> None:
    settings = options(source, "header:x-other")
    attributes = describe(tenant="acme", path=path, options=settings)
    decision = decide(attributes, build_snapshot([], epoch="e", revision=1, options=settings), NOW)
    assert decision.tenant == "acme"


@pytest.mark.parametrize(
    ("source", "fields", "named"),
    [
        ("header:x-tenant-id", {"headers": [("x-tenant-id", "b")]}, "header x-tenant-id"),
        ("host:{tenant}.example.com", {"host": "b.example.com"}, "host"),
        ("path:/t/{tenant}/", {"path": "/docs"}, "path"),
    ],
)
def test_a_tenant_is_not_named_over_what_was_given(source: str, fields: dict[str, object], named: str) -> None:
    with pytest.raises(CannotDescribeError, match=f"tenant and {named}"):
        describe(tenant="acme", options=options(source), **fields)


def test_a_tenant_that_no_server_would_see_is_refused() -> None:
    with pytest.raises(CannotDescribeError, match="AUTHZ_TENANT_FROM"):
        describe(tenant="acme")


def test_repeated_headers_are_joined_as_envoy_joins_them() -> None:
    attributes = describe(headers=[("x-tenant-id", "a"), ("x-tenant-id", "b")], options=options("header:x-tenant-id"))
    assert attributes.headers == {"x-tenant-id": "a,b"}


def test_the_request_comes_through_a_trusted_peer() -> None:
    settings = DecisionOptions(trusted_peers=(parse_network("10.0.0.0/8"),))
    attributes = describe(options=settings)
    decision = decide(attributes, build_snapshot([], epoch="e", revision=1, options=settings), NOW)
    assert isinstance(decision, Allowed)


def test_the_explanation_is_the_servers_decision_and_says_what_is_uncertain() -> None:
    entry = Entry(parse_network("203.0.113.0/24"), "scanner", "alice", 1)
    docs = Resource("docs", (parse_path_pattern("/docs"),), ("docs.example.com",))
    snapshot = build_snapshot(
        [
            (entry_key("global/block", entry), entry),
            (record_key(docs), docs),
            (RecordKey(RecordKind.ENTRY, "bad", "global/block"), Unreadable("not a network: 'bad'")),
        ],
        epoch="e",
        revision=7,
        options=DecisionOptions(),
    )
    explanation = explain(describe(), snapshot, NOW)
    assert explanation.decision == decide(describe(), snapshot, NOW)
    assert explanation.decision.reason is Reason.BLOCKED
    unreadable, degraded, hosts = explanation.notes
    assert "1 records cannot be read" in unreadable
    assert "global" in degraded
    assert "docs" in hosts
    assert explain(describe(host="docs.example.com"), snapshot, NOW).notes == (unreadable, degraded)


def test_the_tenants_scope_is_told_also_where_it_has_neither_a_record_nor_lists() -> None:
    settings = options("header:x-tenant-id")
    resource = Resource("docs", (parse_path_pattern("/docs"),))
    records: list[Scope | Resource] = [Scope("tenant:strict", Mode.RESTRICTED), resource]
    snapshot = build_snapshot(
        [(record_key(record), record) for record in records], epoch="e", revision=1, options=settings
    )

    def told(tenant: str | None, address: str = "203.0.113.7") -> list[tuple[str, str]]:
        attributes = describe(address, tenant=tenant, path="/docs", options=settings)
        return [(outcome.scope, outcome.reason) for outcome in explain(attributes, snapshot, NOW).scopes]

    assert told("acme") == [("global", "allowed"), ("tenant:acme", "allowed"), ("resource:docs", "allowed")]
    assert told("strict") == [("global", "allowed"), ("tenant:strict", "not_allowlisted"), ("resource:docs", "allowed")]
    assert told(None) == [("global", "allowed"), ("resource:docs", "allowed")]
    assert told("acme", address="nobody") == []
