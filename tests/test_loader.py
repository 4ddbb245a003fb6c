"""Whole policies come from child processes and from the snapshot file; whatever befalls either, the last one stays."""

import asyncio
import json
import os
import random
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from support.policies import ACME, OFFICE, Q1, Writer, contents, network_entry, network_key, random_change
from support.waiting import eventually

from authz_server import loader as loader_module
from authz_server import refresher as refresher_module
from authz_server.demo.valkey import Valkey
from authz_server.loader import ChildLoader, LoaderError, Source, release
from authz_server.policy.access import NamedList
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.networks import NEVER, UNREADABLE
from authz_server.policy.records import RecordKind
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.refresher import Refresher
from authz_server.snapshot_file import open_packed
from authz_server.store.address import RedisAddress
from authz_server.store.interface import NotInitialisedError, StoreUnavailableError
from authz_server.store.redis_store import RedisStore

pytestmark = pytest.mark.integration
OPTIONS = DecisionOptions()


class Place:
    """A store in Valkey under a prefix of its own, and where its snapshot file is."""

    def __init__(self, valkey: Valkey, folder: Path) -> None:
        self.valkey = valkey
        self.path = folder / "snapshot"
        self.arguments = {"where": RedisAddress(valkey.url).as_json(), "prefix": f"test-{secrets.token_hex(4)}"}
        self.store = RedisStore(valkey.url, prefix=self.arguments["prefix"])
        self.writer = Writer(self.store)
        self.told: list[str] = []
        self.others = children()
        """Processes that other tests and this store have running; none of ours to end."""

    def loader(self, **changed: Any) -> ChildLoader:
        options = {"origin": "here", "path": self.path, "max_age_seconds": 3600, "on_file": self.told.append} | changed
        return ChildLoader(self.arguments, OPTIONS, **options)

    async def fresh(self) -> dict[str, Any]:
        policy = await self.store.load()
        epoch, revision = policy.position.epoch, policy.position.revision
        return contents(build_snapshot(policy.records, epoch=epoch, revision=revision, options=OPTIONS))

    async def spoil(self, collection: str, member: str) -> None:
        """Do as somebody does who edits Redis by hand."""
        client: Any = Redis.from_url(self.valkey.url)
        async with client:
            await client.hset(f"{{{self.arguments['prefix']}}}:{collection}", member, "{")

    async def set_epoch(self, epoch: str) -> None:
        """Make it another history, which followers load in full."""
        client: Any = Redis.from_url(self.valkey.url)
        async with client:
            await client.hset(f"{{{self.arguments['prefix']}}}:meta", "epoch", epoch)

    def in_file(self) -> Snapshot:
        """What the snapshot file holds."""
        *_, snapshot = open_packed(memoryview(self.path.read_bytes())).unpack(OPTIONS)
        assert snapshot is not None
        return snapshot

    @asynccontextmanager
    async def running(self, loader: ChildLoader, **options: Any) -> AsyncIterator[Refresher]:
        refresher = Refresher(self.store, OPTIONS, loader=loader, **options)
        task = asyncio.create_task(refresher.run())
        try:
            yield refresher
        finally:
            while not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=0.1)
            loader.close()


@pytest.fixture
async def place(own_valkey: Valkey, tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(own_valkey, tmp_path)
    yield place
    await place.store.close()


def at_revision(refresher: Refresher, revision: int) -> Any:
    return lambda: refresher.current is not None and refresher.current.revision == revision


def children() -> set[int]:
    """The processes that this one has started and that still are."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def seen_by_others(pid: int) -> bytes:
    """A process's command line and environment."""
    return b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))


async def write_some(writer: Writer, rng: random.Random, changes: int) -> None:
    for _ in range(changes):
        await writer.set(random_change(rng))


async def test_a_child_loads_what_the_store_holds_and_saves_it(place: Place) -> None:
    rng = random.Random(5)
    await place.writer.init()
    await write_some(place.writer, rng, 40)
    loader = place.loader()
    try:
        loaded = await loader.load(None)
    finally:
        loader.close()
    assert contents(loaded.snapshot) == await place.fresh()
    assert (loaded.position, loaded.source, loaded.edited) == (await place.store.position(), Source.REDIS, ())
    assert 0 <= time.monotonic() - loaded.confirmed_at < 30
    assert place.told == [""]
    assert open_packed(memoryview(place.path.read_bytes())).stamp.position == loaded.position


