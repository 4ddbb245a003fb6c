"""The loading process: `python -m authz_server.packing`, started by `loader` and told what to do on standard input."""

import asyncio
import gc
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from authz_server.policy.addresses import Network, parse_network
from authz_server.policy.networks import ColumnsDraft, NetworkTable
from authz_server.policy.records import RecordKind
from authz_server.policy.snapshot import DecisionOptions, Snapshot, SnapshotDraft
from authz_server.snapshot_file import Stamp, apply_change_row, open_packed, pack, remove_drafts, save_file, write_all
from authz_server.store.address import RedisAddress
from authz_server.store.interface import Position, StoreError
from authz_server.store.keys import record_key_of
from authz_server.store.redis_store import LeanPolicy, RedisStore

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

    async def load() -> LeanPolicy:
        store = RedisStore(RedisAddress.from_json(order["store"]["where"]), prefix=order["store"]["prefix"])
        try:
            return await store.load_lean()
        finally:
            await store.close()

    policy = asyncio.run(load())
    stamp = Stamp(policy.position, time.time(), order["origin"])
    return _snapshot(policy), stamp, policy.edited


def _snapshot(policy: LeanPolicy) -> Snapshot:
    """Build the snapshot, and take the policy apart on the way: both at once would need too much memory."""
    draft = SnapshotDraft(Snapshot(policy.position.epoch, policy.position.revision, _PLAIN))
    columns = ColumnsDraft()
    places = []

    def expiries(collection: str, members: dict[str, Any]) -> Iterator[tuple[Network, int]]:
        while members:
            name, kept = members.popitem()
            if isinstance(kept, int):
                yield parse_network(name), kept
            else:
                draft.put(record_key_of(collection, name), kept)

    while policy.collections:
        collection, members = policy.collections.popitem()
        key = record_key_of(collection, "")
        if key.kind is RecordKind.ENTRY:
            places.append((key.list_name, columns.add(expiries(collection, members))))
        for name, record in members.items():
            draft.put(record_key_of(collection, name), record)
    made = columns.columns()
    for list_name, (ranges, size) in places:
        if size:
            draft.put_table(list_name, NetworkTable(made, ranges, size))
    return draft.done(policy.position.revision)


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
