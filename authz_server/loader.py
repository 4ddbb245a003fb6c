"""Loads whole policies outside of the process that answers checks, which must not wait for them.

A child process reads the store, or an older snapshot with the changes since, and packs it into memory that it shares
with the server. There is no file system in that, so nothing has to be writable; where a snapshot file is set, the child
writes that too, and a full disk costs only the file. The child is told where the store is over a pipe, whose end also
tells it that the server is gone.
"""

import asyncio
import contextlib
import gc
import json
import mmap
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import authz_server
from authz_server.policy.records import RecordKey, RecordKeys
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.snapshot_file import (
    NoSnapshotFileError,
    PackedSnapshot,
    SnapshotFileError,
    change_row,
    check_stamp,
    copy_file,
    open_packed,
)
from authz_server.store import interface
from authz_server.store.batches import batched
from authz_server.store.interface import Position, Store, StoreError, StoreUnavailableError
from authz_server.turns import STEP_SECONDS, Turns

LOAD_SECONDS = 600.0
"""A child that takes longer hangs; a million networks take a small pod minutes."""
REPACK_SECONDS = 60.0
"""So old is the snapshot file at most when something has changed."""
REPACK_CHANGES = 20_000
"""So many changed records lie in dicts at most: they take more memory than columns, and more time to match."""
_REPACK_PAUSE_SECONDS = 5.0
_ROWS_AT_ONCE = 20
_UNPACKING_STEP_SECONDS = STEP_SECONDS / 2
"""Shorter than others, for it goes on for a second where tenants are many."""
_STARTING_STEP_SECONDS = 20 * STEP_SECONDS
"""While there is no snapshot yet, only probes wait."""


class LoaderError(StoreError):
    """The child failed, by no fault of the store."""


