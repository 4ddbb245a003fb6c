"""Traffic to the provider: a pod that hangs or is gone is left out, the near zone first, no limit in the way."""

import copy
import dataclasses
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.gateway import AuthzServer, ask, policy
from support.istio.clusters import Pod, Service
from support.istio.manifests import Composition, compose
from support.istio.platform import AUTHZ, SITE, Launcher, Pods
from support.istio.proxies import Gateway

from authz_server.demo.envoy import Envoy

pytestmark = pytest.mark.integration

TIMEOUT = "0.3s"
"""The provider's here; in the manifest 0.5 s."""
HERE = ("region-1", "zone-a", "")
THERE = ("region-1", "zone-b", "")


def shortened() -> Composition:
    """Fail-closed and provider-traffic, with the provider's timeout shortened."""
    whole = compose("fail-closed", "provider-traffic", "routing-header-safety", "route-by-header")
    mesh = copy.deepcopy(dict(whole.mesh))
    for provider in mesh["extensionProviders"]:
        provider["envoyExtAuthzGrpc"]["timeout"] = TIMEOUT
    return dataclasses.replace(whole, mesh=mesh)


@pytest.fixture(scope="module")
def other() -> Iterator[AuthzServer]:
    """A second pod of the server."""
    with AuthzServer(policy()) as server:
        yield server


@pytest.fixture(scope="module")
def silent() -> Iterator[Pod]:
    """A pod that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield Pod("silent", holder.getsockname())


def statuses(envoy: Envoy, number: int) -> list[int]:
    return [ask(envoy.address, host=SITE).status for _ in range(number)]


def test_a_pod_that_hangs_costs_a_few_requests_and_is_left_out(
    launcher: Launcher, authz: AuthzServer, silent: Pod, pods: Pods
) -> None:
    authz.snapshot = policy()
    provider = Service(AUTHZ, 9000, [silent, Pod("well", authz.address)], grpc=True)
    envoy = launcher.gateway(shortened(), provider, pods.queue())
    found = statuses(envoy, 60)
    assert found.count(503) == 5  # that many in a row eject it
    assert set(statuses(envoy, 30)) == {200}


def test_the_near_zone_is_asked_and_the_far_one_when_it_is_gone(
    launcher: Launcher, authz: AuthzServer, other: AuthzServer, pods: Pods
) -> None:
    near, far = Pod("near", authz.address, locality=HERE), Pod("far", other.address, locality=THERE)
    for server in (authz, other):
        server.snapshot = policy()
        server.clear()
    changing = launcher.changing(
        Gateway, shortened(), Service(AUTHZ, 9000, [near, far], grpc=True), pods.queue(), locality=HERE
    )
    assert set(statuses(changing.envoy, 10)) == {200}
    assert (len(authz.checked()), len(other.checked())) == (10, 0)
    changing.now(Service(AUTHZ, 9000, [far], grpc=True))
    assert set(statuses(changing.envoy, 10)) == {200}
    assert (len(authz.checked()), len(other.checked())) == (10, 10)


def test_a_burst_of_checks_meets_no_limit(launcher: Launcher, authz: AuthzServer, pods: Pods) -> None:
    """An overflow counts as a failed check: with fail-open it would be a way around the policy."""
    authz.snapshot = policy()
    composition = compose("fail-closed", "provider-traffic", "routing-header-safety", "route-by-header")
    provider = Service(AUTHZ, 9000, [Pod("well", authz.address)], grpc=True)
    envoy = launcher.gateway(composition, provider, pods.queue())
    with ThreadPoolExecutor(16) as clients:
        found = [status for part in clients.map(lambda _: statuses(envoy, 5), range(16)) for status in part]
    assert set(found) == {200}
    name = f"cluster.outbound|9000||{AUTHZ};.circuit_breakers.default.remaining_rq"
    assert envoy.stats(name)[name] > 16 * 1024
