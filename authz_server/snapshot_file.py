"""A snapshot as a file: what the loading child hands to the server, and the last good one for the next start.

Data only: numbers as they lie in memory, and JSON. A file is taken whole or not at all; whatever is wrong with it, the
error says so and nothing of it is used. In order:

    8 bytes     MAGIC
    2 x 4       format, length of the header (big-endian)
    header      JSON: stamp, byte order, lengths of what follows
    sections    the columns of all networks (see `Columns.sections`), each padded to 8 bytes
    chunks      JSON arrays of records of one kind, some hundred each, so that they can be read in slices
    32 bytes    BLAKE2b of all the above
"""

import errno
import json
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from authz_server.policy.access import Enforcement, Mode, NamedList, Resource, Scope
from authz_server.policy.affinity import Instance, InstanceState, Tenant
from authz_server.policy.networks import TYPE_CODES, Columns, ColumnsDraft, NetworkTable, Ranges
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.records import RecordKey, RecordKind
from authz_server.policy.sharded import Sharded
from authz_server.policy.snapshot import DecisionOptions, Kept, Snapshot, SnapshotDraft
from authz_server.store.batches import batched
from authz_server.store.interface import Position

MAGIC = b"\x89authz\r\n"
"""Begins with a byte that is no text, and holds a line end that careless copying changes, as PNG's does."""
FORMAT = 1
"""Counted up by a version that writes what older ones would misread."""

_DIGEST_BYTES = 32
_FIXED_BYTES = len(MAGIC) + 8
_ALIGNMENT = 8
_CHUNK_ROWS = 100
"""Rows are read about one chunk at a time between checks, so this bounds how long a check may wait for it."""
_COPY_BYTES = 1 << 20
_FUTURE_SECONDS = 300.0
"""Clocks differ; a file from further in the future has no age that could be trusted."""


class SnapshotFileError(Exception):
    """The file cannot be used; the message says why and what to do."""


class NoSnapshotFileError(SnapshotFileError):
    """There is no such file, as before the first load."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a snapshot file is a snapshot of."""

    position: Position
    confirmed_at: float
    """When the store last said that this is its newest state, in seconds since the Unix epoch."""
    origin: str
    """Names the store: a file of another one's policy must not be served. Holds no secret."""


@dataclass(frozen=True, slots=True)
class PackedSnapshot:
    """A snapshot file in memory, whose bytes are whole."""

    stamp: Stamp
    sections: list[memoryview]
    chunks: list[tuple[str, memoryview]]
    """(what the rows are, JSON)"""

    def unpack(self, options: DecisionOptions) -> Iterator[Snapshot | None]:
        """Yield None after each slice of the work, about a millisecond's, and at the end the snapshot."""
        position = self.stamp.position
        return self._unpack(Snapshot(position.epoch, position.revision, options), lambda _kind: True)

    def unpack_networks(self, snapshot: Snapshot) -> Iterator[Snapshot | None]:
        """Do as `unpack` does, and take all but the networks from a snapshot of the same policy."""
        return self._unpack(replace(snapshot, tables=Sharded(), networks=0), lambda kind: kind == "table")

    def _unpack(self, before: Snapshot, is_wanted: Callable[[str], bool]) -> Iterator[Snapshot | None]:
        columns = Columns.from_sections(self.sections)
        draft = SnapshotDraft(before)
        for kind, text in self.chunks:
            if not is_wanted(kind):
                continue
            rows: list[Any] = json.loads(bytes(text))
            for row in rows:
                _put_row(draft, kind, row, columns)
            yield None
        yield draft.done(before.revision)


