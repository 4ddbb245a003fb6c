"""VirtualServices -> Envoy's routes, with the hash policies and sessions that their destinations ask for."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from support.istio.clusters import Service, cluster_name
from support.istio.manifests import Resource, only
from support.istio.messages import (
    any_of,
    core,
    duration,
    header_session,
    matcher,
    previous_hosts,
    route,
    stateful_session,
)

SESSION_FILTER = "envoy.filters.http.stateful_session"
SESSION_LABEL = "istio.io/persistent-session-header"
"""`pilot/pkg/features/experimental.go`, PersistentSessionHeaderLabel."""

_GATEWAY_ROUTES = "https.443.https.public.istio-ingress"
"""`pilot/pkg/model/gateway.go`, gatewayRDSRouteName, for a server with TLS."""


def gateway_routes(
    virtual_services: Iterable[Resource], rules: Sequence[Mapping[str, Any]], services: Sequence[Service]
) -> route.RouteConfiguration:
    """The routes of a gateway's server. `rules` are the specs of DestinationRules.

    `pilot/pkg/networking/core/gateway.go`, buildGatewayHTTPRouteConfig.
    """
    hosts: dict[str, list[route.Route]] = {}
    for virtual_service in virtual_services:
        only(virtual_service.spec, "hosts", "gateways", "http")
        routes = _routes(virtual_service, rules, services)
        for host in virtual_service.spec["hosts"]:
            hosts.setdefault(host.lower(), []).extend(routes)
    return _configuration(_GATEWAY_ROUTES, {host: _catch_all_last(found) for host, found in hosts.items()}, 443)


def sidecar_routes(rules: Sequence[Mapping[str, Any]], services: Sequence[Service]) -> route.RouteConfiguration:
    """The routes of a sidecar to services without a VirtualService: one each, by host.

    `pilot/pkg/networking/core/route/route.go`, buildSidecarVirtualHostForService and BuildDefaultHTTPOutboundRoute.
    """
    hosts = {}
    for service in services:
        made = route.Route(name="default", match=route.RouteMatch(prefix="/"))
        # Other than for a VirtualService's destinations, the hash does not change the retries: BuildDefault... does
        # not know of it.
        made.route = _action(service.host, service.port, "", timeout=timedelta(0))
        made.route.retry_policy = _retry_policy(None, consistent_hash=False)
        if (policy := _hash_policy(_consistent_hash({"host": service.host}, rules))) is not None:
            made.route.hash_policy = [policy]
        hosts[service.host] = [made]
    return _configuration("80", hosts, 80)


def _configuration(name: str, hosts: Mapping[str, list[route.Route]], port: int) -> route.RouteConfiguration:
    return route.RouteConfiguration(
        name=name,
        virtual_hosts=[
            route.VirtualHost(name=f"{host}:{port}", domains=[host], routes=routes, include_request_attempt_count=True)
            for host, routes in hosts.items()
        ],
        validate_clusters=False,
        ignore_port_in_host_matching=True,
    )


def _catch_all_last(routes: Sequence[route.Route]) -> list[route.Route]:
    """`pilot/pkg/networking/core/route/route.go`, SortVHostRoutes and IsCatchAllRoute."""

    def is_catch_all(found: route.Route) -> bool:
        match = found.match
        return match is not None and match.prefix == "/" and not match.headers and not match.query_parameters

    return sorted(routes, key=is_catch_all)


def _routes(
    virtual_service: Resource, rules: Sequence[Mapping[str, Any]], services: Sequence[Service]
) -> list[route.Route]:
    """`route.go`, BuildHTTPRoutesForVirtualService and TranslateRoute."""
    found = []
    for http in virtual_service.spec["http"]:
        only(http, "name", "match", "route", "directResponse", "timeout", "retries", "headers")
        for match in http.get("match", [{}]):
            made = route.Route(
                name=".".join(name for name in (http.get("name"), match.get("name")) if name), match=_match(match)
            )
            _apply_headers(made, http.get("headers", {}))
            if "directResponse" in http:
                body = http["directResponse"].get("body", {})
                made.direct_response = route.DirectResponseAction(
                    status=http["directResponse"]["status"],
                    body=core.DataSource(inline_string=body["string"]) if body else None,
                )
            else:
                _apply_destination(made, http, rules, services)
            found.append(made)
    return found


def _match(match: Mapping[str, Any]) -> route.RouteMatch:
    """`route.go`, TranslateRouteMatch."""
    only(match, "name", "uri", "headers", "withoutHeaders", "queryParams", "method", "ignoreUriCase")
    made = route.RouteMatch(case_sensitive=not match.get("ignoreUriCase", False)) if match else route.RouteMatch()
    uri = match.get("uri", {"prefix": "/"})
    if "exact" in uri:
        made.path = uri["exact"]
    elif "prefix" in uri:
        made.prefix = uri["prefix"]
    else:
        made.safe_regex = matcher.RegexMatcher(regex=uri["regex"])
    headers = [_header(name, value) for name, value in match.get("headers", {}).items()]
    for name, value in match.get("withoutHeaders", {}).items():
        without = _header(name, value)
        without.invert_match = True
        without.treat_missing_header_as_empty = without.present_match is None
        headers.append(without)
    made.headers = sorted(headers, key=lambda header: header.name)
    if "method" in match:
        made.headers = [*made.headers, _header(":method", match["method"])]
    made.query_parameters = [
        route.QueryParameterMatcher(name=name, present_match=True)
        if _is_present_match(value)
        else route.QueryParameterMatcher(name=name, string_match=_string(value))
        for name, value in match.get("queryParams", {}).items()
    ]
    return made


def _header(name: str, value: Mapping[str, Any] | None) -> route.HeaderMatcher:
    """`route.go`, translateHeaderMatch."""
    if _is_present_match(value):
        return route.HeaderMatcher(name=name, present_match=True)
    assert value is not None
    return route.HeaderMatcher(name=name, string_match=_string(value))


def _is_present_match(value: Mapping[str, Any] | None) -> bool:
    """`route.go`, canBeConvertedToPresentMatch."""
    return not value or value.get("regex") == "*"


def _string(value: Mapping[str, Any]) -> matcher.StringMatcher:
    """`pilot/pkg/networking/util/util.go`, ConvertToEnvoyMatch."""
    ((kind, text),) = value.items()
    if kind == "regex":
        return matcher.StringMatcher(safe_regex=matcher.RegexMatcher(regex=text))
    return matcher.StringMatcher(**{kind: text})


def _apply_headers(made: route.Route, headers: Mapping[str, Any]) -> None:
    """`route.go`, TranslateHeadersOperations."""
    only(headers, "request", "response")
    for side in ("request", "response"):
        operations = headers.get(side, {})
        only(operations, "set", "remove")
        sets = [
            core.HeaderValueOption(
                header=core.HeaderValue(key=name, value=value),
                append_action=core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
            )
            for name, value in sorted(operations.get("set", {}).items())
        ]
        setattr(made, f"{side}_headers_to_add", [*getattr(made, f"{side}_headers_to_add"), *sets])
        removed = f"{side}_headers_to_remove"
        setattr(made, removed, [*getattr(made, removed), *operations.get("remove", [])])


def _apply_destination(
    made: route.Route, http: Mapping[str, Any], rules: Sequence[Mapping[str, Any]], services: Sequence[Service]
) -> None:
    """`route.go`, applyHTTPRouteDestination and processDestination, for one destination."""
    (destination,) = http["route"]
    only(destination, "destination", "headers", "weight")
    _apply_headers(made, destination.get("headers", {}))
    target = destination["destination"]
    service = next((service for service in services if service.host == target["host"]), None)
    port = target["port"]["number"] if "port" in target else 80 if service is None else service.port
    # setTimeout: no limit unless the manifest says one; Envoy's own default would be 15 s.
    timeout = duration(http["timeout"]) if "timeout" in http else timedelta(0)
    action = _action(target["host"], port, target.get("subset", ""), timeout=timeout)
    hashing = _consistent_hash(target, rules)
    if (policy := _hash_policy(hashing)) is not None:
        action.hash_policy = [policy]
    action.retry_policy = _retry_policy(http.get("retries"), consistent_hash=bool(hashing))
    made.route = action
    if service is not None and (header := service.labels.get(SESSION_LABEL)):
        # TranslateRoute, and util.go, MaybeBuildStatefulSessionFilterConfig
        session = stateful_session.StatefulSession(
            session_state=core.TypedExtensionConfig(
                name="envoy.http.stateful_session.header",
                typed_config=any_of(header_session.HeaderBasedSessionState(name=header)),
            )
        )
        made.typed_per_filter_config = {
            SESSION_FILTER: any_of(stateful_session.StatefulSessionPerRoute(stateful_session=session))
        }


def _action(host: str, port: int, subset: str, *, timeout: timedelta) -> route.RouteAction:
    return route.RouteAction(cluster=cluster_name(host, port, subset), timeout=timeout)


def _consistent_hash(target: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """`route.go`, HashForHTTPDestination: of the subset, else of the whole rule."""
    rule = next((rule for rule in rules if rule["host"] == target["host"]), {})
    subset = next((found for found in rule.get("subsets", ()) if found["name"] == target.get("subset")), {})
    for policy in (subset.get("trafficPolicy", {}), rule.get("trafficPolicy", {})):
        hashing: Mapping[str, Any] | None = policy.get("loadBalancer", {}).get("consistentHash")
        if hashing is not None:
            return hashing
    return {}


def _hash_policy(hashing: Mapping[str, Any]) -> route.RouteActionHashPolicy | None:
    """`route.go`, ConsistentHashToHashPolicy."""
    if "httpHeaderName" in hashing:
        header = route.RouteActionHashPolicyHeader(header_name=hashing["httpHeaderName"])
        return route.RouteActionHashPolicy(header=header)
    if "httpQueryParameterName" in hashing:
        parameter = route.RouteActionHashPolicyQueryParameter(name=hashing["httpQueryParameterName"])
        return route.RouteActionHashPolicy(query_parameter=parameter)
    if hashing:
        raise NotImplementedError(f"not translated: consistentHash {sorted(hashing)}")
    return None


def _retry_policy(retries: Mapping[str, Any] | None, *, consistent_hash: bool) -> route.RetryPolicy | None:
    """`pilot/pkg/networking/core/route/retry/retry.go`, ConvertPolicy."""
    retries = {"attempts": 2} if retries is None else retries
    only(retries, "attempts", "retryOn", "perTryTimeout")
    if retries.get("attempts", 0) <= 0:
        return None
    policy = route.RetryPolicy(
        num_retries=retries["attempts"],
        retry_on="connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
        host_selection_retry_max_attempts=5,
    )
    if not consistent_hash:
        policy.retry_host_predicate = [
            route.RetryPolicyRetryHostPredicate(
                name="envoy.retry_host_predicates.previous_hosts",
                typed_config=any_of(previous_hosts.PreviousHostsPredicate()),
            )
        ]
    if "retryOn" in retries:
        words = [word.strip() for word in retries["retryOn"].split(",")]
        policy.retriable_status_codes = [int(word) for word in words if word.isdigit()]
        names = [word for word in words if not word.isdigit()]
        if policy.retriable_status_codes and "retriable-status-codes" not in names:
            names.append("retriable-status-codes")
        policy.retry_on = ",".join(names)
    if "perTryTimeout" in retries:
        policy.per_try_timeout = duration(retries["perTryTimeout"])
    return policy
