"""The decision as a table, one request after the other, and what no text can do to it."""

from collections.abc import Callable
from posixpath import normpath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from authz_server.policy import paths
from authz_server.policy.access import Enforcement, Entry, Mode, NamedList, Resource, Scope, judge
from authz_server.policy.addresses import parse_address, parse_network
from authz_server.policy.affinity import Instance, InstanceState, Tenant
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Allowed, Decision, Denied, decide
from authz_server.policy.paths import parse_path_pattern, read_path
from authz_server.policy.reasons import Reason
from authz_server.policy.records import Record, RecordKey, Unreadable, entry_key, record_key
from authz_server.policy.snapshot import (
    DecisionOptions,
    MissingClientAddress,
    MissingTenant,
    Snapshot,
    UnknownTenant,
    build_snapshot,
)
from authz_server.policy.tenant import parse_tenant_source

NOW = 1000.0
OFFICE, GUEST, BAD, CARVED = "203.0.113.7", "198.51.100.1", "192.0.2.1", "192.0.2.128"
SOURCES = ("header:x-tenant-id", "query:tenant_id", "host:{tenant}.example.com", "path:/t/{tenant}/")


def keyed(*records: NamedList | Scope | Resource | Tenant | Instance) -> list[tuple[RecordKey, Record | Unreadable]]:
    return [(record_key(record), record) for record in records]


def listed(list_name: str, *cidrs: str) -> list[tuple[RecordKey, Record | Unreadable]]:
    entries = [Entry(parse_network(cidr), "because", "ana", 1) for cidr in cidrs]
    return [(entry_key(list_name, entry), entry) for entry in entries]


RECORDS = [
    *keyed(
        NamedList("office"),
        Scope("global"),
        Scope("tenant:acme", Mode.RESTRICTED, allow_lists=("office",)),
        Scope("tenant:watched", Mode.RESTRICTED, Enforcement.SHADOW),
        Scope("resource:docs", Mode.RESTRICTED, allow_lists=("office",)),
        Resource("docs", (parse_path_pattern("/docs"),)),
        Resource("open", (parse_path_pattern("/open"),)),
        Tenant("acme", "queue-1"),
        Tenant("watched", "queue-2"),
        Tenant("moving", "queue-1", held=True),
        Tenant("lost", "queue-9"),
        Instance("queue-1"),
        Instance("queue-2", state=InstanceState.DOWN),
    ),
    *listed("office", "203.0.113.0/24"),
    *listed("global/block", "192.0.2.0/24"),
    *listed("global/allow", "192.0.2.128/25", "198.51.100.2"),
    *listed("tenant:watched/block", "203.0.113.7"),
    *listed("tenant:lost/block", "192.0.0.0/24"),
    *listed("tenant:stranger/block", "192.0.0.0/24"),
    *listed("tenant:stranger/allow", "192.0.0.2"),
    (RecordKey(record_key(Tenant("spoilt", None)).kind, "spoilt"), Unreadable("not JSON")),
]


def snapshot(
    *more: tuple[RecordKey, Record | Unreadable | None],
    trusted_peers: tuple[str, ...] = (),
    missing_client_address: MissingClientAddress = MissingClientAddress.DENY,
    unknown_tenant: UnknownTenant = UnknownTenant.NONE,
    missing_tenant: MissingTenant = MissingTenant.ALLOW,
    fold_path_case: bool = True,
) -> Snapshot:
    options = DecisionOptions(
        trusted_peers=tuple(parse_network(text) for text in trusted_peers),
        missing_client_address=missing_client_address,
        tenant_sources=tuple(parse_tenant_source(text) for text in SOURCES),
        unknown_tenant=unknown_tenant,
        missing_tenant=missing_tenant,
        fold_path_case=fold_path_case,
    )
    return build_snapshot(RECORDS, epoch="e", revision=1, options=options).with_changes(2, more)


def ask(
    policy: Snapshot,
    path: str = "/",
    *,
    client: str | None = GUEST,
    peer: str | None = "10.0.0.1",
    tenant: str | None = None,
    host: str = "example.com",
    method: str = "GET",
) -> Decision:
    headers = {} if tenant is None else {"x-tenant-id": tenant}
    return decide(RequestAttributes(method, host, path, peer, client, headers), policy, NOW)