def pack(snapshot: Snapshot, stamp: Stamp) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a snapshot file."""
    draft = ColumnsDraft()
    tables = [[name, *draft.add_table(table)] for name, table in snapshot.tables.items()]
    sections = [memoryview(section).cast("B") for section in draft.columns().sections()]
    chunks = [
        (kind, json.dumps(rows, separators=(",", ":")).encode())
        for kind, all_rows in (("table", iter(tables)), *_all_rows(snapshot))
        for rows in batched(all_rows, _CHUNK_ROWS)
    ]
    header = json.dumps(
        {
            **asdict(stamp),
            "byte_order": sys.byteorder,
            "sections": [section.nbytes for section in sections],
            "chunks": [(kind, len(text)) for kind, text in chunks],
        }
    ).encode()
    header += b" " * (-(_FIXED_BYTES + len(header)) % _ALIGNMENT)
    digest = blake2b(digest_size=_DIGEST_BYTES)
    pieces: list[bytes | memoryview] = [
        MAGIC + FORMAT.to_bytes(4, "big") + len(header).to_bytes(4, "big") + header,
        *(piece for section in sections for piece in (section, bytes(-section.nbytes % _ALIGNMENT))),
        *(text for _, text in chunks),
    ]
    for piece in pieces:
        digest.update(piece)
        yield piece
    yield digest.digest()


def open_packed(buffer: memoryview) -> PackedSnapshot:
    """Check the bytes of a snapshot file in full, and return what is in them.

    Hashing all of it takes long, and lets other threads run meanwhile.

    Raises:
        SnapshotFileError: it is not whole, or not of this version.
    """
    if bytes(buffer[: len(MAGIC)]) != MAGIC:
        raise SnapshotFileError("it is not a snapshot file of authz-server" if len(buffer) else "it is empty")
    if len(buffer) < _FIXED_BYTES + _DIGEST_BYTES:
        raise SnapshotFileError("it is cut off")
    found_format = int.from_bytes(buffer[len(MAGIC) : len(MAGIC) + 4], "big")
    if found_format != FORMAT:
        written_by = "a newer" if found_format > FORMAT else "an older"
        raise SnapshotFileError(f"{written_by} version wrote it (format {found_format}, this version's is {FORMAT})")
    if blake2b(buffer[:-_DIGEST_BYTES], digest_size=_DIGEST_BYTES).digest() != buffer[-_DIGEST_BYTES:]:
        raise SnapshotFileError("it is damaged or cut off: its checksum is wrong")
    end = _FIXED_BYTES + int.from_bytes(buffer[len(MAGIC) + 4 : _FIXED_BYTES], "big")
    header = json.loads(bytes(buffer[_FIXED_BYTES:end]))
    if header["byte_order"] != sys.byteorder:
        raise SnapshotFileError(f"a machine with another byte order ({header['byte_order']}) wrote it")
    sections = []
    for length, code in zip(header["sections"], TYPE_CODES, strict=True):
        sections.append(buffer[end : end + length].cast(code))  # type: ignore[call-overload]
        end += length + -length % _ALIGNMENT
    chunks = []
    for kind, length in header["chunks"]:
        chunks.append((kind, buffer[end : end + length]))
        end += length
    stamp = Stamp(Position(**header["position"]), header["confirmed_at"], header["origin"])
    return PackedSnapshot(stamp, sections, chunks)


def check_stamp(stamp: Stamp, *, origin: str, max_age_seconds: float, now: float) -> None:
    """Make sure that a file's snapshot may be served at `now`, seconds since the Unix epoch.

    Raises:
        SnapshotFileError: it is another store's, or too old.
    """
    if stamp.origin != origin:
        raise SnapshotFileError(f"it holds the policy of another store ({stamp.origin}, not {origin})")
    age = now - stamp.confirmed_at
    if age > max_age_seconds:
        raise SnapshotFileError(
            f"it is too old: the store confirmed it {age:.0f} seconds ago, and {max_age_seconds:.0f} are allowed "
            "(snapshot_file_max_age_seconds)"
        )
    if age < -_FUTURE_SECONDS:
        raise SnapshotFileError(
            f"it is from the future: it was confirmed {-age:.0f} seconds after now; check the clock"
        )


def copy_file(path: Path, target: int) -> None:
    """Copy a snapshot file into an open file, if nobody else could have written it.

    Raises:
        SnapshotFileError: the file is missing, of another kind, somebody else's or open to others, or cannot be read.
    """
    try:
        # Without waiting: the name may be a pipe's.
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NoSnapshotFileError("there is none") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SnapshotFileError("it is a symbolic link, which is not followed") from None
        raise SnapshotFileError(f"it cannot be opened: {error.strerror}") from None
    try:
        about = os.fstat(source)
        if not stat.S_ISREG(about.st_mode):
            raise SnapshotFileError("it is not a regular file")
        if about.st_uid != os.geteuid():
            raise SnapshotFileError(f"user {about.st_uid} owns it, not user {os.geteuid()} as whom the server runs")
        if about.st_mode & stat.S_IWOTH:
            raise SnapshotFileError("everybody may write to it: take that right away (chmod o-w), if you trust it")
        # A volume's fsGroup is given the right to write by the kubelet, and is a group of ours.
        if about.st_mode & stat.S_IWGRP and about.st_gid not in {os.getegid(), *os.getgroups()}:
            raise SnapshotFileError(f"group {about.st_gid}, which the server is not in, may write to it (chmod g-w)")
        while data := os.read(source, _COPY_BYTES):
            write_all(target, [data])
    except OSError as error:
        raise SnapshotFileError(f"it cannot be read: {error.strerror}") from None
    finally:
        os.close(source)


def save_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Replace a snapshot file in one step: whoever reads it, also after a power failure, finds the old or the new one.

    Raises:
        OSError: nothing was replaced, and nothing is left behind.
    """
    # O_EXCL: neither a file nor a link that somebody put there is written through.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            write_all(descriptor, pieces)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_drafts(path: Path) -> None:
    """Remove what a `save_file` that was killed has left behind."""
    for draft in path.parent.glob(f".{path.name}.????????????????"):
        draft.unlink(missing_ok=True)


