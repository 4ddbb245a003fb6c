"""All that the tour needs, started in order and stopped in reverse: Valkey, instances, the server, two Envoys."""

import http.client
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from typer.testing import CliRunner

from authz_server.cli.authzctl import app as authzctl_app
from authz_server.demo.envoy import Envoy
from authz_server.demo.envoy_config import GatewayOptions, gateway_config
from authz_server.demo.processes import Child, free_port
from authz_server.demo.upstreams import Upstreams
from authz_server.demo.valkey import Valkey
from authz_server.settings import CONFIG_VARIABLE, ENV_PREFIX, Settings

INSTANCES = ("queue-1", "queue-2", "queue-3")
_HOST = "127.0.0.1"
_READY_SECONDS = 20.0
_REQUEST_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got."""

    sent: float
    """`time.monotonic()` before the request was sent."""
    received: float
    """`time.monotonic()` when the answer was there."""
    status: int
    """0 when there was no answer at all."""
    instance: str | None
    """Who answered; None when no instance did."""
    headers_seen: Mapping[str, str]
    """The request headers as they reached the instance."""


class Client:
    """A client with an address of its own: on Linux all of 127.0.0.0/8 is this machine."""

    def __init__(self, address: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(
            _HOST, port, timeout=_REQUEST_SECONDS, source_address=(address, 0)
        )

    def ask(self, path: str, headers: Mapping[str, str]) -> Answer:
        """Send a GET with the path exactly as it is written, and read the answer."""
        sent = time.monotonic()
        try:
            self._connection.request("GET", path, headers=dict(headers))
            response = self._connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return Answer(sent, time.monotonic(), 0, None, {})
        instance = response.headers.get("x-served-by")
        seen = dict(json.loads(body)["headers"]) if instance else {}
        return Answer(sent, time.monotonic(), response.status, instance, seen)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Stage:
    """The main job on one machine. Use as a context manager; nothing is left running after it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.admin_port = 0
        self.grpc_port = 0

    def __enter__(self) -> Self:
        with self._stack as stack:
            self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="authz-demo-")))
            # Append-only, so that Valkey comes back with its data after the tour has stopped it.
            self.valkey = stack.enter_context(Valkey(append_only=True))
            self.upstreams = stack.enter_context(Upstreams(INSTANCES))
            # Fixed for the demo's life: Envoy must find the server again after the tour has stopped it.
            self.grpc_port = free_port()
            self.admin_port = free_port()
            self.server = Child(
                "authz-server",
                [sys.executable, "-m", "authz_server.cli.authz_server", "serve"],
                log_path=self._directory / "authz-server.log",
                env=self.environment,
            )
            stack.callback(self.server.terminate)
            self.server.start()
            self.fail_closed = stack.enter_context(self._envoy(failure_mode_allow=False))
            self.fail_open = stack.enter_context(self._envoy(failure_mode_allow=True))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """The settings of the server, and what authzctl needs to find the same policy."""
        return {
            "AUTHZ_REDIS_URL": self.valkey.url,
            "AUTHZ_LISTEN": f"{_HOST}:{self.grpc_port}",
            "AUTHZ_ADMIN_LISTEN": f"{_HOST}:{self.admin_port}",
            "AUTHZ_TENANT_FROM": "header:x-tenant-id,query:tenant_id",
            "AUTHZ_DRAIN_SECONDS": "1",
        }

    def _envoy(self, *, failure_mode_allow: bool) -> Envoy:
        options = GatewayOptions(
            authz=(_HOST, self.grpc_port),
            instances=self.upstreams.addresses,
            failure_mode_allow=failure_mode_allow,
        )
        return Envoy(gateway_config(options), name="envoy")

    def run(self, command: str) -> None:
        """Run an authzctl command, written as in a shell, in this process (a new one would take most of a second).

        Raises RuntimeError with its output when it does not exit with 0.
        """
        # The viewer's own settings must not reach the tour: what is not ours is unset.
        unset = {f"{ENV_PREFIX}{name.upper()}": None for name in Settings.model_fields} | {CONFIG_VARIABLE: None}
        environment = {**unset, **self.environment, "AUTHZCTL_ACTOR": "tour"}
        result = CliRunner().invoke(authzctl_app, shlex.split(command), env=environment)
        if result.exit_code != 0:
            raise RuntimeError(f"authzctl {command}: exit code {result.exit_code}\n{result.output}")

    def readiness(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of /readyz; (0, {}) when the admin port does not answer."""
        connection = http.client.HTTPConnection(_HOST, self.admin_port, timeout=_REQUEST_SECONDS)
        try:
            connection.request("GET", "/readyz")
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except OSError:
            return 0, {}
        finally:
            connection.close()

    def wait_ready(self) -> None:
        """Wait until the server is ready. Raises ChildFailedError with its log when it does not become so."""
        self.server.wait_until(
            lambda: self.readiness()[0] == http.client.OK, what="the server to be ready", timeout=_READY_SECONDS
        )

    def wait_redis(self, *, connected: bool) -> None:
        """Wait until the server has noticed that Redis is there, or gone."""
        self.server.wait_until(
            lambda: self.readiness()[1].get("components", {}).get("redis", {}).get("ready") is connected,
            what=f"Redis to be {'connected' if connected else 'gone'}",
            timeout=_READY_SECONDS,
        )
