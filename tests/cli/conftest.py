"""A store for commands to act on."""

import functools
import os
import uuid
from collections.abc import Iterator

import pytest
import typer.main
import typer.testing
from support.authzctl import write

from authz_server.demo.valkey import Valkey


@pytest.fixture(scope="session", autouse=True)
def commands_built_once() -> Iterator[None]:
    """They are the same for every call, and to build all takes longer than most calls."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture
def prefix(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store of the test's own, to which the commands are pointed."""
    for variable in os.environ:
        if variable.startswith("AUTHZ"):
            monkeypatch.delenv(variable)
    name = f"test-{uuid.uuid4().hex}"
    monkeypatch.setenv("AUTHZ_REDIS_URL", valkey.url)
    monkeypatch.setenv("AUTHZ_REDIS_PREFIX", name)
    monkeypatch.setenv("AUTHZCTL_ACTOR", "alice")
    return name


@pytest.fixture
def policy(prefix: str) -> str:
    """As `prefix`, with an empty policy."""
    write("init")
    return prefix
