"""One client that sends the next check as soon as the last is answered: `python -m loadtest.closed_loop PORT`.

For each line on its standard input it prints how long it waited since the last line; it ends with that input.
"""

import json
import select
import sys
import time
from itertools import cycle

import grpc

from loadtest.processes import CHECK
from loadtest.served import build_requests

REQUESTS = 2_000


def main() -> None:
    """Ask until standard input ends."""
    requests = cycle(build_requests(REQUESTS))
    waits: list[float] = []
    refused = 0
    with grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}") as channel:
        check = channel.unary_unary(CHECK)
        while True:
            began = time.perf_counter()
            try:
                check(next(requests), wait_for_ready=True)
            except grpc.RpcError:  # shed: it would have waited for too long
                refused += 1
            waits.append((time.perf_counter() - began) * 1e3)
            if select.select([sys.stdin], [], [], 0)[0]:
                if not sys.stdin.readline():
                    return
                waits.sort()
                count = len(waits)
                report = {"median": waits[count // 2], "p99": waits[int(count * 0.99)], "longest": waits[-1]}
                print(json.dumps({"count": count, "refused": refused, **report}), flush=True)
                waits.clear()
                refused = 0


if __name__ == "__main__":
    main()
