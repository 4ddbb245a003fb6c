"""servicemonitor.yaml, prometheusrule.yaml and dashboard.yaml: what carries the files of files/."""

import json
import re

import yaml
from support.chart import CHART
from support.helm import CI, render, render_file


def test_nothing_of_it_by_default() -> None:
    found = render()
    assert found.of("servicemonitor.yaml") + found.of("prometheusrule.yaml") + found.of("dashboard.yaml") == []


def test_the_monitor_scrapes_the_admin_port() -> None:
    found = render_file(CI["monitoring"])
    monitor, service = found.one("servicemonitor.yaml"), found.one("service.yaml")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint == {"port": "http-admin", "path": "/metrics", "interval": "30s"}
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_the_rules_are_those_of_the_file() -> None:
    rule = render_file(CI["monitoring"]).one("prometheusrule.yaml")
    assert rule["spec"] == yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_alerts_link_to_the_runbook_where_it_is_served() -> None:
    values = {"prometheusRule": {"enabled": True, "runbookUrl": "https://wiki.example/authz"}}
    rules = render(values).one("prometheusrule.yaml")["spec"]["groups"][0]["rules"]
    links = [rule["annotations"]["runbook_url"] for rule in rules]
    assert links
    assert all(link.startswith("https://wiki.example/authz#authzserver") for link in links)


def test_the_alert_on_jobs_names_those_of_this_release() -> None:
    found = render({"prometheusRule": {"enabled": True}, "fullnameOverride": "gate"})
    (rule,) = [
        rule
        for rule in found.one("prometheusrule.yaml")["spec"]["groups"][0]["rules"]
        if rule["alert"] == "AuthzServerJobFailed"
    ]
    (pattern,) = set(re.findall(r'cronjob=~"([^"]*)"', rule["expr"]))
    names = [job["metadata"]["name"] for job in found.of("cronjobs.yaml")]
    assert len(names) == 2
    assert all(re.fullmatch(pattern, name) for name in names)


def test_the_dashboard_is_that_of_the_file() -> None:
    found = render_file(CI["monitoring"]).one("dashboard.yaml")
    (text,) = found["data"].values()
    assert json.loads(text) == json.loads((CHART / "files/dashboard.json").read_text())
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["annotations"] == {"grafana_folder": "edge"}
