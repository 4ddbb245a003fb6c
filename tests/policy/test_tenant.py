"""How a request names its tenant, and when it names two."""

import random

import pytest

from authz_server.policy import tenant as tenant_module
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.paths import RequestPath
from authz_server.policy.tenant import SourceKind, TenantSource, name_tenant, parse_tenant_source

ALL = ("header:x-tenant-id", "query:tenant_id", "host:{tenant}.example.com", "path:/t/{tenant}/")


def named(
    path: str = "/", *, host: str = "example.com", header: str | None = None, sources: tuple[str, ...] = ALL
) -> tuple[str | None, str | None]:
    headers = {} if header is None else {"x-tenant-id": header}
    attributes = RequestAttributes("GET", host, path, headers=headers)
    return name_tenant(attributes, RequestPath(path), tuple(parse_tenant_source(source) for source in sources))


NOBODY = {
    "nothing": {},
    "other-parameter": {"path": "/?tenant=acme&xtenant_id=b"},
    "name-in-another-name": {"path": "/?x[tenant_id]=b&tenant_id_=b&xtenant_id&tenant_idx[0]=b"},
    "name-escaped-thrice": {"path": "/?%252574enant_id=b"},
    "name-in-a-value": {"path": "/?next=%2Fx%3Ftenant_id%3Db%26tenant_id%3Dc"},
    "separators-escaped-in-the-name": {"path": "/?a%26tenant_id=b&a%3btenant_id=b&tenant_id%3Db"},
    "question-mark-escaped-thrice": {"path": "/x%25253ftenant_id=acme"},
    "apex": {"host": "example.com"},
    "two-labels": {"host": "a.b.example.com"},
    "other-domain": {"host": "acme.example.com.evil.test"},
    "path-too-short": {"path": "/t"},
    "path-empty": {"path": "/t/"},
    "path-elsewhere": {"path": "/x/t/acme"},
}
ACME = {
    "header": {"header": "acme"},
    "header-with-spaces": {"header": " acme\t"},
    "header-twice-the-same": {"header": "acme, acme"},
    "query": {"path": "/?tenant_id=acme"},
    "query-escaped": {"path": "/?a=b&ten%61nt_id=%61cme"},
    "query-twice-the-same": {"path": "/?tenant_id=acme&tenant_id=acme"},
    "query-after-semicolon": {"path": "/?a=b;tenant_id=acme"},
    "query-name-upper-case": {"path": "/?Tenant_ID=acme"},
    "query-name-escaped-twice": {"path": "/?%2574enant%255fid=acme"},
    "query-name-with-a-dot": {"path": "/?tenant.id=acme"},
    "query-name-with-an-escaped-dot": {"path": "/?tenant%2Eid=acme"},
    "query-name-with-spaces": {"path": "/?+%20tenant+id=acme"},
    "query-name-of-a-list": {"path": "/?tenant_id[]=acme"},
    "query-name-of-an-escaped-list": {"path": "/?tenant_id%5B0%5D[x]=acme"},
    "query-name-with-an-open-bracket": {"path": "/?tenant[id=acme"},
    "query-name-in-brackets": {"path": "/?[tenant_id]=acme"},
    "query-in-the-path": {"path": "/x%3ftenant_id=acme"},
    "query-in-the-path-escaped-twice": {"path": "/x%253Ftenant_id=acme"},
    "host": {"host": "acme.example.com"},
    "host-port-case-dot": {"host": "ACME.Example.com.:443"},
    "path": {"path": "/t/acme"},
    "path-below": {"path": "/t/acme/x/y"},
    "path-upper-case": {"path": "/T/acme/x"},
    "path-escaped-without-doubt": {"path": "/t//acme"},
    "all-agree": {"path": "/t/acme/?tenant_id=acme", "host": "acme.example.com", "header": "acme"},
}
AMBIGUOUS = {
    "header-and-query": {"header": "acme", "path": "/?tenant_id=globex"},
    "header-and-host": {"header": "acme", "host": "globex.example.com"},
    "host-and-path": {"host": "acme.example.com", "path": "/t/globex/"},
    "header-twice": {"header": "acme,globex"},
    "header-twice-up-to-a-length": {"header": "acme," * 204 + "acmf"},
    "header-and-empty": {"header": "acme,"},
    "query-twice": {"path": "/?tenant_id=acme&tenant_id=globex"},
    "query-and-empty": {"path": "/?tenant_id=acme&tenant_id"},
    "query-by-semicolon": {"path": "/?tenant_id=acme;tenant_id=globex"},
    "query-by-letter-case": {"path": "/?tenant_id=acme&TENANT_ID=globex"},
    "query-by-double-escape": {"path": "/?tenant_id=acme&tenant%255fid=globex"},
    "query-by-php": {"path": "/?tenant_id=acme&tenant.id=globex"},
    "query-by-list": {"path": "/?tenant_id=acme&tenant_id[]=globex"},
    "query-inside-the-path": {"path": "/x%3ftenant_id=globex?tenant_id=acme"},
    "query-inside-the-path-escaped-twice": {"path": "/x%253ftenant_id=globex?tenant_id=acme"},
    "query-inside-the-path-and-header": {"path": "/x%3fa&tenant_id=globex", "header": "acme"},
    "path-upper-case-and-query": {"path": "/T/globex/?tenant_id=acme"},
    "path-by-dots": {"path": "/t/acme/../globex/"},
    "path-by-escaped-slash": {"path": "/t/acme%2f..%2fglobex"},
    "path-parameter": {"path": "/t/acme;v=1/"},
    "path-escaped": {"path": "/t/%61cme/"},
    "path-by-host-in-path": {"path": "//x/t/acme", "header": "globex"},
    "good-and-bad": {"header": "acme", "path": "/?tenant_id=ACME"},
}
INVALID = {
    "header-too-long-to-take-apart": {"header": ",".join(["acme"] * 206)},
    "empty-header": {"header": ""},
    "upper-case": {"header": "Acme"},
    "path-traversal": {"header": "../acme"},
    "cyrillic": {"header": "\u0430cme"},
    "nul": {"path": "/?tenant_id=acme%00"},
    "plus-is-a-space": {"path": "/?tenant_id=+acme"},
    "escaped-twice": {"path": "/?tenant_id=%2561cme"},
    "empty-query": {"path": "/?tenant_id="},
    "path-value-upper-case": {"path": "/t/ACME/"},
    "path-value-kelvin-sign": {"path": "/T/\u212aey"},
    "host-kelvin-sign": {"host": "\u212aey.example.com"},
    "empty-host-label": {"host": ".example.com"},
    "too-long": {"header": "a" * 64},
    "bad-bytes": {"path": "/?tenant_id=%ff"},
}


