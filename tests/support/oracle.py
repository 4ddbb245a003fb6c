"""A second opinion on every decision, written from the architecture and not from the policy room's code.

It is slow and plain on purpose: it walks through lists of records, asks `ipaddress` about every network, and tries
every way in which a backend might read a path one after the other. It shares no code with `authz_server.policy` but
the words of its reasons.
"""

import hashlib
import ipaddress
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from authz_server.policy.reasons import Reason

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

LONGEST_PATH, LONGEST_ODD_PATH, LONGEST_TWICE_ESCAPED_PATH, LONGEST_QUERY = 8192, 2048, 512, 16384
ODD_SIGNS = ("%", "\\", ";", "#", "\0", "//", "/.")
IDENTIFIER_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")


class PlainEntry(NamedTuple):
    list_name: str
    cidr: str
    expires_at: int | None = None


class PlainScope(NamedTuple):
    name: str
    restricted: bool = False
    shadow: bool = False
    allow_lists: tuple[str, ...] = ()
    block_lists: tuple[str, ...] = ()


class PlainResource(NamedTuple):
    name: str
    paths: tuple[str, ...]
    hosts: tuple[str, ...] = ()


class PlainTenant(NamedTuple):
    name: str
    instance: str | None
    held: bool = False


class PlainInstance(NamedTuple):
    name: str
    weight: int = 1
    state: str = "active"


class PlainOptions(NamedTuple):
    trusted_peers: tuple[str, ...] = ()
    missing_client_address: str = "deny"
    tenant_sources: tuple[str, ...] = ()
    unknown_tenant: str = "none"
    missing_tenant: str = "allow"
    fold_path_case: bool = True


@dataclass
class PlainPolicy:
    """Records as plain as they come; `unreadable` ones cannot be read, `kept` ones among them were read before."""

    options: PlainOptions = field(default_factory=PlainOptions)
    lists: list[str] = field(default_factory=list)
    entries: list[PlainEntry] = field(default_factory=list)
    scopes: list[PlainScope] = field(default_factory=list)
    resources: list[PlainResource] = field(default_factory=list)
    tenants: list[PlainTenant] = field(default_factory=list)
    instances: list[PlainInstance] = field(default_factory=list)
    unreadable: set[tuple[str, ...]] = field(default_factory=set)
    """(kind, name), and of an entry (kind, CIDR, list)."""
    kept: set[tuple[str, ...]] = field(default_factory=set)


class PlainRequest(NamedTuple):
    method: str
    host: str
    path: str
    peer: str | None
    external: str | None
    headers: dict[str, str]


class Outcome(NamedTuple):
    """What one scope says; `network` is (version, lowest address, prefix length)."""

    scope: str
    enforcement: str
    reason: str
    list_name: str | None = None
    network: tuple[int, int, int] | None = None


class Answer(NamedTuple):
    """A decision in words and numbers only, so that decisions of different makers can be compared."""

    reason: str
    client: tuple[int, int] | None = None
    """(version, the address as a number)."""
    tenant: str | None = None
    instance: str | None = None
    affinity: str = "none"
    outcomes: tuple[Outcome, ...] = ()
    deciding: Outcome | None = None
    shadow_denials: tuple[Outcome, ...] = ()


