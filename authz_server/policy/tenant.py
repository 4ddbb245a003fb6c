"""How a request names its tenant.

All configured sources are read, in every way a backend might read them. Two answers that differ are one denial:
whoever could make us route by one name and the backend act on another would be in another tenant's state.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import unquote_plus

from authz_server.policy.access import normalize_host
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.identifiers import is_identifier
from authz_server.policy.paths import Segments, read_path
from authz_server.policy.reasons import Reason

_PLACEHOLDER = "{tenant}"
_HEADER_NAME = re.compile(r"[a-z0-9][a-z0-9-]*", re.ASCII)
_QUERY_SEPARATOR = re.compile(r"[&;]")


class SourceKind(StrEnum):
    """The part of a request in which a source looks."""

    HEADER = "header"
    QUERY = "query"
    HOST = "host"
    PATH = "path"


@dataclass(frozen=True, slots=True)
class TenantSource:
    """One place where requests name their tenant."""

    kind: SourceKind
    name: str
    """The header's name in lower case, the query parameter's name, or the pattern with `{tenant}` in it."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


def parse_tenant_source(text: str) -> TenantSource:
    """Read `header:x-tenant-id`, `query:tenant_id`, `host:{tenant}.example.com` or `path:/t/{tenant}/`.

    Raises:
        ValueError: naming the text and how to mend it.
    """
    kind_text, colon, name = text.strip().partition(":")
    if not colon or kind_text not in list(SourceKind) or not name:
        raise ValueError(
            f"{text!r} is not a tenant source: write header:NAME, query:NAME, host:PATTERN or path:PATTERN"
        )
    kind = SourceKind(kind_text)
    if kind is SourceKind.HEADER:
        name = name.lower()
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{text!r}: {name!r} is not a header name of letters, digits and hyphens")
    elif kind is SourceKind.HOST:
        name = name.lower()
        if not name.startswith(f"{_PLACEHOLDER}.") or _PLACEHOLDER in name[len(_PLACEHOLDER) :]:
            raise ValueError(f"{text!r}: a host pattern begins with {_PLACEHOLDER}. and holds it once")
    elif kind is SourceKind.PATH:
        segments = name.strip("/").split("/")
        if not name.startswith("/") or segments.count(_PLACEHOLDER) != 1 or name.count("{") != 1:
            raise ValueError(f"{text!r}: a path pattern begins with '/' and has one segment {_PLACEHOLDER}")
    return TenantSource(kind, name)


def name_tenant(
    attributes: RequestAttributes, path: str, sources: tuple[TenantSource, ...]
) -> tuple[str | None, Reason | None]:
    """Return (tenant id, None), (None, None) when no tenant is named, or (None, the reason to deny).

    `path` is the request's path without its query.
    """
    named = {text for source in sources for text in _read(source, attributes, path)}
    if not named:
        return None, None
    if len(named) > 1:
        return None, Reason.AMBIGUOUS_TENANT
    (text,) = named
    return (text, None) if is_identifier(text) else (None, Reason.INVALID_TENANT)


def _read(source: TenantSource, attributes: RequestAttributes, path: str) -> Iterator[str]:
    match source.kind:
        case SourceKind.HEADER:
            value = attributes.headers.get(source.name)
            if value is not None:
                # Repeated headers arrive joined by a comma, so this splits what may be two. Equal ones agree.
                yield from (part.strip(" \t") for part in value.split(","))
        case SourceKind.QUERY:
            yield from _query_values(attributes.path.partition("?")[2], source.name)
        case SourceKind.HOST:
            label, dot, domain = normalize_host(attributes.host).partition(".")
            if dot and domain == source.name[len(_PLACEHOLDER) + 1 :]:
                yield label
        case SourceKind.PATH:
            pattern = tuple(source.name.strip("/").split("/"))
            for reading in read_path(path):
                yield from _path_value(pattern, reading)


def _query_values(query: str, name: str) -> Iterator[str]:
    """Yield the parameter's values as today's parsers split a query (`&`), and as older ones do (`&` and `;`)."""
    splits = [query.split("&")]
    if ";" in query:
        splits.append(_QUERY_SEPARATOR.split(query))
    for pairs in splits:
        for pair in pairs:
            key, _, value = pair.partition("=")
            if unquote_plus(key) == name:
                yield unquote_plus(value)


def _path_value(pattern: tuple[str, ...], reading: Segments) -> Iterator[str]:
    if len(reading) < len(pattern):
        return
    value = ""
    for expected, segment in zip(pattern, reading, strict=False):
        if expected == _PLACEHOLDER:
            value = segment
        elif expected != segment:
            return
    if value:
        yield value
