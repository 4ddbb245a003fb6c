"""The composition root: what it makes of its parts' words, and the real process with a real Valkey."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import trustme
from redis import Redis
from structlog.testing import capture_logs
from support.process import ServerProcess, apply_writes, init_policy
from support.waiting import eventually

from authz_server.cli.acknowledgement import wait_for_servers
from authz_server.decision_log import DecisionLog, LogOptions
from authz_server.demo.valkey import Valkey
from authz_server.ext_authz.checker import Checks
from authz_server.health import ComponentName, HealthState
from authz_server.metrics import Metrics
from authz_server.policy.access import Entry, Side, own_list
from authz_server.policy.addresses import parse_network
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.decision import Denied
from authz_server.policy.reasons import Reason
from authz_server.policy.records import RecordKey, RecordKind, entry_key, record_key
from authz_server.policy.snapshot import Snapshot
from authz_server.refresher import LostChanges, RefresherStatus
from authz_server.server import FAULT_SECONDS, Observer, StatusWatch, _serve, _until_stopped, log_event, log_lost
from authz_server.settings import Settings
from authz_server.store.interface import Event, EventRecord, Position, Write
from authz_server.store.redis_store import RedisStore

POSITION = Position("e", 7, "c")
BLOCK = Entry(parse_network("198.51.100.0/24"), reason="scraper", author="ann", created_at=1)
BLOCKED_ADDRESS = "198.51.100.7"


@dataclass
class Watched:
    """A status watch, what it watches and what it tells."""

    health: HealthState = field(default_factory=HealthState)
    snapshot: Snapshot | None = None

    def __post_init__(self) -> None:
        self.watch = StatusWatch(self.health, lambda: self.snapshot)

    def tell(self, status: RefresherStatus) -> list[str]:
        with capture_logs() as logs:
            self.watch(status)
        return [line["event"] for line in logs]

    def component(self, name: ComponentName) -> tuple[bool, str]:
        component = self.health.components[name]
        return component.ready, component.detail


class TestStatusWatch:
    """From the refresher's status to health and log."""

    def test_the_way_of_a_process(self) -> None:
        watched = Watched()
        assert watched.tell(RefresherStatus(problem="not there")) == ["redis not usable"]
        assert watched.component(ComponentName.SNAPSHOT) == (False, "not loaded: not there")
        assert watched.component(ComponentName.REDIS) == (False, "not there")
        assert watched.tell(RefresherStatus(problem="not there")) == [], "said once"

        watched.snapshot = Snapshot("e", 7)
        loaded = RefresherStatus(connected=True, problem="", position=POSITION, loads=1)
        assert watched.tell(loaded) == ["snapshot loaded", "redis connected"]
        assert watched.component(ComponentName.SNAPSHOT) == (True, "revision 7 of epoch e")
        assert watched.component(ComponentName.REDIS) == (True, "connected")
        assert watched.tell(loaded) == []

        gone = RefresherStatus(connected=False, problem="gone", position=POSITION, loads=1)
        assert watched.tell(gone) == ["redis not usable"]
        assert watched.component(ComponentName.SNAPSHOT) == (True, "revision 7 of epoch e")
        assert watched.component(ComponentName.REDIS) == (False, "gone")

        watched.snapshot = None
        assert watched.tell(gone) == []
        ready, detail = watched.component(ComponentName.SNAPSHOT)
        assert not ready
        assert "too old" in detail

    def test_another_epoch_is_said_aloud(self) -> None:
        """Whoever ran `authzctl init` on a Redis that lost its data has to hear of it."""
        watched = Watched(snapshot=Snapshot("e", 7))
        watched.tell(RefresherStatus(connected=True, problem="", position=POSITION, loads=1))
        watched.snapshot = Snapshot("another", 1)
        with capture_logs() as logs:
            watched.watch(RefresherStatus(connected=True, problem="", position=Position("another", 1, "c"), loads=2))
        [line] = logs
        assert (line["log_level"], line["event"]) == ("warning", "the policy was replaced by another")
        assert (line["epoch_before"], line["epoch"]) == ("e", "another")


