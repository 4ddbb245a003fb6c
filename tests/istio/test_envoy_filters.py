"""EnvoyFilters: applied to listeners as Istio emits them, accepted by real Envoys; broken copies are refused.

The listeners in golden/ have the shape, order and names that istiod gives them (istio/istio, pilot/pkg/networking/core:
gateway.go, listener.go buildGatewayListener, listener_builder.go buildHTTPConnectionManager; pilot/pkg/xds/filters).
"""

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.envoys import ENVOY_VERSIONS, binary_of
from support.helm import render
from support.istio.manifests import Resource
from support.istio.messages import bootstrap, hcm, listener, typed
from support.istio.patches import Patches, PatchFoundNothingError
from support.manifests import ISTIO, Manifest, files, read, with_surprises

pytestmark = pytest.mark.integration

GOLDEN = Path(__file__).parent / "golden" / "gateway-listeners.json"

# Filters of Istio's own build of Envoy; the Envoys here do not have them, and no patch of ours touches them.
ISTIO_ONLY = ("istio.metadata_exchange", "istio.alpn", "istio.stats")

ENVOY_FILTERS = {
    manifest["metadata"]["name"]: manifest
    for path in files()
    for manifest in read(path)
    if isinstance(manifest, dict) and manifest.get("kind") == "EnvoyFilter"
}

NEWEST = ENVOY_VERSIONS[-1]


def gateway_listeners() -> list[listener.Listener]:
    """What istiod sends to a gateway with HTTP, HTTPS, the base's policy and the filter for persistent sessions."""
    emitted = json.loads(GOLDEN.read_text())
    for each in emitted:
        (manager,) = each["filter_chains"][0]["filters"]
        kept = [part for part in manager["typed_config"]["http_filters"] if part["name"] not in ISTIO_ONLY]
        manager["typed_config"]["http_filters"] = kept
    return [typed(listener.Listener, each) for each in emitted]


def patched(*envoy_filters: Manifest) -> list[listener.Listener]:
    """The gateway's listeners with EnvoyFilters applied, of which each patch must have met something."""
    patches = Patches(
        [
            Resource("EnvoyFilter", "istio-ingress", each["metadata"]["name"], {}, each["spec"])
            for each in envoy_filters
        ],
        "GATEWAY",
    )
    listeners = gateway_listeners()
    for each in listeners:
        patches.patch_listener(each)
    patches.check_all_applied()
    return listeners


def managers(listeners: list[listener.Listener]) -> list[hcm.HttpConnectionManager]:
    found = []
    for each in listeners:
        (network_filter,) = each.filter_chains[0].filters
        assert network_filter.typed_config is not None
        manager = network_filter.typed_config.unpack()
        assert isinstance(manager, hcm.HttpConnectionManager)
        found.append(manager)
    return found


