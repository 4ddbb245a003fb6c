"""The filter between two real HTTP/2 state machines, in memory; and hostile bytes."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import h2.events
import pytest
from authz_server.ext_authz.frame_filter import (
    ACK,
    CHECK_PATH,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    MAX_UNANSWERED,
    OPEN_STREAM_BYTES,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ClientError,
    Connection,
    Markers,
    frame,
)
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from authz_server.ext_authz import frame_filter
from authz_server.ext_authz.admission import Backlog, Memory

LIMIT = 100_000
MARKERS = Markers()
CHECK = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", CHECK_PATH),
    (":authority", "authz"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
)
WATCH = tuple((name, "/grpc.health.v1.Health/Watch" if name == ":path" else value) for name, value in CHECK)
ANSWER = ((":status", "200"), ("content-type", "application/grpc"))
TRAILERS = (("grpc-status", "0"),)


def message(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(4, "big") + data


def server_behind() -> H2Connection:
    server = H2Connection(H2Configuration(client_side=False))
    server.local_settings = Settings(client=False, initial_values={SettingCodes.MAX_CONCURRENT_STREAMS: 1 << 20})
    return server


@dataclass
class Line:
    """A client, the filter, and the server behind."""

    backlog: Backlog = field(default_factory=lambda: Backlog(0.1))
    memory: Memory = field(default_factory=lambda: Memory(lambda: False))

    def __post_init__(self) -> None:
        self.client = H2Connection(H2Configuration(client_side=True))
        self.server = server_behind()
        self.filter = Connection(self.backlog, self.memory, MARKERS, max_message_bytes=LIMIT)
        self.at_server: list[h2.events.Event] = []
        self.at_client: list[h2.events.Event] = []
        self.client.initiate_connection()
        self.server.initiate_connection()
        self.carry()

    def carry(self) -> None:
        """Carry bytes until there are none."""
        while True:
            outgoing, answers = self.client.data_to_send(), self.server.data_to_send()
            if outgoing:
                self.filter.from_client(outgoing)
            if answers:
                self.filter.from_server(answers)
            to_server, to_client = b"".join(self.filter.to_server), b"".join(self.filter.to_client)
            self.filter.to_server.clear()
            self.filter.to_client.clear()
            if not (to_server or to_client):
                return
            if to_server:
                self.at_server += self.server.receive_data(to_server)
            if to_client:
                self.at_client += self.client.receive_data(to_client)

    def call(self, data: bytes | None = b"request", *, fields: Iterable[tuple[str, str]] = CHECK) -> int:
        """Make a call, with a message that ends it unless there is none."""
        stream = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, list(fields))
        if data is not None:
            self.client.send_data(stream, message(data), end_stream=True)
        return stream

    def answer(self, stream: int) -> None:
        self.server.send_headers(stream, ANSWER)
        self.server.send_data(stream, message(b"answer"))
        self.server.send_headers(stream, TRAILERS, end_stream=True)
        self.carry()

    def requests(self) -> dict[int, tuple[bytes, bytes, bool]]:
        """What the server was asked: stream -> path, data, whether it ended."""
        found: dict[int, tuple[bytes, bytes, bool]] = {}
        for event in self.at_server:
            if isinstance(event, h2.events.RequestReceived):
                found[event.stream_id] = (dict(event.headers)[b":path"], b"", False)
            elif isinstance(event, h2.events.DataReceived):
                path, data, ended = found[event.stream_id]
                found[event.stream_id] = (path, data + event.data, ended)
            elif isinstance(event, h2.events.StreamEnded):
                path, data, _ = found[event.stream_id]
                found[event.stream_id] = (path, data, True)
        return found

    def answers(self) -> dict[int, bytes]:
        """What the client was told: stream -> grpc-status."""
        found = {}
        for event in self.at_client:
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                status = dict(event.headers).get(b"grpc-status")
                if status is not None:
                    found[event.stream_id] = status
        return found

    def resets(self) -> list[int]:
        """The streams whose reset reached the server."""
        return [event.stream_id for event in self.at_server if isinstance(event, h2.events.StreamReset)]


PATH = CHECK_PATH.encode()


class TestOrdinary:
    """What an honest client does passes."""

    def test_a_call_and_its_answer(self) -> None:
        line = Line()
        stream = line.call()
        line.carry()
        assert line.requests() == {stream: (PATH, message(b"request"), True)}
        assert line.filter.unanswered == 1
        line.answer(stream)
        assert line.answers() == {stream: b"0"}
        assert (line.filter.unanswered, line.filter.answered, line.memory.reserved) == (0, 1, 0)

    def test_calls_before_the_settings_are_acknowledged(self) -> None:
        """Envoy sends at once what is waiting, by a dynamic table that it is told of only later not to use."""
        client = H2Connection(H2Configuration(client_side=True))
        client.initiate_connection()
        line = Line()
        line.client, line.filter = client, Connection(line.backlog, line.memory, MARKERS, max_message_bytes=LIMIT)
        line.server = server_behind()
        line.server.initiate_connection()
        early = [line.call(b"a", fields=(*CHECK, ("x-id", "one"))) for _ in range(3)]
        line.filter.from_client(client.data_to_send())
        line.carry()
        late = [line.call(b"b", fields=(*CHECK, ("x-id", "one"))) for _ in range(3)]
        line.carry()
        assert line.requests() == {
            **{stream: (PATH, message(b"a"), True) for stream in early},
            **{stream: (PATH, message(b"b"), True) for stream in late},
        }
        for stream in early + late:
            line.answer(stream)
        assert line.answers() == dict.fromkeys(early + late, b"0")

    def test_the_client_is_told_our_settings(self) -> None:
        line = Line()
        assert line.client.remote_settings[SettingCodes.HEADER_TABLE_SIZE] == 0
        assert line.client.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] == frame_filter.STREAMS

    @pytest.mark.parametrize("length", [20_000, 60_000, LIMIT])
    def test_a_message_of_many_frames(self, length: int) -> None:
        line = Line()
        data = message(bytes(length))
        stream = line.call(None)
        for at in range(0, len(data), 16384):
            line.client.send_data(stream, data[at : at + 16384], end_stream=at + 16384 >= len(data))
            line.carry()
            for event in line.at_server:
                if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                    line.server.acknowledge_received_data(event.flow_controlled_length, stream)
                    event.flow_controlled_length = 0
            line.carry()
        assert line.requests() == {stream: (PATH, data, True)}
        assert line.memory.reserved == 0

    def test_a_message_byte_by_byte_with_padding(self) -> None:
        line = Line()
        stream = line.call(None)
        for byte in message(b"request"):
            line.client.send_data(stream, bytes([byte]), pad_length=3)
            line.carry()
        assert line.memory.reserved == OPEN_STREAM_BYTES + len(b"request")
        line.client.end_stream(stream)
        line.carry()
        assert line.requests() == {stream: (PATH, message(b"request"), True)}
        assert line.memory.reserved == 0

    def test_another_method_can_talk_back_and_forth_and_be_cancelled(self) -> None:
        line = Line()
        stream = line.call(None, fields=WATCH)
        line.client.send_data(stream, message(b"one"))
        line.carry()
        line.server.send_headers(stream, ANSWER)
        line.carry()
        line.client.send_data(stream, message(b"two"))
        line.carry()
        assert line.requests() == {stream: (b"/grpc.health.v1.Health/Watch", message(b"one") + message(b"two"), False)}
        line.client.reset_stream(stream)
        line.carry()
        assert line.resets() == [stream]
        assert (line.filter.unanswered, line.memory.reserved) == (0, 0)

    @pytest.mark.parametrize("size", [2_000, 10_000, 60_000])
    @pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
    def test_a_head_that_a_tracer_made_long_is_a_plain_one(self, size: int, early: bool) -> None:
        line = Line()
        if early:
            line.filter = Connection(line.backlog, line.memory, MARKERS, max_message_bytes=LIMIT)
            line.server = server_behind()
            line.client = H2Connection(H2Configuration(client_side=True))
            line.client.initiate_connection()
            line.server.initiate_connection()
        stream = line.call(fields=(*CHECK, ("tracestate", "t=" + "x" * size)))
        other = line.call()
        line.carry()
        for asked in (stream, other):
            assert line.requests()[asked] == (PATH, message(b"request"), True)


class TestHostile:
    """What would hurt the server behind does not reach it."""

    def test_resets_of_complete_calls_do_not_pass(self) -> None:
        line = Line()
        streams = []
        for _ in range(50):
            stream = line.call()
            line.client.reset_stream(stream)
            streams.append(stream)
        line.carry()
        assert line.resets() == []
        assert all(line.requests()[stream] == (PATH, message(b"request"), True) for stream in streams)
        for stream in streams:
            line.answer(stream)
        assert line.filter.unanswered == 0

    @pytest.mark.parametrize("sent", [b"", b"\0\0", message(b"half of it")[:9]])
    def test_resets_of_incomplete_calls_end_them(self, sent: bytes) -> None:
        line = Line()
        stream = line.call(None)
        if sent:
            line.client.send_data(stream, sent)
        line.client.reset_stream(stream)
        line.carry()
        _, data, ended = line.requests()[stream]
        assert ended
        assert data in (message(MARKERS.unavailable), message(b"half of it")[:9])
        assert (line.resets(), line.memory.reserved) == ([], 0)

    def test_a_message_that_is_too_long_is_a_marker_and_its_bytes_go_nowhere(self) -> None:
        line = Line()
        stream = line.call(None)
        line.client.send_data(stream, message(bytes(4 * LIMIT))[:16384])
        line.carry()
        assert line.requests() == {stream: (PATH, message(MARKERS.too_large), True)}
        line.answer(stream)
        assert line.answers() == {stream: b"0"}
        [reset] = [event for event in line.at_client if isinstance(event, h2.events.StreamReset)]
        assert (reset.stream_id, reset.error_code) == (stream, 0)
        assert line.client.outbound_flow_control_window == 65535 - len(message(MARKERS.too_large))
        assert line.memory.reserved == 0

    def test_no_memory_for_a_head_that_stands_alone_is_unavailable(self) -> None:
        line = Line(memory=Memory(lambda: False, max_bytes=OPEN_STREAM_BYTES - 1))
        stream, whole = line.call(None), line.call()
        line.carry()
        assert line.requests() == {
            stream: (PATH, message(MARKERS.unavailable), True),
            whole: (PATH, message(b"request"), True),
        }
        assert line.backlog.shed == 1

    def test_no_memory_for_the_rest_of_a_message_ends_it(self) -> None:
        line = Line(memory=Memory(lambda: False, max_bytes=OPEN_STREAM_BYTES + 20_000))
        stream = line.call(None)
        line.client.send_data(stream, message(bytes(30_000))[:100])
        line.carry()
        assert line.requests() == {stream: (PATH, message(bytes(30_000))[:100], True)}
        assert (line.memory.reserved, line.backlog.shed) == (0, 1)

    def test_more_than_the_backlog_takes_is_shed_without_the_server(self) -> None:
        line = Line()
        line.backlog.full = True
        whole, unfinished = line.call(), line.call(None)
        health = line.call(fields=WATCH)
        line.carry()
        assert list(line.requests()) == [health]
        assert line.answers() == {whole: b"14", unfinished: b"14"}
        assert line.backlog.shed == 2
        line.backlog.full = False
        again = line.call()
        line.carry()
        line.answer(again)
        assert line.answers()[again] == b"0"

    def test_one_connection_has_a_bounded_number_of_unanswered_calls(self) -> None:
        """Resets do not pass, so a client that resets everything has all its calls still being answered."""
        line = Line()
        for _ in range(MAX_UNANSWERED + 10):
            stream = line.call()
            line.client.reset_stream(stream)
            line.carry()
        assert len(line.requests()) == MAX_UNANSWERED
        assert line.backlog.shed == 10

    def test_a_check_that_goes_on_after_its_message_is_cut_off(self) -> None:
        line = Line()
        stream = line.call(None)
        line.client.send_data(stream, message(b"request"))
        line.client.send_data(stream, b"more")
        line.carry()
        assert line.requests() == {stream: (PATH, message(b"request"), True)}

    def test_another_method_may_not_send_much(self) -> None:
        line = Line()
        stream = line.call(None, fields=WATCH)
        for _ in range(3):
            line.client.send_data(stream, bytes(16384))
        line.client.send_data(stream, bytes(16383))
        line.carry()
        line.filter.from_client(frame(DATA, 0, stream, bytes(16384)))
        line.carry()
        _, data, ended = line.requests()[stream]
        assert (len(data), ended) == (65535, True)


GREETING = PREFACE + frame(SETTINGS, 0, 0, b"") + frame(SETTINGS, ACK, 0, b"")
BLOCK = frame_filter.call_block(CHECK_PATH)


def connection() -> Connection:
    made = Connection(Backlog(0.1), Memory(lambda: False), MARKERS, max_message_bytes=LIMIT)
    made.from_server(frame(SETTINGS, 0, 0, b""))
    return made


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n", "not HTTP/2", id="HTTP/1.1"),
        pytest.param(GREETING + b"\x00\x40\x01" + bytes(6), "a frame of 16385 bytes", id="frame too long"),
        pytest.param(GREETING + frame(HEADERS, END_HEADERS, 2, BLOCK), "stream 2", id="even stream"),
        pytest.param(GREETING + frame(CONTINUATION, 0, 1, BLOCK), "did not begin", id="continuation alone"),
        pytest.param(
            GREETING + frame(HEADERS, 0, 1, b"") + frame(PING, 0, 0, bytes(8)), "interrupted", id="interrupted"
        ),
        pytest.param(
            GREETING + frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 3, b""), "interrupted", id="another stream"
        ),
        pytest.param(GREETING + frame(PUSH_PROMISE, 0, 1, bytes(4)), "push", id="push"),
        pytest.param(GREETING + frame(HEADERS, END_HEADERS | PADDED, 1, b"\x09abc"), "padding", id="padding"),
        pytest.param(
            GREETING + frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 1, b"") * 300_000,
            "without an end",
            id="flood",
        ),
    ],
)
def test_breaking_the_rules_ends_the_connection(data: bytes, problem: str) -> None:
    with pytest.raises(ClientError, match=problem):
        connection().from_client(data)


def test_settings_that_are_never_acknowledged_end_the_connection() -> None:
    calls = b"".join(frame(HEADERS, END_HEADERS | END_STREAM, 2 * number + 1, BLOCK) for number in range(2_000))
    with pytest.raises(ClientError, match="not acknowledged"):
        connection().from_client(PREFACE + frame(SETTINGS, 0, 0, b"") + calls)


def test_a_head_that_goes_on_and_on_is_not_kept() -> None:
    made = connection()
    made.from_client(GREETING + frame(HEADERS, 0, 1, b""))
    for _ in range(1000):
        made.from_client(frame(CONTINUATION, 0, 1, bytes(16384)))
        assert len(made._block) <= 3 * 16384


# ---- Whatever the bytes, and however they are cut --------------------------------------------------------------------

STREAM = st.integers(0, 9)
FRAMES = st.one_of(
    st.builds(
        lambda stream, flags, data, pad: frame(
            DATA, flags | (PADDED if pad else 0), stream, (bytes([pad]) if pad else b"") + data + bytes(pad)
        ),
        STREAM,
        st.sampled_from([0, END_STREAM]),
        st.sampled_from(
            [b"", b"\0", message(b"abc"), message(b"abc")[:6], b"bc", message(bytes(300)), b"\1\xff\xff\xff\xff"]
        ),
        st.sampled_from([0, 0, 3]),
    ),
    st.builds(
        lambda stream, flags, block: frame(
            HEADERS, flags, stream, (bytes(5) if flags & PRIORITY_FLAG else b"") + block
        ),
        STREAM,
        st.sampled_from(
            [END_HEADERS, END_HEADERS, END_HEADERS | END_STREAM, 0, END_HEADERS | PRIORITY_FLAG, END_STREAM]
        ),
        st.sampled_from([BLOCK, frame_filter.call_block("/x/y"), BLOCK[:20], bytes(1100), b""]),
    ),
    st.builds(
        lambda stream, flags, block: frame(CONTINUATION, flags, stream, block),
        STREAM,
        st.sampled_from([0, END_HEADERS]),
        st.binary(max_size=40),
    ),
    st.builds(lambda stream: frame(RST_STREAM, 0, stream, bytes(4)), STREAM),
    st.builds(lambda stream: frame(WINDOW_UPDATE, 0, stream, b"\0\0\0\1"), STREAM),
    st.builds(
        lambda kind, flags: frame(kind, flags, 0, bytes(8)),
        st.sampled_from([PING, GOAWAY, PRIORITY, 77]),
        st.integers(0, 255),
    ),
    st.builds(
        lambda stream: frame(HEADERS, END_HEADERS, stream, BLOCK) + frame(DATA, END_STREAM, stream, message(b"abc")),
        STREAM,
    ),
)


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def meaning(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """The frames of a stream of bytes, without what may differ: their priorities."""
    frames, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 3], "big")
        kind, flags, stream = data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big")
        payload = data[at + 9 : at + 9 + length]
        assert len(payload) == length
        if kind == HEADERS and flags & PRIORITY_FLAG:
            flags, payload = flags & ~PRIORITY_FLAG, payload[5:]
        frames.append((kind, flags, stream, payload))
        at += 9 + length
    return frames


def passed(
    made: Connection, parts: list[bytes]
) -> tuple[list[tuple[int, int, int, bytes]], list[tuple[int, int, int, bytes]], str]:
    """What the server and the client get of it, and what ended it."""
    made.to_client.clear()
    problem = ""
    try:
        for part in parts:
            made.from_client(part)
    except ClientError as error:
        problem = str(error)
    to_server = b"".join(made.to_server)
    assert not to_server or to_server.startswith(PREFACE)
    # Credit may be given in other portions; whoever has not ended what is refused is also told to stop.
    to_client = [told for told in meaning(b"".join(made.to_client)) if told[0] not in (WINDOW_UPDATE, RST_STREAM)]
    return meaning(to_server.removeprefix(PREFACE)), to_client, problem


@settings(max_examples=100, deadline=None)
@given(st.lists(FRAMES, max_size=12), st.lists(st.integers(0, 10**6), max_size=8), st.booleans())
def test_however_the_bytes_are_cut_the_outcome_is_the_same(frames: list[bytes], cuts: list[int], full: bool) -> None:
    data = GREETING + b"".join(frames)
    whole, cut = connection(), connection()
    whole._backlog.full = cut._backlog.full = full
    at_once, in_pieces = passed(whole, [data]), passed(cut, pieces(data, cuts))
    if at_once[2]:  # what came before a fault may have been sent already, or not
        assert at_once[2] == in_pieces[2]
    else:
        assert at_once == in_pieces
        assert (whole.unanswered, whole._memory.reserved) == (cut.unanswered, cut._memory.reserved)


@settings(max_examples=100, deadline=None)
@given(st.lists(FRAMES, max_size=20))
def test_the_server_behind_gets_only_streams_in_order_that_nobody_resets(frames: list[bytes]) -> None:
    made = connection()
    to_server, _, _ = passed(made, [GREETING + b"".join(frames)])
    opened: set[int] = set()
    ended: set[int] = set()
    others: set[int] = set()
    for kind, flags, stream, payload in to_server:
        if kind == HEADERS:
            assert stream > max(opened, default=0)
            assert flags & END_HEADERS
            opened.add(stream)
            if payload != BLOCK:
                others.add(stream)
        if kind in (HEADERS, DATA):
            assert stream in opened - ended
            if flags & END_STREAM:
                ended.add(stream)
        assert kind != RST_STREAM or stream in others
        assert kind in (DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE)
    made.close()
    assert made._memory.reserved == 0


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_are_a_fault_of_ours(data: bytes, greeted: bool) -> None:
    made = connection()
    passed(made, [(GREETING if greeted else b"") + data])
    made.close()
    assert made._memory.reserved == 0


@given(st.lists(st.tuples(st.sampled_from([":path", "a", "b"]), st.text(max_size=5)), max_size=4))
@settings(deadline=None)
def test_an_early_head_is_read_as_it_was_written(fields: list[tuple[str, str]]) -> None:
    made = connection()
    block = Encoder().encode(fields)
    made.from_client(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS | END_STREAM, 1, block))
    (_, (kind, _, _, written)) = meaning(b"".join(made.to_server).removeprefix(PREFACE))
    path = next((value for name, value in fields if name == ":path"), CHECK_PATH)
    assert kind == HEADERS
    assert (b":path", path.encode()) in Decoder().decode(written, raw=True)
