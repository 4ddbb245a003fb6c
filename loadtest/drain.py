"""Leaving under load, through a real Envoy: `python -m loadtest.drain [TRANSPORT...]`.

Two servers behind one Envoy, wrk in front of it. One server leaves: its endpoint is taken out, as Kubernetes would, and
half a second later its transport is drained. Counted are requests that failed, of all that were made; none should.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from authz_server.demo.envoy import Envoy
from loadtest.gateway import gateway_by_file, write_endpoints
from loadtest.processes import Server, tool
from loadtest.served import OURS

TRIES = 10
SECONDS = 3


def leave(transport: str) -> tuple[int, int]:
    """Have one of two servers leave, and return how many requests were made and how many failed."""
    with tempfile.TemporaryDirectory() as directory, Server(transport) as staying, Server(transport) as leaving:
        endpoints = Path(directory) / "endpoints.json"
        both = [("127.0.0.1", staying.port), ("127.0.0.1", leaving.port)]
        write_endpoints(endpoints, both)
        with Envoy(gateway_by_file(endpoints)) as envoy:
            load = subprocess.Popen(
                [tool("wrk", "wrk"), "-t1", "-c16", f"-d{SECONDS}s", "-H", "x-tenant-id: tenant-1", envoy.url],
                stdout=subprocess.PIPE,
                text=True,
            )
            time.sleep(1)
            write_endpoints(endpoints, both[:1])
            time.sleep(0.5)
            leaving.leave()
            report, _ = load.communicate()
            errors = envoy.stats("http.gateway.ext_authz.error")["http.gateway.ext_authz.error"]
    made = re.search(r"(\d+) requests in", report)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", report)
    return int(made[1]) if made else 0, max(errors, int(failed[1]) if failed else 0)


def main() -> None:
    """Print a table."""
    print("| server | tries | requests | failed |\n|---|---|---|---|")
    for transport in sys.argv[1:] or OURS:
        tries = [leave(transport) for _ in range(TRIES)]
        requests, failed = sum(made for made, _ in tries), sum(failed for _, failed in tries)
        print(f"| {transport} | {TRIES} | {requests} | {failed} |", flush=True)


if __name__ == "__main__":
    main()
