"""One server to measure, in a process of its own: a transport before a checker that really decides, or a constant.

`python -m loadtest.served TRANSPORT ANSWER` prints its port and the answer's length in bytes, then, for each line on
its standard input, the number of checks answered so far; it serves until that ends. TRANSPORT is `grpcio`, or
`module:Class` for one that is only tried, with the constructor of GrpcioTransport; ANSWER is `real` or `constant`.
"""

import asyncio
import importlib
import ipaddress
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any, Protocol

from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.check_response import ResponseOptions
from authz_server.ext_authz.checker import Checker
from authz_server.health import ComponentName, HealthState
from authz_server.metrics import Metrics
from authz_server.policy.access import Entry, Scope
from authz_server.policy.addresses import parse_network
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.records import entry_key, record_key
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.policy.tenant import parse_tenant_source

NETWORKS = 10_000
TENANTS = 1_000
REQUESTS = 20_000
COMMON_BYTES = 880
"""Of a check request, what is the same in all of them."""
MAX_REQUEST_BYTES = 1 << 20

TRANSPORTS = {
    "grpcio": "authz_server.ext_authz.grpcio_transport:GrpcioTransport",
    "echo": "loadtest.echo:EchoTransport",
    "asyncio": "authz_server.ext_authz.asyncio_transport:AsyncioTransport",
}


def _request(path: str, headers: Mapping[str, str]) -> Any:
    message = ext_authz_pb2.CheckRequest()
    http = message.attributes.request.http
    http.path = path
    for name, value in headers.items():
        http.headers[name] = value
    return message


def _common() -> bytes:
    """What all the check requests say: all but who asks for what."""
    headers = {
        "x-request-id": "6f1c1f0e-9d6e-4c6d-9b8b-2f6f2a1f0c11",
        "user-agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
        "accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
        "accept-encoding": "gzip, deflate, br",
        "accept-language": "en-GB,en;q=0.9",
        "x-forwarded-proto": "https",
        "cookie": "c" * (COMMON_BYTES - 512),
    }
    message = _request("", headers)
    message.attributes.source.address.socket_address.address = "10.1.2.3"
    http = message.attributes.request.http
    http.method, http.host = "GET", "www.example.com"
    http.headers["cookie"] += "c" * (COMMON_BYTES - message.ByteSize())
    data: bytes = message.SerializeToString()
    assert len(data) == COMMON_BYTES
    return data


COMMON = _common()


def _who_asks(address: str, tenant: str, path: str) -> bytes:
    """What one check request says beside the common: a message too, and two in a row are read as one.

    See https://protobuf.dev/programming-guides/encoding/#last-one-wins.
    """
    headers = {"x-envoy-external-address": address, "x-forwarded-for": address, "x-tenant-id": tenant}
    data: bytes = _request(path, headers).SerializeToString()
    return data


def build_request(address: str, tenant: str, path: str) -> bytes:
    """A check request of about 1 KiB, such as a browser's request through a gateway makes."""
    return COMMON + _who_asks(address, tenant, path)


def _clients(count: int) -> Iterator[bytes]:
    """Distinct requests, of each what it says beside the common: one in ten from a blocked network."""
    rng = random.Random(1)
    for number in range(count):
        network = (100 << 24 if rng.random() < 0.1 else 180 << 24) + rng.randrange(NETWORKS) * 256
        path = f"/app/items/{rng.randrange(10**6):06}?page={number % 9}"
        yield _who_asks(str(ipaddress.IPv4Address(network)), f"tenant-{rng.randrange(TENANTS)}", path)


def build_requests(count: int = REQUESTS) -> list[bytes]:
    """Distinct check requests: one in ten from a blocked network, tenants and paths mixed."""
    return [COMMON + client for client in _clients(count)]


def build_policy() -> Snapshot:
    """NETWORKS blocked networks, and TENANTS tenants on three instances."""
    entries = [
        Entry(parse_network(f"{ipaddress.IPv4Address((100 << 24) + number * 256)}/24"), "abuse", "ann", 1)
        for number in range(NETWORKS)
    ]
    records: list[Any] = [Instance(f"queue-{number}") for number in range(3)]
    records += [Tenant(f"tenant-{number}", f"queue-{number % 3}") for number in range(TENANTS)]
    records += [Scope("global")]
    return build_snapshot(
        [(entry_key("global/block", entry), entry) for entry in entries]
        + [(record_key(record), record) for record in records],
        epoch="e",
        revision=1,
        options=DecisionOptions(tenant_sources=(parse_tenant_source("header:x-tenant-id"),)),
    )


OURS = ("grpcio", "asyncio")


class Answering(Protocol):
    """A Checker, or what stands for it."""

    check: Callable[[bytes], bytes]
    check_all: Callable[[Sequence[bytes]], Sequence[bytes | None]]


class Serving(Answering, Protocol):
    """What a measured transport asks."""

    answers: int
    """Checks answered so far."""


class Constant:
    """Answers every check with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        def check(_data: bytes) -> bytes:
            return answer

        def check_all(messages: Sequence[bytes]) -> Sequence[bytes]:
            return [answer] * len(messages)

        self.check, self.check_all = check, check_all


class Distinct:
    """Hands on one of many requests in turn: h2load sends the same message, COMMON, for ever.

    What each of them says beside that is put to what came, which costs less than to fetch whole messages from memory
    (20 MiB of them) that the processor does not hold any more, as it holds what has just been received. A constant
    answer's messages are put together too: a client that sent distinct ones would spare both servers that. Messages
    that are not COMMON are passed on as they came.
    """

    def __init__(self, answering: Answering) -> None:
        clients = cycle(list(_clients(REQUESTS)))
        one, all_ = answering.check, answering.check_all

        self.answers = 0

        def check(data: bytes) -> bytes:
            self.answers += 1
            return one(data + next(clients) if len(data) == COMMON_BYTES else data)

        def check_all(messages: Sequence[bytes]) -> Sequence[bytes | None]:
            self.answers += len(messages)
            return all_([data + next(clients) if len(data) == COMMON_BYTES else data for data in messages])

        self.check, self.check_all = check, check_all


async def _serve(transport_name: str, answer: str) -> None:
    snapshot = build_policy()
    metrics = Metrics()
    checker = Checker(
        lambda: snapshot,
        ResponseOptions(),
        max_request_bytes=MAX_REQUEST_BYTES,
        observe=lambda checks: metrics.observe(checks.decided, checks.seconds),
    )
    constant = checker.check(build_requests(1)[0])
    serving: Any = Distinct(checker if answer == "real" else Constant(constant))
    module, _, name = TRANSPORTS.get(transport_name, transport_name).partition(":")
    health = HealthState()
    transport = getattr(importlib.import_module(module), name)(serving, listen="127.0.0.1:0", tls=None, health=health)
    port = await transport.start()
    for component in ComponentName:
        health.set(component, ready=True, detail="measured")
    print(port, len(constant), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(serving.answers, flush=True)
    await transport.drain(2)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2]))
