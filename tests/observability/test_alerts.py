"""Each alert fires on what it is for, clears afterwards, and has its section in the runbook. Judged by promtool."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from support.prometheus import needs

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "helm/authz-server/files/alerts.yaml"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
POD = 'namespace="authz-system",job="authz-server"'
FIRES_AT, CLEARS_AT = "29m", "149m"
"""Each series is bad for 30 minutes, then good for two hours: longer than any window."""
FIRES_LATER = {"AuthzServerJobFailed": "59m"}
"""A job may take half an hour until it has failed."""
CRONJOB = 'namespace="authz-system",cronjob="authz-server-reconcile"'


def counter(labels: str, rate: int) -> dict[str, str]:
    """A counter that grows by `rate` a minute while things are bad, and then stands."""
    return {"series": labels, "values": f"0+{rate}x30 {rate * 30}+0x120"}


def steady(labels: str, rate: int) -> dict[str, str]:
    return {"series": labels, "values": f"0+{rate}x150"}


def gauge(labels: str, bad: float, good: float) -> dict[str, str]:
    return {"series": labels, "values": f"{bad}+0x29 {good}+0x120"}


def slow(metric: str) -> list[dict[str, str]]:
    """A histogram of which everything is in the last bucket, then in the first."""
    return [
        {"series": f'{metric}_bucket{{{POD},le="0.00002"}}', "values": "0+0x29 0+60x120"},
        {"series": f'{metric}_bucket{{{POD},le="2.5"}}', "values": "0+0x29 0+60x120"},
        {"series": f'{metric}_bucket{{{POD},le="60"}}', "values": "0+60x150"},
        {"series": f'{metric}_bucket{{{POD},le="+Inf"}}', "values": "0+60x150"},
    ]


def pods(metric: str, first: str, second: str) -> list[dict[str, str]]:
    return [
        {"series": f'{metric}{{{POD},pod="a"}}', "values": first},
        {"series": f'{metric}{{{POD},pod="b"}}', "values": second},
    ]


CHECKS = f'authz_checks_total{{{POD},outcome="ok",reason="allowed"}}'
DENIED = f'authz_checks_total{{{POD},outcome="denied",reason="%s"}}'
CASES: dict[str, list[dict[str, str]]] = {
    "AuthzServerCannotDecide": [counter(f"authz_unavailable_total{{{POD}}}", 60)],
    "AuthzServerShedding": [counter(f"authz_shed_total{{{POD}}}", 60)],
    "AuthzServerNoSnapshotFile": [gauge(f"authz_snapshot_file_good{{{POD}}}", 0, 1)],
    "AuthzServerNotReady": pods("authz_ready", "1+0x150", "0+0x29 1+0x120"),
    "AuthzServerSnapshotOld": [gauge(f"authz_snapshot_age_seconds{{{POD}}}", 61, 5)],
    "AuthzServerReplicasBehind": pods("authz_snapshot_revision", "8+0x150", "7+0x29 8+0x120"),
    "AuthzServerReplicasDisagree": [
        {"series": f'authz_snapshot_info{{{POD},pod="a",epoch="e1"}}', "values": "1+0x150"},
        {"series": f'authz_snapshot_info{{{POD},pod="b",epoch="e2"}}', "values": "1+0x29"},
        {"series": f'authz_snapshot_info{{{POD},pod="b",epoch="e1"}}', "values": "_x29 1+0x120"},
    ],
    "AuthzServerRegistryBehind": pods("authz_registry_behind", "0+0x150", "1+0x29 0+0x120"),
    "AuthzServerRegistryDisagrees": pods("authz_registry_disagreeing", "0+0x150", "1+0x29 0+0x120"),
    "AuthzServerJobFailed": [
        {"series": f"kube_cronjob_created{{{CRONJOB}}}", "values": "0+0x150"},
        {"series": f"kube_cronjob_status_last_schedule_time{{{CRONJOB}}}", "values": "60+0x59 3660+0x90"},
        {"series": f"kube_cronjob_status_last_successful_time{{{CRONJOB}}}", "values": "_x61 3690+0x88"},
    ],
    "AuthzServerUnreadableRecords": [gauge(f"authz_snapshot_unreadable_records{{{POD}}}", 2, 0)],
    "AuthzServerIncident": [gauge(f"authz_store_incident{{{POD}}}", 1, 0)],
    "AuthzServerEditedByHand": [gauge(f"authz_store_edited_collections{{{POD}}}", 1, 0)],
    "AuthzServerChangesLost": [{"series": f"authz_changes_lost_total{{{POD}}}", "values": "0+0x19 2+0x130"}],
    "AuthzServerRedisAway": pods("authz_redis_connected", "1+0x150", "0+0x29 1+0x120"),
    "AuthzServerInternalErrors": [counter(DENIED % "internal_error", 1)],
    "AuthzServerBadRequests": [steady(CHECKS, 600), counter(DENIED % "invalid_client_address", 60)],
    "AuthzServerDenialSurge": [
        {"series": DENIED % "blocked", "values": "0+60x22 1320+6000x7 43320+60x120"},
    ],
    "AuthzServerSlow": slow("authz_check_seconds"),
    "AuthzServerQueueing": slow("authz_queue_seconds"),
    "AuthzServerChangesSpreadSlowly": slow("authz_propagation_seconds"),
    "AuthzServerDecisionsNotLogged": [counter(f"authz_decision_log_dropped_total{{{POD}}}", 60)],
}


def test_every_alert_has_a_case() -> None:
    assert {rule["alert"] for rule in RULES} == set(CASES)


def test_every_alert_leads_to_its_section_of_the_runbook() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    anchors = {heading.strip().lower() for heading in re.findall(r"^## (.*)$", runbook, re.MULTILINE)}
    links = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in RULES}
    assert links == {name: f"docs/runbook.md#{name.lower()}" for name in links}
    assert {name.lower() for name in links} <= anchors


@pytest.mark.parametrize("name", CASES)
@pytest.mark.integration
def test_an_alert_fires_and_clears(name: str, tmp_path: Path) -> None:
    firing = f'count(ALERTS{{alertname="{name}",alertstate="firing"}})'
    case = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": CASES[name],
                "promql_expr_test": [
                    {
                        "expr": firing,
                        "eval_time": FIRES_LATER.get(name, FIRES_AT),
                        "exp_samples": [{"labels": "{}", "value": 1}],
                    },
                    {"expr": firing, "eval_time": CLEARS_AT, "exp_samples": []},
                    {"expr": "ALERTS", "eval_time": CLEARS_AT, "exp_samples": []},
                ],
            }
        ],
    }
    path = tmp_path / "case.yaml"
    path.write_text(json.dumps(case))
    done = subprocess.run([needs("promtool"), "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