ACCESS = {
    "anybody": ({}, "allowed"),
    "blocked": ({"client": BAD}, "blocked"),
    "blocked-in-ipv6-clothes": ({"client": f"::ffff:{BAD}"}, "blocked"),
    "carved-out": ({"client": CARVED}, "allowlisted"),
    "docs-from-the-office": ({"path": "/docs", "client": OFFICE}, "allowlisted"),
    "docs-from-elsewhere": ({"path": "/docs"}, "not_allowlisted"),
    "docs-by-another-spelling": ({"path": "//DOCS;x=1/"}, "not_allowlisted"),
    "global-allow-opens-no-docs": ({"path": "/docs", "client": "198.51.100.2"}, "not_allowlisted"),
    "blocked-goes-before-not-allowlisted": ({"path": "/docs", "client": BAD}, "blocked"),
    "resource-without-a-scope-record": ({"path": "/open"}, "allowed"),
    "restricted-tenant-from-the-office": ({"tenant": "acme", "client": OFFICE}, "allowlisted"),
    "restricted-tenant-from-elsewhere": ({"tenant": "acme"}, "not_allowlisted"),
    "block-of-a-tenant-without-a-scope-record": ({"tenant": "lost", "client": "192.0.0.1"}, "blocked"),
    "block-of-an-unregistered-tenant": ({"tenant": "stranger", "client": "192.0.0.1"}, "blocked"),
    "allow-of-a-tenant-without-a-scope-record": ({"tenant": "stranger", "client": "192.0.0.2"}, "allowlisted"),
    "shadow-block": ({"tenant": "watched", "client": OFFICE}, "allowed"),
    "shadow-restricted": ({"tenant": "watched"}, "allowed"),
    "shadow-does-not-hide-others": ({"tenant": "watched", "path": "/docs"}, "not_allowlisted"),
    "access-before-the-pin": ({"tenant": "moving", "client": BAD}, "blocked"),
}


@pytest.mark.parametrize(("question", "reason"), ACCESS.values(), ids=ACCESS)
def test_access(question: dict[str, str], reason: str) -> None:
    assert ask(snapshot(), **question).reason == reason


@pytest.mark.parametrize(
    "lists",
    [
        {"tenant:plain/allow": ["10.0.0.0/8"]},
        {"tenant:plain/block": ["10.0.0.0/8"]},
        {"tenant:plain/allow": ["10.1.2.0/24"], "tenant:plain/block": ["10.0.0.0/8"]},
        {"tenant:plain/block": ["11.0.0.0/8"]},
    ],
)
def test_a_tenant_s_scope_without_a_record_is_judged_as_one_of_defaults(lists: dict[str, list[str]]) -> None:
    policy = snapshot(*(entry for name, cidrs in lists.items() for entry in listed(name, *cidrs)))
    _, outcome = ask(policy, client="10.1.2.3", tenant="plain").scopes
    assert outcome == judge(Scope("tenant:plain"), policy.tables, parse_address("10.1.2.3"), NOW)


@pytest.mark.parametrize("lists", [{}, {"tenant:other/block": ["10.0.0.0/8"], "global/block": ["10.0.0.0/8"]}])
def test_a_tenant_s_scope_without_a_record_and_lists_has_nothing_to_say(lists: dict[str, list[str]]) -> None:
    policy = snapshot(*(entry for name, cidrs in lists.items() for entry in listed(name, *cidrs)))
    assert [outcome.scope for outcome in ask(policy, client="10.1.2.3", tenant="plain").scopes] == ["global"]