async def test_a_new_process_begins_with_the_file_and_follows_on_without_a_load(place: Place) -> None:
    await place.writer.init()
    async with place.running(place.loader()) as refresher:
        await eventually(at_revision(refresher, 1))
    await place.writer.set((ACME, Tenant("acme", "q1")), (network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    async with place.running(place.loader()) as refresher:
        await eventually(at_revision(refresher, 2))
        assert (refresher.status.loads, refresher.status.events, refresher.status.source) == (0, 1, Source.REDIS)
        assert contents(refresher.current) == await place.fresh()


@pytest.mark.parametrize("how", ["stop", "pause"])
async def test_without_the_store_the_file_is_served_until_it_is_back(place: Place, how: str) -> None:
    await place.writer.init()
    await place.writer.set((ACME, Tenant("acme", "q1")))
    async with place.running(place.loader()) as refresher:
        await eventually(at_revision(refresher, 2))
    if how == "stop":  # with what it holds, for it is to be found again
        place.valkey.stop()
    else:
        place.valkey.pause()
    began = time.monotonic()
    async with place.running(place.loader()) as refresher:
        await eventually(at_revision(refresher, 2))
        assert time.monotonic() - began < 5
        assert (refresher.status.source, refresher.status.connected) == (Source.FILE, False)
        assert refresher.current.tenants["acme"] == Tenant("acme", "q1")
        assert refresher.status.age_seconds(time.monotonic()) > 0
        if how == "pause":
            place.valkey.resume()
            await eventually(lambda: refresher.status.connected)
            assert refresher.status.source is Source.REDIS


async def test_a_file_too_old_for_the_maximum_age_of_snapshots_is_not_decided_from(place: Place) -> None:
    await place.writer.init()
    async with place.running(place.loader()) as refresher:
        await eventually(at_revision(refresher, 1))
    place.valkey.stop()
    async with place.running(place.loader(), max_age_seconds=0.01) as refresher:
        await eventually(lambda: refresher.status.source is Source.FILE)
        assert refresher.current is None


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


SPOILT = {
    "cut-off": (_cut, {}, "damaged or cut off"),
    "world-writable": (lambda path: path.chmod(0o602), {}, "everybody may write"),
    "symbolic-link": (_replace_by_link, {}, "symbolic link"),
    "another-store's": (lambda _path: None, {"origin": "there"}, r"another store \(here, not there\)"),
    "too-old": (lambda _path: None, {"max_age_seconds": 0}, "too old"),
}


@pytest.mark.parametrize("kind", SPOILT)
async def test_a_file_that_must_not_be_served_is_told_and_the_store_is_loaded(place: Place, kind: str) -> None:
    spoil, options, problem = SPOILT[kind]
    await place.writer.init()
    async with place.running(place.loader()) as refresher:
        await eventually(at_revision(refresher, 1))
    spoil(place.path)
    place.told.clear()
    async with place.running(place.loader(**options)) as refresher:
        await eventually(at_revision(refresher, 1))
        assert refresher.status.loads == 1
        assert refresher.status.source is Source.REDIS
    assert re.search(problem, place.told[0])
    assert place.told[1:] == [""]


async def test_a_child_that_is_killed_or_cannot_start_leaves_the_last_snapshot(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.writer.init()
    loader = place.loader()
    async with place.running(loader) as refresher:
        await eventually(at_revision(refresher, 1))
        task = asyncio.create_task(loader.load(None))
        await eventually(lambda: children() - place.others)
        for pid in children() - place.others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(LoaderError, match="ended by SIGKILL: there was perhaps not enough memory"):
            await task
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(LoaderError, match="cannot be started: No such file"):
            await loader.load(None)
        assert refresher.current is not None


async def test_a_child_that_hangs_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    await place.writer.init()
    place.valkey.pause()
    monkeypatch.setattr(loader_module, "LOAD_SECONDS", 0.5)
    with pytest.raises(LoaderError, match=r"longer than 0\.5 seconds"):
        await place.loader().load(None)
    assert children() <= place.others


async def test_what_the_child_met_at_the_store_is_told(place: Place) -> None:
    with pytest.raises(NotInitialisedError, match="authzctl init"):
        await place.loader().load(None)
    place.valkey.stop()
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        await place.loader().load(None)
    assert place.told == []


async def test_a_password_is_in_no_command_line(place: Place) -> None:
    await place.writer.init()
    place.valkey.pause()
    url = place.valkey.url.replace("//", "//:not-to-be-seen@")
    arguments = {"where": RedisAddress(url).as_json(), "prefix": "p"}
    task = asyncio.create_task(
        ChildLoader(arguments, OPTIONS, origin="here", path=None, max_age_seconds=60, on_file=place.told.append).load(
            None
        )
    )
    try:
        await eventually(lambda: children() - place.others)
        for pid in children() - place.others:
            assert b"not-to-be-seen" not in seen_by_others(pid)
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert children() <= place.others


async def test_a_disk_that_takes_no_file_costs_only_the_file(place: Place) -> None:
    await place.writer.init()
    folder = place.path.parent / "gone"
    loader = place.loader(path=folder / "snapshot")
    async with place.running(loader) as refresher:
        await eventually(at_revision(refresher, 1))
        assert re.search("was not written: No such file", place.told[-1])
        assert refresher.status.connected
        assert not loader.is_repack_due(0, loader_module.REPACK_SECONDS - 1)
        assert loader.is_repack_due(0, loader_module.REPACK_SECONDS)


async def test_without_a_file_nothing_is_written_anywhere(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container whose file system is read-only."""
    await place.writer.init()
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    monkeypatch.setenv("TMPDIR", "/nowhere")
    loader = place.loader(path=None)
    async with place.running(loader) as refresher:
        await eventually(at_revision(refresher, 1))
    assert place.told == []
    assert list(place.path.parent.iterdir()) == []


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refresher looks to the file when the store has answered, which it does late where nothing changes."""
    monkeypatch.setattr(refresher_module, "_WAIT_SECONDS", 0.2)


@pytest.mark.usefixtures("looks_often")
async def test_changes_get_into_the_file_while_they_are_followed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(9)
    monkeypatch.setattr(loader_module, "REPACK_SECONDS", 0.0)
    await place.writer.init()
    async with place.running(place.loader()) as refresher:
        await eventually(lambda: refresher.current)
        for _ in range(4):
            await write_some(place.writer, rng, 25)
            await asyncio.sleep(0.3)
        revision = (await place.store.position()).revision
        await eventually(at_revision(refresher, revision))
        await eventually(lambda: open_packed(memoryview(place.path.read_bytes())).stamp.position.revision == revision)
        assert contents(refresher.current) == await place.fresh()
        assert (refresher.status.loads, refresher.status.connected) == (1, True)
        assert not [told for told in place.told if told]
    place.valkey.stop()
    async with place.running(place.loader()) as refresher:
        await eventually(at_revision(refresher, revision))
        await eventually(lambda: refresher.status.source is Source.FILE)
    place.valkey.start()


async def test_many_changes_are_packed_also_without_a_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "REPACK_CHANGES", 10)
    monkeypatch.setattr(loader_module, "_REPACK_PAUSE_SECONDS", 0.0)
    await place.writer.init()
    async with place.running(place.loader(path=None)) as refresher:
        await eventually(lambda: refresher.current)
        for number in range(12):
            await place.writer.set((network_key(f"10.0.{number}.0/24"), network_entry(f"10.0.{number}.0/24")))
        await eventually(at_revision(refresher, 13))

        def changes() -> int:
            return sum(table.changes for table in refresher.current.tables.values())

        # The refresher looks after each answer of the store; the last waits for its time.
        await place.writer.set((OFFICE, NamedList("office")))
        await eventually(at_revision(refresher, 14))
        await eventually(lambda: changes() < 12)
        assert contents(refresher.current) == await place.fresh()


async def test_an_unreadable_record_keeps_its_last_good_value_through_file_and_load(place: Place) -> None:
    await place.writer.init()
    block, other = (network_key(cidr, "global/block") for cidr in ("10.0.0.0/8", "11.0.0.0/8"))
    await place.writer.set((block, network_entry(block.name)), (other, network_entry(other.name)))
    await place.writer.set((ACME, Tenant("acme", "q1")), (Q1, Instance("q1")))
    async with place.running(place.loader()) as refresher:
        await eventually(at_revision(refresher, 3))
        await place.spoil("tenants", "acme")
        await place.spoil("entries:global/block", block.name)
        loaded = await place.loader().load(refresher.current)
        assert loaded.snapshot.tenants["acme"] == Tenant("acme", "q1")
        assert [loaded.snapshot.expiry(key) for key in (block, other)] == [NEVER, NEVER]
        assert set(loaded.snapshot.problems) == {ACME, block}
        alone = (await place.loader().load(None)).snapshot
        assert alone.tenants["acme"] == Tenant("acme", None)
        assert [alone.expiry(key) for key in (block, other)] == [UNREADABLE, NEVER]
        assert (alone.networks, alone.count(RecordKind.ENTRY, "global/block")) == (2, 2)
        assert alone.degraded_scopes() == ("global",)


@pytest.mark.usefixtures("looks_often")
async def test_an_unreadable_entry_keeps_its_last_good_value_when_it_is_packed_anew(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "REPACK_SECONDS", 0.0)
    block, other = network_key("10.0.0.0/8", "global/block"), network_key("11.0.0.0/8")
    await place.writer.init()
    await place.writer.set((block, network_entry("10.0.0.0/8")), (ACME, Tenant("acme", "q1")), (Q1, Instance("q1")))

    def is_as_it_was(snapshot: Snapshot) -> bool:
        return snapshot.expiry(block) == NEVER and snapshot.tenants["acme"] == Tenant("acme", "q1")

    async with place.running(place.loader()) as refresher:
        await eventually(at_revision(refresher, 2))
        await place.spoil("entries:global/block", block.name)
        await place.spoil("tenants", "acme")
        await place.set_epoch("restored")
        await eventually(lambda: refresher.status.loads == 2)
        assert refresher.current.problems.keys() == {block, ACME}
        assert is_as_it_was(refresher.current)
        # Also without any change: the child that loaded knew of no last good value, and this is the next one's file.
        await eventually(lambda: is_as_it_was(place.in_file()))
        await place.writer.set((other, network_entry("11.0.0.0/8")))
        await eventually(lambda: place.in_file().expiry(other) is not None)
        await eventually(lambda: refresher.current.tables["office"].changes == 0)
        assert is_as_it_was(refresher.current)
        assert refresher.status.loads == 2
    assert is_as_it_was(place.in_file())
    assert place.in_file().problems.keys() == {block, ACME}


async def test_the_memory_of_a_snapshot_goes_when_it_is_let_go_of_and_nobody_uses_it(place: Place) -> None:
    await place.writer.init()
    await place.writer.set((network_key("10.0.0.0/8"), network_entry("10.0.0.0/8")))
    loader = place.loader()
    try:
        loaded = await loader.load(None)
    finally:
        loader.close()
    table = loaded.snapshot.tables["office"]
    memory = table.placed[0].v4.keys.obj  # type: ignore[union-attr]
    await release(replace(loaded.snapshot))
    assert not memory.closed
    assert len(list(table.items())) == 1
    releasing = asyncio.create_task(release(loaded.snapshot))
    del table, loaded
    await releasing
    assert memory.closed


async def test_a_child_ends_with_the_process_that_started_it(place: Place) -> None:
    await place.writer.init()
    place.valkey.pause()
    order = {"store": place.arguments, "memory": 0, "origin": "here", "path": None}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "authz_server.packing", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        assert child.stdin is not None
        child.stdin.write(json.dumps(order).encode() + b"\n")
        await child.stdin.drain()
        await asyncio.sleep(1)
        assert child.returncode is None
        child.stdin.close()
        assert await asyncio.wait_for(child.wait(), 20) == 1
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
