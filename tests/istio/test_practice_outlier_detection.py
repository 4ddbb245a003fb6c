"""Outlier detection: a crash-looping pod is ejected after five errors, comes back, never more than half are away."""

import copy
import dataclasses
import socket
import time
from collections.abc import Mapping
from types import MappingProxyType

import pytest
from support.gateway import ask
from support.istio.clusters import Pod
from support.istio.manifests import Composition, compose
from support.istio.platform import ALIKE, QUEUE, Launcher, Pods
from support.waiting import wait_until

from authz_server.demo.envoy import Envoy

pytestmark = pytest.mark.integration

WEB = "web.platform.svc.cluster.local"

ERRORS = 5
SECONDS = 0.6
"""How long the first ejection takes here; in the manifest 30 s."""


def shortened(host: str = WEB, settings: Mapping[str, int | str] = MappingProxyType({})) -> Composition:
    """The manifest with its two times shortened and all else as it is, unless said otherwise."""
    whole = compose("outlier-detection")
    rule = whole.one("DestinationRule", "web")
    spec = copy.deepcopy(dict(rule.spec))
    outlier = spec["trafficPolicy"]["outlierDetection"]
    assert (outlier["consecutive5xxErrors"], outlier["maxEjectionPercent"]) == (ERRORS, 50)
    assert (outlier["interval"], outlier["baseEjectionTime"]) == ("10s", "30s")
    outlier |= {"interval": "100ms", "baseEjectionTime": f"{SECONDS}s", **settings}
    spec["host"] = host
    others = [resource for resource in whole.resources if resource is not rule]
    return dataclasses.replace(whole, resources=(*others, dataclasses.replace(rule, spec=spec)))


@pytest.fixture
def sidecar(launcher: Launcher, pods: Pods) -> Envoy:
    """The sidecar of a workload that calls the service; a test's own, because Envoy remembers ejections."""
    return launcher.sidecar(shortened(), pods.alike(WEB))


def answer(envoy: Envoy, host: str = WEB) -> tuple[int, str | None]:
    """Status and pod of one request."""
    found = ask(envoy.address, host=host)
    return found.status, found.instance


def ejected(envoy: Envoy, host: str = WEB) -> int:
    """How many pods are away now."""
    name = f"cluster.outbound|80||{host};.outlier_detection.ejections_active"
    return envoy.stats(name)[name]


def fail_until_ejected(envoy: Envoy) -> int:
    """Ask until a pod is ejected, and say how many errors that took."""
    errors = 0
    for _ in range(500):
        errors += answer(envoy)[0] == 500
        if ejected(envoy):
            return errors
    raise AssertionError(f"no pod was ejected after {errors} errors")


def test_a_crash_looping_pod_is_ejected_after_five_errors_and_comes_back(sidecar: Envoy, pods: Pods) -> None:
    pods.failing.add("pod-1")
    assert fail_until_ejected(sidecar) == ERRORS
    since = time.monotonic()
    found = {answer(sidecar) for _ in range(40)}
    assert time.monotonic() - since < SECONDS, "too slow a machine: the ejection may have ended meanwhile"
    assert found == {(200, pod) for pod in ALIKE if pod != "pod-1"}
    pods.failing.clear()
    wait_until(lambda: answer(sidecar) == (200, "pod-1"))
    assert time.monotonic() - since > SECONDS * 0.8


def test_fewer_errors_in_a_row_eject_nobody(sidecar: Envoy, pods: Pods) -> None:
    for _ in range(3):
        pods.failing.add("pod-1")
        errors = 0
        while errors < ERRORS - 1:
            errors += answer(sidecar)[0] == 500
        pods.failing.clear()
        wait_until(lambda: answer(sidecar) == (200, "pod-1"))
    assert ejected(sidecar) == 0


@pytest.mark.parametrize("number", [2, 3, 4])
def test_never_more_than_half_of_the_pods_are_away(launcher: Launcher, pods: Pods, number: int) -> None:
    envoy = launcher.sidecar(shortened(), pods.alike(WEB, *ALIKE[:number]))
    pods.failing.update(ALIKE)
    most = 0
    for _ in range(80):
        assert answer(envoy)[0] == 500  # from a pod: never 503, nobody left
        most = max(most, ejected(envoy))
    assert most == number // 2


def test_a_pod_that_is_gone_and_still_listed_is_ejected_and_costs_no_request(launcher: Launcher, pods: Pods) -> None:
    """Istio retries what could not be connected (twice, elsewhere); that counts as an error of the pod too."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # and nobody listens
        listed = pods.alike(WEB)
        gone = dataclasses.replace(listed, pods=[*listed.pods, Pod("gone", holder.getsockname())])
        envoy = launcher.sidecar(shortened(), gone)
        for _ in range(500):
            assert answer(envoy)[0] == 200
            if ejected(envoy):
                return
    raise AssertionError("never ejected")


@pytest.mark.parametrize(
    ("settings", "then", "away"),
    [
        pytest.param({}, 500, 0, id="the_manifests_half_never_ejects_it"),
        pytest.param({"maxEjectionPercent": 100, "minHealthPercent": 0}, 503, 1, id="all_and_no_panic_answers_503"),
        pytest.param({"maxEjectionPercent": 100}, 500, 1, id="all_with_the_manifests_panic_goes_on_asking_it"),
    ],
)
def test_one_host_subsets(launcher: Launcher, pods: Pods, settings: dict[str, int | str], then: int, away: int) -> None:
    """As README.md, "Outlier detection and one-host subsets", says; `settings` differ from the manifest's."""
    envoy = launcher.sidecar(shortened(QUEUE, {"baseEjectionTime": "30s", **settings}), pods.queue("queue-1"))
    pods.failing.add("queue-1")
    assert [answer(envoy, QUEUE)[0] for _ in range(ERRORS)] == [500] * ERRORS
    # The worker that met the errors leaves the ejection to another thread: a request in between may reach the pod.
    wait_until(lambda: ejected(envoy, QUEUE) == away)
    assert [answer(envoy, QUEUE)[0] for _ in range(7)] == [then] * 7
    assert ejected(envoy, QUEUE) == away
