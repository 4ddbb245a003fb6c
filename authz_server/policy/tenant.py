"""How a request names its tenant.

All configured sources are read, in every way a backend might read them. Two answers that differ are one denial:
whoever could make us route by one name and the backend act on another would be in another tenant's state.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_plus, unquote_to_bytes

from authz_server.policy.access import normalize_host
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.identifiers import is_identifier
from authz_server.policy.paths import RequestPath, fold_text, parse_path_pattern
from authz_server.policy.reasons import Reason

_PLACEHOLDER: Final = "{tenant}"
_HEADER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]*", re.ASCII)
_MAX_HEADER_LENGTH: Final = 1024
"""Characters of a header that names a tenant, a few times over at most; longer ones are not taken apart."""
_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_NOT_IN_QUERY_NAMES: Final = re.compile(r"[\s&;=#?+%\0]")
_AMPERSAND: Final = re.compile("&")
_QUERY_SEPARATOR: Final = re.compile("[&;]")
_ENCODED_SEPARATOR: Final = re.compile(r"%(?:26|3b|3d)", re.IGNORECASE)
_TELLING_ESCAPE: Final = re.compile(r"%(?:25|3[0-9f]|[4-7][0-9a-f]|[89a-f])", re.IGNORECASE)
"""Escapes of `%`, `?`, digits, letters, and what is not ASCII: without them, decoding makes no name and no query that
was not there, nor an escape that a second decoding would find."""
_PLAIN_RUN: Final = re.compile(r"[a-z0-9]*")


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
    read: "_Reader" = field(init=False, repr=False, compare=False)
    """Returns what a request names there; equal values perhaps more than once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "read", _READERS[self.kind])

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
    match kind:
        case SourceKind.HEADER:
            # ASCII first: the Kelvin sign in lower case is a `k`.
            if not name.isascii() or not _HEADER_NAME.fullmatch(name.lower()):
                raise ValueError(f"{text!r}: {name!r} is not a header name of letters, digits and hyphens")
            name = name.lower()
        case SourceKind.QUERY:
            if _NOT_IN_QUERY_NAMES.search(name):
                raise ValueError(
                    f"{text!r}: write the query parameter's name as it is when decoded, without white space and any "
                    "of '&;=#?+%': a parameter with these in its name is never found"
                )
        case SourceKind.HOST:
            name = name.lower() if name.isascii() else name
            _check_host_pattern(text, name)
        case SourceKind.PATH:
            _check_path_pattern(text, name)
    return TenantSource(kind, name)


def _check_host_pattern(text: str, name: str) -> None:
    domain = name.removeprefix(f"{_PLACEHOLDER}.")
    if domain == name or _PLACEHOLDER in domain:
        raise ValueError(f"{text!r}: a host pattern begins with {_PLACEHOLDER}. and holds it once")
    if ":" in domain or domain.endswith("."):
        raise ValueError(f"{text!r}: hosts are compared without port and without a dot at the end: leave it out")
    if not all(_LABEL.fullmatch(label) for label in domain.split(".")):
        raise ValueError(
            f"{text!r}: {domain!r} is not a domain: write labels of letters, digits and hyphens with dots between "
            "them, names in other scripts as xn--..."
        )


def _check_path_pattern(text: str, name: str) -> None:
    if not name.startswith("/") or name.split("/").count(_PLACEHOLDER) != 1 or name.count("{") != 1:
        raise ValueError(f"{text!r}: a path pattern begins with '/' and has one segment {_PLACEHOLDER}")
    try:
        segments = parse_path_pattern(name).segments
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    if "*" in segments:
        raise ValueError(f"{text!r}: only {_PLACEHOLDER} stands for any segment here, write the others out")


def name_tenant(
    attributes: RequestAttributes, path: RequestPath, sources: tuple[TenantSource, ...]
) -> tuple[str | None, Reason | None]:
    """Return (tenant id, None), (None, None) when no tenant is named, or (None, the reason to deny)."""
    named: str | None = None
    for source in sources:
        for text in source.read(source.name, attributes, path):
            if named is None:
                named = text
            elif text != named:
                return None, Reason.AMBIGUOUS_TENANT
    if named is None or is_identifier(named):
        return named, None
    return None, Reason.INVALID_TENANT


def _from_header(name: str, attributes: RequestAttributes, _path: RequestPath) -> Iterable[str]:
    value = attributes.headers.get(name)
    if value is None:
        return ()
    if len(value) > _MAX_HEADER_LENGTH:
        return (value,)  # as it is: no tenant id
    if "," not in value:
        return (value.strip(" \t"),)
    # Repeated headers arrive joined by a comma, so this splits what may be two. Equal ones agree.
    return [part.strip(" \t") for part in value.split(",")]


