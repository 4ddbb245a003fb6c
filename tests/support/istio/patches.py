"""EnvoyFilters: patches on what the control plane has built.

The order and the rules are those of `pilot/pkg/networking/core/envoyfilter` (repository istio/istio), in the files
listener_patch.go, rc_patch.go and cluster_patch.go. Other than there, a patch that finds nothing to patch is an error
and not silence: what a manifest promises would not happen.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from support.istio.manifests import Resource, only
from support.istio.messages import cluster, hcm, listener, merge, merged_any, protobuf, route, typed

MANAGER = "envoy.filters.network.http_connection_manager"
"""Name of the HTTP connection manager among the network filters."""

_PartT = TypeVar("_PartT", listener.ListenerFilter, listener.Filter, hcm.HttpFilter, route.Route)


class PatchFoundNothingError(LookupError):
    """A patch whose match fits nothing: the control plane would leave it out without a word."""


@dataclass(slots=True)
class _Patch:
    apply_to: str
    match: Mapping[str, Any]
    operation: str
    value: Mapping[str, Any]
    source: str
    """For people: the EnvoyFilter and the number of the patch in it."""
    applied: bool = False

    @property
    def listener(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.match.get("listener", {})
        return found

    @property
    def chain(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.listener.get("filterChain", {})
        return found

    @property
    def virtual_host(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.match.get("routeConfiguration", {}).get("vhost", {})
        return found


class Patches:
    """The patches of EnvoyFilters for one context (GATEWAY, SIDECAR_INBOUND, SIDECAR_OUTBOUND)."""

    def __init__(self, envoy_filters: Iterable[Resource], context: str) -> None:
        self._patches = [
            _Patch(
                apply_to=patch["applyTo"],
                match=patch.get("match", {}),
                operation=patch["patch"]["operation"],
                value=patch["patch"].get("value", {}),
                source=f"EnvoyFilter {found.name}, patch {number}",
            )
            for found in sorted(envoy_filters, key=lambda found: found.spec.get("priority", 0))
            for number, patch in enumerate(found.spec["configPatches"])
            if patch.get("match", {}).get("context", "ANY") in (context, "ANY")
        ]
        for patch in self._patches:
            only(patch.match, "context", "listener", "routeConfiguration", "cluster")
            only(patch.listener, "name", "portNumber", "filterChain", "listenerFilter")
            only(patch.chain, "name", "filter")
            only(patch.match.get("routeConfiguration"), "name", "portNumber", "vhost")

    def check_all_applied(self) -> None:
        """Raise PatchFoundNothingError for each patch that has not been applied to anything."""
        if idle := [patch.source for patch in self._patches if not patch.applied]:
            raise PatchFoundNothingError("; ".join(idle))

    def patch_listener(self, found: listener.Listener) -> None:
        """Patch a listener and its filters: `listener_patch.go`, patchListener."""
        for patch in self._for_listener("LISTENER", found):
            _merge(patch, found)
        found.listener_filters = _patched(
            found.listener_filters,
            listener.ListenerFilter,
            self._for_listener("LISTENER_FILTER", found),
            lambda patch: patch.listener.get("listenerFilter"),
        )
        for chain in found.filter_chains:
            network = [patch for patch in self._for_listener("NETWORK_FILTER", found) if _fits(patch.chain, chain.name)]
            chain.filters = _patched(chain.filters, listener.Filter, network, _network_filter)
            for network_filter in chain.filters:
                if network_filter.name == MANAGER:
                    self._patch_http_filters(found, chain, network_filter)

    def _patch_http_filters(
        self, found: listener.Listener, chain: listener.FilterChain, network_filter: listener.Filter
    ) -> None:
        """`listener_patch.go`, patchHTTPFilters."""
        assert network_filter.typed_config is not None
        manager = network_filter.typed_config.unpack()
        patches = [
            patch
            for patch in self._for_listener("HTTP_FILTER", found)
            if _fits(patch.chain, chain.name) and _network_filter(patch) in (None, network_filter.name)
        ]
        manager.http_filters = _patched(
            manager.http_filters,
            hcm.HttpFilter,
            patches,
            lambda patch: patch.chain.get("filter", {}).get("subFilter", {}).get("name"),
        )
        network_filter.typed_config = protobuf.Any.pack(manager)

    def patch_routes(self, found: route.RouteConfiguration) -> None:
        """Patch routes: `rc_patch.go`, ApplyRouteConfigurationPatches."""
        for patch in self._for_routes("ROUTE_CONFIGURATION", found):
            _merge(patch, found)
        for host in found.virtual_hosts:
            for patch in self._for_routes("VIRTUAL_HOST", found):
                if _fits(patch.virtual_host, host.name):
                    _merge(patch, host)
            patches = [patch for patch in self._for_routes("HTTP_ROUTE", found) if _fits(patch.virtual_host, host.name)]
            host.routes = _patched(
                host.routes, route.Route, patches, lambda patch: patch.virtual_host.get("route", {}).get("name")
            )

    def patch_cluster(self, found: cluster.Cluster) -> None:
        """Patch a cluster: `cluster_patch.go`, ApplyClusterMerge and clusterMatch."""
        _, port, subset, host = found.name.split("|")
        for patch in self._patches:
            match = patch.match.get("cluster", {})
            if (
                patch.apply_to == "CLUSTER"
                and match.get("name", found.name) == found.name
                and match.get("service", host) == host
                and match.get("subset", subset) == subset
                and str(match.get("portNumber", port)) == port
            ):
                _merge(patch, found)

    def _for_listener(self, apply_to: str, found: listener.Listener) -> list[_Patch]:
        """`listener_patch.go`, listenerMatch."""
        assert found.address is not None
        assert found.address.socket_address is not None
        port = found.address.socket_address.port_value
        return [
            patch
            for patch in self._patches
            if patch.apply_to == apply_to
            and _fits(patch.listener, found.name)
            and patch.listener.get("portNumber", port) == port
        ]

    def _for_routes(self, apply_to: str, found: route.RouteConfiguration) -> list[_Patch]:
        """`rc_patch.go`, routeConfigurationMatch: the port is the service's or the one listened on."""
        return [
            patch
            for patch in self._patches
            if patch.apply_to == apply_to
            and _fits(patch.match.get("routeConfiguration", {}), found.name)
            and patch.match.get("routeConfiguration", {}).get("portNumber", 80) in (80, 8080)
        ]


