"""What is logged of decisions, what is only counted, and that a slow or lost reader slows no check."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from authz_server.decision_log import QUEUE_LENGTH, RECENT_LENGTH, DecisionLog, LogOptions
from authz_server.policy.access import Enforcement, Entry, Mode, Scope, Side, own_list
from authz_server.policy.addresses import parse_address, parse_network
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Allowed, Decision, Denied, decide
from authz_server.policy.reasons import Reason
from authz_server.policy.records import entry_key, record_key
from authz_server.policy.snapshot import DecisionOptions, build_snapshot

CLIENT = "198.51.100.77"
ATTRIBUTES = RequestAttributes(
    method="GET",
    host="shop.example.com",
    path="/cart?token=secret",
    external_address=CLIENT,
    headers={"cookie": "session=secret"},
    request_id="6f1c1f0e",
)
DENIED = Denied(Reason.INVALID_CLIENT_ADDRESS)
ALLOWED = Allowed(Reason.ALLOWED, parse_address(CLIENT), "acme")


@dataclass
class Logged:
    """A decision log with a clock of its own, and what it wrote."""

    options: LogOptions = field(default_factory=LogOptions)
    now: float = 1_700_000_000.0
    lines: list[str] = field(default_factory=list)
    write: Callable[[str], object] | None = None

    def __post_init__(self) -> None:
        self.log = DecisionLog(self.options, self.write or self.lines.append, clock=lambda: self.now)

    def note(self, decision: Decision, times: int = 1) -> None:
        for _ in range(times):
            self.log.note(decision, ATTRIBUTES, 7, 0.0000214)

    def written(self) -> list[dict[str, Any]]:
        self.log.stop()
        self.log.run()
        text = "".join(self.lines)
        assert not text or text.endswith("\n")
        return [json.loads(line) for line in text.split("\n")[:-1]]


def blocked(network: str, *, enforcement: Enforcement = Enforcement.ENFORCE) -> Decision:
    scope = Scope("global", Mode.OPEN, enforcement)
    entry = Entry(parse_network(network), reason="scraper", author="ann", created_at=1)
    name = own_list("global", Side.BLOCK)
    records = {
        record_key(scope): scope,
        entry_key(name, entry): entry,
    }
    snapshot = build_snapshot(records.items(), epoch="e", revision=7, options=DecisionOptions())
    return decide(ATTRIBUTES, snapshot, 1_700_000_000)


def test_a_denial_says_all_that_one_asks_later() -> None:
    logged = Logged()
    logged.note(blocked("198.51.100.0/24"))
    assert logged.written() == [
        {
            "at": "2023-11-14T22:13:20.000+00:00",
            "event": "decision",
            "outcome": "denied",
            "reason": "blocked",
            "client_address": CLIENT,
            "request_id": "6f1c1f0e",
            "method": "GET",
            "host": "shop.example.com",
            "path": "/cart",
            "scope": "global",
            "list": "global/block",
            "entry": "198.51.100.0/24",
            "revision": 7,
            "microseconds": 21,
        }
    ]


def test_no_query_and_no_header_is_ever_written() -> None:
    logged = Logged()
    logged.note(blocked("198.51.100.0/24"))
    logged.written()
    assert "secret" not in "".join(logged.lines)


@pytest.mark.parametrize(
    ("network", "entry"), [("198.51.0.0/16", "198.51.0.0/16"), ("198.51.100.77/32", None), ("198.51.100.64/26", None)]
)
def test_anonymized_lines_do_not_tell_the_address(network: str, entry: str | None) -> None:
    logged = Logged(LogOptions(anonymize=True))
    logged.note(blocked(network))
    (line,) = logged.written()
    assert (line["client_address"], line.get("entry")) == ("198.51.100.0", entry)
    assert line["list"] == "global/block"


def test_anonymized_ipv6_keeps_48_bits() -> None:
    logged = Logged(LogOptions(anonymize=True))
    logged.note(Denied(Reason.NO_TENANT, parse_address("2001:db8:1:2::3")))
    assert logged.written()[0]["client_address"] == "2001:db8:1::"


def test_what_a_client_writes_stays_one_line_of_plain_characters() -> None:
    logged = Logged()
    path = "/" + "x" * 600
    nasty = RequestAttributes(method="GET\n", host='a"\u2028\x1b[31m', path=path, request_id="r" * 500)
    logged.log.note(DENIED, nasty, 0, 0.0)
    (line,) = logged.written()
    assert line["path"] == path[:512]
    assert line["request_id"] == "r" * 128
    assert line["host"] == nasty.host
    assert logged.lines[0].isascii()
    assert "\x1b" not in logged.lines[0]


def test_denials_beyond_the_rate_are_counted_by_reason() -> None:
    logged = Logged(LogOptions(denials_per_second=3))
    logged.note(DENIED, 2)
    logged.note(Denied(Reason.NO_TENANT), 5)
    *lines, summary = logged.written()
    assert [line["reason"] for line in lines] == ["invalid_client_address"] * 2 + ["no_tenant"]
    assert (summary["event"], summary["count"], summary["by_reason"]) == ("denials not logged", 4, {"no_tenant": 4})


def test_each_second_has_its_own_rate() -> None:
    logged = Logged(LogOptions(denials_per_second=1))
    for _ in range(3):
        logged.note(DENIED)
        logged.now += 1
    assert [line["event"] for line in logged.written()] == ["decision"] * 3


def test_allowed_requests_are_logged_by_their_ratio_alone() -> None:
    none, every = Logged(), Logged(LogOptions(allowed_ratio=1.0))
    none.note(ALLOWED, 50)
    every.note(ALLOWED, 50)
    assert none.written() == []
    lines = every.written()
    assert len(lines) == 50
    assert (lines[0]["outcome"], lines[0]["tenant"]) == ("ok", "acme")


def test_what_a_shadow_scope_would_have_denied_is_logged_and_marked() -> None:
    logged = Logged()
    logged.note(blocked("198.51.100.0/24", enforcement=Enforcement.SHADOW))
    (line,) = logged.written()
    assert (line["outcome"], line["shadow"]) == ("ok", ["global:blocked"])
    assert not logged.log.recent, "nobody was denied"


def test_the_last_denials_are_kept_with_and_without_a_log() -> None:
    for write in (lambda _line: None, None):
        log = DecisionLog(LogOptions(denials_per_second=0), write)
        log.note(ALLOWED, ATTRIBUTES, 1, 0.0)
        for revision in range(RECENT_LENGTH + 5):
            log.note(DENIED, ATTRIBUTES, revision, 0.0)
        assert [decided.revision for decided in log.recent] == list(range(5, RECENT_LENGTH + 5))


def test_a_reader_that_hangs_stops_no_check_and_what_is_lost_is_counted() -> None:
    reading, go_on = threading.Event(), threading.Event()

    def hang(_line: str) -> None:
        reading.set()
        assert go_on.wait(20)

    logged = Logged(LogOptions(denials_per_second=10**6), write=hang)
    writer = threading.Thread(target=logged.log.run)
    writer.start()
    try:
        logged.note(DENIED)
        assert reading.wait(20)
        logged.note(DENIED, QUEUE_LENGTH + 3)
        assert logged.log.dropped == 3
    finally:
        logged.log.stop()
        go_on.set()
        writer.join(20)
    assert not writer.is_alive()


def test_a_reader_that_is_gone_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_line: str) -> None:
        raise BrokenPipeError("broken pipe")

    logged = Logged(write=broken)
    logged.note(DENIED, 5)
    logged.written()
    assert logged.log.dropped == 5
    assert [record.message for record in caplog.records] == ["the decision log cannot be written any more: broken pipe"]
    assert len(logged.log.recent) == 5