@pytest.mark.parametrize("request_", NOBODY.values(), ids=NOBODY)
def test_nobody_is_named(request_: dict[str, str]) -> None:
    assert named(**request_) == (None, None)


@pytest.mark.parametrize("request_", ACME.values(), ids=ACME)
def test_acme_is_named(request_: dict[str, str]) -> None:
    assert named(**request_) == ("acme", None)


@pytest.mark.parametrize("request_", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_two_are_named(request_: dict[str, str]) -> None:
    assert named(**request_) == (None, "ambiguous_tenant")


@pytest.mark.parametrize("request_", INVALID.values(), ids=INVALID)
def test_what_is_no_tenant_id_is_refused_before_any_look_up(request_: dict[str, str]) -> None:
    assert named(**request_) == (None, "invalid_tenant")


def test_only_configured_sources_are_read() -> None:
    request_ = {"path": "/t/acme/?tenant_id=globex", "host": "hooli.example.com", "header": "initech"}
    assert [named(**request_, sources=(source,))[0] for source in ALL] == ["initech", "globex", "hooli", "acme"]
    assert named(**request_, sources=()) == (None, None)


SOURCES = {
    "header:X-Tenant-ID": TenantSource(SourceKind.HEADER, "x-tenant-id"),
    " query:tenant_id ": TenantSource(SourceKind.QUERY, "tenant_id"),
    "host:{tenant}.Example.com": TenantSource(SourceKind.HOST, "{tenant}.example.com"),
    "path:/t/{tenant}/": TenantSource(SourceKind.PATH, "/t/{tenant}/"),
    "path:/{tenant}": TenantSource(SourceKind.PATH, "/{tenant}"),
    "host:{tenant}.localhost": TenantSource(SourceKind.HOST, "{tenant}.localhost"),
    "host:{tenant}.xn--mnchen-3ya.my_zone.example": TenantSource(
        SourceKind.HOST, "{tenant}.xn--mnchen-3ya.my_zone.example"
    ),
    "query:filter[tenant]": TenantSource(SourceKind.QUERY, "filter[tenant]"),
}


@pytest.mark.parametrize(("text", "source"), SOURCES.items())
def test_sources_are_read_and_written(text: str, source: TenantSource) -> None:
    assert parse_tenant_source(text) == source
    assert parse_tenant_source(str(source)) == source


BAD_SOURCES = {
    "": "write header:NAME, query:NAME, host:PATTERN or path:PATTERN",
    "x-tenant-id": "write header:NAME",
    "cookie:tenant": "write header:NAME",
    "header:": "write header:NAME",
    "Header:x": "write header:NAME",
    "header:x_tenant": "is not a header name of letters, digits and hyphens",
    "header:x tenant": "is not a header name",
    "header:\u212aey": "is not a header name of letters, digits and hyphens",
    "query:tenant id": "without white space",
    "query:a\u00a0b": "without white space",
    **{f"query:a{sign}b": "any of '&;=#?+%'" for sign in "&;=#?+%\0"},
    "host:{tenant}.example.com:8443": "without port",
    "host:{tenant}.example.com.": "without a dot at the end",
    "host:{tenant}.": "'' is not a domain",
    "host:{tenant}..com": "'.com' is not a domain",
    "host:{tenant}.-a.com": "is not a domain",
    "host:{tenant}.exa mple.com": "is not a domain",
    "host:{tenant}.\u212aelvin.com": "is not a domain: write labels",
    "host:{tenant}.*.com": "is not a domain",
    "path:/t//{tenant}": "empty segments",
    "path:/t/{tenant}//": "empty segments",
    "path:/../{tenant}": "write the segment '..' plainly",
    "path:/%74/{tenant}": "write the segment '%74' plainly",
    "path:/t?/{tenant}": "write the segment 't?' plainly",
    "path:/*/{tenant}": "only {tenant} stands for any segment",
    "host:example.com": "a host pattern begins with {tenant}. and holds it once",
    "host:{tenant}": "a host pattern begins with {tenant}.",
    "host:{tenant}.{tenant}.com": "holds it once",
    "path:t/{tenant}": "a path pattern begins with '/' and has one segment {tenant}",
    "path:/t/x{tenant}": "has one segment {tenant}",
    "path:/{tenant}/{tenant}": "has one segment {tenant}",
    "path:/{other}/{tenant}": "has one segment {tenant}",
    "path:/t": "has one segment {tenant}",
}


@pytest.mark.parametrize(("text", "advice"), BAD_SOURCES.items())
def test_other_sources_are_refused_with_the_text(text: str, advice: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        parse_tenant_source(text)
    assert advice in str(caught.value)
    assert str(caught.value).startswith(repr(text))


QUERY_PIECES = (
    *("tenant_id", "TENANT", "tenant", "_id", ".", "[", "]", "=", "&", ";", "+", " ", "%", "%25", "2", "5", "4", "7"),
    *("%74", "%54", "%2574", "%20", "%5f", "%5B", "%26", "%3d", "%3F", "?", "acme", "id", "a", "\u0131d", "\u0130D"),
    *("%c4%b1", "\u017f", "\u212a", "K", "%", "0", "%30", "%0", "x", "_"),
)
PARAMETERS = ("tenant_id", "Tenant.Key", "t", "k", "_", "id", "t0_x[y]", "\u017fid", "\u0131")
TEXTS = 30_000


def pieces_joined(rng: random.Random) -> str:
    return "".join(rng.choices(QUERY_PIECES, k=rng.randint(0, 8)))


def test_no_query_that_names_a_tenant_is_passed_over_unread() -> None:
    """The quick look only spares the reading of queries in which there is nothing to read."""
    rng = random.Random(1)
    naming = 0
    for _ in range(TEXTS):
        query, name = pieces_joined(rng), rng.choice(PARAMETERS)
        if list(tenant_module._query_values(query, name)):
            naming += 1
            assert tenant_module._may_name(query, name), (query, name)
    assert naming > TEXTS / 100


def test_no_path_that_decodes_to_a_query_is_passed_over() -> None:
    rng = random.Random(2)
    with_queries = 0
    for _ in range(TEXTS):
        path = pieces_joined(rng).replace("?", "")
        once = tenant_module._decoded(path)
        found = {text.partition("?")[2] for text in (once, tenant_module._decoded(once)) if "?" in text}
        assert set(tenant_module._queries_inside(path)) == found, path
        with_queries += bool(found)
    assert with_queries > TEXTS / 100


@pytest.mark.parametrize(
    ("query", "name", "may"),
    [
        ("page=3&sort=name", "tenant_id", False),
        ("q=red%20shoes%26more", "tenant_id", False),
        ("tenant=1", "tenant_id", True),
        ("q=caf%C3%A9", "tenant_id", True),
        ("a", "_", True),
    ],
)
def test_queries_of_which_one_look_says_that_no_tenant_is_named(query: str, name: str, may: bool) -> None:
    assert tenant_module._may_name(query, name) is may
