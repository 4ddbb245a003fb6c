"""HTTP/2 and gRPC as far as a server of checks needs them: one pass over the frames of a connection.

Nearly every check is two frames, a short head and a whole message, and takes a few microseconds here. That is possible
because header blocks are made stateless: the client is told to use no dynamic table (RFC 7541, section 4.2), so that a
block is known when the same bytes have come before. Until the client has acknowledged that, its blocks are decoded.

What a client may cost is bounded: messages longer than the checker takes are not kept, unfinished ones reserve memory
of a common account, calls that cannot be taken on are answered UNAVAILABLE at a small part of the price of a check, and
one that the client resets is forgotten.

No I/O: bytes in, bytes out. Section numbers are those of RFC 9113 unless another document is named.
"""

import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeAlias

from hpack import Decoder, Encoder, HPACKError, NeverIndexedHeaderTuple

from authz_server.ext_authz.admission import Backlog, Memory
from authz_server.ext_authz.transport import OVERLOADED

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, ENHANCE_YOUR_CALM = 0x0, 0x1, 0x3, 0x6, 0xB
_HEADER_TABLE_SIZE, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_HEADER_LIST_SIZE = 1, 3, 4, 6
UNAVAILABLE = 14
"""A code of gRPC."""

HEAD_BYTES = 9
MAX_FRAME_BYTES = 16384
"""SETTINGS_MAX_FRAME_SIZE as it is unless stated otherwise (section 6.5.2); we state no other, and send none longer."""
MAX_STREAM = MAX_WINDOW = (1 << 31) - 1
_DEFAULT_WINDOW = 65535
_CONNECTION_WINDOW = 16 << 20
"""Bytes of messages that a client may send ahead of our reading. What of it is kept is another matter: see Memory."""
MAX_BLOCK_BYTES = 16384
"""Longer header blocks are not kept whole but taken for a Check's. Only tracers write such: what Envoy copies from an
outside client's `tracestate` may be megabytes long, must not end in an RPC error, and means nothing to a check."""
_MAX_HEAD_BYTES = 16 << 20
"""A head with all its CONTINUATION frames; Envoy's own limit is 8 MiB (`max_request_headers_kb`)."""
_MAX_EARLY_HEADS = 1024
"""Header blocks, no two alike, before the client acknowledged our settings, as Envoy does at once."""
STREAMS = 100
"""Stated to clients as SETTINGS_MAX_CONCURRENT_STREAMS, so that what is too much waits on their side, where it costs
nothing here. Envoy opens another connection when it needs more. Not enforced: what was sent before the client heard of
it is answered."""
MAX_UNANSWERED = 256
"""Calls of one connection that wait for an answer; more are shed."""
MAX_OTHER_CALLS = 64
"""Calls of other methods (health, reflection) at a time on one connection; those are never shed for load."""
MAX_UNFINISHED = 256
"""Streams of one connection that the client has opened and not ended. Envoy ends each in the write that opens it."""
OTHER_CALL_BYTES = 64 * 1024
"""All that a client may send in one of those."""
_MAX_UNSENT_BYTES = 1 << 20
"""Of an answer to another method, what may wait for the client to open its window."""
OPEN_STREAM_BYTES = 64 * 1024
"""What an unfinished stream is taken to cost, beside its message, because of its metadata."""
MAX_IDLE_FRAMES = 10_000
"""Frames that bring no call (pings, settings, windows, empty data) between two calls of `rest`, beside what calls bring
about. Resets are none of them: outside clients that abort their requests have Envoy send as many as they like."""
_IDLE_FRAMES_A_CALL = 8
"""So many more of them for each call answered since: C-core opens two windows again for each."""

CHECK_PATH = "/envoy.service.auth.v3.Authorization/Check"

_frame_head = struct.Struct(">IBI").unpack_from
"""Length and kind in one number, flags, stream."""


class ClientError(Exception):
    """The client broke a rule of HTTP/2 or one of ours: its connection ends, and only that."""

    def __init__(self, code: int, problem: str) -> None:
        super().__init__(problem)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Write one frame."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def goaway(code: int, last_stream: int = MAX_STREAM) -> bytes:
    """Write a GOAWAY frame (section 6.8)."""
    return frame(GOAWAY, 0, 0, last_stream.to_bytes(4, "big") + code.to_bytes(4, "big"))


