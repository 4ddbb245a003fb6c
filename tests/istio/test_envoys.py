"""Envoy, in the versions that the practices are tried on."""

import subprocess

import pytest
from support.envoys import ENVOY_VERSIONS, binary_of

pytestmark = pytest.mark.integration


def test_the_versions_are_those_that_the_table_speaks_of() -> None:
    assert [version.rsplit(".", 1)[0] for version in ENVOY_VERSIONS] == ["1.36", "1.38", "1.40"]


@pytest.mark.parametrize("version", ENVOY_VERSIONS)
def test_the_binary_is_of_the_version(version: str) -> None:
    said = subprocess.run([binary_of(version), "--version"], capture_output=True, text=True, check=True).stdout
    assert f"/{version}/" in said
