"""Shared by the tests through a real Envoy: the instances, and nothing left running."""

from collections.abc import Iterator

import pytest
from support.children import none_left

from authz_server.demo.upstreams import Upstreams

INSTANCES = ("queue-1", "queue-2", "queue-3")


@pytest.fixture(scope="module", autouse=True)
def no_child_left() -> Iterator[None]:
    """The module leaves no child process behind."""
    with none_left():
        yield


@pytest.fixture(scope="module")
def running_upstreams(no_child_left: None) -> Iterator[Upstreams]:
    with Upstreams(INSTANCES) as running:
        yield running


@pytest.fixture
def upstreams(running_upstreams: Upstreams) -> Upstreams:
    """The instances, with no arrivals yet."""
    running_upstreams.clear()
    return running_upstreams
