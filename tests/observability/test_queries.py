"""Every query of the dashboard and of the alerts, asked of a real Prometheus that scrapes a server with traffic."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, start_http_server
from support.process import ServerProcess, apply_writes, init_policy
from support.prometheus import Prometheus

from authz_server.demo.valkey import Valkey
from authz_server.policy.access import Entry, Side, own_list
from authz_server.policy.addresses import parse_network
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.records import entry_key, record_key
from authz_server.store.interface import Write

FILES = Path(__file__).parents[2] / "helm/authz-server/files"
PANELS = json.loads((FILES / "dashboard.json").read_text())["panels"]
VARIABLES = {"$namespace": ".*", "$job": ".*"}
RULES = [rule for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
COMPARISON = re.compile(r" ([<>]) (?=[0-9.]+$)")
QUERIES = {
    **{
        f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel.get("targets", ())
    },
    # Whether an alert fires is for promtool; here: that what it compares is there.
    **{rule["alert"]: COMPARISON.sub(r" \1 bool ", rule["expr"]) for rule in RULES},
}

BLOCK = Entry(parse_network("198.51.100.0/24"), reason="scraper", author="ann", created_at=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """In place of kube-state-metrics, which needs a cluster: the series of it that are asked for, under its names."""
    registry = CollectorRegistry()
    for name in ("created", "status_last_schedule_time", "status_last_successful_time"):
        gauge = Gauge(f"kube_cronjob_{name}", name, ("namespace", "cronjob"), registry=registry)
        gauge.labels("authz-system", "authz-server-reconcile").set_to_current_time()
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def prometheus(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    directory = tmp_path_factory.mktemp("queries")
    with Valkey() as valkey:
        init_policy(valkey.url)
        with (
            ServerProcess(
                directory, {"AUTHZ_REDIS_URL": valkey.url, "AUTHZ_SNAPSHOT_FILE": str(directory / "last.snapshot")}
            ) as server,
            Prometheus(directory, [server.admin, cluster]) as prometheus,
        ):
            server.wait_ready()
            prometheus.child.wait_until(lambda: prometheus.query("authz_ready") == [1], what="a scrape", timeout=20)
            # After the first scrape, for a rate needs a change that was seen.
            instance, tenant = Instance("queue-1"), Tenant("acme", "queue-1")
            writes = [Write(record_key(record), None, record) for record in (instance, tenant)]
            apply_writes(
                valkey.url, "c1", Write(entry_key(own_list("global", Side.BLOCK), BLOCK), None, BLOCK), *writes
            )
            server.wait_log("change applied")
            for _ in range(5):
                server.check("198.51.100.7")
                server.check("203.0.113.7", x_tenant_id="acme")
            prometheus.child.wait_until(
                lambda: sum(prometheus.query("rate(authz_checks_total[1m])")) > 0, what="a second scrape", timeout=20
            )
            yield prometheus


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.integration
def test_a_query_returns_data(name: str, prometheus: Prometheus) -> None:
    expression = QUERIES[name]
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    values = prometheus.query(expression)
    assert values
    assert not any(math.isnan(value) for value in values)


def test_every_alert_compares_with_a_number() -> None:
    assert all(COMPARISON.search(rule["expr"]) for rule in RULES)
