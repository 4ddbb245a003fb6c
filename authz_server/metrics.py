"""What Prometheus sees. Labels are Envoy's words and the reasons; no label grows with traffic or with tenants."""

import collections
import time
from collections.abc import Callable, Iterator
from heapq import nlargest
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from authz_server.counts import CheckCounts, Durations
from authz_server.loader import Source
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import Snapshot
from authz_server.replicas import Registry

_ALLOWING = (Reason.ALLOWED, Reason.ALLOWLISTED)
BUSIEST_TENANTS = 20
"""Tenants with series of their own."""
WINDOW_SECONDS = 60.0
"""Over which the busiest tenants are counted, at least."""
_PROPAGATION_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the number of series, and nothing here needs them


class Metrics:
    """The counters of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counts = CheckCounts()
        self.observe = counts.count
        """Counts answered checks."""
        self.observe_wait = counts.count_wait
        """Counts checks whose decision began."""
        self.registry.register(CheckCollector(counts))
        self.registry.register(BusiestTenants(counts))
        ProcessCollector(registry=self.registry)
        self._propagation = Histogram(
            "authz_propagation_seconds",
            "From the store's clock at a change to this server's when it was in use; clocks that differ are in it.",
            buckets=_PROPAGATION_SECONDS,
            registry=self.registry,
        )
        self._unavailable = Counter(
            "authz_unavailable_total",
            "Checks that found no snapshot to decide from: UNAVAILABLE, and Envoy's fail-open setting had the word.",
            registry=self.registry,
        )

    def count_unavailable(self) -> None:
        """Count one check that found no snapshot."""
        self._unavailable.inc()

    def observe_change(self, changed_at: float, in_use_at: float) -> None:
        """Count one applied change; both times are seconds since the Unix epoch."""
        self._propagation.observe(max(0.0, in_use_at - changed_at))


class CheckCollector(Collector):
    """What is counted at every check, as it is at the moment of a scrape."""

    def __init__(self, counts: CheckCounts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Yield reasons, durations, where instances came from, and what shadow scopes would have denied."""
        counts = self._counts
        checks = CounterMetricFamily(
            "authz_checks", "Checks answered, by outcome and reason.", labels=("outcome", "reason")
        )
        for reason, count in counts.reasons.items():
            checks.add_metric(("ok" if reason in _ALLOWING else "denied", reason.value), count)
        yield checks
        yield _histogram(
            "authz_check_seconds",
            "Reading, deciding and answering a check; of checks that were answered together, each its share.",
            counts.durations,
        )
        yield _histogram(
            "authz_queue_seconds",
            "From when a check was received whole until its decision began.",
            counts.waits,
        )
        sources = CounterMetricFamily(
            "authz_affinity",
            "Allowed requests by where their instance came from: pinned, hashed, or none named.",
            labels=("source",),
        )
        for source, count in counts.sources.items():
            sources.add_metric((source.value,), count)
        yield sources
        shadow = CounterMetricFamily(
            "authz_shadow_denials",
            "Denials that scopes in shadow would have caused, by kind of scope.",
            labels=("scope_kind",),
        )
        for kind, count in counts.shadow_denials.items():
            shadow.add_metric((kind,), count)
        yield shadow


def _histogram(name: str, documentation: str, durations: Durations) -> HistogramMetricFamily:
    bounds = [*map(str, durations.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(durations.counts), strict=True))
    return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=durations.seconds)


