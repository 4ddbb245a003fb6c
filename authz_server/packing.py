"""The loading process: `python -m authz_server.packing`, started by `loader` and told what to do on standard input."""

import asyncio
import gc
import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from authz_server.policy.snapshot import DecisionOptions, Snapshot, SnapshotDraft, build_snapshot
from authz_server.snapshot_file import Stamp, apply_change_row, open_packed, pack, remove_drafts, save_file, write_all
from authz_server.store.address import RedisAddress
from authz_server.store.interface import LoadedPolicy, Position, StoreError
from authz_server.store.redis_store import RedisStore

_NICENESS = 10
"""Checks come first."""
_PLAIN = DecisionOptions(fold_path_case=False)
"""Files hold policies, not the operator's settings."""


def main() -> None:
    """Do as the order on standard input says, and answer on standard output."""
    os.nice(_NICENESS)
    gc.disable()  # nothing here makes garbage in cycles, and all of it stays to the end
    orders = sys.stdin.buffer
    order = json.loads(orders.readline())
    try:
        snapshot, stamp, edited = _load(order, orders) if "store" in order else _repack(order, orders)
    except StoreError as error:
        answer: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
    else:
        pieces = list(pack(snapshot, stamp))
        write_all(order["memory"], pieces)
        answer = {"file_problem": _saved(order["path"], pieces), "edited": edited}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # at once: taking a million objects apart would only take time


def _leave_with(orders: BinaryIO) -> None:
    """End when the server does, which holds the other end."""
    orders.read()
    os._exit(1)


def _load(order: dict[str, Any], orders: BinaryIO) -> tuple[Snapshot, Stamp, tuple[str, ...]]:
    """Read the store."""
    threading.Thread(target=_leave_with, args=(orders,), daemon=True).start()

    async def load() -> LoadedPolicy:
        store = RedisStore(RedisAddress.from_json(order["store"]["where"]), prefix=order["store"]["prefix"])
        try:
            return await store.load()
        finally:
            await store.close()

    policy = asyncio.run(load())
    stamp = Stamp(policy.position, time.time(), order["origin"])
    epoch, revision = policy.position.epoch, policy.position.revision
    return build_snapshot(policy.records, epoch=epoch, revision=revision, options=_PLAIN), stamp, policy.edited


def _repack(order: dict[str, Any], orders: BinaryIO) -> tuple[Snapshot, Stamp, tuple[str, ...]]:
    """Read an older snapshot, and the changes since."""
    packed = open_packed(memoryview(mmap.mmap(order["base"], 0, access=mmap.ACCESS_READ)))
    *_, before = packed.unpack(_PLAIN)
    assert before is not None  # noqa: S101 - the last one that `unpack` yields
    draft = SnapshotDraft(before)
    while (line := orders.readline()) != b"\n":
        if not line:
            os._exit(1)  # the server is gone
        apply_change_row(draft, json.loads(line))
    threading.Thread(target=_leave_with, args=(orders,), daemon=True).start()
    position = Position(**order["position"])
    return draft.done(position.revision), Stamp(position, order["confirmed_at"], order["origin"]), ()


def _saved(path: str | None, pieces: list[bytes | memoryview]) -> str:
    """Write the snapshot file; return what hinders, or ""."""
    if path is None:
        return ""
    try:
        remove_drafts(Path(path))
        save_file(Path(path), pieces)
    except OSError as error:
        return error.strerror or str(error)
    return ""


if __name__ == "__main__":
    main()