class Oracle:
    """Answers for one policy."""

    def __init__(self, policy: PlainPolicy) -> None:
        self.options = policy.options
        self.trusted = [unmapped_network(text) for text in policy.options.trusted_peers]
        self.lists: dict[str, list[tuple[IPNetwork, int | None, bool]]] = {}
        for entry in policy.entries:
            lost = _lost(policy, "entry", entry.cidr, entry.list_name)
            network = unmapped_network(entry.cidr)
            self.lists.setdefault(entry.list_name, []).append((network, entry.expires_at, lost))
        self.scopes = {
            scope.name: PlainScope(scope.name, restricted=True) if _lost(policy, "scope", scope.name) else scope
            for scope in policy.scopes
        }
        self.resources = {
            resource.name: PlainResource(resource.name, ("/",))
            if _lost(policy, "resource", resource.name)
            else resource
            for resource in policy.resources
        }
        self.tenants = {
            tenant.name: PlainTenant(tenant.name, None) if _lost(policy, "tenant", tenant.name) else tenant
            for tenant in policy.tenants
        }
        self.instances = {
            instance.name: PlainInstance(instance.name, 1, "down")
            if _lost(policy, "instance", instance.name)
            else instance
            for instance in policy.instances
        }
        self.hashed: dict[str, str | None] = {}

    def decide(self, request: PlainRequest, now: float) -> Answer:
        path, _, query = request.path.partition("?")
        if request.method == "" or (path[:1] != "/" and path != "*"):
            return Answer("bad_request")
        odd = any(sign in path for sign in ODD_SIGNS)
        longest = LONGEST_ODD_PATH if odd else LONGEST_PATH
        if "%25" in path:
            longest = LONGEST_TWICE_ESCAPED_PATH
        if len(path) > longest or len(query) > LONGEST_QUERY:
            return Answer("request_too_large")

        address, problem = self.client_address(request)
        if address is None:
            return Answer(problem)
        client = (address.version, int(address))

        names = set(self.tenant_names(request, path, query))
        if len(names) > 1:
            return Answer("ambiguous_tenant", client)
        tenant = names.pop() if names else None
        if tenant is not None and not is_name(tenant):
            return Answer("invalid_tenant", client)

        outcomes = tuple(self.outcome(scope, address, now) for scope in self.applying(request, path, tenant))
        denying = ("blocked", "not_allowlisted")
        shadow = tuple(one for one in outcomes if one.enforcement == "shadow" and one.reason in denying)
        for reason in denying:
            for outcome in outcomes:
                if outcome.enforcement == "enforce" and outcome.reason == reason:
                    return Answer(reason, client, tenant, None, "none", outcomes, outcome, shadow)

        instance, affinity, problem = self.place(tenant)
        if problem:
            return Answer(problem, client, tenant, None, "none", outcomes, None, shadow)
        enforced = [outcome for outcome in outcomes if outcome.enforcement == "enforce"]
        listed = [outcome for outcome in enforced if outcome.reason == "allowlisted"]
        if listed:
            return Answer("allowlisted", client, tenant, instance, affinity, outcomes, listed[0], shadow)
        return Answer("allowed", client, tenant, instance, affinity, outcomes, None, shadow)

    def client_address(self, request: PlainRequest) -> tuple[IPAddress | None, str]:
        external = request.external
        if self.trusted:
            peer = read_address(request.peer or "")
            if peer is None or all(peer not in network for network in self.trusted):
                external = None
        if external is None and self.options.missing_client_address == "peer":
            external = request.peer
        if external is None:
            return None, "no_client_address"
        address = read_address(external)
        return address, "invalid_client_address"

    def tenant_names(self, request: PlainRequest, path: str, query: str) -> Iterator[str]:
        for source in self.options.tenant_sources:
            kind, pattern = source.split(":", 1)
            if kind == "header":
                if pattern in request.headers:
                    header = request.headers[pattern]
                    yield from (
                        value.strip(" \t") for value in (header.split(",") if len(header) <= 1024 else [header])
                    )
            elif kind == "query":
                for asked in (query, *queries_inside(path)):
                    yield from parameters(asked, pattern)
            elif kind == "host":
                host, suffix = plain_host(request.host), pattern.removeprefix("{tenant}")
                if host.endswith(suffix) and "." not in host[: -len(suffix)]:
                    yield host[: -len(suffix)]
            else:
                yield from tenants_in_path(pattern, path)

    def applying(self, request: PlainRequest, path: str, tenant: str | None) -> Iterator[PlainScope]:
        yield self.scopes.get("global", PlainScope("global"))
        name = f"tenant:{tenant}"
        listed = f"{name}/allow" in self.lists or f"{name}/block" in self.lists
        if tenant is not None and (name in self.scopes or listed):
            yield self.scopes.get(name, PlainScope(name))  # any other has nothing to say
        host = plain_host(request.host)
        for name in sorted(self.resources):
            resource = self.resources[name]
            if resource.hosts and not any(host_fits(pattern, host) for pattern in resource.hosts):
                continue
            if any(lies_within(pattern, path, self.options.fold_path_case) for pattern in resource.paths):
                yield self.scopes.get(f"resource:{name}", PlainScope(f"resource:{name}"))

    def outcome(self, scope: PlainScope, address: IPAddress, now: float) -> Outcome:
        enforcement = "shadow" if scope.shadow else "enforce"
        candidates = []
        for side, named in (("block", scope.block_lists), ("allow", scope.allow_lists)):
            for order, list_name in enumerate((f"{scope.name}/{side}", *named)):
                for network, expires_at, lost in self.lists.get(list_name, ()):
                    # Of a lost entry only the network is known: it blocks, and allows nothing.
                    counts = side == "block" if lost else expires_at is None or expires_at > now
                    if address in network and counts:
                        rank = (-network.prefixlen, 0 if side == "block" else 1, order)
                        candidates.append((rank, side, list_name, network))
        if not candidates:
            return Outcome(scope.name, enforcement, "not_allowlisted" if scope.restricted else "allowed")
        _, side, list_name, network = min(candidates, key=lambda candidate: candidate[0])
        where = (network.version, int(network.network_address), network.prefixlen)
        return Outcome(scope.name, enforcement, "blocked" if side == "block" else "allowlisted", list_name, where)

    def place(self, tenant: str | None) -> tuple[str | None, str, str]:
        """Return (instance, affinity, reason to deny or nothing)."""
        if tenant is None:
            return None, "none", "no_tenant" if self.options.missing_tenant == "deny" else ""
        if tenant not in self.tenants:
            if self.options.unknown_tenant != "hash":
                return None, "none", "unknown_tenant" if self.options.unknown_tenant == "deny" else ""
            if tenant not in self.hashed:
                self.hashed[tenant] = heaviest(tenant, list(self.instances.values()))
            instance = self.hashed[tenant]
            return instance, "hashed", "" if instance else "no_active_instance"
        _, instance, held = self.tenants[tenant]
        if instance is None:
            return None, "pinned", "unreadable_pin"
        if held:
            return None, "pinned", "tenant_held"
        return instance, "pinned", "" if instance in self.instances else "unknown_instance"


