"""Routing headers are safe: a forged one chooses nothing, with the server dead, on exempted paths, underscores."""

import dataclasses
import socket
from collections.abc import Iterator

import pytest
from support.gateway import TENANT_HEADER_SOURCE, AuthzServer, Headers, ask, policy
from support.istio.clusters import Pod, Service
from support.istio.manifests import compose
from support.istio.platform import AUTHZ, QUEUES, SITE, Launcher, Pods, authz_service

from authz_server.demo.envoy import Envoy
from authz_server.policy.snapshot import DecisionOptions

pytestmark = pytest.mark.integration

COMPOSITION = ("fail-open", "exempt-paths", "routing-header-safety", "route-by-header")

FORGERIES: dict[str, Headers] = {
    "plain": (("x-tenant-instance", "queue-3"),),
    "upper_case": (("X-TENANT-INSTANCE", "queue-3"),),
    "twice": (("x-tenant-instance", "queue-3"), ("X-Tenant-Instance", "queue-3")),
    "hop_by_hop": (("x-tenant-instance", "queue-3"), ("Connection", "close, x-tenant-instance")),
    "empty_first": (("x-tenant-instance", ""), ("x-tenant-instance", "queue-3")),
    "unknown": (("x-tenant-instance", "queue-9"),),
}

UNDERSCORES = ["x_tenant_instance", "x-tenant_instance", "X_Tenant_Id", "anything_else"]


@pytest.fixture(scope="module")
def dead_server() -> Iterator[Service]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # and nobody listens
        yield Service(AUTHZ, 9000, [Pod("dead", holder.getsockname())], grpc=True)


@pytest.fixture(scope="module")
def working(launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Envoy:
    return launcher.gateway(compose(*COMPOSITION), authz_service(authz), running_pods.queue())


@pytest.fixture(scope="module")
def failing_open(launcher: Launcher, dead_server: Service, running_pods: Pods) -> Envoy:
    return launcher.gateway(compose(*COMPOSITION), dead_server, running_pods.queue())


@pytest.fixture(params=FORGERIES.values(), ids=FORGERIES)
def forged(request: pytest.FixtureRequest) -> Headers:
    headers: Headers = request.param
    return headers


def check_that_it_chooses_nothing(envoy: Envoy, pods: Pods, path: str, headers: Headers) -> None:
    """All instances take turns, and none sees the header."""
    for _ in range(16):
        assert ask(envoy.address, path, host=SITE, headers=headers).status == 200
    arrivals = pods.upstreams.arrivals()
    assert len({arrival.instance for arrival in arrivals}) > 1
    assert [arrival.header("x-tenant-instance") for arrival in arrivals] == [None] * 16


def test_forged_with_a_pin_the_pin_wins(working: Envoy, authz: AuthzServer, pods: Pods, forged: Headers) -> None:
    options = DecisionOptions(tenant_sources=TENANT_HEADER_SOURCE)
    authz.snapshot = policy(pins={"acme": "queue-1"}, instances=QUEUES, options=options)
    assert ask(working.address, host=SITE, headers=(("x-tenant-id", "acme"), *forged)).status == 200
    (arrival,) = pods.upstreams.arrivals()
    assert (arrival.instance, arrival.header("x-tenant-instance")) == ("queue-1", "queue-1")


def test_forged_without_a_pin(working: Envoy, authz: AuthzServer, pods: Pods, forged: Headers) -> None:
    authz.snapshot = policy()
    check_that_it_chooses_nothing(working, pods, "/", forged)


def test_forged_on_an_exempted_path(working: Envoy, authz: AuthzServer, pods: Pods, forged: Headers) -> None:
    check_that_it_chooses_nothing(working, pods, "/healthz", forged)


def test_forged_while_the_server_is_dead_and_failures_let_through(
    failing_open: Envoy, pods: Pods, forged: Headers
) -> None:
    check_that_it_chooses_nothing(failing_open, pods, "/", forged)


@pytest.mark.parametrize("path", ["/", "/healthz"])
@pytest.mark.parametrize("name", UNDERSCORES)
def test_a_name_with_an_underscore_is_refused(
    working: Envoy, failing_open: Envoy, pods: Pods, name: str, path: str
) -> None:
    for envoy in (working, failing_open):
        assert ask(envoy.address, path, host=SITE, headers=((name, "queue-3"),)).status == 400
    assert pods.upstreams.arrivals() == []


def test_without_the_overlay_a_forged_header_does_choose(launcher: Launcher, dead_server: Service, pods: Pods) -> None:
    """What the EnvoyFilter is for; and so these tests can fail."""
    whole = compose(*COMPOSITION)
    kept = tuple(resource for resource in whole.resources if resource.name != "routing-header-safety")
    assert len(kept) == len(whole.resources) - 1
    envoy = launcher.gateway(dataclasses.replace(whole, resources=kept), dead_server, pods.queue())
    for path in ("/", "/healthz"):
        answers = [ask(envoy.address, path, host=SITE, headers=FORGERIES["plain"]) for _ in range(16)]
        assert {answer.instance for answer in answers} == {"queue-3"}
    assert ask(envoy.address, host=SITE, headers=(("x_tenant_instance", "queue-3"),)).status == 200
