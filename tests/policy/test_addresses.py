"""Text to addresses and networks, compared with `ipaddress`."""

import ipaddress

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from authz_server.policy.addresses import (
    Address,
    InvalidAddressError,
    InvalidNetworkError,
    Network,
    any_contains,
    parse_address,
    parse_network,
)

V4 = st.integers(0, 2**32 - 1)
V6 = st.one_of(
    st.integers(0, 2**128 - 1),
    st.integers(0, 2**128 - 1).map(lambda value: value & ~(0xFFFF << 48)),  # with zero groups to shorten
    st.integers(0, 2**33),  # compatible, mapped and their neighbours
    st.integers(0xFFFE << 32, (0x10000 << 32) + 1),
)
NETWORKS = st.one_of(st.tuples(st.just(4), V4, st.integers(0, 32)), st.tuples(st.just(6), V6, st.integers(0, 128))).map(
    lambda made: _network(*made)
)


def _network(version: int, value: int, length: int) -> Network:
    bits = 32 if version == 4 else 128
    return Network(version, value >> (bits - length) << (bits - length), length)


def _of(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Address:
    mapped = getattr(address, "ipv4_mapped", None) or address
    return Address(mapped.version, int(mapped))


@given(V4)
def test_ipv4_is_read_as_ipaddress_reads_it(value: int) -> None:
    address = ipaddress.IPv4Address(value)
    assert parse_address(str(address)) == _of(address)
    assert str(parse_address(str(address))) == str(address)


@given(V6, st.data())
def test_every_spelling_of_ipv6_is_one_address(value: int, data: st.DataObject) -> None:
    address = ipaddress.IPv6Address(value)
    groups = [f"{value >> shift & 0xFFFF:x}" for shift in range(112, -1, -16)]
    groups = [group.zfill(data.draw(st.integers(len(group), 4))) for group in groups]
    groups = [group.upper() if data.draw(st.booleans()) else group for group in groups]
    last = str(ipaddress.IPv4Address(value & 0xFFFFFFFF))
    spellings = [str(address), address.exploded, ":".join(groups), ":".join([*groups[:6], last])]
    zeros = [i for i in range(8) if not int(groups[i], 16)]
    if zeros:
        start = end = data.draw(st.sampled_from(zeros))
        while end in zeros and data.draw(st.booleans() if end > start else st.just(True)):
            end += 1
        spellings.append(":".join(groups[:start]) + "::" + ":".join(groups[end:]))
    for spelling in spellings:
        assert parse_address(spelling) == _of(ipaddress.ip_address(spelling)) == _of(address)


@given(V6)
def test_an_address_survives_being_written(value: int) -> None:
    address = parse_address(str(ipaddress.IPv6Address(value)))
    assert parse_address(str(address)) == address


@given(st.text(st.sampled_from("0123456789abcdefABCDEF:.%[]/ xg"), max_size=45) | st.text(st.characters()))
def test_text_is_an_address_exactly_when_ipaddress_says_so(text: str) -> None:
    try:
        expected = None if "%" in text else _of(ipaddress.ip_address(text))
    except ValueError:
        expected = None
    if expected:
        assert parse_address(text) == expected
    else:
        with pytest.raises(InvalidAddressError, match="is not one IPv4 or IPv6 address") as caught:
            parse_address(text)
        assert repr(text) in str(caught.value)


BAD_ADDRESSES = {
    "empty": "",
    "spaces": " 10.0.0.1",
    "newline": "10.0.0.1\n",
    "nul": "10.0.0.1\0",
    "two": "10.0.0.1,10.0.0.2",
    "port": "10.0.0.1:80",
    "brackets": "[::1]",
    "zone": "fe80::1%eth0",
    "cidr": "10.0.0.0/8",
    "octal": "010.0.0.1",
    "hexadecimal": "0x0a.0.0.1",
    "one-number": "167772161",
    "three-parts": "10.0.1",
    "out-of-range": "10.0.0.256",
    "two-gaps": "1::2::3",
    "five-digits": "::00001",
    "nine-groups": "1:2:3:4:5:6:7:8:9",
    "mapped-out-of-range": "::ffff:10.0.0.256",
    "arabic-digits": "\u0661\u0660.0.0.1",
    "surrogate": "\udcff",
}


@pytest.mark.parametrize("text", BAD_ADDRESSES.values(), ids=BAD_ADDRESSES)
def test_what_is_not_exactly_one_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidAddressError, match="is not one IPv4 or IPv6 address"):
        parse_address(text)


MAPPED = ["::ffff:10.1.2.3", "::FFFF:0a01:203", "0:0:0:0:0:ffff:10.1.2.3", "0000::ffff:a01:0203"]


@pytest.mark.parametrize("text", MAPPED)
def test_mapped_ipv6_is_ipv4(text: str) -> None:
    assert parse_address(text) == Address(4, 0x0A010203)
    assert str(parse_address(text)) == "10.1.2.3"


@pytest.mark.parametrize("text", ["::10.1.2.3", "64:ff9b::10.1.2.3", "::fffe:10.1.2.3", "::ffff:0:10.1.2.3"])
def test_other_ipv6_forms_that_carry_ipv4_stay_ipv6(text: str) -> None:
    assert parse_address(text).version == 6