@lru_cache(maxsize=10_000)
def parameters(query: str, wanted: str) -> frozenset[str]:
    """Return the values that some backend takes for those of a parameter."""
    return frozenset(
        form_text(value)
        for pair in [*query.split("&"), *query.replace(";", "&").split("&")]
        for key, _, value in [pair.partition("=")]
        if any(is_parameter(name, wanted) for name in (form_text(key), form_text(form_text(key))))
    )


@lru_cache(maxsize=10_000)
def queries_inside(path: str) -> tuple[str, str]:
    """Return the query that stands in a path decoded once, and in one decoded twice."""
    return query_in(decoded_text(path)), query_in(decoded_text(decoded_text(path)))


@lru_cache(maxsize=10_000)
def tenants_in_path(pattern: str, path: str) -> frozenset[str]:
    """Return what any reading of the path has in the place of the tenant."""
    wanted, found = pattern.strip("/").split("/"), set()
    for reading in readings(path):
        named = [theirs for mine, theirs in zip(wanted, reading, strict=False) if mine == "{tenant}"]
        if (
            len(reading) >= len(wanted)
            and named[0] != ""
            and all(
                mine == "{tenant}" or same_case(mine) == same_case(theirs)
                for mine, theirs in zip(wanted, reading, strict=False)
            )
        ):
            found.add(named[0])
    return frozenset(found)


@lru_cache(maxsize=10_000)
def read_address(text: str) -> IPAddress | None:
    """Read exactly one address, or None; IPv4-mapped IPv6 is IPv4."""
    if "%" in text:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def unmapped_network(text: str) -> IPNetwork:
    """Read a network; one within ::ffff:0:0/96 is IPv4."""
    network = ipaddress.ip_network(text)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen > 96:
        return ipaddress.IPv4Network((int(mapped), network.prefixlen - 96))
    return network


def is_name(text: str) -> bool:
    """Tell whether the text is a tenant id."""
    return 1 <= len(text) <= 63 and set(text) <= IDENTIFIER_CHARACTERS and text[0] not in "._-"


def plain_host(host: str) -> str:
    """Return a host without port and root dot, in lower case."""
    end = host.find("]") + 1 if host.startswith("[") else host.find(":")
    name = host[:end] if end > 0 or host.startswith(":") else host
    return "".join(chr(ord(letter) + 32) if "A" <= letter <= "Z" else letter for letter in name).rstrip(".")


def host_fits(pattern: str, host: str) -> bool:
    """Tell whether the host is the pattern, or lies beneath it where it begins with a star."""
    if pattern[0] == "*":
        return len(host) >= len(pattern) and host[-len(pattern) + 1 :] == pattern[1:]
    return host == pattern


@lru_cache(maxsize=10_000)
def lies_within(pattern: str, path: str, fold: bool) -> bool:
    """Tell whether any reading of the path is the pattern or lies beneath it."""
    wanted = [same_case(segment) if fold else segment for segment in pattern.split("/") if segment]
    return any(
        len(reading) >= len(wanted)
        and all(
            mine == "*" or is_segment(mine, same_case(theirs) if fold else theirs, last=number == len(wanted))
            for number, (mine, theirs) in enumerate(zip(wanted, reading, strict=False), 1)
        )
        for reading in readings(path)
    )


def is_segment(mine: str, theirs: str, *, last: bool) -> bool:
    """Tell whether a backend may take their segment for mine: Windows ignores what it ends in, Rails a suffix."""
    if not theirs.startswith(mine):
        return False
    rest = theirs[len(mine) :].lstrip(". ")
    return rest == "" or (last and "." in theirs[len(mine) : -len(rest)])


