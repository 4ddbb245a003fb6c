"""The server's side of HTTP/2 before a real client's state machine, in memory; and hostile bytes."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import h2.events
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings
from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from authz_server.ext_authz import http2
from authz_server.ext_authz.admission import Backlog, Memory
from authz_server.ext_authz.http2 import (
    ACK,
    CHECK_PATH,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    MAX_IDLE_FRAMES,
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
    Call,
    ClientError,
    Connection,
    Heads,
    block,
    frame,
)

LIMIT = 100_000
TOO_LARGE = b"too large"
CHECK = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", CHECK_PATH),
    (":authority", "authz"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
)
WATCH_PATH = "/grpc.health.v1.Health/Watch"
WATCH = tuple((name, WATCH_PATH if name == ":path" else value) for name, value in CHECK)


def message(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(4, "big") + data


class Others:
    """Takes calls of other methods, and remembers what became of them."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple[str, bytes, str]] = {}

    def begin(self, _connection: Connection, stream: int, path: str) -> None:
        self.calls[stream] = (path, b"", "open")

    def data(self, _connection: Connection, stream: int, data: bytes) -> None:
        path, before, state = self.calls[stream]
        self.calls[stream] = (path, before + data, state)

    def end(self, _connection: Connection, stream: int) -> None:
        self.calls[stream] = (*self.calls[stream][:2], "ended")

    def reset(self, _connection: Connection, stream: int) -> None:
        self.calls[stream] = (*self.calls[stream][:2], "reset")


def make_connection(backlog: Backlog[Call], memory: Memory, others: Others) -> Connection:
    return Connection(backlog, memory, others, Heads(), max_message_bytes=LIMIT, too_large=TOO_LARGE, clock=lambda: 1.0)


@dataclass
class Line:
    """A client, and the connection under test."""

    backlog: Backlog[Call] = field(default_factory=lambda: Backlog(0.1))
    memory: Memory = field(default_factory=lambda: Memory(lambda: False))
    others: Others = field(default_factory=Others)
    carried: bool = True
    """Whether the greetings have been exchanged before the first call."""
    window: int = 65535
    """What the client takes of one answer, before it says more."""

    def __post_init__(self) -> None:
        self.client = H2Connection(H2Configuration(client_side=True))
        initial = {SettingCodes.INITIAL_WINDOW_SIZE: self.window, SettingCodes.MAX_FRAME_SIZE: 16384}
        self.client.local_settings = Settings(client=True, initial_values=initial)
        self.connection = make_connection(self.backlog, self.memory, self.others)
        self.at_client: list[h2.events.Event] = []
        self.client.initiate_connection()
        self.connection.send_settings()
        if self.carried:
            self.carry()

    def carry(self) -> None:
        """Carry bytes until there are none."""
        while True:
            outgoing = self.client.data_to_send()
            if outgoing:
                self.connection.receive(outgoing)
            answers = b"".join(self.connection.out)
            self.connection.out.clear()
            if not (outgoing or answers):
                return
            if answers:
                self.at_client += self.client.receive_data(answers)

    def call(self, data: bytes | None = b"request", *, fields: Iterable[tuple[str, str]] = CHECK) -> int:
        """Make a call, with a message that ends it unless there is none."""
        stream = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, list(fields))
        if data is not None:
            self.client.send_data(stream, message(data), end_stream=True)
        return stream

    def requests(self) -> dict[int, tuple[bytes, float | None]]:
        """The checks that wait: stream -> message and timeout."""
        groups, _ = self.backlog.take(1.0, 10_000)
        return {
            stream: (data, timeout)
            for _, calls in groups
            for connection, stream, data, timeout in calls
            if stream in connection.waiting
        }

    def answers(self) -> dict[int, tuple[bytes, bytes]]:
        """What the client was told: stream -> grpc-status and the data before it."""
        found: dict[int, tuple[bytes, bytes]] = {}
        data: dict[int, bytes] = {}
        for event in self.at_client:
            if isinstance(event, h2.events.DataReceived):
                data[event.stream_id] = data.get(event.stream_id, b"") + event.data
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                status = dict(event.headers).get(b"grpc-status")
                if status is not None:
                    found[event.stream_id] = (status, data.get(event.stream_id, b""))
        return found

    def told_to_stop(self) -> list[int]:
        """The streams that the client is to send no more of."""
        return [
            event.stream_id
            for event in self.at_client
            if isinstance(event, h2.events.StreamReset) and event.error_code == 0
        ]


