"""A hostile peer: what it costs in memory, and what a bystander on another connection notices.

`python -m loadtest.hostile [TRANSPORT...]`. The frames are written by hand, so that no client's good manners are in the
way. The reference of each ratio is the same server's memory before the attack.
"""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from statistics import quantiles
from typing import Self

import grpc
from hpack import Encoder

from loadtest.processes import CHECK, Server
from loadtest.served import OURS, build_requests

SECONDS = 5.0
"""How long an attack may take."""
DEADLINE_SECONDS = 0.2
_MOST_CONNECTIONS = 2_000
_MEBIBYTE = 1 << 20
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _CONTINUATION = 0, 1, 3, 4, 6, 9
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_TABLE_SIZE, _INITIAL_WINDOW = 1, 4
_CANCEL = (8).to_bytes(4, "big")


class Peer:
    """One HTTP/2 connection that answers SETTINGS and PING, follows flow control, and else does what it is told."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, keeps_table: bool, reads: bool
    ) -> None:
        self._reader, self._writer = reader, writer
        self._keeps_table, self._reads = keeps_table, reads
        self._encoder = Encoder()
        self._next_stream = 1
        self._windows = {0: 65535}
        self._initial_window = 65535
        self._changed = asyncio.Event()
        self._frames = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, port: int, *, keeps_table: bool = False, reads: bool = True) -> Self:
        """Connect and greet.

        Args:
            port: the server's.
            keeps_table: whether to go on using a dynamic table that the server does not want.
            reads: whether to read on after the greeting.
        """
        peer = cls(*await asyncio.open_connection("127.0.0.1", port), keeps_table=keeps_table, reads=reads)
        peer._writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, b""))
        await peer._changed.wait()
        return peer

    @property
    def gone(self) -> bool:
        """Whether the server has hung up."""
        return self._frames.done()

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                if kind == _SETTINGS and not flags & _ACK:
                    for at in range(0, len(payload), 6):
                        if int.from_bytes(payload[at : at + 2], "big") == _INITIAL_WINDOW:
                            self._initial_window = int.from_bytes(payload[at + 2 : at + 6], "big")
                        if int.from_bytes(payload[at : at + 2], "big") == _TABLE_SIZE and not self._keeps_table:
                            self._encoder.header_table_size = int.from_bytes(payload[at + 2 : at + 6], "big")
                    self._writer.write(_frame(_SETTINGS, _ACK, 0, b""))
                elif kind == _PING and not flags & _ACK:
                    self._writer.write(_frame(_PING, _ACK, 0, payload))
                elif kind == 8 and stream in self._windows:
                    self._windows[stream] += int.from_bytes(payload, "big")
                elif kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
                    self._windows.pop(stream, None)
                self._changed.set()
                if kind == _SETTINGS and not self._reads:
                    await asyncio.Event().wait()
        except (OSError, asyncio.IncompleteReadError):
            self._changed.set()

    async def open_stream(self, *, end: bool = False, extra: bytes = b"", end_headers: bool = True) -> int:
        """Send the head of a check."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        block = self._encoder.encode(
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", CHECK),
                (":authority", "authz"),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
            ]
        )
        self._windows[stream] = self._initial_window
        flags = (_END_STREAM if end else 0) | (_END_HEADERS if end_headers else 0)
        await self.write(_frame(_HEADERS, flags, stream, block + extra))
        return stream

    async def send(self, stream: int, data: bytes, *, end: bool = False) -> bool:
        """Send data as flow control allows; False when the server wants no more of it."""
        while data:
            room = min(self._windows.get(stream, 0), self._windows[0], 16384)
            if self.gone or stream not in self._windows:
                return False
            if room <= 0:
                self._changed.clear()
                await self._changed.wait()
                continue
            part, data = data[:room], data[room:]
            self._windows[stream] -= len(part)
            self._windows[0] -= len(part)
            await self.write(_frame(_DATA, _END_STREAM if end and not data else 0, stream, part))
        return True

    async def write(self, data: bytes) -> None:
        """Write raw frames."""
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        """Hang up."""
        self._frames.cancel()
        self._writer.transport.abort()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


async def _huge_message(port: int, peers: list[Peer], mebibytes: int = 400) -> None:
    peer = await Peer.connect(port)
    peers.append(peer)
    stream = await peer.open_stream()
    await peer.send(stream, b"\0" + (mebibytes * _MEBIBYTE).to_bytes(4, "big"))
    for _ in range(mebibytes):
        if not await peer.send(stream, bytes(_MEBIBYTE)):
            return


async def _many_large_messages(port: int, peers: list[Peer]) -> None:
    """32 connections with 32 unfinished messages of 16 MiB each: 16 GiB, if the server would take them."""

    async def one() -> None:
        peer = await Peer.connect(port)
        peers.append(peer)
        streams = [await peer.open_stream() for _ in range(32)]
        await asyncio.gather(*(fill(peer, stream) for stream in streams))

    async def fill(peer: Peer, stream: int) -> None:
        await peer.send(stream, b"\0" + (16 * _MEBIBYTE).to_bytes(4, "big"))
        for _ in range(15):
            if not await peer.send(stream, bytes(_MEBIBYTE)):
                return

    await asyncio.gather(*(one() for _ in range(32)))


async def _many_slow_streams(port: int, peers: list[Peer]) -> None:
    """10,000 streams on 20 connections that send one byte of their message and then nothing."""
    for _ in range(20):
        peer = await Peer.connect(port)
        peers.append(peer)
        for _ in range(500):
            if peer.gone:
                break
            await peer.send(await peer.open_stream(), b"\0")
    await asyncio.sleep(1)


