"""Leaving under load, through a real Envoy: `python -m loadtest.drain [TRANSPORT...]`.

Two servers behind one Envoy, wrk in front of it. One server leaves: its endpoint is taken out, as Kubernetes would, and
half a second later its transport is drained. Counted are requests that failed, of all that were made; none should.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from authz_server.demo.envoy import Envoy
from authz_server.demo.envoy_config import AUTHZ_CLUSTER, Address
from loadtest.gateway import answering_gateway
from loadtest.processes import Server, tool
from loadtest.served import TRANSPORTS

TRIES = 10
SECONDS = 3


def _endpoints(path: Path, addresses: list[Address]) -> None:
    """Write the cluster's endpoints as Envoy reads them; it takes note of the rename."""
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}} for host, port in addresses
    ]
    resource = {
        "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": AUTHZ_CLUSTER,
        "endpoints": [{"lb_endpoints": endpoints}],
    }
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"version_info": str(len(addresses)), "resources": [resource]}))
    new.rename(path)


def _config(endpoints: Path) -> dict[str, Any]:
    """The gateway, which finds the authorization servers by a file."""
    config = answering_gateway(("127.0.0.1", 1))
    config["node"] = {"id": "loadtest", "cluster": "loadtest"}
    for cluster in config["static_resources"]["clusters"]:
        if cluster["name"] == AUTHZ_CLUSTER:
            del cluster["load_assignment"]
            source = {"path_config_source": {"path": str(endpoints)}, "resource_api_version": "V3"}
            cluster.update(type="EDS", eds_cluster_config={"eds_config": source})
    return config


def leave(transport: str) -> tuple[int, int]:
    """Have one of two servers leave, and return how many requests were made and how many failed."""
    with tempfile.TemporaryDirectory() as directory, Server(transport) as staying, Server(transport) as leaving:
        endpoints = Path(directory) / "endpoints.json"
        both = [("127.0.0.1", staying.port), ("127.0.0.1", leaving.port)]
        _endpoints(endpoints, both)
        with Envoy(_config(endpoints)) as envoy:
            load = subprocess.Popen(
                [tool("wrk", "wrk"), "-t1", "-c16", f"-d{SECONDS}s", "-H", "x-tenant-id: tenant-1", envoy.url],
                stdout=subprocess.PIPE,
                text=True,
            )
            time.sleep(1)
            _endpoints(endpoints, both[:1])
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
    for transport in sys.argv[1:] or TRANSPORTS:
        tries = [leave(transport) for _ in range(TRIES)]
        requests, failed = sum(made for made, _ in tries), sum(failed for _, failed in tries)
        print(f"| {transport} | {TRIES} | {requests} | {failed} |", flush=True)


if __name__ == "__main__":
    main()
