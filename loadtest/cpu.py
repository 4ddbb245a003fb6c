"""CPU a call of the server's process, 64 calls in flight, by h2load: `python -m loadtest.cpu [TRANSPORT...]`.

Medians of ROUNDS rounds; each round measures every server once, so that the ratios compare neighbours in time. The
reference is the first transport with a constant answer.
"""

import sys
from statistics import median

from loadtest.processes import Server, calls_per_second
from loadtest.served import TRANSPORTS

ROUNDS = 5
CALLS = {"grpcio": 8_000}
CALLS_OTHERWISE = 40_000


def main() -> None:
    """Print a table."""
    transports = sys.argv[1:] or list(TRANSPORTS)
    servers = [(transport, answer) for transport in transports for answer in ("constant", "real")]
    figures: dict[tuple[str, str], list[tuple[float, float]]] = {server: [] for server in servers}
    for _ in range(ROUNDS):
        for transport, answer in servers:
            calls = CALLS.get(transport, CALLS_OTHERWISE)
            with Server(transport, answer) as server:
                calls_per_second(server, calls // 10)
                before = server.cpu_seconds()
                rate = calls_per_second(server, calls)
                figures[transport, answer].append(((server.cpu_seconds() - before) / calls * 1e6, rate))
    reference = median(cpu for cpu, _ in figures[transports[0], "constant"])
    print(f"| server | answer | CPU us a call | ratio to {transports[0]} constant | calls/s |\n|---|---|---|---|---|")
    for (transport, answer), rounds in figures.items():
        cpu = median(cpu for cpu, _ in rounds)
        rate = median(rate for _, rate in rounds)
        print(f"| {transport} | {answer} | {cpu:.0f} | {cpu / reference:.3f} | {rate:.0f} |")


if __name__ == "__main__":
    main()
