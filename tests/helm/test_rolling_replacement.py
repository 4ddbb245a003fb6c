"""Three real servers behind one real Envoy under load are replaced as the chart's Deployment has it: no request fails.

All times are those of the rendered chart, shortened by one factor. What Kubernetes and the mesh do is done here: a new
pod gets traffic when it is ready; a pod that leaves gets SIGTERM at once, and traffic for as long as gateways may take
to notice (`drain.endpointPropagationSeconds`); after terminationGracePeriodSeconds it would be killed.
"""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.chart import CHART
from support.helm import render
from support.process import ServerProcess, init_policy

from authz_server.demo.envoy import Envoy
from authz_server.demo.envoy_config import AUTHZ_CLUSTER, Address
from authz_server.demo.valkey import Valkey
from loadtest.gateway import gateway_by_file, write_endpoints

pytestmark = pytest.mark.integration

SHORTENED = 1 / 10
LOAD_SECONDS = 60
"""The load ends by itself then, whatever becomes of the test."""
FEWEST_REQUESTS = 500


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds, as the chart has them."""

    propagation: float
    termination: float
    settings: dict[str, Any]

    @classmethod
    def of_the_chart(cls, transport: str = "auto") -> "Times":
        found = render({"settings": {"transport": transport}})
        values = yaml.safe_load((CHART / "values.yaml").read_text())
        return cls(
            values["drain"]["endpointPropagationSeconds"] * SHORTENED,
            found.pod()["terminationGracePeriodSeconds"] * SHORTENED,
            found.settings()
            | {name: found.settings()[name] * SHORTENED for name in ("drain_seconds", "grace_seconds")}
            | {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0", "snapshot_file": ""},
        )


class Deployment:
    """Servers, and the endpoints that Envoy knows."""

    def __init__(self, directory: Path, stack: ExitStack, redis_url: str, settings: dict[str, Any]) -> None:
        self._directory = directory
        self._stack = stack
        self._settings = directory / "settings.yaml"
        self._settings.write_text(yaml.safe_dump(settings))
        self._drain_seconds = settings["drain_seconds"]
        self._redis_url = redis_url
        self._count = 0
        self.endpoints = directory / "endpoints.json"
        self.pods: list[ServerProcess] = []

    def start_pod(self) -> None:
        """Start a server, and give it traffic once it is ready."""
        self._count += 1
        (folder := self._directory / f"pod-{self._count}").mkdir()
        environ = {
            "AUTHZ_REDIS_URL": self._redis_url,
            "AUTHZ_CONFIG": str(self._settings),
            "AUTHZ_DRAIN_SECONDS": str(self._drain_seconds),
        }
        pod = ServerProcess(folder, environ)
        self._stack.enter_context(pod)
        pod.wait_ready()
        self.pods.append(pod)
        self._publish()

    def remove_oldest(self, times: Times) -> int:
        """Take a server away as Kubernetes does, and return its exit code; TimeoutExpired: it had to be killed."""
        pod, started = self.pods[0], time.monotonic()
        pod.signal(signal.SIGTERM)
        time.sleep(times.propagation)  # the gateway does not know yet
        self.pods.remove(pod)
        self._publish()
        return pod.wait_exit(times.termination - (time.monotonic() - started))

    def _publish(self) -> None:
        write_endpoints(self.endpoints, [_address(pod.grpc) for pod in self.pods])


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host, int(port)


@dataclass
class Load:
    """What a load came to, once it is over."""

    requests: int = 0
    failed: int = 0


@contextmanager
def load_on(envoy: Envoy) -> Iterator[Load]:
    """Ask Envoy all the time, with some connections at once."""
    wrk = shutil.which("wrk")
    if wrk is None:
        pytest.skip("wrk is missing: apt-get install wrk")
    process = subprocess.Popen(
        [wrk, "-t1", "-c8", f"-d{LOAD_SECONDS}s", "--timeout", "5s", envoy.url], stdout=subprocess.PIPE, text=True
    )
    load = Load()
    try:
        yield load
        process.send_signal(signal.SIGINT)  # it reports and ends
        report, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    made = re.search(r"(\d+) requests in", report)
    assert made, report
    load.requests = int(made[1])
    load.failed = sum(int(number) for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", report))
    for line in re.findall(r"Socket errors: (.*)", report):
        load.failed += sum(int(number) for number in re.findall(r"\d+", line))


def members(envoy: Envoy) -> int:
    return envoy.stats(f"cluster.{AUTHZ_CLUSTER}.membership_total")[f"cluster.{AUTHZ_CLUSTER}.membership_total"]


def replace_all(times: Times, redis_url: str, directory: Path) -> tuple[Load, int, list[int]]:
    """Replace three servers one by one under load; return the load, Envoy's failed checks, and the exit codes."""
    init_policy(redis_url)
    with ExitStack() as stack:
        deployment = Deployment(directory, stack, redis_url, times.settings)
        for _ in range(3):
            deployment.start_pod()
        envoy = stack.enter_context(Envoy(gateway_by_file(deployment.endpoints)))
        exit_codes = []
        with load_on(envoy) as load:
            for _ in range(3):
                deployment.start_pod()
                deadline = time.monotonic() + 10
                while members(envoy) != len(deployment.pods):
                    assert time.monotonic() < deadline, "Envoy does not learn of the new pod"
                    time.sleep(0.02)
                exit_codes.append(deployment.remove_oldest(times))
        for pod in deployment.pods:
            assert pod.metric('authz_checks_total{outcome="ok",reason="allowed"}') > 0, "every new pod has served"
            assert pod.metric("authz_queue_seconds_count") > 0, "Envoy tells how long its checks may take"
        return load, envoy.stats("http.gateway.ext_authz.error")["http.gateway.ext_authz.error"], exit_codes


@pytest.mark.parametrize("transport", ["asyncio", "grpcio"])
def test_no_request_fails(transport: str, own_valkey: Valkey, tmp_path: Path) -> None:
    load, errors, exit_codes = replace_all(Times.of_the_chart(transport), own_valkey.url, tmp_path)
    assert load.requests > FEWEST_REQUESTS
    assert (load.failed, errors) == (0, 0), f"of {load.requests} requests"
    assert exit_codes == [0, 0, 0]


def test_without_the_chart_s_drain_requests_do_fail(own_valkey: Valkey, tmp_path: Path) -> None:
    """The test above can fail: servers that leave at SIGTERM are still asked."""
    times = Times.of_the_chart()
    at_once = Times(times.propagation, times.termination, times.settings | {"drain_seconds": 0, "grace_seconds": 0})
    load, errors, _ = replace_all(at_once, own_valkey.url, tmp_path)
    assert load.failed > 0
    assert errors > 0