class TestObserver:
    """Faults are logged, and clients that provoke them cannot flood the log."""

    def test_internal_errors_are_logged_with_their_trace_at_a_bounded_rate(self) -> None:
        now = 100.0
        observer = Observer(Metrics(), DecisionLog(LogOptions(), None), clock=lambda: now)
        checks, fault = Checks(1), RuntimeError("boom")
        checks.deny(0, fault)
        with capture_logs() as logs:
            for _ in range(5):
                observer(checks)
            now += FAULT_SECONDS
            observer(checks)
        assert [line["exc_info"] for line in logs] == [fault, fault]
        assert [line["not_logged_before"] for line in logs] == [0, 4]

    def test_denials_are_counted_and_not_logged(self) -> None:
        metrics, checks = Metrics(), Checks(1)
        checks.decisions[0] = Denied(Reason.BLOCKED)
        with capture_logs() as logs:
            Observer(metrics, DecisionLog(LogOptions(), None))(checks)
        assert logs == []
        labels = {"outcome": "denied", "reason": "blocked"}
        assert metrics.registry.get_sample_value("authz_checks_total", labels) == 1


def test_applied_changes_are_logged_with_who_what_and_why() -> None:
    records = tuple(
        EventRecord(RecordKey(RecordKind.TENANT, f"t{number}"), None, "{}", Tenant(f"t{number}", "queue-1"))
        for number in range(60)
    )
    event = Event(POSITION, "b", actor="ann", reason="INC-1", action="tenant.add", at=5.0, records=records)
    with capture_logs() as logs:
        log_event(event)
    first, second = logs
    expected = {
        "event": "change applied",
        "revision": 7,
        "change_id": "c",
        "actor": "ann",
        "reason": "INC-1",
        "action": "tenant.add",
    }
    for line in logs:
        assert expected.items() <= line.items()
        assert line["records_in_all"] == 60
    assert (first["line"], second["line"]) == ("1 of 2", "2 of 2")
    logged = [*first["records"], *second["records"]]
    assert logged == [{"record": f"tenant t{number}", "previous": None, "new": "{}"} for number in range(60)]


def test_lost_changes_are_logged_one_by_one() -> None:
    record = EventRecord(RecordKey(RecordKind.TENANT, "acme"), None, "{}", Tenant("acme", "queue-1"))
    event = Event(POSITION, "b", actor="ann", reason="INC-1", action="tenant.add", at=5.0, records=(record,))
    with capture_logs() as logs:
        log_lost(LostChanges(POSITION, Position("e", 5, "a"), (event,)))
    summary, lost = logs
    assert (summary["lost"], summary["log_level"]) == (2, "error")
    assert (lost["actor"], lost["action"], lost["revision"]) == ("ann", "tenant.add", 7)
    assert lost["records"] == [{"record": "tenant acme", "previous": None, "new": "{}"}]


class TestUntilStopped:
    """A part that ends must end the process: a server whose policy no longer changes is worse than none."""

    async def test_a_signal_is_success(self) -> None:
        stopping = asyncio.Event()
        part = asyncio.create_task(asyncio.Event().wait())
        stopping.set()
        assert await _until_stopped(stopping, {part}) == 0
        part.cancel()

    async def test_a_part_that_raises_is_logged_and_failure(self) -> None:
        async def broken() -> None:
            raise RuntimeError("boom")

        with capture_logs() as logs:
            assert await _until_stopped(asyncio.Event(), {asyncio.create_task(broken(), name="refresher")}) == 1
        (line,) = logs
        assert line["part"] == "refresher"
        assert str(line["exc_info"]) == "boom"

    async def test_a_part_that_merely_returns_is_failure_too(self) -> None:
        async def done() -> None:
            return

        with capture_logs() as logs:
            assert await _until_stopped(asyncio.Event(), {asyncio.create_task(done())}) == 1
        assert len(logs) == 1


@pytest.fixture
def lasting_valkey() -> Iterator[Valkey]:
    """A Valkey that comes back with its data."""
    with Valkey(append_only=True) as server:
        yield server


