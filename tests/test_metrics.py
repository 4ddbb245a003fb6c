"""What Prometheus sees: Envoy's words, and no label that grows with traffic."""

import pytest
from prometheus_client import CollectorRegistry

from authz_server.counts import CheckCounts
from authz_server.loader import Source
from authz_server.metrics import BUSIEST_TENANTS, WINDOW_SECONDS, BusiestTenants, Metrics, StateCollector
from authz_server.policy.access import Enforcement, ScopeOutcome
from authz_server.policy.addresses import parse_address
from authz_server.policy.affinity import Affinity
from authz_server.policy.decision import Allowed, Denied
from authz_server.policy.reasons import Reason
from authz_server.policy.records import RecordKey, RecordKind, Unreadable
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.replicas import Registry
from authz_server.store.interface import SILENT_SECONDS, Position, Replica, Report

ADDRESS = parse_address("203.0.113.7")
ALLOWING = (Reason.ALLOWED, Reason.ALLOWLISTED)


@pytest.mark.parametrize("reason", Reason)
def test_checks_are_counted_by_outcome_and_reason(reason: Reason) -> None:
    metrics = Metrics()
    decision = Allowed(reason, ADDRESS) if reason in ALLOWING else Denied(reason)
    labels = {"outcome": "ok" if reason in ALLOWING else "denied", "reason": reason.value}
    assert metrics.registry.get_sample_value("authz_checks_total", labels) == 0, "there before its first event"
    metrics.observe([decision], 0.0001)
    metrics.observe([decision], 0.0002)
    assert metrics.registry.get_sample_value("authz_checks_total", labels) == 2
    assert metrics.registry.get_sample_value("authz_check_seconds_count") == 2
    assert metrics.registry.get_sample_value("authz_check_seconds_sum") == pytest.approx(0.0003)


def test_durations_are_counted_below_every_bound_that_they_do_not_exceed() -> None:
    metrics = Metrics()
    for seconds in (0.0, 0.00002, 0.000021, 0.25, 0.26, 7.0):
        metrics.observe([Denied(Reason.BLOCKED)], seconds)
    (family,) = (family for family in metrics.registry.collect() if family.name == "authz_check_seconds")
    counted = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert counted == {
        "2e-05": 2,
        **dict.fromkeys(("5e-05", "0.0001", "0.00025", "0.0005", "0.001", "0.0025", "0.005", "0.01", "0.05"), 3),
        "0.25": 4,
        "+Inf": 6,
    }


def test_how_long_checks_waited() -> None:
    metrics = Metrics()
    metrics.observe_wait(0.0002, 3)
    metrics.observe_wait(0.02, 1)
    assert metrics.registry.get_sample_value("authz_queue_seconds_bucket", {"le": "0.0001"}) == 0
    assert metrics.registry.get_sample_value("authz_queue_seconds_bucket", {"le": "0.00025"}) == 3
    assert metrics.registry.get_sample_value("authz_queue_seconds_count") == 4
    assert metrics.registry.get_sample_value("authz_queue_seconds_sum") == pytest.approx(0.0206)


def test_the_process_itself() -> None:
    assert (Metrics().registry.get_sample_value("process_resident_memory_bytes") or 0) > 1 << 20


def test_what_shadow_scopes_would_have_denied_is_counted_by_kind_of_scope() -> None:
    metrics = Metrics()
    scopes = (
        ScopeOutcome("global", Enforcement.ENFORCE, Reason.BLOCKED),
        ScopeOutcome("tenant:acme", Enforcement.SHADOW, Reason.BLOCKED),
        ScopeOutcome("resource:docs", Enforcement.SHADOW, Reason.NOT_ALLOWLISTED),
        ScopeOutcome("resource:site", Enforcement.SHADOW, Reason.ALLOWLISTED),
    )
    metrics.observe([Denied(Reason.BLOCKED, ADDRESS, scopes=scopes, shadow_denials=scopes[1:3])], 0.0001)
    for kind, expected in {"global": 0, "tenant": 1, "resource": 1}.items():
        assert metrics.registry.get_sample_value("authz_shadow_denials_total", {"scope_kind": kind}) == expected


