"""Holding a process to a small share of one core, by a control group of its own (Linux, root)."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

PERIOD_MICROSECONDS = 40_000
_V1 = Path("/sys/fs/cgroup/cpu")
_V2 = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def held_to(share: float, pid: int) -> Iterator[None]:
    """Let the process and all its threads run for `share` of every PERIOD_MICROSECONDS, all together."""
    quota = round(share * PERIOD_MICROSECONDS)
    group = (_V1 if _V1.exists() else _V2) / f"authz-loadtest-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        sys.exit(f"cannot make a control group ({error}): run as root, on Linux with the cpu controller")
    try:
        if group.parent == _V1:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (_V2 / "cgroup.subtree_control").write_text("+cpu")
            (group / "cpu.max").write_text(f"{quota} {PERIOD_MICROSECONDS}")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        with contextlib.suppress(OSError):  # the process is gone
            (group.parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()
