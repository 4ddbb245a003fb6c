"""Tasks of the event loop that have to end."""

import asyncio
from typing import Any

_CANCEL_AGAIN_SECONDS = 0.1


async def cancel(task: "asyncio.Task[Any]") -> None:
    """Cancel a task, and return when it has ended, in whatever way."""
    # More than once: asyncio.wait_for of Python 3.11, which redis-py sends by, can swallow a cancellation (gh-86296).
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_CANCEL_AGAIN_SECONDS)
