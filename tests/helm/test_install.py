"""The real Helm installs, upgrades and uninstalls: what comes and goes, and in which order."""

from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml
from support.api_server import ApiServer
from support.chart import CHART
from support.helm import CI, NAMESPACE, REDIS, RELEASE

pytestmark = pytest.mark.integration

SECONDS = 30
WITH_POLICY: dict[str, Any] = {**REDIS, "istio": {"customPolicy": {"enabled": True}}}
POLICY = ("AuthorizationPolicy", RELEASE)


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def helm(api: ApiServer) -> Iterator[helm_python.Config]:
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": api.url}}],
        "users": [{"name": "test", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
        "current-context": "test",
    }
    with helm_python.Config(
        kubeconfig_content=yaml.safe_dump(kubeconfig), namespace=NAMESPACE, storage_driver="memory"
    ) as config:
        yield config


def changes(api: ApiServer) -> list[tuple[str, str, str]]:
    """What was changed since the last look."""
    seen = list(api.log)
    api.log.clear()
    return seen


def test_the_policy_s_store_is_made_before_anything_else(api: ApiServer, helm: helm_python.Config) -> None:
    helm.install(CHART, RELEASE, dict(REDIS), timeout=SECONDS)
    seen = changes(api)
    assert seen[:2] == [("created", "Job", "authz-server-init"), ("deleted", "Job", "authz-server-init")]
    kinds = [kind for _, kind, _ in seen]
    assert kinds.index("NetworkPolicy") < kinds.index("Deployment")
    assert api.objects("Job") == [], "the hook is gone once it has succeeded"


def test_gateways_ask_last(api: ApiServer, helm: helm_python.Config) -> None:
    helm.install(CHART, RELEASE, WITH_POLICY, timeout=SECONDS)
    order = [(kind, name) for what, kind, name in changes(api) if what == "created"]
    assert order.index(("Service", RELEASE)) < order.index(("Deployment", RELEASE)) < order.index(POLICY)


def test_the_policy_comes_and_goes_by_an_upgrade(api: ApiServer, helm: helm_python.Config) -> None:
    helm.install(CHART, RELEASE, dict(REDIS), timeout=SECONDS)
    changes(api)
    helm.upgrade(CHART, RELEASE, WITH_POLICY, timeout=SECONDS)
    assert changes(api) == [("created", *POLICY)]
    helm.upgrade(CHART, RELEASE, dict(REDIS), timeout=SECONDS)
    assert changes(api) == [("deleted", *POLICY)]


def test_uninstalling_takes_the_policy_first(api: ApiServer, helm: helm_python.Config) -> None:
    """A policy whose provider is gone denies every request, and Helm by itself deletes Services first."""
    helm.install(CHART, RELEASE, WITH_POLICY, timeout=SECONDS)
    (policy,) = [thing for thing in api.objects(POLICY[0]) if thing["metadata"]["name"] == RELEASE]
    assert policy["spec"]["rules"] == [{}]
    changes(api)
    helm.uninstall(RELEASE, timeout=SECONDS)
    seen = changes(api)
    assert seen[:5] == [
        ("deleted", *POLICY),
        ("created", *POLICY),  # the one that matches nothing
        ("created", "Job", "authz-server-policy-gone"),  # waits until every gateway has taken note
        ("deleted", "Job", "authz-server-policy-gone"),
        ("deleted", *POLICY),
    ]
    assert seen[5] == ("deleted", "Service", RELEASE)


@pytest.mark.parametrize("name", ["evaluation", "monitoring", "persistence", "policy"])
def test_nothing_is_left(name: str, api: ApiServer, helm: helm_python.Config) -> None:
    helm.install(CHART, RELEASE, yaml.safe_load(CI[name].read_text(encoding="utf-8")), timeout=SECONDS)
    assert api.objects()
    helm.uninstall(RELEASE, timeout=SECONDS)
    assert api.objects() == []
