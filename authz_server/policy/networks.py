"""The match table: longest-prefix match over many networks, each with the second from which it no longer counts.

Networks are kept in columns, sorted by their first address; of two that begin alike, the wider one first. The last
one that begins at or before an address is then the narrowest that can hold it, or lies within it: a look-up is one
binary search (in a large table, among the rows whose first bits are the address') and a few steps outwards, whatever
the prefix lengths are, and nobody can choose networks that make it slow. Columns are plain numbers without an object
each, so a file's bytes serve as they are, and all tables that are built together share them. Tables are never changed:
later changes lie in dicts over the columns.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Self, TypeAlias

from authz_server.policy.addresses import MAX_PREFIX_LENGTH, Address, Network
from authz_server.policy.sharded import Sharded, ShardedDraft

NEVER: Final = 1 << 48
"""The expiry of what does not expire: later than any second that calendars name, so comparing is enough."""
UNREADABLE: Final = 0
"""In the place of an expiry: the network is there, and nobody can read what is said of it. As an expiry it is long
over, so that it allows nothing; that it blocks all the same is `access.judge`'s work."""
_REMOVED: Final = -1
"""In a table's changes: the columns have the network, the table has not."""

_LENGTH_BITS: Final = 8
_KEY_BITS: Final = 64
_LOW_KEY: Final = (1 << _KEY_BITS) - 1
_INDEXED_ROWS: Final = 4096
"""A table of fewer is searched as fast without an index."""
_ROWS_A_SLOT_BITS: Final = 4
"""A slot has 8 to 15 rows when the networks are spread evenly, for its four bytes."""

Section: TypeAlias = "array[int] | memoryview"
"""Numbers that are stored without objects."""


@dataclass(frozen=True, slots=True)
class SortedNetworks:
    """Columns of networks of one kind, those of each table next to each other."""

    bits: int
    """Of a key: 32 or 64."""
    keys: Section
    """The bits of the first address that are compared."""
    lengths: Section
    """How many bits of the key are the prefix."""
    parents: Section
    """1 + the row of the narrowest network around this one; 0: none."""
    expiries: Section
    """Seconds since the Unix epoch, or NEVER."""
    indexes: "dict[int, tuple[int, array[int]]]" = field(default_factory=dict, init=False, compare=False)
    """Of each large table, by its first row: how many bits of a key to shift away for its slot, and for each slot 1 +
    the first row in it or after it, or 0 until somebody asks (all at once would hold up checks). That saves most steps
    of a binary search."""

    def match(self, key: int, start: int, end: int) -> list[tuple[int, int]]:
        """Return (bits of the prefix, expiry) of the networks from `start` to `end` that hold a key, longest first."""
        found: list[tuple[int, int]] = []
        keys = self.keys
        first, last = (start, end) if end - start < _INDEXED_ROWS else self._slot(key, start, end)
        row = bisect_right(keys, key, first, last)
        if row == start:
            return found
        # From here on `row` is 1 + the number of the row, as in `parents`.
        bits, lengths, parents = self.bits, self.lengths, self.parents
        while row:
            row -= 1
            length = lengths[row]
            if not (key ^ keys[row]) >> bits - length:
                found.append((length, self.expiries[row]))
            row = parents[row]
        return found

    def _slot(self, key: int, start: int, end: int) -> tuple[int, int]:
        """Return from where to where the rows of a large table have the key's first bits."""
        known = self.indexes.get(start)
        if known is None:
            slot_bits = (end - start).bit_length() - _ROWS_A_SLOT_BITS
            known = self.indexes[start] = (self.bits - slot_bits, array("I", bytes(4 * ((1 << slot_bits) + 1))))
        shift, rows = known
        slot = key >> shift
        first, last = rows[slot], rows[slot + 1]
        if not first:
            first = rows[slot] = bisect_left(self.keys, slot << shift, start, end) + 1
        if not last:
            last = rows[slot + 1] = bisect_left(self.keys, slot + 1 << shift, start, end) + 1
        return first - 1, last - 1

    def find(self, key: int, length: int, start: int, end: int) -> int | None:
        """Return the expiry of exactly this network; None when it is not there."""
        row = bisect_right(self.keys, key, start, end)
        while row > start and self.keys[row - 1] == key:
            row -= 1
            if self.lengths[row] == length:
                return self.expiries[row]
        return None


