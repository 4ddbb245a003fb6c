"""Long work on the event loop, cut into short steps between which checks are answered."""

import asyncio
import time
from collections.abc import Callable

STEP_SECONDS = 0.001
"""So long does a check wait for a step at most, and for the piece of work at the step's end."""
_PAUSE_SECONDS = 0.001
_SHORT_STEP_SECONDS = 0.0004
_SHORT_PAUSE_TURNS = 3
"""A check is read in one turn of the event loop and decided in the next: with one turn only between two steps it would
wait for both."""


class Turns:
    """Ends a step when it has lasted long enough, whatever the machine is and the work.

    Steps are of a millisecond and have as long a pause: for what will be over. Those that are `short` have less than
    half of that and a pause of just what a check needs: for what goes on while changes are made, and must keep up.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, step_seconds: float = STEP_SECONDS, short: bool = False
    ) -> None:
        """Begin a step; `clock` gives monotonic seconds."""
        self._clock = clock
        self._step_seconds = _SHORT_STEP_SECONDS if short else step_seconds
        self._short = short
        self._until = clock() + self._step_seconds

    async def take(self) -> None:
        """Let others have their turn, if the step is over; to be called after each small piece of work."""
        if self._clock() < self._until:
            return
        if self._short:
            for _ in range(_SHORT_PAUSE_TURNS):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(_PAUSE_SECONDS)
        self._until = self._clock() + self._step_seconds
