"""What stands between a client and the fast HTTP/2 server behind it: one pass over the heads of the frames.

That server says GOAWAY when many streams are reset, which would end the checks of everybody behind one Envoy, and it
bounds neither messages nor their sum. So it gets from here whole, small, well-behaved streams only:

- A stream that the client resets is ended in the ordinary way; its answer goes to a client that ignores it.
- A message that is longer than the checker takes is replaced by a marker, which is denied; its bytes are dropped.
- What cannot be taken on is answered UNAVAILABLE here, at a small part of the price of a check.
- Header blocks are made stateless: the client is told to use no dynamic table (RFC 7541, section 4.2), so that each can
  be dropped or replaced. Until it has acknowledged that, its blocks are decoded here and written anew.

No I/O: bytes in, bytes out. Section numbers are those of RFC 9113 unless another document is named.
"""

import secrets
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hpack import Decoder, Encoder, HPACKError, NeverIndexedHeaderTuple

from authz_server.ext_authz.admission import Backlog, Memory

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, FRAME_SIZE_ERROR, ENHANCE_YOUR_CALM = 0x0, 0x1, 0x6, 0xB
_HEADER_TABLE_SIZE, _MAX_CONCURRENT_STREAMS = 1, 3

HEAD_BYTES = 9
MAX_FRAME_BYTES = 16384
"""SETTINGS_MAX_FRAME_SIZE as it is unless stated otherwise (section 6.5.2), and the server behind states no other."""
MAX_BLOCK_BYTES = 1024
"""A longer header block is replaced by that of a plain Check. Only tracers write such: what Envoy copies from an
outside client's `tracestate` may be megabytes long, must not end in an RPC error, and means nothing to a check."""
MAX_DECODED_BYTES = 16384
"""Longer blocks are not decoded but taken for a Check's, also before the client gave up its dynamic table."""
_MAX_HEAD_BYTES = 16 << 20
"""A head with all its CONTINUATION frames; Envoy's own limit is 8 MiB (`max_request_headers_kb`)."""
_MAX_EARLY_HEADS = 1024
"""Header blocks before the client acknowledged our settings. Envoy does that at once, having sent what was waiting."""
STREAMS = 32
"""Stated to clients as SETTINGS_MAX_CONCURRENT_STREAMS, so that what is too much waits on their side, where it costs
nothing here. Envoy opens another connection when it needs more. Not enforced: what was sent before the client heard of
it is answered."""
MAX_UNANSWERED = 1024
"""Calls of one connection that the server behind has and whose answers did not come yet; more are answered here. More
than STREAMS, for the calls that a client resets go on being answered, and it may open others in their place."""
MAX_OTHER_CALLS = 64
"""Calls of other methods (health, reflection) at a time on one connection; those are never shed for load."""
MAX_UNFINISHED = 256
"""Streams of one connection that the client has opened and not ended. Envoy ends each in the write that opens it."""
OTHER_CALL_BYTES = 64 * 1024
"""All that a client may send in one of those."""
OPEN_STREAM_BYTES = 64 * 1024
"""What an unfinished stream is taken to cost, beside its message, because of its metadata."""

CHECK_PATH = "/envoy.service.auth.v3.Authorization/Check"

_frame_head = struct.Struct(">HBBBI").unpack_from
_frame_and_message_heads = struct.Struct(">HBBBIBI").unpack_from


class ClientError(Exception):
    """The client broke a rule of HTTP/2 or one of ours: its connection ends, and only that."""

    def __init__(self, code: int, problem: str) -> None:
        super().__init__(problem)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Write one frame."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _block(*fields: tuple[str, str | bytes]) -> bytes:
    """Write a header block that leaves no trace in a dynamic table: "never indexed" (RFC 7541, section 6.2.3)."""
    return Encoder().encode([NeverIndexedHeaderTuple(name, value) for name, value in fields])


def call_block(path: str | bytes) -> bytes:
    """Write the header block of a plain call of the method, such as the server behind takes it."""
    return _block(
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "authz"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    )


_CHECK_BLOCK = call_block(CHECK_PATH)
_CHECK_PLAIN = CHECK_PATH.encode()
_CHECK_HUFFMAN = _block((":path", CHECK_PATH))[2:]
"""As the two ways to write a string have it (RFC 7541, section 5.2), without the field's and the length's bytes."""

_SHED_BLOCK = _block(
    (":status", "200"),
    ("content-type", "application/grpc"),
    ("grpc-status", "14"),
    ("grpc-message", "overloaded"),
)
"""UNAVAILABLE, in a response that is nothing but trailers (gRPC over HTTP/2)."""
_SHED_HEAD = frame(HEADERS, END_STREAM | END_HEADERS, 0, _SHED_BLOCK)[:5]