@dataclass(frozen=True, slots=True)
class Columns:
    """The networks of all tables that were built together.

    IPv6 networks of more than 64 bits are apart: their keys are the second half of the address, and rows with the same
    first half lie together, in a *group*.
    """

    v4: SortedNetworks
    v6: SortedNetworks
    v6_long: SortedNetworks
    groups: Section
    """The first halves, sorted within each table."""
    group_starts: Section
    """The first row of each group, and at the end the number of rows."""

    def sections(self) -> list[Section]:
        """Return all numbers, in an order that `from_sections` knows."""
        families = (self.v4, self.v6, self.v6_long)
        columns = [column for one in families for column in (one.keys, one.lengths, one.parents, one.expiries)]
        return [*columns, self.groups, self.group_starts]

    @classmethod
    def from_sections(cls, sections: Sequence[Section]) -> Self:
        """Take what `sections` returned."""
        v4, v6, v6_long = (
            SortedNetworks(bits, *sections[4 * number : 4 * number + 4]) for number, (bits, _) in enumerate(_FAMILIES)
        )
        return cls(v4, v6, v6_long, *sections[4 * len(_FAMILIES) :])


_LONG: Final = 2
"""The number of v6_long among the families."""
_Numbers: TypeAlias = tuple[list[int], list[int], list[int]]
"""Of each family."""

Ranges = tuple[int, int, int, int, int, int]
"""Where a table's networks are: start and end among v4, v6 and the groups of v6_long."""


