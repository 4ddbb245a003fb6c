"""Debian's Prometheus and promtool, for tests of queries and alerts."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
import yaml

from authz_server.demo.processes import Child, free_port

_SECONDS = 20.0


def needs(program: str) -> str:
    """The path of a program of the Debian package `prometheus`; CI installs it (.ci/run)."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is missing: apt-get install --no-install-recommends prometheus")
    return path


class Prometheus:
    """A Prometheus that scrapes each second, under the labels that a ServiceMonitor gives."""

    def __init__(self, directory: Path, targets: Iterable[str]) -> None:
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [
                {
                    "job_name": "authz-server",
                    "honor_labels": True,  # as kube-state-metrics is scraped
                    "static_configs": [
                        {"targets": [target], "labels": {"namespace": "authz-system", "pod": f"authz-server-{number}"}}
                        for number, target in enumerate(targets)
                    ],
                }
            ],
        }
        path = directory / "prometheus.yaml"
        path.write_text(yaml.safe_dump(config))
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self.child = Child(
            "prometheus",
            [
                needs("prometheus"),
                f"--config.file={path}",
                f"--storage.tsdb.path={directory / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            log_path=directory / "prometheus.log",
        )

    def __enter__(self) -> Self:
        self.child.start()
        try:
            self.child.wait_until(self._answers, what="Prometheus to be ready", timeout=_SECONDS)
        except BaseException:
            self.child.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.child.kill()

    def query(self, expression: str) -> list[float]:
        """The values that an expression has now; raises on one that is not PromQL."""
        answer = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=_SECONDS)
        found: list[dict[str, Any]] = answer.raise_for_status().json()["data"]["result"]
        return [float(sample["value"][1]) for sample in found]

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self._url}/-/ready", timeout=_SECONDS).status_code == 200
        except httpx.TransportError:
            return False