@given(NETWORKS)
def test_a_network_survives_being_written(network: Network) -> None:
    assume(network.version == 4 or network.first >> 32 != 0xFFFF)  # those are IPv4
    assert parse_network(str(network)) == network


@given(NETWORKS, st.integers(0, 127))
def test_host_bits_are_refused_with_both_ways_to_mend(network: Network, bit: int) -> None:
    bits = 32 if network.version == 4 else 128
    host_bits = bits - network.prefix_length
    assume(host_bits)
    assume(network.version == 4 or network.first >> 48)  # the corner where IPv4 wears IPv6 clothes has its own rows
    address = Address(network.version, network.first | 1 << bit % host_bits)
    with pytest.raises(InvalidNetworkError) as caught:
        parse_network(f"{address}/{network.prefix_length}")
    assert str(caught.value) == (
        f"'{address}/{network.prefix_length}' has bits set after the prefix: "
        f"write {network} for the network or {address} for the address"
    )
    assert parse_network(str(address)).prefix_length == bits


@given(NETWORKS, V4, V6)
def test_containment_is_that_of_ipaddress(network: Network, v4: int, v6: int) -> None:
    theirs = ipaddress.ip_network(f"{_plain(network)}/{network.prefix_length}")
    first, last = int(theirs.network_address), int(theirs.broadcast_address)
    kind = type(theirs.network_address)
    for value in (first - 1, first, last, last + 1):
        if 0 <= value < 1 << theirs.max_prefixlen:
            assert network.holds(Address(network.version, value)) == (kind(value) in theirs)
    assert network.holds(Address(4, v4)) == (ipaddress.IPv4Address(v4) in theirs)
    assert network.holds(Address(6, v6)) == (ipaddress.IPv6Address(v6) in theirs)


def _plain(network: Network) -> str:
    kind = ipaddress.IPv4Address if network.version == 4 else ipaddress.IPv6Address
    return str(kind(network.first))


GOOD_NETWORKS = [
    ("10.0.0.0/8", "10.0.0.0/8"),
    ("10.1.2.3", "10.1.2.3/32"),
    ("0.0.0.0/0", "0.0.0.0/0"),
    ("2001:DB8::/32", "2001:db8::/32"),
    ("2001:db8::1", "2001:db8::1/128"),
    ("::/0", "::/0"),
    ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
    ("::ffff:10.1.2.3", "10.1.2.3/32"),
    ("::ffff:10.1.2.3/128", "10.1.2.3/32"),
    ("::ffff:128.0.0.0/97", "128.0.0.0/1"),
]


@pytest.mark.parametrize(("text", "canonical"), GOOD_NETWORKS)
def test_networks_have_one_canonical_text(text: str, canonical: str) -> None:
    assert str(parse_network(text)) == canonical


BAD_NETWORKS = {
    "": "is not a CIDR",
    "10.0.0/8": "is not a CIDR",
    "10.0.0.0-10.0.0.9": "is not a CIDR",
    "/8": "is not a CIDR",
    "10.0.0.0/": "must be a number from 0 to 32",
    "10.0.0.0/08": "must be a number from 0 to 32",
    "10.0.0.0/+8": "must be a number from 0 to 32",
    "10.0.0.0/ 8": "must be a number from 0 to 32",
    "10.0.0.0/8/8": "must be a number from 0 to 32",
    "10.0.0.0/255.0.0.0": "must be a number from 0 to 32",
    "10.0.0.0/\u0668": "must be a number from 0 to 32",
    "10.0.0.0/\u00b2": "must be a number from 0 to 32",
    "10.0.0.0/00000000000000000000": "must be a number from 0 to 32",
    "10.0.0.0/33": "must be at most 32",
    "10.0.0.0/99999999999999999999": "must be a number from 0 to 32",
    "2001:db8::/129": "must be at most 128",
    "2001:db8::/x": "must be a number from 0 to 128",
    "10.1.2.3/8": "write 10.0.0.0/8 for the network or 10.1.2.3 for the address",
    "2001:db8::1/64": "write 2001:db8::/64 for the network or 2001:db8::1 for the address",
    "::ffff:10.1.2.3/104": "write 10.0.0.0/8 for the network or 10.1.2.3 for the address",
    "::ffff:0:0/96": "write 0.0.0.0/0 if that is meant",
    "::ffff:10.0.0.0/8": "write 0.0.0.0/0 if that is meant",
    "::ffff:0.0.0.0/0": "write 0.0.0.0/0 if that is meant",
    "::ffff:10.0.0.0/129": "must be at most 128",
}


@pytest.mark.parametrize(("text", "advice"), BAD_NETWORKS.items())
def test_a_refused_network_names_the_text_and_the_way_to_mend_it(text: str, advice: str) -> None:
    with pytest.raises(InvalidNetworkError) as caught:
        parse_network(text)
    assert advice in str(caught.value)
    assert repr(text) in str(caught.value)


def test_any_contains() -> None:
    networks = [parse_network("10.0.0.0/8"), parse_network("2001:db8::/32")]
    assert any_contains(networks, parse_address("10.255.255.255"))
    assert any_contains(networks, parse_address("2001:db8:ffff::"))
    assert not any_contains(networks, parse_address("11.0.0.0"))
    assert not any_contains([], parse_address("10.0.0.1"))
