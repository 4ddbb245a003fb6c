"""What Envoy makes of our answers, and what becomes of a request when there is none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.gateway import TENANT_HEADER_SOURCE, Answer, AuthzServer, Headers, ask, policy

from authz_server.demo.envoy import Envoy
from authz_server.demo.envoy_config import Address, GatewayOptions, TlsFiles, gateway_config
from authz_server.demo.upstreams import Upstreams
from authz_server.ext_authz.check_response import ResponseOptions
from authz_server.ext_authz.transport import TlsFiles as ServerTlsFiles
from authz_server.ext_authz.transport import TransportName
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import DecisionOptions, Snapshot

pytestmark = pytest.mark.integration

CLIENT = "127.0.0.5"
BLOCKED_CLIENT = "127.0.0.6"
INSTANCES = ("queue-1", "queue-2", "queue-3")
REVISION = 42


def tenants(*, blocked: str = BLOCKED_CLIENT) -> Snapshot:
    """acme at queue-1, hooli at queue-3 and held."""
    return policy(
        blocked=[f"{blocked}/32"],
        offices={"/docs": ["127.0.0.7/32"]},
        pins={"acme": "queue-1", "hooli": "queue-3"},
        held=["hooli"],
        instances=INSTANCES,
        options=DecisionOptions(tenant_sources=TENANT_HEADER_SOURCE),
        revision=REVISION,
    )


def gateway_options(authz: Address, upstreams: Upstreams, **more: Any) -> GatewayOptions:
    return GatewayOptions(**{"authz": authz, "instances": upstreams.addresses, "timeout_seconds": 5.0, **more})


@pytest.fixture(scope="module", params=[TransportName.ASYNCIO, TransportName.GRPCIO], ids=lambda name: name.value)
def transport(request: pytest.FixtureRequest) -> TransportName:
    name: TransportName = request.param
    return name


@pytest.fixture(scope="module")
def running_server(transport: TransportName) -> Iterator[AuthzServer]:
    with AuthzServer(tenants(), transport=transport) as running:
        yield running
        assert running.faults == []


@pytest.fixture
def server(running_server: AuthzServer) -> AuthzServer:
    """The server, with the tenants above."""
    running_server.snapshot = tenants()
    running_server.clear()
    return running_server


@pytest.fixture(scope="module")
def envoy(running_server: AuthzServer, running_upstreams: Upstreams) -> Iterator[Envoy]:
    """A gateway that fails closed."""
    with Envoy(gateway_config(gateway_options(running_server.address, running_upstreams))) as running:
        yield running


def asked(envoy: Envoy, path: str = "/x", **request: Any) -> tuple[Answer, dict[str, Any]]:
    """The answer to one request, and its entry in the access log."""
    before = len(envoy.access_log())
    answer = ask(envoy.address, path, **request)
    return answer, envoy.access_log(at_least=before + 1)[-1]


@pytest.mark.usefixtures("server")
class TestAnswers:
    @pytest.mark.parametrize(
        ("tenant", "source", "status", "title", "retry_after"),
        [("acme", BLOCKED_CLIENT, 403, "Forbidden", None), ("hooli", CLIENT, 503, "Service Unavailable", "1")],
        ids=["blocked", "held"],
    )
    def test_a_denied_client_gets_a_problem_document_with_envoys_request_id(
        self,
        *,
        tenant: str,
        source: str,
        status: int,
        title: str,
        retry_after: str | None,
        envoy: Envoy,
        upstreams: Upstreams,
    ) -> None:
        headers = [("x-tenant-id", tenant), ("x-request-id", "forged")]
        answer, entry = asked(envoy, headers=headers, source=source)
        assert answer.status == status == entry["response_code"]
        assert answer.headers.get_all("content-type") == ["application/problem+json"]
        assert answer.headers.get_all("cache-control") == ["no-store"]
        assert answer.headers.get("retry-after") == retry_after
        assert answer.json() == {
            "type": "about:blank",
            "title": title,
            "status": status,
            "request_id": entry["request_id"],
        }
        assert entry["request_id"] != "forged"
        assert entry["response_code_details"] == "ext_authz_denied"
        assert entry["upstream_host"] is None
        assert upstreams.arrivals() == []

    def test_a_header_that_is_not_utf_8_does_not_hide_the_request_id(self, envoy: Envoy) -> None:
        answer, entry = asked(envoy, headers=[("x-any", "\xff\xfe")], source=BLOCKED_CLIENT)
        assert answer.json()["request_id"] == entry["request_id"]

    def test_the_answer_to_head_has_no_body_and_the_connection_stays_in_step(self, envoy: Envoy) -> None:
        answer, _ = asked(envoy, method="HEAD", source=BLOCKED_CLIENT)
        assert (answer.status, answer.body) == (403, b"")

    def test_statuses_and_headers_are_as_configured(
        self, transport: TransportName, running_upstreams: Upstreams
    ) -> None:
        responses = ResponseOptions(
            routing_header="x-cell",
            tenant_header="x-customer",
            denied_status={Reason.BLOCKED: 404},
            retry_after_seconds=7,
            show_reason=True,
        )
        with AuthzServer(tenants(), responses=responses, transport=transport) as server:
            options = gateway_options(server.address, running_upstreams, routing_header="x-cell")
            with Envoy(gateway_config(options)) as envoy:
                running_upstreams.clear()
                forged = [("x-tenant-id", "acme"), ("x-cell", "queue-3"), ("x-customer", "globex")]
                assert ask(envoy.address, headers=forged, source=CLIENT).instance == "queue-1"
                (arrival,) = running_upstreams.arrivals()
                assert (arrival.header("x-cell"), arrival.header("x-customer")) == ("queue-1", "acme")

                blocked = ask(envoy.address, headers=forged, source=BLOCKED_CLIENT)
                assert (blocked.status, blocked.json()["reason"]) == (404, "blocked")
                held = ask(envoy.address, headers=[("x-tenant-id", "hooli")], source=CLIENT)
                assert (held.status, held.headers["retry-after"]) == (503, "7")
            assert server.faults == []


@pytest.mark.usefixtures("server")
class TestAccessLog:
    def test_of_an_allowed_request_it_has_the_decision_as_dynamic_metadata(self, envoy: Envoy) -> None:
        _, entry = asked(envoy, headers=[("x-tenant-id", "acme")], source=CLIENT)
        expected = {
            "outcome": "ok",
            "reason": "allowed",
            "client_address": CLIENT,
            "tenant": "acme",
            "instance": "queue-1",
            "affinity": "pinned",
            "revision": REVISION,
        }
        assert entry["decision"].items() >= expected.items()

    def test_of_a_denied_request_it_has_the_decision_as_dynamic_metadata(self, envoy: Envoy) -> None:
        _, entry = asked(envoy, headers=[("x-tenant-id", "acme")], source=BLOCKED_CLIENT)
        expected = {
            "outcome": "denied",
            "reason": "blocked",
            "client_address": BLOCKED_CLIENT,
            "tenant": "acme",
            "scope": "global",
            "list": "global/block",
            "entry": f"{BLOCKED_CLIENT}/32",
            "revision": REVISION,
        }
        assert entry["decision"].items() >= expected.items()

    @pytest.mark.parametrize("path", ["/docs", "//docs", "/docs;x=1", "/x%2f..%2fdocs", "/DOCS/", "/x/../docs?y"])
    def test_it_names_the_resource_that_restricts(self, path: str, envoy: Envoy) -> None:
        answer, entry = asked(envoy, path, source=CLIENT)
        assert answer.status == 403
        assert (entry["decision"]["reason"], entry["decision"]["scope"]) == ("not_allowlisted", "resource:resource-0")
        answer, entry = asked(envoy, path, source="127.0.0.7")
        assert answer.status == 200
        assert (entry["decision"]["reason"], entry["decision"]["list"]) == (
            "allowlisted",
            "resource:resource-0/allow",
        )


@pytest.mark.parametrize("fails_open", [True, False], ids=["fails_open", "fails_closed"])
class TestNoAnswer:
    def test_no_snapshot_is_for_envoys_own_setting_to_judge(
        self, fails_open: bool, transport: TransportName, running_upstreams: Upstreams
    ) -> None:
        with AuthzServer(None, transport=transport) as server:
            options = gateway_options(server.address, running_upstreams, failure_mode_allow=fails_open)
            with Envoy(gateway_config(options)) as envoy:
                running_upstreams.clear()
                headers = [("x-tenant-id", "acme"), ("x-tenant-instance", "queue-3")]
                answers = [asked(envoy, headers=headers, source=BLOCKED_CLIENT)[0] for _ in INSTANCES]
                assert {answer.status for answer in answers} == {200 if fails_open else 403}
                arrivals = running_upstreams.arrivals()
                assert len({arrival.instance for arrival in arrivals}) == (3 if fails_open else 0), "round robin"
                assert {arrival.header("x-tenant-instance") for arrival in arrivals} <= {None}
                stats = envoy.stats("http.gateway.ext_authz.")
                assert stats["http.gateway.ext_authz.error"] == 3
                assert stats["http.gateway.ext_authz.failure_mode_allowed"] == (3 if fails_open else 0)

                server.snapshot = tenants()
                assert ask(envoy.address, source=BLOCKED_CLIENT).status == 403
                answer = ask(envoy.address, headers=headers, source=CLIENT)
                assert (answer.status, answer.instance) == (200, "queue-1")
            assert server.faults == []

    def test_a_server_that_goes_is_for_envoys_own_setting_to_judge(
        self, fails_open: bool, transport: TransportName, running_upstreams: Upstreams
    ) -> None:
        with AuthzServer(tenants(), transport=transport) as server:
            options = gateway_options(server.address, running_upstreams, failure_mode_allow=fails_open)
            with Envoy(gateway_config(options)) as envoy:
                assert asked(envoy, source=BLOCKED_CLIENT)[0].status == 403
                server.stop()
                running_upstreams.clear()
                answer, entry = asked(envoy, headers=[("x-tenant-instance", "queue-3")], source=BLOCKED_CLIENT)
                assert answer.status == (200 if fails_open else 403)
                assert entry["response_code_details"] == ("via_upstream" if fails_open else "ext_authz_error")
                assert {arrival.header("x-tenant-instance") for arrival in running_upstreams.arrivals()} <= {None}


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEM files: authority `ca`, `server` and `client` issued by it, `stranger` issued by another one, with keys."""
    directory = tmp_path_factory.mktemp("tls")
    ours, theirs = trustme.CA(), trustme.CA()
    issued = {
        "server": ours.issue_cert("authz.test"),
        "client": ours.issue_cert("gateway.test"),
        "stranger": theirs.issue_cert("gateway.test"),
    }
    files = {"ca": directory / "ca.pem"}
    ours.cert_pem.write_to_path(str(files["ca"]))
    for name, leaf in issued.items():
        files[name], files[f"{name}_key"] = directory / f"{name}.pem", directory / f"{name}-key.pem"
        leaf.cert_chain_pems[0].write_to_path(str(files[name]))
        leaf.private_key_pem.write_to_path(str(files[f"{name}_key"]))
    return files


