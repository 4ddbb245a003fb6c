"""Values that a schema can judge: mistyped names and wrong types never reach a cluster."""

from typing import Any

import helm_python
import pytest
import yaml
from support.chart import CHART, ChartValues, generated
from support.helm import nested, render


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("replcas", 3),
        ("replicas", 0),
        ("replicas", "3"),
        ("image.tag", 1.25),
        ("image.digest", "sha256:12"),
        ("image.pullPolicy", "Sometimes"),
        ("imagePullSecrets", ["registry"]),
        ("redis.password", "in-plain-text"),
        ("settings.unknown_tennant", "deny"),
        ("settings.unknown_tenant", "refuse"),
        ("settings.retry_after_seconds", -1),
        ("settings.max_request_bytes", "1Mi"),
        ("settings.listen", "0.0.0.0:9000"),
        ("settings.redis_password", "in-plain-text"),
        ("settings.drain_seconds", 5),
        ("ports.grpc", 443),
        ("ports.admin", 70000),
        ("listenAddress", "127.0.0.1"),
        ("drain.seconds", 0),
        ("podDisruptionBudget.maxUnavailable", "a quarter"),
        ("podLabels", {"tier": 1}),
        ("spread.zones", "Always"),
        ("networkPolicy.redis.ports", ["6379"]),
        ("istio.gateway.labels", {"istio": 1}),
        ("istio.provider.name", "Authz_Server"),
        ("istio.provider.timeout", "500"),
        ("istio.callers.principals", ["gateway"]),
        ("istio.customPolicy.exemptPaths", ["healthz"]),
        ("istio.customPolicy.exemptPaths", ["/public*"]),
        ("istio.gateway.trustedHops", -1),
        ("cleanup.olderThan", "soon"),
        ("serviceMonitor.interval", 15),
        ("extraObjects", [7]),
    ],
    ids=str,
)
def test_a_value_that_is_refused(path: str, value: Any) -> None:
    with pytest.raises(helm_python.HelmValuesError, match=path.split(".")[-2 if "." in path else -1]):
        render(nested(path, value))


def test_the_defaults_fit() -> None:
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.values)


def test_values_of_a_parent_chart_pass() -> None:
    render({"global": {"anything": 1}})


@pytest.mark.parametrize("number", [0, 1], ids=["values.schema.json", "README.md"])
def test_generated_files_are_current(number: int) -> None:
    """`make chart` writes them."""
    path, text = list(generated())[number]
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: null\n", "a: a default of null does not tell the type"),
        ("# Words.\na:\n  # Words.\n  b: []\n", "a.b: a list does not tell what it holds"),
        ("# Words.\na: {}\n", "a: an empty map does not tell what it holds"),
        ("a: 1\n", "a: has no comment"),
        ("# Words.\n# @schemma {minimum: 1}\na: 1\n", "a: '@schemma {minimum: 1}' is neither"),
    ],
)
def test_values_that_the_generator_refuses(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ChartValues(text)


def test_what_the_generator_makes_of_a_value() -> None:
    text = yaml.safe_dump({"limit": 3, "group": {"enabled": True}}, sort_keys=False)
    text = text.replace("limit", "# How many\n# at most.\n# @schema {minimum: 1}\nlimit")
    values = ChartValues(text)
    assert values.schema["properties"]["limit"] == {"description": "How many at most.", "type": "integer", "minimum": 1}
    group = values.schema["properties"]["group"]
    assert group == {"type": "object", "additionalProperties": False, "properties": {"enabled": {"type": "boolean"}}}
    assert [".".join(value.path) for value in values.values] == ["limit", "group", "group.enabled"]
