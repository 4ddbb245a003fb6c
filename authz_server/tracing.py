"""A span for some checks, under the trace of the request that they are about (OpenTelemetry, an optional extra).

Clients can write `traceparent`, and set its sampled flag on every request. So the flag alone gives nobody a span: our
own ratio and a limit a second come first, and nothing but the trace's and the parent's id is taken over from it.
"""

import random
import time
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from authz_server.observation import PerSecond, facts_of
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Decision
from authz_server.policy.reasons import Reason

_TRACE_HEADER = "traceparent"
"""W3C Trace Context, section 3.2. `tracestate` is not read: it is long, and only a client's word."""
_CLOSE_MILLISECONDS = 2000


class Tracing:
    """Makes spans. `note` is for the thread that answers checks; a thread of the SDK sends them."""

    headers = frozenset({_TRACE_HEADER})
    """The request headers that `note` needs."""

    def __init__(
        self,
        exporter: SpanExporter,
        *,
        ratio: float,
        spans_per_second: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start the thread that sends.

        Args:
            exporter: takes finished spans; a slow one loses spans, and delays nothing.
            ratio: the part of the requests with a sampled trace that gets a span, from 0 to 1.
            spans_per_second: at most so many, whatever clients send.
            clock: seconds since the Unix epoch.
        """
        # Every span that reaches the SDK was chosen by us already.
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=Resource.create({SERVICE_NAME: "authz-server"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("authz_server")
        self._propagator = TraceContextTextMapPropagator()
        self._ratio = ratio
        self._spans = PerSecond(spans_per_second)
        self._clock = clock

    def note(self, decision: Decision, attributes: RequestAttributes | None, revision: int, seconds: float) -> None:
        """Make a span of one answered check, if its request is traced and it is its turn."""
        if attributes is None or random.random() >= self._ratio:  # noqa: S311 - a sample
            return
        written = attributes.headers.get(_TRACE_HEADER)
        if written is None:
            return
        context = self._propagator.extract({_TRACE_HEADER: written})
        parent = trace.get_current_span(context).get_span_context()
        if not (parent.is_valid and parent.trace_flags.sampled):
            return
        now = self._clock()
        if not self._spans.take(now):
            return
        facts: dict[str, str | int] = {f"authz.{name}": fact for name, fact in facts_of(decision).items()}
        span = self._tracer.start_span(
            "ext_authz check",
            context,
            kind=SpanKind.SERVER,
            attributes=facts | {"authz.revision": revision},
            start_time=round((now - seconds) * 1e9),
        )
        if decision.reason is Reason.INTERNAL_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        span.end(round(now * 1e9))

    def close(self) -> None:
        """Send what is left, for two seconds at most."""
        self._provider.force_flush(_CLOSE_MILLISECONDS)
        self._provider.shutdown()
