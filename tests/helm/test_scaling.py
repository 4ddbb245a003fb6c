"""poddisruptionbudget.yaml and horizontalpodautoscaler.yaml."""

from support.helm import CI, render, render_file


def test_budget() -> None:
    found = render()
    budget = found.one("poddisruptionbudget.yaml")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == found.one("workload.yaml")["spec"]["selector"]
    assert render_file(CI["placement"]).one("poddisruptionbudget.yaml")["spec"]["maxUnavailable"] == "25%"
    assert render({"podDisruptionBudget": {"enabled": False}}).of("poddisruptionbudget.yaml") == []


def test_no_autoscaler_by_default() -> None:
    assert render().of("horizontalpodautoscaler.yaml") == []


def test_by_cpu_of_the_server_alone() -> None:
    found = render({"replicas": None, "autoscaling": {"enabled": True}})
    scaler = found.one("horizontalpodautoscaler.yaml")["spec"]
    (metric,) = scaler["metrics"]
    assert metric["containerResource"]["container"] == found.container()["name"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 10)
    assert "replicas" not in found.one("workload.yaml")["spec"]
    target = scaler["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", found.one("workload.yaml")["metadata"]["name"])


def test_by_checks_a_second_too() -> None:
    _, metric = render_file(CI["autoscaling"]).one("horizontalpodautoscaler.yaml")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "authz_checks_per_second"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "1500"}


def test_it_scales_a_stateful_set() -> None:
    values = {
        "replicas": None,
        "autoscaling": {"enabled": True},
        "snapshotFile": {"persistence": {"enabled": True}},
    }
    target = render(values).one("horizontalpodautoscaler.yaml")["spec"]["scaleTargetRef"]
    assert target["kind"] == "StatefulSet"
