"""TCP proxies on the loopback that do to requests and replies what a failing network does."""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import NamedTuple, Protocol, Self


class Passed(NamedTuple):
    """What becomes of a piece of a connection."""

    data: bytes
    """What is passed on of it."""
    hang_up: bool = False
    """Whether that is the end of the connection, both ways."""


class Fault(Protocol):
    """What happens to one connection; it may take its time."""

    async def request(self, data: bytes) -> Passed: ...

    async def reply(self, data: bytes) -> Passed: ...


class Proxy:
    """Forwards to a port; each connection gets a fault of its own."""

    def __init__(self, target_port: int, fault: Callable[[], Fault]) -> None:
        self.port = 0
        self._target_port = target_port
        self._fault = fault
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        fault = self._fault()
        ends = [writer]
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            ends.append(upstream_writer)
            pumps = [
                asyncio.create_task(_pump(reader, upstream_writer, fault.request)),
                asyncio.create_task(_pump(upstream_reader, writer, fault.reply)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (ConnectionError, asyncio.CancelledError):
            pass  # nobody is there, as if the connection had been refused; or the proxy ends
        finally:
            for end in ends:
                end.close()
            self._tasks.discard(task)


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, judge: Callable[[bytes], Awaitable[Passed]]
) -> None:
    while data := await reader.read(65536):
        passed = await judge(data)
        writer.write(passed.data)
        await writer.drain()
        if passed.hang_up:
            return


class LossyProxy(Proxy):
    """A request with the marker reaches the port, and its reply is lost together with the connection."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port, lambda: _Losing(self))
        self.marker = b""
        """What makes a request lose its reply; empty: nothing does."""
        self.lose = 0
        """How many more replies get lost."""
        self.lost = 0


class _Losing:
    def __init__(self, proxy: LossyProxy) -> None:
        self._proxy = proxy
        self._losing = False

    async def request(self, data: bytes) -> Passed:
        if self._proxy.lose and self._proxy.marker and self._proxy.marker in data:
            self._proxy.lose -= 1
            self._losing = True
        return Passed(data)

    async def reply(self, data: bytes) -> Passed:
        if not self._losing:
            return Passed(data)
        self._proxy.lost += 1
        return Passed(b"", hang_up=True)