class NetworkTable:
    """An immutable mapping of networks to expiries (seconds since the Unix epoch, or NEVER), searched by address."""

    __slots__ = ("_changes", "_columns", "_ranges", "_size")

    def __init__(
        self,
        columns: Columns | None = None,
        ranges: Ranges = (0,) * 6,
        size: int = 0,
        changes: "_Changes | None" = None,
    ) -> None:
        """Make a table of networks that are in columns, by default of none; `ColumnsDraft` knows its arguments."""
        self._columns = columns or _NO_COLUMNS
        self._ranges = ranges
        self._size = size
        self._changes = changes if changes and changes.count else None

    @classmethod
    def build(cls, items: Iterable[tuple[Network, int]]) -> Self:
        """Build a table by itself; of two expiries for one network, the later one stays."""
        draft = ColumnsDraft()
        place = draft.add(items)
        return cls(draft.columns(), *place)

    def __len__(self) -> int:
        return self._size

    @property
    def placed(self) -> tuple[Columns, Ranges]:
        """The columns, and where in them this table is, as it was before its changes."""
        return self._columns, self._ranges

    @property
    def changes(self) -> int:
        """How many networks differ from the columns."""
        return self._changes.count if self._changes else 0

    def match(self, address: Address) -> list[tuple[int, int]]:
        """Return (prefix length, expiry) of every network that holds the address, longest prefix first."""
        version, value = address
        start_4, end_4, start_6, end_6, first_group, last_group = self._ranges
        if version == 4:
            found = self._columns.v4.match(value, start_4, end_4)
        else:
            high = value >> _KEY_BITS
            found = self._columns.v6.match(high, start_6, end_6)
            if first_group != last_group:
                found = self._match_long(value, high) + found
        if self._changes is None:
            return found
        changed = self._changes.match(address)
        if not changed:
            return found
        merged = sorted((dict(found) | changed).items(), reverse=True)
        return [(length, expiry) for length, expiry in merged if expiry != _REMOVED]

    def _match_long(self, value: int, high: int) -> list[tuple[int, int]]:
        rows = self._group(high)
        if rows is None:
            return []
        found = self._columns.v6_long.match(value & _LOW_KEY, *rows)
        return [(length + _KEY_BITS, expiry) for length, expiry in found]

    def _group(self, high: int) -> tuple[int, int] | None:
        """Return from where to where the networks of more than 64 bits are that begin like this."""
        groups, starts = self._columns.groups, self._columns.group_starts
        number = bisect_left(groups, high, *self._ranges[4:])
        if number == self._ranges[5] or groups[number] != high:
            return None
        return starts[number], starts[number + 1]

    def get(self, network: Network) -> int | None:
        """Return the expiry of exactly this network, or None when it is not there."""
        if self._changes and (changed := self._changes.get(network)) is not None:
            return None if changed == _REMOVED else changed
        start_4, end_4, start_6, end_6, *_ = self._ranges
        length = network.prefix_length
        if network.version == 4:
            return self._columns.v4.find(network.first, length, start_4, end_4)
        high = network.first >> _KEY_BITS
        if length <= _KEY_BITS:
            return self._columns.v6.find(high, length, start_6, end_6)
        if rows := self._group(high):
            return self._columns.v6_long.find(network.first & _LOW_KEY, length - _KEY_BITS, *rows)
        return None

    def items(self) -> Iterator[tuple[Network, int]]:
        """Yield all networks with their expiries, in no particular order."""
        changed = self._changes
        for network, expiry in self._column_items():
            if changed is None or changed.get(network) is None:
                yield network, expiry
        yield from ((network, expiry) for network, expiry in self.changed_items() if expiry != _REMOVED)

    def changed_items(self) -> Iterator[tuple[Network, int]]:
        """Yield the networks that differ from the columns, with their expiries or _REMOVED."""
        if self._changes:
            yield from self._changes.items()

    def change_shards(self) -> Iterator[dict[int, int]]:
        """Yield the dicts that hold the changes, for whoever lets go of them one after the other."""
        if self._changes:
            for layers in self._changes.layers.values():
                for _, _, layer in layers:
                    yield from layer.shards

    def _column_items(self) -> Iterator[tuple[Network, int]]:
        start_4, end_4, start_6, end_6, first_group, last_group = self._ranges
        v4, v6, long = self._columns.v4, self._columns.v6, self._columns.v6_long
        for row in range(start_4, end_4):
            yield Network(4, v4.keys[row], v4.lengths[row]), v4.expiries[row]
        for row in range(start_6, end_6):
            yield Network(6, v6.keys[row] << _KEY_BITS, v6.lengths[row]), v6.expiries[row]
        for number in range(first_group, last_group):
            high = self._columns.groups[number] << _KEY_BITS
            for row in range(self._columns.group_starts[number], self._columns.group_starts[number + 1]):
                yield Network(6, high | long.keys[row], long.lengths[row] + _KEY_BITS), long.expiries[row]

    def draft(self) -> "NetworkTableDraft":
        """Return a copy to be changed; this table stays as it is."""
        return NetworkTableDraft(
            NetworkTable(self._columns, self._ranges), self._size, _ChangesDraft(self._changes or _Changes())
        )

    def with_changes(self, changes: Iterable[tuple[Network, int | None]]) -> "NetworkTable":
        """Return a table with these networks set, or removed where the expiry is None; this one stays as it is."""
        draft = self.draft()
        for network, expiry in changes:
            draft.put(network, expiry)
        return draft.done()


class NetworkTableDraft:
    """A table in the making."""

    def __init__(self, unchanged: NetworkTable, size: int, changes: "_ChangesDraft") -> None:
        """Begin with so many networks, which `changes` make of those in the columns (`unchanged`)."""
        self._unchanged = unchanged
        self._size = size
        self._changes = changes

    def get(self, network: Network) -> int | None:
        """Return the expiry of exactly this network as it is now, or None when it is not there."""
        changed = self._changes.get(network)
        if changed is None:
            return self._unchanged.get(network)
        return None if changed == _REMOVED else changed

    def put(self, network: Network, expiry: int | None) -> None:
        """Set the expiry of a network, or remove it where that is None."""
        before = self._changes.get(network)
        below = self._unchanged.get(network)
        there = below is not None if before is None else before != _REMOVED
        self._size += (expiry is not None) - there
        if expiry is None:
            self._changes.put(network, None if below is None else _REMOVED)
        else:
            self._changes.put(network, None if below == expiry else expiry)

    def done(self) -> NetworkTable:
        """Return the table as it is now; the draft must not be used any more."""
        return NetworkTable(*self._unchanged.placed, self._size, self._changes.done())