WHOLE = (b"request", None)


class TestOrdinary:
    """What an honest client does."""

    @pytest.mark.parametrize("length", [0, 6, 2043, 2048, 16379, 16384, 60_000])
    def test_a_call_and_its_answer(self, length: int) -> None:
        line = Line()
        stream = line.call()
        line.carry()
        assert line.requests() == {stream: WHOLE}
        assert line.connection.unanswered == 1
        line.connection.answer(stream, bytes(length))
        line.carry()
        assert line.answers() == {stream: (b"0", message(bytes(length)))}
        assert (line.connection.unanswered, line.connection.answered, line.memory.reserved) == (0, 1, 0)

    @pytest.mark.parametrize("carried", [True, False], ids=["late", "early"])
    def test_calls_with_and_without_the_dynamic_table(self, carried: bool) -> None:
        """Envoy sends at once what is waiting, by a dynamic table that it is told of only later not to use."""
        line = Line(carried=carried)
        kinds = [(*CHECK, ("grpc-timeout", "200m")), CHECK, WATCH, (*CHECK, ("x-id", "one"))]
        streams = [line.call(fields=fields) for fields in kinds * 3]
        line.carry()
        timeouts = {stream: [0.2, None, "other", None][number % 4] for number, stream in enumerate(streams)}
        assert line.requests() == {s: (b"request", t) for s, t in timeouts.items() if t != "other"}
        assert line.others.calls == {
            s: (WATCH_PATH, message(b"request"), "ended") for s, t in timeouts.items() if t == "other"
        }

    def test_early_blocks_mean_what_the_table_says_at_that_moment(self) -> None:
        """The same bytes name another method once the table has changed."""
        line = Line(carried=False)
        encoder = Encoder()
        line.client.clear_outbound_data_buffer()
        other = "/other/Method"

        def head(stream: int, path: str) -> bytes:
            return frame(HEADERS, END_HEADERS | END_STREAM, stream, encoder.encode([(":path", path)]))

        heads = [head(1, other), head(3, other), head(5, other), head(7, CHECK_PATH), head(9, CHECK_PATH)]
        heads += [head(11, other), head(13, CHECK_PATH)]
        line.connection.receive(PREFACE + frame(SETTINGS, 0, 0, b"") + b"".join(heads))
        assert sorted(line.others.calls) == [1, 3, 5, 11]
        assert sorted(line.requests()) == [7, 9, 13]

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [("3S", 3.0), ("1H", 3600.0), ("2M", 120.0), ("5u", 5e-6), ("7n", 7e-9), ("99999999m", 99999.999)],
    )
    def test_timeouts(self, text: str, seconds: float) -> None:
        line = Line()
        streams = [line.call(fields=(*CHECK, ("grpc-timeout", text))) for _ in range(2)]
        line.carry()
        asked = line.requests()
        assert [asked[stream][1] for stream in streams] == [pytest.approx(seconds)] * 2

    @pytest.mark.parametrize("text", ["", "S", "-1S", "1.5S", "3x", "123456789S", "1S1"])
    def test_timeouts_that_are_none(self, text: str) -> None:
        line = Line()
        stream = line.call(fields=(*CHECK, ("grpc-timeout", text)))
        line.carry()
        assert line.requests() == {stream: WHOLE}

    def test_the_client_is_told_our_settings(self) -> None:
        line = Line()
        assert line.client.remote_settings[SettingCodes.HEADER_TABLE_SIZE] == 0
        assert line.client.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] == http2.STREAMS
        assert line.client.remote_settings[SettingCodes.INITIAL_WINDOW_SIZE] > LIMIT

    @pytest.mark.parametrize("length", [20_000, 60_000, LIMIT])
    def test_a_message_of_many_frames(self, length: int) -> None:
        line = Line()
        data = message(bytes(length))
        stream = line.call(None)
        for at in range(0, len(data), 16384):
            line.client.send_data(stream, data[at : at + 16384], end_stream=at + 16384 >= len(data))
            line.carry()
        assert line.requests() == {stream: (bytes(length), None)}
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
        assert line.requests() == {stream: WHOLE}
        assert line.memory.reserved == 0

    def test_messages_go_on_for_longer_than_any_window(self) -> None:
        line = Line()
        data = message(bytes(LIMIT))
        for _ in range(400):
            stream = line.call(None)
            for at in range(0, LIMIT, 16384):
                line.client.send_data(stream, data[at : at + 16384])
                line.carry()
            line.client.reset_stream(stream)
            line.carry()
        assert line.memory.reserved == 0

    @pytest.mark.parametrize("early", [0, 10])
    def test_an_answer_waits_for_the_client_s_window(self, early: int) -> None:
        line = Line(window=0)
        stream = line.call()
        if early:
            line.client.increment_flow_control_window(early, stream)
        line.carry()
        line.requests()
        line.connection.answer(stream, b"an answer of some length")
        line.carry()
        assert line.answers() == {}
        assert line.connection.unanswered == 1
        assert line.connection.unfinished_since == 1.0
        line.client.increment_flow_control_window(1, stream)
        line.carry()
        line.client.increment_flow_control_window(1000, stream)
        line.carry()
        assert line.answers() == {stream: (b"0", message(b"an answer of some length"))}
        assert (line.connection.unanswered, line.connection.unfinished_since) == (0, None)

    def test_many_answers_wait_for_the_connection_s_window(self) -> None:
        line = Line()
        streams = [line.call() for _ in range(10)]
        line.carry()
        line.requests()
        for stream in streams:
            line.connection.answer(stream, bytes(10_000))
        line.carry()
        assert 0 < len(line.answers()) < 10
        for event in list(line.at_client):
            if isinstance(event, h2.events.DataReceived):
                line.client.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
        line.carry()
        assert line.answers() == {stream: (b"0", message(bytes(10_000))) for stream in streams}

    def test_another_method_can_talk_back_and_forth(self) -> None:
        line = Line()
        stream = line.call(None, fields=WATCH)
        line.client.send_data(stream, message(b"one"))
        line.carry()
        line.connection.send_head(stream)
        line.connection.send_message(stream, b"first")
        line.carry()
        line.client.send_data(stream, message(b"two"))
        line.carry()
        assert line.others.calls == {stream: (WATCH_PATH, message(b"one") + message(b"two"), "open")}
        line.connection.finish(stream, 5, "no such thing: ü %")
        line.carry()
        assert line.answers() == {stream: (b"5", message(b"first"))}
        assert line.told_to_stop() == [stream]
        [trailers] = [event for event in line.at_client if isinstance(event, h2.events.TrailersReceived)]
        assert dict(trailers.headers)[b"grpc-message"] == b"no such thing: %C3%BC %25"
        assert (line.connection.unanswered, line.memory.reserved) == (0, 0)

    def test_another_method_can_be_cancelled(self) -> None:
        line = Line()
        stream = line.call(None, fields=WATCH)
        line.carry()
        line.client.reset_stream(stream)
        line.carry()
        assert line.others.calls == {stream: (WATCH_PATH, b"", "reset")}
        assert (line.connection.unanswered, line.memory.reserved) == (0, 0)

    @pytest.mark.parametrize("size", [2_000, 10_000, 60_000])
    def test_a_head_that_a_tracer_made_long_is_that_of_a_check(self, size: int) -> None:
        line = Line()
        stream = line.call(fields=(*CHECK, ("tracestate", "t=" + "x" * size)))
        other = line.call()
        line.carry()
        assert line.requests() == {stream: WHOLE, other: WHOLE}

    def test_pings_are_answered(self) -> None:
        line = Line()
        line.client.ping(b"12345678")
        line.carry()
        assert [e.ping_data for e in line.at_client if isinstance(e, h2.events.PingAckReceived)] == [b"12345678"]

    def test_trailers_end_a_call(self) -> None:
        line = Line()
        stream = line.call(None)
        line.client.send_data(stream, message(b"request"))
        line.client.send_headers(stream, [("x-trailer", "1")], end_stream=True)
        line.carry()
        assert line.requests() == {stream: WHOLE}