def test_where_instances_come_from_is_counted_for_allowed_requests() -> None:
    metrics = Metrics()
    for affinity in (Affinity.PINNED, Affinity.PINNED, Affinity.HASHED, Affinity.NONE):
        metrics.observe([Allowed(Reason.ALLOWED, ADDRESS, "acme", "queue-1", affinity)], 0.0001)
    metrics.observe([Denied(Reason.BLOCKED, ADDRESS)], 0.0001)
    counted = {
        source: metrics.registry.get_sample_value("authz_affinity_total", {"source": source.value})
        for source in Affinity
    }
    assert counted == {Affinity.PINNED: 2, Affinity.HASHED: 1, Affinity.NONE: 1}


def busiest(collector: BusiestTenants) -> dict[str, float]:
    (family,) = collector.collect()
    return {sample.labels["tenant"]: sample.value for sample in family.samples}


def test_the_busiest_tenants_of_the_last_window_are_shown_and_no_others() -> None:
    now = 0.0
    counts = CheckCounts()
    collector = BusiestTenants(counts, clock=lambda: now)
    for number in range(BUSIEST_TENANTS + 5):
        allowed = Allowed(Reason.ALLOWED, ADDRESS, f"t{number}", "queue-1", Affinity.PINNED)
        counts.count([allowed] * (number + 1), 0.0001)
    now = 2.0
    assert busiest(collector)["t9"] == 10 / now, "so far"
    now = WINDOW_SECONDS
    shown = busiest(collector)
    assert len(shown) == BUSIEST_TENANTS
    assert shown[f"t{BUSIEST_TENANTS + 4}"] == (BUSIEST_TENANTS + 5) / WINDOW_SECONDS
    assert "t4" not in shown
    assert busiest(collector) == shown, "a second scraper sees the same"
    now = 2 * WINDOW_SECONDS
    assert busiest(collector) == {}


@pytest.mark.parametrize(("affinity", "tenant"), [(Affinity.HASHED, "made-up"), (Affinity.NONE, "made-up")])
def test_tenants_that_are_not_registered_grow_nothing(affinity: Affinity, tenant: str) -> None:
    counts = CheckCounts()
    counts.count([Allowed(Reason.ALLOWED, ADDRESS, tenant, "queue-1", affinity)], 0.0001)
    counts.count([Denied(Reason.UNKNOWN_TENANT, ADDRESS, tenant)], 0.0001)
    assert not counts.tenants()


def test_propagation_is_never_negative_whatever_the_clocks_say() -> None:
    metrics = Metrics()
    metrics.observe_change(100.0, 100.02)
    metrics.observe_change(100.0, 99.0)
    assert metrics.registry.get_sample_value("authz_propagation_seconds_sum") == pytest.approx(0.02)
    assert metrics.registry.get_sample_value("authz_propagation_seconds_count") == 2


def test_unavailable_is_counted() -> None:
    metrics = Metrics()
    metrics.count_unavailable()
    assert metrics.registry.get_sample_value("authz_unavailable_total") == 1


def collect(
    snapshot: Snapshot | None,
    age_seconds: float | None,
    *,
    connected: bool,
    ready: bool,
    file_problem: str | None = None,
    servers: Registry | None = None,
) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(
        StateCollector(
            current=lambda: snapshot,
            source=lambda: Source.FILE,
            file_problem=lambda: file_problem,
            age_seconds=lambda: age_seconds,
            connected=lambda: connected,
            incident=lambda: True,
            edited=lambda: 2,
            lost=lambda: 5,
            ready=lambda: ready,
            log_dropped=lambda: 3,
            shed=lambda: 7,
            in_flight=lambda: 11,
            packed_bytes=lambda: 4096,
            registry=lambda: servers,
        )
    )
    return registry


