"""Where the store is: one server, servers that Sentinels watch, or a cluster. Pure; holds secrets, shows none."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

HostPort = tuple[str, int]


@dataclass(frozen=True, slots=True)
class RedisTls:
    """How the servers prove who they are, and we to them. Host names are always checked."""

    ca: Path | None = None
    """PEM file of the CAs to trust; None: the system's."""
    certificate: Path | None = None
    """PEM file of our own certificate, with its chain."""
    key: Path | None = None
    """PEM file of its key."""


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where the store is. Exactly one of `url`, `sentinels` and `cluster` is given.

    Raises:
        ValueError: none or several of them are.
    """

    url: str = field(default="", repr=False)
    """Of one server: `redis://[user:password@]host:port/db`, `rediss://...` for TLS, or `unix://...`."""
    sentinels: tuple[HostPort, ...] = ()
    """Of the Sentinels; they say which server is the primary."""
    primary: str = ""
    """What the Sentinels call it."""
    cluster: tuple[HostPort, ...] = ()
    """Of some nodes of the cluster; they name the others."""
    database: int = 0
    """With Sentinels; a URL names its own, and a cluster has only 0."""
    username: str = ""
    """With Sentinels or a cluster; a URL has its own."""
    password: str = field(default="", repr=False)
    sentinel_username: str = ""
    """Of the Sentinels themselves, which have users of their own."""
    sentinel_password: str = field(default="", repr=False)
    tls: RedisTls | None = None
    """None: without TLS, unless the URL says `rediss://`."""

    def __post_init__(self) -> None:
        if sum(map(bool, (self.url, self.sentinels, self.cluster))) != 1:
            raise ValueError("where is the store? write redis://host:port, or name Sentinels, or nodes of a cluster")
        if self.sentinels and not self.primary:
            raise ValueError("Sentinels need the name of the primary that they watch")

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, secrets included."""
        values = asdict(self)
        if self.tls is not None:
            values["tls"] = {name: path and str(path) for name, path in values["tls"].items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `as_json` returned, perhaps after it was JSON."""
        nodes = {name: tuple(map(tuple, values[name])) for name in ("sentinels", "cluster")}
        tls = values["tls"]
        if tls is not None:
            tls = RedisTls(**{name: path and Path(path) for name, path in tls.items()})
        return cls(**dict(values) | nodes | {"tls": tls})

    def __str__(self) -> str:
        if self.sentinels:
            return f"Redis primary {self.primary!r} of the Sentinels at {_joined(self.sentinels)}"
        if self.cluster:
            return f"Redis Cluster at {_joined(self.cluster)}"
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            return f"Redis at {parts.path}"
        return f"Redis at {parts.hostname or 'localhost'}:{parts.port or 6379}"


def _joined(addresses: tuple[HostPort, ...]) -> str:
    return ", ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in addresses)
