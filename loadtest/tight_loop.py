"""What one check costs without a transport: decode, decide, encode, over many distinct requests and a large policy.

Run `python -m loadtest.tight_loop` in the project's folder (a few minutes, 3 GB). The policy has a million blocked
networks, 100,000 tenants, a named list and a restricted resource; the 100,000 requests of about 1 KiB are those of
`build_requests` below. Every figure is the median of five rounds, and each round measures everything once, so that a
busy machine slows all alike. The reference is Google's protobuf library (upb) alone: it decodes the same requests and
encodes one fixed answer with the fields that ours have.
"""

import gc
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from rich.console import Console
from rich.table import Table

from authz_server.decision_log import DecisionLog, LogOptions
from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.asyncio_transport import SLICE
from authz_server.ext_authz.check_request import CheckRequestReader
from authz_server.ext_authz.check_response import ResponseOptions, ResponseWriter
from authz_server.ext_authz.checker import Checker
from authz_server.metrics import Metrics
from authz_server.policy.access import Entry, Mode, NamedList, Resource, Scope
from authz_server.policy.addresses import Network
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.decision import decide
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.records import Record, RecordKey, entry_key, record_key
from authz_server.policy.snapshot import DecisionOptions, Snapshot, UnknownTenant, build_snapshot
from authz_server.policy.tenant import parse_tenant_source
from authz_server.server import Observer
from loadtest.served import MAX_REQUEST_BYTES, build_request

NETWORKS, TENANTS, REQUESTS = 1_000_000, 100_000, 100_000
INSTANCES = 30
ROUNDS = 5
NOW = 1_700_000_000


def blocked_networks(count: int, rng: random.Random) -> list[Network]:
    """70 % IPv4 addresses, 20 % IPv4 /24, 10 % IPv6 /64, all outside 10.0.0.0/8."""
    networks: set[Network] = set()
    for version, length, share in ((4, 32, 0.7), (4, 24, 0.2), (6, 64, 0.1)):
        wanted = len(networks) + round(count * share)
        while len(networks) < wanted:
            if version == 4:
                first = (11 << 24) + rng.randrange(200 << 24) >> 32 - length << 32 - length
            else:
                first = (0x2001 << 48 | rng.getrandbits(48)) << 64
            networks.add(Network(version, first, length))  # type: ignore[arg-type]
    return sorted(networks)


def build_policy(networks: list[Network], tenants: int, unknown_tenant: UnknownTenant = UnknownTenant.NONE) -> Snapshot:
    """The networks blocked everywhere; tenants pinned to instances; `/docs` for an office only."""
    docs = Resource("docs", (parse_path_pattern("/docs"),))
    few: list[Record] = [Instance(f"queue-{number}") for number in range(INSTANCES)]
    few += [NamedList("office"), Scope("resource:docs", Mode.RESTRICTED, allow_lists=("office",)), docs]
    office = Entry(Network(4, 10 << 24, 8), "the office", "ann", NOW)

    def records() -> Iterator[tuple[RecordKey, Any]]:
        for network in networks:
            entry = Entry(network, "abuse", "ann", NOW)
            yield entry_key("global/block", entry), entry
        for number in range(tenants):
            tenant = Tenant(f"tenant-{number}", f"queue-{number % INSTANCES}")
            yield record_key(tenant), tenant
        for record in few:
            yield record_key(record), record
        yield entry_key("office", office), office

    sources = (parse_tenant_source("header:x-tenant-id"), parse_tenant_source("query:tenant_id"))
    options = DecisionOptions(tenant_sources=sources, unknown_tenant=unknown_tenant)
    return build_snapshot(records(), epoch="e", revision=1, options=options)


def build_requests(count: int, networks: list[Network], tenants: int, rng: random.Random) -> Iterator[bytes]:
    """One in ten from a blocked network, 20 % over IPv6, 2 % from the office.

    Tenants are named in a header, one in ten of them unknown and one in ten in the query too. Of the paths 4 % hold
    escapes and 2 % lie in `/docs`; half of the requests have a query, a fifth of these with escapes in it.
    """
    for number in range(count):
        luck = rng.random()
        if luck < 0.1:
            blocked = rng.choice(networks)
            address = IPv4Address(blocked.first) if blocked.version == 4 else IPv6Address(blocked.first + 1)
        elif luck < 0.12:
            address = IPv4Address((10 << 24) + rng.getrandbits(24))
        elif luck < 0.3:
            address = IPv6Address((0x2001 << 48 | rng.getrandbits(48)) << 64 | rng.getrandbits(64))
        else:
            address = IPv4Address((11 << 24) + rng.randrange(200 << 24))
        tenant = f"tenant-{rng.randrange(tenants * 10 // 9)}"
        path = f"{rng.choice(('/app/items', '/api/v1/orders', '/static/js'))}/{rng.randrange(10**9):09}"
        if (luck := rng.random()) < 0.04:
            path += "/price%20list.pdf"
        elif luck < 0.06:
            path = f"/docs{path}"
        if (luck := rng.random()) < 0.1:
            path += f"?page={number % 9}&tenant_id={tenant}"
        elif luck < 0.2:
            path += f"?q=red%20shoes%26{number % 9}"
        elif luck < 0.5:
            path += f"?page={number % 9}&sort=name"
        yield build_request(str(address), tenant, path)


