"""Imports go one way: `server, cli, demo -> everything below -> policy`; I/O has its rooms.

Read from the source text, so that an import inside a function or under TYPE_CHECKING counts as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import authz_server

PACKAGE = Path(authz_server.__file__).parent
OURS = "authz_server"

ROOMS_BELOW: dict[str, frozenset[str]] = {
    "policy": frozenset(),
    "store": frozenset({"policy", "turns"}),
    "ext_authz": frozenset({"policy", "health"}),
    "refresher": frozenset({"policy", "store", "loader", "tasks", "turns"}),
    "loader": frozenset({"policy", "store", "snapshot_file", "turns"}),
    "packing": frozenset({"policy", "store", "snapshot_file"}),
    "snapshot_file": frozenset({"policy", "store"}),
    "replicas": frozenset({"policy", "store"}),
    "build": frozenset({"policy"}),
    "health": frozenset({"policy"}),
    "tasks": frozenset(),
    "turns": frozenset(),
    "counts": frozenset({"policy"}),
    "metrics": frozenset({"counts", "policy", "refresher", "loader", "health", "store", "ext_authz", "replicas"}),
    "decision_log": frozenset({"policy", "observation"}),
    "logs": frozenset({"policy"}),
    "admin": frozenset(
        {"policy", "refresher", "loader", "health", "metrics", "store", "decision_log", "explanation", "replicas"}
    ),
    "explanation": frozenset({"policy"}),
    "observation": frozenset({"policy"}),
    "tracing": frozenset({"policy", "observation"}),
    "settings": frozenset({"policy", "store", "ext_authz"}),
}
"""Room -> the rooms of ours that it may import, beside itself. Rooms not named here are at the top."""
TOP = frozenset({"server", "cli", "demo"})

IMPURE = frozenset(
    {
        *("asyncio", "concurrent", "contextvars", "datetime", "getpass", "glob", "http", "importlib", "io", "locale"),
        *("logging", "multiprocessing", "os", "pathlib", "pickle", "platform", "queue", "random", "secrets", "select"),
        *("selectors", "shutil", "signal", "socketserver", "sqlite3", "ssl", "subprocess", "sys", "tempfile"),
        *("threading", "time", "urllib.request", "uuid"),
        *("google", "grpc", "grpc_health", "grpc_reflection", "netaddr", "prometheus_client", "pydantic"),
        *("pydantic_settings", "redis", "starlette", "structlog", "typer", "uvicorn", "yaml", "envoy"),
    }
)
"""What the policy room may not import: clocks, chance, I/O, other people's packages."""
PURE_SOCKET_NAMES = frozenset({"AF_INET", "AF_INET6", "inet_ntop", "inet_pton"})
"""Text to numbers; they open no socket."""

ONLY_IN = {
    "redis": ("store/redis_store.py",),
    "grpc": ("ext_authz/",),
    "google": ("ext_authz/",),
    "grpc_channelz": ("ext_authz/",),
    "grpc_health": ("ext_authz/",),
    "grpc_reflection": ("ext_authz/",),
}
"""Package -> where it may be imported."""


