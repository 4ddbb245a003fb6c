"""Whole configurations of proxies, from MeshConfig and manifests: what istiod would send, in one bootstrap.

Left out is what only Istio's own build of Envoy has (metadata exchange, istio.stats, ALPN) and what needs certificates:
TLS at the gateway and mutual TLS inside. None of it decides where a request goes or whether it may. Routes are part
of the listener and endpoints come from files, in place of the streams RDS and EDS.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from support.istio.clusters import Locality, Service, clusters, socket_address, write_endpoints
from support.istio.manifests import Composition, Resource, only, selecting
from support.istio.messages import (
    accesslog,
    any_of,
    bootstrap,
    cluster,
    core,
    cors,
    fault,
    file_log,
    grpc_stats,
    hcm,
    listener,
    matcher,
    metrics,
    protobuf,
    proxy_protocol,
    route,
    router,
    stateful_session,
)
from support.istio.patches import MANAGER, Patches
from support.istio.policies import custom_filters, plain_filters
from support.istio.routes import SESSION_FILTER, gateway_routes, sidecar_routes

ACCESS_LOG = "access.log"
"""File of the access log, in place of /dev/stdout."""

_GATEWAY_PORT = 443
_SIDECAR_PORT = 80


@dataclass(frozen=True, slots=True)
class _Proxy:
    composition: Composition
    services: Sequence[Service]
    endpoints: Path
    """Folder for the pods' addresses, which Envoy watches."""
    listen: str = "127.0.0.1"
    """The address to listen on; the port is the system's choice."""
    locality: Locality = ("", "", "")
    """Region, zone and sub-zone of the proxy."""
    istio_stats: bool = False
    """Create the statistics that Istio creates and no others, with Istio's names; tests that count use others."""

    def write_pods(self, services: Iterable[Service] | None = None) -> None:
        """Write which pods the services have now (None: those of the beginning); Envoy takes it up."""
        for service in self.services if services is None else services:
            write_endpoints(service, self._rules(), self.endpoints, self.locality)

    def _rules(self) -> list[Mapping[str, Any]]:
        return [rule.spec for rule in self.composition.of_kind("DestinationRule")]

    def _clusters(self) -> list[cluster.Cluster]:
        rules = self._rules()
        return [made for service in self.services for made in clusters(service, rules, self.endpoints)]

    def _bootstrap(self, patches: Patches, found: listener.Listener, routes: route.RouteConfiguration) -> bytes:
        self.write_pods()
        patches.patch_routes(routes)
        patches.patch_listener(found)
        _set_routes(found, routes)
        made = self._clusters()
        for one in made:
            patches.patch_cluster(one)
        patches.check_all_applied()
        found.address = socket_address((self.listen, 0))
        return bytes(
            bootstrap.Bootstrap(
                # Envoy asks for a name where endpoints come from anywhere but the bootstrap.
                node=core.Node(id="proxy", cluster="proxy"),
                admin=bootstrap.Admin(address=socket_address(("127.0.0.1", 0))),
                stats_config=_stats_config(self.composition) if self.istio_stats else None,
                static_resources=bootstrap.BootstrapStaticResources(listeners=[found], clusters=made),
            )
        )


