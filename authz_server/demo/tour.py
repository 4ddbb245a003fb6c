"""The guided tour: requests, what came back, and whether that is as it must be.

Every row states beforehand what must come out of it. Nothing is looked up in the policy to find that out: the
expectations are written here, as a person who knows the policy would.
"""

import http.client
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from authz_server.demo.envoy import Envoy
from authz_server.demo.stage import INSTANCES, Answer, Client, Stage
from authz_server.demo.traffic import Traffic

VISITOR = "127.1.1.1"
SCRAPER = "127.66.1.1"
PARTNER = "127.66.7.3"
OFFICE = "127.10.0.5"
NIGHT_SCRAPER = "127.77.0.9"
LATE_SCRAPER = "127.88.1.1"

_NAMES = {
    VISITOR: "visitor",
    SCRAPER: "scraper",
    PARTNER: "partner",
    OFFICE: "office",
    NIGHT_SCRAPER: "scraper",
    LATE_SCRAPER: "scraper",
}

POLICY = (
    'init --reason "the tour begins"',
    'instance add queue-1 --reason "first instance"',
    'instance add queue-2 --reason "second instance"',
    'instance add queue-3 --reason "third instance"',
    'tenant add acme --instance queue-1 --reason "customer since 2019"',
    'tenant add globex --instance queue-2 --reason "customer since 2024"',
    'block add 127.66.0.0/16 --reason "scraper farm"',
    'allow add 127.66.7.0/28 --reason "a partner inside that network"',
    'list add office 127.10.0.0/24 --description "our own desks" --reason "second floor"',
    'resource add docs --path /docs --restricted --allow-list office --reason "not public yet"',
)
"""The policy of the tour, as the security team would type it after `authzctl`."""

_CHANGE_SECONDS = 10.0
_OUTAGE_REQUESTS = 400
_ANY = "any"
"""Stands for "one of the instances, by the default route"."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the tour."""

    who: str
    asks: str
    came_back: str
    why: str
    must: str
    """What must come out, in the words of `came_back`; shown when it did not."""
    ok: bool


@dataclass(frozen=True, slots=True)
class Act:
    """Some rows about one thing."""

    title: str
    story: str
    rows: list[Row] = field(default_factory=list)


def acts(stage: Stage) -> Iterator[Act]:
    """Play the tour act by act on a stage whose policy is in place and whose server is ready."""
    yield _who_may_in(stage)
    yield _forgeries(stage)
    yield _tenants(stage)
    yield _live_changes(stage)
    yield _outages(stage)


def _who_may_in(stage: Stage) -> Act:
    office_only = (403, None, "not_allowlisted")
    return Act(
        "Who may in",
        "127.66.0.0/16 is blocked, 127.66.7.0/28 in it is allowed, /docs is for the office (127.10.0.0/24) only.",
        [
            _request(stage, VISITOR, "/", must=(200, _ANY, "allowed")),
            _request(stage, SCRAPER, "/", must=(403, None, "blocked")),
            _request(stage, PARTNER, "/", must=(200, _ANY, "allowlisted")),
            _request(stage, OFFICE, "/docs", must=(200, _ANY, "allowlisted")),
            _request(stage, VISITOR, "/docs", must=office_only),
            _request(stage, VISITOR, "//docs", must=office_only),
            _request(stage, VISITOR, "/docs;x=1", must=office_only),
            _request(stage, VISITOR, "/x%2f..%2fdocs", must=office_only),
            _request(stage, VISITOR, "/documents", must=(200, _ANY, "allowed")),
        ],
    )


def _forgeries(stage: Stage) -> Act:
    forged_route = {"x-tenant-instance": "queue-3"}
    return Act(
        "Forged headers",
        "What a client writes about itself counts for nothing.",
        [
            _request(stage, SCRAPER, "/", {"x-envoy-external-address": OFFICE}, must=(403, None, "blocked")),
            _request(
                stage, VISITOR, "/docs", {"x-envoy-external-address": OFFICE}, must=(403, None, "not_allowlisted")
            ),
            _request(stage, VISITOR, "/docs", {"x-forwarded-for": OFFICE}, must=(403, None, "not_allowlisted")),
            _request(stage, VISITOR, "/?tenant_id=acme", forged_route, must=(200, "queue-1", "allowed")),
            _unrouted(stage, stage.fail_closed, "allowed", "no tenant named"),
            _request(stage, VISITOR, "/", {"x_tenant_instance": "queue-3"}, must=(400, None, "")),
        ],
    )


