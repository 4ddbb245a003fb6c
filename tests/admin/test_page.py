"""The page for people: what it shows, that clients cannot write into it, and who gets it."""

import re
from dataclasses import dataclass, field

import httpx
import pytest
from prometheus_client import CollectorRegistry

from authz_server.admin.app import build_admin_app
from authz_server.decision_log import DecisionLog, LogOptions
from authz_server.health import ComponentName, HealthState
from authz_server.policy.access import Entry, Side, own_list
from authz_server.policy.addresses import parse_network
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import decide
from authz_server.policy.records import RecordKey, RecordKind, Unreadable, entry_key
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.policy.tenant import parse_tenant_source
from authz_server.replicas import Registry
from authz_server.store.interface import (
    SILENT_SECONDS,
    Position,
    Replica,
    Report,
    StoreError,
    StoreUnavailableError,
)

BLOCK = Entry(parse_network("198.51.100.0/24"), reason="scraper", author="ann", created_at=1)
OPTIONS = DecisionOptions(tenant_sources=(parse_tenant_source("header:x-tenant-id"),))
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'{{7*7}}"


def policy() -> Snapshot:
    entry = entry_key(own_list("global", Side.BLOCK), BLOCK)
    return build_snapshot([(entry, BLOCK)], epoch="e", revision=7, options=OPTIONS)


@dataclass
class Site:
    """The admin port of a server whose state a test can change."""

    snapshot: Snapshot | None = field(default_factory=policy)
    options: LogOptions = field(default_factory=LogOptions)
    registry: Registry | StoreError = field(default_factory=lambda: Registry((), None))

    async def ask_servers(self) -> Registry:
        if isinstance(self.registry, StoreError):
            raise self.registry
        return self.registry

    def __post_init__(self) -> None:
        self.health = HealthState()
        self.log = DecisionLog(self.options, None)

    def deny(self, address: str = "198.51.100.77", **attributes: str) -> None:
        given = {"method": "GET", "host": "shop.example.com", "path": "/cart", "request_id": "6f1c1f0e"}
        request = RequestAttributes(external_address=address, **(given | attributes))
        self.log.note(decide(request, policy(), 0.0), request, 7, 0.00002)

    async def ask(self, query: str = "", *, peer: str = "127.0.0.1", host: str = "localhost:9001") -> httpx.Response:
        app = build_admin_app(
            health=self.health,
            registry=CollectorRegistry(),
            current=lambda: self.snapshot,
            age_seconds=lambda: 0.25,
            log=self.log,
            servers=self.ask_servers,
        )
        transport = httpx.ASGITransport(app, client=(peer, 4711))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.get(f"/{query}")

    async def text(self, query: str = "") -> str:
        answer = await self.ask(query)
        assert answer.status_code == 200
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", answer.text))


async def test_the_state_is_shown() -> None:
    site = Site()
    assert "not ready" in await site.text()
    for name in ComponentName:
        site.health.set(name, ready=True, detail=f"{name} is well")
    text = await site.text()
    for shown in ("redis is well", "revision 7", "0.2 s ago", "entries 1", "Nobody was denied since the start"):
        assert shown in text


def replica(name: str, position: Position | None, *, silent_seconds: float = 1.0) -> Replica:
    return Replica(name, Report(name, "p", 0.0, position), silent_seconds)


async def test_servers_that_decide_by_something_else_stand_out() -> None:
    replicas = (
        replica("a", Position("e", 7, "c")),
        replica("b", Position("e", 6, "c"), silent_seconds=SILENT_SECONDS + 1),
        replica("c", Position("other", 7, "c")),
        replica("d", None),
        Replica("f", None, 0.0, "not JSON"),
    )
    text = await Site(registry=Registry(replicas, Position("e", 7, "c"))).text()
    for shown in (
        "a reporting revision 7, the newest 1 s ago",
        "b unknown revision 6, 1 behind not the newest",
        "c reporting revision 7 of another epoch, other not the newest",
        "d reporting no policy yet not the newest",
        "f unreadable not JSON not the newest not known",
    ):
        assert shown in text


