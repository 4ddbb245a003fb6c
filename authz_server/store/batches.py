"""Many items, some at a time."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of this size; the last one may be shorter. Python has it itself from 3.12 on."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
