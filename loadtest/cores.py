"""Which core processes run on, and which of them goes first there (Linux; going first needs root)."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

_LOOK_SECONDS = 0.02


@contextlib.contextmanager
def apart(measured: Iterable[int], others: Iterable[int], *, first: int) -> Iterator[None]:
    """Keep processes on one core and others on another; `first`, one of them, runs as soon as it can.

    Processes are told by their ids. Who measures does not have as many cores as there are in a real system: what the
    others compute shall not be taken for what they cause. So a process that one of the measured starts meanwhile goes
    to the others' core.
    """
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        sys.exit("this measurement needs two cores")
    core, other_core = sorted(before)[:2]
    measured, others = tuple(measured), tuple(others)
    left = threading.Event()
    mover = threading.Thread(target=_move_children, args=(measured, other_core, left), daemon=True)
    try:
        _keep_on({core}, measured)
        _keep_on({other_core}, others)
        for thread in _threads(first):
            os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))
    except PermissionError as error:
        sys.exit(f"cannot have a client run first ({error}): run as root")
    mover.start()
    try:
        yield
    finally:
        left.set()
        mover.join()
        _keep_on(before, (*measured, *others))


def _move_children(parents: Iterable[int], core: int, left: threading.Event) -> None:
    moved: set[int] = set()
    while not left.wait(_LOOK_SECONDS):
        for parent in parents:
            for thread in _threads(parent):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended already
                    children = {*map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())}
                    _keep_on({core}, children - moved)
                    moved |= children


def _keep_on(cores: set[int], processes: Iterable[int]) -> None:
    for process in processes:
        for thread in _threads(process):
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.sched_setaffinity(thread, cores)


def _threads(process: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the process has ended
        return [int(path.name) for path in Path(f"/proc/{process}/task").iterdir()]
    return []
