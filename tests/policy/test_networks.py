"""The match table is a linear scan, only faster, and never changes."""

from hypothesis import given
from hypothesis import strategies as st

from authz_server.policy.addresses import Address, Network, parse_address, parse_network
from authz_server.policy.networks import NetworkTable


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Draw networks from a few corners, so that they nest and collide."""
    version = draw(st.sampled_from((4, 6)))
    bits = 32 if version == 4 else 128
    value = draw(st.sampled_from((0, 1 << (bits - 1), (1 << bits) - 1))) ^ draw(st.integers(0, 15))
    value ^= draw(st.integers(0, 15)) << (bits - 8)
    length = draw(st.sampled_from((0, 1, 4, 8, bits - 4, bits - 1, bits)))
    return Network(version, value >> (bits - length) << (bits - length), length)


ITEMS = st.lists(st.tuples(networks(), st.integers(0, 9)), max_size=25)
CHANGES = st.lists(st.tuples(networks(), st.none() | st.integers(0, 9)), max_size=10)


def boundaries(network: Network) -> list[Address]:
    bits = 32 if network.version == 4 else 128
    last = network.first | ((1 << (bits - network.prefix_length)) - 1)
    values = (network.first - 1, network.first, last, last + 1)
    return [Address(network.version, value) for value in values if 0 <= value < 1 << bits]


def content(table: NetworkTable[int], probes: list[Network]) -> list[object]:
    return [
        len(table),
        sorted(table.values()),
        *(table.get(network) for network in probes),
        *(list(table.match(address)) for network in probes for address in boundaries(network)),
    ]


@given(ITEMS, st.lists(networks(), max_size=5))
def test_matching_is_a_linear_scan_longest_first(items: list[tuple[Network, int]], more: list[Network]) -> None:
    table, scanned = NetworkTable[int].build(items), dict(items)
    assert len(table) == len(scanned)
    for network in [*scanned, *more]:
        assert table.get(network) == scanned.get(network)
        for address in boundaries(network):
            found = [(other.prefix_length, value) for other, value in scanned.items() if address in other]
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
    changed = NetworkTable[int].build(items).with_changes(changes)
    assert content(changed, probes) == content(NetworkTable[int].build(result.items()), probes)


@given(ITEMS, CHANGES)
def test_a_table_in_use_never_changes(
    items: list[tuple[Network, int]], changes: list[tuple[Network, int | None]]
) -> None:
    probes = [network for network, _ in (*items, *changes)]
    table = NetworkTable[int].build(items)
    before = content(table, probes)
    table.with_changes(changes)
    assert content(table, probes) == before


def test_a_value_that_counts_as_false_is_found() -> None:
    table = NetworkTable[int].build([(parse_network("0.0.0.0/0"), 0)])
    assert list(table.match(parse_address("255.255.255.255"))) == [(0, 0)]
    assert list(table.match(parse_address("::"))) == []


def test_a_large_layer_grows_and_shrinks_like_a_small_one() -> None:
    """Large layers are kept in another way; both ways, and the passage between them, must look the same."""
    networks = [Network(4, number << 8, 24) for number in range(10_000)]
    table = NetworkTable[int]()
    before: list[tuple[NetworkTable[int], int]] = []
    for start in range(0, len(networks), 1_000):
        before.append((table, start))
        table = table.with_changes((network, network.first) for network in networks[start : start + 1_000])
    for number in (0, 1, 4_095, 4_096, 4_097, 9_999):
        address = Address(4, networks[number].first + 7)
        for older, size in [*before, (table, len(networks))]:
            assert len(older) == size
            assert list(older.match(address)) == ([(24, networks[number].first)] if number < size else [])
    assert sorted(table.values()) == [network.first for network in networks]
    for start in range(0, len(networks), 1_000):
        table = table.with_changes((network, None) for network in networks[start : start + 1_000])
        assert sorted(table.values()) == [network.first for network in networks[start + 1_000 :]]
    assert len(table) == 0
    assert list(table.match(Address(4, 7))) == []