_Layer = tuple[int, int, Sharded[int, int]]
"""(prefix length, bits to shift away, a network's first bits -> expiry or _REMOVED)"""


@dataclass(frozen=True, slots=True)
class _Changes:
    """Networks that differ from the columns, by prefix length."""

    layers: dict[int, tuple[_Layer, ...]] = field(default_factory=lambda: {4: (), 6: ()})
    """By version, longest prefix first."""
    count: int = 0

    def match(self, address: Address) -> dict[int, int]:
        """Return the prefix lengths of the networks that hold the address, with their expiries or _REMOVED."""
        value = address.value
        found = {}
        for length, shift, layer in self.layers[address.version]:
            prefix = value >> shift
            shards = layer.shards
            expiry = shards[hash(prefix) % len(shards)].get(prefix)
            if expiry is not None:
                found[length] = expiry
        return found

    def get(self, network: Network) -> int | None:
        for length, shift, layer in self.layers[network.version]:
            if length == network.prefix_length:
                return layer.get(network.first >> shift)
        return None

    def items(self) -> Iterator[tuple[Network, int]]:
        for version, layers in self.layers.items():
            for length, shift, layer in layers:
                for prefix, expiry in layer.items():
                    yield Network(4 if version == 4 else 6, prefix << shift, length), expiry


class _ChangesDraft:
    """Changes on their way to the next table."""

    def __init__(self, before: _Changes) -> None:
        self._before = before
        self._drafts: dict[tuple[int, int], ShardedDraft[int, int]] = {}

    def get(self, network: Network) -> int | None:
        """Return the expiry as it is now."""
        draft = self._drafts.get((network.version, network.prefix_length))
        if draft is None:
            return self._before.get(network)
        return draft.get(network.first >> MAX_PREFIX_LENGTH[network.version] - network.prefix_length)

    def put(self, network: Network, expiry: int | None) -> None:
        """Set an expiry or _REMOVED; None: as it is in the columns."""
        place = (network.version, network.prefix_length)
        shift = MAX_PREFIX_LENGTH[network.version] - network.prefix_length
        draft = self._drafts.get(place)
        if draft is None:
            layers = self._before.layers[network.version]
            layer = next((layer for length, _, layer in layers if length == network.prefix_length), None)
            draft = self._drafts[place] = (layer if layer is not None else Sharded[int, int]()).draft()
        draft.put(network.first >> shift, expiry)

    def done(self) -> _Changes:
        """Return the changes as they are now."""
        layers = dict(self._before.layers)
        for version in {version for version, _ in self._drafts}:
            by_length = {length: layer for length, _, layer in layers[version]}
            by_length |= {length: draft.done() for (of, length), draft in self._drafts.items() if of == version}
            bits = MAX_PREFIX_LENGTH[version]
            layers[version] = tuple(
                (length, bits - length, by_length[length])
                for length in sorted(by_length, reverse=True)
                if len(by_length[length])
            )
        return _Changes(layers, sum(len(layer) for some in layers.values() for _, _, layer in some))


