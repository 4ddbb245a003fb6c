"""Fixtures that several rooms share."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from authz_server.demo.valkey import Valkey

# An example that takes long says more about what else the machine does than about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """One real Valkey for all: never stop or flush it; keep apart by key prefix."""
    with Valkey() as server:
        yield server


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A real Valkey for this test alone, to be stopped, started again and flushed at will."""
    with Valkey() as server:
        yield server