def refusal(listeners: list[listener.Listener], version: str, folder: Path) -> str:
    """Why the Envoy of a version refuses these listeners; empty when it does not."""
    config = folder / "bootstrap.pb"
    whole = _bootstrap()
    assert whole.static_resources is not None
    whole.static_resources.listeners = listeners
    config.write_bytes(bytes(whole))
    command = [binary_of(version), "--mode", "validate", "--config-path", config, "--log-level", "error"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return "" if said.returncode == 0 else said.stderr or f"exit code {said.returncode}"


def test_the_envoy_filters_are_those_that_the_readme_lists() -> None:
    readme = (ISTIO / "README.md").read_text()
    assert sorted(ENVOY_FILTERS) == [
        "clear-route-cache",
        "proxy-protocol",
        "routing-header-safety",
        "session-of-instance",
    ]
    for name in ENVOY_FILTERS:
        assert f"`{name}`" in readme


@pytest.mark.parametrize("version", ENVOY_VERSIONS)
def test_envoy_accepts_what_istio_emits(version: str, tmp_path: Path) -> None:
    """Else the tests below would prove nothing: a refusal could have any reason."""
    assert refusal(gateway_listeners(), version, tmp_path) == ""


@pytest.mark.parametrize("version", ENVOY_VERSIONS)
@pytest.mark.parametrize("name", ENVOY_FILTERS)
def test_envoy_accepts_the_patched_listeners(name: str, version: str, tmp_path: Path) -> None:
    assert refusal(patched(ENVOY_FILTERS[name]), version, tmp_path) == ""


@pytest.mark.parametrize("version", ENVOY_VERSIONS)
def test_all_together_do_what_each_says_and_no_more(version: str, tmp_path: Path) -> None:
    listeners = patched(*ENVOY_FILTERS.values())
    assert refusal(listeners, version, tmp_path) == ""
    plain, secure = ([each.name for each in one.listener_filters] for one in listeners)
    assert plain == ["envoy.filters.listener.proxy_protocol"]
    assert secure == ["envoy.filters.listener.proxy_protocol", "envoy.filters.listener.tls_inspector"]
    for before, after in zip(managers(gateway_listeners()), managers(listeners), strict=True):
        changed, known = after.to_dict(), before.to_dict()
        (mutation,) = changed.pop("earlyHeaderMutationExtensions")
        assert mutation["typedConfig"]["mutations"] == [{"remove": "x-tenant-instance"}]
        assert changed.pop("commonHttpProtocolOptions") == {"headersWithUnderscoresAction": "REJECT_REQUEST"}
        clearing = [part for part in changed["httpFilters"] if part["typedConfig"].pop("clearRouteCache", False)]
        assert [part["name"] for part in clearing] == ["envoy.filters.http.ext_authz"]
        names = [part["name"] for part in changed["httpFilters"]]
        added = names.index("envoy.filters.http.lua.session-of-instance")
        assert names[added + 1] == "envoy.filters.http.stateful_session"
        del changed["httpFilters"][added]
        assert changed == known


def test_the_chart_makes_the_same_of_the_two_that_it_has() -> None:
    """So either place may be taken; README.md says that it must be one."""
    of_chart = render().of("istio/envoy-filters.yaml")
    ours = [ENVOY_FILTERS["routing-header-safety"], ENVOY_FILTERS["clear-route-cache"]]
    assert patched(*of_chart) == patched(*ours)


@pytest.mark.parametrize("name", ENVOY_FILTERS)
def test_broken_copies_are_refused(name: str) -> None:
    """istiod warns of a field that it does not know, and leaves it out (pkg/config/validation/envoyfilter)."""
    broken = 0
    for index, item in enumerate(ENVOY_FILTERS[name]["spec"]["configPatches"]):
        for _, value in with_surprises(item["patch"]["value"]):
            copied = copy.deepcopy(ENVOY_FILTERS[name])
            copied["spec"]["configPatches"][index]["patch"]["value"] = value
            with pytest.raises(KeyError, match="surprise"):
                patched(copied)
            broken += 1
    assert broken > 1


def _change(path: str, value: Any) -> Any:
    return pytest.param(path, value, id=f"{path.rsplit('/', 1)[-1]}={value}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        _change("match/listener/filterChain/filter/name", "envoy.http_connection_manager"),
        _change("match/listener/filterChain/filter/subFilter/name", "envoy.ext_authz"),
        _change("match/listener/name", "0.0.0.0_8443"),
        _change("match/context", "SIDECAR_INBOUND"),
    ],
)
def test_a_patch_that_meets_nothing_is_found(path: str, value: str) -> None:
    """Names change with upgrades; istiod then applies the patch to nothing and says nothing."""
    broken = copy.deepcopy(ENVOY_FILTERS["clear-route-cache"])
    node = broken["spec"]["configPatches"][0]
    *parents, last = path.split("/")
    for parent in parents:
        node = node[parent]
    node[last] = value
    if last == "context":
        # A patch for another kind of proxy is left out before it is looked for.
        assert not any(_clears(manager) for manager in managers(patched(broken)))
    else:
        with pytest.raises(PatchFoundNothingError):
            patched(broken)


def test_a_value_that_envoy_does_not_take_is_refused(tmp_path: Path) -> None:
    broken = copy.deepcopy(ENVOY_FILTERS["routing-header-safety"])
    (item,) = broken["spec"]["configPatches"]
    (extension,) = item["patch"]["value"]["typed_config"]["early_header_mutation_extensions"]
    extension["typed_config"]["mutations"] = [{"remove": "x-tenant\ninstance"}]
    assert "HeaderMutation" in refusal(patched(broken), NEWEST, tmp_path)


def _clears(manager: hcm.HttpConnectionManager) -> bool:
    return any(part.to_dict()["typedConfig"].get("clearRouteCache", False) for part in manager.http_filters)


def _bootstrap() -> bootstrap.Bootstrap:
    ads = {"ads": {}, "resource_api_version": "V3"}
    protocol = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    control_plane = {
        "name": "xds-grpc",
        "type": "STATIC",
        "typed_extension_protocol_options": {
            protocol: {
                "@type": f"type.googleapis.com/{protocol}",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
    }
    authz = {
        "name": "outbound|9000||authz-server.authz-system.svc.cluster.local",
        "type": "EDS",
        "eds_cluster_config": {"eds_config": ads},
    }
    return typed(
        bootstrap.Bootstrap,
        {
            "node": {"id": "router~192.0.2.1~istio-ingress.istio-ingress~cluster.local", "cluster": "istio-ingress"},
            "dynamic_resources": {
                "ads_config": {
                    "api_type": "GRPC",
                    "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
                }
            },
            "static_resources": {"clusters": [control_plane, authz]},
        },
    )
