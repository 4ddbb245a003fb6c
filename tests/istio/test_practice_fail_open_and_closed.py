"""Provider dead, slow, without a policy or without pods: fail-open, fail-closed; unresolvable denies either way."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from support.gateway import AuthzServer, ask, policy
from support.istio.clusters import Pod, Service
from support.istio.manifests import Composition, compose
from support.istio.messages import duration
from support.istio.platform import AUTHZ, SITE, Launcher, Pods, authz_service

from authz_server.demo.envoy import Envoy
from authz_server.policy.reasons import Reason

pytestmark = pytest.mark.integration

CLIENT = "127.0.0.9"
FORGED = (("x-tenant-instance", "queue-3"),)


def composition_of(choice: str) -> Composition:
    return compose(choice, "provider-traffic", "exempt-paths", "routing-header-safety", "route-by-header")


@contextmanager
def dead() -> Iterator[list[Pod]]:
    """A pod whose port nobody listens on: bound, so that nobody else gets it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield [Pod("dead", holder.getsockname())]


@contextmanager
def silent() -> Iterator[list[Pod]]:
    """A pod that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield [Pod("silent", holder.getsockname())]


@contextmanager
def without_policy() -> Iterator[list[Pod]]:
    """The real server before it has a snapshot: it cannot decide, and says so."""
    with AuthzServer(None) as server:
        yield [Pod("starting", server.address)]


@contextmanager
def no_pods() -> Iterator[list[Pod]]:
    """A Service that exists and has no ready pod."""
    yield []


TROUBLES = [dead, silent, without_policy, no_pods]


@pytest.fixture(scope="module", params=["fail-closed", "fail-open"])
def choice(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture(scope="module", params=TROUBLES, ids=lambda trouble: trouble.__name__)
def gateway(
    request: pytest.FixtureRequest, choice: str, launcher: Launcher, running_pods: Pods, stack: ExitStack
) -> Envoy:
    """A gateway whose authorization server cannot be asked."""
    provider = Service(AUTHZ, 9000, stack.enter_context(request.param()), grpc=True)
    return launcher.gateway(composition_of(choice), provider, running_pods.queue())


def test_a_request_goes_without_a_decision_or_not_at_all(gateway: Envoy, choice: str, pods: Pods) -> None:
    (provider,) = (entry["envoyExtAuthzGrpc"] for entry in composition_of(choice).mesh["extensionProviders"])
    assert duration(provider["timeout"]).total_seconds() <= 1.0
    before = time.monotonic()
    answer = ask(gateway.address, host=SITE, headers=FORGED)
    assert time.monotonic() - before < duration(provider["timeout"]).total_seconds() + 3.0
    arrived = [arrival.header("x-tenant-instance") for arrival in pods.upstreams.arrivals()]
    if choice == "fail-open":
        assert (answer.status, arrived) == (200, [None])
    else:
        assert (answer.status, arrived) == (503, [])


def test_an_exempted_path_does_not_wait_for_the_server(gateway: Envoy, choice: str, pods: Pods) -> None:
    seconds = []
    for _ in range(3):
        before = time.monotonic()
        assert ask(gateway.address, "/healthz", host=SITE, headers=FORGED).status == 200
        seconds.append(time.monotonic() - before)
    assert min(seconds) < 0.4  # a check that nobody answers takes the timeout, 0.5 s
    assert [arrival.header("x-tenant-instance") for arrival in pods.upstreams.arrivals()] == [None] * 3


@pytest.fixture(scope="module")
def working(choice: str, launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Envoy:
    return launcher.gateway(composition_of(choice), authz_service(authz), running_pods.queue())


def test_a_denial_is_a_denial_also_where_failures_let_through(working: Envoy, authz: AuthzServer, pods: Pods) -> None:
    authz.snapshot = policy(blocked=[CLIENT])
    authz.clear()
    assert ask(working.address, host=SITE, source=CLIENT).status == 403
    assert [checked.decision.reason for checked in authz.checked()] == [Reason.BLOCKED]
    assert pods.upstreams.arrivals() == []


@pytest.mark.parametrize("path", ["/healthz", "/robots.txt"])
def test_an_exempted_path_is_not_asked_about(working: Envoy, authz: AuthzServer, path: str) -> None:
    authz.snapshot = policy(blocked=[CLIENT])
    authz.clear()
    assert ask(working.address, path, host=SITE, source=CLIENT).status == 200
    assert authz.checked() == []


@pytest.mark.parametrize(
    "path", ["/healthz/x", "/healthzx", "/HEALTHZ", "/healthz/../admin", "/healthz/..%2fadmin", "//admin/..//x", "/x"]
)
def test_what_only_resembles_an_exempted_path_is_asked_about(working: Envoy, authz: AuthzServer, path: str) -> None:
    authz.snapshot = policy(blocked=[CLIENT])
    authz.clear()
    assert ask(working.address, path, host=SITE, source=CLIENT).status == 403
    assert len(authz.checked()) == 1


@pytest.fixture(scope="module")
def unresolvable(choice: str, launcher: Launcher, running_pods: Pods) -> Envoy:
    """The chart was removed before the policy: istiod knows no such Service.

    Without route-by-header: its EnvoyFilter has nothing to patch then, as it says of itself.
    """
    return launcher.gateway(compose(choice, "exempt-paths", "sticky-parameter"), running_pods.queue())


def test_a_provider_that_istiod_cannot_resolve_denies_either_way(unresolvable: Envoy, pods: Pods) -> None:
    assert ask(unresolvable.address, host=SITE).status == 403
    assert pods.upstreams.arrivals() == []
    assert ask(unresolvable.address, "/healthz", host=SITE).status == 200
