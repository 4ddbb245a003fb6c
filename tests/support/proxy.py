"""A TCP proxy on the loopback that loses replies, as a failing network does."""

import asyncio
from types import TracebackType
from typing import Self


class LossyProxy:
    """Forwards to a port; a request with the marker reaches it, and its reply is lost together with the connection."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.marker = b""
        """What makes a request lose its reply; empty: nothing does."""
        self.lose = 0
        """How many more replies get lost."""
        self.lost = 0
        self._target_port = target_port
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
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        try:
            losing = asyncio.Event()
            pumps = [
                asyncio.create_task(self._requests(reader, upstream_writer, losing)),
                asyncio.create_task(self._replies(upstream_reader, writer, losing)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            for end in (writer, upstream_writer):
                end.close()
            self._tasks.discard(task)

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        while data := await reader.read(65536):
            if self.lose and self.marker and self.marker in data:
                self.lose -= 1
                losing.set()
            writer.write(data)
            await writer.drain()

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        while data := await reader.read(65536):
            if losing.is_set():
                self.lost += 1
                return
            writer.write(data)
            await writer.drain()
