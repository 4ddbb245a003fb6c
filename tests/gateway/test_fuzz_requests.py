"""HTTP requests that no honest client would send, through a real Envoy that fails open: none gets past the policy.

Failing open is what makes this a test: whatever makes the server err, hang or crash lets the request through.
"""

import asyncio
import posixpath
import random
import re
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest
from support.gateway import TENANT_HEADER_SOURCE, AuthzServer, ask, policy

from authz_server.demo.envoy import Envoy
from authz_server.demo.envoy_config import Address, GatewayOptions, gateway_config
from authz_server.demo.upstreams import Upstreams
from authz_server.ext_authz.checker import Checked
from authz_server.policy.snapshot import DecisionOptions

pytestmark = pytest.mark.integration

SEED = 20261122
HOSTILE = 9_000
"""Well-formed requests of a blocked client, full of forged, repeated, huge and senseless parts."""
MALFORMED = 3_000
"""Bytes of a blocked client that are no HTTP/1.1 request, or two that look like one."""
HTTP_2 = 2_000
"""The like as HTTP/2 streams."""
PATHS = 4_000
"""Requests for spellings of a path that the client may not see."""
ORDINARY = 2_000
"""Requests that must be let through."""
WORKERS = 16
ANSWER_SECONDS = 20.0
SILENT_SECONDS = 0.5
"""After an error in HTTP/2 Envoy says nothing more, and hangs up only after a second."""
MAX_ENVOY_BYTES = 600 * 1024 * 1024

BLOCKED_CLIENT = "127.0.0.66"
OFFICE_CLIENT = "127.0.0.9"
OTHER_CLIENT = "127.0.0.10"
INSTANCES = ("queue-1", "queue-2", "queue-3")
SNAPSHOT = policy(
    blocked=["127.0.0.64/26"],
    allowed=["127.0.0.9/32"],
    offices={"/docs": [f"{OFFICE_CLIENT}/32"]},
    pins={"acme": "queue-1", "globex": "queue-2"},
    instances=INSTANCES,
    options=DecisionOptions(tenant_sources=TENANT_HEADER_SOURCE),
)

SPELLINGS = (
    *("127.0.0.9", "::ffff:127.0.0.9", "::ffff:7f00:9", "0:0:0:0:0:ffff:127.0.0.9", "::FFFF:7F00:0009", "::127.0.0.9"),
    *("127.9", "0x7f.0.0.9", "0177.0.0.011", "2130706441", "127.0.0.009", "[::ffff:127.0.0.9]", "127.0.0.9:80"),
    *("::1", "::", "fe80::1%lo", "2001:db8::1", "1:2:3:4:5:6:7:8:9", ":::", "127.0.0.9, 127.0.0.9", "unknown", ""),
    *(
        "2001:0DB8:0000:0000:0000:0000:0000:0001",
        "64:ff9b::127.0.0.9",
        "2002:7f00:9::",
        "127.0.0.9/32",
        "\xff\xfe",
        "%31",
    ),
)
ADDRESS_HEADERS = (
    *("x-envoy-external-address", "X-Envoy-External-Address", "x-forwarded-for", "X-FORWARDED-FOR", "forwarded"),
    *("x-real-ip", "true-client-ip", "cf-connecting-ip", "x-envoy-internal", "x-client-ip", "x-envoy-peer-metadata"),
)
OUR_HEADERS = (
    "x-tenant-id",
    "X-Tenant-Id",
    "x-tenant-instance",
    "X-TENANT-INSTANCE",
    "x_tenant_instance",
    "x-request-id",
)
OUR_VALUES = ("acme", "globex", "queue-1", "queue-3", "acme,globex", "", "\xff", "a" * 300, "Acme", "*", "../acme")
OTHER_HEADERS = (
    ("te", "trailers"),
    ("connection", "x-envoy-external-address, x-tenant-id"),
    ("cookie", "a=b; " * 50),
    ("x-any", "\x80\xff\xc3"),
    ("x-any", "\xf0\x9f\x98\x80"),
    ("upgrade", "websocket"),
    ("expect", "100-continue"),
    ("x-envoy-original-path", "/healthz"),
    ("x-envoy-decorator-operation", "x"),
    ("x-envoy-upstream-rq-timeout-ms", "1"),
    ("x-envoy-retry-on", "5xx"),
    ("x-http-method-override", "GET"),
    ("content-type", "application/grpc"),
    ("grpc-timeout", "1n"),
    ("authorization", "Bearer " + "x" * 500),
)
TARGETS = (
    *(
        "/",
        "/x",
        "/docs",
        "//docs",
        "/docs;x=1",
        "/x%2f..%2fdocs",
        "/%ff%fe",
        "http://site.test/x",
        "/..",
        "/%2e%2e/%2e",
    ),
    *("http://other.test:99/docs?x", "/?tenant_id=acme&tenant_id=globex", "/x?" + "&" * 2000),
    *(
        "/" + "a" * 8191,
        "/" + "a" * 8192,
        "/" + "a" * 65_536,
        "/?" + "q" * 65_536,
        "/" + "%2f" * 2_000,
        "/" + "/" * 8_000,
    ),
)
REFUSED_TARGETS = ("/%00", "/\xff\xc3", "/\xc3\xa9", "*", "/x#y", "x", "//", "http://", "?")
"""Mostly, by Envoy itself."""
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND", "TRACE")
REFUSED_METHODS = ("PRI", "get", "X-Y_Z", "CONNECT")
"""By Envoy itself."""
HOSTS = (
    "site.test",
    "SITE.test:8080",
    "acme.example.test",
    "",
    "[::1]",
    "127.0.0.9",
    "a" * 300 + ".test",
    "site.test@evil",
)
THOUSAND_HEADERS = "".join(f"x-{number}: {number}\r\n" for number in range(1_000))


