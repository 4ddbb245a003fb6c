"""Telemetry: the access log carries the decision, which no client can write; failures let through are counted."""

import pytest
from support.gateway import TENANT_HEADER_SOURCE, AuthzServer, Headers, ask, policy
from support.istio.clusters import Service
from support.istio.manifests import compose
from support.istio.platform import AUTHZ, QUEUES, SITE, Launcher, Pods, authz_service

from authz_server.demo.envoy import Envoy
from authz_server.policy.snapshot import DecisionOptions

pytestmark = pytest.mark.integration

CLIENT = "127.0.0.9"
OTHER = "127.0.0.10"

FORGED: Headers = (("x-tenant-id", "acme"), ("reason", "allowed"), ("decision", "allowed"))


@pytest.fixture(scope="module")
def gateway(launcher: Launcher, authz: AuthzServer, running_pods: Pods) -> Envoy:
    options = DecisionOptions(tenant_sources=TENANT_HEADER_SOURCE)
    authz.snapshot = policy(
        blocked=[f"{CLIENT}/32"], pins={"acme": "queue-2"}, instances=QUEUES, options=options, revision=7
    )
    composition = compose("exempt-paths", "routing-header-safety", "route-by-header", "telemetry-access-log")
    return launcher.gateway(composition, authz_service(authz), running_pods.queue())


def logged(envoy: Envoy, path: str, source: str) -> dict[str, object]:
    """What the access log says of one request."""
    before = len(envoy.access_log())
    ask(envoy.address, path, host=SITE, source=source, headers=FORGED)
    while True:
        entry = envoy.access_log(at_least=before + 1)[-1]
        if entry["path"] == path:
            return entry
        before += 1


def test_a_denial_is_logged_with_its_reason(gateway: Envoy, pods: Pods) -> None:
    entry = logged(gateway, "/denied", CLIENT)
    assert (entry["response_code"], entry["external_address"]) == (403, CLIENT)
    assert entry["upstream_host"] is None
    decision = entry["decision"]
    assert isinstance(decision, dict)
    assert (decision["reason"], decision["scope"], decision["entry"]) == ("blocked", "global", f"{CLIENT}/32")
    assert decision["revision"] == 7


def test_what_passes_is_logged_with_tenant_and_instance(gateway: Envoy, pods: Pods) -> None:
    entry = logged(gateway, "/passed", OTHER)
    decision = entry["decision"]
    assert isinstance(decision, dict)
    assert (entry["response_code"], decision["reason"]) == (200, "allowed")
    assert (decision["tenant"], decision["instance"]) == ("acme", "queue-2")
    assert entry["upstream_cluster"] == "outbound|80|queue-2|queue.platform.svc.cluster.local"


def test_an_exempted_path_is_logged_without_a_decision(gateway: Envoy, pods: Pods) -> None:
    entry = logged(gateway, "/healthz", CLIENT)
    assert (entry["response_code"], entry["decision"]) == (200, None)


@pytest.mark.parametrize(("choice", "counted"), [("fail-open", True), ("fail-closed", False)])
def test_requests_that_pass_without_a_decision_are_counted(
    launcher: Launcher, pods: Pods, choice: str, counted: bool
) -> None:
    """By the name that README.md gives to the metric, among the statistics that Istio has Envoy create."""
    composition = compose(choice, "routing-header-safety", "route-by-header", "telemetry-metrics")
    nobody = Service(AUTHZ, 9000, [], grpc=True)
    envoy = launcher.gateway(composition, nobody, pods.queue(), istio_stats=True)
    ask(envoy.address, host=SITE)
    _, exposed = envoy.admin("/stats/prometheus")
    label = '{http_conn_manager_prefix="outbound_0.0.0.0_443"}'
    assert f"envoy_http_ext_authz_error{label} 1" in exposed
    assert (f"envoy_http_ext_authz_failure_mode_allowed{label} 1" in exposed) == counted


def test_without_the_overlay_nothing_counts_them(launcher: Launcher, pods: Pods) -> None:
    composition = compose("fail-open", "routing-header-safety", "route-by-header")
    envoy = launcher.gateway(composition, Service(AUTHZ, 9000, [], grpc=True), pods.queue(), istio_stats=True)
    ask(envoy.address, host=SITE)
    assert "ext_authz_error" not in envoy.admin("/stats/prometheus")[1]
