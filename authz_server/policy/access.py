"""Lists, entries and scopes: may this address in?

Within a scope the longest matching prefix wins, and a block wins a tie. So an allow carves a hole into a wider
block of the same scope, and of no other. Over the scopes that apply, each enforced one must agree.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from string import ascii_lowercase, ascii_uppercase
from typing import Final, NamedTuple

from authz_server.policy.addresses import MAX_PREFIX_LENGTH, Address, Network
from authz_server.policy.networks import NEVER, UNREADABLE, NetworkTable
from authz_server.policy.paths import PathPattern
from authz_server.policy.reasons import Reason

GLOBAL_SCOPE: Final = "global"
_TENANT_SCOPE: Final = "tenant:"
_ASCII_LOWER: Final = str.maketrans(ascii_uppercase, ascii_lowercase)


class Mode(StrEnum):
    """What becomes of an address that no list of the scope holds."""

    OPEN = "open"
    RESTRICTED = "restricted"


class Enforcement(StrEnum):
    """Whether a scope decides, or only records what it would have decided."""

    ENFORCE = "enforce"
    SHADOW = "shadow"


class Side(StrEnum):
    """What being in a list means for a scope."""

    ALLOW = "allow"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class Entry:
    """A network in a list, with who put it there, why and until when."""

    network: Network
    reason: str
    author: str
    created_at: int
    """Seconds since the Unix epoch."""
    owner: str = ""
    """Whom to ask whether it is still needed."""
    expires_at: int | None = None
    """Seconds since the Unix epoch; from this second on the entry does not count. None: it never expires."""

    @property
    def expiry(self) -> int:
        """What a match table keeps of the entry: the second from which it does not count."""
        return NEVER if self.expires_at is None else self.expires_at or 1  # 0 is UNREADABLE

    def counts_at(self, now: float) -> bool:
        """Tell whether the entry still counts at `now`, seconds since the Unix epoch."""
        return now < self.expiry


# Every check asks for these, and Python 3.11 is slow to find them in their classes.
_ALLOW: Final = Side.ALLOW
_BLOCK: Final = Side.BLOCK
_ALLOWED: Final = Reason.ALLOWED
_ALLOWLISTED: Final = Reason.ALLOWLISTED
_BLOCKED: Final = Reason.BLOCKED


@dataclass(frozen=True, slots=True)
class NamedList:
    """What people say about a list that scopes use by name; its entries are kept under the same name."""

    name: str
    description: str = ""
    owner: str = ""


class ListMatch(NamedTuple):
    """The entry that decided within a scope, as far as a decision knows it, and the list that holds it."""

    list_name: str
    network: Network
    expires_at: int | None = None
    """Seconds since the Unix epoch; None: it never expires, or nobody can read when."""


class ScopeOutcome(NamedTuple):
    """What one scope says of an address."""

    scope: str
    enforcement: Enforcement
    reason: Reason
    """ALLOWED, ALLOWLISTED, BLOCKED or NOT_ALLOWLISTED."""
    match: ListMatch | None = None

    @property
    def denies(self) -> bool:
        """Whether the scope, were it alone and enforced, would deny."""
        return self.reason in (Reason.BLOCKED, Reason.NOT_ALLOWLISTED)


@dataclass(frozen=True, slots=True)
class Scope:
    """Where lists apply: `global`, `tenant:<id>` or `resource:<name>`."""

    name: str
    mode: Mode = Mode.OPEN
    enforcement: Enforcement = Enforcement.ENFORCE
    allow_lists: tuple[str, ...] = ()
    """Lists by name, beside the scope's own allow list."""
    block_lists: tuple[str, ...] = ()
    """Lists by name, beside the scope's own block list."""

    lists: Mapping[Side, tuple[str, ...]] = field(init=False, repr=False, compare=False)
    """The names of the lists on each side, the scope's own first."""
    unmatched: ScopeOutcome = field(init=False, repr=False, compare=False)
    """What the scope says of an address that none of its lists holds."""

    def __post_init__(self) -> None:
        """Name the lists once, and say once what nearly every check is told."""
        lists = {
            Side.ALLOW: (own_list(self.name, Side.ALLOW), *self.allow_lists),
            Side.BLOCK: (own_list(self.name, Side.BLOCK), *self.block_lists),
        }
        object.__setattr__(self, "lists", lists)
        reason = Reason.NOT_ALLOWLISTED if self.mode is Mode.RESTRICTED else _ALLOWED
        object.__setattr__(self, "unmatched", ScopeOutcome(self.name, self.enforcement, reason))


