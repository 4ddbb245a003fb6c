"""The real process, `authz-server serve`, and what one can ask it."""

import asyncio
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2

from authz_server.demo.processes import Child
from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.grpcio_transport import SERVICE
from authz_server.store.interface import Change, Write
from authz_server.store.redis_store import RedisStore

_SECONDS = 20.0


class ServerProcess:
    """One server process on free ports; stopped at the end of the `with` block."""

    def __init__(self, directory: Path, environ: Mapping[str, str], *, within: Sequence[str] = ()) -> None:
        """`within` are the words of a command that becomes the server, such as `unshare`."""
        defaults = {"AUTHZ_LISTEN": "127.0.0.1:0", "AUTHZ_ADMIN_LISTEN": "127.0.0.1:0", "AUTHZ_DRAIN_SECONDS": "0"}
        self.child = Child(
            "authz-server",
            [*within, sys.executable, "-m", "authz_server.cli.authz_server", "serve"],
            log_path=directory / "authz-server.log",
            env={"PATH": os.environ["PATH"]} | defaults | dict(environ),
        )
        self.grpc = ""
        self.admin = ""

    def __enter__(self) -> Self:
        self.child.start()
        try:
            self.wait_log("serving")
        except BaseException:
            self.child.kill()
            raise
        (serving,) = self.logged("serving")
        self.grpc, self.admin = serving["grpc"], serving["admin"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.child.kill()

    def log(self) -> list[dict[str, Any]]:
        """Every whole line so far; each must be JSON."""
        text = self.child.log_path.read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["event"] == event]

    def wait_log(self, event: str) -> None:
        self.child.wait_until(lambda: bool(self.logged(event)), what=f"{event!r} in the log", timeout=_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        self.child.send_signal(number)

    def wait_exit(self, seconds: float = _SECONDS) -> int:
        return self.child.wait(seconds)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.admin}{path}", timeout=_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path)[1])

    def component(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get_json("/readyz")["components"][name]
        return found

    def metric(self, name: str) -> float:
        """The value of a metric that has no labels."""
        (line,) = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(f"{name} ")]
        return float(line.rpartition(" ")[2])

    def wait_ready(self, *, ready: bool = True) -> None:
        status = 200 if ready else 503
        self.child.wait_until(lambda: self.get("/readyz")[0] == status, what=f"/readyz {status}", timeout=_SECONDS)

    def wait_redis(self, *, connected: bool) -> None:
        self.child.wait_until(
            lambda: self.component("redis")["ready"] is connected, what=f"redis {connected=}", timeout=_SECONDS
        )

    def channel(self, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
        if credentials:
            return grpc.secure_channel(self.grpc, credentials)
        return grpc.insecure_channel(self.grpc)

    def check(
        self, address: str = "203.0.113.7", *, credentials: grpc.ChannelCredentials | None = None, **headers: str
    ) -> ext_authz_pb2.CheckResponse:
        """Ask for one request of this client; raises grpc.RpcError when the server cannot decide."""
        message = ext_authz_pb2.CheckRequest()
        http = message.attributes.request.http
        http.method, http.host, http.path = "GET", "www.example.com", "/"
        http.headers["x-envoy-external-address"] = address
        for name, value in headers.items():
            http.headers[name.replace("_", "-")] = value
        with closing(self.channel(credentials)) as channel:
            call = channel.unary_unary(f"/{SERVICE}/Check")
            envoy_s = [("x-envoy-expected-rq-timeout-ms", str(int(_SECONDS * 1000)))]
            answer: bytes = call(message.SerializeToString(), timeout=_SECONDS, metadata=envoy_s, wait_for_ready=True)
        return ext_authz_pb2.CheckResponse.FromString(answer)

    def serving(self) -> bool:
        """Whether grpc.health.v1 says SERVING."""
        with closing(self.channel()) as channel:
            call = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            answer = call(health_pb2.HealthCheckRequest(), timeout=_SECONDS, wait_for_ready=True)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def start_together(stack: ExitStack, *servers: ServerProcess) -> None:
    """Start servers at the same time, to be stopped by the stack."""
    with ThreadPoolExecutor(len(servers)) as executor:
        for _ in executor.map(stack.enter_context, servers):
            pass


def init_policy(url: str) -> None:
    """Create an empty policy."""

    async def init() -> None:
        store = RedisStore(url)
        try:
            await store.init(actor="tester", reason="test", change_id="init")
        finally:
            await store.close()

    asyncio.run(init())


def apply_writes(url: str, change_id: str, *writes: Write) -> None:
    """Apply a change to the policy."""

    async def apply() -> None:
        store = RedisStore(url)
        try:
            epoch = (await store.position()).epoch
            await store.apply(Change(change_id, epoch, "tester", "because", "test.write", writes))
        finally:
            await store.close()

    asyncio.run(apply())
