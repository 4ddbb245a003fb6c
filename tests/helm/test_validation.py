"""Rules between values: wrong combinations end with a word on what to mend, all of them at once."""

from typing import Any

import helm_python
import pytest
from support.helm import REDIS, render

OWN_TLS: dict[str, Any] = {
    "tls": {"enabled": True, "secretName": "tls"},
    "istio": {"sidecar": False, "destinationRule": {"tls": {"mode": "SIMPLE"}}},
}
AUTOSCALED: dict[str, Any] = {"replicas": None, "autoscaling": {"enabled": True}}


def problems(values: dict[str, Any]) -> list[str]:
    """What the chart says of values that do not fit; fails when they do."""
    with pytest.raises(helm_python.HelmRenderError) as caught:
        render(values)
    head, *lines = str(caught.value).strip().splitlines()
    assert head.endswith("these values do not fit together:")
    assert all(line.startswith("- ") for line in lines)
    return [line.removeprefix("- ") for line in lines]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"redis": {}}, ["name the Redis that holds the policy by url", "evaluation.enabled"]),
        ({"evaluation": {"enabled": True}}, ["redis.url and evaluation.enabled (which brings", "one store"]),
        (
            {"redis": {"cluster": {"nodes": ["a:1"]}, "sentinel": {"nodes": ["b:2"]}}},
            ["redis.sentinel.nodes and redis.cluster.nodes: there is one store"],
        ),
        ({"redis": {"url": "redis://h", "tls": {"enabled": True}}}, ["redis.tls.enabled is for", "rediss://"]),
        ({"redis": {"cluster": {"nodes": ["a:1"]}, "tls": {"clientSecret": "c"}}}, ["redis.tls.enabled with"]),
        ({"redis": {"url": "redis://h", "sentinel": {"username": "u"}}}, ["redis.sentinel.nodes is empty"]),
        ({"redis": {"existingSecret": "s"}, "evaluation": {"enabled": True}}, ["redis.existingSecret", "leave"]),
        ({"redis": {"url": "redis://h", "jobs": {"username": "a"}}}, ["redis.jobs.existingSecret belong together"]),
        ({"redis": {"url": "redis://h", "jobs": {"existingSecret": "s"}}}, ["redis.jobs.username and"]),
        ({"redis": {"url": "redis://u:pw@h/0"}}, ["redis.url holds a user or a password", "redis.existingSecret"]),
        ({"redis": {"url": "redis://:pw@h/0"}}, ["redis.url holds a user or a password"]),
        ({"redis": {"url": "h:6379"}}, ["redis.url is h:6379", "redis://"]),
        ({"redis": {"url": "redis://h", "tls": {"caSecret": "ca"}}}, ["redis.tls.caSecret", "rediss://"]),
        ({"drain": {"seconds": 10}}, ["drain.seconds (10)", "drain.endpointPropagationSeconds (10)"]),
        (
            {"drain": {"terminationGracePeriodSeconds": 30}},
            ["drain.terminationGracePeriodSeconds (30)", "together (30)"],
        ),
        (
            {"snapshotFile": {"enabled": False, "persistence": {"enabled": True}}},
            ["snapshotFile.persistence.enabled", "snapshotFile.enabled is not"],
        ),
        ({"replicas": None}, ["replicas is null", "autoscaling"]),
        ({"autoscaling": {"enabled": True}}, ["replicas (3)", "set replicas to null"]),
        (
            {"replicas": None, "autoscaling": {"enabled": True, "minReplicas": 11}},
            ["autoscaling.minReplicas (11)", "autoscaling.maxReplicas (10)"],
        ),
        ({"podDisruptionBudget": {"maxUnavailable": 3}}, ["podDisruptionBudget.maxUnavailable (3)"]),
        (AUTOSCALED | {"podDisruptionBudget": {"maxUnavailable": 3}}, ["podDisruptionBudget.maxUnavailable (3)"]),
        ({"ports": {"grpc": 9001}}, ["ports.grpc and ports.admin are both 9001"]),
        (OWN_TLS | {"tls": {"enabled": True}}, ["tls.enabled needs tls.secretName"]),
        ({"tls": {"secretName": "tls"}}, ["tls.secretName", "tls.enabled is not"]),
        ({"tls": {"mutual": True}, "tests": {"enabled": False}}, ["tls.mutual", "tls.enabled is not"]),
        (
            {
                "tls": {"enabled": True, "secretName": "tls", "mutual": True},
                "istio": {"sidecar": False, "destinationRule": {"tls": {"mode": "MUTUAL"}}},
            },
            ["tests.clientSecretName"],
        ),
        (OWN_TLS | {"istio": {"destinationRule": {"tls": {"mode": "SIMPLE"}}}}, ["istio.sidecar", "to false"]),
        (OWN_TLS | {"istio": {"sidecar": False}}, ["istio.destinationRule.tls", "SIMPLE or MUTUAL"]),
        (
            OWN_TLS | {"tls": {"enabled": True, "secretName": "s", "mutual": True}, "tests": {"enabled": False}},
            ["istio.destinationRule.tls.mode to MUTUAL"],
        ),
        ({"istio": {"sidecar": False}}, ["neither tls.enabled nor istio.sidecar", "plain text"]),
        ({"istio": {"destinationRule": {"tls": {"mode": "SIMPLE"}}}}, ["istio.destinationRule.tls is set"]),
        (
            {"istio": {"provider": {"failOpen": True, "statusOnError": 503}}},
            ["istio.provider.failOpen", "istio.provider.statusOnError"],
        ),
        (
            {"istio": {"provider": {"failOpen": True}, "stripHeaders": {"enabled": False}}},
            ["istio.provider.failOpen without istio.stripHeaders"],
        ),
        (
            {"istio": {"customPolicy": {"exemptPaths": ["/healthz"]}, "stripHeaders": {"enabled": False}}},
            ["istio.customPolicy.exemptPaths without istio.stripHeaders"],
        ),
        (
            {"istio": {"gateway": {"proxyProtocol": True, "trustedHops": 2}}},
            ["istio.gateway.proxyProtocol", "istio.gateway.trustedHops (2)"],
        ),
        (
            {"istio": {"gateway": {"proxyProtocol": True}}, "settings": {"trusted_peers": ["10.0.0.0/8"]}},
            ["istio.gateway.proxyProtocol", "settings.trusted_peers"],
        ),
    ],
)
def test_one_wrong_combination(values: dict[str, Any], words: list[str]) -> None:
    (problem,) = problems(values)
    assert [word for word in words if word not in problem] == []


def test_all_problems_at_once() -> None:
    values = {"redis": {}, "drain": {"seconds": 5}, "replicas": None, "istio": {"sidecar": False}}
    assert len(problems(values)) == 4


@pytest.mark.parametrize(
    "values",
    [
        OWN_TLS,
        AUTOSCALED,
        {"drain": {"terminationGracePeriodSeconds": 31}},
        {"drain": {"endpointPropagationSeconds": 10, "seconds": 11}},
        {"istio": {"gateway": {"trustedHops": 1}}, "settings": {"trusted_peers": ["10.0.0.0/8"]}},
        {"istio": {"provider": {"statusOnError": 503}}},
        {"istio": {"enabled": False, "sidecar": False}},
        {"redis": {"url": "rediss://h:6379/0", "tls": {"caSecret": "ca"}}},
        {"replicas": 1},
    ],
)
def test_combinations_that_fit(values: dict[str, Any]) -> None:
    render({**REDIS, **values})