def block(*fields: tuple[str, str | bytes]) -> bytes:
    """Write a header block that leaves no trace in a dynamic table: "never indexed" (RFC 7541, section 6.2.3)."""
    return Encoder().encode([NeverIndexedHeaderTuple(name, value) for name, value in fields])


# ---- What we write, encoded beforehand --------------------------------------------------------------------------

_ANSWER_BLOCK = block((":status", "200"), ("content-type", "application/grpc"))
_TRAILERS_BLOCK = block(("grpc-status", "0"))
_ANSWER_HEAD = frame(HEADERS, END_HEADERS, 0, _ANSWER_BLOCK)[:5]
_TRAILERS_HEAD = frame(HEADERS, END_STREAM | END_HEADERS, 0, _TRAILERS_BLOCK)[:5]
_SHORT_ANSWER_BYTES = 2048
_DATA_HEADS = tuple((size + 5).to_bytes(3, "big") + bytes((DATA, 0)) for size in range(_SHORT_ANSWER_BYTES))
"""The first bytes of a DATA frame that holds a message of so many bytes."""
_MESSAGE_HEADS = tuple(b"\0" + size.to_bytes(4, "big") for size in range(_SHORT_ANSWER_BYTES))
"""What stands before a message: it is not compressed, and so long."""


@lru_cache(maxsize=64)
def _failure(code: int, text: str) -> tuple[bytes, bytes]:
    """A response that is nothing but trailers (gRPC over HTTP/2), before and after the stream's number."""
    status = ("grpc-status", str(code)), ("grpc-message", _percent_encoded(text))
    fields = block((":status", "200"), ("content-type", "application/grpc"), *status)
    return frame(HEADERS, END_STREAM | END_HEADERS, 0, fields)[:5], fields


def _percent_encoded(text: str) -> bytes:
    """Write a status message as "Percent-Encoded" in gRPC over HTTP/2 has it."""
    return re.sub(rb"[^ -$&-~]", lambda found: b"%%%02X" % found[0][0], text.encode())


_SHED_HEAD, _SHED_BLOCK = _failure(UNAVAILABLE, OVERLOADED)
_RESET_HEAD = frame(RST_STREAM, 0, 0, bytes(4))[:5]
_RESET = NO_ERROR.to_bytes(4, "big")


# ---- What heads say ---------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """What a call's head says."""

    path: str | None
    """The method; None stands for Check."""
    timeout: float | None = None
    """Seconds in which the client wants its answer (`grpc-timeout`); None: it does not say."""


_PLAIN_CHECK = Head(None)


def _written(text: str) -> tuple[bytes, bytes]:
    """A text as header blocks have it, without its length: as it is, and by Huffman's code (RFC 7541, section 5.2)."""
    return text.encode(), block((":path", text))[2:]


_CHECK_PLAIN, _CHECK_HUFFMAN = _written(CHECK_PATH)
_TIMEOUT_NAMES = _written("grpc-timeout")
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_TIMEOUT_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MAX_KNOWN = 256
_MAX_KNOWN_BYTES = 1024


class Heads:
    """Reads header blocks that need no dynamic table, and knows those again that come often.

    One Envoy writes the same block for every check, unless its tracer adds something. Shared by all connections.
    """

    def __init__(self) -> None:
        self.known: dict[bytes, Head] = {}

    def read(self, fields: bytes) -> Head:
        """Read a block; one that cannot be read is taken for a Check's, whose message will say what it is worth."""
        head = self.known.get(fields)
        if head is None:
            head = self._read(fields)
            if len(fields) <= _MAX_KNOWN_BYTES:
                if len(self.known) >= _MAX_KNOWN:
                    self.known.clear()
                self.known[fields] = head
        return head

    @staticmethod
    def _read(fields: bytes) -> Head:
        if len(fields) > MAX_BLOCK_BYTES:
            return _PLAIN_CHECK
        if _CHECK_HUFFMAN in fields or _CHECK_PLAIN in fields:  # decoding takes thirty times as long
            return Head(None, _find_timeout(fields))
        return _decode_head(Decoder(), fields)


