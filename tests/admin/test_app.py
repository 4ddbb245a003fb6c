"""The admin port's routes; test_server.py asks them of the running process."""

import socket
from dataclasses import dataclass, field

import httpx
import pytest
from prometheus_client import Counter

from authz_server.admin.app import build_admin_app
from authz_server.admin.listening import CannotListenError, open_socket
from authz_server.decision_log import DecisionLog, LogOptions
from authz_server.health import ComponentName, HealthState
from authz_server.metrics import Metrics
from authz_server.policy.access import Scope
from authz_server.policy.records import RecordKey, RecordKind, Unreadable, record_key
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.replicas import Registry

NAMES = [("/livez", 200), ("/readyz", 503), ("/metrics", 200), ("/snapshot", 503)]


async def no_servers() -> Registry:
    return Registry((), None)


@dataclass
class Admin:
    """The routes over a state that a test can change."""

    health: HealthState = field(default_factory=HealthState)
    metrics: Metrics = field(default_factory=Metrics)
    snapshot: Snapshot | None = None
    age_seconds: float | None = None
    log: DecisionLog = field(default_factory=lambda: DecisionLog(LogOptions(), None))

    async def request(self, method: str, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        app = build_admin_app(
            health=self.health,
            registry=self.metrics.registry,
            current=lambda: self.snapshot,
            age_seconds=lambda: self.age_seconds,
            log=self.log,
            servers=no_servers,
        )
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://admin") as client:
            return await client.request(method, path, headers=headers)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        return await self.request("GET", path, headers)


def ready_admin() -> Admin:
    admin = Admin()
    for name in ComponentName:
        admin.health.set(name, ready=True, detail=f"{name} is well")
    return admin


@pytest.mark.parametrize(("path", "status"), NAMES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_every_route_answers_from_the_start(method: str, path: str, status: int) -> None:
    assert (await Admin().request(method, path)).status_code == status


@pytest.mark.parametrize("path", [path for path, _ in NAMES])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_nothing_can_be_changed(method: str, path: str) -> None:
    assert (await Admin().request(method, path)).status_code == 405


@pytest.mark.parametrize("path", ["/healthz", "/snapshot/", "/config"])
async def test_there_is_nothing_else(path: str) -> None:
    assert (await Admin().get(path)).status_code in (307, 404)


async def test_readyz_names_each_component() -> None:
    admin = ready_admin()
    admin.age_seconds = 0.12345
    answer = await admin.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {
        "ready": True,
        "snapshot_age_seconds": 0.123,
        "components": {
            "snapshot": {"ready": True, "required": True, "detail": "snapshot is well"},
            "serving": {"ready": True, "required": True, "detail": "serving is well"},
            "redis": {"ready": True, "required": False, "detail": "redis is well"},
            "snapshot_file": {"ready": True, "required": False, "detail": "snapshot_file is well"},
        },
    }


@pytest.mark.parametrize(
    ("name", "status"), [(ComponentName.SNAPSHOT, 503), (ComponentName.SERVING, 503), (ComponentName.REDIS, 200)]
)
async def test_readyz_is_503_without_a_required_component(name: ComponentName, status: int) -> None:
    admin = ready_admin()
    admin.health.set(name, ready=False, detail="broken")
    answer = await admin.get("/readyz")
    assert answer.status_code == status
    assert answer.json()["components"][name]["detail"] == "broken"
    assert (await admin.get("/livez")).status_code == 200


async def test_metrics_as_text_and_as_openmetrics() -> None:
    admin = Admin()
    Counter("authz_probe", "A probe.", registry=admin.metrics.registry).inc()
    text = await admin.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    assert "authz_probe_total 1.0" in text.text.splitlines()
    openmetrics = await admin.get("/metrics", {"accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


async def test_snapshot_tells_what_it_is() -> None:
    scope = Scope("tenant:acme")
    key = RecordKey(RecordKind.ENTRY, "10.0.0.0/8", "tenant:acme/block")
    admin = Admin(age_seconds=2.0)
    admin.snapshot = build_snapshot(
        [(record_key(scope), scope), (key, Unreadable("'x' is not JSON"))],
        epoch="e1",
        revision=42,
        options=DecisionOptions(),
    )
    answer = await admin.get("/snapshot")
    assert answer.status_code == 200
    assert answer.json() == {
        "epoch": "e1",
        "revision": 42,
        "age_seconds": 2.0,
        "counts": {
            "lists": 0,
            "entries": 1,
            "scopes": 1,
            "resources": 0,
            "tenants": 0,
            "instances": 0,
            "unreadable": 1,
        },
        "unreadable": [{"record": "entry 10.0.0.0/8 in list tenant:acme/block", "problem": "'x' is not JSON"}],
        "degraded_scopes": ["tenant:acme"],
    }


@pytest.mark.integration
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_open_socket_takes_a_free_port(host: str) -> None:
    with open_socket(host, 0) as listening, socket.create_connection((host, listening.getsockname()[1]), timeout=5):
        pass


@pytest.mark.integration
def test_open_socket_on_all_addresses_takes_ipv4_too() -> None:
    with open_socket("::", 0) as listening, socket.create_connection(("127.0.0.1", listening.getsockname()[1]), 5):
        pass


@pytest.mark.integration
def test_open_socket_says_why_it_cannot() -> None:
    with open_socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(
            CannotListenError, match=f"cannot listen on host 127.0.0.1, port {port}: Address already in use"
        ):
            open_socket("127.0.0.1", port)
    with pytest.raises(CannotListenError, match=r"cannot listen on host 192\.0\.2\.1, port 0: Cannot assign"):
        open_socket("192.0.2.1", 0)
    with pytest.raises(CannotListenError, match="it is not a host name"):
        open_socket("a" * 64, 0)
