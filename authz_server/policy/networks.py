"""The match table: longest-prefix match over many networks.

One dict per prefix length that occurs, longest first: a look-up costs one dict probe per distinct length,
whatever the number of networks. Tables are never changed: `with_changes` copies the dicts that it touches, so a
snapshot in use stays as it is.
"""

from collections.abc import Iterable, Iterator
from typing import Generic, Self, TypeVar

from authz_server.policy.addresses import MAX_PREFIX_LENGTH, Address, Network

T = TypeVar("T")

_Layer = tuple[int, int, dict[int, T]]
"""(prefix length, bits to shift away, network's first bits -> value)"""


class NetworkTable(Generic[T]):
    """An immutable mapping of networks to values that is searched by address."""

    __slots__ = ("_layers", "_size")

    def __init__(self) -> None:
        self._layers: dict[int, tuple[_Layer[T], ...]] = {4: (), 6: ()}
        self._size = 0

    @classmethod
    def build(cls, items: Iterable[tuple[Network, T]]) -> Self:
        """Build a table; of two values for one network, the later one stays."""
        return cls().with_changes(items)

    def __len__(self) -> int:
        return self._size

    def match(self, address: Address) -> Iterator[tuple[int, T]]:
        """Yield (prefix length, value) of every network that holds the address, longest prefix first."""
        value = address.value
        for prefix_length, shift, by_prefix in self._layers[address.version]:
            found = by_prefix.get(value >> shift)
            if found is not None:
                yield prefix_length, found

    def get(self, network: Network) -> T | None:
        """Return the value of exactly this network, or None."""
        for prefix_length, shift, by_prefix in self._layers[network.version]:
            if prefix_length == network.prefix_length:
                return by_prefix.get(network.first >> shift)
        return None

    def values(self) -> Iterator[T]:
        """Yield all values, in no particular order."""
        for layers in self._layers.values():
            for _, _, by_prefix in layers:
                yield from by_prefix.values()

    def with_changes(self, changes: Iterable[tuple[Network, T | None]]) -> Self:
        """Return a table with these networks set, or removed where the value is None; this one stays as it is."""
        layers: dict[int, dict[int, dict[int, T]]] = {
            version: {length: by_prefix for length, _, by_prefix in version_layers}
            for version, version_layers in self._layers.items()
        }
        copied: set[tuple[int, int]] = set()
        for network, value in changes:
            touched = (network.version, network.prefix_length)
            by_length = layers[network.version]
            if touched not in copied:
                copied.add(touched)
                by_length[network.prefix_length] = dict(by_length.get(network.prefix_length, {}))
            prefix = network.first >> MAX_PREFIX_LENGTH[network.version] - network.prefix_length
            if value is None:
                by_length[network.prefix_length].pop(prefix, None)
            else:
                by_length[network.prefix_length][prefix] = value
        table = type(self)()
        table._layers = {version: _longest_first(version, by_length) for version, by_length in layers.items()}
        table._size = sum(len(layer[2]) for version_layers in table._layers.values() for layer in version_layers)
        return table


def _longest_first(version: int, by_length: dict[int, dict[int, T]]) -> tuple[_Layer[T], ...]:
    bits = MAX_PREFIX_LENGTH[version]
    lengths = sorted((length for length, by_prefix in by_length.items() if by_prefix), reverse=True)
    return tuple((length, bits - length, by_length[length]) for length in lengths)