@dataclass
class Observer:
    """Counts the checks, and keeps what went wrong inside."""

    checks: int = 0
    errors: tuple[Exception, ...] = ()

    def __call__(self, checked: Checked) -> None:
        self.checks += 1
        if checked.error is not None:
            self.errors += (checked.error,)


@pytest.fixture(scope="module")
def observer() -> Observer:
    return Observer()


@pytest.fixture(scope="module")
def server(observer: Observer) -> Iterator[AuthzServer]:
    with AuthzServer(SNAPSHOT, observe=observer) as running:
        yield running


@pytest.fixture(scope="module")
def envoy(server: AuthzServer, running_upstreams: Upstreams) -> Iterator[Envoy]:
    options = GatewayOptions(
        authz=server.address,
        instances=running_upstreams.addresses,
        failure_mode_allow=True,
        # This is about wrong answers and no answers; the test machine's slow ones would only look like them.
        timeout_seconds=ANSWER_SECONDS,
        max_request_headers_kb=1_024,
        max_request_headers_count=2_000,
    )
    with Envoy(gateway_config(options)) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_else_happens(server: AuthzServer, observer: Observer, envoy: Envoy, upstreams: Upstreams) -> Iterator[None]:
    """After each test all still work, every check was answered, nothing was logged or raised, memory is bounded."""
    yield
    assert ask(envoy.address, headers=[("x-tenant-id", "acme")], source=OTHER_CLIENT).instance == "queue-1"
    assert ask(envoy.address, headers=[("x-tenant-id", "acme")], source=BLOCKED_CLIENT).status == 403
    stats = envoy.stats("http.gateway.ext_authz.")
    assert stats["http.gateway.ext_authz.error"] == 0
    assert stats["http.gateway.ext_authz.failure_mode_allowed"] == 0
    assert stats["http.gateway.ext_authz.invalid"] == 0
    assert server.faults == []
    assert observer.errors == ()
    assert envoy.running
    assert resident_bytes(envoy.pid) < MAX_ENVOY_BYTES


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmRSS of {pid}")


# ---- A client that sends bytes -----------------------------------------------------------------------------------