class TestTls:
    @pytest.mark.parametrize(
        ("demands_certificate", "client", "server_name", "connects"),
        [
            pytest.param(False, None, "authz.test", True, id="tls"),
            pytest.param(False, None, "other.test", False, id="tls-another_servers_name"),
            pytest.param(True, "client", "authz.test", True, id="mutual_tls"),
            pytest.param(True, None, "authz.test", False, id="mutual_tls-no_certificate"),
            pytest.param(True, "stranger", "authz.test", False, id="mutual_tls-another_authoritys_certificate"),
        ],
    )
    def test_envoy_asks_over_tls(
        self,
        *,
        demands_certificate: bool,
        client: str | None,
        server_name: str,
        connects: bool,
        tls_files: dict[str, Path],
        transport: TransportName,
        running_upstreams: Upstreams,
    ) -> None:
        ours = ServerTlsFiles(
            certificate=tls_files["server"],
            key=tls_files["server_key"],
            client_ca=tls_files["ca"] if demands_certificate else None,
        )
        theirs = TlsFiles(
            ca=tls_files["ca"],
            server_name=server_name,
            certificate=tls_files[client] if client else None,
            key=tls_files[f"{client}_key"] if client else None,
        )
        with AuthzServer(tenants(), tls=ours, transport=transport) as server:
            options = gateway_options(server.address, running_upstreams, authz_tls=theirs)
            with Envoy(gateway_config(options)) as envoy:
                allowed = ask(envoy.address, headers=[("x-tenant-id", "acme")], source=CLIENT)
                denied = ask(envoy.address, source=BLOCKED_CLIENT)
            assert (allowed.status, allowed.instance) == ((200, "queue-1") if connects else (403, None))
            assert denied.status == 403
            assert [checked.decision.reason for checked in server.checked()] == (
                [Reason.ALLOWED, Reason.BLOCKED] if connects else []
            )
            assert server.faults == []

    def test_plain_text_to_a_tls_server_is_no_answer(
        self, tls_files: dict[str, Path], transport: TransportName, running_upstreams: Upstreams
    ) -> None:
        ours = ServerTlsFiles(certificate=tls_files["server"], key=tls_files["server_key"])
        with AuthzServer(tenants(), tls=ours, transport=transport) as server:
            with Envoy(gateway_config(gateway_options(server.address, running_upstreams))) as envoy:
                assert ask(envoy.address, source=CLIENT).status == 403
            assert server.checked() == []


