"""Text to addresses and networks. IPv4-mapped IPv6 is unmapped here, at the door, and nowhere else.

Everything behind this module compares integers, so a client that spells its address differently is still the
same client. Nothing is ever repaired: text that is not exactly one address is refused.
"""

from collections.abc import Iterable
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final, Literal, NamedTuple

MAX_PREFIX_LENGTH: Final = {4: 32, 6: 128}
_OCTETS: Final = tuple(str(octet) for octet in range(256))


class InvalidAddressError(ValueError):
    """The text is not exactly one IPv4 or IPv6 address."""


class InvalidNetworkError(ValueError):
    """The text is not one CIDR, or would mean something else than it seems to say."""


class Address(NamedTuple):
    """One IPv4 or IPv6 address; never an IPv4-mapped IPv6 one."""

    version: Literal[4, 6]
    value: int
    """The address as an unsigned integer of 32 or 128 bits."""

    def __str__(self) -> str:
        return address_text(*self)


class Network(NamedTuple):
    """All addresses that share the first `prefix_length` bits of `first`; no bit after them is set."""

    version: Literal[4, 6]
    first: int
    """The lowest address of the network as an unsigned integer."""
    prefix_length: int
    """0 to 32 for IPv4, 0 to 128 for IPv6."""

    def holds(self, address: Address) -> bool:
        """Tell whether the address is one of this network."""
        shift = MAX_PREFIX_LENGTH[self.version] - self.prefix_length
        return address.version == self.version and (address.value ^ self.first) >> shift == 0

    def __str__(self) -> str:
        return f"{address_text(self.version, self.first)}/{self.prefix_length}"


def parse_address(text: str) -> Address:
    """Read exactly one IPv4 or IPv6 address.

    Ports, zones (`%eth0`), brackets, white space, leading zeros, short IPv4 forms and lists are refused
    (RFC 6943, section 3.1.1: the loose spellings of IPv4 are how address checks get fooled).

    Raises:
        InvalidAddressError: naming the text.
    """
    try:
        if ":" not in text:
            # In half the time that the constructor takes, which is a function in Python.
            octets = inet_pton(AF_INET, text)
            return tuple.__new__(Address, (4, octets[0] << 24 | octets[1] << 16 | octets[2] << 8 | octets[3]))
        value = int.from_bytes(inet_pton(AF_INET6, text), "big")
    except (OSError, ValueError):  # ValueError: a NUL or a non-ASCII character
        raise InvalidAddressError(f"{text!r} is not one IPv4 or IPv6 address") from None
    if value >> 32 == 0xFFFF:
        return Address(4, value & 0xFFFFFFFF)
    return Address(6, value)


def parse_network(text: str) -> Network:
    """Read one CIDR; a bare address is a network of that one address.

    Host bits are refused, not cleared: `10.1.2.3/8` may be a typing error for /32. IPv4-mapped IPv6 is read as
    IPv4, except `::ffff:0:0/96`, which would silently become every IPv4 address.

    Raises:
        InvalidNetworkError: naming the text and how to mend it.
    """
    written, slash, length_text = text.partition("/")
    try:
        address = parse_address(written)
    except InvalidAddressError:
        raise InvalidNetworkError(
            f"{text!r} is not a CIDR: write an address, or network/prefix length such as 203.0.113.0/24"
        ) from None
    mapped = ":" in written and address.version == 4
    bits = MAX_PREFIX_LENGTH[address.version]
    if not slash:
        return Network(address.version, address.value, bits)
    written_bits = 128 if mapped else bits
    if not (length_text.isascii() and length_text.isdigit() and str(int(length_text[:4])) == length_text):
        raise InvalidNetworkError(f"{text!r}: the prefix length must be a number from 0 to {written_bits}")
    length = int(length_text)
    if length > written_bits:
        raise InvalidNetworkError(f"{text!r}: the prefix length must be at most {written_bits}")
    if mapped:
        if length <= 96:
            raise InvalidNetworkError(
                f"{text!r} covers every IPv4 address in IPv6 clothes: write 0.0.0.0/0 if that is meant"
            )
        length -= 96
    first = address.value >> (bits - length) << (bits - length)
    if first != address.value:
        mended = Network(address.version, first, length)
        raise InvalidNetworkError(
            f"{text!r} has bits set after the prefix: write {mended} for the network or {address} for the address"
        )
    return Network(address.version, first, length)


def address_text(version: int, value: int) -> str:
    """Return what `str` of an address returns, to whoever cannot afford to have its class looked up."""
    if version == 4:
        first, second, third, fourth = value >> 24, value >> 16 & 255, value >> 8 & 255, value & 255
        return f"{_OCTETS[first]}.{_OCTETS[second]}.{_OCTETS[third]}.{_OCTETS[fourth]}"
    return inet_ntop(AF_INET6, value.to_bytes(16, "big"))


def any_contains(networks: Iterable[Network], address: Address) -> bool:
    """Tell whether one of a few networks holds the address (for many, build a NetworkTable)."""
    return any(network.holds(address) for network in networks)