class Connection:
    """A connection to Envoy that is opened anew whenever Envoy has closed it."""

    def __init__(self, address: Address, source: str) -> None:
        self._address = address
        self._source = source
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                *self._address, local_addr=(self._source, 0), limit=2 * 1024 * 1024
            )
        return self._streams

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def answer(self, request: bytes) -> tuple[int, bytes]:
        """Status and head of the answer to one request; status 0 when the connection was closed without one.

        Raises TimeoutError when there is neither.
        """
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await self._open()
            try:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                while head.startswith(b"HTTP/1.1 1"):  # 100 Continue
                    head = await reader.readuntil(b"\r\n\r\n")
                status = int(head[9:12])
                if length := re.search(rb"(?i)\r\ncontent-length: (\d+)", head):
                    await reader.readexactly(int(length[1]))
            except (ConnectionError, asyncio.IncompleteReadError):
                await self.close()
                return 0, b""
            if b"\r\nconnection: close" in head.lower():
                await self.close()
            return status, head

    async def everything(self, data: bytes, is_over: Callable[[bytes], bool]) -> bytes:
        """All that comes back until it is over, Envoy hangs up, or is silent for some time."""
        reader, writer = await self._open()
        received = b""
        try:
            writer.write(data)
            while not is_over(received):
                chunk = await asyncio.wait_for(reader.read(65_536), SILENT_SECONDS)
                if not chunk:
                    break
                received += chunk
        except (ConnectionError, TimeoutError):
            pass
        await self.close()
        return received


LET_IN = b"x-served-by"
"""In each answer of an instance, and in no other."""

GRPC = {7: 403, 12: 404, 13: 400}
"""gRPC's status -> the HTTP status that Envoy makes it from."""

Send = Callable[[Connection, bytes], Awaitable[object]]


def in_parallel(address: Address, source: str, requests: Sequence[bytes], send: Send) -> None:
    """Send all requests over a few connections."""

    async def worker(remaining: Iterator[bytes]) -> None:
        connection = Connection(address, source)
        try:
            for request in remaining:
                await send(connection, request)
        finally:
            await connection.close()

    async def all_workers() -> None:
        remaining = iter(requests)
        await asyncio.gather(*(worker(remaining) for _ in range(WORKERS)))

    asyncio.run(all_workers())


# ---- What is sent ------------------------------------------------------------------------------------------------


def some_headers(rng: random.Random) -> list[tuple[str, str]]:
    headers = [(rng.choice(ADDRESS_HEADERS), rng.choice(SPELLINGS)) for _ in range(rng.randrange(4))]
    headers += [(rng.choice(OUR_HEADERS), rng.choice(OUR_VALUES)) for _ in range(rng.randrange(3))]
    headers += [rng.choice(OTHER_HEADERS) for _ in range(rng.randrange(3))]
    if headers and rng.random() < 0.1:
        headers += [rng.choice(headers)] * rng.choice((1, 2, 50))
    rng.shuffle(headers)
    return headers


def some_target(rng: random.Random) -> str:
    match rng.randrange(20):
        case 0:
            return rng.choice(REFUSED_TARGETS)
        case 1 | 2 | 3 | 4 | 5:
            return "/" + "".join(rng.choice("/.%;\\?&=ad2fFeE5c~+:@") for _ in range(rng.randrange(40)))
        case _:
            return rng.choice(TARGETS)


def some_method(rng: random.Random) -> str:
    return rng.choice(REFUSED_METHODS if rng.random() < 0.05 else METHODS)


def hostile_request(rng: random.Random) -> bytes:
    head = f"{some_method(rng)} {some_target(rng)} HTTP/1.1\r\nHost: {rng.choice(HOSTS[:3])}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in some_headers(rng))
    if rng.random() < 0.02:
        head += THOUSAND_HEADERS
    body = "x" * rng.choice((0, 1, 1000)) if rng.random() < 0.2 else ""
    if body:
        head += f"content-length: {len(body)}\r\n"
    return f"{head}\r\n{body}".encode("latin-1")


LAST = b"GET /last HTTP/1.1\r\nHost: site.test\r\nConnection: close\r\n\r\n"