def same_case(text: str) -> str:
    """Return the text as a backend that ignores letter case compares it."""
    upper = "".join("I" if letter == "\u0131" else letter.upper() for letter in text)
    return upper.casefold().replace("i\u0307", "i")


@lru_cache(maxsize=10_000)
def readings(path: str) -> frozenset[tuple[str, ...]]:
    """Return what backends of every make take a path for: one make for every combination of habits."""
    whole = path.encode("utf-8", "surrogateescape")
    decoded = {whole}
    for habits in ((once,), (keeping_slash,), *itertools.product((once, keeping_slash), repeat=2)):
        text = whole
        for habit in habits:
            text = habit(text)
        decoded.add(text)
    for first, backslash, merge, second in itertools.product(
        (once, keeping_slash), (False, True), (False, True), (once, keeping_slash)
    ):
        # The first hop decodes, cleans up and passes on what it got; the next one decodes again.
        text = first(whole)
        if backslash:
            text = text.replace(b"\\", b"/")
        if merge:
            text = re.sub(rb"//+", b"/", text)
        text = without_dots(text)
        if b"%" in text:
            decoded.add(second(text))
    found = set()
    for text in decoded:
        for habits in itertools.product((False, True), repeat=7):
            backslash, cut_end, drop_host, cut_parameters, merge, resolve, merge_again = habits
            read = text
            if backslash:
                read = read.replace(b"\\", b"/")
            if cut_end:
                read = re.split(rb"[?#\0]", read)[0]
            if drop_host and read[:2] == b"//":
                read = b"/" + read.lstrip(b"/").partition(b"/")[2]
            if cut_parameters:
                read = re.sub(rb";[^/]*", b"", read)
            if merge:
                read = re.sub(rb"//+", b"/", read)
            if resolve:
                read = without_dots(read)
            if merge_again:
                read = re.sub(rb"//+", b"/", read)
            found.add(read[1:])
    return frozenset(tuple(read.decode("utf-8", "surrogateescape").split("/")) for read in found)


def once(path: bytes) -> bytes:
    """Decode every escape once."""
    return re.sub(rb"%[0-9A-Fa-f]{2}", lambda escape: bytes([int(escape[0][1:], 16)]), path)


def keeping_slash(path: bytes) -> bytes:
    """Decode every escape once, but that of a slash."""
    return re.sub(
        rb"%[0-9A-Fa-f]{2}",
        lambda escape: b"%2F" if escape[0].upper() == b"%2F" else bytes([int(escape[0][1:], 16)]),
        path,
    )


def without_dots(path: bytes) -> bytes:
    """Resolve `.` and `..` segments; there is nothing above the root."""
    kept: list[bytes] = []
    for segment in path[1:].split(b"/"):
        if segment == b"..":
            del kept[-1:]
        elif segment != b".":
            kept.append(segment)
    return b"/" + b"/".join(kept)


@lru_cache(maxsize=10_000)
def form_text(text: str) -> str:
    """Decode one name or value of a query string."""
    return decoded_text(text.replace("+", " "))


def decoded_text(text: str) -> str:
    """Decode every escape once."""
    return once(text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")


def query_in(path: str) -> str:
    """Return what stands behind the first question mark, or nothing."""
    return path.partition("?")[2]


@lru_cache(maxsize=10_000)
def is_parameter(name: str, wanted: str) -> bool:
    """Tell whether some backend takes the name for the wanted one: letter case, PHP's habits, nested parameters."""

    def underscored(text: str) -> str:
        return same_case("".join("_" if letter in " .[" else letter for letter in text))

    name = name.lstrip(" ")
    taken = [name, re.sub(r"\[.*", "", name, flags=re.DOTALL)]
    if nested := re.match(r"\[([^\]]*)", name):
        taken.append(nested[1])
    return underscored(wanted) in [underscored(text) for text in taken]


def heaviest(tenant: str, instances: list[PlainInstance]) -> str | None:
    """Return the active instance with the greatest h ** (1 / weight), h the hash as a fraction of 2**64."""
    active = [instance for instance in instances if instance.state == "active"]
    if not active:
        return None
    common = math.lcm(*(instance.weight for instance in active))

    def score(instance: PlainInstance) -> tuple[Fraction, str]:
        digest = hashlib.blake2b(f"{instance.name}\0{tenant}".encode(), digest_size=8).hexdigest()
        return Fraction(int(digest, 16) + 1, 2**64) ** (common // instance.weight), instance.name

    return max(active, key=score).name


def reasons_to_reach() -> set[str]:
    """Return every reason that a decision can have; the others are said where a request is decoded or caught."""
    return {str(reason) for reason in Reason if reason is not Reason.INTERNAL_ERROR}


def _lost(policy: PlainPolicy, *key: str) -> bool:
    return key in policy.unreadable and key not in policy.kept
