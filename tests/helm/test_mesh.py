"""istio/*.yaml: what the mesh is told, switchable part by part; and the same as the manifests of istio/."""

import shlex
from typing import Any

import pytest
import yaml
from support.helm import CI, Object, render, render_file
from support.manifests import ISTIO, read
from typer.testing import CliRunner

from authz_server.cli import authzctl

POLICY = {"istio": {"customPolicy": {"enabled": True}}}

DEFAULT_PARTS = {
    "istio/callers.yaml",
    "istio/destination-rule.yaml",
    "istio/envoy-filters.yaml",
    "istio/peer-authentication.yaml",
}


def parts(values: dict[str, Any]) -> set[str]:
    return {template for template, _ in render(values).objects if template.startswith("istio/")}


@pytest.mark.parametrize(
    ("istio", "gone"),
    [
        ({}, set()),
        ({"enabled": False}, DEFAULT_PARTS),
        ({"destinationRule": {"enabled": False}}, {"istio/destination-rule.yaml"}),
        ({"peerAuthentication": {"enabled": False}}, {"istio/peer-authentication.yaml"}),
        ({"callers": {"enabled": False}}, {"istio/callers.yaml"}),
        ({"stripHeaders": {"enabled": False}, "clearRouteCache": {"enabled": False}}, {"istio/envoy-filters.yaml"}),
    ],
)
def test_each_part_can_be_switched_off(istio: dict[str, Any], gone: set[str]) -> None:
    assert parts({"istio": istio}) == DEFAULT_PARTS - gone


@pytest.mark.parametrize("kept", ["strip-headers", "clear-route-cache"])
def test_each_filter_can_be_switched_off(kept: str) -> None:
    istio = {
        "stripHeaders": {"enabled": kept == "strip-headers"},
        "clearRouteCache": {"enabled": kept != "strip-headers"},
    }
    (found,) = render({"istio": istio}).of("istio/envoy-filters.yaml")
    assert found["metadata"]["name"] == f"authz-server-{kept}"


def spec(path: str) -> Object:
    (found,) = read(ISTIO / path)
    return dict(found["spec"])


class TestTheSameAsTheManifests:
    def test_strip_headers_and_clear_route_cache(self) -> None:
        strip, clear = render().of("istio/envoy-filters.yaml")
        assert strip["spec"] == spec("overlays/routing-header-safety/envoy-filter.yaml")
        assert clear["spec"] == spec("overlays/route-by-header/envoy-filter.yaml")

    def test_policy(self) -> None:
        policy = render(POLICY).of("istio/custom-policy.yaml")[0]
        (manifest,) = read(ISTIO / "base/authorization-policy.yaml")
        assert policy["spec"] == manifest["spec"]
        assert policy["metadata"]["namespace"] == manifest["metadata"]["namespace"]

    def test_exempt_paths(self) -> None:
        manifest = spec("overlays/exempt-paths/authorization-policy.yaml")
        exempt = manifest["rules"][0]["to"][0]["operation"]["notPaths"]
        values = {"istio": {"customPolicy": {"enabled": True, "exemptPaths": exempt}}}
        assert render(values).of("istio/custom-policy.yaml")[0]["spec"]["rules"] == manifest["rules"]

    def test_destination_rule(self) -> None:
        rule = render().one("istio/destination-rule.yaml")["spec"]
        assert rule["trafficPolicy"].pop("tls") == {"mode": "ISTIO_MUTUAL"}
        assert rule == spec("overlays/provider-traffic/destination-rule.yaml")

    def test_callers(self) -> None:
        values = {"istio": {"callers": {"adminPrincipals": ["cluster.local/ns/monitoring/sa/prometheus"]}}}
        found = render(values)
        for policy, manifest in zip(
            found.of("istio/callers.yaml"),
            read(ISTIO / "overlays/provider-access/authorization-policy.yaml"),
            strict=True,
        ):
            assert policy["metadata"]["name"] == manifest["metadata"]["name"]
            assert policy["spec"]["rules"] == manifest["spec"]["rules"]
            labels = manifest["spec"]["selector"]["matchLabels"].items()
            assert labels <= found.one("workload.yaml")["spec"]["template"]["metadata"]["labels"].items()
        peers = found.one("istio/peer-authentication.yaml")["spec"]
        assert "portLevelMtls" not in peers
        assert peers["mtls"] == spec("overlays/provider-access/peer-authentication.yaml")["mtls"]

    def test_provider(self) -> None:
        fragment = mesh_config(render().notes)
        manifest = yaml.safe_load((ISTIO / "base/istiod-values.yaml").read_text())["meshConfig"]
        (provider,), (expected,) = fragment["extensionProviders"], manifest["extensionProviders"]
        timeouts = {provider["envoyExtAuthzGrpc"].pop("timeout"), expected["envoyExtAuthzGrpc"].pop("timeout")}
        assert timeouts == {"500ms", "0.5s"}
        assert provider == expected


