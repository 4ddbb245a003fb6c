"""CPU a call of the server's process, 64 calls in flight, by h2load: `python -m loadtest.cpu [TRANSPORT...]`.

Medians of ROUNDS rounds; each round measures every server once, so that the ratios compare neighbours in time. The
references are a bare grpcio server that sends every message back, and the same transport with a constant answer.
"""

import sys
from statistics import median

from loadtest.processes import Server, calls_per_second
from loadtest.served import OURS

ROUNDS = 5
CALLS = {"asyncio": 40_000}
CALLS_OTHERWISE = 8_000


def main() -> None:
    """Print a table."""
    servers = [("echo", "constant")]
    servers += [(transport, answer) for transport in sys.argv[1:] or OURS for answer in ("constant", "real")]
    figures: dict[tuple[str, str], list[tuple[float, float]]] = {server: [] for server in servers}
    for _ in range(ROUNDS):
        for transport, answer in servers:
            calls = CALLS.get(transport, CALLS_OTHERWISE)
            with Server(transport, answer) as server:
                calls_per_second(server, calls // 10)
                before = server.cpu_seconds()
                rate = calls_per_second(server, calls)
                figures[transport, answer].append(((server.cpu_seconds() - before) / calls * 1e6, rate))
    cpu = {server: median(cpu for cpu, _ in rounds) for server, rounds in figures.items()}
    print(
        "| server | answer | CPU us a call | to its constant answer | under echo | calls/s |\n|---|---|---|---|---|---|"
    )
    for (transport, answer), rounds in figures.items():
        mine = cpu[transport, answer]
        rate = median(rate for _, rate in rounds)
        ratios = f"{mine / cpu[transport, 'constant']:.2f}x | {cpu['echo', 'constant'] / mine:.2f}x"
        print(
            f"| {transport} | {answer if transport != 'echo' else 'the request'} | {mine:.0f} | {ratios} | {rate:.0f} |"
        )


if __name__ == "__main__":
    main()
