"""What happens to single connections, and to clocks."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from support.proxy import Passed, Proxy

_LONGEST_LIFE = 60
"""Of a connection, in pieces of it."""


class CuttingProxy(Proxy):
    """Cuts connections in the midst of a reply or of a request, while `cutting`."""

    def __init__(self, target_port: int, rng: random.Random) -> None:
        super().__init__(target_port, lambda: _Cutting(self, rng))
        self.cutting = False
        self.cut_requests = 0
        self.cut_replies = 0


class _Cutting:
    def __init__(self, proxy: CuttingProxy, rng: random.Random) -> None:
        self._proxy = proxy
        self._rng = rng
        self._left = rng.randrange(1, _LONGEST_LIFE)
        """So many pieces pass."""

    def _cut(self, data: bytes) -> Passed | None:
        self._left -= 1
        if self._left > 0 or not self._proxy.cutting:
            return None
        return Passed(data[: self._rng.randrange(len(data))], hang_up=True)

    async def request(self, data: bytes) -> Passed:
        if cut := self._cut(data):
            self._proxy.cut_requests += 1
            return cut
        return Passed(data)

    async def reply(self, data: bytes) -> Passed:
        if cut := self._cut(data):
            self._proxy.cut_replies += 1
            return cut
        return Passed(data)


class SlowProxy(Proxy):
    """Holds every reply up."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port, lambda: _Slow(self))
        self.seconds = 0.0


class _Slow:
    def __init__(self, proxy: SlowProxy) -> None:
        self._proxy = proxy

    async def request(self, data: bytes) -> Passed:
        return Passed(data)

    async def reply(self, data: bytes) -> Passed:
        await asyncio.sleep(self._proxy.seconds)
        return Passed(data)


class GateProxy(Proxy):
    """Asks before it passes a request on; what comes back is passed."""

    def __init__(self, target_port: int, ask: Callable[[bytes], Awaitable[Passed]]) -> None:
        super().__init__(target_port, lambda: _Gate(ask))


class _Gate:
    def __init__(self, ask: Callable[[bytes], Awaitable[Passed]]) -> None:
        self._ask = ask

    async def request(self, data: bytes) -> Passed:
        return await self._ask(data)

    async def reply(self, data: bytes) -> Passed:
        return Passed(data)