class TestHostile:
    """What a client may cost is bounded."""

    def test_a_call_that_is_reset_is_forgotten(self) -> None:
        line = Line()
        for _ in range(50):
            line.client.reset_stream(line.call())
        line.carry()
        assert line.requests() == {}
        assert line.connection.unanswered == 0

    @pytest.mark.parametrize("sent", [b"", b"\0\0", message(b"half of it")[:9]])
    def test_resets_of_incomplete_calls_give_their_memory_back(self, sent: bytes) -> None:
        line = Line()
        stream = line.call(None)
        if sent:
            line.client.send_data(stream, sent)
        line.carry()
        assert line.memory.reserved >= OPEN_STREAM_BYTES
        line.client.reset_stream(stream)
        line.carry()
        assert (line.requests(), line.memory.reserved) == ({}, 0)

    def test_a_message_that_is_too_long_is_not_kept(self) -> None:
        line = Line()
        stream = line.call(None)
        line.client.send_data(stream, message(bytes(4 * LIMIT))[:16384])
        line.carry()
        assert line.requests() == {stream: (TOO_LARGE, None)}
        line.connection.answer(stream, b"answer")
        line.carry()
        assert line.answers() == {stream: (b"0", message(b"answer"))}
        assert line.told_to_stop() == [stream]
        assert line.memory.reserved == 0

    @pytest.mark.parametrize("data", [b"", b"\0\0\0", message(b"request")[:-1]], ids=["none", "no length", "cut off"])
    def test_what_is_no_message_is_an_empty_one(self, data: bytes) -> None:
        """The checker denies it, and an RPC error might let it pass."""
        line = Line()
        stream = line.call(None)
        line.client.send_data(stream, data, end_stream=True)
        bare = line.client.get_next_available_stream_id()
        line.client.send_headers(bare, list(CHECK), end_stream=True)
        line.carry()
        assert line.requests() == {stream: (b"", None), bare: (b"", None)}

    def test_a_check_of_two_messages_is_an_empty_one(self) -> None:
        line = Line()
        stream = line.call(None)
        line.client.send_data(stream, message(b"request") + b"more")
        line.carry()
        assert line.requests() == {stream: (b"", None)}
        assert line.memory.reserved == 0

    def test_no_memory_for_a_head_that_stands_alone_is_unavailable(self) -> None:
        line = Line(memory=Memory(lambda: False, max_bytes=OPEN_STREAM_BYTES - 1))
        stream, whole = line.call(None), line.call()
        line.carry()
        assert line.requests() == {whole: WHOLE}
        assert line.answers() == {stream: (b"14", b"")}
        assert (line.backlog.shed, line.told_to_stop()) == (1, [stream])

    def test_no_memory_for_the_rest_of_a_message_ends_it(self) -> None:
        line = Line(memory=Memory(lambda: False, max_bytes=OPEN_STREAM_BYTES + 20_000))
        stream = line.call(None)
        line.client.send_data(stream, message(bytes(30_000))[:100])
        line.carry()
        assert line.answers() == {stream: (b"14", b"")}
        assert (line.memory.reserved, line.backlog.shed) == (0, 1)

    def test_more_than_the_backlog_takes_is_shed_at_once(self) -> None:
        line = Line()
        known = line.call()
        line.carry()
        line.requests()
        line.backlog.room = 0
        whole, unfinished = line.call(), line.call(None)
        health = line.call(fields=WATCH)
        line.carry()
        assert line.answers() == {whole: (b"14", b""), unfinished: (b"14", b"")}
        assert line.connection.waiting == {known}
        assert line.others.calls[health][2] == "ended"
        assert line.backlog.shed == 2

    @pytest.mark.parametrize("crowded", [False, True], ids=["no-room", "too-many-on-this-connection"])
    def test_heads_in_a_row_are_shed_and_the_messages_after_them_are_dropped(self, crowded: bool) -> None:
        line = Line()
        known = line.call()
        line.carry()
        line.requests()
        if crowded:
            line.connection.waiting.update(range(1, 2 * MAX_UNANSWERED, 2))
        else:
            line.backlog.room = 0
        credit = line.connection._credit
        shed = [line.call(None) for _ in range(5)]
        shed += [line.call(None, fields=(*CHECK, ("grpc-timeout", "1S"))), line.call(None)]
        after = [frame(DATA, END_STREAM, stream, message(b"request")) for stream in shed]
        line.connection.receive(line.client.data_to_send() + b"".join(after))
        assert line.connection._credit == credit + len(after) * len(message(b"request"))
        line.carry()
        assert line.answers() == dict.fromkeys(shed, (b"14", b""))
        assert line.told_to_stop() == shed
        assert (line.backlog.shed, line.connection.last_stream) == (len(shed), shed[-1])
        line.connection.waiting.intersection_update({known})
        line.backlog.open(1.0)
        later = line.call()
        line.carry()
        assert line.requests() == {later: WHOLE}

    def test_a_message_that_is_cut_off_when_there_is_no_room_is_shed_and_forgotten(self) -> None:
        line = Line()
        stream = line.call(None)
        line.carry()
        line.backlog.room = 0
        line.client.send_data(stream, message(bytes(4 * LIMIT))[:16384])
        line.carry()
        assert line.answers() == {stream: (b"14", b"")}
        assert line.told_to_stop() == [stream]
        assert (line.connection.unanswered, line.memory.reserved) == (0, 0)
        assert not line.connection._unended

    def test_one_connection_has_a_bounded_number_of_unanswered_calls(self) -> None:
        line = Line()
        line.carry()
        calls = [
            frame(HEADERS, END_HEADERS, 2 * number + 1, BLOCK) + frame(DATA, END_STREAM, 2 * number + 1, message(b"r"))
            for number in range(MAX_UNANSWERED + 10)
        ]
        line.connection.receive(b"".join(calls))
        assert len(line.requests()) == MAX_UNANSWERED
        assert line.backlog.shed == 10

    def test_another_method_may_not_send_much(self) -> None:
        line = Line()
        stream = line.call(None, fields=WATCH)
        for _ in range(5):
            line.client.send_data(stream, bytes(16000))
        line.carry()
        assert line.others.calls[stream][2] == "reset"
        assert (line.connection.unanswered, line.memory.reserved) == (0, 0)

    def test_nobody_waits_for_ever_for_a_client_that_does_not_open_its_window(self) -> None:
        line = Line(window=0)
        stream = line.call(fields=WATCH)
        line.carry()
        line.connection.send_head(stream)
        for _ in range(20):
            line.connection.send_message(stream, bytes(100_000))
        line.carry()
        assert line.others.calls[stream][2] == "reset"
        assert line.connection.unanswered == 0


