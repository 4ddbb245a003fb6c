"""One client that sends the next check as soon as the last is answered: `python -m loadtest.closed_loop PORT...`.

Of several servers it asks one after the other, so that whatever else the machine does meets them alike. For each line
on its standard input it prints, for each server, how long it waited since the last line; it ends with that input.
"""

import dataclasses
import json
import select
import sys
import time
from itertools import cycle

import grpc

from loadtest.processes import CHECK, Waits
from loadtest.served import build_requests

REQUESTS = 2_000


class Asked:
    """One server, and how long it has let us wait."""

    def __init__(self, port: str) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._check = self._channel.unary_unary(CHECK)
        self._waits: list[float] = []
        self._refused = 0

    def ask(self, request: bytes) -> None:
        """Wait for one answer."""
        began = time.perf_counter()
        try:
            self._check(request, wait_for_ready=True)
        except grpc.RpcError:  # shed: it would have waited for too long
            self._refused += 1
        self._waits.append((time.perf_counter() - began) * 1e3)

    def report(self) -> Waits:
        """Return the figures since the last report."""
        waits = Waits.of(self._waits, self._refused)
        self._waits, self._refused = [], 0
        return waits


def main() -> None:
    """Ask until standard input ends."""
    requests = cycle(build_requests(REQUESTS))
    servers = [Asked(port) for port in sys.argv[1:]]
    while True:
        for server in servers:
            server.ask(next(requests))
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                return
            print(json.dumps([dataclasses.asdict(server.report()) for server in servers]), flush=True)


if __name__ == "__main__":
    main()
