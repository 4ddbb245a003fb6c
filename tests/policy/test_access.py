"""Lists and scopes: the longest match wins, a block wins a tie, and scopes do not help each other."""

import pytest

from authz_server.policy.access import (
    Enforcement,
    Entry,
    Mode,
    Resource,
    Scope,
    Side,
    judge,
    normalize_host,
    own_list,
    resource_scope,
    scope_of_own_list,
    tenant_of_scope,
    tenant_scope,
)
from authz_server.policy.addresses import parse_address, parse_network
from authz_server.policy.networks import UNREADABLE, NetworkTable
from authz_server.policy.paths import parse_path_pattern, read_path
from authz_server.policy.reasons import Reason

NOW = 1000
CLIENT = "10.1.2.3"


def entry(cidr: str, expires_at: int | None = None) -> Entry:
    return Entry(parse_network(cidr), "because", "ana", 1, expires_at=expires_at)


def tables(lists: dict[str, list[str]]) -> dict[str, NetworkTable]:
    """Build tables; `CIDR until SECOND` expires, and nobody can read the entry of `CIDR until ?`."""

    def expiry(cidr: str, until: str) -> int:
        return UNREADABLE if until == "?" else entry(cidr, int(until) if until else None).expiry

    built = {}
    for name, texts in lists.items():
        entries = [text.partition(" until ") for text in texts]
        built[name] = NetworkTable.build((parse_network(cidr), expiry(cidr, until)) for cidr, _, until in entries)
    return built


A, B = "global/allow", "global/block"
JUDGED = {
    "nothing-open": ("open", {}, "allowed", None),
    "nothing-restricted": ("restricted", {}, "not_allowlisted", None),
    "allow": ("restricted", {A: ["10.0.0.0/8"]}, "allowlisted", (A, "10.0.0.0/8")),
    "allow-of-others": ("restricted", {A: ["11.0.0.0/8", "::/0"]}, "not_allowlisted", None),
    "block": ("open", {B: ["10.0.0.0/8"]}, "blocked", (B, "10.0.0.0/8")),
    "block-everything-ipv6-is-not-ipv4": ("open", {B: ["::/0"]}, "allowed", None),
    "block-wins-the-tie": ("open", {A: ["10.1.0.0/16"], B: ["10.1.0.0/16"]}, "blocked", (B, "10.1.0.0/16")),
    "hole-in-a-block": ("open", {A: ["10.1.2.0/24"], B: ["10.0.0.0/8"]}, "allowlisted", (A, "10.1.2.0/24")),
    "block-in-the-hole": (
        "open",
        {A: ["10.1.2.0/24"], B: ["10.0.0.0/8", "10.1.2.3"]},
        "blocked",
        (B, "10.1.2.3/32"),
    ),
    "four-deep": (
        "open",
        {A: ["10.1.0.0/16", "10.1.2.3"], B: ["10.0.0.0/8", "10.1.2.0/24"]},
        "allowlisted",
        (A, "10.1.2.3/32"),
    ),
    "expired-in-mid-chain": (
        "open",
        {A: ["10.1.2.0/24 until 999", "10.0.0.0/8"], B: ["10.1.0.0/16"]},
        "blocked",
        (B, "10.1.0.0/16"),
    ),
    "expires-at-this-very-second": ("restricted", {A: ["10.0.0.0/8 until 1000"]}, "not_allowlisted", None),
    "expires-a-second-later": ("restricted", {A: ["10.0.0.0/8 until 1001"]}, "allowlisted", (A, "10.0.0.0/8")),
    "behind-an-expired-one-the-wider-one": (
        "restricted",
        {A: ["10.1.2.0/24 until 1000", "10.0.0.0/8"]},
        "allowlisted",
        (A, "10.0.0.0/8"),
    ),
    "unreadable-block": ("open", {B: ["10.0.0.0/8 until ?"]}, "blocked", (B, "10.0.0.0/8")),
    "unreadable-block-of-a-named-list": ("open", {"feed": ["10.0.0.0/8 until ?"]}, "blocked", ("feed", "10.0.0.0/8")),
    "hole-in-an-unreadable-block": (
        "open",
        {A: ["10.1.2.3"], B: ["10.0.0.0/8 until ?"]},
        "allowlisted",
        (A, "10.1.2.3/32"),
    ),
    "unreadable-allow": ("restricted", {A: ["10.0.0.0/8 until ?"]}, "not_allowlisted", None),
    "unreadable-hole": ("open", {A: ["10.1.2.3 until ?"], B: ["10.0.0.0/8"]}, "blocked", (B, "10.0.0.0/8")),
    "behind-an-unreadable-allow-the-wider-one": (
        "restricted",
        {A: ["10.1.2.3 until ?", "10.0.0.0/8"]},
        "allowlisted",
        (A, "10.0.0.0/8"),
    ),
    "expired-since-1970-is-not-unreadable": ("open", {B: ["10.0.0.0/8 until 0"]}, "allowed", None),
    "named-list": ("restricted", {"office": ["10.1.2.0/24"]}, "allowlisted", ("office", "10.1.2.0/24")),
    "named-list-more-exact-than-own": (
        "open",
        {A: ["10.0.0.0/8"], "office": ["10.1.2.0/24"]},
        "allowlisted",
        ("office", "10.1.2.0/24"),
    ),
    "own-list-before-named-of-equal-length": (
        "open",
        {A: ["10.0.0.0/8"], "office": ["10.0.0.0/8"]},
        "allowlisted",
        (A, "10.0.0.0/8"),
    ),
    "own-expired-named-counts": (
        "open",
        {A: ["10.0.0.0/8 until 5"], "office": ["10.0.0.0/8"]},
        "allowlisted",
        ("office", "10.0.0.0/8"),
    ),
    "list-that-the-scope-does-not-name": ("restricted", {"guests": ["10.0.0.0/8"]}, "not_allowlisted", None),
    "list-of-another-scope": ("restricted", {"tenant:acme/allow": ["10.0.0.0/8"]}, "not_allowlisted", None),
    "named-block-list": ("open", {"feed": ["10.1.2.3"]}, "blocked", ("feed", "10.1.2.3/32")),
}


