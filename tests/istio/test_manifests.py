"""Manifests: valid alone and built by kustomize, unknown fields refused; broken copies are refused."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from istio.mesh_config import IstiodValues, ProxyConfig
from kubernetes_validate import ValidationError as KubernetesError
from pydantic import ValidationError
from support.helm import render
from support.istio.manifests import compose as compose_with_values
from support.manifests import (
    ISTIO,
    Manifest,
    all_overlays,
    compose,
    files,
    is_object,
    kustomize,
    read,
    validate,
    with_surprises,
)
from typer.testing import CliRunner

from authz_server.cli.authzctl import app

# kubectl is started for every build, and validating each broken copy takes a while.
pytestmark = pytest.mark.integration

REFUSED = (ValidationError, KubernetesError)

VALUES = [path for path in files() if path.name == "istiod-values.yaml"]

KUSTOMIZED = [path for path in all_overlays() if (path / "kustomization.yaml").exists()]

# Where a mapping's keys are the user's own, so that no schema can refuse one.
FREE = (
    "labels",
    "annotations",
    "matchLabels",
    "selector",
    "headers",
    "queryParams",
    "tagOverrides",
    "requests",
    "limits",
)


# Of istio/proxy, source/extensions/filters/http/istio_stats/istio_stats.cc, all_tags_: for both ends of a request ...
_ENDS = (
    "workload",
    "workload_namespace",
    "principal",
    "app",
    "version",
    "canonical_service",
    "canonical_revision",
    "cluster",
)
# ... and the rest.
_OTHERS = ("reporter", "request_protocol", "response_flags", "connection_security_policy", "response_code")
ISTIO_LABELS = {*(f"{end}_{label}" for end in ("source", "destination") for label in _ENDS), *_OTHERS}


def _name(path: Path) -> str:
    return str(path.relative_to(ISTIO))


def _identity(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


@pytest.fixture(scope="module")
def platform() -> list[Manifest]:
    return kustomize(ISTIO / "example")


@pytest.fixture(scope="module")
def plain() -> list[Manifest]:
    """Gateway and base without overlays."""
    return kustomize(ISTIO / "gateway") + kustomize(ISTIO / "base")


@pytest.mark.parametrize("folder", [ISTIO / "gateway", ISTIO / "base", ISTIO / "example"], ids=_name)
def test_a_kustomization_builds_valid_objects(folder: Path) -> None:
    built = kustomize(folder)
    assert built
    for manifest in built:
        validate(manifest)


@pytest.mark.parametrize("overlay", KUSTOMIZED, ids=lambda path: path.name)
def test_an_overlay_on_gateway_and_base_builds_valid_objects(
    overlay: Path, plain: list[Manifest], tmp_path: Path
) -> None:
    built = compose(tmp_path, overlay)
    changed = [manifest for manifest in built if manifest not in plain]
    for manifest in changed:
        validate(manifest)
    assert changed, "the overlay changes nothing"


@pytest.mark.parametrize("overlay", KUSTOMIZED, ids=lambda path: path.name)
def test_an_overlay_that_patches_nothing_can_be_applied_alone(overlay: Path) -> None:
    """As the README does it; one that patches says what it misses, and does not do a half of it."""
    kustomization = read(overlay / "kustomization.yaml")[0]
    if "patches" in kustomization:
        with pytest.raises(subprocess.CalledProcessError) as refusal:
            kustomize(overlay)
        assert "no matches for Id" in refusal.value.stderr
    else:
        assert kustomize(overlay)


def test_every_object_is_in_a_build_and_every_file_says_what_it_does() -> None:
    for folder in [ISTIO / "gateway", ISTIO / "base", ISTIO / "example", *KUSTOMIZED]:
        kustomization = read(folder / "kustomization.yaml")[0]
        listed = {
            *(entry for entry in kustomization.get("resources", []) if entry.endswith(".yaml")),
            *(entry["path"] for entry in kustomization.get("patches", [])),
        }
        there = {path.name for path in folder.glob("*.yaml")} - {
            "kustomization.yaml",
            "istiod-values.yaml",
            "chart-values.yaml",
        }
        assert there == listed, folder
    for path in files():
        text = path.read_text()
        assert text.startswith("#") or path.name == "namespace.yaml", path
        if any(is_object(manifest) for manifest in read(path)) and path.parent.parent.name == "overlays":
            assert "# What:" in text, path
            assert "# Without it:" in text, path


@pytest.mark.parametrize("path", VALUES, ids=_name)
def test_the_mesh_configuration_is_what_istiod_takes(path: Path) -> None:
    IstiodValues.model_validate(read(path)[0])


def test_the_example_asks_of_istiod_what_its_parts_ask() -> None:
    components = read(ISTIO / "example" / "kustomization.yaml")[0]["components"]
    parts = compose_with_values(*(Path(component).name for component in components))
    example = read(ISTIO / "example" / "istiod-values.yaml")[0]
    assert example["meshConfig"] == parts.mesh
    assert example.get("env", {}) == parts.istiod


def test_the_chart_makes_the_rest_of_the_example(platform: list[Manifest]) -> None:
    """Labels, names and ports that the manifests speak of are the chart's; each object comes from one place."""
    chart = render(read(ISTIO / "example" / "chart-values.yaml")[0])
    assert not [found for _, found in chart.objects if ".istio.io/" in found["apiVersion"]]
    assert not chart.kinds() & {(manifest["kind"], manifest["metadata"]["name"]) for manifest in platform}
    (provider, _) = read(ISTIO / "example" / "istiod-values.yaml")[0]["meshConfig"]["extensionProviders"]
    service = chart.one("service.yaml")
    ports = {port["port"]: port for port in service["spec"]["ports"]}
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    grpc = provider["envoyExtAuthzGrpc"]
    assert grpc["service"] == f"{name}.{namespace}.svc.cluster.local"
    assert ports[grpc["port"]]["appProtocol"] == "grpc"
    labels = chart.one("workload.yaml")["spec"]["template"]["metadata"]["labels"].items()
    accounts = {found["metadata"]["name"] for _, found in chart.objects if found["kind"] == "ServiceAccount"}
    for manifest in platform:
        if manifest["metadata"].get("namespace") == namespace and "selector" in manifest["spec"]:
            assert manifest["spec"]["selector"]["matchLabels"].items() <= labels
        if _identity(manifest) == "AuthorizationPolicy/authz-server-grpc":
            (rule,) = manifest["spec"]["rules"]
            assert rule["to"] == [{"operation": {"ports": [str(grpc["port"])]}}]
            gateway, test = rule["from"][0]["source"]["principals"]
            assert gateway == "cluster.local/ns/istio-ingress/sa/istio-ingress"
            assert test.removeprefix(f"cluster.local/ns/{namespace}/sa/") in accounts


