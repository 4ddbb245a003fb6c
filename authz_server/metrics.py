"""What Prometheus sees. Labels are Envoy's words and the reasons; no label grows with traffic or with tenants."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from authz_server.policy.access import Enforcement
from authz_server.policy.decision import Decision
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import Snapshot

_ALLOWING = (Reason.ALLOWED, Reason.ALLOWLISTED)
_SCOPE_KINDS = ("global", "tenant", "resource")
_SECONDS = (0.00002, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25)

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the number of series, and nothing here needs them


class Metrics:
    """The counters of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        checks = Counter(
            "authz_checks_total",
            "Checks answered, by outcome and reason.",
            ("outcome", "reason"),
            registry=self.registry,
        )
        # Every child is made now: the hot path looks up no labels, and a series exists before its first event.
        self._checks = {
            reason: checks.labels("ok" if reason in _ALLOWING else "denied", reason.value) for reason in Reason
        }
        self._seconds = Histogram(
            "authz_check_seconds",
            "From the first byte of a check read to the last byte of its answer written.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        shadow = Counter(
            "authz_shadow_denials_total",
            "Denials that scopes in shadow would have caused, by kind of scope.",
            ("scope_kind",),
            registry=self.registry,
        )
        self._shadow = {kind: shadow.labels(kind) for kind in _SCOPE_KINDS}
        self._unavailable = Counter(
            "authz_unavailable_total",
            "Checks that found no snapshot to decide from: UNAVAILABLE, and Envoy's fail-open setting had the word.",
            registry=self.registry,
        )

    def observe(self, decision: Decision, seconds: float) -> None:
        """Count one answered check."""
        self._checks[decision.reason].inc()
        self._seconds.observe(seconds)
        for outcome in decision.scopes:
            if outcome.enforcement is Enforcement.SHADOW and outcome.denies:
                self._shadow[outcome.scope.partition(":")[0]].inc()

    def count_unavailable(self) -> None:
        """Count one check that found no snapshot."""
        self._unavailable.inc()


class StateCollector(Collector):
    """What is true at the moment of a scrape: the snapshot, its age, the store's connection, readiness."""

    def __init__(
        self,
        *,
        current: Callable[[], Snapshot | None],
        age_seconds: Callable[[], float | None],
        connected: Callable[[], bool],
        ready: Callable[[], bool],
    ) -> None:
        """Make a collector to be registered.

        Args:
            current: returns the snapshot that decisions are made from.
            age_seconds: returns how long ago the store last confirmed that snapshot; None: never.
            connected: tells whether the store is connected.
            ready: tells whether the process is ready.
        """
        self._current = current
        self._age_seconds = age_seconds
        self._connected = connected
        self._ready = ready

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges; those of a snapshot only while there is one."""
        yield GaugeMetricFamily("authz_ready", "Whether the process is ready (1) or not (0).", value=self._ready())
        yield GaugeMetricFamily(
            "authz_redis_connected", "Whether the store is connected (1) or not (0).", value=self._connected()
        )
        age_seconds = self._age_seconds()
        if age_seconds is not None:
            yield GaugeMetricFamily(
                "authz_snapshot_age_seconds",
                "Time since the store last confirmed that the snapshot is its newest state.",
                value=age_seconds,
            )
        snapshot = self._current()
        if snapshot is None:
            return
        counts = snapshot.counts()
        yield GaugeMetricFamily(
            "authz_snapshot_revision", "Revision of the snapshot that decisions are made from.", value=snapshot.revision
        )
        yield GaugeMetricFamily(
            "authz_snapshot_unreadable_records",
            "Records that cannot be read; their last good values, or closed ones, stand in for them.",
            value=counts.pop("unreadable"),
        )
        yield GaugeMetricFamily(
            "authz_snapshot_degraded_scopes",
            "Scopes that use a list with an unreadable entry, or one that does not exist.",
            value=len(snapshot.degraded_scopes()),
        )
        records = GaugeMetricFamily("authz_snapshot_records", "Records in the snapshot, by kind.", labels=("kind",))
        for kind, count in counts.items():
            records.add_metric((kind,), count)
        yield records