def _tenants(stage: Stage) -> Act:
    return Act(
        "Where tenants go",
        "acme is pinned to queue-1, globex to queue-2.",
        [
            _request(stage, VISITOR, "/?tenant_id=acme", must=(200, "queue-1", "allowed")),
            _request(stage, VISITOR, "/?tenant_id=globex", must=(200, "queue-2", "allowed")),
            _request(stage, OFFICE, "/", {"x-tenant-id": "globex"}, must=(200, "queue-2", "allowed")),
            _request(
                stage, VISITOR, "/?tenant_id=acme", {"x-tenant-id": "globex"}, must=(403, None, "ambiguous_tenant")
            ),
            _request(stage, VISITOR, "/?tenant_id=made-up", must=(200, _ANY, "allowed")),
        ],
    )


def _live_changes(stage: Stage) -> Act:
    return Act(
        "Changes while requests run",
        "Four clients keep asking; the clock starts when the authzctl command does.",
        [_move(stage), _block(stage)],
    )


def _outages(stage: Stage) -> Act:
    return Act(
        "When parts are away",
        "Valkey is stopped under traffic and started again; then the server itself is stopped.",
        [*_valkey_away(stage), *_server_away(stage)],
    )


def _request(
    stage: Stage,
    who: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    *,
    must: tuple[int, str | None, str],
    envoy: Envoy | None = None,
) -> Row:
    """Send one request through Envoy; the reason is read from Envoy's access log, where the decision left it."""
    envoy = envoy or stage.fail_closed
    logged = len(envoy.access_log())
    client = Client(who, envoy.port)
    try:
        answer = client.ask(path, headers or {})
    finally:
        client.close()
    entry = envoy.access_log(at_least=logged + 1)[logged]
    decision = entry["decision"] or {}
    status, instance, reason = must
    ok = (
        answer.status == status
        and decision.get("reason", "") == reason
        and (answer.instance in INSTANCES if instance == _ANY else answer.instance == instance)
        and _only_true_headers_arrived(answer, who, instance)
    )
    return Row(
        f"{_NAMES[who]} {who}",
        "\n".join([path, *(f"{name}: {value}" for name, value in (headers or {}).items())]),
        _answer_text(answer.status, answer.instance),
        _why(decision) or f"Envoy: {entry['response_code_details']}",
        f"{_answer_text(status, instance)}{f', {reason}' if reason else ''}",
        ok,
    )


def _only_true_headers_arrived(answer: Answer, who: str, instance: str | None) -> bool:
    """Tell whether the instance, if one was reached, saw the decision's routing header and the true client address."""
    if answer.instance is None:
        return True
    seen = answer.headers_seen
    routed = seen.get("x-tenant-instance") == (None if instance == _ANY else instance)
    return routed and seen.get("x-envoy-external-address") == who


def _why(decision: Mapping[str, object]) -> str:
    """Return what the access log knows of a decision, on a line."""
    reason = str(decision.get("reason", ""))
    if "entry" in decision:
        reason += f" by {decision['entry']} in {decision['list']}"
    elif decision.get("outcome") == "denied" and "scope" in decision:
        reason += f" in {decision['scope']}"
    if "instance" in decision:
        reason += f"; {decision['tenant']} {decision['affinity']} to {decision['instance']}"
    return reason


def _answer_text(status: int, instance: str | None) -> str:
    if not status:
        return "no answer"
    if instance == _ANY:
        return f"{status} from any instance"
    return f"{status} from {instance}" if instance else str(status)


def _move(stage: Stage) -> Row:
    """Move a tenant under its requests: how soon, none lost, none on the old instance after the first on the new."""
    command = 'affinity move acme queue-3 --reason "tour"'
    stage.upstreams.clear()
    clients = ("127.1.2.1", "127.1.2.2", "127.1.2.3", "127.1.2.4")
    with Traffic(clients, stage.fail_closed.port, "/?tenant_id=acme") as traffic:
        traffic.wait_for_more(100, seconds=_CHANGE_SECONDS)
        began = time.monotonic()
        stage.run(command)
        traffic.wait_for(lambda answers: answers[-1].instance == "queue-3", seconds=_CHANGE_SECONDS)
        traffic.wait_for_more(200, seconds=_CHANGE_SECONDS)
    answers = traffic.answers()
    arrived = [arrival.monotonic for arrival in stage.upstreams.arrivals("queue-3")]
    first = min(arrived, default=float("inf"))
    lost = sum(answer.status != http.client.OK for answer in answers)
    strays = sum(answer.instance != "queue-3" for answer in answers if answer.sent > first)
    before = sum(answer.instance == "queue-1" for answer in answers)
    return Row(
        f"{len(clients)} clients",
        f"/?tenant_id=acme\nauthzctl {command}",
        f"{len(answers)} answers, {lost} lost",
        f"queue-3 after {(first - began) * 1000:.0f} ms; {strays} sent later and still on queue-1",
        "0 lost, and none on queue-1 of those sent after the first on queue-3",
        ok=bool(arrived) and before >= 100 and not lost and not strays,
    )


