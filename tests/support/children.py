"""What this process has left running."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def none_left() -> Iterator[None]:
    """Whatever is started within the block is ended when it is left."""
    before = _children()
    yield
    assert _children() - before == set()
