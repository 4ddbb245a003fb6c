"""CheckRequests that no Envoy would send, straight to the gRPC port: each is answered, and none is a way in.

What a message says is worked out a second time by `read_independently`, which shares nothing with the server but the
protobuf encoding itself: it walks the bytes as protobuf.dev/programming-guides/encoding says.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import grpc
import pytest
from support.gateway import TENANT_HEADER_SOURCE, AuthzServer, policy
from support.wire import delimited, varint

from authz_server.demo.envoy_config import Address
from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.checker import Checked
from authz_server.ext_authz.transport import TransportName
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Allowed, Decision, decide
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import DecisionOptions, Snapshot

pytestmark = pytest.mark.integration

SEED = 20261122
VALID = 20_000
"""Messages that say something, of which half would be let through."""
MUTATED = 45_000
"""Such messages with bits, bytes, fields or lengths changed."""
NONSENSE = 15_000
"""Random bytes, and well-formed protobuf that is no CheckRequest."""
HEAVY = 16
"""Messages of up to 4 MiB."""
IN_FLIGHT = 64
ANSWER_SECONDS = 30.0
MAX_GROWTH_BYTES = 400 * 1024 * 1024
"""Of this process, which holds the server, and the client with what it has in flight."""

CHECK = "/envoy.service.auth.v3.Authorization/Check"
MIB = 1024 * 1024

BLOCKED = ("198.51.100.0/24", "2001:db8:bad::/48")
CARVED_OUT = ("198.51.100.128/25",)
OFFICE = ("192.0.2.0/28", "2001:db8:0ff1::/64")
INSTANCES = ("queue-1", "queue-2")
SNAPSHOT: Snapshot = policy(
    blocked=BLOCKED,
    allowed=CARVED_OUT,
    offices={"/docs": OFFICE},
    pins={"acme": "queue-1", "globex": "queue-2", "hooli": "queue-1", "initech": "queue-9"},
    held=["hooli"],
    instances=INSTANCES,
    options=DecisionOptions(tenant_sources=TENANT_HEADER_SOURCE),
)

ADDRESSES = (
    # let through, except into the documentation
    *("203.0.113.7", "198.51.100.200", "::ffff:203.0.113.7", "::ffff:cb00:7107", "0:0:0:0:0:FFFF:203.0.113.7"),
    *("2001:db8::1", "2001:0DB8:0000:0000:0000:0000:0000:0001", "2001:db8:0:0::0.0.0.1", "::203.0.113.7"),
    # the office
    *("192.0.2.1", "::ffff:192.0.2.1", "2001:db8:ff1::1", "2001:DB8:0FF1:0::1"),
    # blocked
    *("198.51.100.7", "::ffff:198.51.100.7", "::FFFF:c633:6407", "0::FFFF:198.51.100.7", "0000::ffff:c633:6407"),
    *(
        "0:0:0:0:0:ffff:c633:6407",
        "2001:db8:bad::1",
        "2001:0db8:0bad:0000:0000:0000:0000:0001",
        "2001:DB8:BAD::0.0.0.1",
    ),
    # no addresses
    *("", " ", "198.51.100.007", "198.51.100", "198.51.100.7 ", " 203.0.113.7", "203.0.113.7,198.51.100.7"),
    *("203.0.113.7:80", "[2001:db8::1]", "2001:db8::1%eth0", "0xcb.0.0x71.7", "3405803783", "::ffff:203.0.113.7/128"),
    *("unknown", "203.0.113.7\0", "\uff12\uff10\uff13.0.113.7", ":::", "1:2:3:4:5:6:7:8:9", "::ffff:203.0.113.256"),
)
PATHS = (
    *(
        "/",
        "/x",
        "/x/y?z=1",
        "/docs",
        "/docs/",
        "/DOCS",
        "//docs",
        "/docs;x=1",
        "/x%2f..%2fdocs",
        "/x/../docs",
        "/%64ocs",
    ),
    *(
        "/%2564ocs",
        "\\docs",
        "/\\docs",
        "/docsx",
        "/?/docs",
        "*",
        "",
        "docs",
        "http://a/docs",
        "/\0",
        "/\u00e9",
        "/%ff/%",
    ),
    *("/" + "a" * 8191, "/" + "a" * 8192, "/?" + "a" * 65536, "/" + "a" * 65536),
)
TENANTS = (
    "acme",
    "globex",
    "hooli",
    "initech",
    "nobody",
    "Acme",
    "acme,acme",
    "acme,globex",
    "",
    "a" * 64,
    "a\u00e9",
    "*",
)
METHODS = ("GET", "POST", "OPTIONS", "PROPFIND", "", "get", "G E T")


# ---- The encoding, read without the library that the server uses -------------------------------------


class UnreadableError(Exception):
    """The bytes are no protobuf message."""


def read_varint(data: bytes, at: int, longest: int = 5) -> tuple[int, int]:
    value = 0
    for index in range(longest):
        if at + index >= len(data):
            raise UnreadableError("the bytes end within a number")
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise UnreadableError(f"a number of more than {longest} bytes")


def read_fields(data: bytes) -> dict[int, list[bytes]]:
    """The payloads of the fields of wire type 2, by number; fields of other types are stepped over."""
    fields: dict[int, list[bytes]] = {}
    groups: list[int] = []
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise UnreadableError(f"field number {number}")
        match wire_type:
            case 0:
                _, at = read_varint(data, at, longest=10)
            case 1 | 5:
                at += 8 if wire_type == 1 else 4
            case 2:
                length, start = read_varint(data, at)
                at = start + length
                if not groups and at <= len(data):
                    fields.setdefault(number, []).append(data[start:at])
            case 3:
                groups.append(number)
            case 4:
                if not groups or groups.pop() != number:
                    raise UnreadableError("the end of a group that did not begin")
            case _:
                raise UnreadableError(f"wire type {wire_type}")
        if at > len(data):
            raise UnreadableError("the bytes end within a field")
    if groups:
        raise UnreadableError("a group without end")
    return fields


def message(fields: dict[int, list[bytes]], number: int) -> dict[int, list[bytes]]:
    """A message field. Repeated, its occurrences, each of them a message, are merged."""
    merged: dict[int, list[bytes]] = {}
    for part in fields.get(number, []):
        for each, payloads in read_fields(part).items():
            merged.setdefault(each, []).extend(payloads)
    return merged


def text(fields: dict[int, list[bytes]], number: int) -> str:
    """A string field: the last occurrence, and each must be UTF-8."""
    try:
        return [payload.decode() for payload in fields.get(number, [b""])][-1]
    except UnicodeDecodeError:
        raise UnreadableError("text that is not UTF-8") from None


def read_independently(data: bytes) -> RequestAttributes:
    """What a CheckRequest says, by the field numbers of envoy/service/auth/v3. Raises UnreadableError.

    Only what the policy asks for is looked at: not the peer, and of the headers those two.
    """
    http = message(message(message(read_fields(data), 1), 4), 2)
    headers: dict[str, str] = {}
    for entry in http.get(3, []):
        try:
            item = read_fields(entry)
        except UnreadableError:
            if b"x-envoy-external-address" in entry or b"x-tenant-id" in entry:
                raise
            continue
        name = item.get(1, [b""])[-1]
        if name in (b"x-envoy-external-address", b"x-tenant-id"):
            headers[name.decode()] = text(item, 2)
    if 3 not in http:
        for entry in message(http, 13).get(1, []):
            item = read_fields(entry)
            name_text, raw = text(item, 1).lower(), item.get(3, [b""])[-1]
            value = text(item, 2) or raw.decode(errors="replace")
            headers[name_text] = f"{headers[name_text]},{value}" if name_text in headers else value
    return RequestAttributes(
        method=text(http, 2),
        host=text(http, 5),
        path=text(http, 4),
        external_address=headers.get("x-envoy-external-address"),
        headers={"x-tenant-id": headers["x-tenant-id"]} if "x-tenant-id" in headers else {},
    )


# ---- What is sent ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A message, and what it was written to say."""

    data: bytes
    attributes: RequestAttributes


