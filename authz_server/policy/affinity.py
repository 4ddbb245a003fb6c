"""Which instance holds a tenant's state: pins, and the weighted rendezvous hash for tenants without one."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

MAX_WEIGHT = 100
_HASH_BITS = 64


class InstanceState(StrEnum):
    """What an instance is ready for. Pinned tenants are routed to it in every state."""

    ACTIVE = "active"
    """Takes new tenants."""
    DRAINING = "draining"
    """Takes no new tenants; its own are being moved away."""
    DOWN = "down"
    """Known to be away; takes no new tenants."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A backend instance that tenants can be pinned to."""

    name: str
    weight: int = 1
    """Its share of new tenants, 1 to 100, relative to the others'."""
    state: InstanceState = InstanceState.ACTIVE


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a tenant is held: somebody moves it, and no server may use the old instance when the new one is used."""

    owner: str
    """Who moves it."""
    to: str
    """The instance that it moves to."""
    since: int
    """Seconds since the Unix epoch."""
    reason: str


@dataclass(frozen=True, slots=True)
class Tenant:
    """A registered tenant: pinned to one instance."""

    id: str
    instance: str | None
    """The instance's name; None only when the record could not be read, and then requests are denied."""
    held: bool = False
    """Whether its requests are held back while it is moved."""
    hold: Hold | None = None
    """Who holds it; None also when it is held and nobody has said so."""


class Affinity(StrEnum):
    """How an instance was found."""

    PINNED = "pinned"
    HASHED = "hashed"
    NONE = "none"


def rendezvous(tenant_id: str, instances: Iterable[Instance]) -> str | None:
    """Return the name of the active instance with the highest score for this tenant; None without one.

    Weighted rendezvous hashing: with h uniform in (0, 1), the score is h ** (1 / weight), so an instance wins in
    proportion to its weight, and one that comes or goes moves only its own tenants. Scores are compared in exact
    integers (h1 ** w2 against h2 ** w1), not in floating point, so every replica on every platform agrees.
    """
    best: tuple[int, int, str] | None = None
    for instance in instances:
        if instance.state is not InstanceState.ACTIVE:
            continue
        candidate = (_hash(tenant_id, instance.name), instance.weight, instance.name)
        if best is None or _beats(candidate, best):
            best = candidate
    return best[2] if best else None


def _hash(tenant_id: str, instance_name: str) -> int:
    """Return 1 to 2**64; neither name can contain the NUL between them."""
    digest = hashlib.blake2b(f"{instance_name}\0{tenant_id}".encode(), digest_size=_HASH_BITS // 8).digest()
    return int.from_bytes(digest, "big") + 1


def _beats(one: tuple[int, int, str], other: tuple[int, int, str]) -> bool:
    hash_1, weight_1, name_1 = one
    hash_2, weight_2, name_2 = other
    score_1, score_2 = hash_1, hash_2
    if weight_1 != weight_2:
        # (h1 / 2**64) ** (1 / w1) > (h2 / 2**64) ** (1 / w2), both sides raised to w1 * w2 and cleared of fractions
        score_1 = hash_1**weight_2 << (_HASH_BITS * weight_1)
        score_2 = hash_2**weight_1 << (_HASH_BITS * weight_2)
    return (score_1, name_1) > (score_2, name_2)
