"""Fixtures that several rooms share."""

from collections.abc import Iterator

import pytest

from authz_server.demo.valkey import Valkey


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