class Gateway(_Proxy):
    """The gateway of istio/gateway: its HTTPS server, without the TLS."""

    __slots__ = ()

    def bootstrap(self) -> bytes:
        """The serialized bootstrap. Raises PatchFoundNothingError when an EnvoyFilter's patch fits nothing."""
        rules = self._rules()
        routes = gateway_routes(self.composition.of_kind("VirtualService"), rules, self.services)
        return self._bootstrap(Patches(self._own("EnvoyFilter"), "GATEWAY"), self._listener(), routes)

    def _own(self, kind: str) -> list[Resource]:
        gateway = self.composition.one("Gateway", "public")
        return selecting(self.composition.of_kind(kind), gateway.namespace, gateway.spec["selector"])

    def _topology(self) -> Mapping[str, Any]:
        """MeshConfig's defaultConfig.gatewayTopology (`pilot/pkg/model/context.go`, ProxyConfigOrDefault)."""
        topology: Mapping[str, Any] = self.composition.mesh.get("defaultConfig", {}).get("gatewayTopology", {})
        only(topology, "numTrustedProxies", "proxyProtocol")
        return topology

    def _listener(self) -> listener.Listener:
        """`pilot/pkg/networking/core/listener.go`, buildGatewayListener."""
        filters = []
        if "proxyProtocol" in self._topology():
            # `pilot/pkg/xds/filters/filters.go`, ProxyProtocol
            config = any_of(proxy_protocol.ProxyProtocol())
            filters.append(listener.ListenerFilter(name="envoy.filters.listener.proxy_protocol", typed_config=config))
        policies = self._own("AuthorizationPolicy")
        made = _connection_manager(
            self.composition,
            _GATEWAY_PORT,
            filters=[
                *custom_filters(policies, self.composition.mesh.get("extensionProviders", []), self.services),
                *plain_filters(policies),
            ],
            access_logs=_access_logs(self.composition, self._own("Telemetry")),
        )
        # `gateway.go`, createGatewayHTTPFilterChainOpts and buildGatewayConnectionManager
        made.use_remote_address = True
        made.xff_num_trusted_hops = self._topology().get("numTrustedProxies", 0)
        return _listener(_GATEWAY_PORT, made, filters)


class Sidecar(_Proxy):
    """The sidecar of a workload that calls services of the mesh by their names."""

    __slots__ = ()

    def bootstrap(self) -> bytes:
        """The serialized bootstrap of its outbound listener for port 80."""
        made = _connection_manager(self.composition, _SIDECAR_PORT, filters=[], access_logs=[])
        routes = sidecar_routes(self._rules(), self.services)
        return self._bootstrap(Patches([], "SIDECAR_OUTBOUND"), _listener(_SIDECAR_PORT, made, []), routes)


def _listener(
    port: int, manager: hcm.HttpConnectionManager, filters: list[listener.ListenerFilter]
) -> listener.Listener:
    network_filter = listener.Filter(name=MANAGER, typed_config=any_of(manager))
    return listener.Listener(
        name=f"0.0.0.0_{port}",  # gateway.go, getListenerName; listener.go, getListenerName likewise
        address=socket_address(("0.0.0.0", port)),
        traffic_direction=core.TrafficDirection.OUTBOUND,
        listener_filters=filters,
        filter_chains=[listener.FilterChain(filters=[network_filter])],
    )


def _connection_manager(
    composition: Composition, port: int, *, filters: list[hcm.HttpFilter], access_logs: list[accesslog.AccessLog]
) -> hcm.HttpConnectionManager:
    """`pilot/pkg/networking/core/listener_builder.go`, buildHTTPConnectionManager."""
    normalization = composition.mesh.get("pathNormalization", {}).get("normalization", "DEFAULT")
    escaped = hcm.HttpConnectionManagerPathWithEscapedSlashesAction
    made = [
        *filters,
        _filter("envoy.filters.http.grpc_stats", grpc_stats.FilterConfig(emit_filter_state=True)),
        _filter("envoy.filters.http.fault", fault.HttpFault()),
        _filter("envoy.filters.http.cors", cors.Cors()),
    ]
    if composition.istiod.get("PILOT_ENABLE_PERSISTENT_SESSION_FILTER") == "true":  # `filters.go`, EmptySessionFilter
        made.append(_filter(SESSION_FILTER, stateful_session.StatefulSession()))
    return hcm.HttpConnectionManager(
        stat_prefix=f"outbound_0.0.0.0_{port};",  # util.go, DelimitedStatsPrefix
        codec_type=hcm.HttpConnectionManagerCodecType.AUTO,
        use_remote_address=False,
        normalize_path=normalization != "NONE",
        merge_slashes=normalization in ("MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"),
        path_with_escaped_slashes_action=(
            escaped.UNESCAPE_AND_FORWARD if normalization == "DECODE_AND_MERGE_SLASHES" else escaped.KEEP_UNCHANGED
        ),
        upgrade_configs=[hcm.HttpConnectionManagerUpgradeConfig(upgrade_type="websocket")],
        stream_idle_timeout=timedelta(0),
        http_protocol_options=core.Http1ProtocolOptions(),
        proxy_100_continue=True,
        access_log=access_logs,
        http_filters=[*made, _filter("envoy.filters.http.router", router.Router())],
    )


