"""Envoy's bootstrap configuration, built as plain data; nothing is started here.

`gateway_config` builds what Istio's control plane builds for an ingress gateway with an AuthorizationPolicy of
``action: CUSTOM`` and a gRPC provider, plus what makes routing headers safe (in a mesh: an EnvoyFilter).
`appending_proxy_config` builds a trusted proxy to put in front of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Address = tuple[str, int]
"""Host (an IP address: clusters here are static) and port."""

Message = dict[str, Any]
"""One protobuf message of Envoy's API in its JSON form, with the field names of the .proto files."""

ACCESS_LOG = "access.log"
"""File of the access log, JSON lines, relative to Envoy's working directory."""

ANY_INSTANCE_CLUSTER = "any"
"""Cluster of the default route: all instances, round robin."""

AUTHZ_CLUSTER = "authz"
"""Cluster of the authorization server."""

_TRACE_CLUSTER = "traces"

# What the control plane derives from the policy's provider, namespace and name. ext_authz runs when the RBAC filter has
# left the id of a matching policy, recognised by this prefix, in the metadata.
_PROVIDER = "authz-server"
_POLICY_PREFIX = f"istio-ext-authz-{_PROVIDER}"
_POLICY_ID = f"{_POLICY_PREFIX}-ns[istio-system]-policy[authz-server]-rule[0]"
_SHADOW_PREFIX = "istio_ext_authz_"

_UINT32_MAX = 4_294_967_295


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files for TLS from Envoy to the authorization server. Absolute paths: Envoy runs in a directory of its own."""

    ca: Path
    """PEM file with the authorities that the server's certificate is checked against."""
    server_name: str
    """DNS name sent as SNI; the server's certificate must carry it."""
    certificate: Path | None = None
    """PEM file with Envoy's own certificate chain, for mutual TLS; None: plain TLS."""
    key: Path | None = None
    """PEM file with the private key of `certificate`."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError(f"mutual TLS needs both files: certificate {self.certificate}, key {self.key}")


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What may differ between gateways."""

    authz: Address
    """Where the authorization server listens."""
    instances: Mapping[str, Address]
    """Instance name, as the routing header names it -> where it listens."""
    failure_mode_allow: bool = False
    """Let a request through when the authorization server cannot be asked (`failOpen` in Istio)."""
    timeout_seconds: float = 0.5
    """How long Envoy waits for one decision. Never left out: Istio's default would be 600 s."""
    trusted_hops: int = 0
    """Trusted proxies in front of Envoy, each appending to X-Forwarded-For; 0: the peer is the client."""
    proxy_protocol: bool = False
    """Require a PROXY protocol header, version 1 or 2, on each connection."""
    exempt_paths: Sequence[str] = ()
    """Exact paths that the policy does not cover (`notPaths`): no check is made for them."""
    authz_tls: TlsFiles | None = None
    """TLS to the authorization server; None: plain text."""
    routing_header: str = "x-tenant-instance"
    """Header, set by the decision, whose value chooses the instance."""
    strip_routing_header: bool = True
    """Remove a client's own routing header before a route is chosen. False only to show what happens without."""
    max_request_headers_kb: int | None = None
    """Largest request head, in KiB (1 to 8192); None: Envoy's default, 60."""
    max_request_headers_count: int | None = None
    """Most request headers; None: Envoy's default, 100."""
    encode_raw_headers: bool = False
    """Send headers to the server as raw bytes, repeated ones repeated (`header_map`), not as one map of strings."""
    trace_collector: Address | None = None
    """Trace every request by OpenTelemetry (gRPC) to this collector; None: no tracing. Tracers write headers into the
    calls to the authorization server too, some of them copied from the client's."""
    listen_host: str = "127.0.0.1"
    """IP address to listen on; the port is chosen by the system."""