def test_client_address_overlays_cannot_be_combined_into_both() -> None:
    """Helm merges mappings, the later file wins: whichever order, one of the two is switched off."""
    one, other = (
        read(ISTIO / "overlays" / name / "istiod-values.yaml")[0]["meshConfig"]["defaultConfig"]["gatewayTopology"]
        for name in ("client-address-network-lb", "client-address-l7-lb")
    )
    for merged in (one | other, other | one):
        ProxyConfig.model_validate({"gatewayTopology": merged})
    with pytest.raises(ValidationError, match="X-Forwarded-For"):
        ProxyConfig.model_validate({"gatewayTopology": {"numTrustedProxies": 1, "proxyProtocol": {}}})


@pytest.mark.parametrize(
    "names",
    [
        ("route-by-header", "route-by-hash"),
        ("route-by-hash", "route-by-session"),
        ("route-by-header", "sticky-parameter"),
        ("client-address-network-lb", "client-address-l7-lb"),
        ("client-address-network-lb", "client-address-network-lb-envoyfilter"),
        ("client-address-network-lb-envoyfilter", "client-address-l7-lb"),
    ],
    ids="+".join,
)
def test_what_excludes_each_other_does_not_build(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        compose(tmp_path, *(ISTIO / "overlays" / name for name in names))
    assert "already registered id" in refusal.value.stderr


def test_grace_exceeds_drain(platform: list[Manifest]) -> None:
    """terminationGracePeriodSeconds is the only end that pilot-agent's waiting has."""
    (gateway,) = (manifest for manifest in platform if _identity(manifest) == "Deployment/istio-ingress")
    template = gateway["spec"]["template"]
    config = ProxyConfig.model_validate(yaml.safe_load(template["metadata"]["annotations"]["proxy.istio.io/config"]))
    (proxy,) = template["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in proxy["env"]}
    grace = template["spec"]["terminationGracePeriodSeconds"]
    assert environment["EXIT_ON_ZERO_ACTIVE_CONNECTIONS"] == "true"
    assert config.drainDuration == config.terminationDrainDuration == "600s"
    assert grace == 660
    assert _seconds(environment["MINIMUM_DRAIN_DURATION"]) < _seconds(config.drainDuration) < grace


def test_the_labels_taken_off_metrics_exist(platform: list[Manifest]) -> None:
    """Istio takes a label that does not exist off without a word."""
    (telemetry,) = (manifest for manifest in platform if _identity(manifest) == "Telemetry/mesh-default")
    overrides = [each for metrics in telemetry["spec"]["metrics"] for each in metrics["overrides"]]
    removed = {label for each in overrides for label in each.get("tagOverrides", {})}
    assert removed
    assert removed <= ISTIO_LABELS


def test_no_request_is_left_without_a_route(platform: list[Manifest]) -> None:
    for manifest in platform:
        if manifest["kind"] == "VirtualService":
            assert "match" not in manifest["spec"]["http"][-1], "the last route must take everything"


@pytest.mark.parametrize("name", ["Gateway", "VirtualService", "Deployment", "Service", "PodDisruptionBudget"])
def test_broken_copies_of_the_example_are_refused(platform: list[Manifest], name: str) -> None:
    _refuse_surprises([manifest for manifest in platform if manifest["kind"] == name])


@pytest.mark.parametrize("overlay", KUSTOMIZED, ids=lambda path: path.name)
def test_broken_copies_of_an_overlay_are_refused(overlay: Path) -> None:
    listed = read(overlay / "kustomization.yaml")[0].get("resources", [])
    _refuse_surprises([manifest for name in listed for manifest in read(overlay / name)])


@pytest.mark.parametrize("path", VALUES, ids=_name)
def test_broken_copies_of_the_mesh_configuration_are_refused(path: Path) -> None:
    for where, broken in with_surprises(read(path)[0]):
        if where.rsplit("/", 1)[-1] in ("labels", "env"):
            continue
        with pytest.raises(ValidationError):
            IstiodValues.model_validate(broken)


@pytest.mark.parametrize(
    "provider",
    [
        pytest.param({"failOpen": "true"}, id="a-word-for-a-boolean"),
        pytest.param({"port": 90000}, id="no-such-port"),
        pytest.param({"timeout": "0.5 s"}, id="a-duration-that-Go-does-not-read"),
        pytest.param({"statusOnError": "299"}, id="a-status-that-Envoy-does-not-know"),
        pytest.param({"service": "authz-server"}, id="a-short-name-of-a-service"),
        pytest.param({"timeout": None}, id="no-timeout"),
    ],
)
def test_a_wrong_provider_is_refused(provider: Manifest) -> None:
    values = read(ISTIO / "base" / "istiod-values.yaml")[0]
    IstiodValues.model_validate(values)
    values["meshConfig"]["extensionProviders"][0]["envoyExtAuthzGrpc"] |= provider
    with pytest.raises(ValidationError):
        IstiodValues.model_validate(values)


def test_the_readme_speaks_of_every_overlay_and_of_what_there_is() -> None:
    readme = (ISTIO / "README.md").read_text()
    names = {overlay.name for overlay in all_overlays()}
    assert {name for name in names if f"`{name}`" not in readme} == {"client-address-network-lb-envoyfilter"}
    assert "`client-address-network-lb` (or `...-envoyfilter`)" in readme
    for path in re.findall(r"istio/(?:overlays/[a-z0-9-]+|example/[a-z-]+\.yaml|base|gateway)", readme):
        assert (ISTIO.parent / path).exists(), path
    commands = set(re.findall(r"authzctl ([a-z]+ [a-z]+)", readme))
    assert commands
    for command in commands:
        assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0, command


def _refuse_surprises(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        validate(manifest)
        for where, broken in with_surprises(manifest["spec"]):
            if where.rsplit("/", 1)[-1] in FREE or "/patch/value" in where:
                continue
            assert _is_refused({**manifest, "spec": broken}), f"{_identity(manifest)}: unknown field in spec/{where}"


def _is_refused(manifest: Manifest) -> bool:
    try:
        validate(manifest)
    except REFUSED:
        return True
    return False


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))
