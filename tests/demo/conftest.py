"""Shared by the tests of the demo's parts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


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


@pytest.fixture
def no_child_left() -> Iterator[None]:
    """The test leaves no child process behind."""
    before = _children()
    yield
    assert _children() - before == set()