@dataclass(frozen=True, slots=True)
class Markers:
    """Messages that stand for something; nobody outside knows them, and protobuf cannot read them."""

    too_large: bytes = field(default_factory=lambda: b"\xff" + secrets.token_bytes(16))
    """In place of a message that is longer than the checker takes."""
    unavailable: bytes = field(default_factory=lambda: b"\xff" + secrets.token_bytes(16))
    """In place of one that there is no memory for, or that its client broke off."""


@dataclass(slots=True)
class _Open:
    """A stream that the server behind has, and that the client has not ended."""

    since: float
    is_check: bool
    wanted: int = OPEN_STREAM_BYTES
    """What it has to have reserved, if it is still open when all that came with it is read."""
    reserved: int = 0
    prefix: bytes = b""
    """The first bytes of the message, while they are too few to tell its length."""
    left: int = -1
    """So many bytes of the message are to come; -1 while that is not known. Of another method, so many may come."""


class Connection:
    """One client's connection: frames from either side, and what becomes of them."""

    def __init__(
        self,
        backlog: Backlog,
        memory: Memory,
        markers: Markers,
        *,
        max_message_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the state of a new connection.

        Args:
            backlog: tells whether more checks can be taken on; shared by all connections.
            memory: what unfinished messages may take; shared by all connections.
            markers: what stands for messages that are not passed on.
            max_message_bytes: longer messages of checks are replaced by a marker.
            clock: returns seconds, for the age of unfinished streams.
        """
        self._backlog = backlog
        self._memory = memory
        self._markers = markers
        self._max_message_bytes = max_message_bytes
        self._clock = clock
        self.to_server: list[bytes] = []
        """What the server behind is to get; taken by whoever sends it."""
        self.to_client: list[bytes] = []
        """What the client is to get; whole frames only."""
        self._from_client = b""
        self._from_server = b""
        self._greeted = False
        self._settled = False
        """Whether the server's settings have passed."""
        self._stateless = False
        """Whether the client has acknowledged that it may not use a dynamic table."""
        self._decoder = Decoder(max_header_list_size=4 * MAX_DECODED_BYTES)
        self._early_heads = 0
        self._collecting: tuple[int, int] | None = None
        """Stream and flags of a head that goes on in CONTINUATION frames."""
        self._collecting_since = 0.0
        self._block = bytearray()
        self._block_bytes = 0
        self._last_stream = 0
        self._last_passed = 0
        self._open: dict[int, _Open] = {}
        self._unreserved: list[int] = []
        """Streams that may have less memory reserved than they want."""
        self._others: set[int] = set()
        """Unanswered calls of other methods than Check."""
        self._cut: set[int] = set()
        """Streams that were ended towards the server, but that the client may still believe open."""
        self._over: set[int] = set()
        """Streams that the server answered before the client ended them, and that it will reset now."""
        self._credit = 0
        """Bytes of DATA that were dropped, to be given back to the client's window (section 6.9.1)."""
        self.unanswered = 0
        self.answered = 0
        """Calls whose answers have passed so far."""

    @property
    def greeted(self) -> bool:
        """Whether the client's preface has come."""
        return self._greeted

    @property
    def unfinished_since(self) -> float | None:
        """Since when the oldest unfinished message or head is on its way; None: there is none."""
        if self._collecting is not None:
            return self._collecting_since
        for opened in self._open.values():
            if opened.is_check:
                return opened.since
        return None

    @property
    def unfinished_bytes(self) -> int:
        """What unfinished messages have reserved."""
        return sum(opened.reserved for opened in self._open.values())

    @property
    def unanswered_checks(self) -> int:
        """Checks that the server behind has and whose answers have not passed yet."""
        return self.unanswered - len(self._others)

    @property
    def last_stream(self) -> int:
        """The last stream that the client opened, for GOAWAY."""
        return self._last_stream

    def close(self) -> None:
        """Give back what was reserved."""
        for opened in self._open.values():
            self._memory.release(opened.reserved)
        self._open.clear()

    # ---- From the client ------------------------------------------------------------------------------------------

    def from_client(self, data: bytes) -> None:  # noqa: PLR0912, PLR0915 - a call for each frame would cost as much as it
        """Take what the client sent.

        Raises:
            ClientError: the connection has to end.
        """
        buffer = self._from_client + data if self._from_client else data
        size = len(buffer)
        at = passed = 0
        if not self._greeted:
            if buffer[: len(PREFACE)] != PREFACE[:size]:
                raise ClientError(PROTOCOL_ERROR, "this is not HTTP/2")
            if size < len(PREFACE):
                self._from_client = buffer
                return
            self._greeted = True
            at = len(PREFACE)
        to_server = self.to_server
        while size - at >= HEAD_BYTES:
            high, low, kind, flags, stream = _frame_head(buffer, at)
            length = high << 8 | low
            if length > MAX_FRAME_BYTES:
                raise ClientError(FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            stop = at + HEAD_BYTES + length
            if stop > size:
                break
            # Nearly always: a head, and a whole message behind it that ends the stream.
            if (
                kind == HEADERS
                and flags & (END_HEADERS | PADDED | END_STREAM) == END_HEADERS
                and size - stop >= HEAD_BYTES + 5
                and length <= MAX_BLOCK_BYTES
                and stream > self._last_stream
                and stream & 1
                and self._stateless
                and self._collecting is None
            ):
                high, low, next_kind, next_flags, next_stream, compressed, declared = _frame_and_message_heads(
                    buffer, stop
                )
                length = high << 8 | low
                end = stop + HEAD_BYTES + length
                if (
                    next_kind == DATA
                    and next_flags == END_STREAM
                    and next_stream == stream
                    and not compressed
                    and length == declared + 5
                    and length <= MAX_FRAME_BYTES
                    and end <= size
                    and (buffer.find(_CHECK_HUFFMAN, at, stop) > 0 or buffer.find(_CHECK_PLAIN, at, stop) > 0)
                ):
                    self._last_stream = stream
                    if self._backlog.full or self.unanswered >= MAX_UNANSWERED:
                        if passed < at:
                            to_server.append(buffer[passed:at])
                        passed = end
                        self._credit += length
                        self._shed(stream, ended=True)
                    else:
                        self._last_passed = stream
                        self.unanswered += 1
                    at = end
                    continue
            if self._collecting is not None and (kind != CONTINUATION or stream != self._collecting[0]):
                raise ClientError(PROTOCOL_ERROR, "a header block was interrupted")
            if kind in (SETTINGS, PING):
                if kind == SETTINGS and flags & ACK:
                    self._stateless = True
                at = stop
                continue
            if passed < at:
                to_server.append(buffer[passed:at])
            instead = self._other_frame(kind, flags, stream, buffer[at + HEAD_BYTES : stop])
            if instead:
                to_server.append(instead)
            at = passed = stop
        if passed < at:
            to_server.append(buffer[passed:at] if passed or at < size else buffer)
        self._from_client = buffer[at:]
        if self._unreserved:
            self._reserve()
        if self._credit > 0:
            self.to_client.append(frame(WINDOW_UPDATE, 0, 0, self._credit.to_bytes(4, "big")))
            self._credit = 0

    def _reserve(self) -> None:
        """Reserve memory for what is unfinished; end streams that there is none for."""
        for stream in self._unreserved:
            opened = self._open.get(stream)
            if opened is None or opened.reserved == opened.wanted:
                continue
            if self._memory.reserve(opened.wanted - opened.reserved):
                opened.reserved = opened.wanted
            else:
                self._backlog.shed += 1
                instead = self._markers.unavailable if opened.left < 0 else None
                self.to_server.append(self._cut_off(stream, instead, ended=False))
        self._unreserved.clear()

    def _other_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        """Handle a frame, and return what the server behind gets in its place."""
        if kind == DATA:
            return self._data(flags, stream, payload)
        if kind == HEADERS:
            return self._headers(flags, stream, payload)
        if kind == CONTINUATION:
            return self._continuation(flags, payload)
        if kind == RST_STREAM:
            return self._reset(stream, payload)
        if kind == WINDOW_UPDATE:
            return frame(kind, flags, stream, payload) if stream <= self._last_passed else b""
        if kind == PUSH_PROMISE:
            raise ClientError(PROTOCOL_ERROR, "a client cannot push")
        return b""  # PRIORITY and GOAWAY, and kinds that do not exist yet (section 4.1), are nothing to the server

    def _headers(self, flags: int, stream: int, payload: bytes) -> bytes:
        payload = _without_padding(flags, payload)
        if flags & PRIORITY_FLAG:
            payload = payload[5:]
        if stream & 1 == 0 or stream >> 31:
            raise ClientError(PROTOCOL_ERROR, f"a call on stream {stream}")
        if not flags & END_HEADERS:
            self._collecting, self._collecting_since = (stream, flags), self._clock()
            self._block_bytes = len(payload)
            self._block += payload
            return b""
        return self._begin(stream, flags, payload)

    def _continuation(self, flags: int, payload: bytes) -> bytes:
        if self._collecting is None:
            raise ClientError(PROTOCOL_ERROR, "a header block is continued that did not begin")
        self._block_bytes += max(len(payload), 64)
        if self._block_bytes > _MAX_HEAD_BYTES:
            raise ClientError(ENHANCE_YOUR_CALM, "a header block without an end")
        if len(self._block) <= MAX_DECODED_BYTES:  # what is longer is not read, so it is not kept
            self._block += payload
        if not flags & END_HEADERS:
            return b""
        (stream, first_flags), block = self._collecting, bytes(self._block)
        self._collecting = None
        self._block.clear()
        return self._begin(stream, first_flags, block)

    def _begin(self, stream: int, flags: int, block: bytes) -> bytes:
        """Open a stream, or end it when this is its second head (trailers)."""
        path = _CHECK_PLAIN
        if not self._stateless:
            self._early_heads += 1
            if self._early_heads > _MAX_EARLY_HEADS:
                raise ClientError(ENHANCE_YOUR_CALM, "our settings were not acknowledged")
            path = self._decode_path(block)
            block = _CHECK_BLOCK if path == _CHECK_PLAIN else call_block(path)
        elif len(block) > MAX_BLOCK_BYTES:
            block = _CHECK_BLOCK
        elif _CHECK_HUFFMAN not in block and _CHECK_PLAIN not in block:
            path = b""
        if stream in self._open:
            return self._end(stream, b"")
        if stream <= self._last_stream:
            return b""  # the trailers of a stream that is answered already
        self._last_stream = stream
        is_check = path == _CHECK_PLAIN
        ended = bool(flags & END_STREAM)
        busy = self._backlog.full if is_check else len(self._others) >= MAX_OTHER_CALLS
        if busy or self.unanswered >= MAX_UNANSWERED or len(self._open) >= MAX_UNFINISHED:
            self._shed(stream, ended=ended)
            return b""
        self._last_passed = stream
        self.unanswered += 1
        if not is_check:
            self._others.add(stream)
        if not ended:
            self._open[stream] = _Open(self._clock(), is_check, left=-1 if is_check else OTHER_CALL_BYTES)
            self._unreserved.append(stream)
        return frame(HEADERS, END_HEADERS | (flags & END_STREAM), stream, block)

    def _decode_path(self, block: bytes) -> bytes:
        """Read the method's path; a block that is too long or that cannot be read is taken for a Check's."""
        if len(block) > MAX_DECODED_BYTES:
            return _CHECK_PLAIN
        try:
            fields = self._decoder.decode(block, raw=True)
        except (HPACKError, UnicodeDecodeError):
            return _CHECK_PLAIN
        for name, value in fields:
            if name == b":path":
                return bytes(value)
        return _CHECK_PLAIN

    def _shed(self, stream: int, *, ended: bool) -> None:
        self._backlog.shed += 1
        self.to_client.append(_SHED_HEAD + stream.to_bytes(4, "big") + _SHED_BLOCK)
        if not ended:
            self.to_client.append(frame(RST_STREAM, 0, stream, NO_ERROR.to_bytes(4, "big")))

    def _data(self, flags: int, stream: int, payload: bytes) -> bytes:
        opened = self._open.get(stream)
        if opened is None:  # answered already, or never taken on
            self._credit += len(payload)
            return b""
        length = len(payload)
        payload = _without_padding(flags, payload)
        self._credit += length - len(payload)
        ended = bool(flags & END_STREAM)
        if not opened.is_check:
            opened.left -= length
            if opened.left < 0:
                self._credit += len(payload)
                return self._cut_off(stream, None, ended=ended)
            return _data_frames(stream, payload, 0) if not ended else self._end(stream, payload)
        if opened.left < 0:
            payload = opened.prefix + payload
            if len(payload) < 5:
                opened.prefix = payload
                return self._end(stream, payload) if ended else b""
            declared = int.from_bytes(payload[1:5], "big")
            opened.left = declared + 5
            if declared > self._max_message_bytes:
                self._credit += len(payload)
                return self._cut_off(stream, self._markers.too_large, ended=ended)
            opened.wanted += declared
            self._unreserved.append(stream)
        opened.left -= len(payload)
        if opened.left < 0:  # a check is one message
            self._credit += len(payload)
            return self._cut_off(stream, None, ended=ended)
        if ended:
            return self._end(stream, payload)
        return _data_frames(stream, payload, 0)

    def _end(self, stream: int, payload: bytes) -> bytes:
        """End a stream towards the server, with the last of its data."""
        self._memory.release(self._open.pop(stream).reserved)
        return _data_frames(stream, payload, END_STREAM)

    def _cut_off(self, stream: int, message: bytes | None, *, ended: bool) -> bytes:
        """End a stream towards the server with a message of ours; what the client still sends of it is dropped."""
        if not ended:
            self._cut.add(stream)
        instead = b"" if message is None else b"\0" + len(message).to_bytes(4, "big") + message
        # The server gives these back to the client's window, who did not send them.
        self._credit -= len(instead)
        return self._end(stream, instead)

    def _reset(self, stream: int, payload: bytes) -> bytes:
        self._cut.discard(stream)
        if stream in self._others:
            self._others.discard(stream)
            if stream in self._open:
                self._memory.release(self._open.pop(stream).reserved)
            self.unanswered -= 1
            return frame(RST_STREAM, 0, stream, payload)
        opened = self._open.get(stream)
        if opened is None:
            return b""  # complete: it is answered, and the client ignores that
        return self._cut_off(stream, self._markers.unavailable if opened.left < 0 else None, ended=True)

    # ---- From the server behind -------------------------------------------------------------------------------------

    def from_server(self, data: bytes) -> None:
        """Take what the server behind sent, and pass it on up to the last frame that is whole."""
        buffer = self._from_server + data if self._from_server else data
        size = len(buffer)
        at = whole = 0
        ended = 0
        special = bool(self._open or self._others or self._cut)  # seldom
        while size - at >= HEAD_BYTES:
            high, low, kind, flags, stream = _frame_head(buffer, at)
            stop = at + HEAD_BYTES + (high << 8 | low)
            if stop > size:
                break
            if kind <= HEADERS:
                if flags & END_STREAM:
                    ended += 1
                    if special and self._answered(stream, reset=False):
                        self.to_client.append(buffer[:stop])
                        self.to_client.append(frame(RST_STREAM, 0, stream, NO_ERROR.to_bytes(4, "big")))
                        buffer, size, stop, whole = buffer[stop:], size - stop, 0, 0
            elif kind == RST_STREAM:
                ended += self._answered(stream, reset=True)
            elif kind == SETTINGS and not self._settled:
                self._settled = True
                settings = _with_our_settings(buffer[at + HEAD_BYTES : stop])
                buffer = buffer[:at] + frame(SETTINGS, 0, 0, settings) + buffer[stop:]
                size, stop = len(buffer), at + HEAD_BYTES + len(settings)
            at = stop
            if kind not in (HEADERS, CONTINUATION) or flags & END_HEADERS:
                whole = at
        self.unanswered -= ended
        self.answered += ended
        if whole:
            self.to_client.append(buffer[:whole] if whole < size else buffer)
        self._from_server = buffer[whole:]

    def _answered(self, stream: int, *, reset: bool) -> bool:
        """Note that a stream was answered or reset.

        Returns:
            For an answer, whether the client has to be told to send no more of it; for a reset, whether it stands for
            an answer.
        """
        self._others.discard(stream)
        if reset and stream in self._over:
            self._over.discard(stream)
            return False
        if stream in self._cut:
            self._cut.discard(stream)
            return True
        opened = self._open.pop(stream, None)
        if opened is not None:
            self._memory.release(opened.reserved)
            if not reset:
                self._over.add(stream)
        return reset


def goaway(code: int, last_stream: int = (1 << 31) - 1) -> bytes:
    """Write a GOAWAY frame (section 6.8)."""
    return frame(GOAWAY, 0, 0, last_stream.to_bytes(4, "big") + code.to_bytes(4, "big"))


def _data_frames(stream: int, payload: bytes, flags: int) -> bytes:
    """Write DATA frames, the last of them with the flags."""
    frames = []
    while len(payload) > MAX_FRAME_BYTES:
        frames.append(frame(DATA, 0, stream, payload[:MAX_FRAME_BYTES]))
        payload = payload[MAX_FRAME_BYTES:]
    return b"".join(frames) + frame(DATA, flags, stream, payload)


def _without_padding(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ClientError(PROTOCOL_ERROR, "more padding than there is")
    return payload[1 : len(payload) - payload[0]]


def _with_our_settings(payload: bytes) -> bytes:
    """The server's settings, with ours in place of two of them."""
    ours = {_HEADER_TABLE_SIZE: 0, _MAX_CONCURRENT_STREAMS: STREAMS}
    kept = b"".join(
        payload[at : at + 6]
        for at in range(0, len(payload), 6)
        if int.from_bytes(payload[at : at + 2], "big") not in ours
    )
    return kept + b"".join(name.to_bytes(2, "big") + value.to_bytes(4, "big") for name, value in ours.items())
