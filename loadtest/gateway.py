"""The demo's gateway under load: Envoy itself answers what is allowed, so that no instance is what saturates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from authz_server.demo.envoy_config import AUTHZ_CLUSTER, Address, GatewayOptions, gateway_config


def answering_gateway(authz: Address, timeout_seconds: float = 0.5) -> dict[str, Any]:
    """The bootstrap of a gateway that checks every request and answers 200 to those that may pass."""
    options = GatewayOptions(authz=authz, instances={"queue-0": ("127.0.0.1", 1)}, timeout_seconds=timeout_seconds)
    config = gateway_config(options)
    filters = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
    (host,) = filters[-1]["typed_config"]["route_config"]["virtual_hosts"]
    host["routes"] = [{"match": {"prefix": "/"}, "direct_response": {"status": 200}}]
    return config


def gateway_by_file(endpoints: Path) -> dict[str, Any]:
    """The same gateway, which finds the authorization servers by a file that `write_endpoints` writes."""
    config = answering_gateway(("127.0.0.1", 1))
    config["node"] = {"id": "gateway", "cluster": "gateway"}
    for cluster in config["static_resources"]["clusters"]:
        if cluster["name"] == AUTHZ_CLUSTER:
            del cluster["load_assignment"]
            source = {"path_config_source": {"path": str(endpoints)}, "resource_api_version": "V3"}
            cluster.update(type="EDS", eds_cluster_config={"eds_config": source})
    return config


def write_endpoints(path: Path, addresses: Sequence[Address]) -> None:
    """Write the authorization servers as Envoy reads them; it takes note of the rename."""
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
