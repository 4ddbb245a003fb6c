"""Explicit tenant routing: ?sticky=NAME reaches the named instance, anything else any; a pin wins; a strict move."""

import pytest
from support.gateway import TENANT_HEADER_SOURCE, Answer, AuthzServer, ask, policy
from support.istio.manifests import compose, compose_example
from support.istio.platform import QUEUES, SITE, Changing, Launcher, Pods, authz_service
from support.istio.proxies import Gateway
from support.proxy_protocol import v1

from authz_server.demo.envoy import Envoy
from authz_server.policy.snapshot import DecisionOptions, Snapshot

pytestmark = pytest.mark.integration

READS_HEADER = DecisionOptions(tenant_sources=TENANT_HEADER_SOURCE)


def pinned(instance: str, *, held: bool = False) -> Snapshot:
    """The policy that has tenant acme at this instance."""
    holds = ["acme"] if held else []
    return policy(pins={"acme": instance}, held=holds, instances=QUEUES, options=READS_HEADER)


@pytest.fixture(scope="module")
def sticky(launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Changing:
    authz.snapshot = policy()
    return launcher.changing(Gateway, compose("sticky-parameter"), authz_service(authz), running_pods.queue())


@pytest.fixture(scope="module")
def example(launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Envoy:
    """The whole of istio/example: behind PROXY protocol, `sticky` after affinity, and all the rest."""
    services = [running_pods.alike(f"{name}.platform.svc.cluster.local") for name in ("search", "reports", "web")]
    return launcher.gateway(compose_example(), authz_service(authz), running_pods.queue(), *services)


def ask_example(envoy: Envoy, path: str, tenant: str) -> Answer:
    preamble = v1("TCP4", "198.51.100.9", "192.0.2.1")
    return ask(envoy.address, path, host=SITE, headers=(("x-tenant-id", tenant),), preamble=preamble)


@pytest.mark.parametrize("name", QUEUES)
def test_the_named_instance_answers(sticky: Changing, pods: Pods, name: str) -> None:
    paths = (f"/?sticky={name}", f"/a/b?x=1&sticky={name}&y=2")
    assert {ask(sticky.envoy.address, path, host=SITE).instance for path in paths for _ in range(4)} == {name}


@pytest.mark.parametrize(
    "query", ["", "?sticky=", "?sticky=queue-9", "?sticky=QUEUE-1", "?Sticky=queue-1", "?x=queue-1"]
)
def test_no_name_or_an_unknown_one_falls_back_to_any_instance(sticky: Changing, pods: Pods, query: str) -> None:
    answers = [ask(sticky.envoy.address, f"/{query}", host=SITE) for _ in range(40)]
    assert {answer.status for answer in answers} == {200}
    assert {answer.instance for answer in answers} == set(QUEUES)


def test_an_instance_that_is_away_is_not_replaced_by_another(sticky: Changing, pods: Pods) -> None:
    """Its subset has one host; 503, and nobody else gets its requests."""
    sticky.now(pods.queue("queue-1", "queue-3"))
    try:
        assert ask(sticky.envoy.address, "/?sticky=queue-2", host=SITE).status == 503
        assert ask(sticky.envoy.address, "/?sticky=queue-1", host=SITE).instance == "queue-1"
        assert ask(sticky.envoy.address, "/", host=SITE).status == 200
    finally:
        sticky.now(pods.queue())
    assert ask(sticky.envoy.address, "/?sticky=queue-2", host=SITE).instance == "queue-2"


def test_a_pin_wins_over_sticky_which_counts_for_whoever_has_none(
    example: Envoy, authz: AuthzServer, pods: Pods
) -> None:
    authz.snapshot = pinned("queue-1")
    assert {ask_example(example, "/?sticky=queue-2", "acme").instance for _ in range(4)} == {"queue-1"}
    assert {ask_example(example, "/?sticky=queue-2", "nobody").instance for _ in range(4)} == {"queue-2"}
    assert {ask_example(example, "/", "nobody").instance for _ in range(40)} == set(QUEUES)


def test_a_strict_move_holds_the_tenant_and_no_request_reaches_the_old_instance_after_the_new(
    example: Envoy, authz: AuthzServer, pods: Pods
) -> None:
    authz.snapshot = pinned("queue-1")
    assert ask_example(example, "/?sticky=queue-3", "acme").instance == "queue-1"
    authz.snapshot = pinned("queue-1", held=True)
    held = ask_example(example, "/?sticky=queue-1", "acme")
    assert (held.status, held.headers["retry-after"]) == (503, "1")
    authz.snapshot = pinned("queue-3")
    assert {ask_example(example, "/?sticky=queue-1", "acme").instance for _ in range(4)} == {"queue-3"}
    assert [arrival.instance for arrival in pods.upstreams.arrivals()] == ["queue-1", *["queue-3"] * 4]
