"""Three ways to route: by header and a second choice of route, by hash of the header, by session; what each does."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.gateway import TENANT_HEADER_SOURCE, AuthzServer, ask, policy
from support.istio.manifests import compose
from support.istio.platform import QUEUES, SITE, Launcher, Pods, authz_service
from support.istio.proxies import Gateway

from authz_server.demo.envoy import Envoy
from authz_server.policy.snapshot import DecisionOptions, Snapshot

pytestmark = pytest.mark.integration

TENANTS = [f"tenant-{number}" for number in range(30)]

READS_HEADER = DecisionOptions(tenant_sources=TENANT_HEADER_SOURCE)


def pinned(pins: dict[str, str]) -> Snapshot:
    return policy(pins=pins, instances=set(pins.values()), options=READS_HEADER)


def where(envoy: Envoy, tenant: str, *more: tuple[str, str]) -> str | None:
    """The pod that answers a tenant's request; None when none does."""
    return ask(envoy.address, host=SITE, headers=(("x-tenant-id", tenant), *more)).instance


class Way:
    """A gateway of one way to route, whose pods can leave."""

    def __init__(self, name: str, launcher: Launcher, authz: AuthzServer, pods: Pods) -> None:
        self._pods = pods
        self._composition = compose(name, "routing-header-safety")
        services = (authz_service(authz), pods.queue(composition=self._composition))
        self._changing = launcher.changing(Gateway, self._composition, *services)
        self.envoy = self._changing.envoy

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Only these pods are there for a while."""
        self._changing.now(self._pods.queue(*names, composition=self._composition))
        try:
            yield
        finally:
            self._changing.now(self._pods.queue(composition=self._composition))


@pytest.fixture(scope="module")
def by_header(launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Way:
    return Way("route-by-header", launcher, authz, running_pods)


@pytest.fixture(scope="module")
def by_hash(launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Way:
    return Way("route-by-hash", launcher, authz, running_pods)


@pytest.fixture(scope="module")
def by_session(launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Way:
    return Way("route-by-session", launcher, authz, running_pods)


def test_by_header_a_tenant_reaches_its_instance_and_follows_a_move(
    by_header: Way, authz: AuthzServer, pods: Pods
) -> None:
    for instance in QUEUES:
        authz.snapshot = pinned({"acme": instance})
        assert {where(by_header.envoy, "acme", ("x-tenant-instance", "queue-3")) for _ in range(3)} == {instance}


def test_by_header_an_unknown_instance_is_nobody_elses(by_header: Way, authz: AuthzServer, pods: Pods) -> None:
    authz.snapshot = pinned({"acme": "queue-9"})
    answer = ask(by_header.envoy.address, host=SITE, headers=(("x-tenant-id", "acme"),))
    assert (answer.status, answer.body) == (503, b"no route to the tenant's instance\n")
    assert pods.upstreams.arrivals() == []


def test_by_header_without_a_pin_any_instance_answers(by_header: Way, authz: AuthzServer, pods: Pods) -> None:
    authz.snapshot = pinned({})
    assert {where(by_header.envoy, "nobody") for _ in range(40)} == set(QUEUES)


def test_by_header_a_tenant_whose_instance_is_gone_reaches_no_other(
    by_header: Way, authz: AuthzServer, pods: Pods
) -> None:
    authz.snapshot = pinned({"acme": "queue-2", "other": "queue-1"})
    with by_header.only("queue-1", "queue-3"):
        assert ask(by_header.envoy.address, host=SITE, headers=(("x-tenant-id", "acme"),)).status == 503
        assert where(by_header.envoy, "other") == "queue-1"
    assert where(by_header.envoy, "acme") == "queue-2"


def test_by_header_without_its_envoy_filter_the_first_choice_of_route_stays(
    launcher: Launcher, authz: AuthzServer, pods: Pods
) -> None:
    """What the EnvoyFilter is for: MeshConfig's clearRouteCache is not passed on."""
    whole = compose("route-by-header", "routing-header-safety")
    kept = tuple(resource for resource in whole.resources if resource.name != "clear-route-cache")
    assert len(kept) == len(whole.resources) - 1
    envoy = launcher.gateway(dataclasses.replace(whole, resources=kept), authz_service(authz), pods.queue())
    authz.snapshot = pinned({"acme": "queue-1"})
    assert len({where(envoy, "acme") for _ in range(40)}) > 1


def test_by_hash_requests_of_a_tenant_stay_together(by_hash: Way, authz: AuthzServer, pods: Pods) -> None:
    authz.snapshot = pinned({tenant: f"group-{number}" for number, tenant in enumerate(TENANTS)})
    found = {tenant: where(by_hash.envoy, tenant) for tenant in TENANTS}
    assert found == {tenant: where(by_hash.envoy, tenant, ("x-tenant-instance", "group-1")) for tenant in TENANTS}
    assert set(found.values()) == set(QUEUES)


def test_by_hash_tenants_of_one_instance_name_stay_together(by_hash: Way, authz: AuthzServer, pods: Pods) -> None:
    authz.snapshot = pinned(dict.fromkeys(TENANTS[:5], "group-1"))
    assert len({where(by_hash.envoy, tenant) for tenant in TENANTS[:5]}) == 1


def test_by_hash_when_a_pod_leaves_only_its_share_moves(by_hash: Way, authz: AuthzServer, pods: Pods) -> None:
    authz.snapshot = pinned({tenant: f"group-{number}" for number, tenant in enumerate(TENANTS)})
    before = {tenant: where(by_hash.envoy, tenant) for tenant in TENANTS}
    with by_hash.only("queue-1", "queue-3"):
        after = {tenant: where(by_hash.envoy, tenant) for tenant in TENANTS}
    moved = {tenant for tenant in TENANTS if before[tenant] != after[tenant]}
    share = {tenant for tenant in TENANTS if before[tenant] == "queue-2"}
    assert share <= moved
    assert len(moved - share) <= len(TENANTS) // 15  # test_practice_hashing.py measures it
    assert {tenant: where(by_hash.envoy, tenant) for tenant in TENANTS} == before


def test_by_session_a_tenant_reaches_the_pod_of_its_pin(by_session: Way, authz: AuthzServer, pods: Pods) -> None:
    for instance in QUEUES:
        authz.snapshot = pinned({"acme": pods.ip_and_port(instance)})
        assert {where(by_session.envoy, "acme") for _ in range(3)} == {instance}


def test_by_session_a_tenant_whose_pod_is_gone_reaches_another(by_session: Way, authz: AuthzServer, pods: Pods) -> None:
    authz.snapshot = pinned({"acme": pods.ip_and_port("queue-2")})
    with by_session.only("queue-1", "queue-3"):
        assert where(by_session.envoy, "acme") in {"queue-1", "queue-3"}
    assert where(by_session.envoy, "acme") == "queue-2"


def test_by_session_a_clients_own_session_chooses_nothing(by_session: Way, authz: AuthzServer, pods: Pods) -> None:
    """The answer to a balanced request names its pod in that header: what a client gets back, it can send."""
    authz.snapshot = pinned({})
    session = ask(by_session.envoy.address, host=SITE).headers.get("x-tenant-session")
    assert session
    found = Counter(where(by_session.envoy, "nobody", ("x-tenant-session", session)) for _ in range(40))
    assert len(found) > 1
