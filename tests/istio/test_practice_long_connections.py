"""Long connections: a download and a WebSocket survive a gateway's shutdown, which ends with the last of them.

The times are the manifest's, shortened. In place of pilot-agent, which is not to be had alone, a stand-in does what
`pkg/envoy/agent.go` (repository istio/istio), terminate() and activeProxyConnections(), does on SIGTERM.
"""

import asyncio
import http.client
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import yaml
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect
from support.gateway import AuthzServer, ask
from support.istio.manifests import compose
from support.istio.messages import duration
from support.istio.platform import QUEUES, SITE, Launcher, Pods, authz_service
from support.istio.proxies import exits_on_zero_active_connections, gateway_environment
from support.waiting import wait_until
from websockets.sync.client import ClientConnection, connect

from authz_server.demo.envoy import Envoy
from authz_server.demo.upstreams import Upstreams

pytestmark = pytest.mark.integration

COMPOSITION = compose("long-connections", "routing-header-safety", "route-by-header")

DRAIN_SECONDS = 1
"""drainDuration here; in the manifest 600 s."""
MINIMUM_SECONDS = 0.5
"""MINIMUM_DRAIN_DURATION here; in the manifest 30 s."""
CHECK_SECONDS = 0.05
"""How often pilot-agent looks for connections: every second (activeConnectionCheckDelay)."""

CHUNK = b"x" * 1024


class Download:
    """What /download sends: chunks until the test lets it end."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.sent = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        while not self.may_end.is_set():
            self.sent += len(CHUNK)
            yield CHUNK
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def download() -> Download:
    return Download()


@pytest.fixture(scope="module")
def long_pods(download: Download) -> Iterator[Pods]:
    """Pods that also serve a download without end, and WebSockets that send back what they get."""

    def around(name: str, pod: ASGIApp) -> ASGIApp:
        async def long(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "websocket":
                websocket = WebSocket(scope, receive, send)
                await websocket.accept()
                try:
                    while True:
                        await websocket.send_text(await websocket.receive_text())
                except WebSocketDisconnect:
                    return
            elif Request(scope).url.path == "/download":
                await StreamingResponse(download.chunks())(scope, receive, send)
            else:
                await pod(scope, receive, send)

        return long

    with Upstreams(QUEUES, around=around, websockets=True) as upstreams:
        yield Pods(upstreams)


def test_the_manifest_has_pilot_agent_wait_for_the_last_connection() -> None:
    """And the order of its times is that of the shortened ones; test_manifests.py holds grace > drain."""
    template = COMPOSITION.one("Deployment", "istio-ingress").spec["template"]
    config = yaml.safe_load(template["metadata"]["annotations"]["proxy.istio.io/config"])
    assert exits_on_zero_active_connections(COMPOSITION)
    minimum = duration(gateway_environment(COMPOSITION)["MINIMUM_DRAIN_DURATION"])
    assert minimum < duration(config["drainDuration"])
    assert MINIMUM_SECONDS < DRAIN_SECONDS


def active_connections(envoy: Envoy) -> int:
    """activeProxyConnections() of pilot-agent: of listeners, not of workers, not of Istio's own and the admin port."""
    _, stats = envoy.admin("/stats?usedonly&filter=downstream_cx_active$")
    assert stats, "pilot-agent would end at once: the statistics that it looks at are not there"
    found = re.findall(r"^listener\.(?!admin\.|envoy_internal_)(?!.*worker_)\S+: (\d+)$", stats, re.MULTILINE)
    return sum(map(int, found))


def stand_in_for_pilot_agent(envoy: Envoy) -> None:
    """What pilot-agent does on SIGTERM with EXIT_ON_ZERO_ACTIVE_CONNECTIONS: drain, wait, look, wait, end."""
    status, _ = envoy.admin("/drain_listeners?graceful", method="POST")
    assert status == 200
    time.sleep(MINIMUM_SECONDS)
    while active_connections(envoy):
        time.sleep(CHECK_SECONDS)
    envoy.kill()


