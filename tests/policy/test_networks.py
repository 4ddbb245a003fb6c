"""The match table is a linear scan, only faster, and never changes."""

import random
from array import array

from hypothesis import given
from hypothesis import strategies as st

from authz_server.policy.addresses import Address, Network, parse_address, parse_network
from authz_server.policy.networks import NEVER, TYPE_CODES, Columns, ColumnsDraft, NetworkTable


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Draw networks from a few corners, so that they nest and collide."""
    version = draw(st.sampled_from((4, 6)))
    bits = 32 if version == 4 else 128
    value = draw(st.sampled_from((0, 1 << (bits - 1), (1 << bits) - 1))) ^ draw(st.integers(0, 15))
    value ^= draw(st.integers(0, 15)) << (bits - 8) ^ draw(st.integers(0, 3)) << (bits // 2 - 1)
    length = draw(st.sampled_from((0, 1, 4, 8, bits // 2, bits // 2 + 1, bits - 4, bits - 1, bits)))
    return Network(version, value >> (bits - length) << (bits - length), length)


EXPIRIES = st.integers(0, 9) | st.just(NEVER)
ITEMS = st.lists(st.tuples(networks(), EXPIRIES), max_size=25)
CHANGES = st.lists(st.tuples(networks(), st.none() | EXPIRIES), max_size=10)


def boundaries(network: Network) -> list[Address]:
    bits = 32 if network.version == 4 else 128
    last = network.first | ((1 << (bits - network.prefix_length)) - 1)
    values = (network.first - 1, network.first, last, last + 1)
    return [Address(network.version, value) for value in values if 0 <= value < 1 << bits]


def content(table: NetworkTable, probes: list[Network]) -> list[object]:
    return [
        len(table),
        sorted(table.items()),
        *(table.get(network) for network in probes),
        *(list(table.match(address)) for network in probes for address in boundaries(network)),
    ]


@given(ITEMS, st.lists(networks(), max_size=5))
def test_matching_is_a_linear_scan_longest_first(items: list[tuple[Network, int]], more: list[Network]) -> None:
    table, scanned = NetworkTable.build(items), dict(items)
    assert len(table) == len(scanned)
    for network in [*scanned, *more]:
        assert table.get(network) == scanned.get(network)
        for address in boundaries(network):
            found = [(other.prefix_length, value) for other, value in scanned.items() if other.holds(address)]
            assert list(table.match(address)) == sorted(found, reverse=True)


@given(ITEMS, CHANGES)
def test_changes_give_what_building_from_scratch_gives(
    items: list[tuple[Network, int]], changes: list[tuple[Network, int | None]]
) -> None:
    probes = [network for network, _ in (*items, *changes)]
    result = dict(items)
    for network, value in changes:
        if value is None:
            result.pop(network, None)
        else:
            result[network] = value
    changed = NetworkTable.build(items).with_changes(changes)
    assert content(changed, probes) == content(NetworkTable.build(result.items()), probes)


@given(ITEMS, CHANGES)
def test_a_table_in_use_never_changes(
    items: list[tuple[Network, int]], changes: list[tuple[Network, int | None]]
) -> None:
    probes = [network for network, _ in (*items, *changes)]
    table = NetworkTable.build(items)
    before = content(table, probes)
    table.with_changes(changes)
    assert content(table, probes) == before


@given(st.lists(ITEMS, max_size=4), CHANGES)
def test_tables_that_share_columns_do_not_see_each_other(
    lists: list[list[tuple[Network, int]]], changes: list[tuple[Network, int | None]]
) -> None:
    probes = [network for items in [*lists, changes] for network, _ in items]
    draft = ColumnsDraft()
    places = [draft.add(items) for items in lists]
    columns = draft.columns()
    sections = columns.sections()
    assert [section.itemsize for section in sections] == [array(code).itemsize for code in TYPE_CODES]
    stored = Columns.from_sections(
        [memoryview(section.tobytes()).cast(code) for section, code in zip(sections, TYPE_CODES, strict=True)]
    )
    for items, place in zip(lists, places, strict=True):
        alone = NetworkTable.build(items)
        for table in (NetworkTable(columns, *place), NetworkTable(stored, *place)):
            assert content(table, probes) == content(alone, probes)
            assert content(table.with_changes(changes), probes) == content(alone.with_changes(changes), probes)


@given(st.lists(st.tuples(ITEMS, CHANGES), max_size=3))
def test_a_table_with_changes_is_taken_up_into_new_columns(
    lists: list[tuple[list[tuple[Network, int]], list[tuple[Network, int | None]]]],
) -> None:
    probes = [network for items, changes in lists for network, _ in (*items, *changes)]
    changed = [NetworkTable.build(items).with_changes(changes) for items, changes in lists]
    draft = ColumnsDraft()
    places = [draft.add_table(table) for table in changed]
    columns = draft.columns()
    for table, place in zip(changed, places, strict=True):
        taken_up = NetworkTable(columns, *place)
        assert content(taken_up, probes) == content(table, probes)
        assert taken_up.changes == 0


@given(ITEMS, st.lists(CHANGES, max_size=4))
def test_a_change_taken_back_leaves_nothing(
    items: list[tuple[Network, int]], changes: list[list[tuple[Network, int | None]]]
) -> None:
    table, original = NetworkTable.build(items), dict(items)
    for some in changes:
        table = table.with_changes(some)
    touched = {network for some in changes for network, _ in some}
    assert table.changes <= len(touched)
    back = table.with_changes((network, original.get(network)) for network in touched)
    assert (back.changes, sorted(back.items())) == (0, sorted(original.items()))


def test_a_table_of_nothing_finds_nothing() -> None:
    assert list(NetworkTable().match(parse_address("::"))) == []
    assert (len(NetworkTable()), list(NetworkTable().items())) == (0, [])


def test_an_expiry_in_1970_is_found() -> None:
    table = NetworkTable.build([(parse_network("0.0.0.0/0"), 0)])
    assert list(table.match(parse_address("255.255.255.255"))) == [(0, 0)]
    assert list(table.match(parse_address("::"))) == []


def test_a_thousand_networks_around_each_other_are_all_found() -> None:
    """The deepest nest there can be: one network of every length."""
    networks = [
        parse_network(f"{'::' if bits == 128 else '0.0.0.0'}/{length}")
        for bits in (32, 128)
        for length in range(bits + 1)
    ]
    table = NetworkTable.build((network, 5) for network in networks)
    assert [length for length, _ in table.match(parse_address("::"))] == list(range(128, -1, -1))
    assert [length for length, _ in table.match(parse_address("0.0.0.0"))] == list(range(32, -1, -1))
    assert [length for length, _ in table.match(parse_address("::1:0:0:1"))] == list(range(79, -1, -1))


def test_a_large_table_is_searched_as_small_ones_are() -> None:
    """Large ones have an index, which is filled by the look-ups."""
    rng = random.Random(5)
    items: dict[Network, int] = {}
    kinds = (
        (4, 0, 31, range(8, 33)),
        (4, 0xC0 << 24, 16, range(12, 33)),
        (6, 0, 63, range(32, 65)),
        (6, 0x2001 << 112, 48, range(32, 65)),
        (6, 0x2001 << 112, 32, range(65, 129)),
    )
    for version, first, varying, lengths in kinds:
        bits = 32 if version == 4 else 128
        for _ in range(5_000):
            value, length = first | rng.getrandbits(varying) << bits - lengths[-1], rng.choice(lengths)
            items[Network(version, value >> bits - length << bits - length, length)] = rng.randrange(9)
    items |= {Network(version, 0, length): 7 for version in (4, 6) for length in (0, 1, 32)}
    large = NetworkTable.build(items.items())
    parts = [NetworkTable.build(list(items.items())[start : start + 1_000]) for start in range(0, len(items), 1_000)]
    ends = [Address(4, 0), Address(4, (1 << 32) - 1), Address(6, 0), Address(6, (1 << 128) - 1)]
    asked = [*ends, *(address for network in rng.sample(sorted(items), 2_000) for address in boundaries(network))]
    matched = 0
    for address in asked * 2:  # the second time, the index knows
        found = large.match(address)
        assert found == sorted((one for part in parts for one in part.match(address)), reverse=True)
        matched += len(found) > 3
    assert matched > 2_000


def test_many_changes_grow_and_shrink_like_few() -> None:
    """Many are kept in another way; both ways, and the passage between them, must look the same."""
    networks = [Network(4, number << 8, 24) for number in range(10_000)]
    table = NetworkTable.build((network, network.first) for network in networks[:500])
    before: list[tuple[NetworkTable, int]] = []
    for start in range(0, len(networks), 1_000):
        before.append((table, max(start, 500)))
        table = table.with_changes((network, network.first) for network in networks[start : start + 1_000])
    assert table.changes == 9_500
    for number in (0, 1, 4_595, 4_596, 4_597, 9_999):
        address = Address(4, networks[number].first + 7)
        for older, size in [*before, (table, len(networks))]:
            assert len(older) == size
            assert list(older.match(address)) == ([(24, networks[number].first)] if number < size else [])
    assert sorted(table.items()) == [(network, network.first) for network in networks]
    for start in range(0, len(networks), 1_000):
        table = table.with_changes((network, None) for network in networks[start : start + 1_000])
        assert sorted(network for network, _ in table.items()) == networks[start + 1_000 :]
    assert (len(table), table.changes) == (0, 500)
    assert list(table.match(Address(4, 7))) == []