def malformed_request(rng: random.Random) -> bytes:
    inner = b"GET /inner HTTP/1.1\r\nHost: site.test\r\nx-envoy-external-address: 127.0.0.9\r\n\r\n"
    plain = bytearray(hostile_request(rng)[:2_000])
    match rng.randrange(9):
        case 0:  # two lengths, or a length and chunks: a second request within the first
            first = rng.choice(
                (b"Content-Length: 0", b"Content-Length: %d" % len(inner), b"Transfer-Encoding: chunked")
            )
            second = rng.choice((b"Content-Length: 7", b"Transfer-Encoding: xchunked", b"Transfer-Encoding : chunked"))
            data = b"POST /x HTTP/1.1\r\nHost: a\r\n%b\r\n%b\r\n\r\n0\r\n\r\n%b" % (first, second, inner)
        case 1:
            data = rng.randbytes(rng.choice((1, 10, 1000)))
        case 2:
            for _ in range(rng.choice((1, 3, 10))):
                plain[rng.randrange(len(plain))] = rng.randrange(256)
            data = bytes(plain)
        case 3:
            data = bytes(plain[: rng.randrange(len(plain))])
        case 4:  # folded headers, bare CR and LF, white space where there is none
            name = rng.choice((b"x-envoy-external-address", b"x-tenant-instance"))
            gap = rng.choice((b":\r\n ", b" : ", b":\n", b":\t", b":\x0b", b"\x00:", b":\r", b"\r\n:", b": \x00"))
            data = b"GET /x HTTP/1.1\r\nHost: a\r\n" + name + gap + b"127.0.0.9\r\n\r\n"
        case 5:
            version = rng.choice(
                (b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.2", b"", b"HTTP/1.1 HTTP/1.1", b"ICY/1.1")
            )
            data = b"GET /x " + version + b"\r\nHost: a\r\n\r\n"
        case 6:  # no Host, several, or a wrong one
            hosts = rng.choice(
                (b"", b"Host: a\r\nHost: b\r\n", *(b"Host: %b\r\n" % host.encode() for host in HOSTS[3:]))
            )
            data = b"GET /x HTTP/1.1\r\n" + hosts + b"\r\n"
        case 7:  # chunks that are none
            chunk = rng.choice(
                (b"ffffffffffffffff\r\n", b"-1\r\n", b"5;a=b\r\nhello\r\n0\r\n\r\n", b"0\r\nx-tenant-id: a\r\n\r\n")
            )
            data = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + inner
        case _:  # many requests at once
            data = inner * rng.choice((2, 20))
    return data + LAST


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing and Huffman coding (RFC 7541, section 6.2.2)."""

    def string(data: bytes) -> bytes:
        length = len(data)
        if length < 127:
            return bytes([length]) + data
        out, length = bytearray([127]), length - 127
        while length > 127:
            out.append(length & 127 | 128)
            length >>= 7
        return bytes([*out, length]) + data

    return b"\0" + string(name) + string(value)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA_FRAME, HEADERS_FRAME, RESET_FRAME, SETTINGS_FRAME, GO_AWAY_FRAME = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4
MAX_FRAME = 16_384
STREAMS = 5
"""In one connection."""


def http_2_fields(rng: random.Random) -> list[tuple[bytes, bytes]]:
    return [
        (b":method", some_method(rng).encode()),
        (b":path", some_target(rng)[:8_000].encode("latin-1")),
        (b":scheme", rng.choice((b"http", b"https"))),
        (b":authority", rng.choice(HOSTS[:3]).encode()),
        *((name.lower().encode(), value.encode("latin-1")) for name, value in some_headers(rng)),
    ]


def is_proper(fields: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether Envoy reads on after these fields: it hangs up on a malformed request and forgets those before it."""
    hop_by_hop = {b"connection", b"upgrade", b"expect", b"te", b"x_tenant_instance"}
    readable = all(re.fullmatch(rb"[!-~]([ -~]*[!-~])?", value) for _, value in fields)
    names = {name for name, _ in fields}
    return readable and not hop_by_hop & names and fields[0][1].decode() in METHODS and fields[1][1].startswith(b"/")


def malformed_fields(rng: random.Random, fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    match rng.randrange(7):
        case 0:  # a pseudo-header twice
            return [rng.choice(fields[:4]), *fields]
        case 1:  # a pseudo-header after the others
            return [*fields, (b":path", b"/other")]
        case 2:
            return rng.sample(fields, len(fields) - 1)
        case 3:  # upper case is malformed in HTTP/2
            return [*fields, (b"X-Tenant-Instance", b"queue-3")]
        case 4:
            return [*fields, (b"host", b"other.test"), (b"host", b"third.test")]
        case 5:
            return [*fields, (b"x-tenant-instance", b"queue-3\r\nx-envoy-external-address: 127.0.0.9")]
        case _:
            return [*fields, (b"connection", b"close"), (b"transfer-encoding", b"chunked")]


def http_2_connection(rng: random.Random) -> bytes:
    """A connection with a few streams. In some the last one is malformed, for which Envoy may hang up on all."""
    out = PREFACE + frame(SETTINGS_FRAME, 0, 0, b"")
    malformed = STREAMS - 1 if rng.random() < 0.3 else None
    for number in range(STREAMS):
        fields = http_2_fields(rng)
        if number == malformed:
            fields = malformed_fields(rng, fields)
        else:
            while not is_proper(fields):
                fields = http_2_fields(rng)
        block = b"".join(literal(name, value) for name, value in fields)[:MAX_FRAME]
        if number == malformed and rng.random() < 0.2:
            block = rng.randbytes(50)
        out += frame(HEADERS_FRAME, END_STREAM | END_HEADERS, 2 * number + 1, block)
    return out


def http_2_is_over(received: bytes) -> bool:
    """Whether all streams have ended, or Envoy has said that it will hang up."""
    ended = at = 0
    while at + 9 <= len(received):
        length, kind, flags = int.from_bytes(received[at : at + 3], "big"), received[at + 3], received[at + 4]
        at += 9 + length
        if kind == GO_AWAY_FRAME:
            return True
        if kind == RESET_FRAME or (kind in (DATA_FRAME, HEADERS_FRAME) and flags & END_STREAM):
            ended += at <= len(received)
    return ended >= STREAMS


def http_1_is_over(received: bytes) -> bool:
    """Whether Envoy has said that it will hang up."""
    return b"connection: close" in received


# ---- Independent readings of a path ------------------------------------------------------------------------------


def merged(path: str) -> str:
    return re.sub("/+", "/", path)


def without_parameters(path: str) -> str:
    return re.sub(";[^/]*", "", path)


def resolved(path: str) -> str:
    return posixpath.normpath(path)


BACKENDS: dict[str, Callable[[str], str]] = {
    "as it is": lambda path: path,
    "uvicorn, gunicorn": unquote,
    "nginx": lambda path: resolved(merged(unquote(path))),
    "nginx before another nginx": lambda path: resolved(merged(unquote(resolved(merged(unquote(path)))))),
    "nginx that hands on the raw path to a decoding application": lambda path: unquote(unquote(path)),
    "Tomcat, Jetty": lambda path: resolved(merged(unquote(without_parameters(path)))),
    "Tomcat that takes backslashes": lambda path: resolved(
        merged(unquote(without_parameters(path)).replace("\\", "/"))
    ),
    "IIS": lambda path: resolved(merged(unquote(path).replace("\\", "/"))).lower(),
    "Express": lambda path: path.lower(),
    "Go": lambda path: resolved(unquote(path)),
    "Apache that keeps encoded slashes": lambda path: resolved(unquote(re.sub("(?i)%2f", "%252f", path))),
    "Rails, WSGI with parameters": lambda path: without_parameters(merged(unquote(path))),
}


def is_documentation(path: str) -> bool:
    return path.rstrip("/") == "/docs" or path.startswith("/docs/")


def some_path(rng: random.Random) -> str:
    """Something that may be the documentation to somebody."""
    word = rng.choice(
        ("docs", "docs", "docs", "%64ocs", "d%6Fcs", "DOCS", "dOcs", "%2564ocs", "doc%73", "docsx", "doc")
    )
    slash = ("/", "/", "/", "//", "%2f", "%2F", "%252f", "\\", "%5c", "%255C", "/./", "/%2e/", ";/", "/;a/", ";a=b/")
    up = (
        "/x/../",
        "/x/%2e%2e/",
        "/x/..;/",
        "/x%2f..%2f",
        "/x/.%2E/",
        "\\x\\..\\",
        "/x;y/..;z/",
        "/docs/../",
        "/..%252f",
        "/x/..%5c",
    )
    before = "".join(rng.choice(slash + up) for _ in range(rng.choice((0, 0, 1, 1, 2, 3))))
    after = "".join(
        rng.choice((*slash, *up, "a", ";v=1", "?q", "%00", "%20", ".", "%23", "%3f"))
        for _ in range(rng.choice((0, 1, 2)))
    )
    return "/" + before.removeprefix("/") + word + after


# ---- The tests ---------------------------------------------------------------------------------------------------


def test_a_blocked_client_gets_nowhere_whatever_it_sends(
    envoy: Envoy, observer: Observer, upstreams: Upstreams
) -> None:
    rng = random.Random(SEED)
    statuses: Counter[int] = Counter()
    let_in: list[bytes] = []
    checks = observer.checks

    async def send(connection: Connection, request: bytes) -> None:
        status, head = await connection.answer(request)
        # What calls itself gRPC gets Envoy's own answers and ours as gRPC has them: 200, and the truth in a header.
        as_grpc = re.search(rb"\r\ngrpc-status: (\d+)\r\n", head)
        statuses[GRPC[int(as_grpc[1])] if as_grpc else status] += 1
        if LET_IN in head:
            let_in.append(request)

    in_parallel(envoy.address, BLOCKED_CLIENT, [hostile_request(rng) for _ in range(HOSTILE)], send)
    assert let_in == []
    assert upstreams.arrivals() == []
    assert statuses.keys() <= {400, 403, 404, 0}, "400, 404 and hanging up are Envoy's own"
    assert statuses[403] > HOSTILE / 2, f"most must reach the check: {statuses}"
    assert observer.checks - checks >= statuses[403]


def test_a_blocked_client_gets_nowhere_by_what_is_no_request(envoy: Envoy, upstreams: Upstreams) -> None:
    rng = random.Random(SEED + 1)
    statuses: Counter[int] = Counter()
    let_in: list[bytes] = []

    async def send(connection: Connection, data: bytes) -> None:
        received = await connection.everything(data, http_1_is_over)
        statuses.update(int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received) or [b"0"])
        if LET_IN in received:
            let_in.append(data)

    in_parallel(envoy.address, BLOCKED_CLIENT, [malformed_request(rng) for _ in range(MALFORMED)], send)
    assert let_in == []
    assert upstreams.arrivals() == []
    assert statuses[403] > MALFORMED / 10, f"some must reach the check: {statuses}"
    assert statuses[400] > MALFORMED / 10, f"some must be malformed: {statuses}"


def test_a_blocked_client_gets_nowhere_over_http_2(envoy: Envoy, observer: Observer, upstreams: Upstreams) -> None:
    rng = random.Random(SEED + 2)
    checks = observer.checks

    async def send(connection: Connection, data: bytes) -> None:
        await connection.everything(data, http_2_is_over)

    in_parallel(envoy.address, BLOCKED_CLIENT, [http_2_connection(rng) for _ in range(HTTP_2 // STREAMS)], send)
    assert upstreams.arrivals() == []
    assert observer.checks - checks > HTTP_2 / 4, "many must reach the check"


def test_no_spelling_of_a_path_slips_past_its_restriction(envoy: Envoy, upstreams: Upstreams) -> None:
    rng = random.Random(SEED + 3)
    paths = [some_path(rng) for _ in range(PATHS)]
    statuses: Counter[int] = Counter()

    async def send(connection: Connection, request: bytes) -> None:
        status, _ = await connection.answer(request)
        statuses[status] += 1

    requests = [f"GET {path} HTTP/1.1\r\nHost: site.test\r\n\r\n".encode() for path in paths]
    in_parallel(envoy.address, OTHER_CLIENT, requests, send)
    arrivals = upstreams.arrivals()
    slipped = {
        (arrival.path, backend)
        for arrival in arrivals
        for backend, read in BACKENDS.items()
        if is_documentation(read(arrival.path.partition("?")[0]))
    }
    assert slipped == set()
    assert statuses.keys() <= {200, 400, 403}
    assert min(statuses[200], statuses[403]) > PATHS / 20, f"both must happen: {statuses}"
    assert len(arrivals) == statuses[200]


def test_ordinary_requests_pass_amid_all_that(envoy: Envoy, upstreams: Upstreams) -> None:
    """The control group: what a policy lets through gets through while hostile requests come in beside it."""
    rng = random.Random(SEED + 4)
    wrong: list[bytes] = []
    stop = threading.Event()

    def disturb() -> None:
        noise = random.Random(SEED + 5)
        while not stop.is_set():
            requests = [hostile_request(noise) for _ in range(50)]
            in_parallel(envoy.address, BLOCKED_CLIENT, requests, lambda connection, request: connection.answer(request))

    async def send(connection: Connection, request: bytes) -> None:
        status, head = await connection.answer(request)
        instance = b"queue-1" if b": acme\r\n" in request else b"queue-2"
        if status != 200 or b"\r\nx-served-by: " + instance + b"\r\n" not in head:
            wrong.append(request + head)

    requests = [
        f"GET /x/{number} HTTP/1.1\r\nHost: site.test\r\nx-tenant-id: {rng.choice(('acme', 'globex'))}\r\n\r\n".encode()
        for number in range(ORDINARY)
    ]
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        in_parallel(envoy.address, OTHER_CLIENT, requests, send)
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert {arrival.header("x-envoy-external-address") for arrival in upstreams.arrivals()} == {OTHER_CLIENT}
    assert len(upstreams.arrivals()) == ORDINARY


def test_no_client_can_make_the_server_so_slow_that_envoy_fails_open(
    server: AuthzServer, running_upstreams: Upstreams
) -> None:
    """A timeout is an error to Envoy: who can cause one gets past the policy. With Envoy's limits as Istio has them."""
    tail = r"%252f/.//../a;%5c%255c\%2f%2f%23%5c%253b"  # a path of many readings
    slow = "/a" * ((8_190 - len(tail)) // 2) + "/" + tail
    options = GatewayOptions(
        authz=server.address, instances=running_upstreams.addresses, failure_mode_allow=True, timeout_seconds=0.5
    )
    statuses: Counter[int] = Counter()

    async def send(connection: Connection, request: bytes) -> None:
        status, _ = await connection.answer(request)
        statuses[status] += 1

    with Envoy(gateway_config(options)) as gateway:
        request = f"GET {slow} HTTP/1.1\r\nHost: site.test\r\n\r\n".encode()
        in_parallel(gateway.address, BLOCKED_CLIENT, [request] * 64, send)
        assert gateway.stats("http.gateway.ext_authz.")["http.gateway.ext_authz.failure_mode_allowed"] == 0
    assert statuses.keys() == {403}
    assert running_upstreams.arrivals() == []


def test_no_path_is_so_long_that_it_gets_through_as_an_error(server: AuthzServer, running_upstreams: Upstreams) -> None:
    """The path is in a check request twice. Longer than gRPC's limit, that would be an RPC error."""
    options = GatewayOptions(
        authz=server.address,
        instances=running_upstreams.addresses,
        failure_mode_allow=True,
        timeout_seconds=ANSWER_SECONDS,
        max_request_headers_kb=8_192,  # the most that Envoy can be given
    )
    most = 8_192 * 1_024
    with Envoy(gateway_config(options)) as gateway:
        statuses = [
            ask(gateway.address, "/" + "a" * (most - less), source=BLOCKED_CLIENT).status
            for less in (8, 58, 158, 2_000)
        ]
    assert statuses == [431, 403, 403, 403]
    assert running_upstreams.arrivals() == []