def test_every_scope_that_applies_is_told_and_one_of_them_decides() -> None:
    decision = ask(snapshot(), "/docs", client=OFFICE, tenant="watched")
    assert isinstance(decision, Allowed)
    assert [(outcome.scope, outcome.enforcement, outcome.reason) for outcome in decision.scopes] == [
        ("global", "enforce", "allowed"),
        ("tenant:watched", "shadow", "blocked"),
        ("resource:docs", "enforce", "allowlisted"),
    ]
    assert decision.deciding is decision.scopes[2]
    assert decision.deciding.match
    assert decision.deciding.match.list_name == "office"
    blocked = ask(snapshot(), "/docs", client=BAD)
    assert blocked.deciding is blocked.scopes[0]
    assert [outcome.denies for outcome in blocked.scopes] == [True, True]
    allowed = ask(snapshot(), "/open", tenant="stranger")
    assert [outcome.scope for outcome in allowed.scopes] == ["global", "tenant:stranger", "resource:open"]
    assert (allowed.reason, allowed.deciding) == ("allowed", None)
    assert ask(snapshot(), tenant="spoilt").deciding is None


CLIENT = {
    "header": ((), "deny", OFFICE, "10.0.0.1", OFFICE),
    "header-in-ipv6-clothes": ((), "deny", f"::ffff:{OFFICE}", "10.0.0.1", OFFICE),
    "absent-denied": ((), "deny", None, "10.0.0.1", "no_client_address"),
    "absent-peer": ((), "peer", None, "10.0.0.1", "10.0.0.1"),
    "absent-peer-mapped": ((), "peer", None, "::ffff:10.0.0.1", "10.0.0.1"),
    "absent-and-no-peer": ((), "peer", None, None, "no_client_address"),
    "absent-and-peer-no-address": ((), "peer", None, "socket", "invalid_client_address"),
    "empty-is-not-absent": ((), "peer", "", "10.0.0.1", "invalid_client_address"),
    "two-addresses": ((), "peer", f"{OFFICE},{GUEST}", "10.0.0.1", "invalid_client_address"),
    "port": ((), "peer", f"{OFFICE}:80", "10.0.0.1", "invalid_client_address"),
    "trusted-peer": (("10.0.0.0/8",), "deny", OFFICE, "10.255.255.255", OFFICE),
    "trusted-peer-mapped": (("10.0.0.0/8",), "deny", OFFICE, "::ffff:10.0.0.1", OFFICE),
    "second-trusted-network": (("10.0.0.0/8", "2001:db8::/32"), "deny", OFFICE, "2001:db8::1", OFFICE),
    "untrusted-peer-denied": (("10.0.0.0/8",), "deny", OFFICE, "11.0.0.0", "no_client_address"),
    "untrusted-peer-is-the-client": (("10.0.0.0/8",), "peer", OFFICE, "11.0.0.0", "11.0.0.0"),
    "no-peer-is-untrusted": (("0.0.0.0/0",), "peer", OFFICE, None, "no_client_address"),
    "peer-no-address-is-untrusted": (("0.0.0.0/0",), "deny", OFFICE, "socket", "no_client_address"),
}


@pytest.mark.parametrize(("trusted", "missing", "external", "peer", "expected"), CLIENT.values(), ids=CLIENT)
def test_client_address(
    trusted: tuple[str, ...], missing: str, external: str | None, peer: str | None, expected: str
) -> None:
    policy = snapshot(trusted_peers=trusted, missing_client_address=MissingClientAddress(missing))
    decision = ask(policy, client=external, peer=peer)
    assert str(decision.client_address or decision.reason) == expected
    assert isinstance(decision, Denied) is (decision.client_address is None)


PLACES = {
    "nobody": ({}, {}, ("allowed", None, None, "none")),
    "nobody-denied": ({"missing_tenant": MissingTenant.DENY}, {}, ("no_tenant", None, None, None)),
    "pinned": ({}, {"tenant": "acme", "client": OFFICE}, ("allowlisted", "acme", "queue-1", "pinned")),
    "pinned-to-one-that-is-down": ({}, {"tenant": "watched"}, ("allowed", "watched", "queue-2", "pinned")),
    "stranger": ({}, {"tenant": "stranger"}, ("allowed", "stranger", None, "none")),
    "stranger-denied": (
        {"unknown_tenant": UnknownTenant.DENY},
        {"tenant": "stranger"},
        ("unknown_tenant", "stranger", None, None),
    ),
    "stranger-hashed": (
        {"unknown_tenant": UnknownTenant.HASH},
        {"tenant": "stranger"},
        ("allowed", "stranger", "queue-1", "hashed"),
    ),
    "held": ({}, {"tenant": "moving"}, ("tenant_held", "moving", None, None)),
    "spoilt": ({}, {"tenant": "spoilt"}, ("unreadable_pin", "spoilt", None, None)),
    "pinned-to-nothing": ({}, {"tenant": "lost"}, ("unknown_instance", "lost", None, None)),
    "two": ({}, {"tenant": "acme,lost"}, ("ambiguous_tenant", None, None, None)),
    "nonsense": ({}, {"tenant": "ACME"}, ("invalid_tenant", None, None, None)),
}


