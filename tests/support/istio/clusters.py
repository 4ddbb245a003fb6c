"""Services and DestinationRules -> Envoy's clusters."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.istio.manifests import only
from support.istio.messages import (
    UINT32_MAX,
    any_of,
    cluster,
    core,
    discovery,
    duration,
    endpoint,
    envoy_type,
    upstream_http,
)

Address = tuple[str, int]

Locality = tuple[str, str, str]
"""Region, zone and sub-zone."""

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


@dataclass(frozen=True, slots=True)
class Pod:
    """One endpoint of a service."""

    name: str
    address: Address
    labels: Mapping[str, str] = field(default_factory=dict)
    locality: Locality = ("", "", "")


@dataclass(frozen=True, slots=True)
class Service:
    """A Kubernetes Service as the control plane sees it: a host, a port, the ready pods."""

    host: str
    port: int
    pods: Sequence[Pod]
    grpc: bool = False
    """The port is named grpc, or has it as appProtocol."""
    labels: Mapping[str, str] = field(default_factory=dict)


def cluster_name(host: str, port: int, subset: str = "") -> str:
    """The name of an outbound cluster (`pilot/pkg/model/push_context.go`, BuildSubsetKey)."""
    return f"outbound|{port}|{subset}|{host}"


def clusters(service: Service, rules: Iterable[Mapping[str, Any]], endpoints: Path) -> list[cluster.Cluster]:
    """The clusters of a service: one for all its pods, and one for each subset of its DestinationRule.

    `rules` are the specs of DestinationRules; `endpoints` is the folder where `write_endpoints` keeps the pods, in
    place of the control plane's EDS. `pilot/pkg/networking/core/cluster_builder.go`, applyDestinationRule.
    """
    rule: Mapping[str, Any] = next((rule for rule in rules if rule["host"] == service.host), {})
    found = [_cluster(service, "", rule.get("trafficPolicy", {}), endpoints)]
    for subset in rule.get("subsets", ()):
        # A subset's policy replaces the service's part by part (util.go, MergeSubsetTrafficPolicy).
        policy = {**rule.get("trafficPolicy", {}), **subset.get("trafficPolicy", {})}
        found.append(_cluster(service, subset["name"], policy, endpoints))
    return found


def write_endpoints(
    service: Service, rules: Iterable[Mapping[str, Any]], folder: Path, locality: Locality = ("", "", "")
) -> None:
    """Write the pods of a service for its clusters; Envoy takes up a file that is written again.

    A subset has the pods with all its labels (`pilot/pkg/xds/endpoints/endpoint_builder.go`, filterIstioEndpoint).
    `locality` is the proxy's.
    """
    rule: Mapping[str, Any] = next((rule for rule in rules if rule["host"] == service.host), {})
    policy = rule.get("trafficPolicy", {})
    # `pilot/pkg/networking/core/loadbalancer/loadbalancer.go`, applyLocalityFailover: only with outlier detection.
    near_first = (
        policy.get("loadBalancer", {}).get("localityLbSetting", {}).get("enabled", True)
        and "outlierDetection" in policy
    )
    selectors = {"": {}} | {subset["name"]: subset.get("labels", {}) for subset in rule.get("subsets", ())}
    for subset, labels in selectors.items():
        name = cluster_name(service.host, service.port, subset)
        pods = [pod for pod in service.pods if labels.items() <= pod.labels.items()]
        distances = [_distance(locality, pod.locality) if near_first else 0 for pod in pods]
        # Priorities have no gaps: Envoy would take an empty one for a failed one.
        priorities = {distance: rank for rank, distance in enumerate(sorted(set(distances)))}
        groups: dict[tuple[int, Locality], list[Pod]] = {}
        for pod, distance in zip(pods, distances, strict=True):
            groups.setdefault((priorities[distance], pod.locality), []).append(pod)
        assignment = endpoint.ClusterLoadAssignment(
            cluster_name=name,
            endpoints=[
                endpoint.LocalityLbEndpoints(
                    locality=core.Locality(region=place[0], zone=place[1], sub_zone=place[2]),
                    lb_endpoints=[_lb_endpoint(pod) for pod in members],
                    priority=priority,
                )
                for (priority, place), members in groups.items()
            ],
        )
        path = _endpoints_file(folder, name)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(bytes(discovery.DiscoveryResponse(resources=[any_of(assignment)])))
        fresh.rename(path)  # Envoy watches for a file that is moved into place


def _distance(proxy: Locality, pod: Locality) -> int:
    """`pilot/pkg/networking/util/util.go`, LbPriority: 0 in the same sub-zone, 1 zone, 2 region, 3 elsewhere."""
    return next((number for number in range(3) if proxy[: 3 - number] == pod[: 3 - number]), 3)


def _endpoints_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('|', '_')}.pb"


def _lb_endpoint(pod: Pod) -> endpoint.LbEndpoint:
    return endpoint.LbEndpoint(endpoint=endpoint.Endpoint(address=socket_address(pod.address)))


def socket_address(address: Address) -> core.Address:
    """An IP address and a port."""
    host, port = address
    return core.Address(socket_address=core.SocketAddress(address=host, port_value=port))


def _cluster(service: Service, subset: str, policy: Mapping[str, Any], folder: Path) -> cluster.Cluster:
    name = cluster_name(service.host, service.port, subset)
    made = cluster.Cluster(
        name=name,
        alt_stat_name=f"{name};",  # util.go, DelimitedStatsPrefix
        # buildCluster, maybeApplyEdsConfig. A file in place of the control plane's stream.
        type=cluster.ClusterDiscoveryType.EDS,
        eds_cluster_config=cluster.ClusterEdsClusterConfig(
            service_name=name,
            eds_config=core.ConfigSource(
                path_config_source=core.PathConfigSource(path=str(_endpoints_file(folder, name))),
                resource_api_version=core.ApiVersion.V3,
            ),
        ),
        common_lb_config=cluster.ClusterCommonLbConfig(),
        connect_timeout=duration("10s"),  # MeshConfig's default (`pkg/config/mesh/mesh.go`, DefaultMeshConfig)
    )
    options = upstream_http.HttpProtocolOptions()
    if service.grpc:  # cluster_builder.go, setH2Options
        options.explicit_http_config = upstream_http.HttpProtocolOptionsExplicitHttpConfig(
            http2_protocol_options=core.Http2ProtocolOptions()
        )
    _apply_connection_pool(made, options, policy.get("connectionPool", {}))
    if "outlierDetection" in policy:
        _apply_outlier_detection(made, policy["outlierDetection"])
    _apply_load_balancer(made, policy.get("loadBalancer", {}))
    if bytes(options):
        if options.explicit_http_config is None:
            options.explicit_http_config = upstream_http.HttpProtocolOptionsExplicitHttpConfig(
                http_protocol_options=core.Http1ProtocolOptions()
            )
        made.typed_extension_protocol_options = {_HTTP_OPTIONS: any_of(options)}
    return made


def _apply_connection_pool(
    made: cluster.Cluster, options: upstream_http.HttpProtocolOptions, pool: Mapping[str, Any]
) -> None:
    """`pilot/pkg/networking/core/cluster_traffic_policy.go`, applyConnectionPool."""
    http, tcp = pool.get("http", {}), pool.get("tcp", {})
    only(http, "http1MaxPendingRequests", "http2MaxRequests", "maxRetries", "idleTimeout", "maxRequestsPerConnection")
    only(tcp, "maxConnections", "connectTimeout", "tcpKeepalive", "idleTimeout")
    if "connectTimeout" in tcp:
        made.connect_timeout = duration(tcp["connectTimeout"])
    made.circuit_breakers = cluster.CircuitBreakers(
        thresholds=[
            cluster.CircuitBreakersThresholds(
                max_connections=tcp.get("maxConnections", UINT32_MAX),
                max_pending_requests=http.get("http1MaxPendingRequests", UINT32_MAX),
                max_requests=http.get("http2MaxRequests", UINT32_MAX),
                max_retries=http.get("maxRetries", UINT32_MAX),
                track_remaining=True,
            )
        ]
    )
    if "tcpKeepalive" in tcp:  # cluster.go, setKeepAliveSettings
        keepalive = tcp["tcpKeepalive"]
        made.upstream_connection_options = cluster.UpstreamConnectionOptions(
            tcp_keepalive=core.TcpKeepalive(
                keepalive_probes=keepalive.get("probes"),
                keepalive_time=_whole_seconds(keepalive.get("time")),
                keepalive_interval=_whole_seconds(keepalive.get("interval")),
            )
        )
    idle = http.get("idleTimeout", tcp.get("idleTimeout"))
    if idle is not None or http.get("maxRequestsPerConnection"):
        options.common_http_protocol_options = core.HttpProtocolOptions(
            idle_timeout=None if idle is None else duration(idle),
            max_requests_per_connection=http.get("maxRequestsPerConnection") or None,
        )


def _whole_seconds(text: str | None) -> int | None:
    return None if text is None else int(duration(text).total_seconds())


def _apply_outlier_detection(made: cluster.Cluster, outlier: Mapping[str, Any]) -> None:
    """`pilot/pkg/networking/core/cluster_traffic_policy.go`, applyOutlierDetection."""
    only(
        outlier,
        "consecutive5xxErrors",
        "consecutiveGatewayErrors",
        "interval",
        "baseEjectionTime",
        "maxEjectionPercent",
        "minHealthPercent",
    )
    found = cluster.OutlierDetection(enforcing_success_rate=0)
    if (errors := outlier.get("consecutive5xxErrors")) is not None:
        found.consecutive_5xx = errors
        found.enforcing_consecutive_5xx = 100 if errors else 0
    if (errors := outlier.get("consecutiveGatewayErrors")) is not None:
        found.consecutive_gateway_failure = errors
        found.enforcing_consecutive_gateway_failure = 100 if errors else 0
    if "interval" in outlier:
        found.interval = duration(outlier["interval"])
    if "baseEjectionTime" in outlier:
        found.base_ejection_time = duration(outlier["baseEjectionTime"])
    if outlier.get("maxEjectionPercent"):
        found.max_ejection_percent = outlier["maxEjectionPercent"]
    made.outlier_detection = found
    # Set also where the manifest does not say it: Envoy's own default, 50, would be a panic threshold.
    made.common_lb_config.healthy_panic_threshold = envoy_type.Percent(value=float(outlier.get("minHealthPercent", 0)))


def _apply_load_balancer(made: cluster.Cluster, balancer: Mapping[str, Any]) -> None:
    """`pilot/pkg/networking/core/cluster_traffic_policy.go`, applyLoadBalancer and ApplyRingHashLoadBalancer."""
    only(balancer, "simple", "consistentHash", "localityLbSetting", "warmup")
    policies = cluster.ClusterLbPolicy
    simple = {
        None: policies.LEAST_REQUEST,
        "LEAST_REQUEST": policies.LEAST_REQUEST,
        "ROUND_ROBIN": policies.ROUND_ROBIN,
        "RANDOM": policies.RANDOM,
    }
    made.lb_policy = simple[balancer.get("simple")]
    hashing = balancer.get("consistentHash")
    if hashing is None:
        return
    if "maglev" in hashing:
        made.lb_policy = policies.MAGLEV
        if size := hashing["maglev"].get("tableSize"):
            made.maglev_lb_config = cluster.ClusterMaglevLbConfig(table_size=size)
    else:
        made.lb_policy = policies.RING_HASH
        size = hashing.get("ringHash", {}).get("minimumRingSize") if "ringHash" in hashing else 1024
        if size:
            made.ring_hash_lb_config = cluster.ClusterRingHashLbConfig(minimum_ring_size=size)
