"""Memory over five million checks with random clients, tenants and paths: it must not grow.

Run `python -m loadtest.memory [CHECKS]` in the project's folder (some five minutes). Everything that a check touches is
as in the server: metrics, which are scraped now and then, the decision log, whose lines go nowhere, and a policy in
which unknown tenants are hashed. No two requests are alike, and one in five is odd: paths full of escapes, tenants that
are none, addresses that are none, bytes that are no check request. Exits with 1 when the process holds more than
ALLOWED_GROWTH_MIB more at the end than after the first fifth.
"""

import gc
import os
import random
import sys
import threading
import time
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from prometheus_client import generate_latest
from rich.console import Console
from rich.table import Table

from authz_server.decision_log import DecisionLog, LogOptions
from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.check_response import ResponseOptions
from authz_server.ext_authz.checker import Checker
from authz_server.metrics import Metrics
from authz_server.policy.snapshot import UnknownTenant
from authz_server.server import Observer
from loadtest.served import MAX_REQUEST_BYTES, build_request
from loadtest.tight_loop import blocked_networks, build_policy

CHECKS = 5_000_000
SAMPLES = 20
NETWORKS, TENANTS = 100_000, 10_000
ALLOWED_GROWTH_MIB = 4.0
_ODD = ("%2f", "%252e", "//", "/..", ";a=b", "%c3%a9", "\u00e9", "\\", "%", "?tenant_id=", "&tenant%5fid=", "%00", "#")


class Requests:
    """Makes check requests, each another one."""

    def __init__(self) -> None:
        self._rng = random.Random(5)
        self._pattern = build_request("203.0.113.7", "tenant-1", "/")

    def make(self) -> bytes:
        """Return the next one."""
        rng = self._rng
        message = ext_authz_pb2.CheckRequest.FromString(self._pattern)  # anew: a message keeps what was ever set in it
        http = message.attributes.request.http
        headers = http.headers
        luck = rng.random()
        if luck < 0.7:
            headers["x-envoy-external-address"] = str(IPv4Address(rng.getrandbits(32)))
        elif luck < 0.97:
            headers["x-envoy-external-address"] = str(IPv6Address(rng.getrandbits(128)))
        else:
            headers["x-envoy-external-address"] = f"{rng.getrandbits(40):x}"
        headers["x-tenant-id"] = f"tenant-{rng.randrange(10**9) if rng.random() < 0.5 else rng.randrange(TENANTS)}"
        headers["x-request-id"] = f"{rng.getrandbits(128):032x}"
        http.path = f"/{rng.getrandbits(64):x}/{rng.getrandbits(64):x}?page={rng.getrandbits(32)}"
        if luck > 0.2:
            return message.SerializeToString()  # type: ignore[no-any-return]
        http.path = "/docs/" + "".join(f"{rng.choice(_ODD)}{rng.getrandbits(16):x}" for _ in range(rng.randrange(12)))
        if luck < 0.05:
            headers["x-tenant-id"] += rng.choice((" ", ",tenant-1", "\u00e9", "x" * rng.randrange(2000)))
        data: bytes = message.SerializeToString()
        return data[: rng.randrange(len(data))] if luck < 0.01 else data


def resident_mib() -> float:
    """Memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(checks: int) -> bool:
    """Print memory over time, and tell whether it stayed what it was."""
    snapshot = build_policy(blocked_networks(NETWORKS, random.Random(11)), TENANTS, unknown_tenant=UnknownTenant.HASH)
    metrics, log = Metrics(), DecisionLog(LogOptions(allowed_ratio=0.01), lambda _lines: None)
    checker = Checker(
        lambda: snapshot, ResponseOptions(), max_request_bytes=MAX_REQUEST_BYTES, observe=Observer(metrics, log)
    )
    requests = Requests()
    writing = threading.Thread(target=log.run)
    writing.start()
    figures = Table("checks", "MiB", "seconds")
    began = time.perf_counter()
    held = []
    try:
        for sample in range(1, SAMPLES + 1):
            for _ in range(checks // SAMPLES):
                checker.check(requests.make())
            generate_latest(metrics.registry)
            gc.collect()
            held.append(resident_mib())
            figures.add_row(
                f"{sample * (checks // SAMPLES):,}", f"{held[-1]:.1f}", f"{time.perf_counter() - began:.0f}"
            )
    finally:
        log.stop()
        writing.join()
    growth = held[-1] - held[SAMPLES // 5 - 1]
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(figures)
    console.print(f"{growth:+.1f} MiB since the first fifth; {ALLOWED_GROWTH_MIB:.0f} MiB are allowed.")
    return growth <= ALLOWED_GROWTH_MIB


if __name__ == "__main__":
    sys.exit(0 if main(int(sys.argv[1]) if len(sys.argv) > 1 else CHECKS) else 1)
