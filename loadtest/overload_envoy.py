"""Offered more than it can answer, through a real Envoy: `python -m loadtest.overload_envoy [TRANSPORT...]`.

The server is held to a small share of a core, so that Envoy (one worker, 200 ms for each check) is not what saturates;
what it takes of a core is shown.
Its peak through this Envoy, a closed loop, is the reference; then requests come at a steady rate of multiples of it,
for SECONDS each (h2load, an open loop). Counted are those that Envoy let pass within 200 ms; it fails closed here, so
that a check that was shed or came too late is a 403. At last the same as at the beginning, a second after the load.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from authz_server.demo.envoy import Envoy
from loadtest.cpu_share import held_to
from loadtest.gateway import answering_gateway
from loadtest.processes import Server, cpu_seconds, read_calls, tool
from loadtest.served import OURS

SHARE = 0.025
MULTIPLES = (0.5, 1, 2, 5)
SECONDS = 8
DEADLINE_SECONDS = 0.2
CONNECTIONS, STREAMS = 8, 512
PEAK_IN_FLIGHT = 16
_HEADERS = ("-H", "x-tenant-id: tenant-1", "-H", f"cookie: {'c' * 400}")


def run_h2load(url: str, *options: str) -> str:
    """Load the gateway, and return h2load's report."""
    command = [tool("h2load", "nghttp2-client"), *options, *_HEADERS, url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def peak(url: str, seconds: int) -> float:
    """How many requests a second pass in a closed loop."""
    report = run_h2load(url, f"-D{seconds}", "--warm-up-time=1", "-c2", f"-m{PEAK_IN_FLIGHT // 2}")
    passed = re.search(r"status codes: (\d+) 2xx", report)
    assert passed, report
    return int(passed[1]) / seconds


def offer(envoy: Envoy, per_second: float) -> tuple[float, float, float, float]:
    """Offer so many requests a second.

    Returns how many a second were made, passed in time, and failed within that time; and Envoy's share of a core.
    """
    began, before = time.monotonic(), cpu_seconds(envoy.pid)
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "requests.log"
        calls = int(per_second * SECONDS)
        rate = (f"-n{calls}", f"-c{CONNECTIONS}", f"-m{STREAMS}", f"--rps={per_second / CONNECTIONS:.2f}")
        run_h2load(envoy.url, *rate, f"--log-file={log}")
        share = (cpu_seconds(envoy.pid) - before) / (time.monotonic() - began)
        ended, seconds = read_calls(log)
    seconds = max(seconds, SECONDS)
    in_time = [status for status, micros in ended if micros <= DEADLINE_SECONDS * 1e6]
    passed = in_time.count("200")
    return len(ended) / seconds, passed / seconds, (len(in_time) - passed) / seconds, share


def main() -> None:
    """Print a table."""
    print("| server | offered, of peak | made/s | passed in time/s | of peak | refused in time/s | Envoy, of a core |")
    print("|---|---|---|---|---|---|---|")
    for transport in sys.argv[1:] or OURS:
        with Server(transport) as server:
            gateway = answering_gateway(("127.0.0.1", server.port), timeout_seconds=DEADLINE_SECONDS)
            with Envoy(gateway) as envoy, held_to(SHARE, server.pid):
                best = peak(envoy.url, SECONDS)
                if best * min(MULTIPLES) * SECONDS < CONNECTIONS:  # h2load wants a call for each connection
                    print(f"| {transport} | nothing: in a closed loop {best:.1f}/s pass | | | | | |", flush=True)
                    continue
                for multiple in MULTIPLES:
                    made, passed, refused, share = offer(envoy, best * multiple)
                    figures = f"{made:.0f} | {passed:.0f} | {passed / best:.2f} | {refused:.0f} | {share:.2f}"
                    print(f"| {transport} | {multiple}x of {best:.0f}/s | {figures} |", flush=True)
                time.sleep(1)
                after = peak(envoy.url, 2)
                print(f"| {transport} | a second later | | {after:.0f} | {after / best:.2f} | | |", flush=True)


if __name__ == "__main__":
    main()
