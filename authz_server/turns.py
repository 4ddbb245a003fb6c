"""Long work on the event loop, cut into short steps between which checks are answered."""

import asyncio
import time
from collections.abc import Callable

STEP_SECONDS = 0.001
"""So long does a check wait for a step at most, and for the piece of work at the step's end."""
_PAUSE_SECONDS = 0.001
_SHORT_STEP_SECONDS = 0.00015
"""One or two events: shorter ones would cost more in turns than in work."""
_OF_PAUSE = 0.25
"""So much of the pause before it may a short step last. Where a single check comes now and then, pauses are short and
each piece of work is a step, for which it hardly waits. Where many come, a pause is full of them, and to wait longer
for fewer steps is less in all."""
_SHORT_PAUSE_SECONDS = 1e-9
"""The shortest that a timer knows. In the event loop's next turn a check that has come is read, and after that the
timer ends; in the turn that follows the check is decided, and after that whoever paused goes on. `sleep(0)` would take
three turns for the same."""


class Turns:
    """Ends a step when it has lasted long enough, whatever the machine is and the work."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        step_seconds: float = STEP_SECONDS,
        pause_seconds: float = _PAUSE_SECONDS,
        of_pause: float | None = None,
    ) -> None:
        """Begin a step.

        Args:
            clock: monotonic seconds.
            step_seconds: how long a step lasts.
            pause_seconds: how long others have their turn between two steps, or longer if they take it.
            of_pause: a step lasts no longer than this times the pause before it, and the first one is over at once;
                None: a pause says nothing about the next step.
        """
        self._clock = clock
        self._step_seconds = step_seconds
        self._pause_seconds = pause_seconds
        self._of_pause = of_pause
        self._until = clock() + self._after_pause(0.0)

    async def take(self) -> None:
        """Let others have their turn, if the step is over; to be called after each small piece of work."""
        paused_at = self._clock()
        if paused_at < self._until:
            return
        await asyncio.sleep(self._pause_seconds)
        now = self._clock()
        self._until = now + self._after_pause(now - paused_at)

    def _after_pause(self, seconds: float) -> float:
        """Return how long a step may last after such a pause."""
        return self._step_seconds if self._of_pause is None else min(self._step_seconds, self._of_pause * seconds)


def short_turns(clock: Callable[[], float] = time.monotonic, *, behind: bool = False) -> Turns:
    """Begin short steps, with a pause of just what a check needs: for what goes on while changes are made, and must
    keep up with them. Behind them, steps are as long as short steps may be."""
    return Turns(
        clock,
        step_seconds=_SHORT_STEP_SECONDS,
        pause_seconds=_SHORT_PAUSE_SECONDS,
        of_pause=None if behind else _OF_PAUSE,
    )