def _from_query(name: str, _attributes: RequestAttributes, path: RequestPath) -> Iterable[str]:
    query, text = path.query, path.text
    values = [*_query_values(query, name)] if query and _may_name(query, name) else []
    if "%" in text:
        for inner in _queries_inside(text):
            values += _query_values(inner, name)
    return values


def _from_host(pattern: str, attributes: RequestAttributes, _path: RequestPath) -> Iterable[str]:
    label, dot, domain = normalize_host(attributes.host).partition(".")
    return (label,) if dot and domain == pattern[len(_PLACEHOLDER) + 1 :] else ()


def _from_path(pattern: str, _attributes: RequestAttributes, path: RequestPath) -> Iterable[str]:
    return _path_values(tuple(pattern.strip("/").split("/")), path.readings(fold_case=False))


_Reader = Callable[[str, RequestAttributes, RequestPath], Iterable[str]]
_READERS: Mapping[SourceKind, _Reader] = {
    SourceKind.HEADER: _from_header,
    SourceKind.QUERY: _from_query,
    SourceKind.HOST: _from_host,
    SourceKind.PATH: _from_path,
}
"""How to read each kind of source, given its name."""


def _queries_inside(path: str) -> Collection[str]:
    """Return the queries that a backend finds in a path (without query) that it has decoded once or twice."""
    if not _TELLING_ESCAPE.search(path):
        return ()
    once = _decoded(path)
    return {query for text in (once, _decoded(once)) for _, mark, query in (text.partition("?"),) if mark}


def _may_name(query: str, name: str) -> bool:
    """Tell whether `_query_values` can yield anything; it is sure only when it says no, and that is soon said.

    What a backend makes of a query's names changes letters and digits only by decoding them and by letter case. So
    where nothing decodes to one, the letters of the wanted name stand in the query as they are, or it is not there.
    """
    return (
        _longest_plain_run(name) in query.lower()
        or not query.isascii()
        or ("%" in query and _TELLING_ESCAPE.search(query) is not None)
    )


@lru_cache(maxsize=64)
def _longest_plain_run(name: str) -> str:
    """Return the longest run of letters and digits in a parameter's name from the settings; empty when it has none."""
    runs: list[str] = _PLAIN_RUN.findall(fold_text(name))
    return max(runs, key=len)


def _query_values(query: str, name: str) -> Iterator[str]:
    """Yield the values, decoded once, of the parameters that a backend may take for the one of this name.

    Backends split a query at `&`, older ones at `;` too; they decode names once, or again behind a hop that has done
    so; they may ignore letter case; and PHP changes names (see `_names_in_php`).
    """
    wanted = _mangled(fold_text(name))
    # A name that is the wanted one after the first decoding stays it in the second: nothing in it is left to decode.
    decoded = fold_text(_names_decoded(_names_decoded(query)))
    mangled = _mangled(decoded)
    if wanted not in mangled:
        return  # so it is with most queries: no parameter can have this name
    for separator in (_AMPERSAND, _QUERY_SEPARATOR) if ";" in query else (_AMPERSAND,):
        cut = separator.split
        for pair, decoded_pair, mangled_pair in zip(cut(query), cut(decoded), cut(mangled), strict=True):
            if wanted in mangled_pair and wanted in _names_in_php(decoded_pair.partition("=")[0]):
                yield unquote_plus(pair.partition("=")[2])


def _names_decoded(query: str) -> str:
    """Decode a query once for the sake of its names; what was no separator before is none after."""
    if "%" not in query:
        return query.replace("+", " ")
    return _decoded(_ENCODED_SEPARATOR.sub("\ufffd", query).replace("+", " "))


def _names_in_php(name: str) -> set[str]:
    """Return what PHP and its like make of a parameter's name, itself (mangled) included.

    PHP drops leading spaces, writes `_` for a dot, a space and a bracket that is not closed, and takes `name[x]` for
    an element of `name`; parsers of nested parameters in other languages take `[name]` for `name`.
    """
    name = name.lstrip(" ")
    names = {_mangled(name), _mangled(name.partition("[")[0])}
    if name.startswith("["):
        names.add(_mangled(name[1:].partition("]")[0]))
    return names


def _mangled(text: str) -> str:
    return text.replace(".", "_").replace(" ", "_").replace("[", "_")


def _decoded(text: str) -> str:
    return unquote_to_bytes(text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")


def _path_values(pattern: tuple[str, ...], readings: Iterable[str]) -> Iterator[str]:
    """Yield the segments that stand for the tenant; the others are compared without regard to letter case."""
    folded = tuple(fold_text(segment) for segment in pattern)
    heads = {tuple(reading[1:].split("/", len(pattern))[: len(pattern)]) for reading in readings}
    for head in heads:
        if len(head) < len(pattern):
            continue
        value = ""
        for expected, segment in zip(folded, head, strict=True):
            if expected == _PLACEHOLDER:
                value = segment
            elif expected != fold_text(segment):
                break
        else:
            if value:
                yield value
