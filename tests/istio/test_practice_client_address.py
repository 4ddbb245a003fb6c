"""Client address: PROXY protocol behind a network load balancer, trusted proxies behind an HTTP one, neither."""

import socket

import pytest
from support.gateway import AuthzServer, Headers, ask, policy
from support.istio.manifests import compose
from support.istio.platform import SITE, Launcher, Pods, authz_service
from support.proxy_protocol import V2_PROXY, V2_TCP4, V2_TCP6, v1, v2, v2_addresses

from authz_server.demo.envoy import Envoy
from authz_server.policy.reasons import Reason

pytestmark = pytest.mark.integration

CLIENT = "203.0.113.7"
CLIENT_6 = "2001:db8::7"
BALANCER = "127.0.0.3"
FORGED: Headers = (
    ("X-Envoy-External-Address", "198.51.100.9"),
    ("X-Forwarded-For", "198.51.100.9"),
    ("X-Real-IP", "198.51.100.9"),
    ("Forwarded", "for=198.51.100.9"),
)

PREAMBLES = [
    pytest.param(v1("TCP4", CLIENT, "192.0.2.1"), CLIENT, id="v1"),
    pytest.param(v1("TCP6", CLIENT_6, "2001:db8::1"), CLIENT_6, id="v1_ipv6"),
    pytest.param(v2(V2_PROXY, V2_TCP4, v2_addresses(socket.AF_INET, CLIENT, "192.0.2.1")), CLIENT, id="v2"),
    pytest.param(v2(V2_PROXY, V2_TCP6, v2_addresses(socket.AF_INET6, CLIENT_6, "2001:db8::1")), CLIENT_6, id="v2_ipv6"),
]


def gateway_of(overlay: str, launcher: Launcher, authz: AuthzServer, pods: Pods) -> Envoy:
    return launcher.gateway(
        compose(overlay, "routing-header-safety", "route-by-header"), authz_service(authz), pods.queue()
    )


@pytest.fixture(scope="module", params=["client-address-network-lb", "client-address-network-lb-envoyfilter"])
def behind_network_lb(
    request: pytest.FixtureRequest, launcher: Launcher, authz: AuthzServer, running_pods: Pods
) -> Envoy:
    """Both ways to demand PROXY protocol: MeshConfig, and the EnvoyFilter."""
    return gateway_of(request.param, launcher, authz, running_pods)


@pytest.fixture(scope="module")
def behind_http_lb(launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Envoy:
    return gateway_of("client-address-l7-lb", launcher, authz, running_pods)


@pytest.fixture(scope="module")
def direct(launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Envoy:
    return gateway_of("client-address-direct", launcher, authz, running_pods)


def check_that_it_decides(
    envoy: Envoy, authz: AuthzServer, address: str, *, preamble: bytes = b"", headers: Headers = FORGED
) -> None:
    """The decision is about this address: blocked when it alone is, admitted when it alone is."""
    for snapshot, status, reason in (
        (policy(blocked=[address]), 403, Reason.BLOCKED),
        (policy(restricted=True, allowed=[address]), 200, Reason.ALLOWLISTED),
    ):
        authz.snapshot = snapshot
        authz.clear()
        answer = ask(envoy.address, host=SITE, source=BALANCER, preamble=preamble, headers=headers)
        (checked,) = authz.checked()
        assert (answer.status, checked.decision.reason) == (status, reason)
        assert str(checked.decision.client_address) == address


@pytest.mark.parametrize(("preamble", "address"), PREAMBLES)
def test_the_address_of_the_proxy_header_reaches_the_decision(
    behind_network_lb: Envoy, authz: AuthzServer, pods: Pods, preamble: bytes, address: str
) -> None:
    check_that_it_decides(behind_network_lb, authz, address, preamble=preamble)


def test_a_connection_without_proxy_header_is_refused(behind_network_lb: Envoy, authz: AuthzServer, pods: Pods) -> None:
    authz.snapshot = policy()
    authz.clear()
    with pytest.raises(ConnectionError):
        ask(behind_network_lb.address, host=SITE, source=BALANCER, headers=FORGED)
    assert authz.checked() == []
    assert pods.upstreams.arrivals() == []


def test_the_entry_that_the_trusted_proxy_appended_is_the_client(behind_http_lb: Envoy, authz: AuthzServer) -> None:
    headers = (*FORGED, ("X-Forwarded-For", CLIENT))  # the client's own entry, then what the balancer appends
    check_that_it_decides(behind_http_lb, authz, CLIENT, headers=headers)


def test_whoever_gets_around_the_trusted_proxy_chooses_an_address(behind_http_lb: Envoy, authz: AuthzServer) -> None:
    """Why that overlay closes the gateway to all but the balancer's networks."""
    check_that_it_decides(behind_http_lb, authz, "198.51.100.9", headers=(("X-Forwarded-For", "198.51.100.9"),))


def test_without_a_balancer_in_between_the_peer_is_the_client(direct: Envoy, authz: AuthzServer) -> None:
    check_that_it_decides(direct, authz, BALANCER)