def violations(path: str, source: str) -> list[str]:
    """Return what a file of the package imports or reads and must not; `path` is relative to the package."""
    room = path.partition("/")[0].removesuffix(".py")
    tree = ast.parse(source, path)
    found = []
    for line, name in imported(tree):
        top, _, rest = name.partition(".")
        if top == OURS and rest:
            other = rest.partition(".")[0]
            if other in TOP and room not in TOP | {"__main__"}:
                found.append(f"{path}:{line}: {room} imports {other}, which is above it")
            elif room in ROOMS_BELOW and other != room and other not in ROOMS_BELOW[room]:
                found.append(f"{path}:{line}: {room} imports {other}")
        if room == "policy" and any(name == impure or name.startswith(f"{impure}.") for impure in IMPURE):
            found.append(f"{path}:{line}: policy imports {name}")
        if room == "policy" and top == "socket" and name.partition(".")[2] not in PURE_SOCKET_NAMES:
            found.append(f"{path}:{line}: policy imports {name}")
        if not path.startswith(ONLY_IN.get(top, ("",))):
            found.append(f"{path}:{line}: {name} belongs into {' or '.join(ONLY_IN[top])}")
    if room != "settings":
        found += [f"{path}:{line}: only settings reads the environment" for line in environment_reads(tree)]
    return found


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import; of `from a import b`, `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def environment_reads(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that touch os.environ, os.getenv or their like."""
    names = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if name in names:
                yield node.lineno
            case ast.ImportFrom(names=aliases) if names & {alias.name for alias in aliases}:
                yield node.lineno


FILES = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_a_file_imports_only_what_its_room_may(path: str) -> None:
    assert violations(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


def test_the_files_are_found() -> None:
    assert {"policy/decision.py", "store/interface.py"} <= set(FILES)


PLANTED = {
    "policy-uses-store": (
        "policy/decision.py",
        "from authz_server.store.interface import Store",
        "policy imports store",
    ),
    "policy-uses-store-by-package": ("policy/decision.py", "from authz_server import store", "policy imports store"),
    "policy-uses-store-plainly": ("policy/decision.py", "import authz_server.store.keys", "policy imports store"),
    "policy-uses-a-clock": ("policy/decision.py", "import time", "policy imports time"),
    "policy-uses-a-clock-in-a-function": (
        "policy/x.py",
        "def f():\n    from time import time",
        ":2: policy imports time",
    ),
    "policy-uses-chance": ("policy/affinity.py", "import hashlib, random", "policy imports random"),
    "policy-logs": ("policy/decision.py", "import structlog", "policy imports structlog"),
    "policy-fetches": ("policy/paths.py", "from urllib.request import urlopen", "policy imports urllib.request"),
    "policy-opens-a-socket": ("policy/addresses.py", "from socket import socket", "policy imports socket.socket"),
    "policy-has-all-of-socket": ("policy/addresses.py", "import socket", "policy imports socket"),
    "policy-awaits": ("policy/decision.py", "import asyncio", "policy imports asyncio"),
    "policy-knows-protobuf": ("policy/x.py", "from google.protobuf import message", "belongs into ext_authz/"),
    "store-knows-the-wire": ("store/keys.py", "from authz_server.ext_authz import checker", "store imports ext_authz"),
    "wire-knows-the-store": ("ext_authz/checker.py", "import authz_server.store.keys", "ext_authz imports store"),
    "wire-knows-the-refresher": (
        "ext_authz/checker.py",
        "import authz_server.refresher",
        "ext_authz imports refresher",
    ),
    "redis-in-the-twin": ("store/memory_store.py", "import redis.asyncio", "belongs into store/redis_store.py"),
    "redis-in-the-refresher": ("refresher.py", "from redis.exceptions import X", "belongs into store/redis_store.py"),
    "grpc-in-the-server": ("server.py", "import grpc.aio", "grpc.aio belongs into ext_authz/"),
    "health-service-in-health": ("health.py", "from grpc_health.v1 import health_pb2", "belongs into ext_authz/"),
    "refresher-uses-the-server": ("refresher.py", "import authz_server.server", "which is above it"),
    "settings-use-the-cli": ("settings.py", "from authz_server.cli import authzctl", "which is above it"),
    "metrics-use-the-demo": ("metrics.py", "import authz_server.demo", "which is above it"),
    "environment": ("server.py", "import os\nos.environ['AUTHZ_X']", ":2: only settings reads the environment"),
    "environment-by-getenv": ("cli/authzctl.py", "import os\nos.getenv('X')", "only settings reads the environment"),
    "environment-by-name": ("refresher.py", "from os import environ", "only settings reads the environment"),
    "only-for-types": (
        "policy/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from authz_server.store import keys",
        ":3: policy imports store",
    ),
}


@pytest.mark.parametrize(("path", "source", "complaint"), PLANTED.values(), ids=PLANTED)
def test_a_planted_violation_is_found(path: str, source: str, complaint: str) -> None:
    assert complaint in "\n".join(violations(path, source))


FINE = {
    "within-policy": ("policy/decision.py", "from authz_server.policy.access import judge"),
    "text-to-numbers": ("policy/addresses.py", "from socket import AF_INET, inet_pton"),
    "redis-at-home": ("store/redis_store.py", "from redis.asyncio import Redis"),
    "grpc-at-home": ("ext_authz/grpcio_transport.py", "import grpc\nfrom google.protobuf import message"),
    "settings-read": ("settings.py", "import os\nos.environ"),
    "server-composes": ("server.py", "from authz_server.store.redis_store import RedisStore"),
    "command-uses-the-server": ("cli/authz_server.py", "from authz_server.server import serve"),
}


@pytest.mark.parametrize(("path", "source"), FINE.values(), ids=FINE)
def test_what_is_allowed_is_not_complained_about(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_relative_imports_are_refused() -> None:
    with pytest.raises(AssertionError, match="imports are absolute"):
        violations("policy/x.py", "from . import access")