@contextmanager
def shutting_down(envoy: Envoy) -> Iterator["Future[None]"]:
    """The stand-in at work; its end is awaited."""
    with ThreadPoolExecutor(1, "stand-in-for-pilot-agent") as executor:
        try:
            yield executor.submit(stand_in_for_pilot_agent, envoy)
        finally:
            envoy.kill()  # ends the stand-in too, should a test fail


def gateway(launcher: Launcher, authz: AuthzServer, pods: Pods) -> Envoy:
    return launcher.gateway(COMPOSITION, authz_service(authz), pods.queue(), istio_stats=True)


def request(connection: http.client.HTTPConnection, path: str) -> http.client.HTTPResponse:
    connection.request("GET", path, headers={"Host": SITE})
    return connection.getresponse()


def is_told_to_leave(connection: http.client.HTTPConnection) -> bool:
    """Whether the answer to one more request is the connection's last."""
    answer = request(connection, "/")
    assert answer.status == 200
    answer.read()
    return answer.headers["connection"] == "close"


def refuses(envoy: Envoy) -> bool:
    """Whether nobody listens any more."""
    try:
        socket.create_connection(envoy.address, timeout=5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # the listener is closed while this connection is made; the next one will tell
    return False


@contextmanager
def websocket_through(envoy: Envoy) -> Iterator[ClientConnection]:
    with socket.create_connection(envoy.address) as plain, connect(f"ws://{SITE}/", sock=plain) as websocket:
        yield websocket


def echoes(websocket: ClientConnection, text: str) -> bool:
    websocket.send(text)
    return websocket.recv(timeout=5) == text


def test_what_has_begun_is_finished_and_the_process_leaves_with_the_last_connection(
    launcher: Launcher, authz: AuthzServer, long_pods: Pods, download: Download
) -> None:
    leaving, staying = (gateway(launcher, authz, long_pods) for _ in range(2))
    download.may_end.clear()
    download.sent = 0
    slow = http.client.HTTPConnection(*leaving.address, timeout=20)
    kept = http.client.HTTPConnection(*leaving.address, timeout=20)
    answer = request(slow, "/download")
    received = len(answer.read1(len(CHUNK)))
    assert received
    assert not is_told_to_leave(kept)
    with websocket_through(leaving) as websocket:
        assert echoes(websocket, "before")
        with shutting_down(leaving) as stand_in:
            # Who has a connection and asks again is told to make another.
            wait_until(lambda: is_told_to_leave(kept))
            # New connections go elsewhere.
            wait_until(lambda: refuses(leaving))
            assert ask(staying.address, host=SITE).status == 200
            # What has begun goes on, well after the drain.
            sent = download.sent
            wait_until(lambda: download.sent > sent + 20 * len(CHUNK))
            assert echoes(websocket, "during")
            assert not stand_in.done()
            download.may_end.set()
            received += len(answer.read())  # raises IncompleteRead, had it been cut
            assert received == download.sent
            slow.close()
            kept.close()
            assert echoes(websocket, "still")
            assert leaving.running
            assert not stand_in.done()
            websocket.close()
            stand_in.result(timeout=5)
        assert not leaving.running
    assert staying.running


def test_without_connections_it_leaves_after_the_minimum(
    launcher: Launcher, authz: AuthzServer, long_pods: Pods
) -> None:
    leaving = gateway(launcher, authz, long_pods)
    assert ask(leaving.address, host=SITE).status == 200  # until a first one there are no statistics to look at
    before = time.monotonic()
    with shutting_down(leaving) as stand_in:
        assert ask(leaving.address, host=SITE).status == 200  # who has not noticed yet is served
        stand_in.result(timeout=5)
    assert MINIMUM_SECONDS <= time.monotonic() - before < MINIMUM_SECONDS + 3