@pytest.mark.parametrize(("options", "question", "expected"), PLACES.values(), ids=PLACES)
def test_tenant_and_instance(
    options: dict[str, MissingTenant | UnknownTenant],
    question: dict[str, str],
    expected: tuple[str, str | None, str | None, str | None],
) -> None:
    decision = ask(snapshot(**options), **question)
    found = (decision.instance, decision.affinity) if isinstance(decision, Allowed) else (None, None)
    assert (decision.reason, decision.tenant, *found) == expected


def test_a_stranger_without_any_active_instance_is_denied() -> None:
    down = Instance("queue-1", state=InstanceState.DRAINING)
    policy = snapshot((record_key(down), down), unknown_tenant=UnknownTenant.HASH)
    assert ask(policy, tenant="stranger").reason is Reason.NO_ACTIVE_INSTANCE


def test_a_stranger_changes_nothing() -> None:
    policy = snapshot(unknown_tenant=UnknownTenant.HASH)
    counts = policy.counts()
    for number in range(100):
        ask(policy, tenant=f"made-up-{number}")
    assert policy.counts() == counts


BAD_REQUESTS = {
    "no-method": ({"method": ""}, "bad_request"),
    "no-path": ({"path": ""}, "bad_request"),
    "only-a-query": ({"path": "?/"}, "bad_request"),
    "absolute-form": ({"path": "http://example.com/docs"}, "bad_request"),
    "asterisk-and-more": ({"path": "*x"}, "bad_request"),
    "asterisk": ({"path": "*"}, "allowed"),
    "longest-path": ({"path": "/" + "a" * 8191}, "allowed"),
    "longest-odd-path": ({"path": "/%61" + "a" * 2044}, "allowed"),
    "too-long-odd-path": ({"path": "/%61" + "a" * 2045}, "request_too_large"),
    "too-long-twice-escaped-path": ({"path": "/%2561" + "a" * 507}, "request_too_large"),
    "too-long-odd-path-without-escapes": ({"path": "/" + "a" * 2040 + "/.well-known"}, "request_too_large"),
    "longest-odd-path-and-a-query": ({"path": "/%61" + "a" * 2044 + "?a=%61"}, "allowed"),
    "longest-query": ({"path": "/?" + "a" * 16384}, "allowed"),
    "too-long-query": ({"path": "/?" + "a" * 16385}, "request_too_large"),
    "too-long-path": ({"path": "/" + "a" * 8192}, "request_too_large"),
    "long-query": ({"path": "/?" + "a" * 9000}, "allowed"),
    "too-long-before-the-address": ({"path": "/" + "a" * 8192, "client": "nonsense"}, "request_too_large"),
    "address-before-the-tenant": ({"client": "nonsense", "tenant": "a,b"}, "invalid_client_address"),
    "tenant-before-the-block": ({"client": BAD, "tenant": "a,b"}, "ambiguous_tenant"),
}


TENANT_CHANGES: dict[str, tuple[str, list[tuple[RecordKey, Record | Unreadable | None]]]] = {
    "moved": ("queue-2", keyed(Tenant("plain", "queue-2"))),
    "held": ("tenant_held", keyed(Tenant("plain", "queue-1", held=True))),
    "unregistered": ("None", [(record_key(Tenant("plain", None)), None)]),
    "instance-gone": ("unknown_instance", [(record_key(Instance("queue-1")), None)]),
    "restricted": ("not_allowlisted", keyed(Scope("tenant:plain", Mode.RESTRICTED))),
    "own-block-list": ("blocked", listed("tenant:plain/block", "198.51.100.0/24")),
    "named-block-list": (
        "blocked",
        [*keyed(NamedList("feed"), Scope("tenant:plain", block_lists=("feed",))), *listed("feed", "198.51.100.0/24")],
    ),
    "blocked-everywhere": ("blocked", listed("global/block", "198.51.100.0/24")),
}