GREETING = PREFACE + frame(SETTINGS, 0, 0, b"") + frame(SETTINGS, ACK, 0, b"")
BLOCK = block(*CHECK)


def connection() -> Connection:
    return make_connection(Backlog(0.1), Memory(lambda: False), Others())


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n", "not HTTP/2", id="HTTP/1.1"),
        pytest.param(GREETING + b"\x00\x40\x01" + bytes(6), "a frame of 16385 bytes", id="frame too long"),
        pytest.param(GREETING + frame(HEADERS, END_HEADERS, 2, BLOCK), "stream 2", id="even stream"),
        pytest.param(
            GREETING
            + frame(HEADERS, END_HEADERS | END_STREAM, 1, BLOCK)  # known from here on
            + frame(HEADERS, END_HEADERS, 1 << 31 | 3, BLOCK)
            + frame(DATA, END_STREAM, 1 << 31 | 3, message(b"request")),
            "a call on stream 2147483651",
            id="reserved bit",
        ),
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
        pytest.param(GREETING + frame(PING, 0, 0, bytes(8)) * (MAX_IDLE_FRAMES + 1), "no call", id="pings"),
        pytest.param(GREETING + frame(DATA, 0, 1, b"") * (MAX_IDLE_FRAMES + 1), "no call", id="empty data"),
        pytest.param(GREETING + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), "window is too large", id="window"),
        pytest.param(
            GREETING + frame(HEADERS, END_HEADERS, 1, BLOCK) + frame(WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff"),
            "stream's window is too large",
            id="stream's window",
        ),
        pytest.param(
            PREFACE + frame(SETTINGS, 0, 0, b"\0\4\x80\0\0\0"), "a window of 2147483648 bytes", id="initial window"
        ),
        pytest.param(
            PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, 0, 1, bytes(16384)) + frame(CONTINUATION, 4, 1, b"a"),
            "a long header block before",
            id="early and long",
        ),
    ],
)
def test_breaking_the_rules_ends_the_connection(data: bytes, problem: str) -> None:
    with pytest.raises(ClientError, match=problem):
        connection().receive(data)


