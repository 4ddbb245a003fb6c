"""The Grafana dashboard, from a table of panels: `python helm/dashboard.py > helm/authz-server/files/dashboard.json`.

Every query names metrics of authz_server/metrics.py, and a test asks a real Prometheus each of them. `$job` and
`$namespace` are the dashboard's variables.
"""

import sys
from dataclasses import dataclass
from string import ascii_uppercase

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
PODS = 'namespace=~"$namespace",job=~"$job"'
"""Stands in queries where they say PODS."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph; `queries` are (PromQL, legend)."""

    title: str
    says: str
    unit: str
    queries: tuple[tuple[str, str], ...]


def _quantiles(buckets: str, quantiles: tuple[float, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((f"histogram_quantile({q}, sum by (le) (rate({buckets})))", f"p{q * 100:g}") for q in quantiles)


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Decisions",
        (
            Panel(
                "Checks",
                "Answered checks by outcome, and those that got UNAVAILABLE: Envoy's fail-open setting decides them.",
                "reqps",
                (
                    ("sum by (outcome) (rate(authz_checks_total{PODS}[5m]))", "{{outcome}}"),
                    ("sum(rate(authz_unavailable_total{PODS}[5m]))", "unavailable"),
                ),
            ),
            Panel(
                "Denials by reason",
                "A surge of one reason: look at the decision log for the list and the entry.",
                "reqps",
                (('sum by (reason) (rate(authz_checks_total{outcome="denied",PODS}[5m])) > 0', "{{reason}}"),),
            ),
            Panel(
                "Time to decide",
                "Reading, deciding and answering a check; of checks that were answered together, each its share.",
                "s",
                _quantiles("authz_check_seconds_bucket{PODS}[5m]", (0.5, 0.99, 0.999)),
            ),
            Panel(
                "Time in the queue",
                "From when a check was there whole until its decision began. grpcio knows it of Envoy's checks only.",
                "s",
                _quantiles("authz_queue_seconds_bucket{PODS}[5m]", (0.5, 0.99)),
            ),
            Panel(
                "In flight",
                "Calls received and not answered yet, by pod.",
                "short",
                (("authz_in_flight{PODS}", "{{pod}}"),),
            ),
            Panel(
                "What shadow scopes would have denied",
                "Before a scope is enforced, this must be what you expect.",
                "reqps",
                (("sum by (scope_kind) (rate(authz_shadow_denials_total{PODS}[5m]))", "{{scope_kind}}"),),
            ),
        ),
    ),
    (
        "Tenants",
        (
            Panel(
                "Where instances come from",
                "pinned: registered tenants; hashed: unregistered ones; none: no instance was named.",
                "reqps",
                (("sum by (source) (rate(authz_affinity_total{PODS}[5m]))", "{{source}}"),),
            ),
            Panel(
                "Busiest tenants",
                "Pinned tenants with the most allowed checks, over the last full minute of each pod.",
                "reqps",
                (("topk(20, sum by (tenant) (authz_busiest_tenants_checks_per_second{PODS}))", "{{tenant}}"),),
            ),
        ),
    ),
    (
        "Policy",
        (
            Panel(
                "Revision",
                "All pods must show one line; a pod that stays below serves old policy.",
                "none",
                (("authz_snapshot_revision{PODS}", "{{pod}}"),),
            ),
            Panel(
                "Age of the snapshot",
                "Time since Redis last confirmed that it is the newest state. It grows while Redis is away.",
                "s",
                (("authz_snapshot_age_seconds{PODS}", "{{pod}}"),),
            ),
            Panel(
                "Propagation",
                "From the change in Redis until a pod decides by it; clocks that differ are in it.",
                "s",
                _quantiles("authz_propagation_seconds_bucket{PODS}[1h]", (0.5, 0.99)),
            ),
            Panel(
                "Epochs in use",
                "More than one for longer than a restore takes: pods decide by different policies.",
                "none",
                (("count by (epoch) (authz_snapshot_info{PODS})", "{{epoch}}"),),
            ),
            Panel(
                "Servers by their reports to Redis",
                "Also those that are not scraped. Behind or of another epoch for long: `authzctl replica list`.",
                "short",
                (
                    ("max by (state) (authz_registry_servers{PODS})", "{{state}}"),
                    ("max(authz_registry_behind{PODS})", "behind"),
                    ("max(authz_registry_disagreeing{PODS})", "another epoch"),
                ),
            ),
            Panel(
                "The store",
                "Lost records (an incident), collections edited by hand, acknowledged changes that are lost.",
                "short",
                (
                    ("max(authz_store_incident{PODS})", "incident"),
                    ("max(authz_store_edited_collections{PODS})", "edited by hand"),
                    ("sum(increase(authz_changes_lost_total{PODS}[1h]))", "changes lost in an hour"),
                ),
            ),
            Panel(
                "Records",
                "By kind.",
                "short",
                (("max by (kind) (authz_snapshot_records{PODS})", "{{kind}}"),),
            ),
            Panel(
                "Size of the snapshot",
                "As it was loaded or packed last, and as its file has it; by pod.",
                "bytes",
                (("authz_snapshot_bytes{PODS}", "{{pod}}"),),
            ),
            Panel(
                "Records that cannot be read",
                "Their last good values, or closed ones, stand in for them; and the scopes that suffer by it.",
                "short",
                (
                    ("max(authz_snapshot_unreadable_records{PODS})", "records"),
                    ("max(authz_snapshot_degraded_scopes{PODS})", "scopes"),
                ),
            ),
        ),
    ),
    (
        "Pods",
        (
            Panel(
                "Ready, and connected to Redis",
                "Pods; without Redis decisions go on from the last snapshot.",
                "short",
                (("sum(authz_ready{PODS})", "ready"), ("sum(authz_redis_connected{PODS})", "connected")),
            ),
            Panel(
                "Load that is not taken on",
                "Checks beyond what can be answered in time get UNAVAILABLE; decisions that the log lost.",
                "reqps",
                (
                    ("sum(rate(authz_shed_total{PODS}[5m]))", "shed"),
                    ("sum(rate(authz_decision_log_dropped_total{PODS}[5m]))", "not logged"),
                ),
            ),
            Panel(
                "CPU",
                "Cores of each pod. A check is decided on one.",
                "short",
                (("rate(process_cpu_seconds_total{PODS}[5m])", "{{pod}}"),),
            ),
            Panel(
                "Memory",
                "Resident, of each pod.",
                "bytes",
                (("process_resident_memory_bytes{PODS}", "{{pod}}"),),
            ),
        ),
    ),
)