def test_without_a_snapshot_there_are_no_figures_of_one() -> None:
    registry = collect(None, None, connected=False, ready=False)
    assert registry.get_sample_value("authz_ready") == 0
    assert registry.get_sample_value("authz_redis_connected") == 0
    assert registry.get_sample_value("authz_snapshot_age_seconds") is None
    assert registry.get_sample_value("authz_snapshot_revision") is None


def replica(name: str, position: Position | None, *, silent_seconds: float = 1.0) -> Replica:
    return Replica(name, Report(name, "p", 0.0, position), silent_seconds)


def test_what_the_servers_have_reported() -> None:
    servers = Registry(
        (
            replica("newest", Position("e", 7, "c7")),
            replica("another of the same revision", Position("e", 7, "other")),
            replica("ahead", Position("e", 8, "c8")),
            replica("behind", Position("e", 6, "c6")),
            replica("cut off", Position("e", 5, "c5"), silent_seconds=SILENT_SECONDS + 1),
            replica("without a policy", None),
            replica("of another epoch", Position("f", 7, "c7")),
            Replica("unreadable", None, 0.0, "not JSON"),
        ),
        Position("e", 7, "c7"),
    )
    registry = collect(None, None, connected=True, ready=True, servers=servers)
    counted = {
        state: registry.get_sample_value("authz_registry_servers", {"state": state})
        for state in ("reporting", "unknown", "unreadable")
    }
    assert counted == {"reporting": 6, "unknown": 1, "unreadable": 1}
    assert registry.get_sample_value("authz_registry_behind") == 3
    assert registry.get_sample_value("authz_registry_disagreeing") == 1


def test_of_servers_of_a_store_without_a_policy_nobody_is_behind() -> None:
    servers = Registry((replica("a", Position("e", 7, "c")), replica("b", None)), None)
    registry = collect(None, None, connected=True, ready=True, servers=servers)
    assert registry.get_sample_value("authz_registry_behind") == 0
    assert registry.get_sample_value("authz_registry_disagreeing") == 1


def test_servers_that_are_not_known_are_not_counted() -> None:
    registry = collect(None, None, connected=False, ready=True)
    assert registry.get_sample_value("authz_registry_behind") is None


def test_figures_of_a_snapshot() -> None:
    unreadable = (RecordKey(RecordKind.ENTRY, "10.0.0.0/8", "tenant:acme/block"), Unreadable("not JSON"))
    snapshot = build_snapshot([unreadable], epoch="e", revision=42, options=DecisionOptions())
    registry = collect(snapshot, 1.5, connected=True, ready=True)
    assert registry.get_sample_value("authz_ready") == 1
    assert registry.get_sample_value("authz_redis_connected") == 1
    assert registry.get_sample_value("authz_store_incident") == 1
    assert registry.get_sample_value("authz_store_edited_collections") == 2
    assert registry.get_sample_value("authz_changes_lost_total") == 5
    assert registry.get_sample_value("authz_snapshot_age_seconds") == 1.5
    assert registry.get_sample_value("authz_snapshot_revision") == 42
    assert registry.get_sample_value("authz_snapshot_info", {"epoch": "e", "source": "file"}) == 1
    assert registry.get_sample_value("authz_decision_log_dropped_total") == 3
    assert registry.get_sample_value("authz_shed_total") == 7
    assert registry.get_sample_value("authz_in_flight") == 11
    assert registry.get_sample_value("authz_snapshot_bytes") == 4096
    assert registry.get_sample_value("authz_snapshot_unreadable_records") == 1
    assert registry.get_sample_value("authz_snapshot_degraded_scopes") == 1
    kinds = ("lists", "entries", "scopes", "resources", "tenants", "instances")
    assert [registry.get_sample_value("authz_snapshot_records", {"kind": kind}) for kind in kinds] == [0, 1, 0, 0, 0, 0]
