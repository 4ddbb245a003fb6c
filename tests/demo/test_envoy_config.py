"""The gateway's configuration: its shape, that Envoy accepts it, and what it does without a server to ask."""

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from authz_server.demo.envoy import Envoy
from authz_server.demo.envoy_config import (
    Address,
    GatewayOptions,
    Message,
    TlsFiles,
    appending_proxy_config,
    gateway_config,
)
from authz_server.demo.processes import ChildFailedError, free_port
from authz_server.demo.upstreams import Upstreams

INSTANCES = ("queue-1", "queue-2", "queue-3")
ADDRESSES = {name: ("127.0.0.1", 8001 + index) for index, name in enumerate(INSTANCES)}
PLAIN = GatewayOptions(authz=("127.0.0.1", 9000), instances=ADDRESSES)


@pytest.fixture
def upstreams() -> Iterator[Upstreams]:
    with Upstreams(INSTANCES) as running:
        yield running


@pytest.fixture
def nobody() -> Address:
    """An address where no server listens."""
    return "127.0.0.1", free_port()


def client(envoy: Envoy, source: str | None = None) -> httpx.Client:
    transport = httpx.HTTPTransport(local_address=source, trust_env=False)
    return httpx.Client(base_url=envoy.url, transport=transport)


def raw_request(address: Address, before: bytes) -> bytes:
    """The first bytes of the answer to a request that follows `before` on a new connection."""
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(before + b"GET /x HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
        answer = connection.recv(1000)
        if not answer:
            raise ConnectionResetError("closed without an answer")
        return answer


def manager(config: Message) -> Message:
    filters = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
    result: Message = filters[0]["typed_config"]
    return result


def test_ext_authz_runs_exactly_where_the_rbac_filter_has_marked_a_match() -> None:
    rbac, ext_authz, router = manager(gateway_config(PLAIN))["http_filters"]
    assert [f["name"] for f in (rbac, ext_authz, router)] == [
        "envoy.filters.http.rbac",
        "envoy.filters.http.ext_authz",
        "envoy.filters.http.router",
    ]
    assert "rules" not in rbac["typed_config"], "an enforcing rule would answer 403 by itself"
    (policy_id,) = rbac["typed_config"]["shadow_rules"]["policies"]
    enabled = ext_authz["typed_config"]["filter_enabled_metadata"]
    assert policy_id.startswith(enabled["value"]["string_match"]["prefix"])
    prefix = rbac["typed_config"]["shadow_rules_stat_prefix"]
    assert enabled["path"] == [{"key": prefix + "shadow_effective_policy_id"}]


def test_the_last_route_is_the_default_and_each_instance_has_one_before_it() -> None:
    (host,) = manager(gateway_config(PLAIN))["route_config"]["virtual_hosts"]
    *chosen, unknown, default = host["routes"]
    assert [route["match"]["headers"][0]["string_match"]["exact"] for route in chosen] == list(INSTANCES)
    assert unknown["match"]["headers"] == [{"name": "x-tenant-instance", "present_match": True}]
    assert unknown["direct_response"]["status"] == 503, "another instance would be the wrong one"
    assert "headers" not in default["match"]
    assert default["route"]["cluster"] == "any"


def test_an_instance_called_like_one_of_our_clusters_does_not_replace_it() -> None:
    options = GatewayOptions(authz=("127.0.0.1", 9000), instances={"authz": ("127.0.0.1", 1), "any": ("127.0.0.1", 2)})
    names = [cluster["name"] for cluster in gateway_config(options)["static_resources"]["clusters"]]
    assert len(set(names)) == len(names) == 4


def test_half_a_client_certificate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"both files: certificate /c\.pem, key None"):
        TlsFiles(Path("/ca.pem"), "authz.test", certificate=Path("/c.pem"))