def gateway_config(options: GatewayOptions) -> Message:
    """The bootstrap of a gateway that asks the authorization server about each request."""
    manager = {
        "stat_prefix": "gateway",
        # The gateway is the edge: it takes the client's address from the connection (or, with trusted hops, from the
        # right end of X-Forwarded-For) and overwrites the x-envoy-external-address that a client may have sent.
        # Istio sets this on gateways and not on sidecars. That it works for clients of the loopback and of private
        # networks too is the rule since Envoy 1.33: no address is internal unless configured.
        "use_remote_address": True,
        "xff_num_trusted_hops": options.trusted_hops,
        # Istio's default path normalization, BASE: dot segments and escapes of plain characters are resolved;
        # "//" and "%2f" are left as they are, so that the server sees what an upstream instance will see.
        "normalize_path": True,
        "merge_slashes": False,
        "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
        "common_http_protocol_options": _without_none(
            {
                # Many backends read `x_tenant_instance` and `x-tenant-instance` as one name, and stripping knows one.
                "headers_with_underscores_action": "REJECT_REQUEST",
                "max_headers_count": options.max_request_headers_count,
            }
        ),
        # A client that stops in the middle of a request must not hold it for ever. (Istio turns this timer off.)
        "stream_idle_timeout": "30s",
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "access_log": [_access_log()],
        "http_filters": [_rbac(options.exempt_paths), _ext_authz(options), _router()],
        "route_config": _routes(options),
    }
    if options.strip_routing_header:
        manager["early_header_mutation_extensions"] = [_strip_header(options.routing_header)]
    if options.trace_collector is not None:
        manager["tracing"] = {"random_sampling": {"value": 100}, "provider": _tracer()}
    if options.max_request_headers_kb is not None:
        manager["max_request_headers_kb"] = options.max_request_headers_kb
    clusters = [
        _authz_cluster(options),
        *(_cluster(name, [address]) for name, address in _instance_clusters(options)),
        _cluster(ANY_INSTANCE_CLUSTER, options.instances.values()),
    ]
    if options.trace_collector is not None:
        clusters.append(_http2(_cluster(_TRACE_CLUSTER, [options.trace_collector])))
    return _bootstrap(_listener(options.listen_host, manager, proxy_protocol=options.proxy_protocol), clusters)


def appending_proxy_config(upstream: Address, *, listen_host: str = "127.0.0.1") -> Message:
    """The bootstrap of a trusted HTTP proxy: appends its peer to X-Forwarded-For and forwards everything to `upstream`.

    A client chooses the address that it appears with by the address that it binds; all of 127.0.0.0/8 is the loopback.
    But not 127.0.0.1 nor ::1: in place of these two Envoy appends its own machine's address.
    """
    manager = {
        "stat_prefix": "appending_proxy",
        "use_remote_address": True,  # what makes Envoy append to X-Forwarded-For
        "normalize_path": False,
        "generate_request_id": False,
        "stream_idle_timeout": "30s",
        "access_log": [_access_log()],
        "http_filters": [_router()],
        "route_config": {
            "name": "everything",
            "virtual_hosts": [{"name": "everything", "domains": ["*"], "routes": [_route("upstream")]}],
        },
    }
    return _bootstrap(_listener(listen_host, manager, proxy_protocol=False), [_cluster("upstream", [upstream])])


def _bootstrap(listener: Message, clusters: Iterable[Message]) -> Message:
    return {
        "admin": {"address": _socket_address(("127.0.0.1", 0))},
        "static_resources": {"listeners": [listener], "clusters": list(clusters)},
    }


def _listener(host: str, manager: Message, *, proxy_protocol: bool) -> Message:
    listener: Message = {
        "name": "http",
        "address": _socket_address((host, 0)),
        "filter_chains": [
            {
                "filters": [
                    _extension(
                        "envoy.filters.network.http_connection_manager",
                        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                        manager,
                    )
                ]
            }
        ],
    }
    if proxy_protocol:
        listener["listener_filters"] = [
            _extension(
                "envoy.filters.listener.proxy_protocol",
                "extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
                # A connection without the header is refused: its peer would be the balancer, or whoever got past it.
                {"allow_requests_without_proxy_protocol": False},
            )
        ]
    return listener


