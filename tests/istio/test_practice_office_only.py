"""Office-only pages: by AuthorizationPolicy without the server, and through the server, which reads more spellings."""

import socket
from collections.abc import Iterator

import pytest
from support.gateway import AuthzServer, ask, policy
from support.istio.clusters import Pod, Service
from support.istio.manifests import compose
from support.istio.platform import AUTHZ, SITE, Launcher, Pods, authz_service
from support.proxy_protocol import v1

from authz_server.demo.envoy import Envoy

pytestmark = pytest.mark.integration

GATEWAY = ("client-address-network-lb", "exempt-paths", "fail-open", "routing-header-safety", "route-by-header")

BLOCKS = ("203.0.113.0/24", "2001:db8:1::/48")
"""The office's networks, as the manifest has them."""

INSIDE = [("TCP4", "203.0.113.200"), ("TCP6", "2001:db8:1::7")]
OUTSIDE = [("TCP4", "198.51.100.9"), ("TCP4", "203.0.112.255"), ("TCP6", "2001:db8:2::7")]

# Spellings of /docs that Envoy resolves before a policy looks, and such as only a backend might.
RESOLVED = ["/docs", "/docs/", "/docs/x?y=z", "//docs", "/x/../docs", "/%64ocs", "/x%2f..%2fdocs", "/docs?x=1"]
UNRESOLVED = ["/DOCS", "/docs;x=1"]

FORGED = (("X-Forwarded-For", "203.0.113.200"), ("X-Envoy-External-Address", "203.0.113.200"))


@pytest.fixture(scope="module")
def dead_server() -> Iterator[Service]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # and nobody listens
        yield Service(AUTHZ, 9000, [Pod("dead", holder.getsockname())], grpc=True)


@pytest.fixture(scope="module")
def without_server(launcher: Launcher, dead_server: Service, running_pods: Pods) -> Envoy:
    """The policy alone: the server is dead and failures let through."""
    return launcher.gateway(compose(*GATEWAY, "office-only-without-server"), dead_server, running_pods.queue())


@pytest.fixture(scope="module")
def through_server(launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Envoy:
    """The server alone: its resource is restricted to the same networks."""
    authz.snapshot = policy(offices=dict.fromkeys(("/docs", "/docs/*"), BLOCKS))
    return launcher.gateway(compose(*GATEWAY), authz_service(authz), running_pods.queue())


def status(envoy: Envoy, path: str, client: tuple[str, str]) -> int:
    family, address = client
    preamble = v1(family, address, "192.0.2.1" if family == "TCP4" else "2001:db8::1")
    return ask(envoy.address, path, host=SITE, preamble=preamble, headers=FORGED).status


def test_the_manifest_names_the_networks_that_these_tests_speak_of() -> None:
    (rule,) = compose("office-only-without-server").one("AuthorizationPolicy", "office-only").spec["rules"]
    assert rule["from"] == [{"source": {"notRemoteIpBlocks": list(BLOCKS)}}]


@pytest.mark.parametrize("path", RESOLVED)
def test_without_the_server_the_office_alone_gets_in(without_server: Envoy, path: str) -> None:
    assert {status(without_server, path, client) for client in INSIDE} == {200}
    assert {status(without_server, path, client) for client in OUTSIDE} == {403}


@pytest.mark.parametrize("path", UNRESOLVED)
def test_without_the_server_spellings_that_only_a_backend_reads_get_past(without_server: Envoy, path: str) -> None:
    """The manifest says so: exact paths are all that a policy of Istio's compares."""
    assert {status(without_server, path, client) for client in OUTSIDE} == {200}


@pytest.mark.parametrize("path", RESOLVED + UNRESOLVED)
def test_through_the_server_the_office_alone_gets_in(through_server: Envoy, path: str) -> None:
    assert {status(through_server, path, client) for client in INSIDE} == {200}
    assert {status(through_server, path, client) for client in OUTSIDE} == {403}


@pytest.mark.parametrize("path", ["/", "/documents", "/x/docs"])
def test_other_pages_are_everybodys(without_server: Envoy, through_server: Envoy, path: str) -> None:
    for envoy in (without_server, through_server):
        assert {status(envoy, path, client) for client in INSIDE + OUTSIDE} == {200}