@pytest.mark.integration
@pytest.mark.usefixtures("no_child_left")
class TestRealEnvoy:
    @pytest.mark.parametrize("case", ["plain", "everything", "ipv6", "plain_tls", "mutual_tls", "appending_proxy"])
    def test_accepts_the_configuration(self, case: str, tmp_path: Path) -> None:
        authority = trustme.CA()
        leaf = authority.issue_cert("authz.test")
        ca, certificate, key = (tmp_path / name for name in ("ca.pem", "certificate.pem", "key.pem"))
        authority.cert_pem.write_to_path(str(ca))
        leaf.cert_chain_pems[0].write_to_path(str(certificate))
        leaf.private_key_pem.write_to_path(str(key))
        authz = ("127.0.0.1", 9000)
        config = {
            "plain": gateway_config(PLAIN),
            "everything": gateway_config(
                GatewayOptions(
                    authz=authz,
                    instances=ADDRESSES,
                    failure_mode_allow=True,
                    timeout_seconds=0.0125,
                    trusted_hops=2,
                    proxy_protocol=True,
                    exempt_paths=("/healthz", "/readyz"),
                    routing_header="x-other-instance",
                    strip_routing_header=False,
                    max_request_headers_kb=8192,
                    max_request_headers_count=2000,
                    encode_raw_headers=True,
                )
            ),
            "ipv6": gateway_config(GatewayOptions(authz=("::1", 9000), instances=ADDRESSES, listen_host="::1")),
            "plain_tls": gateway_config(
                GatewayOptions(authz=authz, instances=ADDRESSES, authz_tls=TlsFiles(ca, "authz.test"))
            ),
            "mutual_tls": gateway_config(
                GatewayOptions(authz=authz, instances=ADDRESSES, authz_tls=TlsFiles(ca, "authz.test", certificate, key))
            ),
            "appending_proxy": appending_proxy_config(("127.0.0.1", 8000)),
        }[case]
        with Envoy(config) as envoy:
            assert envoy.address[0] == ("::1" if case == "ipv6" else "127.0.0.1")
            assert envoy.port > 0
            assert envoy.stats("server.live") == {"server.live": 1}

    def test_fails_open_to_any_instance_with_the_forged_routing_header_gone(
        self, upstreams: Upstreams, nobody: Address
    ) -> None:
        options = GatewayOptions(authz=nobody, instances=upstreams.addresses, failure_mode_allow=True)
        with Envoy(gateway_config(options)) as envoy, client(envoy) as http:
            answers = [http.get("/x", headers={"x-tenant-instance": "queue-3"}) for _ in INSTANCES]
            assert [answer.status_code for answer in answers] == [200, 200, 200]
            assert {answer.headers["x-served-by"] for answer in answers} == set(INSTANCES), "round robin"
            assert {arrival.header("x-tenant-instance") for arrival in upstreams.arrivals()} == {None}
            assert {entry["upstream_cluster"] for entry in envoy.access_log(at_least=3)} == {"any"}
            assert envoy.stats("http.gateway.ext_authz.")["http.gateway.ext_authz.failure_mode_allowed"] == 3

    def test_without_stripping_a_forged_routing_header_chooses_the_instance(
        self, upstreams: Upstreams, nobody: Address
    ) -> None:
        """The fault that stripping mends; shows that the test above can fail, and that the header does route."""
        options = GatewayOptions(
            authz=nobody, instances=upstreams.addresses, failure_mode_allow=True, strip_routing_header=False
        )
        with Envoy(gateway_config(options)) as envoy, client(envoy) as http:
            answers = [http.get("/x", headers={"x-tenant-instance": "queue-3"}) for _ in INSTANCES]
        assert [answer.headers["x-served-by"] for answer in answers] == ["queue-3"] * 3

    def test_fails_closed_with_403_and_nothing_arrives(self, upstreams: Upstreams, nobody: Address) -> None:
        options = GatewayOptions(authz=nobody, instances=upstreams.addresses)
        with Envoy(gateway_config(options)) as envoy, client(envoy) as http:
            assert http.get("/x").status_code == 403
            (entry,) = envoy.access_log(at_least=1)
        assert entry["response_code"] == 403
        assert entry["response_code_details"] == "ext_authz_error"
        assert upstreams.arrivals() == []

    def test_an_exempt_path_is_not_checked_and_still_stripped(self, upstreams: Upstreams, nobody: Address) -> None:
        options = GatewayOptions(authz=nobody, instances=upstreams.addresses, exempt_paths=("/healthz",))
        with Envoy(gateway_config(options)) as envoy, client(envoy) as http:
            assert http.get("/healthz?a=1", headers={"x-tenant-instance": "queue-3"}).status_code == 200
            assert http.get("/healthz/x").status_code == 403
            entries = envoy.access_log(at_least=2)
        assert [entry["upstream_host"] is not None for entry in entries] == [True, False]
        (arrival,) = upstreams.arrivals()
        assert arrival.header("x-tenant-instance") is None

    def test_a_header_name_with_an_underscore_is_a_400(self, upstreams: Upstreams, nobody: Address) -> None:
        options = GatewayOptions(authz=nobody, instances=upstreams.addresses, failure_mode_allow=True)
        with Envoy(gateway_config(options)) as envoy, client(envoy) as http:
            assert http.get("/x", headers={"x_tenant_instance": "queue-3"}).status_code == 400
        assert upstreams.arrivals() == []

    def test_the_proxy_protocol_header_names_the_client_and_is_required(
        self, upstreams: Upstreams, nobody: Address
    ) -> None:
        options = GatewayOptions(
            authz=nobody, instances=upstreams.addresses, failure_mode_allow=True, proxy_protocol=True
        )
        version_1 = b"PROXY TCP4 203.0.113.7 127.0.0.1 4096 80\r\n"
        addresses = socket.inet_aton("203.0.113.8") + socket.inet_aton("127.0.0.1") + b"\x10\x00\x00\x50"
        version_2 = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + addresses
        with Envoy(gateway_config(options)) as envoy:
            assert raw_request(envoy.address, version_1).startswith(b"HTTP/1.1 200")
            assert raw_request(envoy.address, version_2).startswith(b"HTTP/1.1 200")
            with pytest.raises(ConnectionResetError):
                raw_request(envoy.address, b"")
        clients = [arrival.header("x-envoy-external-address") for arrival in upstreams.arrivals()]
        assert clients == ["203.0.113.7", "203.0.113.8"]

    @pytest.mark.parametrize(
        ("through_proxy", "expected"), [(True, "127.0.0.7"), (False, "9.9.9.9")], ids=["proxy", "bypassing_client"]
    )
    def test_with_one_trusted_hop_the_last_appended_address_is_the_client(
        self, upstreams: Upstreams, nobody: Address, through_proxy: bool, expected: str
    ) -> None:
        options = GatewayOptions(authz=nobody, instances=upstreams.addresses, failure_mode_allow=True, trusted_hops=1)
        forged = {"x-forwarded-for": "9.9.9.9", "x-envoy-external-address": "8.8.8.8"}
        with Envoy(gateway_config(options)) as gateway, Envoy(appending_proxy_config(gateway.address)) as proxy:
            with client(proxy if through_proxy else gateway, source="127.0.0.7") as http:
                assert http.get("/x", headers=forged).status_code == 200
            (entry,) = gateway.access_log(at_least=1)
        (arrival,) = upstreams.arrivals()
        assert arrival.header("x-envoy-external-address") == expected == entry["external_address"]
        assert entry["peer_address"] == ("127.0.0.1" if through_proxy else "127.0.0.7")

    def test_a_refused_configuration_is_an_error_with_envoys_own_words(self) -> None:
        config = gateway_config(PLAIN)
        config["static_resources"]["clusters"][0]["lb_policy"] = "NO_SUCH_POLICY"
        with pytest.raises(ChildFailedError, match=r"(?s)gateway ended with 1:.*NO_SUCH_POLICY"):
            Envoy(config, name="gateway").__enter__()

    def test_the_access_log_can_be_read_after_a_kill(self, upstreams: Upstreams, nobody: Address) -> None:
        with Envoy(gateway_config(GatewayOptions(authz=nobody, instances=upstreams.addresses))) as envoy:
            with client(envoy) as http:
                http.get("/first")
            envoy.access_log(at_least=1)
            envoy.kill()
            assert not envoy.running
            assert [entry["path"] for entry in envoy.access_log()] == ["/first"]
            with pytest.raises(TimeoutError, match="1 access log entries"):
                envoy.access_log(at_least=2, timeout=0.05)
