"""The manifests of istio/ as the control plane gets them: built by kustomize, and what istiod's values files say."""

import functools
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from support.manifests import ISTIO, kustomize

ROOT_NAMESPACE = "istio-system"


@dataclass(frozen=True, slots=True)
class Resource:
    """One Kubernetes resource."""

    kind: str
    namespace: str
    name: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Composition:
    """The gateway, the base and some overlays, together."""

    resources: tuple[Resource, ...]
    mesh: Mapping[str, Any]
    """MeshConfig."""
    istiod: Mapping[str, str]
    """The environment of istiod: its feature flags."""

    def of_kind(self, kind: str) -> list[Resource]:
        """The resources of one kind, in order."""
        return [resource for resource in self.resources if resource.kind == kind]

    def one(self, kind: str, name: str) -> Resource:
        """A resource by name. Raises ValueError unless there is exactly one."""
        (found,) = (resource for resource in self.of_kind(kind) if resource.name == name)
        return found


@functools.cache
def compose(*overlays: str) -> Composition:
    """Build gateway, base and overlays, named by their folders, with kustomize, and put their values files together."""
    with tempfile.TemporaryDirectory(prefix="authz-kustomize-") as name:
        folder = Path(name)
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(ISTIO / part, folder) for part in ("gateway", "base")],
            "components": [
                os.path.relpath(ISTIO / "overlays" / overlay, folder)
                for overlay in overlays
                if (ISTIO / "overlays" / overlay / "kustomization.yaml").exists()
            ],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        built = kustomize(folder)
    values: dict[str, Any] = {}
    for part in (ISTIO / "base", *(ISTIO / "overlays" / overlay for overlay in overlays)):
        file = part / "istiod-values.yaml"
        if file.exists():
            values = _merged(values, yaml.safe_load(file.read_text()))
    return Composition(tuple(map(_resource, built)), values.get("meshConfig", {}), values.get("env", {}))


@functools.cache
def compose_example() -> Composition:
    """Build istio/example, with its own values file."""
    folder = ISTIO / "example"
    values = yaml.safe_load((folder / "istiod-values.yaml").read_text())
    return Composition(tuple(map(_resource, kustomize(folder))), values.get("meshConfig", {}), values.get("env", {}))


def _resource(manifest: Mapping[str, Any]) -> Resource:
    metadata = manifest["metadata"]
    return Resource(
        kind=manifest["kind"],
        namespace=metadata.get("namespace", ""),
        name=metadata["name"],
        labels=metadata.get("labels", {}),
        spec=manifest.get("spec", {}),
    )


def _merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Values files put together as Helm does it, null taking a value away.

    Other than there, lists of named things are joined by name: the manifests tell the operator to do that by hand.
    """
    merged = dict(values)
    for key, value in more.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            merged[key] = _merged(merged.get(key, {}), value)
        elif isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
            merged[key] = list({part["name"]: part for part in (*merged.get(key, []), *value)}.values())
        else:
            merged[key] = value
    return merged


def selecting(resources: Iterable[Resource], namespace: str, labels: Mapping[str, str]) -> list[Resource]:
    """The policies, telemetry and EnvoyFilters among the resources that apply to one workload.

    `pilot/pkg/model/policyattachment.go`, ShouldAttachPolicy, for selectors: of the namespace or the root namespace,
    with all labels of the selector.
    """
    found = []
    for resource in resources:
        selector = resource.spec.get("selector", resource.spec.get("workloadSelector", {}))
        wanted = selector.get("matchLabels", selector.get("labels", {}))
        if resource.namespace in (namespace, ROOT_NAMESPACE) and wanted.items() <= labels.items():
            found.append(resource)
    return found


def only(value: Mapping[str, Any] | None, *names: str) -> None:
    """Refuse a field that a translation would leave out silently."""
    if unknown := (value or {}).keys() - set(names):
        raise NotImplementedError(f"not translated: {', '.join(sorted(unknown))}")
