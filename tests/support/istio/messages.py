"""Envoy's messages, typed: from the independent full implementation `envoy-data-plane`.

Typed, so that a field that does not exist is an error here; serialized as protobuf, so that Envoy reads exactly what
was built. Importing it warns of Pydantic's deprecations, which are not ours to mend.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeVar

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import betterproto2
    from envoy_data_plane.envoy.config.accesslog import v3 as accesslog
    from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap
    from envoy_data_plane.envoy.config.cluster import v3 as cluster
    from envoy_data_plane.envoy.config.core import v3 as core
    from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
    from envoy_data_plane.envoy.config.listener import v3 as listener
    from envoy_data_plane.envoy.config.metrics import v3 as metrics
    from envoy_data_plane.envoy.config.rbac import v3 as rbac
    from envoy_data_plane.envoy.config.route import v3 as route
    from envoy_data_plane.envoy.extensions.access_loggers.file import v3 as file_log
    from envoy_data_plane.envoy.extensions.filters.http.cors import v3 as cors
    from envoy_data_plane.envoy.extensions.filters.http.ext_authz import v3 as ext_authz
    from envoy_data_plane.envoy.extensions.filters.http.fault import v3 as fault
    from envoy_data_plane.envoy.extensions.filters.http.grpc_stats import v3 as grpc_stats
    from envoy_data_plane.envoy.extensions.filters.http.rbac import v3 as rbac_filter
    from envoy_data_plane.envoy.extensions.filters.http.router import v3 as router
    from envoy_data_plane.envoy.extensions.filters.http.stateful_session import v3 as stateful_session
    from envoy_data_plane.envoy.extensions.filters.listener.proxy_protocol import v3 as proxy_protocol
    from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
    from envoy_data_plane.envoy.extensions.http.stateful_session.header import v3 as header_session
    from envoy_data_plane.envoy.extensions.retry.host.previous_hosts import v3 as previous_hosts
    from envoy_data_plane.envoy.extensions.upstreams.http import v3 as upstream_http
    from envoy_data_plane.envoy.service.discovery import v3 as discovery
    from envoy_data_plane.envoy.type import matcher as _matcher_package  # noqa: F401 - makes the next line resolve
    from envoy_data_plane.envoy.type import v3 as envoy_type
    from envoy_data_plane.envoy.type.matcher import v3 as matcher
    from envoy_data_plane.google import protobuf

__all__ = [
    "accesslog", "bootstrap", "cluster", "core", "cors", "discovery", "endpoint", "envoy_type", "ext_authz", "fault",
    "file_log", "grpc_stats", "hcm", "header_session", "listener", "matcher", "metrics", "previous_hosts", "protobuf",
    "proxy_protocol", "rbac", "rbac_filter", "route", "router", "stateful_session", "upstream_http",
]  # fmt: skip

_MessageT = TypeVar("_MessageT", bound=betterproto2.Message)

UINT32_MAX = 4_294_967_295

_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|ns|h|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def duration(text: str) -> timedelta:
    """A duration as Istio's manifests write it, in Go's notation: 30s, 1m30s, 250ms. Raises ValueError."""
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"not a duration: {text!r}")
    return timedelta(seconds=sum(float(number) * _SECONDS[unit] for number, unit in parts))


def any_of(message: betterproto2.Message) -> protobuf.Any:
    """A message wrapped with its type."""
    return protobuf.Any.pack(message)


def typed(kind: type[_MessageT], value: Mapping[str, Any]) -> _MessageT:
    """A message from its JSON form, nested ones under an @type included.

    Raises KeyError, naming it, for a field that the message does not have, and ModuleNotFoundError for an @type that
    does not exist.
    """
    _import_types(value)
    return kind.from_dict(value)


def _import_types(value: Any) -> None:
    """Import what defines the messages that an @type names; a message is known once it is imported."""
    if isinstance(value, Mapping):
        if isinstance(name := value.get("@type"), str):
            package = name.rpartition("/")[2].rpartition(".")[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                import_module(f"envoy_data_plane.{package}")
        for part in value.values():
            _import_types(part)
    elif isinstance(value, list):
        for part in value:
            _import_types(part)


def merge(into: betterproto2.Message, patch: betterproto2.Message) -> None:
    """Merge as protobuf does: messages field by field, lists appended, maps by key, the rest replaced.

    What is not set in `patch`, a plain number, flag or name with its default value included, changes nothing. Istio
    has the same rules (`pkg/proto/merge/merge.go`, Merge), durations replaced as a whole.
    """
    for field in dataclasses.fields(patch):
        if not patch.is_set(field.name):
            continue
        new, old = getattr(patch, field.name), getattr(into, field.name)
        if isinstance(new, list):
            setattr(into, field.name, [*old, *new])
        elif isinstance(new, dict):
            setattr(into, field.name, {**old, **new})
        elif isinstance(new, betterproto2.Message) and not isinstance(new, protobuf.Any) and old is not None:
            merge(old, new)
        else:
            setattr(into, field.name, new)


def merged_any(into: protobuf.Any, patch: protobuf.Any) -> protobuf.Any:
    """Two wrapped messages of one type, merged (`pilot/pkg/networking/util/util.go`, MergeAnyWithAny)."""
    target, source = into.unpack(), patch.unpack()
    if type(target) is not type(source):
        raise TypeError(f"cannot merge a {patch.type_url} into a {into.type_url}")
    merge(target, source)
    return any_of(target)