async def test_the_page_is_there_while_the_store_is_not() -> None:
    text = await Site(registry=StoreUnavailableError("connection refused")).text("?address=198.51.100.77")
    assert "Not known: connection refused" in text
    assert "DENIED blocked" in text


async def test_without_a_snapshot_the_consequence_is_said() -> None:
    assert "checks get UNAVAILABLE" in await Site(snapshot=None).text("?address=203.0.113.7")


async def test_unreadable_records_and_what_suffers_by_them_are_named() -> None:
    key = RecordKey(RecordKind.SCOPE, "global")
    snapshot = build_snapshot([(key, Unreadable("not JSON"))], epoch="e", revision=7, options=OPTIONS)
    assert "not JSON" in await Site(snapshot=snapshot).text()


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("address=198.51.100.77", "DENIED blocked"),
        ("address=198.51.100.77", "global blocked by 198.51.100.0/24 in global/block"),
        ("address=198.51.100.77", "by 198.51.100.0/24 in global/block"),
        ("address=203.0.113.7&path=/x&tenant=acme", "ALLOWED allowed"),
        ("address=203.0.113.7&path=/x&tenant=acme", "tenant acme"),
        ("address=not+one", "DENIED invalid_client_address"),
    ],
)
async def test_explain_decides_as_the_server_does(query: str, shown: str) -> None:
    assert shown in await Site().text(f"?{query}")


async def test_recent_denials_newest_first_and_found_by_any_of_their_texts() -> None:
    site = Site()
    site.deny(request_id="first")
    site.deny(request_id="second", path="/other?secret=1")
    text = await site.text()
    assert text.index("second") < text.index("first")
    assert "secret" not in text
    found = await site.text("?find=first")
    assert "1 of the last denials" in found
    assert "second" not in found
    assert "None of them does" in await site.text("?find=nobody")


async def test_a_denial_leads_to_its_explanation() -> None:
    site = Site()
    site.deny()
    link = re.search(r'href="(\?address[^"#]*)', (await site.ask()).text)
    assert link
    assert "DENIED blocked" in await site.text(link.group(1).replace("&amp;", "&"))


async def test_anonymized_addresses_are_not_linked_or_shown() -> None:
    site = Site(options=LogOptions(anonymize=True))
    site.deny()
    page = (await site.ask()).text
    assert "198.51.100.77" not in page
    assert "198.51.100.0" in page


async def test_nothing_a_client_wrote_becomes_markup() -> None:
    site = Site()
    site.deny(host=HOSTILE, path=f"/{HOSTILE}", request_id=HOSTILE, method=HOSTILE)
    fields = "&".join(f"{name}={httpx.QueryParams({'v': HOSTILE})['v']}" for name in ("address", "host", "path"))
    for query in ("", f"?{fields}", f"?find={HOSTILE}"):
        page = (await site.ask(query)).text
        assert "<script" not in page
        assert "<img" not in page
        assert "49" not in re.findall(r'value="([^"]*)"', page)


async def test_the_browser_is_told_to_load_nothing() -> None:
    headers = (await Site().ask()).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy.pop("style-src").startswith("'sha256-")
    assert policy.pop("form-action") == "'self'"
    assert set(policy.values()) == {"'none'"}
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


@pytest.mark.parametrize(
    ("peer", "host", "status"),
    [
        ("127.0.0.1", "localhost:9001", 200),
        ("127.0.0.1", "127.0.0.1:9001", 200),
        ("::1", "[::1]:9001", 200),
        ("10.0.0.7", "localhost:9001", 403),
        ("127.0.0.6", "localhost:9001", 403),  # Istio's sidecar, for anybody
        ("127.0.0.1", "attacker.example.com", 403),  # a name that resolves to 127.0.0.1 (DNS rebinding)
    ],
)
async def test_only_this_machine_gets_the_page(peer: str, host: str, status: int) -> None:
    assert (await Site().ask(peer=peer, host=host)).status_code == status