def build() -> str:
    """Return the dashboard as JSON."""
    built = (
        dashboard.Dashboard("authz-server")
        .uid("authz-server")
        .description("External authorization: decisions, tenants, the policy and how fast it spreads.")
        .tags(["envoy", "istio", "ext_authz"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("utc")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("namespace", "label_values(authz_ready, namespace)"))
        .with_variable(_variable("job", 'label_values(authz_ready{namespace=~"$namespace"}, job)'))
    )
    for title, panels in ROWS:
        built = built.with_row(dashboard.Row(title))
        for panel in panels:
            built = built.with_panel(_graph(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(built.build()) + "\n"


def _variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query(query)
        .multi(multi=True)
        .include_all(include_all=True)
        .current({"selected": True, "text": ["All"], "value": ["$__all"]})  # type: ignore[arg-type]
    )


def _graph(panel: Panel) -> timeseries.Panel:
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
    graph = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.says)
        .unit(panel.unit)
        .min(0)
        .height(8)
        .span(12)
        .datasource(SOURCE)
        .legend(legend)
        .fill_opacity(8)
    )
    for letter, (query, legend_format) in zip(ascii_uppercase, panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query.replace("PODS", PODS)).legend_format(legend_format).ref_id(letter)
        graph = graph.with_target(target)
    return graph


if __name__ == "__main__":
    sys.stdout.write(build())
