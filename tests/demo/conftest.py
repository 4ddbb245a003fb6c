"""Shared by the tests of the demo's parts."""

from collections.abc import Iterator

import pytest
from support.children import none_left


@pytest.fixture
def no_child_left() -> Iterator[None]:
    """The test leaves no child process behind."""
    with none_left():
        yield