class BusiestTenants(Collector):
    """Checks a second of the pinned tenants that had the most, over the last full window (before there is one: so far).

    Only the busiest are shown, so that a million tenants do not become a million series.
    """

    def __init__(self, counts: CheckCounts, clock: Callable[[], float] = time.monotonic) -> None:
        self._counts = counts
        self._clock = clock
        self._since = clock()
        self._full: list[tuple[str, float]] | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield the busiest tenants; a window ends with the first scrape after its time."""
        now = self._clock()
        elapsed = now - self._since
        if elapsed >= WINDOW_SECONDS:
            self._full = _busiest(self._counts.take_tenants(), elapsed)
            self._since = now
        family = GaugeMetricFamily(
            "authz_busiest_tenants_checks_per_second",
            f"The {BUSIEST_TENANTS} pinned tenants with the most allowed checks, in the last full minute.",
            labels=("tenant",),
        )
        # Right after the start there is no full window yet; what there is says more than nothing.
        for tenant, rate in self._full if self._full is not None else _busiest(self._counts.tenants(), elapsed):
            family.add_metric((tenant,), rate)
        yield family


def _busiest(counts: dict[str, int], seconds: float) -> list[tuple[str, float]]:
    busiest = nlargest(BUSIEST_TENANTS, counts.items(), key=lambda item: item[1])
    return [(tenant, count / max(seconds, 1.0)) for tenant, count in busiest]


class StateCollector(Collector):
    """What is true at the moment of a scrape: the snapshot, its age, the store's connection, readiness."""

    def __init__(
        self,
        *,
        current: Callable[[], Snapshot | None],
        source: Callable[[], Source | None],
        file_problem: Callable[[], str | None],
        age_seconds: Callable[[], float | None],
        connected: Callable[[], bool],
        incident: Callable[[], bool],
        edited: Callable[[], int],
        lost: Callable[[], int],
        ready: Callable[[], bool],
        log_dropped: Callable[[], int],
        shed: Callable[[], int],
        in_flight: Callable[[], int],
        packed_bytes: Callable[[], int],
        registry: Callable[[], Registry | None],
    ) -> None:
        """Make a collector to be registered.

        Args:
            current: returns the snapshot that decisions are made from.
            source: returns where it came from.
            file_problem: returns what is wrong with the snapshot file, "" for nothing, None without a file.
            age_seconds: returns how long ago the store last confirmed that snapshot; None: never.
            connected: tells whether the store is connected.
            incident: tells whether the store's records do not fit their counts.
            edited: returns how many collections were found edited behind the stream's back.
            lost: returns how many changes the store has lost that were applied here.
            ready: tells whether the process is ready.
            log_dropped: returns how many decisions the log could not take.
            shed: returns how many calls the transport could not take on.
            in_flight: returns how many calls the transport has and has not answered.
            packed_bytes: returns the size of what was loaded last.
            registry: returns what the servers have reported to the store; None: not known.
        """
        self._current = current
        self._source = source
        self._file_problem = file_problem
        self._age_seconds = age_seconds
        self._connected = connected
        self._incident = incident
        self._edited = edited
        self._lost = lost
        self._ready = ready
        self._log_dropped = log_dropped
        self._shed = shed
        self._in_flight = in_flight
        self._packed_bytes = packed_bytes
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges; those of a snapshot only while there is one."""
        yield GaugeMetricFamily("authz_ready", "Whether the process is ready (1) or not (0).", value=self._ready())
        yield GaugeMetricFamily(
            "authz_redis_connected", "Whether the store is connected (1) or not (0).", value=self._connected()
        )
        yield GaugeMetricFamily(
            "authz_store_incident",
            "Whether records in the store were lost or added behind the change stream's back (1) or not (0).",
            value=self._incident(),
        )
        yield GaugeMetricFamily(
            "authz_store_edited_collections",
            "Collections whose records had been edited behind the change stream's back when they were loaded.",
            value=self._edited(),
        )
        yield CounterMetricFamily(
            "authz_changes_lost",
            "Changes that this server had applied and that the store has lost since.",
            value=self._lost(),
        )
        yield CounterMetricFamily(
            "authz_decision_log_dropped",
            "Decisions that were to be logged and were lost: the log's reader is too slow, or gone.",
            value=self._log_dropped(),
        )
        file_problem = self._file_problem()
        if file_problem is not None:
            yield GaugeMetricFamily(
                "authz_snapshot_file_good",
                "Whether the last good snapshot is on disk for a start without the store (1) or not (0).",
                value=not file_problem,
            )
        yield CounterMetricFamily(
            "authz_shed",
            "Calls that there was no time or memory for: UNAVAILABLE, and Envoy's fail-open setting had the word.",
            value=self._shed(),
        )
        yield GaugeMetricFamily(
            "authz_in_flight", "Calls received and not answered yet, those that wait included.", value=self._in_flight()
        )
        age_seconds = self._age_seconds()
        if age_seconds is not None:
            yield GaugeMetricFamily(
                "authz_snapshot_age_seconds",
                "Time since the store last confirmed that the snapshot is its newest state.",
                value=age_seconds,
            )
        registry = self._registry()
        if registry is not None:
            yield from _registry_metrics(registry)
        snapshot = self._current()
        if snapshot is None:
            return
        counts = snapshot.counts()
        yield InfoMetricFamily(
            "authz_snapshot",
            "Which policy decisions are made from.",
            value={"epoch": snapshot.epoch, "source": str(self._source())},
        )
        yield GaugeMetricFamily(
            "authz_snapshot_revision", "Revision of the snapshot that decisions are made from.", value=snapshot.revision
        )
        yield GaugeMetricFamily(
            "authz_snapshot_bytes",
            "Size of the snapshot as it was loaded or packed last, and of its file; changes since then are not in it.",
            value=self._packed_bytes(),
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


def _registry_metrics(registry: Registry) -> Iterator[Metric]:
    states = collections.Counter(registry.state(replica) for replica in registry.replicas)
    servers = GaugeMetricFamily(
        "authz_registry_servers",
        "Servers that have reported to the store, scraped ones or not: reporting, unknown (silent), or unreadable.",
        labels=("state",),
    )
    for state in ("reporting", "unknown", "unreadable"):
        servers.add_metric((state,), states[state])
    yield servers
    yield GaugeMetricFamily(
        "authz_registry_behind",
        "Those of them that decide by an older revision than the store's, or by nothing yet.",
        value=sum(map(registry.is_behind, registry.replicas)),
    )
    yield GaugeMetricFamily(
        "authz_registry_disagreeing",
        "Those of them that decide by another epoch than the store's.",
        value=sum(map(registry.disagrees, registry.replicas)),
    )