def own_list(scope_name: str, side: Side) -> str:
    """Return the name of a scope's own list, such as `tenant:acme/block`; a slash is in no other list's name."""
    return f"{scope_name}/{side}"


def scope_of_own_list(list_name: str) -> str | None:
    """Return the name of the scope whose own list has this name; None when it is a list that scopes use by name."""
    scope_name, slash, _ = list_name.rpartition("/")
    return scope_name if slash else None


def tenant_scope(tenant_id: str) -> str:
    """Return the name of a tenant's scope."""
    return _TENANT_SCOPE + tenant_id


def tenant_of_scope(scope_name: str) -> str | None:
    """Return the id of the tenant whose scope has this name; None when it is another scope."""
    return scope_name[len(_TENANT_SCOPE) :] if scope_name.startswith(_TENANT_SCOPE) else None


def resource_scope(resource_name: str) -> str:
    """Return the name of a resource's scope."""
    return f"resource:{resource_name}"


@dataclass(frozen=True, slots=True)
class Resource:
    """A part of the site, such as the API documentation, that a scope of its own protects."""

    name: str
    paths: tuple[PathPattern, ...]
    hosts: tuple[str, ...] = ()
    """`www.example.com` or `*.example.com` in lower case; empty: any host (Host is the client's word)."""

    def is_on(self, host: str) -> bool:
        """Tell whether this resource is found on a host from `normalize_host`."""
        return not self.hosts or any(_host_matches(pattern, host) for pattern in self.hosts)

    def holds(self, readings: Iterable[str]) -> bool:
        """Tell whether any reading of a path lies within this resource."""
        for reading in readings:
            for pattern in self.paths:
                if pattern.matches(reading):
                    return True
        return False


def normalize_host(host: str) -> str:
    """Return a Host header in lower case, without port and without the dot of the root zone.

    Only ASCII letters have a lower case here: the Kelvin sign must not turn into the `k` of a registered tenant.
    """
    name = "".join(host.partition("]")[:2]) if host.startswith("[") else host.partition(":")[0]
    return (name.lower() if name.isascii() else name.translate(_ASCII_LOWER)).rstrip(".")


def judge(scope: Scope, tables: Mapping[str, NetworkTable], address: Address, now: float) -> ScopeOutcome:
    """Say what a scope makes of an address at `now` (seconds since the Unix epoch).

    A network whose entry cannot be read blocks, and allows nothing.
    """
    lists = scope.lists
    allow = _longest_match(lists[_ALLOW], tables, address, now)
    block = _longest_match(lists[_BLOCK], tables, address, now, unreadable_too=True)
    if block and (allow is None or block[0] >= allow[0]):
        return _outcome(scope, _BLOCKED, address, block)
    if allow:
        return _outcome(scope, _ALLOWLISTED, address, allow)
    return scope.unmatched


_Match = tuple[int, int, str]
"""(prefix length, expiry, list name)"""


def _longest_match(
    list_names: tuple[str, ...],
    tables: Mapping[str, NetworkTable],
    address: Address,
    now: float,
    unreadable_too: bool = False,
) -> _Match | None:
    """Return the longest match that still counts; of equal ones, that of the list named first."""
    best: _Match | None = None
    for list_name in list_names:
        table = tables.get(list_name)
        if table is None:
            continue
        for prefix_length, expiry in table.match(address):
            if best and prefix_length <= best[0]:
                break
            if now < expiry or (unreadable_too and expiry == UNREADABLE):
                best = (prefix_length, expiry, list_name)
                break
    return best


def _outcome(scope: Scope, reason: Reason, address: Address, match: _Match) -> ScopeOutcome:
    prefix_length, expiry, list_name = match
    version, value = address
    shift = MAX_PREFIX_LENGTH[version] - prefix_length
    # Without the constructors, which take twice the time: in an attack nearly every check comes here.
    network = tuple.__new__(Network, (version, value >> shift << shift, prefix_length))
    expires_at = None if expiry in (NEVER, UNREADABLE) else expiry
    told = tuple.__new__(ListMatch, (list_name, network, expires_at))
    return tuple.__new__(ScopeOutcome, (scope.name, scope.enforcement, reason, told))


def _host_matches(pattern: str, host: str) -> bool:
    if pattern.startswith("*."):
        return host.endswith(pattern[1:]) and len(host) > len(pattern) - 1
    return host == pattern
