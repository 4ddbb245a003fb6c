"""A store for commands to act on."""

import os
import uuid

import pytest
from support.authzctl import write

from authz_server.demo.valkey import Valkey


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
