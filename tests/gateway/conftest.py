"""Shared by the tests through a real Envoy: the instances, and nothing left running."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from authz_server.demo.upstreams import Upstreams

INSTANCES = ("queue-1", "queue-2", "queue-3")


def _children() -> set[int]:
    """Ids of all processes whose parent is this one, whichever thread forked them."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


@pytest.fixture(scope="module", autouse=True)
def no_child_left() -> Iterator[None]:
    """The module leaves no child process behind."""
    before = _children()
    yield
    assert _children() - before == set()


@pytest.fixture(scope="module")
def running_upstreams(no_child_left: None) -> Iterator[Upstreams]:
    with Upstreams(INSTANCES) as running:
        yield running


@pytest.fixture
def upstreams(running_upstreams: Upstreams) -> Upstreams:
    """The instances, with no arrivals yet."""
    running_upstreams.clear()
    return running_upstreams
