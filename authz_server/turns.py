"""Long work on the event loop, cut into short steps between which checks are answered."""

import asyncio
import time
from collections.abc import Callable

STEP_SECONDS = 0.001
"""So long does a check wait for a step at most, and for the piece of work at the step's end."""
SHORT_STEP_SECONDS = 0.00015
"""The same where it is not soon over: changes may come as long as they like."""
_PAUSE_SECONDS = 0.001
"""A check takes some turns of the event loop. With one turn only between two steps it would wait for many of them."""


class Turns:
    """Ends a step when it has lasted long enough, whatever the machine is and the work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, step_seconds: float = STEP_SECONDS) -> None:
        """Begin a step; `clock` gives monotonic seconds."""
        self._clock = clock
        self._step_seconds = step_seconds
        self._until = clock() + step_seconds

    async def take(self) -> None:
        """Let others have their turn, if the step is over; to be called after each small piece of work."""
        if self._clock() >= self._until:
            await asyncio.sleep(_PAUSE_SECONDS)
            self._until = self._clock() + self._step_seconds