@pytest.fixture(scope="module")
def raw(running_server: AuthzServer, running_upstreams: Upstreams) -> Iterator[Envoy]:
    """A gateway that sends headers as a list of bytes."""
    options = gateway_options(running_server.address, running_upstreams, encode_raw_headers=True)
    with Envoy(gateway_config(options)) as running:
        yield running


class TestRawHeaders:
    """With `encode_raw_headers` Envoy sends a list of headers in place of the map; decisions are the same."""

    @pytest.mark.parametrize(
        ("headers", "source"),
        [
            pytest.param([], CLIENT, id="no_tenant"),
            pytest.param([("X-Tenant-Id", "acme")], CLIENT, id="pinned"),
            pytest.param([("x-tenant-id", "acme"), ("x-tenant-id", "acme")], CLIENT, id="twice_the_same"),
            pytest.param([("x-tenant-id", "acme"), ("x-tenant-id", "globex")], CLIENT, id="disagree"),
            pytest.param([("x-tenant-id", "acme, globex")], CLIENT, id="disagree_in_one"),
            pytest.param([("x-tenant-id", "acme"), ("x-tenant-id", "")], CLIENT, id="one_is_empty"),
            pytest.param([("x-tenant-id", "ac\xffme")], CLIENT, id="not_utf_8"),
            pytest.param([("x-tenant-id", "ac\xc3\xa9me")], CLIENT, id="utf_8"),
            pytest.param([("x-tenant-id", "hooli")], CLIENT, id="held"),
            pytest.param([("x-any", "\xff\x80"), ("x-tenant-id", "acme")], CLIENT, id="another_header_not_utf_8"),
            pytest.param([("x-tenant-id", "acme")], BLOCKED_CLIENT, id="blocked"),
            pytest.param([("x-envoy-external-address", CLIENT)], BLOCKED_CLIENT, id="forged_address"),
            pytest.param([("x-envoy-external-address", CLIENT)] * 2, BLOCKED_CLIENT, id="forged_address_twice"),
        ],
    )
    def test_decisions_are_the_same(
        self, *, headers: Headers, source: str, raw: Envoy, envoy: Envoy, server: AuthzServer, upstreams: Upstreams
    ) -> None:
        as_map, as_list = (ask(each.address, headers=headers, source=source) for each in (envoy, raw))
        assert as_list.status == as_map.status
        for arrival in upstreams.arrivals():
            assert arrival.header("x-tenant-instance") == ("queue-1" if arrival.header("x-tenant-id") else None)
        one, other = server.checked()
        assert one.decision == other.decision

    @pytest.mark.parametrize("encode_raw_headers", [False, True], ids=["map", "list"])
    def test_an_address_that_comes_twice_is_invalid(
        self, encode_raw_headers: bool, running_upstreams: Upstreams, server: AuthzServer
    ) -> None:
        """An edge overwrites the header; an Envoy that is none, such as a sidecar, passes on what clients send."""
        options = gateway_options(
            server.address, running_upstreams, failure_mode_allow=True, encode_raw_headers=encode_raw_headers
        )
        config = gateway_config(options)
        (chain,) = config["static_resources"]["listeners"][0]["filter_chains"]
        chain["filters"][0]["typed_config"]["use_remote_address"] = False
        name = "x-envoy-external-address"
        with Envoy(config) as sidecar:
            once = ask(sidecar.address, headers=[(name, "9.9.9.9")], source=CLIENT)
            twice = ask(sidecar.address, headers=[(name, "9.9.9.9"), (name.upper(), "9.9.9.9")], source=CLIENT)
            never = ask(sidecar.address, source=CLIENT)
        assert (once.status, twice.status, never.status) == (200, 403, 403)
        assert [checked.decision.reason for checked in server.checked()] == [
            Reason.ALLOWED,
            Reason.INVALID_CLIENT_ADDRESS,
            Reason.NO_CLIENT_ADDRESS,
        ]


def test_what_a_tracer_copies_from_the_client_is_no_way_past_a_mesh_that_fails_open(
    running_server: AuthzServer, upstreams: Upstreams
) -> None:
    """OpenTelemetry's `tracestate` goes into Envoy's call to us; were it too long there, there would be no decision."""
    running_server.snapshot = tenants()
    options = gateway_options(
        running_server.address, upstreams, failure_mode_allow=True, trace_collector=("127.0.0.1", 9)
    )
    traced = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    with Envoy(gateway_config(options)) as envoy:
        for size in (100, 9_000, 20_000, 55_000):
            headers = [traced, ("tracestate", "a=" + "b" * size)]
            assert ask(envoy.address, "/x", headers=headers, source=BLOCKED_CLIENT).status == 403
            assert ask(envoy.address, "/x", headers=headers, source=CLIENT).status == 200
        assert envoy.stats("http.gateway.ext_authz").get("http.gateway.ext_authz.error", 0) == 0
