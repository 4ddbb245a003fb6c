"""The chart through the real Helm engine: values in, objects out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python
import yaml

from support.chart import CHART

RELEASE = "authz-server"
NAMESPACE = "authz-system"
REDIS: Mapping[str, Any] = {"redis": {"url": "redis://redis.data:6379/0"}}
"""The only value that has no default."""

CI = {path.stem.removesuffix("-values"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
"""Feature -> its file of values."""

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a release would consist of."""

    objects: list[tuple[str, Object]]
    """Each with the template that made it, such as `istio/callers.yaml`."""
    notes: str

    def of(self, template: str) -> list[Object]:
        """The objects of a template, in its order."""
        return [found for name, found in self.objects if name == template]

    def one(self, template: str) -> Object:
        """The only object of a template."""
        (found,) = self.of(template)
        return found

    def kinds(self) -> set[tuple[str, str]]:
        """Kind and name of every object."""
        return {(found["kind"], found["metadata"]["name"]) for _, found in self.objects}

    def env(self) -> dict[str, str]:
        """The variables of the server's container that have a value of their own."""
        return plain_env(self.container())

    def settings(self) -> dict[str, Any]:
        """The server's settings file."""
        loaded: dict[str, Any] = yaml.safe_load(self.one("configmap.yaml")["data"]["settings.yaml"])
        return loaded

    def pod(self) -> Object:
        """The specification of the server's pods."""
        found: Object = self.one("workload.yaml")["spec"]["template"]["spec"]
        return found

    def container(self) -> Object:
        """The server's container."""
        (found,) = self.pod()["containers"]
        return dict(found)


def plain_env(container: Object) -> dict[str, str]:
    """The variables of a container that have a value of their own."""
    return {variable["name"]: variable["value"] for variable in container.get("env", []) if "value" in variable}


def render(values: Mapping[str, Any] | None = None, *, chart: Path = CHART, **options: Any) -> Rendered:
    """Render the chart as an installation would; values come on top of REDIS.

    Raises:
        helm_python.HelmError: values that do not fit the schema or each other.
    """
    with helm_python.Chart.load(chart) as loaded:
        texts = loaded.render(
            {**REDIS, **(values or {})}, **({"name": RELEASE, "namespace": NAMESPACE, "revision": 1} | options)
        )
    objects, notes = [], ""
    for path, text in sorted(texts.items()):
        name = path.partition("/templates/")[2]
        if name == "NOTES.txt":
            notes = text
        else:
            objects += [(name, found) for found in yaml.safe_load_all(text) if found]
    return Rendered(objects, notes)


def render_file(path: Path) -> Rendered:
    """Render the chart with one file of values, and nothing on top."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return render({"redis": {}, **values})


def nested(path: str, value: Any) -> dict[str, Any]:
    """`a.b.c` -> {a: {b: {c: value}}}; values within redis come with its URL."""
    *above, last = path.split(".")
    values: dict[str, Any] = {last: value}
    for name in reversed(above):
        values = {name: values}
    if "redis" in values:
        values["redis"] = {**REDIS["redis"], **values["redis"]}
    return values