def naive_answer() -> Callable[[bytes], bytes]:
    """The reference: decode with upb, and encode a fixed answer with upb."""
    decode = ext_authz_pb2.CheckRequest.FromString
    answer = ext_authz_pb2.CheckResponse()
    answer.status.code = 0
    for name, value in (("x-tenant-instance", "queue-3"), ("x-tenant-id", "tenant-12345")):
        option = answer.ok_response.headers.add(append_action=2)
        option.header.key, option.header.value = name, value
    answer.ok_response.headers_to_remove.extend(f"x_tenant-{number}" for number in range(6))
    facts = {"reason": "allowed", "outcome": "ok", "client_address": "203.0.113.7", "tenant": "tenant-12345"}
    answer.dynamic_metadata.update(facts | {"instance": "queue-3", "affinity": "pinned"})

    def check(data: bytes) -> bytes:
        decode(data)
        return answer.SerializeToString()  # type: ignore[no-any-return]

    return check


def microseconds(act: Callable[..., object], arguments: Iterable[tuple[Any, ...]], count: int) -> float:
    """Time of one call, averaged over all arguments."""
    began = time.perf_counter()
    for some in arguments:
        act(*some)
    return (time.perf_counter() - began) / count * 1e6


def main() -> None:
    """Print microseconds a request, by phase."""
    rng = random.Random(11)
    networks = blocked_networks(NETWORKS, rng)
    snapshot = build_policy(networks, TENANTS)
    requests = list(build_requests(REQUESTS, networks, TENANTS, rng))
    writer = ResponseWriter(ResponseOptions())
    checkers = {
        name: Checker(lambda: snapshot, ResponseOptions(), max_request_bytes=MAX_REQUEST_BYTES, observe=observe)
        for name, observe in (
            ("alone", lambda _checks: None),
            ("as in the server", Observer(Metrics(), DecisionLog(LogOptions(), lambda _lines: None))),
        )
    }
    reader = CheckRequestReader({"x-tenant-id"})
    attributes = [reader.read(data) for data in requests]
    decisions = [decide(one, snapshot, NOW) for one in attributes]
    slices = [requests[start : start + SLICE] for start in range(0, REQUESTS, SLICE)]
    answers = [writer.write(decision, request_id="", revision=1) for decision in decisions]

    phases: dict[str, tuple[Callable[..., object], Callable[[], Iterable[tuple[Any, ...]]]]] = {
        "reference: upb alone": (naive_answer(), lambda: zip(requests)),
        "decode": (reader.read, lambda: zip(requests)),
        "decide": (lambda one: decide(one, snapshot, NOW), lambda: zip(attributes)),
        "encode": (
            lambda decision, one: writer.write(decision, request_id=one.request_id, revision=1),
            lambda: zip(decisions, attributes, strict=True),
        ),
        "the whole check, one by one": (checkers["alone"].check, lambda: zip(requests)),
        f"{SLICE} at a time, as under load": (checkers["alone"].check_all, lambda: zip(slices)),
        "the same, counted and logged": (checkers["as in the server"].check_all, lambda: zip(slices)),
    }
    gc.collect()
    gc.freeze()
    seconds: dict[str, list[float]] = {name: [] for name in phases}
    for _ in range(ROUNDS):
        for name, (act, arguments) in phases.items():
            seconds[name].append(microseconds(act, arguments(), REQUESTS))

    console = Console(width=None if sys.stdout.isatty() else 120)
    figures = Table("phase", "us a request", "x of the reference")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        figures.add_row(name, f"{median:.1f}", f"{median / next(iter(medians.values())):.2f}")
    console.print(figures)
    reasons = Counter(str(decision.reason) for decision in decisions).most_common()
    console.print(
        f"Decided: {', '.join(f'{count} {reason}' for reason, count in reasons)}. "
        f"Requests of {statistics.mean(map(len, requests)):.0f} bytes on average, "
        f"answers of {statistics.mean(map(len, answers)):.0f}."
    )


if __name__ == "__main__":
    main()