def write(rng: random.Random, attributes: RequestAttributes, more_headers: Sequence[tuple[str, str]] = ()) -> Written:
    """A CheckRequest as Envoy writes it, with the fields that the server does not know; fields in any order."""
    headers = [(":authority", attributes.host), (":path", attributes.path), *more_headers, *attributes.headers.items()]
    if attributes.external_address is not None:
        headers.append(("x-envoy-external-address", attributes.external_address))
    rng.shuffle(headers)
    if rng.random() < 0.3:
        raw = b"".join(
            delimited(1, delimited(1, name) + delimited(3 if rng.random() < 0.7 else 2, value))
            for name, value in headers
        )
        written_headers = [delimited(13, raw)]
    else:
        written_headers = [delimited(3, delimited(1, name) + delimited(2, value)) for name, value in headers]
    http = [
        delimited(1, "7246374982"),
        delimited(2, attributes.method),
        delimited(4, attributes.path),
        delimited(5, attributes.host),
        delimited(6, "https"),
        delimited(10, "HTTP/1.1"),
        varint(9 << 3) + varint(rng.getrandbits(20)),
        *written_headers,
    ]
    rng.shuffle(http)
    address = delimited(1, delimited(2, attributes.peer_address or "") + varint(3 << 3) + varint(50000))
    request = delimited(1, b"\x08" + varint(1_700_000_000)) + delimited(2, b"".join(http))
    destination = delimited(1, delimited(1, delimited(2, "10.0.0.1") + varint(3 << 3) + varint(443)))
    parts = [
        delimited(1, delimited(1, address)),
        delimited(2, destination),
        delimited(4, request),
        delimited(10, delimited(1, "key") + delimited(2, "value")),
    ]
    rng.shuffle(parts)
    return Written(delimited(1, b"".join(parts)), attributes)