def _rbac(exempt_paths: Sequence[str]) -> Message:
    """The CUSTOM policy as the control plane writes it: shadow rules that deny nothing and mark what they match."""
    if exempt_paths:
        exempt = [{"url_path": {"path": {"exact": path}}} for path in exempt_paths]
        matches: Message = {"not_rule": {"or_rules": {"rules": exempt}}}
    else:
        matches = {"any": True}
    policy = {
        "permissions": [{"and_rules": {"rules": [matches]}}],
        "principals": [{"and_ids": {"ids": [{"any": True}]}}],
    }
    return _extension(
        "envoy.filters.http.rbac",
        "extensions.filters.http.rbac.v3.RBAC",
        {
            "shadow_rules": {"action": "DENY", "policies": {_POLICY_ID: policy}},
            "shadow_rules_stat_prefix": _SHADOW_PREFIX,
        },
    )


def _ext_authz(options: GatewayOptions) -> Message:
    return _extension(
        "envoy.filters.http.ext_authz",
        "extensions.filters.http.ext_authz.v3.ExtAuthz",
        {
            "transport_api_version": "V3",
            "grpc_service": {
                "envoy_grpc": {"cluster_name": AUTHZ_CLUSTER, "authority": _PROVIDER},
                "timeout": _seconds(options.timeout_seconds),
            },
            "filter_enabled_metadata": {
                "filter": "envoy.filters.http.rbac",
                "path": [{"key": f"{_SHADOW_PREFIX}shadow_effective_policy_id"}],
                "value": {"string_match": {"prefix": _POLICY_PREFIX}},
            },
            "failure_mode_allow": options.failure_mode_allow,
            # The status when the server cannot be asked and failure_mode_allow is off; Istio writes 403.
            "status_on_error": {"code": "Forbidden"},
            # The route was chosen before the check. Without this the routing header that the decision sets would
            # reach the instance of the first choice. MeshConfig accepts clearRouteCache and never emits it.
            "clear_route_cache": True,
            "encode_raw_headers": options.encode_raw_headers,
        },
    )


def _router() -> Message:
    return _extension("envoy.filters.http.router", "extensions.filters.http.router.v3.Router", {})


def _strip_header(name: str) -> Message:
    """Removes a header before the first choice of a route, and so whatever becomes of the check.

    `headers_to_remove` of a decision is not enough: on an exempt path, and when the check fails open, there is no
    decision.
    """
    return _extension(
        "envoy.http.early_header_mutation.header_mutation",
        "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
        {"mutations": [{"remove": name}]},
    )