async def _header_flood(port: int, peers: list[Peer]) -> None:
    """A head that never ends: CONTINUATION frames of 16 KiB."""
    for _ in range(8):
        peer = await Peer.connect(port)
        peers.append(peer)
        stream = await peer.open_stream(end_headers=False)
        field_of_16_kib = Encoder().encode([("x-flood", "a" * 8000)], huffman=False)
        for _ in range(4000):
            if peer.gone:
                break
            await peer.write(_frame(_CONTINUATION, 0, stream, field_of_16_kib))


def _check() -> bytes:
    message = build_requests(1)[0]
    return b"\0" + len(message).to_bytes(4, "big") + message


async def _resets(port: int, peers: list[Peer], *, keeps_table: bool = False) -> None:
    """Calls, complete, each reset at once; a new connection whenever the server hangs up."""
    body = _check()
    peer = await Peer.connect(port, keeps_table=keeps_table)
    peers.append(peer)
    for number in range(20_000):
        if peer.gone:
            peer = await Peer.connect(port, keeps_table=keeps_table)
            peers.append(peer)
        stream = await peer.open_stream()
        if await peer.send(stream, body, end=True):
            await peer.write(_frame(_RST_STREAM, 0, stream, _CANCEL))
        if number % 50 == 0:
            await asyncio.sleep(0)


async def _resets_by_table(port: int, peers: list[Peer]) -> None:
    """The same from a client that keeps its dynamic table, told not to."""
    await _resets(port, peers, keeps_table=True)


async def _answers_unread(port: int, peers: list[Peer]) -> None:
    """Calls and pings without an end on 8 connections whose answers nobody reads."""
    body = _check()

    async def one() -> None:
        peer = await Peer.connect(port, reads=False)
        peers.append(peer)
        while not peer.gone:
            stream = await peer.open_stream()
            await peer.write(_frame(_DATA, _END_STREAM, stream, body) + _frame(_PING, 0, 0, bytes(8)) * 10)

    await asyncio.gather(*(one() for _ in range(8)))


async def _silent_connections(port: int, peers: list[Peer]) -> None:
    """1,500 connections that greet and then say nothing."""
    for _ in range(1_500):
        peers.append(await Peer.connect(port))


ATTACKS: dict[str, Callable[[int, list[Peer]], Awaitable[None]]] = {
    "one message of 400 MiB": _huge_message,
    "1,024 messages of 16 MiB, unfinished": _many_large_messages,
    "10,000 streams, stalled": _many_slow_streams,
    "heads without an end": _header_flood,
    "20,000 resets": _resets,
    "20,000 resets, dynamic table kept": _resets_by_table,
    "answers and pongs never read": _answers_unread,
    "1,500 silent connections": _silent_connections,
}


async def _attack(port: int, name: str) -> tuple[int, int]:
    """Attack, and return how many connections there were and how many of them the server ended."""
    peers: list[Peer] = []
    try:
        async with asyncio.timeout(SECONDS):
            # A peer that is hung up on in the middle of a write comes again.
            while True:
                with contextlib.suppress(OSError):
                    await ATTACKS[name](port, peers)
                await asyncio.sleep(0.05)
                if len(peers) > _MOST_CONNECTIONS or not peers[-1].gone:
                    break
            await asyncio.sleep(SECONDS)
    except TimeoutError:
        pass
    hung_up = sum(peer.gone for peer in peers)
    for peer in peers:
        await peer.close()
    return len(peers), hung_up


async def _watch(server: Server, attacking: "Future[tuple[int, int]]") -> str:
    """Check as an honest client on a connection of its own does, one call at a time, until the attack is over."""
    failed, seconds = 0, []
    message = build_requests(1)[0]
    loop = asyncio.get_running_loop()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary(CHECK)
        await call(message, wait_for_ready=True)
        while not attacking.done():
            started = loop.time()
            try:
                await call(message, timeout=DEADLINE_SECONDS)
            except grpc.aio.AioRpcError:
                failed += 1
            seconds.append(loop.time() - started)
            await asyncio.sleep(0.002)
    return f"{failed} of {len(seconds)} | {quantiles(seconds, n=100)[98] * 1000:.1f}"


def attack(server: Server, name: str) -> str:
    """Attack from a process of its own, and describe the outcome as a row of a table."""
    before = server.resident_mib()
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        attacking = executor.submit(_run_attack, server.port, name)
        bystander = asyncio.run(_watch(server, attacking))
        connections, hung_up = attacking.result()
    peak = server.resident_mib("VmHWM")
    alive = "" if server.alive() else ", and it died"
    return f"{before:.0f} -> {peak:.0f} MiB ({peak / before:.1f}x){alive} | {bystander} | {hung_up} of {connections}"


def _run_attack(port: int, name: str) -> tuple[int, int]:
    return asyncio.run(_attack(port, name))


def main() -> None:
    """Print a table."""
    print(
        "| server | attack | memory, at most | bystander's calls failed | its p99, ms "
        "| connections ended by the server |\n|---|---|---|---|---|---|"
    )
    for transport in sys.argv[1:] or OURS:
        for name in ATTACKS:
            with Server(transport) as server:
                print(f"| {transport} | {name} | {attack(server, name)} |", flush=True)


if __name__ == "__main__":
    main()