def some_attributes(rng: random.Random) -> RequestAttributes:
    """Mostly what is let through, else too little would show when a mutation opens something."""
    ordinary = rng.random() < 0.6
    tenant = rng.choice(TENANTS[:2] if ordinary else TENANTS) if rng.random() < 0.6 else None
    return RequestAttributes(
        method="GET" if ordinary else rng.choice(METHODS),
        host=rng.choice(("site.test", "site.test:8080", "")),
        path=rng.choice(PATHS[:3] if ordinary else PATHS),
        peer_address=rng.choice(ADDRESSES[:3]),
        external_address=rng.choice(ADDRESSES) if rng.random() < 0.98 else None,
        headers={} if tenant is None else {"x-tenant-id": tenant},
    )


def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A few changes of one kind."""
    changed = bytearray(data)
    kind = rng.randrange(9)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1) if changed else 0
        until = min(len(changed), at + rng.choice((1, 1, 2, 4, 16, 64)))
        match kind:
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.randrange(256)
            case 2:
                del changed[at:until]
            case 3:
                changed[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
            case 4:
                changed[at:at] = changed[at:until]
            case 5:
                del changed[at:]
            case 6:  # the head of one and the tail of another
                changed[at:] = other[rng.randrange(len(other) + 1) :]
            case 7:  # two messages in one are merged
                changed += other
            case _:  # another wire type for what may be a tag
                if at < len(changed):
                    changed[at] = changed[at] & ~7 | rng.randrange(8)
    return bytes(changed)


def nested(number: int, depth: int, inner: bytes = b"") -> bytes:
    for _ in range(depth):
        inner = delimited(number, inner)
    return inner


@lru_cache
def unknown_fields() -> list[bytes]:
    """Numbers of fields that nobody knows, so many that no two messages are likely to have the same."""
    rng = random.Random(SEED)
    return [varint(rng.randrange(1, 1 << 29) << 3) + varint(rng.getrandbits(64)) for _ in range(50_000)]


def nonsense(rng: random.Random) -> bytes:
    match rng.randrange(8):
        case 0:
            return b""
        case 1:
            return rng.randbytes(rng.choice((1, 2, 3, 10, 100, 1000)))
        case 2:  # all is there, but no value
            return nested(1, rng.randrange(4), delimited(4, delimited(2, delimited(3, b""))))
        case 3:
            return nested(rng.choice((1, 2, 4, 7)), rng.choice((10, 99, 101, 1000, 3000)))
        case 4:  # groups, nested and never ended
            return bytes([rng.choice((0x0B, 0x23))]) * rng.choice((1, 50, 101, 5000))
        case 5:  # many fields that nobody knows
            return b"".join(rng.choices(unknown_fields(), k=rng.choice((10, 1000))))
        case 6:  # a length that the bytes do not have
            return varint(rng.randrange(1, 20) << 3 | 2) + varint(rng.choice((1, 2**31 - 1, 2**32, 2**63, 2**64 - 1)))
        case _:  # text that is not UTF-8 in each of the fields that we read
            number = rng.choice((2, 4, 5))
            http = (
                delimited(2, "GET")
                + delimited(4, "/")
                + delimited(number, rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80")))
            )
            return delimited(1, delimited(4, delimited(2, http)))


def heavy(rng: random.Random) -> Iterator[Written]:
    """Large messages: each says in the end that it comes from a blocked address."""
    attributes = RequestAttributes("GET", "site.test", "/x", "203.0.113.7", "198.51.100.7", {"x-tenant-id": "acme"})
    many = [(f"x-{number}", "v" * 20) for number in range(1_000)]
    huge = [("cookie", "c" * (4 * MIB - 2_000))]
    tiny = [(f"{number:x}", "") for number in range(4 * MIB // 16)]
    for number in range(HEAVY):
        yield write(rng, attributes, (many, huge, many, tiny)[number % 4])


def repeated_header(count: int) -> bytes:
    """A list of headers in which the tenant is named again and again."""
    tenant = delimited(1, delimited(1, "x-tenant-id") + delimited(3, "acme"))
    address = delimited(1, delimited(1, "x-envoy-external-address") + delimited(3, "198.51.100.7"))
    http = delimited(2, "GET") + delimited(4, "/x") + delimited(13, tenant * count + address)
    return delimited(1, delimited(4, delimited(2, http)))


# ---- Sending it --------------------------------------------------------------------------------------------------


class Observer:
    """Keeps the slowest check and what went wrong inside."""

    def __init__(self) -> None:
        self.checks = 0
        self.slowest_seconds = 0.0
        self.errors: list[Exception] = []

    def __call__(self, checked: Checked) -> None:
        self.checks += 1
        self.slowest_seconds = max(self.slowest_seconds, checked.seconds)
        if checked.error is not None:
            self.errors.append(checked.error)


@dataclass(frozen=True)
class Client:
    """Sends messages, some at a time, and returns the answers."""

    address: Address

    def answer(self, data: bytes) -> ext_authz_pb2.CheckResponse:
        """One message's answer. Fails the test when it has none."""
        (answer,) = self.answers([data])
        return answer

    def answers(self, messages: Sequence[bytes]) -> list[ext_authz_pb2.CheckResponse]:
        """Their answers. Fails the test when one has none."""
        return asyncio.run(self._answers(messages))

    async def _answers(self, messages: Sequence[bytes]) -> list[ext_authz_pb2.CheckResponse]:
        answers = [ext_authz_pb2.CheckResponse() for _ in messages]
        problems: list[str] = []
        unsent = enumerate(messages)

        async def send_one_after_another(call: "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]") -> None:
            for number, data in unsent:
                try:
                    answers[number].ParseFromString(await call(data, timeout=ANSWER_SECONDS))
                except grpc.aio.AioRpcError as error:
                    problems.append(f"message {number}, {data[:200].hex()}: {error}")

        host, port = self.address
        options = [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(f"{host}:{port}", options=options) as channel:
            call = channel.unary_unary(CHECK)
            await asyncio.gather(*(send_one_after_another(call) for _ in range(min(IN_FLIGHT, len(messages)))))
        assert problems == []
        return answers


@pytest.fixture(scope="module")
def observer() -> Observer:
    return Observer()


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, observer: Observer) -> Iterator[AuthzServer]:
    transport = getattr(request, "param", TransportName.AUTO)
    with AuthzServer(SNAPSHOT, observe=observer, transport=transport) as running:
        yield running


