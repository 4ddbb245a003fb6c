"""What a request causes is a denial; only our own state is an error."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.check_response import ResponseOptions
from authz_server.ext_authz.checker import CannotDecideError, Checked, Checker, Checks
from authz_server.policy.access import Entry, Mode, Scope
from authz_server.policy.addresses import parse_network
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.decision import Allowed, Denied
from authz_server.policy.reasons import Reason
from authz_server.policy.records import entry_key, record_key
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.policy.tenant import parse_tenant_source

MAX_REQUEST_BYTES = 1000
OFFICE = Entry(parse_network("203.0.113.0/24"), reason="office", author="ann", created_at=1, expires_at=2000)
SCOPE = Scope("global", Mode.RESTRICTED)
RECORDS = [
    (record_key(SCOPE), SCOPE),
    (entry_key("global/allow", OFFICE), OFFICE),
    (record_key(Instance("queue-3")), Instance("queue-3")),
    (record_key(Tenant("acme", "queue-3")), Tenant("acme", "queue-3")),
]
SNAPSHOT = build_snapshot(
    RECORDS,
    epoch="e",
    revision=42,
    options=DecisionOptions(tenant_sources=(parse_tenant_source("header:x-tenant-id"),)),
)


def request(address: str = "203.0.113.7", **headers: str) -> bytes:
    message = ext_authz_pb2.CheckRequest()
    http = message.attributes.request.http
    http.method, http.host, http.path = "GET", "www.example.com", "/"
    http.headers["x-envoy-external-address"] = address
    for name, value in headers.items():
        http.headers[name.replace("_", "-")] = value
    data: bytes = message.SerializeToString()
    return data


GARBAGE = b"\xff" * 10
TOO_LARGE = request(x_padding="a" * MAX_REQUEST_BYTES)


@dataclass
class Bench:
    """A checker whose snapshot and clock can be changed, and what it told its observer."""

    snapshot: Snapshot | None = SNAPSHOT
    clock: Callable[[], float] = lambda: 1000.0
    seen: list[Checked] = field(default_factory=list)
    observe: Callable[[Checks], None] | None = None
    unavailable: int = 0

    def checker(self) -> Checker:
        return Checker(
            lambda: self.snapshot,
            ResponseOptions(),
            max_request_bytes=MAX_REQUEST_BYTES,
            clock=self._now,
            observe=self.observe or self.seen.extend,
            observe_unavailable=self._count_unavailable,
        )

    def _count_unavailable(self) -> None:
        self.unavailable += 1

    def _now(self) -> float:
        return self.clock()

    def check(self, data: bytes) -> ext_authz_pb2.CheckResponse:
        return ext_authz_pb2.CheckResponse.FromString(self.checker().check(data))


def outcome(answer: ext_authz_pb2.CheckResponse) -> tuple[int, str]:
    """Return the status code and the reason."""
    return answer.status.code, answer.dynamic_metadata.fields["reason"].string_value


def test_an_allowed_request_goes_to_its_tenants_instance() -> None:
    bench = Bench()
    answer = bench.check(request(x_tenant_id="acme"))
    assert outcome(answer) == (0, "allowlisted")
    assert {(option.header.key, option.header.value) for option in answer.ok_response.headers} == {
        ("x-tenant-instance", "queue-3"),
        ("x-tenant-id", "acme"),
    }
    (checked,) = bench.seen
    assert isinstance(checked.decision, Allowed)
    assert checked.attributes is not None
    assert checked.attributes.headers == {"x-tenant-id": "acme"}
    assert checked.revision == 42
    assert 0 < checked.seconds < 1
    assert checked.error is None


def test_a_denied_request_is_told_its_id() -> None:
    answer = Bench().check(request("198.51.100.1", x_request_id="id-1"))
    assert outcome(answer) == (7, "not_allowlisted")
    assert '"request_id": "id-1"' in answer.denied_response.body


def test_the_clock_says_when_an_entry_expires() -> None:
    bench = Bench()
    assert outcome(bench.check(request())) == (0, "allowlisted")
    bench.clock = lambda: 2000.0
    assert outcome(bench.check(request())) == (7, "not_allowlisted")


def test_each_check_takes_the_snapshot_of_its_moment() -> None:
    bench = Bench()
    checker = bench.checker()
    checker.check(request())
    bench.snapshot = build_snapshot([], epoch="e", revision=43, options=DecisionOptions())
    checker.check(request())
    assert [checked.revision for checked in bench.seen] == [42, 43]


def test_without_a_snapshot_nothing_is_decided() -> None:
    bench = Bench(snapshot=None)
    with pytest.raises(CannotDecideError, match="snapshot"):
        bench.check(request())
    assert bench.seen == []
    assert bench.unavailable == 1
    bench.check(GARBAGE)
    assert bench.unavailable == 1, "that was denied"


@pytest.mark.parametrize("snapshot", [SNAPSHOT, None], ids=["with a snapshot", "without a snapshot"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", Reason.BAD_REQUEST, id="empty"),
        pytest.param(GARBAGE, Reason.BAD_REQUEST, id="garbage"),
        pytest.param(TOO_LARGE, Reason.REQUEST_TOO_LARGE, id="too large"),
        pytest.param(GARBAGE * MAX_REQUEST_BYTES, Reason.REQUEST_TOO_LARGE, id="too large garbage"),
    ],
)
def test_a_request_that_cannot_be_read_is_denied(snapshot: Snapshot | None, data: bytes, reason: Reason) -> None:
    """Also without a snapshot: an error would hand it to fail-open, and no policy would let it pass."""
    bench = Bench(snapshot=snapshot)
    answer = bench.check(data)
    assert outcome(answer) == (7, reason)
    assert bench.seen[0].decision == Denied(reason)
    assert bench.seen[0].attributes is None
    assert bench.seen[0].revision == 0


def test_the_limit_is_the_longest_request_that_is_read() -> None:
    padding = MAX_REQUEST_BYTES - len(request(x_padding="a" * 500)) + 500
    longest = request(x_padding="a" * padding)
    assert len(longest) == MAX_REQUEST_BYTES
    bench = Bench()
    assert outcome(bench.check(longest)) == (0, "allowlisted")
    assert outcome(bench.check(request(x_padding="a" * (padding + 1)))) == (7, "request_too_large")


@pytest.mark.parametrize("error", [ValueError, KeyError, RecursionError, MemoryError, OSError, AssertionError])
def test_an_exception_while_deciding_is_a_denial_that_names_it_to_the_observer(error: type[Exception]) -> None:
    def broken_clock() -> float:
        raise error("broken")

    bench = Bench(clock=broken_clock)
    answer = bench.check(request(x_request_id="id-1"))
    assert outcome(answer) == (7, "internal_error")
    assert answer.denied_response.status.code == 403
    (checked,) = bench.seen
    assert checked.decision == Denied(Reason.INTERNAL_ERROR)
    assert isinstance(checked.error, error)


def test_leaving_the_process_is_not_mistaken_for_a_fault() -> None:
    def interrupted() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bench(clock=interrupted).check(request())


def test_checks_that_came_together_are_answered_each_by_itself() -> None:
    tenant = Tenant("unwritable", "queue-\ud800")  # as nothing that is read from the store could be
    records = [
        *RECORDS,
        (record_key(tenant), tenant),
        (record_key(Instance(tenant.instance)), Instance(tenant.instance)),
    ]
    snapshot = build_snapshot(records, epoch="e", revision=42, options=SNAPSHOT.options)
    decided = count(1)

    def clock() -> float:
        if next(decided) == 2:
            raise ValueError("fault")
        return 1000.0

    bench = Bench(snapshot, clock)
    messages = [
        request(),
        GARBAGE,
        request(),
        request("198.51.100.1", x_request_id="id-1"),
        TOO_LARGE,
        request(x_tenant_id="unwritable"),
        request(x_tenant_id="acme"),
    ]
    reasons = [
        "allowlisted",
        "bad_request",
        "internal_error",
        "not_allowlisted",
        "request_too_large",
        "internal_error",
        "allowlisted",
    ]
    answers = [ext_authz_pb2.CheckResponse.FromString(answer or b"") for answer in bench.checker().check_all(messages)]
    assert [outcome(answer)[1] for answer in answers] == reasons
    assert [option.header.value for option in answers[-1].ok_response.headers] == ["queue-3", "acme"]
    assert '"request_id": "id-1"' in answers[3].denied_response.body
    assert [checked.decision.reason for checked in bench.seen] == reasons
    faults = [type(checked.error) if checked.error else None for checked in bench.seen]
    assert faults == [None, None, ValueError, None, None, UnicodeEncodeError, None]
    assert [checked.revision for checked in bench.seen] == [42, 0, 0, 42, 0, 0, 42]


def test_without_a_snapshot_some_that_came_together_are_denied_and_the_others_are_not_decided() -> None:
    bench = Bench(snapshot=None)
    answers = bench.checker().check_all([request(), GARBAGE, request(), TOO_LARGE])
    assert [answer is None for answer in answers] == [True, False, True, False]
    assert [checked.decision.reason for checked in bench.seen] == [Reason.BAD_REQUEST, Reason.REQUEST_TOO_LARGE]
    assert bench.unavailable == 2
    assert bench.checker().check_all([]) == []


def test_an_observer_that_fails_changes_no_answer_and_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    calls = count()

    def observe(_checks: Checks) -> None:
        next(calls)
        raise RuntimeError("no disk")

    bench = Bench(observe=observe)
    checker = bench.checker()
    with caplog.at_level(logging.ERROR):
        answers = [checker.check(request()), checker.check(request("198.51.100.1")), checker.check(GARBAGE)]
    codes = [ext_authz_pb2.CheckResponse.FromString(answer).status.code for answer in answers]
    assert codes == [0, 7, 7]
    assert next(calls) == 3
    assert [record.exc_info is not None for record in caplog.records] == [True]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=1200), st.integers(0, 200))
def test_no_bytes_raise_and_none_get_past_a_closed_policy(noise: bytes, position: int) -> None:
    """Every scope is restricted and no list holds anybody: whatever arrives is denied."""
    closed = build_snapshot([(record_key(SCOPE), SCOPE)], epoch="e", revision=1, options=SNAPSHOT.options)
    real = request(x_tenant_id="acme")
    bench = Bench(snapshot=closed)
    for data in (noise, real[:position] + noise + real[position:]):
        code, reason = outcome(bench.check(data))
        assert code == 7
        assert reason != Reason.INTERNAL_ERROR
    assert len(bench.seen) == 2
