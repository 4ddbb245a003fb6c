"""Every object of every feature, by the schemas of Kubernetes, Istio and the Prometheus operator, and by the rules that
hold for all: names, labels, namespaces, restricted pods, settings that the server takes.
"""

import copy
import functools
import importlib
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from support.chart import CHART
from support.helm import CI, NAMESPACE, RELEASE, Object, Rendered, render, render_file

KUBERNETES = ("1.29", "1.37")
"""The oldest version that Chart.yaml admits, and the newest that has schemas."""

MODELS = {
    "security.istio.io/v1": "cloudcoil.models.istio.security.v1",
    "networking.istio.io/v1": "cloudcoil.models.istio.networking.v1",
    "networking.istio.io/v1alpha3": "cloudcoil.models.istio.networking.v1alpha3",
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
}
"""API version of a custom resource -> the module of its models."""

FEATURES = [None, *CI.values()]
features = pytest.mark.parametrize("path", FEATURES, ids=lambda path: path.stem if path else "defaults")


@functools.cache
def rendered(path: Path | None) -> Rendered:
    return render_file(path) if path else render()


def pods(found: Rendered) -> list[tuple[str, Object]]:
    """Each pod's metadata and specification, with the name of what makes it."""
    templates = []
    for _, thing in found.objects:
        spec = thing.get("spec", {})
        match thing["kind"]:
            case "Pod":
                templates.append((thing["metadata"]["name"], thing))
            case "Deployment" | "StatefulSet" | "Job":
                templates.append((thing["metadata"]["name"], spec["template"]))
            case "CronJob":
                templates.append((thing["metadata"]["name"], spec["jobTemplate"]["spec"]["template"]))
    return templates


@pytest.mark.integration  # takes long: every schema is read anew for each object
@features
def test_schemas(path: Path | None) -> None:
    for template, thing in rendered(path).objects:
        try:
            check(thing)
        except ValueError as error:
            pytest.fail(f"{template}: {error}")


def check(thing: Object) -> None:
    """Raise ValueError when an object is not what its API takes, unknown fields included."""
    if module := MODELS.get(thing["apiVersion"]):
        getattr(importlib.import_module(module), thing["kind"]).model_validate(thing, extra="forbid")
        return
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise ValueError(f"Kubernetes {version}: {list(error.path)}: {error.message}") from None


@pytest.mark.integration  # as above
@pytest.mark.parametrize(
    "template",
    [
        "workload.yaml",
        "service.yaml",
        "networkpolicy.yaml",
        "istio/callers.yaml",
        "istio/destination-rule.yaml",
        "istio/envoy-filters.yaml",
        "istio/peer-authentication.yaml",
        "prometheusrule.yaml",
        "servicemonitor.yaml",
    ],
)
def test_a_field_that_there_is_not(template: str) -> None:
    """The checks above can fail."""
    thing = copy.deepcopy(render_file(CI["monitoring"]).of(template)[0])
    thing["spec"]["noSuchField"] = True
    with pytest.raises(ValueError, match="noSuchField"):
        check(thing)


def test_the_oldest_kubernetes_is_the_one_that_is_named() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


@features
def test_names_are_unique_and_labels_are_there(path: Path | None) -> None:
    found = [thing for template, thing in rendered(path).objects if template != "extraobjects.yaml"]
    names = [
        (thing["kind"], thing["metadata"]["namespace"], thing["metadata"]["name"], thing["metadata"].get("annotations"))
        for thing in found
    ]
    assert len({str(name) for name in names}) == len(names)
    for thing in found:
        labels = thing["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["helm.sh/chart"].startswith("authz-server-")
        assert len(thing["metadata"]["name"]) <= 63


@features
def test_namespaces(path: Path | None) -> None:
    values = yaml.safe_load(path.read_text()) if path else {}
    gateways = values.get("istio", {}).get("gateway", {}).get("namespace", "istio-ingress")
    for template, thing in rendered(path).objects:
        at_gateways = template in ("istio/envoy-filters.yaml", "istio/custom-policy.yaml") and thing["kind"] != "Job"
        assert thing["metadata"]["namespace"] == (gateways if at_gateways else NAMESPACE), template


@features
def test_the_server_takes_the_settings(path: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own loader, with the variables of the container; mounted files are there."""
    from authz_server.settings import load_settings

    found = rendered(path)
    root = tmp_path / "etc"
    text = found.one("configmap.yaml")["data"]["settings.yaml"]
    for line in text.splitlines():
        name, _, value = line.partition(": ")
        if name.startswith("tls_"):
            text = text.replace(line, "")  # certificates are looked at by the server; their paths are tested elsewhere
    text = text.replace("/var/lib/authz-server/", f"{root}/")
    root.mkdir()
    (root / "settings.yaml").write_text(text)
    (root / "password").write_text("sesame\n")
    for name, value in found.env().items():
        # Certificates are looked at by the server; that their files are mounted is tested elsewhere.
        if not name.startswith("AUTHZ_REDIS_TLS_"):
            monkeypatch.setenv(name, re.sub(r"^/etc/authz-server/[a-z]+/password$", f"{root}/password", value))
    monkeypatch.setenv("AUTHZ_REPLICA_NAME", "authz-server-5d8f9c7b6-x2x4z")
    monkeypatch.setenv("AUTHZ_CONFIG", str(root / "settings.yaml"))
    settings = load_settings()
    drain = yaml.safe_load(path.read_text()).get("drain", {}) if path else {}
    assert settings.drain_seconds == drain.get("seconds", 20)


@features
def test_pods_are_restricted(path: Path | None) -> None:
    """The Pod Security Standard `restricted`, field by field, and a read-only root file system on top.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/
    """
    found = pods(rendered(path))
    assert found
    for name, template in found:
        pod = template["spec"]
        # Baseline: nothing of the host.
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & pod.keys(), name
        assert "ephemeralContainers" not in pod
        for volume in pod.get("volumes", []):
            assert volume.keys() - {"name"} <= {"configMap", "emptyDir", "secret", "persistentVolumeClaim"}, name
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"sysctls", "seLinuxOptions", "windowsOptions", "appArmorProfile"} & security.keys()
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert all("hostPort" not in port for port in container.get("ports", []))
            assert container["resources"]["limits"]["memory"], name
            assert not container["image"].endswith(":latest")
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            claims = rendered(path).one("workload.yaml")["spec"].get("volumeClaimTemplates", [])
            volumes = {volume["name"] for volume in pod.get("volumes", [])}
            assert mounts - volumes <= {claim["metadata"]["name"] for claim in claims}


@features
def test_no_secret_is_made_and_none_is_in_a_variable(path: Path | None) -> None:
    found = rendered(path)
    assert not [thing for _, thing in found.objects if thing["kind"] in ("Secret", "Role", "ClusterRole")]
    for _, template in pods(found):
        for container in template["spec"]["containers"]:
            assert not [variable for variable in container.get("env", []) if variable["name"][-8:] == "PASSWORD"]


def test_lint() -> None:
    import helm_python

    for path in CI.values():
        report = helm_python.lint(CHART, yaml.safe_load(path.read_text()), strict=True)
        assert report["errors"] == []
        assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_the_package_holds_what_is_needed_and_no_more(tmp_path: Path) -> None:
    import helm_python

    with helm_python.Chart.load(helm_python.package(CHART, destination=tmp_path)) as chart:
        files = {file["name"] for file in chart.files}
        assert "files/alerts.yaml" in files
        assert not [name for name in files if name.startswith("ci/")]
        assert chart.schema is not None