class Source(StrEnum):
    """Where a snapshot came from; the words stand in /readyz and in metrics."""

    REDIS = "redis"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A whole policy."""

    snapshot: Snapshot
    position: Position
    confirmed_at: float
    """When the store last said that this is its newest state, in seconds of time.monotonic."""
    source: Source
    edited: tuple[str, ...] = ()
    """As in LoadedPolicy, where it was read from the store."""


class Loader(Protocol):
    """Gets whole policies for a refresher."""

    async def restore(self) -> Loaded | None:
        """Return the last good snapshot of an earlier process, or None."""

    async def load(self, last_good: Snapshot | None) -> Loaded:
        """Return the newest policy of the store; what it cannot read is as in `last_good`.

        Raises:
            StoreError: there is none to be had.
        """

    def is_repack_due(self, changes: int, seconds: float) -> bool:
        """Tell whether to call `repack`, given how many records have changed since the last `restore`, `load` or
        `repack`, and for how long."""

    async def repack(self, loaded: Loaded, changed: Iterable[RecordKey]) -> Loaded:
        """Return the same policy, built anew from numbers, and keep it for `restore`.

        Args:
            loaded: what to keep.
            changed: all records that it does not have in common with what the last of these methods returned.

        Raises:
            LoaderError: it stays as it is.
        """


class StoreLoader:
    """Loads within this process: for tests and tools, where nobody waits."""

    def __init__(self, store: Store, options: DecisionOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._options = options
        self._clock = clock

    async def restore(self) -> Loaded | None:
        """See `Loader.restore`."""
        return None

    async def load(self, last_good: Snapshot | None) -> Loaded:
        """See `Loader.load`."""
        policy = await self._store.load()
        confirmed_at = self._clock()
        epoch, revision = policy.position.epoch, policy.position.revision
        snapshot = build_snapshot(
            policy.records, epoch=epoch, revision=revision, options=self._options, last_good=last_good
        )
        return Loaded(snapshot, policy.position, confirmed_at, Source.REDIS, policy.edited)

    def is_repack_due(self, changes: int, seconds: float) -> bool:
        """See `Loader.is_repack_due`. All is in one process: there is nothing to gain."""
        del changes, seconds
        return False

    async def repack(self, loaded: Loaded, changed: Iterable[RecordKey]) -> Loaded:
        """See `Loader.repack`."""
        del changed
        return loaded


class ChildLoader:
    """Loads by child processes.

    Args:
        store_arguments: `where` the store is (`RedisAddress.as_json`), and the `prefix` of its keys.
        options: the operator's settings that go into every snapshot.
        origin: names the store in files, without secrets.
        path: of the snapshot file; None: there is none.
        max_age_seconds: an older file is not served.
        on_file: called after each attempt to use or write the file, with what is wrong with it, or "".
    """

    def __init__(
        self,
        store_arguments: Mapping[str, Any],
        options: DecisionOptions,
        *,
        origin: str,
        path: Path | None,
        max_age_seconds: float,
        on_file: Callable[[str], None],
    ) -> None:
        self._store_arguments = dict(store_arguments)
        self._options = options
        self._origin = origin
        self._path = path
        self._max_age_seconds = max_age_seconds
        self._on_file = on_file
        self._file_problem = ""
        self._packed: int | None = None
        """The memory that holds what was loaded last; the next child starts from it when it is to repack."""
        self._stood_in = RecordKeys()
        """The records that were unreadable in the last load, and for which an older snapshot's may stand in: what is
        packed has not got those."""

    @property
    def packed_bytes(self) -> int:
        """Size of what was loaded or packed last; 0 before."""
        return 0 if self._packed is None else os.fstat(self._packed).st_size

    async def restore(self) -> Loaded | None:
        """See `Loader.restore`. A file that must not be served is told to `on_file`, and left as it is."""
        if self._path is None:
            return None
        memory = _new_memory()
        try:
            await asyncio.to_thread(copy_file, self._path, memory)
            packed = await asyncio.to_thread(_open_memory, memory)
            check_stamp(packed.stamp, origin=self._origin, max_age_seconds=self._max_age_seconds, now=time.time())
            loaded = await _unpacked(packed, packed.unpack(self._options), Source.FILE, _STARTING_STEP_SECONDS)
        except SnapshotFileError as error:
            os.close(memory)
            if not isinstance(error, NoSnapshotFileError):
                self._tell(f"{self._path} is not used: {error}")
            return None
        except BaseException:
            os.close(memory)
            raise
        self._keep(memory)
        self._tell("")
        return loaded

    async def load(self, last_good: Snapshot | None) -> Loaded:
        """See `Loader.load`."""
        loaded = await self._by_child(
            {"store": self._store_arguments}, None, lambda packed: packed.unpack(self._options)
        )
        self._stood_in = RecordKeys()
        if last_good is None:
            return loaded
        snapshot = loaded.snapshot
        turns = Turns()
        for some in batched(snapshot.problems, _ROWS_AT_ONCE):
            self._stood_in.update(some)
            snapshot = snapshot.with_last_good(last_good, some)
            await turns.take()
        return replace(loaded, snapshot=snapshot)

    def is_repack_due(self, changes: int, seconds: float) -> bool:
        """See `Loader.is_repack_due`. Soon when the file lacks something, else long before it is too old to be used."""
        if changes >= REPACK_CHANGES and seconds >= _REPACK_PAUSE_SECONDS:
            return True
        if self._path is None:
            return False
        if changes or self._stood_in or self._file_problem:
            return seconds >= REPACK_SECONDS
        return seconds >= self._max_age_seconds / 4

    async def repack(self, loaded: Loaded, changed: Iterable[RecordKey]) -> Loaded:
        """See `Loader.repack`."""
        confirmed_at = time.time() - (time.monotonic() - loaded.confirmed_at)
        position = {name: getattr(loaded.position, name) for name in ("epoch", "revision", "change_id")}
        order = {"position": position, "confirmed_at": confirmed_at, "base": self._packed}

        async def rows() -> AsyncIterator[bytes]:
            turns = Turns()
            for some in batched(chain(self._stood_in, changed), _ROWS_AT_ONCE):
                yield b"".join(json.dumps(change_row(key, loaded.snapshot)).encode() + b"\n" for key in some)
                await turns.take()  # `drain` waits for nothing as long as the pipe takes it all

        try:
            # All but the networks is objects, packed or not, and takes long to make.
            repacked = await self._by_child(order, rows(), lambda packed: packed.unpack_networks(loaded.snapshot))
        except LoaderError as error:
            self._tell(f"the snapshot was not packed anew: {error}")
            raise
        self._stood_in = RecordKeys()
        return replace(repacked, source=loaded.source)

    async def _by_child(
        self,
        order: dict[str, Any],
        rows: AsyncIterator[bytes] | None,
        unpack: Callable[[PackedSnapshot], Iterator[Snapshot | None]],
    ) -> Loaded:
        memory = _new_memory()
        try:
            order |= {"memory": memory, "origin": self._origin, "path": str(self._path) if self._path else None}
            handed_on = [memory] if self._packed is None or "base" not in order else [memory, self._packed]
            async with asyncio.timeout(LOAD_SECONDS):
                result = await _run_child(order, rows, handed_on)
            packed = await asyncio.to_thread(_open_memory, memory)
            loaded = await _unpacked(packed, unpack(packed), Source.REDIS, _UNPACKING_STEP_SECONDS)
        except TimeoutError:
            os.close(memory)
            raise LoaderError(f"loading took longer than {LOAD_SECONDS:g} seconds and was given up") from None
        except SnapshotFileError as error:
            os.close(memory)
            raise LoaderError(f"what the loading process handed over cannot be used: {error}") from None
        except BaseException:
            os.close(memory)
            raise
        self._keep(memory)
        if self._path is not None:
            problem = result["file_problem"]
            self._tell(f"{self._path} was not written: {problem}" if problem else "")
        return replace(loaded, edited=tuple(result["edited"]))

    def _keep(self, memory: int) -> None:
        if self._packed is not None:
            os.close(self._packed)
        self._packed = memory

    def _tell(self, problem: str) -> None:
        self._file_problem = problem
        self._on_file(problem)

    def close(self) -> None:
        """Give back the memory that is kept for the next child."""
        if self._packed is not None:
            os.close(self._packed)
            self._packed = None


async def _unpacked(
    packed: PackedSnapshot, slices: Iterator[Snapshot | None], source: Source, step_seconds: float
) -> Loaded:
    """Build the snapshot in slices, between which others have their turn."""
    snapshot = None
    gc_was_on = gc.isenabled()
    # What is built here stays: a collection in the midst of it would only stop everything to find that out.
    gc.disable()
    turns = Turns(step_seconds=step_seconds)
    try:
        for done in slices:
            snapshot = done
            gc.freeze()
            await turns.take()
    finally:
        if gc_was_on:
            gc.enable()
    assert snapshot is not None  # noqa: S101 - the last one that `unpack` yields
    confirmed_at = time.monotonic() - (time.time() - packed.stamp.confirmed_at)
    return Loaded(snapshot, packed.stamp.position, confirmed_at, source)


async def release(snapshot: Snapshot) -> None:
    """Let go of a snapshot that nobody uses any more in steps: freeing a million objects at once takes long."""
    turns = Turns()
    shards, memories = await _parts(snapshot, turns)
    del snapshot
    while shards:
        shards.pop()
        await turns.take()
    for memory in memories:
        with contextlib.suppress(BufferError):  # somebody uses it after all, and it goes with the last one who does
            await asyncio.to_thread(memory.close)  # giving back its pages takes long, too


async def _parts(snapshot: Snapshot, turns: Turns) -> tuple[list[dict[Any, Any]], set[mmap.mmap]]:
    """Return the dicts that a snapshot consists of, and the memory that its networks are read from."""
    mappings = (
        snapshot.tables,
        snapshot.tenants,
        snapshot.scopes,
        snapshot.tenant_scopes,
        snapshot.resources,
        snapshot.problems,
    )
    shards: list[dict[Any, Any]] = [shard for mapping in mappings for shard in mapping.shards]
    memories = set()
    for table in snapshot.tables.values():
        shards += table.change_shards()
        keys = table.placed[0].v4.keys
        if isinstance(keys, memoryview) and isinstance(keys.obj, mmap.mmap):
            memories.add(keys.obj)
        await turns.take()
    return shards, memories


def _new_memory() -> int:
    """Return an open file that lies in memory, is in no file system, and is gone when nobody has it open."""
    return os.memfd_create("authz-snapshot", os.MFD_CLOEXEC)


def _open_memory(memory: int) -> PackedSnapshot:
    if os.fstat(memory).st_size == 0:
        raise SnapshotFileError("it is empty")
    # The mapping keeps the memory, also when the file is closed.
    return open_packed(memoryview(mmap.mmap(memory, 0, access=mmap.ACCESS_READ)))


async def _run_child(order: dict[str, Any], rows: AsyncIterator[bytes] | None, handed_on: list[int]) -> dict[str, Any]:
    """Run one child to its end; return what it answers.

    Raises:
        StoreError: what the child met at the store, or LoaderError.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "authz_server.packing",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=handed_on,
            start_new_session=True,  # a terminal's Ctrl-C is for the server, which ends the child by itself
            cwd=Path(authz_server.__file__).parents[1],  # of two versions on one machine, the server's own
        )
    except OSError as error:
        raise LoaderError(f"the loading process cannot be started: {error.strerror}") from None
    try:
        return await _converse(child, order, rows)
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def _converse(
    child: asyncio.subprocess.Process, order: dict[str, Any], rows: AsyncIterator[bytes] | None
) -> dict[str, Any]:
    assert child.stdin and child.stdout and child.stderr  # noqa: PT018, S101 - they are pipes
    errors = asyncio.create_task(child.stderr.read())
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its own words say why, below
            child.stdin.write(json.dumps(order).encode() + b"\n")
            await child.stdin.drain()
            if rows is not None:
                async for some in rows:
                    child.stdin.write(some)
                    await child.stdin.drain()
                child.stdin.write(b"\n")
                await child.stdin.drain()
        # Its end of the pipe stays open: when it closes, the child knows that we are gone.
        answer = await child.stdout.read()
        told = (await errors).decode(errors="replace").strip()
    finally:
        errors.cancel()
    code = await child.wait()
    if code < 0:
        name = signal.Signals(-code).name
        hint = ": there was perhaps not enough memory" if name == "SIGKILL" else ""
        raise LoaderError(f"the loading process was ended by {name}{hint}")
    try:
        result: dict[str, Any] = json.loads(answer)
    except ValueError:
        last = told.rpartition("\n")[2][-300:]
        raise LoaderError(f"the loading process failed with exit code {code}: {last}") from None
    if "error" in result:
        kind = _ERRORS.get(result["error"], StoreUnavailableError)
        raise kind(result["message"])
    return result


_ERRORS: dict[str, type[StoreError]] = {
    name: kind
    for name, kind in vars(interface).items()
    if isinstance(kind, type) and issubclass(kind, StoreError) and kind is not interface.ConflictError
}
