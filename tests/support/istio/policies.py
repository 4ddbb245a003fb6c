"""AuthorizationPolicies and ext_authz providers -> Envoy's HTTP filters.

Every function says where Istio's control plane does the same (repository istio/istio).
"""

import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from support.istio.clusters import Service, cluster_name
from support.istio.manifests import Resource, only
from support.istio.messages import (
    any_of,
    core,
    duration,
    envoy_type,
    ext_authz,
    hcm,
    matcher,
    rbac,
    rbac_filter,
    route,
)

_RBAC = "envoy.filters.http.rbac"
_EXT_AUTHZ = "envoy.filters.http.ext_authz"
_SHADOW_PREFIX = "istio_ext_authz_"
_POLICY_PREFIX = "istio-ext-authz"

_ACTIONS = {"ALLOW": rbac.RbacAction.ALLOW, "DENY": rbac.RbacAction.DENY}


def custom_filters(
    policies: Sequence[Resource], providers: Sequence[Mapping[str, Any]], services: Iterable[Service]
) -> list[hcm.HttpFilter]:
    """The filters of CUSTOM policies: rules that deny nothing and mark what they match, then the question about it.

    A provider whose service the registry does not know turns the rules into denials, whatever `failOpen` says.
    `pilot/pkg/security/authz/builder/builder.go`, buildHTTP and getBadCustomDenyRules.
    """
    custom = [policy for policy in policies if policy.spec.get("action") == "CUSTOM"]
    if not custom:
        return []
    names = {policy.spec["provider"]["name"] for policy in custom}
    if len(names) > 1:
        raise NotImplementedError(f"more than one provider on a gateway: {', '.join(sorted(names))}")
    (name,) = names
    rules = _rules(custom, rbac.RbacAction.DENY, f"{_POLICY_PREFIX}-{name}-")
    provider = next((provider["envoyExtAuthzGrpc"] for provider in providers if provider["name"] == name), None)
    host = "" if provider is None else str(provider["service"]).rpartition("/")[2]
    if provider is None or host not in {service.host for service in services}:
        denials = {f"{policy}-deny-due-to-bad-CUSTOM-action": rule for policy, rule in rules.policies.items()}
        return [_rbac_filter(rbac_filter.Rbac(rules=rbac.Rbac(action=rbac.RbacAction.DENY, policies=denials)))]
    shadow = rbac_filter.Rbac(shadow_rules=rules, shadow_rules_stat_prefix=_SHADOW_PREFIX)
    return [_rbac_filter(shadow), _http_filter(_EXT_AUTHZ, _ext_authz(provider, host, f"{_POLICY_PREFIX}-{name}"))]


def plain_filters(policies: Sequence[Resource]) -> list[hcm.HttpFilter]:
    """The filters of DENY policies and, after it, of ALLOW policies: the order in which Istio asks them.

    `pilot/pkg/security/authz/builder/builder.go`, BuildHTTP and buildHTTP.
    """
    filters = []
    for action in ("DENY", "ALLOW"):
        of_action = [policy for policy in policies if policy.spec.get("action", "ALLOW") == action]
        if of_action:
            filters.append(_rbac_filter(rbac_filter.Rbac(rules=_rules(of_action, _ACTIONS[action], ""))))
    return filters


def _ext_authz(provider: Mapping[str, Any], host: str, prefix: str) -> ext_authz.ExtAuthz:
    """`pilot/pkg/security/authz/builder/extauthz.go`, generateGRPCConfig and generateFilterMatcherForProvider.

    clearRouteCache is left out here because that function leaves it out (istio#61558).
    """
    only(provider, "service", "port", "timeout", "failOpen", "statusOnError", "clearRouteCache")
    status = provider.get("statusOnError")
    return ext_authz.ExtAuthz(
        grpc_service=core.GrpcService(
            envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=cluster_name(host, provider["port"]), authority=host),
            timeout=duration(provider.get("timeout", "600s")),  # timeoutOrDefault
        ),
        transport_api_version=core.ApiVersion.V3,
        failure_mode_allow=provider.get("failOpen", False),
        status_on_error=None if status is None else envoy_type.HttpStatus(code=envoy_type.StatusCode(int(status))),
        filter_enabled_metadata=matcher.MetadataMatcher(
            filter=_RBAC,
            path=[matcher.MetadataMatcherPathSegment(key=f"{_SHADOW_PREFIX}shadow_effective_policy_id")],
            value=matcher.ValueMatcher(string_match=matcher.StringMatcher(prefix=prefix)),
        ),
    )


