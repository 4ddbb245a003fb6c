"""The demo's gateway for measurements: Envoy itself answers what is allowed, so that no instance is what saturates."""

from typing import Any

from authz_server.demo.envoy_config import Address, GatewayOptions, gateway_config


def answering_gateway(authz: Address) -> dict[str, Any]:
    """The bootstrap of a gateway that checks every request and answers 200 to those that may pass."""
    config = gateway_config(GatewayOptions(authz=authz, instances={"queue-0": ("127.0.0.1", 1)}))
    filters = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
    (host,) = filters[-1]["typed_config"]["route_config"]["virtual_hosts"]
    host["routes"] = [{"match": {"prefix": "/"}, "direct_response": {"status": 200}}]
    return config