def test_resets_of_calls_that_are_answered_break_no_rule() -> None:
    """Outside clients that abort their requests have Envoy send as many as they like."""
    connection().receive(GREETING + frame(RST_STREAM, 0, 1, bytes(4)) * (2 * MAX_IDLE_FRAMES))


def test_windows_that_answers_made_necessary_break_no_rule() -> None:
    """C-core opens the windows of the connection and of the stream after each answer, however many calls a second."""
    backlog: Backlog[Call] = Backlog(0.1)
    made = make_connection(backlog, Memory(lambda: False), Others())
    made.receive(GREETING)
    opened = frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 2
    for number in range(MAX_IDLE_FRAMES):
        stream = 2 * number + 1
        made.receive(frame(HEADERS, END_HEADERS, stream, BLOCK) + frame(DATA, END_STREAM, stream, message(b"request")))
        backlog.take(1.0, 1)
        made.answer(stream, b"")
        made.receive(opened)
    assert made.answered == MAX_IDLE_FRAMES
    made.rest()
    with pytest.raises(ClientError, match="no call"):
        made.receive(opened * MAX_IDLE_FRAMES)


def test_settings_that_are_never_acknowledged_end_the_connection() -> None:
    calls = [
        frame(HEADERS, END_HEADERS | END_STREAM, 2 * number + 1, block(*CHECK, ("x-number", str(number))))
        for number in range(2_000)
    ]
    with pytest.raises(ClientError, match="not acknowledged"):
        connection().receive(PREFACE + frame(SETTINGS, 0, 0, b"") + b"".join(calls))