class ColumnsDraft:
    """Columns in the making."""

    def __init__(self) -> None:
        self._families = [[array(code) for code in codes] for _, codes in _FAMILIES]
        self._groups: array[int] = array("Q")
        self._group_starts: array[int] = array("I")

    def add(self, items: Iterable[tuple[Network, int]]) -> tuple[Ranges, int]:
        """Append the networks of a table, and return what its constructor wants beside the columns."""
        numbers: _Numbers = ([], [], [])
        expiring: tuple[dict[int, int], ...] = ({}, {}, {})
        for network, expiry in items:
            family, number = _number(network)
            numbers[family].append(number)
            # Of a network that comes twice the later one counts.
            if expiry != NEVER:
                expiring[family][number] = expiry
            elif expiring[family]:
                expiring[family].pop(number, None)
        return self._append_all(numbers, expiring)

    def add_table(self, table: NetworkTable) -> tuple[Ranges, int]:
        """Append the networks of a table that there is; returns what `add` does."""
        columns, (start_4, end_4, start_6, end_6, first_group, last_group) = table.placed
        numbers: _Numbers = ([], [], [])
        expiring: tuple[dict[int, int], ...] = ({}, {}, {})
        parts = [(0, columns.v4, 0, start_4, end_4), (1, columns.v6, 0, start_6, end_6)]
        parts += [
            (2, columns.v6_long, columns.groups[group] << _KEY_BITS, *columns.group_starts[group : group + 2])
            for group in range(first_group, last_group)
        ]
        for family, rows, high, start, end in parts:
            numbers[family].extend(
                (high | key) << _LENGTH_BITS | length
                for key, length in zip(rows.keys[start:end], rows.lengths[start:end], strict=True)
            )
            expiring[family].update(
                (numbers[family][offset - (end - start)], expiry)
                for offset, expiry in enumerate(rows.expiries[start:end])
                if expiry != NEVER
            )
        for network, changed in table.changed_items():
            family, number = _number(network)
            expiring[family].pop(number, None)
            numbers[family].append(number)
            if changed != NEVER:
                expiring[family][number] = changed
        return self._append_all(numbers, expiring)

    def _append_all(self, numbers: _Numbers, expiring: tuple[dict[int, int], ...]) -> tuple[Ranges, int]:
        for some in numbers:
            some.sort()
        range_4, range_6 = self._append(0, numbers[0], expiring[0]), self._append(1, numbers[1], expiring[1])
        first_group, start = len(self._groups), len(self._families[2][0])
        end = self._append(2, numbers[2], expiring[2])[1]
        return (*range_4, *range_6, first_group, len(self._groups)), sum(
            stop - begin for begin, stop in (range_4, range_6, (start, end))
        )

    def _append(self, family: int, numbers: list[int], expiring: dict[int, int]) -> tuple[int, int]:
        bits = _FAMILIES[family][0]
        keys, lengths, parents, expiries = self._families[family]
        start = row = len(keys)
        around: list[tuple[int, int]] = []
        mask = (1 << bits) - 1
        before = group = -1
        for number in numbers:
            if number == before:
                continue
            expiry = expiring.get(number, NEVER) if expiring else NEVER
            if expiry == _REMOVED:
                continue
            before = number
            first, length = number >> _LENGTH_BITS, number & (1 << _LENGTH_BITS) - 1
            if family == _LONG and first >> bits != group:
                group = first >> bits
                self._groups.append(group)
                self._group_starts.append(row)
            while around and around[-1][0] < first:
                around.pop()
            row += 1
            keys.append(first & mask)
            lengths.append(length)
            parents.append(around[-1][1] if around else 0)
            expiries.append(expiry)
            around.append((first | (1 << bits - length) - 1, row))
        return start, row

    def columns(self) -> Columns:
        """Return the columns; nothing may be added any more."""
        self._group_starts.append(len(self._families[2][0]))
        columns = [column for family in self._families for column in family]
        return Columns.from_sections([*columns, self._groups, self._group_starts])


def _number(network: Network) -> tuple[int, int]:
    """Return a network's family, and a number that sorts as the family's rows do."""
    if network.version == 4:
        return 0, network.first << _LENGTH_BITS | network.prefix_length
    if network.prefix_length <= _KEY_BITS:
        return 1, network.first >> _KEY_BITS << _LENGTH_BITS | network.prefix_length
    return _LONG, network.first << _LENGTH_BITS | network.prefix_length - _KEY_BITS


_FAMILIES: Final = ((32, "IBIQ"), (64, "QBIQ"), (64, "QBIQ"))
TYPE_CODES: Final = "".join(codes for _, codes in _FAMILIES) + "QI"
"""Of `Columns.sections`, as the modules array and struct name them."""
_NO_COLUMNS: Final = ColumnsDraft().columns()