def _routes(options: GatewayOptions) -> Message:
    chosen = [
        _route(cluster, headers=[{"name": options.routing_header, "string_match": {"exact": name}}])
        for (cluster, _), name in zip(_instance_clusters(options), options.instances, strict=True)
    ]
    # An instance that the decision names and this table does not know yet: any other instance would be the wrong one.
    unknown = {
        "match": {"prefix": "/", "headers": [{"name": options.routing_header, "present_match": True}]},
        "direct_response": {"status": 503, "body": {"inline_string": "no route to the tenant's instance\n"}},
    }
    # The default route is needed even where each request has a tenant: ext_authz is skipped, and the client gets 404,
    # when the first choice, made without the routing header, finds nothing.
    routes = [*chosen, unknown, _route(ANY_INSTANCE_CLUSTER)]
    return {"name": "gateway", "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]}


def _route(cluster: str, *, headers: Sequence[Message] = ()) -> Message:
    match: Message = {"prefix": "/"}
    if headers:
        match["headers"] = list(headers)
    # No limit on the whole answer, as Istio has it (Envoy's own default is 15 s). No retries, other than Istio: one
    # request of a client is to be one arrival at an instance, or the demo could not count lost and misrouted ones.
    return {"match": match, "route": {"cluster": cluster, "timeout": "0s"}}


def _instance_clusters(options: GatewayOptions) -> list[tuple[str, Address]]:
    """Cluster name and address per instance; the prefix keeps an instance called `authz` from being the server."""
    return [(f"instance|{name}", address) for name, address in options.instances.items()]


def _tracer() -> Message:
    return _extension(
        "envoy.tracers.opentelemetry",
        "config.trace.v3.OpenTelemetryConfig",
        {"grpc_service": {"envoy_grpc": {"cluster_name": _TRACE_CLUSTER}}, "service_name": "gateway"},
    )


def _http2(cluster: Message) -> Message:
    options = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {**cluster, "typed_extension_protocol_options": {name: options}}


def _authz_cluster(options: GatewayOptions) -> Message:
    cluster = _http2(_cluster(AUTHZ_CLUSTER, [options.authz]))
    # Finds out that the server's machine is gone. TCP's own probes, not HTTP/2 pings: they are what a DestinationRule
    # can set, and gRPC servers answer pings more frequent than every five minutes with GOAWAY unless told otherwise.
    cluster["upstream_connection_options"] = {
        "tcp_keepalive": {"keepalive_time": 10, "keepalive_interval": 5, "keepalive_probes": 3}
    }
    if options.authz_tls is not None:
        cluster["transport_socket"] = _upstream_tls(options.authz_tls)
    return cluster


def _upstream_tls(files: TlsFiles) -> Message:
    common: Message = {
        "alpn_protocols": ["h2"],
        "validation_context": {
            "trusted_ca": {"filename": str(files.ca)},
            # Without a name here Envoy would take any certificate of these authorities.
            "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": files.server_name}}],
        },
    }
    if files.certificate is not None and files.key is not None:
        common["tls_certificates"] = [
            {
                "certificate_chain": {"filename": str(files.certificate)},
                "private_key": {"filename": str(files.key)},
            }
        ]
    return _extension(
        "envoy.transport_sockets.tls",
        "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        {"sni": files.server_name, "common_tls_context": common},
    )


def _cluster(name: str, addresses: Iterable[Address]) -> Message:
    endpoints = [{"endpoint": {"address": _socket_address(address)}} for address in addresses]
    return {
        "name": name,
        "type": "STATIC",
        "lb_policy": "ROUND_ROBIN",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        # As Istio writes it: no limits. With Envoy's default of 1,024 requests a burst of clients would overflow the
        # authz cluster, which counts as a failed check: with failure_mode_allow, a way around the policy.
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": _UINT32_MAX,
                    "max_pending_requests": _UINT32_MAX,
                    "max_requests": _UINT32_MAX,
                    "max_retries": _UINT32_MAX,
                }
            ]
        },
    }


def _access_log() -> Message:
    fields = {
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(:PATH)%",
        "authority": "%REQ(:AUTHORITY)%",
        "response_code": "%RESPONSE_CODE%",
        "response_code_details": "%RESPONSE_CODE_DETAILS%",
        "response_flags": "%RESPONSE_FLAGS%",
        "upstream_cluster": "%UPSTREAM_CLUSTER%",
        "upstream_host": "%UPSTREAM_HOST%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "external_address": "%REQ(X-ENVOY-EXTERNAL-ADDRESS)%",
        "peer_address": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%",
        "decision": "%DYNAMIC_METADATA(envoy.filters.http.ext_authz)%",
    }
    return _extension(
        "envoy.access_loggers.file",
        "extensions.access_loggers.file.v3.FileAccessLog",
        {"path": ACCESS_LOG, "log_format": {"json_format": fields}},
    )


def _extension(name: str, message: str, config: Message) -> Message:
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/envoy.{message}", **config}}


def _socket_address(address: Address) -> Message:
    host, port = address
    return {"socket_address": {"address": host, "port_value": port}}


def _seconds(value: float) -> str:
    """A protobuf Duration in JSON form, to the microsecond."""
    return f"{value:.6f}s"


def _without_none(message: Message) -> Message:
    return {name: value for name, value in message.items() if value is not None}