def unavailable(server: ServerProcess) -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        server.check()
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.integration
async def test_a_store_that_has_lost_the_reports_is_told_again_at_once(
    own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the next heartbeat: until then `--wait` would take the yes of some servers for that of all."""
    monkeypatch.setattr("authz_server.replicas._HEARTBEAT_SECONDS", 3600.0)
    await asyncio.to_thread(init_policy, own_valkey.url)
    stopping = asyncio.Event()
    settings = Settings(
        redis_url=own_valkey.url,
        listen="127.0.0.1:0",
        admin_listen="127.0.0.1:0",
        decision_log="off",
        drain_seconds=0,
    )
    store = RedisStore(own_valkey.url)
    client = Redis.from_url(own_valkey.url)

    def reported() -> object:
        return client.hvals("{authz}:replicas")

    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        stack.callback(client.close)
        serving = asyncio.create_task(_serve(settings, stopping, stack))
        await eventually(reported, seconds=20)
        await wait_for_servers(store, await store.position(), seconds=20)
        client.flushall()
        await eventually(reported, seconds=20)
        stopping.set()
        assert await serving == 0


@pytest.mark.integration
class TestProcess:
    """`authz-server serve` with a real Valkey."""

    def test_started_without_redis_it_becomes_ready_by_itself(self, own_valkey: Valkey, tmp_path: Path) -> None:
        own_valkey.stop()
        with ServerProcess(tmp_path, {"AUTHZ_REDIS_URL": own_valkey.url}) as server:
            assert server.get("/livez")[0] == 200
            assert server.get("/readyz")[0] == 503
            assert server.component("snapshot")["ready"] is False
            assert server.component("serving")["ready"] is True
            assert unavailable(server)
            assert not server.serving()
            assert server.metric("authz_unavailable_total") == 1

            own_valkey.start()
            server.child.wait_until(
                lambda: "authzctl init" in server.component("redis")["detail"], what="to be told of init", timeout=20
            )
            assert server.get("/readyz")[0] == 503, "there, but nobody has initialised it"
            assert unavailable(server)

            init_policy(own_valkey.url)
            server.wait_ready()
            assert server.serving()
            assert server.check().status.code == 0, "initialised and empty is a valid policy"
            assert server.get_json("/snapshot")["revision"] == 1
            assert len(server.logged("ready")) == 1

    def test_without_redis_decisions_go_on(self, lasting_valkey: Valkey, tmp_path: Path) -> None:
        url = lasting_valkey.url
        init_policy(url)
        with ServerProcess(tmp_path, {"AUTHZ_REDIS_URL": url, "AUTHZ_DENIED_STATUS": "blocked=404"}) as server:
            server.wait_ready()
            instance, tenant = Instance("queue-3"), Tenant("acme", "queue-3")
            key = entry_key(own_list("global", Side.BLOCK), BLOCK)
            writes = [Write(record_key(record), None, record) for record in (instance, tenant)]
            apply_writes(url, "c1", Write(key, None, BLOCK), *writes)
            server.wait_log("change applied")
            (applied,) = server.logged("change applied")
            assert (applied["actor"], applied["reason"], applied["action"]) == ("tester", "because", "test.write")

            def assert_policy_holds() -> None:
                assert server.check(BLOCKED_ADDRESS).denied_response.status.code == 404
                server.wait_log("decision")
                logged = server.logged("decision")[0]
                assert (logged["client_address"], logged["reason"]) == (BLOCKED_ADDRESS, "blocked")
                assert BLOCKED_ADDRESS in server.get("/")[1]
                ok = server.check(x_tenant_id="acme").ok_response
                headers = {option.header.key: option.header.value for option in ok.headers}
                assert headers == {"x-tenant-instance": "queue-3", "x-tenant-id": "acme"}

            assert_policy_holds()
            lasting_valkey.stop()
            server.wait_redis(connected=False)
            assert_policy_holds()
            assert server.get("/readyz")[0] == 200
            assert server.serving()
            assert server.metric("authz_redis_connected") == 0
            age = server.metric("authz_snapshot_age_seconds")
            server.child.wait_until(
                lambda: server.metric("authz_snapshot_age_seconds") > age + 0.2, what="the age to grow", timeout=20
            )
            assert server.get_json("/readyz")["snapshot_age_seconds"] > age

            lasting_valkey.start()
            server.wait_redis(connected=True)
            assert_policy_holds()
            assert len(server.logged("ready")) == 1
            assert server.logged("not ready") == []

    def test_a_snapshot_that_is_too_old_is_not_served(self, lasting_valkey: Valkey, tmp_path: Path) -> None:
        init_policy(lasting_valkey.url)
        environ = {"AUTHZ_REDIS_URL": lasting_valkey.url, "AUTHZ_MAX_SNAPSHOT_AGE_SECONDS": "1"}
        with ServerProcess(tmp_path, environ) as server:
            server.wait_ready()
            lasting_valkey.stop()
            server.wait_ready(ready=False)
            assert "too old" in server.component("snapshot")["detail"]
            assert unavailable(server)
            lasting_valkey.start()
            server.wait_ready()
            assert server.check().status.code == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
    def test_a_signal_drains_and_leaves(self, own_valkey: Valkey, tmp_path: Path, number: signal.Signals) -> None:
        init_policy(own_valkey.url)
        with ServerProcess(tmp_path, {"AUTHZ_REDIS_URL": own_valkey.url, "AUTHZ_DRAIN_SECONDS": "2"}) as server:
            server.wait_ready()
            server.signal(number)
            server.wait_ready(ready=False)
            assert "draining" in server.component("serving")["detail"]
            assert not server.serving()
            assert server.check().status.code == 0, "endpoints have not gone yet: still answering"
            assert server.get("/livez")[0] == 200
            assert server.wait_exit() == 0
            events = [line["event"] for line in server.log()]
            steps = ["stopping", "not ready", "draining", "finishing", "stopped"]
            assert [event for event in events if event in steps] == steps
            assert all(line["level"] in ("info", "warning") for line in server.log())

    def test_a_signal_ends_it_without_redis_too(self, own_valkey: Valkey, tmp_path: Path) -> None:
        own_valkey.stop()
        with ServerProcess(tmp_path, {"AUTHZ_REDIS_URL": own_valkey.url}) as server:
            server.signal(signal.SIGTERM)
            assert server.wait_exit() == 0

    def test_a_signal_ends_it_while_redis_hangs(self, own_valkey: Valkey, tmp_path: Path) -> None:
        init_policy(own_valkey.url)
        with ServerProcess(tmp_path, {"AUTHZ_REDIS_URL": own_valkey.url}) as server:
            server.wait_ready()
            own_valkey.pause()
            try:
                server.signal(signal.SIGTERM)
                assert server.wait_exit(5) == 0
            finally:
                own_valkey.resume()

    def test_a_second_signal_leaves_at_once(self, own_valkey: Valkey, tmp_path: Path) -> None:
        init_policy(own_valkey.url)
        with ServerProcess(tmp_path, {"AUTHZ_REDIS_URL": own_valkey.url, "AUTHZ_DRAIN_SECONDS": "600"}) as server:
            server.wait_ready()
            server.signal(signal.SIGTERM)
            server.wait_log("draining")
            server.signal(signal.SIGTERM)
            assert server.wait_exit(5) == 1

    @pytest.mark.parametrize("variable", ["AUTHZ_LISTEN", "AUTHZ_ADMIN_LISTEN"])
    def test_a_port_in_use_is_one_clear_line(self, variable: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            environ = {"AUTHZ_LISTEN": "127.0.0.1:0", "AUTHZ_ADMIN_LISTEN": "127.0.0.1:0"}
            ended = run_serve(environ | {variable: f"127.0.0.1:{port}"})
        assert ended.returncode == 1
        errors = [line for line in ended.stderr.splitlines() if "cannot start" in line]
        assert len(errors) == 1
        assert f"cannot listen on host 127.0.0.1, port {port}: Address already in use" in errors[0]
        assert "Traceback" not in ended.stderr

    def test_bad_settings_are_told_all_at_once(self) -> None:
        ended = run_serve({"AUTHZ_LISTEN": "everywhere", "AUTHZ_TRUSTED_PEER": "10.0.0.0/8"})
        assert ended.returncode == 2
        assert [line.partition(":")[0] for line in ended.stderr.splitlines()] == ["AUTHZ_TRUSTED_PEER", "AUTHZ_LISTEN"]

    def test_mutual_tls(self, own_valkey: Valkey, tmp_path: Path) -> None:
        init_policy(own_valkey.url)
        ca, other_ca = trustme.CA(), trustme.CA()
        issued = ca.issue_cert("127.0.0.1", common_name="authz")
        issued.private_key_pem.write_to_path(tmp_path / "tls.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
        ca.cert_pem.write_to_path(tmp_path / "ca.crt")
        environ = {
            "AUTHZ_REDIS_URL": own_valkey.url,
            "AUTHZ_TLS_CERTIFICATE": str(tmp_path / "tls.crt"),
            "AUTHZ_TLS_KEY": str(tmp_path / "tls.key"),
            "AUTHZ_TLS_CLIENT_CA": str(tmp_path / "ca.crt"),
        }

        def credentials(client_ca: trustme.CA) -> grpc.ChannelCredentials:
            client = client_ca.issue_cert("client.example.com")
            return grpc.ssl_channel_credentials(
                ca.cert_pem.bytes(), client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
            )

        with ServerProcess(tmp_path, environ) as server:
            server.wait_ready()
            assert server.check(credentials=credentials(ca)).status.code == 0
            with server.channel(credentials(other_ca)) as channel, pytest.raises(grpc.RpcError):
                channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)


def run_serve(environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "authz_server.cli.authz_server", "serve"],
        env={"PATH": os.environ["PATH"]} | environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
