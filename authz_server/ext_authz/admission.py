"""What is taken on, and in which order: checks that wait, and bytes of messages that are not complete.

No I/O and no clock of its own. A check that would be answered too late costs as much as one in time and helps nobody,
so a bounded number waits; more are shed (UNAVAILABLE) before anything is done for them.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

MAX_WAITING = 1024
"""So many checks wait at most, however fast this machine is."""
MIN_WAITING = 32
"""So many may always wait: the measured price of a check is rough."""
MAX_UNFINISHED_BYTES = 64 << 20
"""All unfinished messages together, by the lengths that they declare, and 64 KiB for each stream (its metadata)."""
_REMEMBERED = 0.9
"""How much of what was learned of the pace counts beside the next slice."""
_MAX_SHUT_TIMES = 32
"""More than a socket holds of calls that were sent long ago (8 MiB, 256 KiB at a time)."""
_FIRST_GUESS_SECONDS = 0.0001
_FIRST_GUESS_CALLS = 32

C = TypeVar("C")
"""A call, whatever it is made of."""


class Backlog(Generic[C]):
    """Checks that wait for their decision.

    As many as can be decided in half of `max_wait_seconds`, and when that was too little a short while ago, half as
    many: a burst is worth a long queue, but in one that stays full a call is nearly late when it is decided, after all
    that was done to receive it. Oldest first, as long as the oldest of them has waited for less than half of
    `max_wait_seconds`. Then newest first: under a load that does not end, those are the ones that can still be answered
    in time. What has waited for `max_wait_seconds` is shed.
    """

    def __init__(self, max_wait_seconds: float) -> None:
        self._max_wait_seconds = max_wait_seconds
        self._batches: deque[tuple[float, list[C]]] = deque()
        self._calls, self._seconds = float(_FIRST_GUESS_CALLS), _FIRST_GUESS_CALLS * _FIRST_GUESS_SECONDS
        self._limit = MAX_WAITING
        self.waiting = 0
        self.room = MAX_WAITING
        """So many more can be decided in half of `max_wait_seconds`, in need in a quarter; the others are to be shed
        before they wait."""
        self._full_at = -math.inf
        """When there was no room last."""
        self._shut_times = 0
        """How often it was shut since calls were let in last."""
        self.shed = 0
        """Calls that were answered UNAVAILABLE for lack of time or memory, so far."""

    @property
    def seconds_each(self) -> float:
        """How long one takes, by the clock on the wall."""
        return self._seconds / self._calls

    def add(self, now: float, calls: list[C]) -> None:
        """Let calls wait that came together, `now`."""
        self._batches.append((now, calls))
        self.waiting += len(calls)
        self._shut_times = 0
        self.open(now)
        if not self.room:
            self._full_at = now

    def shut(self, now: float) -> bool:
        """Have no room until `open` is called, if there was none a short while ago; tells whether it is so.

        For calls of which it is known that newer ones were sent already. Not for ever: if nothing else ever came, no
        call would be answered any more.
        """
        self.open(now)
        if not self._is_in_need(now) or self._shut_times >= _MAX_SHUT_TIMES:
            return False
        self._shut_times += 1
        self._full_at = now
        self.room = 0
        return True

    def open(self, now: float) -> None:
        """Have room again, if there is any `now`."""
        limit = max(MIN_WAITING, self._limit // 2) if self._is_in_need(now) else self._limit
        self.room = max(0, limit - self.waiting)

    def _is_in_need(self, now: float) -> bool:
        """Tell whether there was no room a short while ago: not longer than a check may wait."""
        return now - self._full_at <= self._max_wait_seconds

    def take(self, now: float, at_most: int) -> tuple[list[tuple[float, list[C]]], list[C]]:
        """Take calls to decide, each group with the time at which it came, and those that have waited for too long."""
        batches, longest = self._batches, self._max_wait_seconds
        late: list[C] = []
        while batches and now - batches[0][0] > longest:
            late += batches.popleft()[1]
        newest_first = bool(batches) and now - batches[0][0] > longest / 2
        groups: list[tuple[float, list[C]]] = []
        left = at_most
        while batches and left:
            arrived, calls = batches.pop() if newest_first else batches.popleft()
            if len(calls) > left:
                (batches.append if newest_first else batches.appendleft)((arrived, calls[left:]))
                calls = calls[:left]
            groups.append((arrived, calls))
            left -= len(calls)
        self.waiting -= at_most - left + len(late)
        self.shed += len(late)
        self.open(now)
        return groups, late

    def note_pace(self, calls: int, seconds: float) -> None:
        """Learn how long so many took, one after the other, with all that was done in between."""
        # Sums, not an average of averages: a process that is stopped now and then decides much, then nothing.
        self._calls = self._calls * _REMEMBERED + calls
        self._seconds = self._seconds * _REMEMBERED + seconds
        limit = int(self._max_wait_seconds / 2 / max(self.seconds_each, 1e-9))
        self._limit = max(MIN_WAITING, min(MAX_WAITING, limit))


class Memory:
    """Bytes of unfinished messages: a bound over all connections, and who has to go when it is reached."""

    def __init__(self, evict: Callable[[], bool], max_bytes: int = MAX_UNFINISHED_BYTES) -> None:
        """Make an account.

        Args:
            evict: ends the connection that has kept an unfinished message for the longest; False: none is that old.
            max_bytes: the bound.
        """
        self._evict = evict
        self._max_bytes = max_bytes
        self.reserved = 0

    def reserve(self, size: int) -> bool:
        """Take so many bytes; False: there are none to be had."""
        while self.reserved + size > self._max_bytes:
            if not self._evict():
                return False
        self.reserved += size
        return True

    def release(self, size: int) -> None:
        """Give them back."""
        self.reserved -= size