@pytest.mark.parametrize(("expected", "changes"), TENANT_CHANGES.values(), ids=TENANT_CHANGES)
def test_a_change_about_a_tenant_counts_at_once_and_in_its_snapshot_only(
    expected: str, changes: list[tuple[RecordKey, Record | Unreadable | None]]
) -> None:
    def said(policy: Snapshot) -> str:
        decision = ask(policy, tenant="plain")
        return str(decision.instance if isinstance(decision, Allowed) else decision.reason)

    before = snapshot(*keyed(Tenant("plain", "queue-1")))
    assert [said(before), said(before)] == ["queue-1", "queue-1"]
    after = before.with_changes(3, changes)
    assert [said(after), said(after)] == [expected, expected]
    back = after.with_changes(4, [(key, None) for key, _ in changes])
    back = back.with_changes(5, keyed(Tenant("plain", "queue-1"), Instance("queue-1")))
    assert [said(back), said(before)] == ["queue-1", "queue-1"]


@pytest.mark.parametrize(("question", "reason"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_denials_come_in_this_order(question: dict[str, str], reason: str) -> None:
    assert ask(snapshot(), **question).reason == reason


def test_the_readings_of_a_path_are_made_once_and_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved: list[str] = []

    def counted(path: str) -> str:
        resolved.append(path)
        return normpath(path)

    # Every reading goes through it once, and compiled code looks it up as plain Python does, being no part of it.
    monkeypatch.setattr(paths, "normpath", counted)

    def calls(work: Callable[[], object]) -> int:
        resolved.clear()
        work()
        return len(resolved)

    odd = "/T/%61cme/..;/docs"
    once = calls(lambda: read_path(odd, fold_case=False))
    assert once > 0
    assert calls(lambda: ask(snapshot(), odd)) == once, "a source of tenants reads it, the resources use what it read"
    elsewhere = Resource("docs", (parse_path_pattern("/docs"),), ("docs.example.com",))
    nothing = build_snapshot(keyed(elsewhere), epoch="e", revision=1, options=DecisionOptions())
    assert calls(lambda: ask(nothing, odd)) == 0, "no resource is on this host"
    folded = calls(lambda: read_path(odd, fold_case=True))
    assert calls(lambda: ask(nothing, odd, host="docs.example.com")) == folded > 0


@pytest.mark.parametrize(("fold", "reason"), [(True, "not_allowlisted"), (False, "allowed")])
def test_letter_case_of_paths_is_a_setting(fold: bool, reason: str) -> None:
    assert ask(snapshot(fold_path_case=fold), "/Docs").reason == reason


ANY_TEXT = st.text(st.characters() | st.sampled_from("%/\\;.?&=,:[]"), max_size=60)
PATHS = ANY_TEXT | ANY_TEXT.map(lambda text: f"/{text}") | ANY_TEXT.map(lambda text: f"/t/acme/?tenant_id={text}")


REQUESTS = st.builds(
    RequestAttributes,
    method=ANY_TEXT,
    host=ANY_TEXT,
    path=PATHS,
    peer_address=st.none() | ANY_TEXT,
    external_address=st.none() | ANY_TEXT | st.just(OFFICE),
    headers=st.dictionaries(st.just("x-tenant-id"), ANY_TEXT),
)


@settings(max_examples=300)
@given(REQUESTS)
def test_no_text_makes_a_decision_fail(attributes: RequestAttributes) -> None:
    """Lone surrogates, NULs, letters that grow when folded: all of them are in what Hypothesis draws."""
    for policy in (
        snapshot(unknown_tenant=UnknownTenant.HASH),
        snapshot(missing_client_address=MissingClientAddress.PEER, trusted_peers=("10.0.0.0/8",)),
    ):
        assert isinstance(decide(attributes, policy, NOW), Allowed | Denied)
