"""A TLS server on the loopback that hands what it decrypts to another port: TLS for servers that have none."""

import asyncio
import ssl
from types import TracebackType
from typing import Self


class TlsProxy:
    """Speaks TLS with clients, and plainly with the port behind it."""

    def __init__(self, target_port: int, context: ssl.SSLContext) -> None:
        self.port = 0
        self._target_port = target_port
        self._context = context
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
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
        plain_reader, plain_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        pumps = [asyncio.create_task(_pump(reader, plain_writer)), asyncio.create_task(_pump(plain_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, plain_writer):
                end.close()
            self._tasks.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
