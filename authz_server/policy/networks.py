"""The match table: longest-prefix match over many networks.

One layer per prefix length that occurs, longest first: a look-up costs one dict probe per distinct length, whatever
the number of networks. Tables are never changed. A large layer is kept in shards, of which `with_changes` copies only
those that it touches, so one entry more or less costs microseconds in a list of a million, and a snapshot in use stays
as it is.
"""

from collections.abc import Iterable, Iterator
from typing import Generic, Self, TypeVar

from authz_server.policy.addresses import MAX_PREFIX_LENGTH, Address, Network

T = TypeVar("T")

_SHARDS = 1021
"""Shards of a large layer: at a million networks, about a thousand in each. A prime, because networks come in patterns
(such as IPv6 prefixes that end in zeros) that would leave most shards empty if the two shared a factor."""
_LARGE = 4096
"""A layer with more networks is cut into shards, and with fewer than a quarter of it made whole again."""

_Shards = tuple[dict[int, T], ...]
"""A network's first bits -> value, in the shard of that number modulo the number of shards (1 or _SHARDS)."""
_Layer = tuple[int, int, _Shards[T]]
"""(prefix length, bits to shift away, shards)"""


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
        for prefix_length, shift, shards in self._layers[address.version]:
            prefix = value >> shift
            found = shards[prefix % len(shards)].get(prefix)
            if found is not None:
                yield prefix_length, found

    def get(self, network: Network) -> T | None:
        """Return the value of exactly this network, or None."""
        for prefix_length, shift, shards in self._layers[network.version]:
            if prefix_length == network.prefix_length:
                prefix = network.first >> shift
                return shards[prefix % len(shards)].get(prefix)
        return None

    def values(self) -> Iterator[T]:
        """Yield all values, in no particular order."""
        for layers in self._layers.values():
            for _, _, shards in layers:
                for shard in shards:
                    yield from shard.values()

    def with_changes(self, changes: Iterable[tuple[Network, T | None]]) -> Self:
        """Return a table with these networks set, or removed where the value is None; this one stays as it is."""
        edited: dict[tuple[int, int], _EditedLayer[T]] = {}
        for network, value in changes:
            place = (network.version, network.prefix_length)
            layer = edited.get(place)
            if layer is None:
                layer = edited[place] = _EditedLayer(self._shards(*place))
            layer.put(network.first >> MAX_PREFIX_LENGTH[network.version] - network.prefix_length, value)
        table = type(self)()
        table._size = self._size + sum(layer.grown for layer in edited.values())
        table._layers = dict(self._layers)
        for version in {version for version, _ in edited}:
            by_length = {length: shards for length, _, shards in self._layers[version]}
            by_length |= {length: layer.shards() for (of, length), layer in edited.items() if of == version}
            bits = MAX_PREFIX_LENGTH[version]
            table._layers[version] = tuple(
                (length, bits - length, by_length[length])
                for length in sorted(by_length, reverse=True)
                if any(by_length[length])
            )
        return table

    def _shards(self, version: int, prefix_length: int) -> _Shards[T]:
        for length, _, shards in self._layers[version]:
            if length == prefix_length:
                return shards
        return ({},)


class _EditedLayer(Generic[T]):
    """A layer on its way to the next table; shards that were not touched are shared with the last one."""

    def __init__(self, shards: _Shards[T]) -> None:
        self.grown = 0
        """Networks added less networks removed."""
        self._shards = list(shards)
        self._own = [False] * len(shards)

    def put(self, prefix: int, value: T | None) -> None:
        """Set the value of a prefix, or remove it."""
        number = prefix % len(self._shards)
        if not self._own[number]:
            self._own[number] = True
            self._shards[number] = self._shards[number].copy()
        shard = self._shards[number]
        before = len(shard)
        if value is None:
            shard.pop(prefix, None)
        else:
            shard[prefix] = value
        self.grown += len(shard) - before
        if len(self._shards) == 1 and len(shard) > _LARGE:
            self._cut(_SHARDS)

    def shards(self) -> _Shards[T]:
        """Return the layer as it is now; it must not be edited any more."""
        if len(self._shards) > 1 and sum(map(len, self._shards)) < _LARGE // 4:
            self._cut(1)
        return tuple(self._shards)

    def _cut(self, count: int) -> None:
        cut: list[dict[int, T]] = [{} for _ in range(count)]
        for shard in self._shards:
            for prefix, value in shard.items():
                cut[prefix % count][prefix] = value
        self._shards, self._own = cut, [True] * count
