"""A snapshot file gives the same snapshot back, or is refused in words that say why; it is never half used."""

import json
import os
import random
import resource
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import CaseMaker, PolicyRoom
from support.policies import contents

from authz_server.policy.records import Record, RecordKey, Unreadable
from authz_server.policy.snapshot import DecisionOptions, Snapshot, SnapshotDraft, build_snapshot
from authz_server.snapshot_file import (
    FORMAT,
    MAGIC,
    SnapshotFileError,
    Stamp,
    apply_change_row,
    change_row,
    check_stamp,
    copy_file,
    open_packed,
    pack,
    remove_drafts,
    save_file,
)
from authz_server.store.interface import Position

ORIGIN = "redis://valkey:6379/0 authz"
STAMP = Stamp(Position("e", 7, "change"), 1000.0, ORIGIN)
OPTIONS = DecisionOptions(fold_path_case=True)


def policy(seed: int) -> Snapshot:
    """Return a snapshot with some of its records spoilt, some of which have a last good value."""
    rng = random.Random(seed)
    records: list[tuple[RecordKey, Record]] = [
        (key, record) for _, key, record in PolicyRoom().records_of(CaseMaker(rng).policy)
    ]
    before = build_snapshot(records, epoch="e", revision=6, options=OPTIONS)
    spoilt = [(key, Unreadable(f"{key} is spoilt") if rng.random() < 0.3 else record) for key, record in records]
    last_good = before if rng.random() < 0.5 else None
    return build_snapshot(spoilt, epoch="e", revision=7, options=OPTIONS, last_good=last_good)


def packed(snapshot: Snapshot, stamp: Stamp = STAMP) -> bytes:
    return b"".join(pack(snapshot, stamp))


def unpacked(data: bytes, options: DecisionOptions = OPTIONS) -> Snapshot:
    *_, snapshot = open_packed(memoryview(data)).unpack(options)
    assert snapshot is not None
    return snapshot


def derived(snapshot: Snapshot) -> tuple[object, ...]:
    return snapshot.counts(), snapshot.degraded_scopes(), snapshot.networks


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_what_was_packed_comes_back(seed: int) -> None:
    snapshot = policy(seed)
    data = packed(snapshot)
    assert open_packed(memoryview(data)).stamp == STAMP
    assert contents(unpacked(data)) == contents(snapshot)
    assert derived(unpacked(data)) == derived(snapshot)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_a_snapshot_takes_the_networks_alone_from_what_was_packed_of_it(seed: int) -> None:
    snapshot = policy(seed)
    *_, other = open_packed(memoryview(packed(snapshot))).unpack_networks(snapshot)
    assert other is not None
    assert contents(other) == contents(snapshot)
    assert derived(other) == derived(snapshot)
    assert (other.revision, other.tenants) == (snapshot.revision, snapshot.tenants)
    assert all(other.tables[name] is not table for name, table in snapshot.tables.items())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_changes_carry_one_snapshot_over_to_another(seed: int, other_seed: int) -> None:
    before, after = policy(seed), policy(other_seed)
    policies = [CaseMaker(random.Random(one)).policy for one in (seed, other_seed)]
    keys = {key for one in policies for _, key, _ in PolicyRoom().records_of(one)}
    keys |= {*before.problems, *after.problems}
    by_rows, by_copies = SnapshotDraft(before), SnapshotDraft(before)
    for key in keys:
        apply_change_row(by_rows, json.loads(json.dumps(change_row(key, after))))
        by_copies.copy(key, after)
    for draft in (by_rows, by_copies):
        carried = draft.done(7)
        assert contents(carried) == contents(after)
        assert derived(carried) == derived(after)
        assert contents(unpacked(packed(carried))) == contents(after)


def test_a_file_is_read_with_the_settings_of_its_reader() -> None:
    snapshot = policy(3)
    options = DecisionOptions(fold_path_case=False)
    *_, other = open_packed(memoryview(packed(snapshot))).unpack(options)
    assert other is not None
    assert other.options == options
    assert [one.resource for one in other.guarded_resources] == [
        snapshot.resources[n] for n in sorted(snapshot.resources)
    ]


def test_an_empty_policy_is_a_policy() -> None:
    snapshot = Snapshot("e", 7, OPTIONS)
    assert contents(unpacked(packed(snapshot))) == contents(snapshot)


GOOD = packed(policy(1))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(b"# not ours\n" * 100, "not a snapshot file", id="text"),
        pytest.param(b"\0" * len(GOOD), "not a snapshot file", id="zeros"),
        pytest.param(MAGIC, "cut off", id="magic-only"),
        pytest.param(MAGIC + (FORMAT + 1).to_bytes(4, "big") + GOOD[12:], "a newer version wrote it", id="newer"),
        pytest.param(MAGIC + (FORMAT - 1).to_bytes(4, "big") + GOOD[12:], "an older version wrote it", id="older"),
        pytest.param(GOOD.replace(b"\r\n", b"\n"), "not a snapshot file", id="line-ends-changed"),
        pytest.param(GOOD + b"\0", "damaged or cut off", id="longer"),
        pytest.param(GOOD + GOOD, "damaged or cut off", id="twice"),
    ],
)
def test_what_is_no_whole_snapshot_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(SnapshotFileError, match=problem):
        open_packed(memoryview(data))