class _EarlyHeads:
    """Reads the header blocks of a client that has not heard yet that it may not use a dynamic table.

    Decoding them takes some hundred times as long as knowing them again, and a client may have sent hundreds before it
    hears of us, most of all when this server is slow. A block that leaves the table as it is means the same when it
    comes again before the table changes.
    """

    def __init__(self) -> None:
        self.known: dict[bytes, Head] = {}
        self._decoder = Decoder(max_header_list_size=4 * MAX_BLOCK_BYTES)
        self._decoded = 0

    def read(self, fields: bytes) -> Head:
        """Read a block.

        Raises:
            ClientError: there are too many.
        """
        head = self.known.get(fields)
        if head is None:
            self._decoded += 1
            if self._decoded > _MAX_EARLY_HEADS:
                raise ClientError(ENHANCE_YOUR_CALM, "our settings were not acknowledged")
            table = self._decoder.header_table
            before = [*table.dynamic_entries], table.maxsize
            head = _decode_head(self._decoder, fields)
            if ([*table.dynamic_entries], table.maxsize) == before:
                self.known[fields] = head
            else:
                self.known.clear()
        return head


def _decode_head(decoder: Decoder, fields: bytes) -> Head:
    """Read a block by a decoder, which keeps the client's dynamic table."""
    path, timeout = _CHECK_PLAIN, None
    try:
        for name, value in decoder.decode(fields, raw=True):
            if name == b":path":
                path = bytes(value)
            elif name == b"grpc-timeout":
                timeout = _parse_timeout(bytes(value))
    except (HPACKError, UnicodeDecodeError):
        return _PLAIN_CHECK
    return Head(None if path == _CHECK_PLAIN else path.decode("latin-1"), timeout)


def _find_timeout(fields: bytes) -> float | None:
    for name in _TIMEOUT_NAMES:
        at = fields.find(name)
        if at > 0:
            at += len(name)
            return _read_timeout(fields[at : at + 1 + (fields[at] & 0x7F)]) if at < len(fields) else None
    return None


@lru_cache(maxsize=256)
def _read_timeout(written: bytes) -> float | None:
    """Read the value of a timeout with its length, as it stands in a header block."""
    try:
        (_, value), *_ = Decoder().decode(b"\0\1t" + written, raw=True)
    except (HPACKError, ValueError):
        return None
    return _parse_timeout(bytes(value))


def _parse_timeout(value: bytes) -> float | None:
    found = _TIMEOUT.fullmatch(value)
    return int(found[1]) * _TIMEOUT_UNITS[found[2]] if found else None


@lru_cache(maxsize=256)
def _layout(block_bytes: int) -> struct.Struct:
    """What stands before a check's message, when its head is a block of so many bytes in one frame.

    Of the HEADERS frame: length and kind, flags, stream, block. Of the DATA frame: length and kind, flags, stream. Of
    the message: whether it is compressed, its length.
    """
    return struct.Struct(f">IBI{block_bytes}sIBIBI")


# ---- Connections ------------------------------------------------------------------------------------------------


Call: TypeAlias = "tuple[Connection, int, bytes, float | None]"
"""A whole check: where it came from, its message, and in how many seconds its client wants the answer, if it says."""


_Whole: TypeAlias = tuple[bytes, float | None]
"""The message and the timeout of a check that has come whole."""


class OtherCalls(Protocol):
    """Who answers calls of other methods than Check, by `send_head`, `send_message` and `finish`, or by `fail`."""

    def begin(self, connection: "Connection", stream: int, path: str) -> None:
        """Take on a call."""

    def data(self, connection: "Connection", stream: int, data: bytes) -> None:
        """Take what the client sends in it: messages with their heads, cut anywhere."""

    def end(self, connection: "Connection", stream: int) -> None:
        """Take note that the client sends no more."""

    def reset(self, connection: "Connection", stream: int) -> None:
        """Forget a call."""


@dataclass(slots=True)
class _Open:
    """A stream that the client has not ended."""

    since: float
    head: Head
    wanted: int = OPEN_STREAM_BYTES
    """What it has to have reserved, if it is still open when all that came with it is read."""
    reserved: int = 0
    data: bytearray = field(default_factory=bytearray)
    """Of a check, what has come of its message, with what stands before it."""
    left: int = OTHER_CALL_BYTES
    """Of another method, so many bytes may come."""


@dataclass(slots=True)
class _Unsent:
    """What waits for the client to open its window."""

    since: float
    data: bytes
    trailers: bytes | None = None
    """The block to send after it; None: more data may follow."""