def mesh_config(notes: str) -> dict[str, Any]:
    """The fragment that the notes show, read as somebody would paste it."""
    _, _, rest = notes.partition("\nmeshConfig:\n")
    lines = []
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        lines.append(line)
    fragment: dict[str, Any] = yaml.safe_load("\n".join(["meshConfig:", *lines]).split("\n\n")[0])["meshConfig"]
    return fragment


@pytest.mark.parametrize(
    ("settings", "removed"),
    [
        ({}, ["x-tenant-instance"]),
        ({"tenant_from": ["query:tenant_id"]}, ["x-tenant-instance", "x-tenant-id"]),
        ({"tenant_from": "query:tenant_id, header:x-tenant-id"}, ["x-tenant-instance"]),
        ({"tenant_from": ["header:x-customer"], "routing_header": "x-queue"}, ["x-queue", "x-tenant-id"]),
        ({"tenant_header": "x-customer"}, ["x-tenant-instance", "x-customer"]),
    ],
)
def test_headers_that_only_the_server_may_write(settings: dict[str, Any], removed: list[str]) -> None:
    filters = render({"settings": settings}).of("istio/envoy-filters.yaml")
    (patch,) = filters[0]["spec"]["configPatches"]
    (mutation,) = patch["patch"]["value"]["typed_config"]["early_header_mutation_extensions"]
    assert mutation["typed_config"]["mutations"] == [{"remove": name} for name in removed]


class TestUninstalling:
    """Helm deletes Services before policies, and a policy whose provider is gone denies everything."""

    def test_the_hook_takes_the_policy_s_place_and_matches_nothing(self) -> None:
        policy, hook, _ = render_file(CI["policy"]).of("istio/custom-policy.yaml")
        for name in ("name", "namespace"):
            assert policy["metadata"][name] == hook["metadata"][name]
        assert (policy["kind"], policy["apiVersion"]) == (hook["kind"], hook["apiVersion"])
        annotations = hook["metadata"]["annotations"]
        assert annotations["helm.sh/hook"] == "pre-delete"
        # Helm deletes the object of the hook's name before it makes the hook: that is the policy.
        assert annotations["helm.sh/hook-delete-policy"].split(",") == ["before-hook-creation", "hook-succeeded"]
        # https://istio.io/latest/docs/reference/config/security/authorization-policy/: without rules, no match.
        assert "rules" not in hook["spec"]
        assert hook["spec"] == {key: value for key, value in policy["spec"].items() if key != "rules"}

    def test_then_the_gateways_are_given_time(self) -> None:
        _, hook, job = render_file(CI["policy"]).of("istio/custom-policy.yaml")
        weights = [int(thing["metadata"]["annotations"]["helm.sh/hook-weight"]) for thing in (hook, job)]
        assert weights == sorted(weights)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["command"] == ["sleep", "20"]

    def test_without_the_policy_there_is_no_hook(self) -> None:
        assert render().of("istio/custom-policy.yaml") == []


def test_hosts_and_paths_of_the_policy() -> None:
    policy = render_file(CI["policy"]).of("istio/custom-policy.yaml")[0]["spec"]
    assert policy["rules"] == [
        {
            "to": [
                {
                    "operation": {
                        "hosts": ["www.example.com", "*.example.com"],
                        "notPaths": ["/healthz", "/robots.txt"],
                    }
                }
            ]
        }
    ]
    assert policy["provider"] == {"name": "lock"}