def write_all(descriptor: int, pieces: Iterable[bytes | memoryview]) -> None:
    """Write all of it to a file.

    Raises:
        OSError: it could not be written.
    """
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def change_row(key: RecordKey, snapshot: Snapshot) -> list[Any]:
    """Return as JSON values what a snapshot holds under a key."""
    value: Any
    if key.kind is RecordKind.ENTRY:
        value = snapshot.expiry(key)
    else:
        record = snapshot.get(key)
        value = None if record is None else _row(record)
    return [key.kind.value, key.name, key.list_name, value, snapshot.problems.get(key)]


def apply_change_row(draft: SnapshotDraft, row: list[Any]) -> None:
    """Set in a draft what `change_row` found."""
    kind, name, list_name, value, problem = row
    key = RecordKey(RecordKind(kind), name, list_name)
    draft.put(key, None)
    if problem is not None:
        draft.put_problem(key, problem)
    if value is not None:
        draft.keep(key, value if key.kind is RecordKind.ENTRY else _record(key.kind, value))


def _all_rows(snapshot: Snapshot) -> Iterator[tuple[str, Iterator[Any]]]:
    # Lists before scopes, which are looked at with them.
    mappings: dict[RecordKind, Iterable[Kept]] = {
        RecordKind.LIST: snapshot.named_lists.values(),
        RecordKind.SCOPE: snapshot.scopes.values(),
        RecordKind.RESOURCE: snapshot.resources.values(),
        RecordKind.TENANT: snapshot.tenants.values(),
        RecordKind.INSTANCE: snapshot.instances.values(),
    }
    for kind, records in mappings.items():
        yield kind.value, map(_row, records)
    yield "problem", ([key.kind.value, key.name, key.list_name, text] for key, text in snapshot.problems.items())


def _row(record: Kept) -> list[Any]:
    match record:
        case NamedList(name, description, owner):
            return [name, description, owner]
        case Scope():
            return [record.name, record.mode, record.enforcement, record.allow_lists, record.block_lists]
        case Resource():
            return [record.name, [pattern.text for pattern in record.paths], record.hosts]
        case Tenant():
            return [record.id, record.instance, record.held]
        case Instance():
            return [record.name, record.weight, record.state]


_READERS: dict[RecordKind, Callable[..., Kept]] = {
    RecordKind.LIST: NamedList,
    RecordKind.SCOPE: lambda name, mode, enforcement, allow, block: Scope(
        name, Mode(mode), Enforcement(enforcement), tuple(allow), tuple(block)
    ),
    RecordKind.RESOURCE: lambda name, paths, hosts: Resource(name, tuple(map(parse_path_pattern, paths)), tuple(hosts)),
    RecordKind.TENANT: Tenant,
    RecordKind.INSTANCE: lambda name, weight, state: Instance(name, weight, InstanceState(state)),
}


def _record(kind: RecordKind, row: list[Any]) -> Kept:
    return _READERS[kind](*row)


def _put_row(draft: SnapshotDraft, kind: str, row: list[Any], columns: Columns) -> None:
    if kind == "table":
        name, ranges, size = row
        place: Ranges = tuple(ranges)
        draft.put_table(name, NetworkTable(columns, place, size))
    elif kind == "problem":
        draft.put_problem(RecordKey(RecordKind(row[0]), row[1], row[2]), row[3])
    else:
        record = _record(RecordKind(kind), row)
        draft.keep(RecordKey(RecordKind(kind), row[0]), record)