on_every_transport = pytest.mark.parametrize(
    "server", [TransportName.ASYNCIO, TransportName.GRPCIO], indirect=True, ids=lambda name: name.value
)
"""What a message says is for the checker, how long it is for the transport too."""


@pytest.fixture(scope="module")
def client(server: AuthzServer) -> Client:
    return Client(server.address)


@pytest.fixture(autouse=True)
def nothing_else_happens(server: AuthzServer, observer: Observer, client: Client) -> Iterator[None]:
    """After each test the server still lets in whom it must, nothing was logged, nothing raised, memory is bounded."""
    before = resident_bytes()
    yield
    rng = random.Random(SEED)
    good = RequestAttributes("GET", "site.test", "/x", "203.0.113.7", "203.0.113.7", {"x-tenant-id": "acme"})
    bad = RequestAttributes("GET", "site.test", "/x", "203.0.113.7", "198.51.100.7", {"x-tenant-id": "acme"})
    assert lets_through(client.answer(write(rng, good).data))
    assert not lets_through(client.answer(write(rng, bad).data))
    assert server.faults == []
    assert observer.errors == []
    assert resident_bytes() - before < MAX_GROWTH_BYTES


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS in /proc/self/status")


def lets_through(answer: ext_authz_pb2.CheckResponse) -> bool:
    """Whether Envoy lets the request through: the status alone decides, and absent it means OK."""
    return answer.status.code == 0


def reason(answer: ext_authz_pb2.CheckResponse) -> str:
    return str(answer.dynamic_metadata.fields["reason"].string_value)


