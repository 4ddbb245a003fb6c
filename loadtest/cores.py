"""Which core processes run on, and which of them goes first there (Linux; going first needs root)."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def apart(measured: Iterable[int], others: Iterable[int], *, first: int) -> Iterator[None]:
    """Keep processes on one core and others on another; `first`, one of the measured, runs as soon as it can.

    Processes are told by their ids. Who measures does not have as many machines as there are in a real system: what the
    others compute shall not be taken for what they cause.
    """
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        sys.exit("this measurement needs two cores")
    core, other_core = sorted(before)[:2]
    try:
        for thread in _threads(measured):
            os.sched_setaffinity(thread, {core})
        for thread in _threads(others):
            os.sched_setaffinity(thread, {other_core})
        for thread in _threads((first,)):
            os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))
    except PermissionError as error:
        sys.exit(f"cannot have a client run first ({error}): run as root")
    try:
        yield
    finally:
        for thread in _threads((*measured, *others)):
            os.sched_setaffinity(thread, before)


def _threads(processes: Iterable[int]) -> list[int]:
    return [int(path.name) for process in processes for path in Path(f"/proc/{process}/task").iterdir()]