def test_a_head_that_goes_on_and_on_is_not_kept() -> None:
    made = connection()
    made.receive(GREETING + frame(HEADERS, 0, 1, b""))
    for _ in range(1000):
        made.receive(frame(CONTINUATION, 0, 1, bytes(16384)))
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
        st.sampled_from([BLOCK, block(*WATCH), BLOCK[:20], bytes(1100), b""]),
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
    st.builds(
        lambda streams, cut: b"".join(
            frame(HEADERS, END_HEADERS, stream, BLOCK) + frame(DATA, END_STREAM, stream, message(b"abc"))
            for stream in streams
        )[cut:],
        st.sampled_from([(1, 3, 5), (3, 5, 7, 9), (5, 5), (7, 3), (1, 2, 3)]),
        st.sampled_from([0, 0, 0, 9]),
    ),
)


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def outcome(made: Connection, parts: list[bytes]) -> tuple[list[tuple[int, bytes]], set[int], str]:
    """The checks that wait, the streams that were answered, and what ended it all."""
    problem = ""
    try:
        for part in parts:
            made.receive(part)
    except ClientError as error:
        problem = str(error)
    groups, _ = made._backlog.take(1.0, 10_000)
    waiting = [(stream, data) for _, calls in groups for _, stream, data, _ in calls if stream in made.waiting]
    return waiting, set(streams_answered(b"".join(made.out))), problem


def streams_answered(sent: bytes) -> Iterable[int]:
    """The streams that whole, well-formed frames of ours end."""
    at = 0
    while at < len(sent):
        length = int.from_bytes(sent[at : at + 3], "big")
        kind, flags, stream = sent[at + 3], sent[at + 4], int.from_bytes(sent[at + 5 : at + 9], "big")
        assert at + 9 + length <= len(sent)
        assert kind in (DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE)
        if kind == HEADERS and flags & END_STREAM:
            yield stream
        at += 9 + length


@settings(max_examples=200, deadline=None)
@given(st.lists(FRAMES, max_size=12), st.lists(st.integers(0, 10**6), max_size=8), st.booleans())
def test_however_the_bytes_are_cut_the_outcome_is_the_same(frames: list[bytes], cuts: list[int], full: bool) -> None:
    data = GREETING + b"".join(frames)
    whole, cut = connection(), connection()
    if full:
        whole._backlog.room = cut._backlog.room = 0
    at_once, in_pieces = outcome(whole, [data]), outcome(cut, pieces(data, cuts))
    assert at_once[2] == in_pieces[2]
    if not at_once[2]:  # what came before a fault may have been taken note of already, or not
        assert at_once == in_pieces
        assert (whole.unanswered, whole._memory.reserved) == (cut.unanswered, cut._memory.reserved)
    for made in (whole, cut):
        made.close()
        assert (made.unanswered, made._memory.reserved) == (0, 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(FRAMES, max_size=20))
def test_each_call_is_answered_once_and_nothing_is_left(frames: list[bytes]) -> None:
    made = connection()
    waiting, answered, _ = outcome(made, [GREETING + b"".join(frames)])
    made.out.clear()
    for stream, _ in waiting:
        assert stream not in answered
        made.answer(stream, b"answer")
        made.answer(stream, b"answer")
    assert sorted(streams_answered(b"".join(made.out))) == sorted({stream for stream, _ in waiting})
    assert not made.waiting


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_are_a_fault_of_ours(data: bytes, greeted: bool) -> None:
    made = connection()
    outcome(made, [(GREETING if greeted else b"") + data])
    made.close()
    assert made._memory.reserved == 0
