"""Leaving under load, through a real Envoy: `python -m loadtest.drain [TRANSPORT...]`.

Two servers behind one Envoy, wrk in front of it. One server leaves: its endpoint is taken out, as Kubernetes would, and
half a second later its transport is drained. Counted are requests that failed, of all that were made; none should.
Then the same with a server that is killed (SIGKILL), whose endpoint goes a second later: what fails until then, and of
a load after that; there none should.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from authz_server.demo.envoy import Envoy
from loadtest.gateway import gateway_by_file, write_endpoints
from loadtest.processes import Server, tool
from loadtest.served import OURS

TRIES = 10
SECONDS = 3


@contextlib.contextmanager
def two_servers(transport: str) -> Iterator[tuple[Server, Envoy, Callable[[], None]]]:
    """Yield the server that is to leave, the Envoy before it and another, and what takes its endpoint out."""
    with tempfile.TemporaryDirectory() as directory, Server(transport) as staying, Server(transport) as leaving:
        endpoints = Path(directory) / "endpoints.json"
        both = [("127.0.0.1", staying.port), ("127.0.0.1", leaving.port)]
        write_endpoints(endpoints, both)
        with Envoy(gateway_by_file(endpoints)) as envoy:
            yield leaving, envoy, lambda: write_endpoints(endpoints, both[:1])


def start_load(envoy: Envoy) -> "subprocess.Popen[str]":
    """Load Envoy for SECONDS."""
    command = [tool("wrk", "wrk"), "-t1", "-c16", f"-d{SECONDS}s", "-H", "x-tenant-id: tenant-1", envoy.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def outcome(load: "subprocess.Popen[str]") -> tuple[int, int]:
    """Wait for a load to end, and return how many requests were made and how many failed."""
    report, _ = load.communicate()
    made = re.search(r"(\d+) requests in", report)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", report)
    return int(made[1]) if made else 0, int(failed[1]) if failed else 0


def leave(transport: str) -> tuple[int, int]:
    """Have one of two servers leave, and return how many requests were made and how many failed."""
    with two_servers(transport) as (leaving, envoy, take_out):
        load = start_load(envoy)
        time.sleep(1)
        take_out()
        time.sleep(0.5)
        leaving.leave()
        made, failed = outcome(load)
        errors = envoy.stats("http.gateway.ext_authz.error")["http.gateway.ext_authz.error"]
        return made, max(errors, failed)


def kill(transport: str) -> tuple[int, int, int, int]:
    """Kill one of two servers; return requests and failures until its endpoint was gone, and after that."""
    with two_servers(transport) as (leaving, envoy, take_out):
        load = start_load(envoy)
        time.sleep(1)
        os.kill(leaving.pid, signal.SIGKILL)
        time.sleep(1)
        take_out()
        return *outcome(load), *outcome(start_load(envoy))


def main() -> None:
    """Print a table."""
    print(
        "| server | leaves | tries | requests | failed | requests after that | failed |\n|---|---|---|---|---|---|---|"
    )
    for transport in sys.argv[1:] or OURS:
        made, failed = map(sum, zip(*(leave(transport) for _ in range(TRIES)), strict=True))
        print(f"| {transport} | drained | {TRIES} | {made} | {failed} | | |", flush=True)
        figures = " | ".join(map(str, kill(transport)))
        print(f"| {transport} | killed | 1 | {figures} |", flush=True)


if __name__ == "__main__":
    main()