def _block(stage: Stage) -> Row:
    """Block a client that is asking: how soon it bites, and that it stays so."""
    command = f'block add {NIGHT_SCRAPER} --reason "tour: attack at night" --expires 2h'
    with Traffic((NIGHT_SCRAPER,), stage.fail_closed.port, "/") as traffic:
        traffic.wait_for_more(50, seconds=_CHANGE_SECONDS)
        began = time.monotonic()
        stage.run(command)
        bitten = traffic.wait_for(lambda answers: answers[-1].status == http.client.FORBIDDEN, seconds=_CHANGE_SECONDS)
        traffic.wait_for_more(50, seconds=_CHANGE_SECONDS)
    answers = traffic.answers()
    denied = [answer for answer in answers if answer.status == http.client.FORBIDDEN]
    first = min((answer.received for answer in denied), default=float("inf"))
    through = sum(answer.status != http.client.FORBIDDEN for answer in answers if answer.sent > first)
    before = sum(answer.status == http.client.OK for answer in answers)
    return Row(
        f"{_NAMES[NIGHT_SCRAPER]} {NIGHT_SCRAPER}",
        f"/\nauthzctl {command}",
        f"{before} answers, then only 403",
        f"403 after {(first - began) * 1000:.0f} ms; {through} got through later",
        "403 for every request after the first 403",
        ok=bitten and before >= 50 and before + len(denied) == len(answers) and not through,
    )


def _valkey_away(stage: Stage) -> Iterator[Row]:
    port, path = stage.fail_closed.port, "/docs?tenant_id=globex"
    with Traffic((VISITOR,), port, path) as visitor, Traffic((OFFICE,), port, path) as office:
        office.wait_for_more(50, seconds=_CHANGE_SECONDS)
        stage.valkey.stop()
        stage.wait_redis(connected=False)
        office.wait_for_more(_OUTAGE_REQUESTS, seconds=_CHANGE_SECONDS)
        status, body = stage.readiness()
        during = len(visitor.answers()) + len(office.answers())
        stage.valkey.start()
        stage.wait_redis(connected=True)
        office.wait_for_more(50, seconds=_CHANGE_SECONDS)
    wrong = sum(answer.status != http.client.FORBIDDEN for answer in visitor.answers())
    wrong += sum((answer.status, answer.instance) != (http.client.OK, "queue-2") for answer in office.answers())
    yield Row(
        "visitor, office",
        f"{path}\n(Valkey stopped)",
        f"{during} answers, {wrong} other than before",
        f"/readyz says {status}, Redis gone, snapshot {body['snapshot_age_seconds']:.1f} s old",
        "not one answer differs, and the server stays ready",
        ok=during >= _OUTAGE_REQUESTS and not wrong and status == http.client.OK,
    )
    stage.run('block add 127.88.0.0/16 --reason "tour"')
    with Traffic((LATE_SCRAPER,), stage.fail_closed.port, "/") as traffic:
        bitten = traffic.wait_for(
            lambda answers: bool(answers) and answers[-1].status == http.client.FORBIDDEN, seconds=_CHANGE_SECONDS
        )
    yield Row(
        f"{_NAMES[LATE_SCRAPER]} {LATE_SCRAPER}",
        '/\n(Valkey is back)\nauthzctl block add 127.88.0.0/16 --reason "tour"',
        "403" if bitten else "no 403",
        "the server follows changes again" if bitten else "the block does not bite",
        "403, by a block that was added after the outage",
        ok=bitten,
    )


def _unrouted(stage: Stage, envoy: Envoy, reason: str, when: str) -> Row:
    """Forge a routing header where no decision sets one: it must choose nothing, so all instances take their turn."""
    forged = {"x-tenant-instance": "queue-3"}
    stage.upstreams.clear()
    rows = [_request(stage, VISITOR, "/", forged, must=(200, _ANY, reason), envoy=envoy) for _ in INSTANCES]
    spread = sorted({arrival.instance for arrival in stage.upstreams.arrivals()})
    return Row(
        rows[0].who,
        f"{rows[0].asks}\n({len(rows)} times, {when})",
        f"200 from {', '.join(spread)}",
        f"{rows[0].why}; the default route, and no instance sees the header",
        "200 from every instance in turn",
        ok=all(row.ok for row in rows) and spread == sorted(INSTANCES),
    )


def _server_away(stage: Stage) -> Iterator[Row]:
    stage.server.terminate()
    yield _unrouted(stage, stage.fail_open, "", "server stopped, fail-open")
    closed = _request(stage, VISITOR, "/", must=(403, None, ""))
    yield Row(
        closed.who,
        "/\n(server stopped, fail-closed)",
        closed.came_back,
        closed.why,
        closed.must,
        closed.ok,
    )