def _fits(match: Mapping[str, Any], name: str) -> bool:
    return bool(match.get("name", name) == name)


def _network_filter(patch: _Patch) -> str | None:
    name: str | None = patch.chain.get("filter", {}).get("name")
    return name


def _merge(patch: _Patch, found: Any) -> None:
    if patch.operation != "MERGE":
        raise NotImplementedError(f"{patch.source}: not translated: {patch.operation} of {patch.apply_to}")
    merge(found, typed(type(found), patch.value))
    patch.applied = True


def _patched(
    parts: Sequence[_PartT], kind: type[_PartT], patches: Sequence[_Patch], wanted: Callable[[_Patch], str | None]
) -> list[_PartT]:
    """A list of named parts, patched: first what adds, replaces and removes, then what merges.

    `wanted` says which part a patch means; None: no particular one.
    """
    found = list(parts)
    for patch in patches:
        if patch.operation == "MERGE":
            continue
        found, patch.applied = _placed(found, kind, patch, wanted(patch))
    for patch in patches:
        if patch.operation != "MERGE":
            continue
        for part in found:
            if wanted(patch) in (None, part.name):
                _merge_part(patch, part, typed(kind, patch.value))
    return found


def _placed(parts: list[_PartT], kind: type[_PartT], patch: _Patch, name: str | None) -> tuple[list[_PartT], bool]:
    """The list with one patch that is no merge, and whether it found its place."""
    if patch.operation == "REMOVE":
        kept = [part for part in parts if part.name != name]
        return kept, len(kept) < len(parts)
    new = typed(kind, patch.value)
    place = next((number for number, part in enumerate(parts) if part.name == name), None)
    match patch.operation, name, place:
        case ("ADD", _, _) | ("INSERT_AFTER", None, _):
            return [*parts, new], True
        case ("INSERT_FIRST", _, _) | ("INSERT_BEFORE", None, _):
            return [new, *parts], True
        case (_, _, None):
            return parts, False
        case ("INSERT_BEFORE", _, int(at)):
            return [*parts[:at], new, *parts[at:]], True
        case ("INSERT_AFTER", _, int(at)):
            return [*parts[: at + 1], new, *parts[at + 1 :]], True
        case ("REPLACE", _, int(at)):
            return [*parts[:at], new, *parts[at + 1 :]], True
    raise NotImplementedError(f"{patch.source}: not translated: {patch.operation} of {patch.apply_to}")


def _merge_part(patch: _Patch, part: Any, new: Any) -> None:
    """`listener_patch.go`, patchNetworkFilter and mergeHTTPFilter: the wrapped messages are merged, not replaced."""
    if isinstance(part, route.Route):
        merge(part, new)
    else:
        part.name = new.name or part.name
        if new.typed_config is not None:
            part.typed_config = merged_any(part.typed_config, new.typed_config)
    patch.applied = True