def _access_logs(composition: Composition, telemetries: Iterable[Resource]) -> list[accesslog.AccessLog]:
    """`accesslog.go`, setHTTPAccessLog; `pilot/pkg/model/telemetry_logging.go`, fileAccessLogFromTelemetry."""
    providers = {provider["name"]: provider for provider in composition.mesh.get("extensionProviders", [])}
    logs = []
    for telemetry in telemetries:
        for logging in telemetry.spec.get("accessLogging", []):
            only(logging, "providers")
            for name in logging["providers"]:
                config = providers[name["name"]]["envoyFileAccessLog"]
                only(config, "path", "logFormat")
                only(config["logFormat"], "labels")
                log_format = core.SubstitutionFormatString(
                    json_format=protobuf.Struct.from_dict(config["logFormat"]["labels"]),
                    json_format_options=core.JsonFormatOptions(),
                )
                log = file_log.FileAccessLog(path=ACCESS_LOG, log_format=log_format)
                logs.append(accesslog.AccessLog(name="envoy.access_loggers.file", typed_config=any_of(log)))
    return logs


def _stats_config(composition: Composition) -> metrics.StatsConfig:
    """`pkg/bootstrap/config.go`, getStatsOptions; `tools/packaging/common/envoy_bootstrap.json`, stats_config."""
    wanted = composition.mesh.get("defaultConfig", {}).get("proxyStatsMatcher", {})
    only(wanted, "inclusionRegexps")
    prefixes = ["cluster_manager", "listener_manager", "server", "cluster.xds-grpc", "wasm", "reporter=", "istio"]
    suffixes = ["rbac.allowed", "rbac.denied", "shadow_allowed", "shadow_denied"]
    if exits_on_zero_active_connections(composition):
        suffixes.append("downstream_cx_active")
    return metrics.StatsConfig(
        use_all_default_tags=False,
        stats_tags=[
            metrics.TagSpecifier(tag_name="cluster_name", regex=r"^cluster(\.(.+);)"),
            metrics.TagSpecifier(
                tag_name="http_conn_manager_prefix",
                regex=r"^http\.(((?:[_.[:digit:]\w]*|[_\[\]aAbBcCdDeEfF[:digit:]\w\:]*));\.)",
            ),
        ],
        stats_matcher=metrics.StatsMatcher(
            inclusion_list=matcher.ListStringMatcher(
                patterns=[
                    *(matcher.StringMatcher(prefix=prefix) for prefix in prefixes),
                    *(matcher.StringMatcher(suffix=suffix) for suffix in suffixes),
                    *(
                        matcher.StringMatcher(safe_regex=matcher.RegexMatcher(regex=regex))
                        for regex in (r"vhost\..*\.route\..*", *wanted.get("inclusionRegexps", []))
                    ),
                ]
            )
        ),
    )


def gateway_environment(composition: Composition) -> dict[str, str]:
    """The environment of the gateway's proxy, from its Deployment."""
    pod = composition.one("Deployment", "istio-ingress").spec["template"]["spec"]
    (container,) = pod["containers"]
    return {variable["name"]: variable["value"] for variable in container.get("env", [])}


def exits_on_zero_active_connections(composition: Composition) -> bool:
    """Whether pilot-agent waits for the last connection."""
    return gateway_environment(composition).get("EXIT_ON_ZERO_ACTIVE_CONNECTIONS") == "true"


def _filter(name: str, config: Any) -> hcm.HttpFilter:
    return hcm.HttpFilter(name=name, typed_config=any_of(config))


def _set_routes(found: listener.Listener, routes: route.RouteConfiguration) -> None:
    for chain in found.filter_chains:
        for network_filter in chain.filters:
            if network_filter.name == MANAGER:
                assert network_filter.typed_config is not None
                manager = network_filter.typed_config.unpack()
                manager.route_config = routes
                network_filter.typed_config = any_of(manager)
