"""More than can be answered in time, on a real socket: which checks are decided then, and which are shed."""

import asyncio
import socket
import time

import pytest
from support.waiting import eventually

from authz_server.ext_authz import asyncio_transport
from authz_server.ext_authz.asyncio_transport import AsyncioTransport
from authz_server.ext_authz.check_response import ResponseOptions
from authz_server.ext_authz.checker import Checker, Checks
from authz_server.ext_authz.http2 import (
    ACK,
    CHECK_PATH,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    SETTINGS,
    WINDOW_UPDATE,
    block,
    frame,
)
from authz_server.health import HealthState
from authz_server.policy.snapshot import DecisionOptions, build_snapshot

pytestmark = pytest.mark.integration

SECONDS_EACH, MAX_WAIT_SECONDS = 0.004, 1.0
"""So 125 may wait, and more before the server has learned how slow it is."""
SNAPSHOT = build_snapshot([], epoch="e", revision=1, options=DecisionOptions())
HEAD = block((":method", "POST"), (":scheme", "http"), (":path", CHECK_PATH), (":authority", "authz"))
WINDOW = frame(WINDOW_UPDATE, 0, 0, (1 << 24).to_bytes(4, "big"))
GREETING = PREFACE + frame(SETTINGS, 0, 0, b"") + frame(SETTINGS, ACK, 0, b"") + WINDOW


def calls(first: int, count: int) -> bytes:
    """Checks whose message is no check request, of 200 bytes each."""
    message = b"\0" + (200).to_bytes(4, "big") + bytes(200)
    streams = range(2 * first + 1, 2 * (first + count), 2)
    return b"".join(
        frame(HEADERS, END_HEADERS, stream, HEAD) + frame(DATA, END_STREAM, stream, message) for stream in streams
    )


def told(received: bytes) -> tuple[list[int], list[int]]:
    """The numbers of the calls that were answered, and of those that were shed, which get no data."""
    answered, shed, at = [], [], 0
    while at + 9 <= len(received):
        kind, flags = received[at + 3], received[at + 4]
        number = int.from_bytes(received[at + 5 : at + 9], "big") // 2
        if kind == DATA:
            answered.append(number)
        elif kind == HEADERS and flags & END_STREAM and number not in answered[-1:]:
            shed.append(number)
        at += 9 + int.from_bytes(received[at : at + 3], "big")
    return answered, shed


async def test_the_newest_of_what_a_socket_holds_are_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio_transport, "READ_BYTES", 16384)

    def be_slow(checks: Checks) -> None:
        time.sleep(len(checks) * SECONDS_EACH)

    checker = Checker(lambda: SNAPSHOT, ResponseOptions(), max_request_bytes=1024, observe=be_slow)
    transport = AsyncioTransport(
        checker, listen="127.0.0.1:0", tls=None, health=HealthState(), max_wait_seconds=MAX_WAIT_SECONDS
    )
    port = await transport.start()
    loop = asyncio.get_running_loop()
    received = b""
    try:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            client.setblocking(False)

            async def answers(count: int) -> tuple[list[int], list[int]]:
                nonlocal received
                while sum(map(len, told(received))) < count:
                    received += await loop.sock_recv(client, 1 << 20)
                return told(received)

            await loop.sock_connect(client, ("127.0.0.1", port))
            client.send(GREETING + calls(0, 64))
            answered, shed = await answers(64)
            assert (len(answered), shed) == (64, [])

            many = calls(64, 1500)
            assert client.send(many) == len(many)
            answered, shed = await answers(1564)
        assert len(shed) == transport.shed
        # Some were taken on before it was known that there were so many more; then none until the last that came.
        assert len(answered) < 600
        assert answered[-1] >= 1564 - 2 * 16384 // len(calls(64, 1))
        await eventually(lambda: transport.in_flight == 0)
    finally:
        await transport.drain(1)
