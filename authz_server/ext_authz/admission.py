"""What is taken on, and in which order: checks that wait, and bytes of messages that are not complete.

No I/O and no clock of its own. A check that would be answered too late costs as much as one in time and helps nobody,
so a bounded number waits; more are shed (UNAVAILABLE) before anything is done for them.
"""

from collections import deque
from collections.abc import Callable

MAX_WAITING = 1024
"""So many checks wait at most, however fast this machine is."""
MIN_WAITING = 32
"""So many may always wait: the measured price of a check is rough."""
MAX_UNFINISHED_BYTES = 64 << 20
"""All unfinished messages together, by the lengths that they declare, and 64 KiB for each stream (its metadata)."""
_SMOOTHING = 0.1
_FIRST_GUESS_SECONDS = 0.0001

Call = tuple[int, bytes]
"""A call's id and its message."""


class Backlog:
    """Checks that wait for their decision.

    Oldest first, as long as the oldest of them has waited for less than half of `max_wait_seconds`. Then newest first:
    under a load that does not end, those are the ones that can still be answered in time. What has waited for
    `max_wait_seconds` is shed.
    """

    def __init__(self, max_wait_seconds: float) -> None:
        self._max_wait_seconds = max_wait_seconds
        self._batches: deque[tuple[float, list[Call]]] = deque()
        self._seconds_each = _FIRST_GUESS_SECONDS
        self._limit = MAX_WAITING
        self.waiting = 0
        self.full = False
        """Whether as many wait as can be decided in half of `max_wait_seconds`."""
        self.waited = 0.0
        """Seconds that the calls taken last had waited."""
        self.shed = 0
        """Calls that were answered UNAVAILABLE for lack of time or memory, so far."""

    def add(self, now: float, calls: list[Call]) -> None:
        """Let calls wait."""
        self._batches.append((now, calls))
        self.waiting += len(calls)
        self.full = self.waiting >= self._limit

    def take(self, now: float, at_most: int) -> tuple[list[Call], list[Call]]:
        """Take calls to decide, and those that have waited for too long."""
        batches = self._batches
        late: list[Call] = []
        while batches and now - batches[0][0] > self._max_wait_seconds:
            late += batches.popleft()[1]
        calls: list[Call] = []
        if batches:
            newest_first = now - batches[0][0] > self._max_wait_seconds / 2
            arrived, calls = batches.pop() if newest_first else batches.popleft()
            self.waited = now - arrived
            if len(calls) > at_most:
                rest = (arrived, calls[at_most:])
                calls = calls[:at_most]
                if newest_first:
                    batches.append(rest)
                else:
                    batches.appendleft(rest)
        self.waiting -= len(calls) + len(late)
        self.shed += len(late)
        self.full = self.waiting >= self._limit
        return calls, late

    def note_pace(self, calls: int, seconds: float) -> None:
        """Learn how long so many decisions took, by the clock on the wall, with all that was done in between."""
        self._seconds_each += _SMOOTHING * (seconds / calls - self._seconds_each)
        limit = int(self._max_wait_seconds / 2 / max(self._seconds_each, 1e-9))
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