def test_a_scraper_outside_of_the_mesh_reaches_the_admin_port() -> None:
    found = render()
    peers = found.one("istio/peer-authentication.yaml")["spec"]
    assert peers["portLevelMtls"] == {"9001": {"mode": "PERMISSIVE"}}
    (rule,) = found.of("istio/callers.yaml")[1]["spec"]["rules"]
    assert rule == {"to": [{"operation": {"ports": ["9001"], "methods": ["GET"]}}]}


def test_without_a_sidecar_no_mutual_tls_of_the_mesh() -> None:
    found = render_file(CI["own-tls"])
    assert found.of("istio/peer-authentication.yaml") + found.of("istio/callers.yaml") == []
    assert found.one("istio/destination-rule.yaml")["spec"]["trafficPolicy"]["tls"]["mode"] == "MUTUAL"


class TestNotes:
    def test_what_to_paste(self) -> None:
        fragment = mesh_config(render_file(CI["proxy-protocol"]).notes)
        assert fragment["defaultConfig"]["gatewayTopology"] == {"proxyProtocol": {}}
        (provider,) = fragment["extensionProviders"]
        assert provider["envoyExtAuthzGrpc"]["statusOnError"] == "503"
        fragment = mesh_config(render_file(CI["behind-proxies"]).notes)
        assert fragment["defaultConfig"]["gatewayTopology"] == {"numTrustedProxies": 1}
        (provider,) = fragment["extensionProviders"]
        assert provider["envoyExtAuthzGrpc"]["failOpen"] is True
        assert "statusOnError" not in provider["envoyExtAuthzGrpc"]

    def test_exempt_paths_need_one_reading_of_a_path(self) -> None:
        fragment = mesh_config(render_file(CI["policy"]).notes)
        assert fragment["pathNormalization"] == {"normalization": "DECODE_AND_MERGE_SLASHES"}

    def test_the_next_step(self) -> None:
        notes = render().notes
        assert "--set istio.customPolicy.enabled=true" in notes
        assert "denies every request" in notes
        assert "Uninstalling" not in notes

    def test_once_the_policy_is_there(self) -> None:
        notes = render_file(CI["policy"]).notes
        assert "customPolicy.enabled=true" not in notes
        assert "waits 20 seconds" in notes
        assert "--no-hooks" in notes

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("evaluation", "EVALUATION MODE"),
            ("behind-proxies", "every request passes, blocked addresses included"),
            ("without-istio", "nothing asks this server yet"),
            ("without-istio", "authzctl init"),
            ("persistence", "statefulset/authz-server"),
        ],
    )
    def test_what_is_special(self, name: str, words: str) -> None:
        assert words in render_file(CI[name]).notes
        assert words not in render().notes

    def test_an_outage_of_redis_that_opens(self) -> None:
        settings = {"max_snapshot_age_seconds": 3600}
        opened = render({"settings": settings, "istio": {"provider": {"failOpen": True}}}).notes
        assert "once Redis has been away for 3600 seconds" in opened
        assert "Redis has been away" not in render({"settings": settings}).notes

    def test_a_new_topology_needs_new_gateways(self) -> None:
        assert "restart the gateways" in render_file(CI["proxy-protocol"]).notes
        assert "restart the gateways" not in render().notes

    @pytest.mark.parametrize("name", ["evaluation", "redis-tls-acl", "redis-cluster"])
    def test_how_the_lists_are_changed(self, name: str) -> None:
        """A command that exists; from a pod only where the server's user may write."""
        notes = render_file(CI[name]).notes
        (line,) = [line for line in notes.splitlines() if "block add" in line]
        before, _, words = line.partition("authzctl ")
        assert CliRunner().invoke(authzctl.app, [*shlex.split(words), "--help"]).exit_code == 0
        assert ("exec deployment/" in before) is (name == "evaluation")
        assert ("authz-admin" in notes) is (name == "redis-tls-acl")

    def test_headers_that_nobody_strips(self) -> None:
        notes = render({"istio": {"stripHeaders": {"enabled": False}}}).notes
        assert "x-tenant-instance before the route is chosen" in notes
