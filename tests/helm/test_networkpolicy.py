"""networkpolicy.yaml: in come gateways and the scraper, out goes what Redis and names need."""

from typing import Any

import pytest
from support.helm import CI, Object, Rendered, render, render_file


def policy(found: Rendered, component: str) -> Object:
    for thing in found.of("networkpolicy.yaml"):
        if thing["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == component:
            return dict(thing["spec"])
    raise AssertionError(f"no policy for {component}")


def ports(rules: list[Any]) -> list[list[int]]:
    return [[port["port"] for port in rule.get("ports", [])] for rule in rules]


def test_who_may_call() -> None:
    found = policy(render(), "server")
    assert found["policyTypes"] == ["Ingress", "Egress"]
    grpc, admin = found["ingress"]
    gateway, test = grpc["from"]
    assert gateway == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "istio-ingress"}},
        "podSelector": {"matchLabels": {"istio": "ingress"}},
    }
    assert test["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
    assert ports([grpc, admin]) == [[9000], [9001, 15020, 15090]]
    assert all(rule.get("from") for rule in found["ingress"]), "a rule without `from` lets everybody in"


def test_without_tests_only_gateways() -> None:
    (source,) = policy(render({"tests": {"enabled": False}}), "server")["ingress"][0]["from"]
    assert source["podSelector"]["matchLabels"] == {"istio": "ingress"}


def test_where_it_may_go() -> None:
    found = policy(render(), "server")["egress"]
    assert ports(found) == [[53, 53], [6379], [15012]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"redis": {"url": "redis://redis.data/0"}}, [6379]),
        ({"redis": {"url": "rediss://redis.data:6380/0"}}, [6380]),
        ({"networkPolicy": {"redis": {"ports": [6379, 26379]}}}, [6379, 26379]),
        ({"redis": {"sentinel": {"nodes": ["a:26379", "b:26379", "c:26380"]}}}, [26379, 26380, 6379]),
        ({"redis": {"cluster": {"nodes": ["a:7000", "b:7001"]}}}, [7000, 7001]),
    ],
)
def test_the_ports_of_redis(values: dict[str, Any], expected: list[int]) -> None:
    found = render(values)
    for component in ("server", "authzctl"):
        assert expected in ports(policy(found, component)["egress"])


def test_the_peers_of_redis() -> None:
    (rule,) = [
        rule for rule in policy(render_file(CI["redis-tls-acl"]), "server")["egress"] if ports([rule]) == [[6380]]
    ]
    assert rule["to"][0]["podSelector"]["matchLabels"] == {"app": "redis"}


def test_without_a_sidecar_no_ports_of_one() -> None:
    found = policy(render_file(CI["without-istio"]), "server")
    assert ports(found["ingress"])[-1] == [9001]
    assert [15012] not in ports(found["egress"])


def test_nobody_calls_jobs() -> None:
    found = policy(render(), "authzctl")
    assert found["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in found


def test_only_the_chart_s_own_pods_reach_its_valkey() -> None:
    found = policy(render_file(CI["evaluation"]), "valkey")
    assert ports(found["ingress"]) == [[6379]]
    (rule,) = found["ingress"]
    components = [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in rule["from"]]
    assert components == ["server", "authzctl"]
    assert "egress" not in found


def test_the_collector_of_traces() -> None:
    found = policy(render({"settings": {"otlp_endpoint": "http://collector.observability:4317"}}), "server")
    assert [4317] in ports(found["egress"])


def test_further_rules() -> None:
    found = policy(render_file(CI["extra-objects"]), "server")
    assert found["ingress"][-1]["from"] == [{"ipBlock": {"cidr": "192.0.2.0/24"}}]
    assert found["egress"][-1]["to"] == [{"ipBlock": {"cidr": "198.51.100.0/24"}}]


def test_switched_off() -> None:
    assert render({"networkPolicy": {"enabled": False}}).of("networkpolicy.yaml") == []
