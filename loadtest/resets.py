"""Outside clients that abort their requests: do the checks of others fail? `python -m loadtest.resets [TRANSPORT...]`

Envoy has one HTTP/2 connection to the server for each of its workers, and resets the check of every request that is
aborted. A server that takes many resets for an attack and hangs up ends the checks of everybody on that connection;
where the mesh fails open, those requests pass unchecked. The reference is the same load without an attack.
"""

import asyncio
import re
import subprocess
import sys
import time

from h2.config import H2Configuration
from h2.connection import H2Connection

from authz_server.demo.envoy import Envoy
from loadtest.gateway import answering_gateway
from loadtest.processes import Server, tool
from loadtest.served import OURS

SECONDS = 5
BURSTS = (0, 20, 100)
"""Requests, each aborted at once, in one connection of the attacker, who opens some 60 a second. 0: no attack."""
_PAUSE_SECONDS = 0.01
_CANCEL = 8


async def _abort_requests(port: int, burst: int, until: float) -> int:
    """Make and abort requests until the time has come; return how many."""
    aborted = 0
    while time.monotonic() < until:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        http2 = H2Connection(H2Configuration(client_side=True))
        http2.initiate_connection()
        for _ in range(burst):
            stream = http2.get_next_available_stream_id()
            head = ((":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com"))
            http2.send_headers(stream, head, end_stream=True)
            http2.reset_stream(stream, _CANCEL)
        writer.write(http2.data_to_send())
        await writer.drain()
        await asyncio.sleep(_PAUSE_SECONDS)
        writer.close()
        aborted += burst
    return aborted


def attack(transport: str, burst: int) -> str:
    """Measure one server under one attack, as a row of a table."""
    with Server(transport) as server, Envoy(answering_gateway(("127.0.0.1", server.port))) as envoy:
        load = subprocess.Popen(
            [tool("wrk", "wrk"), "-t1", "-c16", f"-d{SECONDS}s", "-H", "x-tenant-id: tenant-1", envoy.url],
            stdout=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + SECONDS - 0.5
        aborted = asyncio.run(_abort_requests(envoy.port, burst, until)) if burst else 0
        report, _ = load.communicate()
        stats = envoy.stats()
    made = re.search(r"(\d+) requests in", report)
    return (
        f"{aborted / SECONDS:.0f} | {int(made[1]) / SECONDS if made else 0:.0f} "
        f"| {stats['http.gateway.ext_authz.error']} | {stats['cluster.authz.upstream_cx_total']}"
    )


def main() -> None:
    """Print a table."""
    print(
        "| server | aborted/s | others' requests/s | others' checks failed | connections from Envoy |\n"
        "|---|---|---|---|---|"
    )
    for transport in sys.argv[1:] or OURS:
        for burst in BURSTS:
            print(f"| {transport} | {attack(transport, burst)} |", flush=True)


if __name__ == "__main__":
    main()
