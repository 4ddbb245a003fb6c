"""Which checks get a span, what it says, and that clients cannot ask for more."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.process import ServerProcess, init_policy

from authz_server.demo.valkey import Valkey
from authz_server.policy.addresses import parse_address
from authz_server.policy.affinity import Affinity
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Allowed, Denied
from authz_server.policy.reasons import Reason
from authz_server.tracing import Tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
ALLOWED = Allowed(Reason.ALLOWED, parse_address("203.0.113.7"), "acme", "queue-1", Affinity.PINNED)


def spans(
    *written: str | None, decision: Allowed | Denied = ALLOWED, ratio: float = 1.0, limit: int = 100, step: float = 0.0
) -> tuple[ReadableSpan, ...]:
    """The spans of checks whose requests have these values of traceparent, `step` seconds apart."""
    exporter, clock = InMemorySpanExporter(), itertools.count()
    tracing = Tracing(exporter, ratio=ratio, spans_per_second=limit, clock=lambda: 1000 + next(clock) * step)
    for value in written:
        headers = {} if value is None else {"traceparent": value}
        request = RequestAttributes("GET", "www.example.com", "/", headers=headers)
        tracing.note(decision, request, 7, 0.5)
    tracing.note(decision, None, 7, 0.5)
    tracing.close()
    return exporter.get_finished_spans()


def test_a_span_hangs_under_the_request_and_says_what_was_decided() -> None:
    (span,) = spans(SAMPLED)
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert (span.start_time, span.end_time) == (999_500_000_000, 1000_000_000_000)
    assert dict(span.attributes or {}) == {
        "authz.outcome": "ok",
        "authz.reason": "allowed",
        "authz.revision": 7,
        "authz.tenant": "acme",
        "authz.instance": "queue-1",
        "authz.affinity": "pinned",
    }


@pytest.mark.parametrize(
    "written",
    [
        None,
        "",
        f"00-{TRACE}-{PARENT}-00",  # not sampled
        f"00-{'0' * 32}-{PARENT}-01",
        f"{SAMPLED},{SAMPLED}",  # two headers, joined by Envoy
        SAMPLED + "\r\nx: y",
        "00-" + "z" * 10_000,
    ],
)
def test_what_is_not_one_sampled_trace_gets_no_span(written: str | None) -> None:
    assert spans(written) == ()


def test_only_our_own_ratio_of_sampled_traces_gets_a_span() -> None:
    assert spans(*[SAMPLED] * 100, ratio=0.0) == ()
    assert 0 < len(spans(*[SAMPLED] * 2000, ratio=0.1, limit=10_000)) < 400


def test_no_flood_of_sampled_traces_makes_more_spans_a_second_than_set() -> None:
    assert len(spans(*[SAMPLED] * 50, limit=3)) == 3
    assert len(spans(*[SAMPLED] * 4, limit=1, step=1.0)) == 4


def test_a_fault_of_ours_is_an_error() -> None:
    (span,) = spans(SAMPLED, decision=Denied(Reason.INTERNAL_ERROR))
    assert span.status.status_code.name == "ERROR"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver that keeps what it gets."""

    def __init__(self) -> None:
        self.received: SimpleQueue[trace_service_pb2.ExportTraceServiceRequest] = SimpleQueue()

    def Export(  # noqa: N802 - the service's name for it
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.received.put(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, int]]:
    service = Collector()
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield service, port
    finally:
        server.stop(grace=None).wait()


@pytest.mark.integration
def test_a_collector_gets_the_spans_of_a_real_server(
    collector: tuple[Collector, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    service, port = collector
    with Valkey() as valkey:
        init_policy(valkey.url)
        settings = {
            "AUTHZ_REDIS_URL": valkey.url,
            "AUTHZ_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "AUTHZ_TRACE_RATIO": "1",
        }
        with ServerProcess(tmp_path_factory.mktemp("tracing"), settings) as server:
            server.wait_ready()
            server.check(traceparent=SAMPLED)
            request = service.received.get(timeout=20)
    (span,) = request.resource_spans[0].scope_spans[0].spans
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE, PARENT, "ext_authz check")