def _rules(policies: Iterable[Resource], action: rbac.RbacAction, prefix: str) -> rbac.Rbac:
    """`builder.go`, build and policyName: one rule of Envoy for each rule of a policy; none matches nothing."""
    found: dict[str, rbac.Policy] = {}
    for policy in policies:
        rules = policy.spec.get("rules", [])
        for number, rule in enumerate(rules):
            found[f"{prefix}ns[{policy.namespace}]-policy[{policy.name}]-rule[{number}]"] = _rule(rule)
        if not rules:
            never = rbac.Policy(
                permissions=[rbac.Permission(not_rule=rbac.Permission(any=True))],
                principals=[rbac.Principal(not_id=rbac.Principal(any=True))],
            )
            found[f"{prefix}ns[{policy.namespace}]-policy[{policy.name}]-rule[0]"] = never
    return rbac.Rbac(action=action, policies=found)


def _rule(rule: Mapping[str, Any]) -> rbac.Policy:
    """`pilot/pkg/security/authz/model/model.go`, New and Generate."""
    only(rule, "from", "to")
    sources = [part["source"] for part in (rule or {}).get("from", [])] or [{}]
    operations = [part["operation"] for part in (rule or {}).get("to", [])] or [{}]
    return rbac.Policy(
        permissions=[_permission(operation) for operation in operations],
        principals=[_principal(source) for source in sources],
    )


def _permission(operation: Mapping[str, Any]) -> rbac.Permission:
    kinds: dict[str, Callable[[str], rbac.Permission]] = {
        "Hosts": lambda value: rbac.Permission(header=_header_matcher(":authority", value, ignore_case=True)),
        "Methods": lambda value: rbac.Permission(header=_header_matcher(":method", value, ignore_case=False)),
        "Paths": lambda value: rbac.Permission(url_path=matcher.PathMatcher(path=_string_matcher(value))),
        "Ports": lambda value: rbac.Permission(destination_port=int(value)),
    }
    only(operation, *(name for kind in kinds for name in (kind.lower(), f"not{kind}")))
    rules = []
    for kind, make in kinds.items():
        if values := operation.get(kind.lower()):
            rules.append(rbac.Permission(or_rules=rbac.PermissionSet(rules=[make(value) for value in values])))
        if values := operation.get(f"not{kind}"):
            any_of_them = rbac.Permission(or_rules=rbac.PermissionSet(rules=[make(value) for value in values]))
            rules.append(rbac.Permission(not_rule=any_of_them))
    return rbac.Permission(and_rules=rbac.PermissionSet(rules=rules or [rbac.Permission(any=True)]))


def _principal(source: Mapping[str, Any]) -> rbac.Principal:
    kinds: dict[str, tuple[str, Callable[[str], rbac.Principal]]] = {
        # generator.go: remoteIPGenerator asks for the client, srcIPGenerator for the connection's peer.
        "remoteIpBlocks": ("notRemoteIpBlocks", lambda value: rbac.Principal(remote_ip=_cidr(value))),
        "ipBlocks": ("notIpBlocks", lambda value: rbac.Principal(direct_remote_ip=_cidr(value))),
    }
    only(source, *(name for known, (negated, _) in kinds.items() for name in (known, negated)))
    ids = []
    for name, (negated, make) in kinds.items():
        if values := source.get(name):
            ids.append(rbac.Principal(or_ids=rbac.PrincipalSet(ids=[make(value) for value in values])))
        if values := source.get(negated):
            any_of_them = rbac.Principal(or_ids=rbac.PrincipalSet(ids=[make(value) for value in values]))
            ids.append(rbac.Principal(not_id=any_of_them))
    return rbac.Principal(and_ids=rbac.PrincipalSet(ids=ids or [rbac.Principal(any=True)]))


def _cidr(text: str) -> core.CidrRange:
    """`pilot/pkg/networking/util/util.go`, AddrStrToCidrRange: an address alone is one host."""
    network = ipaddress.ip_network(text, strict=False)
    return core.CidrRange(address_prefix=str(network.network_address), prefix_len=network.prefixlen)


def _string_matcher(value: str) -> matcher.StringMatcher:
    """`pilot/pkg/security/authz/matcher/string.go`, StringMatcherWithPrefix."""
    if value == "*":
        return matcher.StringMatcher(safe_regex=matcher.RegexMatcher(regex=".+"))
    if value.startswith("*"):
        return matcher.StringMatcher(suffix=value[1:])
    if value.endswith("*"):
        return matcher.StringMatcher(prefix=value[:-1])
    return matcher.StringMatcher(exact=value)


def _header_matcher(name: str, value: str, *, ignore_case: bool) -> route.HeaderMatcher:
    """`pilot/pkg/security/authz/matcher/header.go`, HeaderMatcher and HostMatcher."""
    if value == "*":
        return route.HeaderMatcher(name=name, present_match=True)
    found = _string_matcher(value)
    found.ignore_case = ignore_case
    return route.HeaderMatcher(name=name, string_match=found)


def _rbac_filter(config: rbac_filter.Rbac) -> hcm.HttpFilter:
    return _http_filter(_RBAC, config)


def _http_filter(name: str, config: Any) -> hcm.HttpFilter:
    return hcm.HttpFilter(name=name, typed_config=any_of(config))
