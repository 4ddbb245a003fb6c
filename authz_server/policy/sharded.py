"""A large immutable mapping of which a changed copy costs microseconds.

A mapping with many keys is kept in shards, of which a changed copy copies only those that it touches, so one key more
or less among a million is cheap, and a mapping in use stays as it is. No dict grows so large that growing it, or
letting go of it, would hold anything up.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Generic, Self, TypeVar

K = TypeVar("K")
V = TypeVar("V")

_SHARDS = 1021
"""Shards of a large mapping: at a million keys, about a thousand in each. A prime, because numbers that are keys come
in patterns (such as IPv6 prefixes that end in zeros) that would leave most shards empty if the two shared a factor."""
_LARGE = 4096
"""A mapping with more keys is cut into shards, and with fewer than a quarter of it made whole again."""


class Sharded(Mapping[K, V]):
    """An immutable mapping; build a changed one with `draft` or `with_changes`."""

    __slots__ = ("_size", "get", "shards")

    get: Callable[[K], V | None]  # type: ignore[assignment]
    """Returns the value of a key, or None: of a mapping in one shard, that dict's own method, since checks are made of
    such look-ups."""

    def __init__(self, items: Iterable[tuple[K, V]] = ()) -> None:
        self._take(({},), 0)
        draft = ShardedDraft(self)
        for key, value in items:
            draft.put(key, value)
        made = draft.done()
        self._take(made.shards, len(made))

    @classmethod
    def _of(cls, shards: tuple[dict[K, V], ...], size: int) -> Self:
        mapping = cls.__new__(cls)
        mapping._take(shards, size)
        return mapping

    def _take(self, shards: tuple[dict[K, V], ...], size: int) -> None:
        self.shards = shards
        """Each key is in the one that its hash modulo their number says; for look-ups that cannot afford a call."""
        self._size = size
        # Not a bound method, which would tie the mapping to itself, to be freed by the collector only.
        self.get = shards[0].get if len(shards) == 1 else partial(_find, shards)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[K]:
        for shard in self.shards:
            yield from shard

    def __contains__(self, key: object) -> bool:
        return key in self.shards[hash(key) % len(self.shards)]

    def __getitem__(self, key: K) -> V:
        return self.shards[hash(key) % len(self.shards)][key]

    def draft(self) -> "ShardedDraft[K, V]":
        """Return a copy to be changed; this mapping stays as it is."""
        return ShardedDraft(self)


def _find(shards: tuple[dict[K, V], ...], key: K) -> V | None:
    return shards[hash(key) % len(shards)].get(key)


class ShardedDraft(Generic[K, V]):
    """A mapping in the making; shards that are not touched are shared with the one that it came from."""

    def __init__(self, before: Sharded[K, V]) -> None:
        self._shards = list(before.shards)
        self._size = len(before)
        self._own: set[int] = set()
        """The numbers of the shards that are not shared."""

    def get(self, key: K) -> V | None:
        """Return the value of a key as it is now, or None."""
        return self._shards[hash(key) % len(self._shards)].get(key)

    def put(self, key: K, value: V | None) -> None:
        """Set the value of a key, or remove the key where the value is None."""
        number = hash(key) % len(self._shards)
        if number not in self._own:
            self._own.add(number)
            self._shards[number] = self._shards[number].copy()
        shard = self._shards[number]
        self._size -= len(shard)
        if value is None:
            shard.pop(key, None)
        else:
            shard[key] = value
        self._size += len(shard)
        if len(self._shards) == 1 and len(shard) > _LARGE:
            self._cut(_SHARDS)

    def done(self) -> Sharded[K, V]:
        """Return the mapping as it is now; the draft must not be used any more."""
        if len(self._shards) > 1 and self._size < _LARGE // 4:
            self._cut(1)
        return Sharded._of(tuple(self._shards), self._size)

    def _cut(self, count: int) -> None:
        cut: list[dict[K, V]] = [{} for _ in range(count)]
        for shard in self._shards:
            for key, value in shard.items():
                cut[hash(key) % count][key] = value
        self._shards, self._own = cut, set(range(count))
