"""What a real Envoy's clients notice of the checks: `python -m loadtest.through_envoy [TRANSPORT...]`.

Requests a second and p99 with checks that really decide, as ratios of the same Envoy's before the same transport with a
constant answer of the same length. Medians of ROUNDS rounds, interleaved; wrk in a closed loop, one Envoy worker.
"""

import re
import subprocess
import sys
from statistics import median

from authz_server.demo.envoy import Envoy
from loadtest.gateway import answering_gateway
from loadtest.processes import Server, tool
from loadtest.served import OURS

ROUNDS = 5
SECONDS = 4
CONNECTIONS = 16
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def load(url: str) -> tuple[float, float]:
    """Return requests a second and the p99 in milliseconds; every request must have passed."""
    command = [
        tool("wrk", "wrk"),
        "-t1",
        f"-c{CONNECTIONS}",
        f"-d{SECONDS}s",
        "--latency",
        "-H",
        "x-tenant-id: tenant-1",
    ]
    report = subprocess.run([*command, url], capture_output=True, text=True, check=True, timeout=60).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", report)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", report)
    assert rate
    assert p99, report
    return float(rate[1]), float(p99[1]) * _UNITS[p99[2]]


def main() -> None:
    """Print a table."""
    print("| server | answer | requests/s | to the constant | p99, ms | to the constant |\n|---|---|---|---|---|---|")
    for transport in sys.argv[1:] or OURS:
        figures: dict[str, list[tuple[float, float]]] = {"constant": [], "real": []}
        for _ in range(ROUNDS):
            for answer, rounds in figures.items():
                with Server(transport, answer) as server, Envoy(answering_gateway(("127.0.0.1", server.port))) as envoy:
                    load(envoy.url)
                    rounds.append(load(envoy.url))
        medians = {
            answer: [median(column) for column in zip(*rounds, strict=True)] for answer, rounds in figures.items()
        }
        for answer, (rate, p99) in medians.items():
            ratios = [rate / medians["constant"][0], p99 / medians["constant"][1]]
            print(
                f"| {transport} | {answer} | {rate:.0f} | {ratios[0]:.2f}x | {p99:.1f} | {ratios[1]:.2f}x |", flush=True
            )


if __name__ == "__main__":
    main()
