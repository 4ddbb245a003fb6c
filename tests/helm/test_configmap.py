"""configmap.yaml: the settings file."""

from typing import Any

import pytest
from support.helm import render


def test_by_default_only_what_the_chart_says() -> None:
    assert render().settings() == {
        "listen": "0.0.0.0:9000",
        "admin_listen": "0.0.0.0:9001",
        "drain_seconds": 20,
        "grace_seconds": 10,
        "snapshot_file": "/var/lib/authz-server/snapshot",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_request_bytes", 2097152),
        ("max_snapshot_age_seconds", 3600.5),
        ("show_reason", True),
        ("fold_path_case", False),
        ("tenant_from", ["host:{tenant}.example.com", "query:tenant_id"]),
        ("tenant_from", "host:{tenant}.example.com, query:t"),
        ("denied_status", {"blocked": 404}),
        ("routing_header", "x-queue"),
        ("unknown_tenant", "none"),
        ("transport", "asyncio"),
    ],
)
def test_a_setting_arrives_as_it_was_written(name: str, value: Any) -> None:
    found = render({"settings": {name: value}}).settings()[name]
    assert (found, type(found)) == (value, type(value))
