"""Offered more than it can answer, with deadlines: `python -m loadtest.overload [TRANSPORT...]`.

Each server is first measured at its peak (a closed loop of 64 calls), then offered multiples of that at a steady rate,
each call with 200 ms to live (`grpc-timeout`). Counted are answers that came in time. h2load cannot tell them from RPC
errors, which have status 200 too, so two bounds are shown: as if all errors had come in time, and as if none had.
The reference of each ratio is the same server's peak. h2load stops offering when 4,096 calls are open.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from loadtest.processes import Server, calls_per_second, read_calls, run_h2load
from loadtest.served import OURS

MULTIPLES = (0.5, 2, 5)
SECONDS = 5
DEADLINE_MS = 200
CONNECTIONS, STREAMS = 16, 256


def offer(server: Server, per_second: float) -> tuple[float, float, float]:
    """Offer so many calls a second; return the rates of calls ended, of answers in time at least and at most."""
    calls = int(per_second * SECONDS)
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "calls.log"
        before = server.answers()
        rate = (f"-n{calls}", f"-c{CONNECTIONS}", f"-m{STREAMS}", f"--rps={per_second / CONNECTIONS:.0f}")
        run_h2load(server, *rate, f"--log-file={log}", "-H", f"grpc-timeout: {DEADLINE_MS}m")
        ended, seconds = read_calls(log)
    answered = server.answers() - before
    if not ended:
        return 0.0, 0.0, 0.0
    seconds = max(seconds, SECONDS)
    counts = Counter((status, micros <= DEADLINE_MS * 1000) for status, micros in ended)
    errors = max(0, counts["200", True] + counts["200", False] - answered)
    most = min(answered, counts["200", True])
    return len(ended) / seconds, max(0, counts["200", True] - errors) / seconds, most / seconds


def main() -> None:
    """Print a table."""
    print("| server | offered, of peak | calls ended/s | answers in time/s | of peak |\n|---|---|---|---|---|")
    for transport in sys.argv[1:] or OURS:
        with Server(transport) as server:
            calls_per_second(server, 2_000)
            peak = calls_per_second(server, 15_000)
            for multiple in MULTIPLES:
                ended, least, most = offer(server, peak * multiple)
                shares = f"{least / peak:.2f}-{most / peak:.2f}"
                offered = f"{multiple}x of {peak:.0f}/s"
                print(f"| {transport} | {offered} | {ended:.0f} | {least:.0f}-{most:.0f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