def decided(attributes: RequestAttributes) -> Decision:
    return decide(attributes, SNAPSHOT, time.time())


def test_what_a_message_says_is_decided_as_it_must_be(client: Client) -> None:
    rng = random.Random(SEED)
    written = [write(rng, some_attributes(rng)) for _ in range(VALID)]
    answers = client.answers([each.data for each in written])
    seen: Counter[str] = Counter()
    for each, answer in zip(written, answers, strict=True):
        expected = decided(each.attributes)
        assert (lets_through(answer), reason(answer)) == (isinstance(expected, Allowed), expected.reason), each
        if isinstance(expected, Allowed):
            assert answer.HasField("ok_response")
        else:
            assert answer.denied_response.status.code in (403, 503)
            assert "request_id" not in json.loads(answer.denied_response.body)
        seen[expected.reason] += 1
    assert seen.keys() == {
        *(Reason.ALLOWED, Reason.ALLOWLISTED, Reason.BLOCKED, Reason.NOT_ALLOWLISTED, Reason.NO_CLIENT_ADDRESS),
        *(Reason.INVALID_CLIENT_ADDRESS, Reason.AMBIGUOUS_TENANT, Reason.INVALID_TENANT, Reason.TENANT_HELD),
        *(Reason.UNKNOWN_INSTANCE, Reason.BAD_REQUEST, Reason.REQUEST_TOO_LARGE),
    }
    assert min(seen.values()) >= 20, "each reason often enough to mean something"


def check_against_independent_reading(messages: Sequence[bytes], answers: Sequence[ext_authz_pb2.CheckResponse]) -> int:
    """Every message that is let through says, read independently, what the policy lets through; returns how many."""
    let_through = 0
    for data, answer in zip(messages, answers, strict=True):
        if not lets_through(answer):
            assert answer.denied_response.status.code in (403, 503)
            continue
        let_through += 1
        try:
            expected: Decision | str = decided(read_independently(data))
        except UnreadableError as error:
            expected = f"unreadable: {error}"
        assert isinstance(expected, Allowed), (data.hex(), expected)
        assert answer.HasField("ok_response")
    return let_through


def test_a_mutated_message_lets_through_only_what_it_still_says(client: Client) -> None:
    rng = random.Random(SEED + 1)
    # Short ones, so that changes hit something that matters.
    basis = [each.data for each in (write(rng, some_attributes(rng)) for _ in range(2_000)) if len(each.data) < 1_000]
    messages = [mutate(rng, rng.choice(basis), rng.choice(basis)) for _ in range(MUTATED)]
    let_through = check_against_independent_reading(messages, client.answers(messages))
    assert MUTATED / 20 < let_through < MUTATED * 19 / 20, "mutations that change nothing, or all, show nothing"


def test_nonsense_is_denied(client: Client) -> None:
    rng = random.Random(SEED + 2)
    messages = [nonsense(rng) for _ in range(NONSENSE)]
    answers = client.answers(messages)
    assert {reason(answer) for answer in answers} == {Reason.BAD_REQUEST}
    assert not any(lets_through(answer) for answer in answers)


@pytest.fixture(scope="module")
def heavy_messages() -> list[Written]:
    return list(heavy(random.Random(SEED + 3)))


@on_every_transport
def test_a_large_message_is_denied_like_a_small_one(client: Client, heavy_messages: list[Written]) -> None:
    assert max(len(each.data) for each in heavy_messages) > 3.9 * MIB
    # One by one: what 64 of them take in memory while under way is not the server's doing.
    assert {reason(client.answer(each.data)) for each in heavy_messages} == {Reason.BLOCKED}


@on_every_transport
@pytest.mark.parametrize("size", [4 * MIB, 16 * MIB], ids=["4_MiB", "16_MiB"])
@pytest.mark.parametrize("byte", [0x00, 0x0A, 0x0B, 0x2A, 0xFF], ids=hex)
def test_megabytes_of_one_byte_are_denied(byte: int, size: int, client: Client) -> None:
    assert reason(client.answer(bytes([byte]) * size)) in (Reason.BAD_REQUEST, Reason.REQUEST_TOO_LARGE)


@on_every_transport
def test_a_header_repeated_over_and_over_does_not_stop_the_server(client: Client, observer: Observer) -> None:
    observer.slowest_seconds = 0.0
    answer = client.answer(repeated_header(300_000))
    assert not lets_through(answer)
    assert observer.slowest_seconds < 3.0, "in proportion to its length it takes a tenth of that"
