"""What it costs to count, log and trace a check, beside the check itself.

Run `python -m loadtest.observing` in the project's folder (half a minute). Every figure is CPU time of the whole
process, so the threads that render log lines and send spans are in it; the median of five rounds, each of which
measures everything once. The reference is the same check with nobody to tell of it.
"""

import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from rich.console import Console
from rich.table import Table

from authz_server.decision_log import QUEUE_LENGTH, DecisionLog, LogOptions
from authz_server.ext_authz.asyncio_transport import SLICE
from authz_server.ext_authz.check_response import ResponseOptions
from authz_server.ext_authz.checker import Checked, Checker
from authz_server.metrics import Metrics
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Allowed
from authz_server.tracing import Tracing
from loadtest.served import MAX_REQUEST_BYTES, build_policy, build_requests

CHECKS = QUEUE_LENGTH // 2
"""A round; so many fit into the log's queue, which loses nothing then."""
ROUNDS = 5
_EVERYTHING = 10**9
_TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class _Nowhere(SpanExporter):
    """Counts spans and does nothing else with them: what the network costs is not ours."""

    def __init__(self) -> None:
        self.taken = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        return SpanExportResult.SUCCESS


@dataclass(frozen=True, slots=True)
class Case:
    """One way to tell of checks; `act` tells of all of them and returns when that is done."""

    name: str
    act: Callable[[], object]


def counting(seen: list[Checked]) -> Case:
    """All metrics of an answered check, and its time in the queue."""
    metrics = Metrics()

    def act() -> None:
        for start in range(0, len(seen), SLICE):
            some = seen[start : start + SLICE]
            metrics.observe_wait(0.0002, len(some))
            metrics.observe([checked.decision for checked in some], some[0].seconds)

    return Case("metrics", act)


def logging(name: str, seen: list[Checked], options: LogOptions) -> Case:
    """The decision log, with the thread that renders and writes its lines."""

    def act() -> None:
        log = DecisionLog(options, len)
        for checked in seen:
            log.note(checked.decision, checked.attributes, checked.revision, checked.seconds)
        log.stop()
        writer = threading.Thread(target=log.run)
        writer.start()
        writer.join()
        if log.dropped:
            raise RuntimeError("the log lost lines: less was measured than is said")

    return Case(name, act)


def tracing(name: str, seen: list[Checked], *, ratio: float) -> Case:
    """Spans under a trace that the client asks to sample."""
    traced = [
        checked._replace(attributes=_with_trace(checked.attributes))
        for checked in seen
        if checked.attributes is not None
    ]

    def act() -> None:
        nowhere = _Nowhere()
        spans = Tracing(nowhere, ratio=ratio, spans_per_second=_EVERYTHING)
        for checked in traced:
            spans.note(checked.decision, checked.attributes, checked.revision, checked.seconds)
        spans.close()
        if nowhere.taken != ratio * len(traced):
            raise RuntimeError(f"spans were lost: {nowhere.taken} of {len(traced)} came")

    return Case(name, act)


def _with_trace(attributes: RequestAttributes) -> RequestAttributes:
    return attributes._replace(headers={**attributes.headers, "traceparent": _TRACE})


def main() -> None:
    """Print microseconds a check, and what that is of the check itself."""
    snapshot = build_policy()
    requests = list(islice(cycle(build_requests()), CHECKS))
    seen: list[Checked] = []
    watched = Checker(lambda: snapshot, ResponseOptions(), max_request_bytes=MAX_REQUEST_BYTES, observe=seen.extend)
    for data in requests:
        watched.check(data)
    allowed = [checked for checked in seen if isinstance(checked.decision, Allowed)]
    denied = [checked for checked in seen if not isinstance(checked.decision, Allowed)]
    allowed, denied = (list(islice(cycle(some), CHECKS)) for some in (allowed, denied))

    alone = Checker(
        lambda: snapshot, ResponseOptions(), max_request_bytes=MAX_REQUEST_BYTES, observe=lambda _checks: None
    )

    def check_all() -> None:
        for data in requests:
            alone.check(data)

    cases = [
        Case("reference: the check alone", check_all),
        counting(seen),
        logging("log: allowed, not sampled", allowed, LogOptions()),
        logging("log: denied, beyond the budget", denied, LogOptions(denials_per_second=0)),
        logging("log: one line", denied, LogOptions(denials_per_second=_EVERYTHING)),
        logging("log: one line, anonymized", denied, LogOptions(denials_per_second=_EVERYTHING, anonymize=True)),
        tracing("spans: traced, not its turn", seen, ratio=0.0),
        tracing("spans: one span", seen, ratio=1.0),
    ]
    spent: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(ROUNDS):
        for case in cases:
            began = time.process_time()
            case.act()
            spent[case.name].append((time.process_time() - began) / CHECKS * 1e6)

    figures = Table("what", "us a check", "x of the check")
    medians = {name: statistics.median(values) for name, values in spent.items()}
    for name, median in medians.items():
        figures.add_row(name, f"{median:.2f}", f"{median / medians[cases[0].name]:.3f}")
    Console(width=None if sys.stdout.isatty() else 120).print(figures)


if __name__ == "__main__":
    main()