@pytest.mark.parametrize("enforcement", Enforcement)
@pytest.mark.parametrize(("mode", "lists", "reason", "match"), JUDGED.values(), ids=JUDGED)
def test_a_scope_judges_an_address(
    mode: str, lists: dict[str, list[str]], reason: str, match: tuple[str, str] | None, enforcement: Enforcement
) -> None:
    scope = Scope("global", Mode(mode), enforcement, allow_lists=("office", "gone"), block_lists=("feed",))
    outcome = judge(scope, tables(lists), parse_address(CLIENT), NOW)
    assert (outcome.scope, outcome.enforcement, outcome.reason) == ("global", enforcement, reason)
    assert outcome.denies is (reason in ("blocked", "not_allowlisted"))
    assert (outcome.match and (outcome.match.list_name, str(outcome.match.network))) == match


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("9.255.255.255", Reason.ALLOWED),
        ("10.0.0.0", Reason.BLOCKED),
        ("10.1.1.255", Reason.BLOCKED),
        ("10.1.2.0", Reason.ALLOWLISTED),
        ("10.1.2.255", Reason.ALLOWLISTED),
        ("10.1.3.0", Reason.BLOCKED),
        ("10.255.255.255", Reason.BLOCKED),
        ("11.0.0.0", Reason.ALLOWED),
    ],
)
def test_boundaries_of_a_block_with_a_hole(address: str, reason: Reason) -> None:
    lists = tables({A: ["10.1.2.0/24"], B: ["10.0.0.0/8"]})
    assert judge(Scope("global"), lists, parse_address(address), NOW).reason is reason


@pytest.mark.parametrize(("now", "counts"), [(999, True), (999.999, True), (1000, False), (1000.001, False)])
def test_an_entry_counts_until_its_second_begins(now: float, counts: bool) -> None:
    assert entry("10.0.0.0/8", 1000).counts_at(now) is counts
    assert entry("10.0.0.0/8").counts_at(now)


def test_names_of_scopes_and_their_lists() -> None:
    assert (tenant_scope("acme"), resource_scope("docs")) == ("tenant:acme", "resource:docs")
    assert own_list("tenant:acme", Side.BLOCK) == "tenant:acme/block"
    assert [tenant_of_scope(name) for name in ("tenant:acme", "resource:docs", "global")] == ["acme", None, None]
    assert scope_of_own_list("tenant:acme/block") == "tenant:acme"
    assert scope_of_own_list("office") is None
    scope = Scope("global", allow_lists=("office",), block_lists=("feed", "abuse"))
    assert scope.lists[Side.ALLOW] == ("global/allow", "office")
    assert scope.lists[Side.BLOCK] == ("global/block", "feed", "abuse")


HOSTS = {
    "www.example.com": "www.example.com",
    "WWW.Example.COM": "www.example.com",
    "www.example.com:8443": "www.example.com",
    "www.example.com.": "www.example.com",
    "www.example.com.:80": "www.example.com",
    "www.example.com:80:90": "www.example.com",
    "[2001:DB8::1]": "[2001:db8::1]",
    "[2001:db8::1]:443": "[2001:db8::1]",
    "[2001:db8::1": "[2001:db8::1",
    "": "",
    ":80": "",
    ".": "",
    "\u212aey.example.com": "\u212aey.example.com",
    "\u00c9.example.com": "\u00c9.example.com",
}


@pytest.mark.parametrize(("host", "normal"), HOSTS.items())
def test_hosts_lose_port_case_and_root_dot(host: str, normal: str) -> None:
    assert normalize_host(host) == normal


APPLIES = [
    ((), "anything", "/docs", True),
    ((), "", "/docs", True),
    (("www.example.com",), "www.example.com", "/docs/x", True),
    (("www.example.com",), "www.example.com", "/other", False),
    (("www.example.com",), "example.com", "/docs", False),
    (("www.example.com",), "www.example.com.evil.test", "/docs", False),
    (("*.example.com",), "www.example.com", "/docs", True),
    (("*.example.com",), "a.b.example.com", "/docs", True),
    (("*.example.com",), "example.com", "/docs", False),
    (("*.example.com",), ".example.com", "/docs", False),
    (("*.example.com",), "evilexample.com", "/docs", False),
    (("a.test", "b.test"), "b.test", "/a%2f..%2fdocs", True),
]


@pytest.mark.parametrize(("hosts", "host", "path", "applies"), APPLIES)
def test_a_resource_applies_by_host_and_any_reading(
    hosts: tuple[str, ...], host: str, path: str, applies: bool
) -> None:
    resource = Resource("docs", (parse_path_pattern("/api-docs"), parse_path_pattern("/docs")), hosts)
    assert (resource.is_on(host) and resource.holds(read_path(path, fold_case=True))) is applies