class Connection:
    """One client's connection: what came, what is to be sent, and which calls wait for an answer."""

    def __init__(
        self,
        backlog: Backlog[Call],
        memory: Memory,
        others: OtherCalls,
        heads: Heads,
        *,
        max_message_bytes: int,
        too_large: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the state of a new connection.

        Args:
            backlog: gets whole checks, and tells how many it can take; shared by all connections.
            memory: what unfinished messages may take; shared by all connections.
            others: gets calls of other methods.
            heads: reads header blocks; shared by all connections.
            max_message_bytes: longer messages of checks are not kept.
            too_large: what the backlog gets in place of such a message.
            clock: returns seconds, for ages.
        """
        self._backlog = backlog
        self._memory = memory
        self._other_calls = others
        self._heads = heads
        self._max_message_bytes = max_message_bytes
        self._too_large = too_large
        self._clock = clock
        self.out: list[bytes] = []
        """What the client is to get; taken by whoever sends it."""
        self.waiting: set[int] = set()
        """Checks whose answers were not given yet, or could not be sent. Whoever decides skips those not in here."""
        self.answered = 0
        """Calls answered so far."""
        self.greeted = False
        """Whether the client's preface has come."""
        self.last_stream = 0
        """The last stream that the client opened, for GOAWAY."""
        self._rest = b""
        self._stateless = False
        """Whether the client has acknowledged that it may not use a dynamic table."""
        self._early = _EarlyHeads()
        self._known = self._early.known
        """Header blocks, read before, that mean the same now."""
        self._idle_frames = 0
        self._answered_before = 0
        """Calls answered until `rest` was called."""
        self._collecting: tuple[int, int] | None = None
        """Stream and flags of a head that goes on in CONTINUATION frames."""
        self._collecting_since = 0.0
        self._block = bytearray()
        self._block_bytes = 0
        self._open: dict[int, _Open] = {}
        self._unreserved: list[int] = []
        """Streams that may have less memory reserved than they want."""
        self._others: set[int] = set()
        """Unanswered calls of other methods than Check."""
        self._credit = 0
        """Bytes of DATA that were read and not given back to the client's window yet (section 6.9.1)."""
        self._window = _DEFAULT_WINDOW
        """Bytes of DATA that the client takes, of all streams together."""
        self._stream_window = _DEFAULT_WINDOW
        """The same for each stream, at its start (SETTINGS_INITIAL_WINDOW_SIZE)."""
        self._window_changes: dict[int, int] = {}
        """By how much the window of a stream differs from that now."""
        self._unsent: dict[int, _Unsent] = {}
        self._unended: set[int] = set()
        """Checks that are answered, or will be, before the client has ended them."""

    # ---- For those who look after connections ---------------------------------------------------------------------

    @property
    def unanswered(self) -> int:
        """Calls, of any method, whose answers are not complete."""
        return len(self.waiting) + len(self._others)

    @property
    def unfinished_since(self) -> float | None:
        """Since when the oldest unfinished message or head is on its way, or answer not taken; None: there is none."""
        if self._collecting is not None:
            return self._collecting_since
        oldest = [opened.since for opened in self._open.values() if opened.head.path is None][:1]
        oldest += [unsent.since for unsent in self._unsent.values()][:1]
        return min(oldest, default=None)

    def rest(self) -> None:
        """Forgive the frames that brought no call, once in a while."""
        self._idle_frames = 0
        self._answered_before = self.answered

    def close(self) -> None:
        """Give back what was reserved, and forget all calls."""
        for opened in self._open.values():
            self._memory.release(opened.reserved)
        for stream in self._others:
            self._other_calls.reset(self, stream)
        for state in (self._open, self._others, self.waiting, self._unsent, self._unended, self._window_changes):
            state.clear()

    # ---- From the client ------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take what the client sent.

        Raises:
            ClientError: the connection has to end.
        """
        buffer = self._rest + data if self._rest else data
        at = 0
        if not self.greeted:
            if buffer[: len(PREFACE)] != PREFACE[: len(buffer)]:
                raise ClientError(PROTOCOL_ERROR, "this is not HTTP/2")
            if len(buffer) < len(PREFACE):
                self._rest = buffer
                return
            self.greeted = True
            at = len(PREFACE)
        arrived: list[Call] = []
        try:
            at = self._frames(buffer, at, arrived)
        finally:
            if arrived:
                self._backlog.add(self._clock(), arrived)
        self._rest = buffer[at:]
        if self._unreserved:
            self._reserve()
        if self._credit > _CONNECTION_WINDOW // 4:
            self.out.append(frame(WINDOW_UPDATE, 0, 0, self._credit.to_bytes(4, "big")))
            self._credit = 0

    def _frames(self, buffer: bytes, at: int, arrived: list[Call]) -> int:
        """Take all whole frames from there on, put the checks that are whole by them into `arrived`.

        Returns where the frame begins that is not whole.
        """
        size = len(buffer)
        while size - at >= HEAD_BYTES:
            word, flags, stream = _frame_head(buffer, at)
            length, kind = word >> 8, word & 0xFF
            if length > MAX_FRAME_BYTES:
                raise ClientError(FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            stop = at + HEAD_BYTES + length
            if stop > size:
                break
            if kind == DATA and self._collecting is None:
                self._credit += length
                if not length:
                    self._idle()
                if stream not in self._open:  # answered already, or shed
                    at = stop
                    continue
            payload = buffer[at + HEAD_BYTES : stop]
            if kind == HEADERS and self._collecting is None:
                after = self._run(buffer, at, payload, arrived)
                if after > at:
                    at = after
                    continue
            if self._collecting is not None and (kind != CONTINUATION or stream != self._collecting[0]):
                raise ClientError(PROTOCOL_ERROR, "a header block was interrupted")
            call = self._frame(kind, flags, stream, payload)
            if call is not None:
                if len(arrived) >= self._backlog.room:
                    self._shed(stream, ended=stream not in self._unended)
                    self._forget(stream)
                else:
                    self.waiting.add(stream)
                    arrived.append((self, stream, *call))
            at = stop
        return at

    def _run(self, buffer: bytes, at: int, fields: bytes, arrived: list[Call]) -> int:
        """Take what comes in one shape again and again. Returns where the next frame begins; `at`: it does not."""
        head = self._known.get(fields)
        if head is None or head.path is not None:
            return at
        after = self._whole_checks(buffer, at, fields, head.timeout, arrived)
        if after == at and (not self._backlog.room or self._is_full()):
            return self._shed_heads(buffer, at, fields)
        return after

    def _whole_checks(self, buffer: bytes, at: int, fields: bytes, timeout: float | None, arrived: list[Call]) -> int:
        """Take checks as long as each is this head and a whole message that ends the stream, as nearly all are.

        Returns where the next frame begins that is to be looked at more closely: `at` if that is the first.
        """
        layout = _layout(len(fields))
        unpack, heads_bytes, head_word = layout.unpack_from, layout.size, len(fields) << 8 | HEADERS
        size, last, waiting = len(buffer), self.last_stream, self.waiting
        room = min(self._backlog.room - len(arrived), MAX_UNANSWERED - len(waiting))
        credit = 0
        shed: list[bytes] = []
        while size - at >= heads_bytes:
            word, flags, stream, written, data_word, data_flags, same, _, declared = unpack(buffer, at)
            begin = at + heads_bytes
            end = begin + declared
            if (
                word != head_word
                or flags != END_HEADERS
                or written != fields
                or not last < stream <= MAX_STREAM
                or not stream & 1
                or data_word != declared + 5 << 8 | DATA
                or data_flags != END_STREAM
                or same != stream
                or declared > MAX_FRAME_BYTES - 5
                or end > size
            ):
                break
            last = stream
            credit += declared + 5
            if room <= 0:
                shed.append(stream.to_bytes(4, "big"))
            else:
                room -= 1
                waiting.add(stream)
                arrived.append((self, stream, buffer[begin:end], timeout))
            at = end
        self.last_stream = last
        self._credit += credit
        if shed:
            self._backlog.shed += len(shed)
            self.out += (_SHED_HEAD, (_SHED_BLOCK + _SHED_HEAD).join(shed), _SHED_BLOCK)
        return at

    def _is_full(self) -> bool:
        """Tell whether this connection has all the calls that it may have."""
        return len(self.waiting) >= MAX_UNANSWERED or len(self._open) >= MAX_UNFINISHED

    def _shed_heads(self, buffer: bytes, at: int, fields: bytes) -> int:
        """Shed checks as long as one begins after the other, with this head; clients in need write heads in a row.

        Returns where the next frame begins that is to be looked at more closely: `at` if that is the first.
        """
        size, head_bytes, head_word = len(buffer), HEAD_BYTES + len(fields), len(fields) << 8 | HEADERS
        while size - at >= head_bytes:
            word, flags, stream = _frame_head(buffer, at)
            if (
                word != head_word
                or flags != END_HEADERS
                or not self.last_stream < stream <= MAX_STREAM
                or not stream & 1
                or not buffer.startswith(fields, at + HEAD_BYTES)
            ):
                break
            self.last_stream = stream
            self._shed(stream, ended=False)
            at += head_bytes
        return at

    def send_settings(self) -> None:
        """Say first what clients may do here, without having heard of this one (section 3.4).

        Until it knows, it may send only a few calls whole, but heads without end.
        """
        ours = {
            _HEADER_TABLE_SIZE: 0,
            _MAX_CONCURRENT_STREAMS: STREAMS,
            # A message needs no more; so the window of a stream is never given back.
            _INITIAL_WINDOW_SIZE: max(_DEFAULT_WINDOW, self._max_message_bytes + 5, OTHER_CALL_BYTES),
            _MAX_HEADER_LIST_SIZE: _MAX_HEAD_BYTES,
        }
        settings = b"".join(name.to_bytes(2, "big") + value.to_bytes(4, "big") for name, value in ours.items())
        self.out.append(frame(SETTINGS, 0, 0, settings))
        self.out.append(frame(WINDOW_UPDATE, 0, 0, (_CONNECTION_WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big")))

    def _reserve(self) -> None:
        """Reserve memory for what is unfinished; end streams that there is none for."""
        for stream in self._unreserved:
            opened = self._open.get(stream)
            if opened is None or opened.reserved == opened.wanted:
                continue
            if self._memory.reserve(opened.wanted - opened.reserved):
                opened.reserved = opened.wanted
            else:
                self._forget_open(stream)
                self._shed(stream, ended=False)
        self._unreserved.clear()

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> _Whole | None:
        """Handle a frame, and return the check that is whole by it."""
        if kind == DATA:
            return self._data(flags, stream, payload)
        if kind == HEADERS:
            return self._headers(flags, stream, payload)
        if kind == CONTINUATION:
            return self._continuation(flags, payload)
        if kind == RST_STREAM:
            self._reset(stream)
            return None
        self._idle()
        if kind == WINDOW_UPDATE:
            self._open_window(stream, payload)
        elif kind == SETTINGS:
            self._settings(flags, payload)
        elif kind == PING and not flags & ACK:
            self.out.append(frame(PING, ACK, 0, payload))
        elif kind == PUSH_PROMISE:
            raise ClientError(PROTOCOL_ERROR, "a client cannot push")
        return None  # PRIORITY and GOAWAY, and kinds that do not exist yet (section 4.1), say nothing to us

    def _idle(self) -> None:
        """Count a frame that brings no call."""
        self._idle_frames += 1
        if self._idle_frames > MAX_IDLE_FRAMES + _IDLE_FRAMES_A_CALL * (self.answered - self._answered_before):
            raise ClientError(ENHANCE_YOUR_CALM, "many frames and no call")

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            self._stateless, self._known = True, self._heads.known
            return
        for at in range(0, len(payload) - 5, 6):
            if int.from_bytes(payload[at : at + 2], "big") == _INITIAL_WINDOW_SIZE:
                window = int.from_bytes(payload[at + 2 : at + 6], "big")
                if window > MAX_WINDOW:
                    raise ClientError(FLOW_CONTROL_ERROR, f"a window of {window} bytes")
                self._stream_window = window
        self.out.append(frame(SETTINGS, ACK, 0, b""))
        self._send_unsent()

    def _open_window(self, stream: int, payload: bytes) -> None:
        increment = int.from_bytes(payload[:4], "big") & MAX_WINDOW
        if not stream:
            self._window += increment
            if self._window > MAX_WINDOW:
                raise ClientError(FLOW_CONTROL_ERROR, "the connection's window is too large")
        elif stream in self.waiting or stream in self._others or stream in self._open:
            change = self._window_changes.get(stream, 0) + increment
            if self._stream_window + change > MAX_WINDOW:
                raise ClientError(FLOW_CONTROL_ERROR, "a stream's window is too large")
            self._window_changes[stream] = change
        if self._unsent:
            self._send_unsent()

    def _headers(self, flags: int, stream: int, payload: bytes) -> _Whole | None:
        payload = _without_padding(flags, payload)
        if flags & PRIORITY_FLAG:
            payload = payload[5:]
        if stream & 1 == 0 or stream > MAX_STREAM:
            raise ClientError(PROTOCOL_ERROR, f"a call on stream {stream}")
        if not flags & END_HEADERS:
            self._collecting, self._collecting_since = (stream, flags), self._clock()
            self._block_bytes = len(payload)
            self._block += payload
            return None
        return self._begin(stream, flags, payload)

    def _continuation(self, flags: int, payload: bytes) -> _Whole | None:
        if self._collecting is None:
            raise ClientError(PROTOCOL_ERROR, "a header block is continued that did not begin")
        self._block_bytes += max(len(payload), 64)
        if self._block_bytes > _MAX_HEAD_BYTES:
            raise ClientError(ENHANCE_YOUR_CALM, "a header block without an end")
        if len(self._block) <= MAX_BLOCK_BYTES:  # what is longer is not read, so it is not kept
            self._block += payload
        if not flags & END_HEADERS:
            return None
        (stream, first_flags), fields = self._collecting, bytes(self._block)
        self._collecting = None
        self._block.clear()
        return self._begin(stream, first_flags, fields)

    def _begin(self, stream: int, flags: int, fields: bytes) -> _Whole | None:
        """Open a stream, or end it when this is its second head (trailers)."""
        head = self._read_head(fields)
        if stream in self._open:
            return self._end(stream)
        if stream <= self.last_stream:
            return None  # the trailers of a stream that is answered already
        self.last_stream = stream
        ended = bool(flags & END_STREAM)
        is_check = head.path is None
        busy = not self._backlog.room if is_check else len(self._others) >= MAX_OTHER_CALLS
        if busy or self._is_full():
            self._shed(stream, ended=ended)
            return None
        self._open[stream] = _Open(self._clock(), head)
        if head.path is not None:
            self._others.add(stream)
            self._other_calls.begin(self, stream, head.path)
        if ended:
            return self._end(stream)
        self._unreserved.append(stream)
        return None

    def _read_head(self, fields: bytes) -> Head:
        if self._stateless:
            return self._heads.read(fields)
        if len(fields) > MAX_BLOCK_BYTES:  # what it would have put into the table is lost, and with it what follows
            raise ClientError(ENHANCE_YOUR_CALM, "a long header block before our settings were acknowledged")
        return self._early.read(fields)

    def _data(self, flags: int, stream: int, payload: bytes) -> _Whole | None:
        opened = self._open[stream]
        payload = _without_padding(flags, payload)
        if opened.head.path is not None:
            opened.left -= len(payload)
            if opened.left < 0:
                self._refuse(stream)
                return None
            self._other_calls.data(self, stream, payload)
            return self._end(stream) if flags & END_STREAM else None
        data = opened.data
        knew_length = len(data) >= 5
        data += payload
        if len(data) >= 5:
            declared = int.from_bytes(data[1:5], "big")
            if declared > self._max_message_bytes:
                return self._cut_off(stream, self._too_large, flags)
            if len(data) > declared + 5:  # a check is one message
                return self._cut_off(stream, b"", flags)
            if not knew_length:
                opened.wanted += declared
                self._unreserved.append(stream)
        return self._end(stream) if flags & END_STREAM else None

    def _end(self, stream: int) -> _Whole | None:
        """Take note that the client has ended a stream."""
        opened = self._forget_open(stream)
        if opened.head.path is not None:
            self._other_calls.end(self, stream)
            return None
        data = opened.data
        whole = len(data) >= 5 and len(data) - 5 == int.from_bytes(data[1:5], "big")
        # What is no message becomes an empty one: the checker denies it, as it does everything that it cannot read.
        return bytes(data[5:]) if whole else b"", opened.head.timeout

    def _cut_off(self, stream: int, instead: bytes, flags: int) -> _Whole:
        """Have a check answered by what stands for its message; what the client still sends of it is dropped."""
        opened = self._forget_open(stream)
        if not flags & END_STREAM:
            self._unended.add(stream)
        return instead, opened.head.timeout

    def _forget_open(self, stream: int) -> _Open:
        opened = self._open.pop(stream)
        self._memory.release(opened.reserved)
        return opened

    def _reset(self, stream: int) -> None:
        """Forget a call that its client has reset, if it is one of those that wait."""
        if not (stream in self.waiting or self._open or self._others or self._unended or self._unsent):
            return  # so it is with most: answered already
        if stream in self._open:
            self._forget_open(stream)
        if stream in self._others:
            self._other_calls.reset(self, stream)
        self._forget(stream)

    def _forget(self, stream: int) -> None:
        for calls in (self.waiting, self._others, self._unended):
            calls.discard(stream)
        self._unsent.pop(stream, None)
        self._window_changes.pop(stream, None)

    # ---- To the client --------------------------------------------------------------------------------------------

    def answer(self, stream: int, message: bytes) -> None:
        """Answer a check. One that the client has reset meanwhile is passed over."""
        if stream not in self.waiting:
            return
        size = len(message)
        number = stream.to_bytes(4, "big")
        if (
            size < _SHORT_ANSWER_BYTES
            and size + 5 <= self._window
            and size + 5 <= self._stream_window
            and not self._window_changes
            and not self._unended
        ):
            self._window -= size + 5
            self.waiting.discard(stream)
            self.answered += 1
            data_head, message_head = _DATA_HEADS[size], _MESSAGE_HEADS[size]
            self.out += (_ANSWER_HEAD, number, _ANSWER_BLOCK, data_head, number, message_head, message)
            self.out += (_TRAILERS_HEAD, number, _TRAILERS_BLOCK)
            return
        self.send_head(stream)
        self.send_message(stream, message)
        self._finish(stream, _TRAILERS_BLOCK)

    def fail(self, stream: int, code: int, text: str) -> None:
        """Answer a check by an RPC error, or end another call that has no answer yet so."""
        if stream not in self.waiting and stream not in self._others:
            return
        head, fields = _failure(code, text)
        self.out += (head, stream.to_bytes(4, "big"), fields)
        self._answered(stream)

    def send_head(self, stream: int) -> None:
        """Begin an answer."""
        self.out += (_ANSWER_HEAD, stream.to_bytes(4, "big"), _ANSWER_BLOCK)

    def send_message(self, stream: int, message: bytes) -> None:
        """Send a message of an answer, as soon as the client takes it."""
        if stream not in self.waiting and stream not in self._others:
            return
        data = b"\0" + len(message).to_bytes(4, "big") + message
        unsent = self._unsent.get(stream)
        if unsent is None:
            self._unsent[stream] = _Unsent(self._clock(), data)
        elif len(unsent.data) + len(data) > _MAX_UNSENT_BYTES:
            self._refuse(stream)
            return
        else:
            unsent.data += data
        self._send_unsent()

    def finish(self, stream: int, code: int, text: str) -> None:
        """End the answer to a call of another method, when all of it is sent."""
        if stream in self._others:
            status = ("grpc-status", str(code)), ("grpc-message", _percent_encoded(text))
            self._finish(stream, block(*status) if code else _TRAILERS_BLOCK)

    def _finish(self, stream: int, trailers: bytes) -> None:
        unsent = self._unsent.get(stream)
        if unsent is not None:
            unsent.trailers = trailers
            return
        self.out.append(frame(HEADERS, END_STREAM | END_HEADERS, stream, trailers))
        self._answered(stream)

    def _answered(self, stream: int) -> None:
        """Take note that an answer is complete; tell a client that goes on sending to stop (section 8.1)."""
        self.answered += 1
        if stream in self._open:
            self._forget_open(stream)
            self._unended.add(stream)
        if stream in self._unended:
            self.out += (_RESET_HEAD, stream.to_bytes(4, "big"), _RESET)
        self._forget(stream)

    def _send_unsent(self) -> None:
        """Send what waits, as far as the client's windows are open (section 5.2)."""
        for stream, unsent in list(self._unsent.items()):
            while unsent.data:
                room = min(self._window, self._stream_window + self._window_changes.get(stream, 0), MAX_FRAME_BYTES)
                if room <= 0:
                    break
                part, unsent.data = unsent.data[:room], unsent.data[room:]
                self.out.append(frame(DATA, 0, stream, part))
                self._window -= len(part)
                self._window_changes[stream] = self._window_changes.get(stream, 0) - len(part)
                unsent.since = self._clock()
            if not unsent.data:
                del self._unsent[stream]
                if unsent.trailers is not None:
                    self._finish(stream, unsent.trailers)

    def _shed(self, stream: int, *, ended: bool) -> None:
        """Answer a call that cannot be taken on."""
        self._backlog.shed += 1
        number = stream.to_bytes(4, "big")
        self.out += (_SHED_HEAD, number, _SHED_BLOCK)
        if not ended:
            self.out += (_RESET_HEAD, number, _RESET)

    def _refuse(self, stream: int) -> None:
        """Break off a call of another method that asks for too much."""
        self._reset(stream)
        self.out.append(frame(RST_STREAM, 0, stream, ENHANCE_YOUR_CALM.to_bytes(4, "big")))


def _without_padding(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ClientError(PROTOCOL_ERROR, "more padding than there is")
    return payload[1 : len(payload) - payload[0]]