@given(st.integers(0, len(GOOD) - 1))
def test_a_file_cut_off_anywhere_is_refused(length: int) -> None:
    with pytest.raises(SnapshotFileError):
        open_packed(memoryview(GOOD[:length]))


@given(st.integers(0, len(GOOD) * 8 - 1))
def test_one_wrong_bit_anywhere_is_refused(bit: int) -> None:
    data = bytearray(GOOD)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SnapshotFileError):
        open_packed(memoryview(data))


@pytest.mark.parametrize(
    ("stamp", "now", "problem"),
    [
        pytest.param(STAMP, 1000, "", id="now"),
        pytest.param(STAMP, 1600, "", id="as-old-as-allowed"),
        pytest.param(STAMP, 1601, "too old: the store confirmed it 601 seconds ago, and 600", id="too-old"),
        pytest.param(STAMP, 701, "", id="clocks-differ"),
        pytest.param(STAMP, 699, "from the future", id="from-the-future"),
        pytest.param(
            replace(STAMP, origin="redis://other/0 authz"), 1000, "another store.*redis://other/0", id="foreign"
        ),
    ],
)
def test_a_snapshot_that_must_not_be_served_is_refused(stamp: Stamp, now: float, problem: str) -> None:
    if not problem:
        check_stamp(stamp, origin=ORIGIN, max_age_seconds=600, now=now)
        return
    with pytest.raises(SnapshotFileError, match=problem):
        check_stamp(stamp, origin=ORIGIN, max_age_seconds=600, now=now)


def read(path: Path) -> bytes:
    """Return what `copy_file` copies."""
    memory = os.memfd_create("test")
    try:
        copy_file(path, memory)
        return os.pread(memory, os.fstat(memory).st_size, 0)
    finally:
        os.close(memory)


def test_a_saved_file_is_ours_alone_and_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    save_file(path, [b"one", b"two"])
    first = path.stat()
    save_file(path, [GOOD])
    assert read(path) == GOOD
    assert stat.S_IMODE(first.st_mode) == stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first.st_ino != path.stat().st_ino
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_the_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "snapshot"
    victim.write_bytes(b"precious")
    path.symlink_to(victim)
    save_file(path, [GOOD])
    assert victim.read_bytes() == b"precious"
    assert not path.is_symlink()
    assert read(path) == GOOD


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    save_file(path, [b"old"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The nearest thing to a full disk that needs no rights: Python ignores SIGXFSZ, so write() fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_file(path, [bytes(1 << 20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(path) == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_drafts_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    path, draft, other = tmp_path / "snapshot", tmp_path / f".snapshot.{'a' * 16}", tmp_path / ".snapshot.mine"
    for one in (path, draft, other):
        one.write_bytes(b"x")
    remove_drafts(path)
    assert sorted(tmp_path.iterdir()) == [other, path]


def _link(path: Path) -> None:
    target = path.with_name("target")
    target.write_bytes(GOOD)
    path.symlink_to(target)


def _with_mode(mode: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(GOOD)
        path.chmod(mode)

    return make


def _foreign_group(path: Path) -> None:
    path.write_bytes(GOOD)
    group = max([os.getegid(), *os.getgroups()]) + 1
    os.chown(path, -1, group)
    path.chmod(0o660)


def _foreign_owner(path: Path) -> None:
    path.write_bytes(GOOD)
    os.chown(path, os.geteuid() + 1, -1)


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        pytest.param(lambda _path: None, "there is none", id="missing"),
        pytest.param(_link, "symbolic link", id="symbolic-link"),
        pytest.param(Path.mkdir, "not a regular file", id="folder"),
        pytest.param(os.mkfifo, "not a regular file", id="pipe"),
        pytest.param(_with_mode(0o606), "everybody may write to it", id="world-writable"),
        pytest.param(_foreign_group, "group [0-9]+, which the server is not in", id="foreign-group", marks=root_only),
        pytest.param(_foreign_owner, "user [0-9]+ owns it", id="foreign-owner", marks=root_only),
    ],
)
def test_a_file_that_somebody_else_could_have_written_is_refused(
    make: Callable[[Path], None], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "snapshot"
    make(path)
    with pytest.raises(SnapshotFileError, match=problem):
        read(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o644, 0o660])
def test_a_file_that_only_we_may_write_is_read(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    _with_mode(mode)(path)
    os.chown(path, -1, os.getegid())
    assert read(path) == GOOD
