"""Child processes that cannot outlive this one.

Three rules, and how each is kept:

* **Nothing is left running.** ``with`` blocks stop children in order. When this process gets no chance to unwind
  (SIGKILL, SIGTERM with the default action, a crash), Linux does it: every child asks for SIGKILL at the death of its
  parent (``PR_SET_PDEATHSIG``).
* **Ctrl-C belongs to the parent.** A terminal sends SIGINT to its whole foreground process group. A child gets a
  session of its own, so that it serves on until the parent has decided what to stop, and in which order.
* **Any thread may start a child.** The death signal of Linux fires when the *thread* that forked ends, not the process.
  So one thread, which lives as long as the interpreter, forks for everyone.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

# The child sets its own death signal in this short program and then becomes the real one (same pid). The alternative,
# `preexec_fn`, runs Python between fork and exec in a process with threads, where a lock held by one of them (gRPC has
# several) hangs the child. The parent may have died before the signal was asked for: hence the look at getppid.
# Python ignores SIGPIPE and SIGXFSZ, and ignored signals stay ignored over exec: they are given back.
# Only Linux has the death signal; elsewhere the `with` blocks alone stop children.
_LAUNCHER = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent process is gone")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot execute {sys.argv[2]}: {error}")
"""

_FORKING_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forks-children")

_POLL_SECONDS = 0.02


class ChildFailedError(Exception):
    """A child process ended, or did not become ready in time; the message holds the end of its log."""


class Child:
    """One child process, its log file and its end.

    It can be started again after it has ended; the log file is then appended to.
    """

    def __init__(
        self,
        name: str,
        args: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Describe the process; nothing runs until `start`.

        `env` is its whole environment (None: ours). Output and errors both go to `log_path`.
        """
        self.name = name
        self.args = tuple(args)
        self.log_path = log_path
        self._env = None if env is None else dict(env)
        self._cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        """The process id; RuntimeError when it was never started."""
        return self._started().pid

    @property
    def running(self) -> bool:
        """True while the process has not ended (a paused one is running)."""
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while it runs or before it was started."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start the process. Raises RuntimeError when it runs already."""
        if self.running:
            raise RuntimeError(f"{self.name} runs already (pid {self.pid})")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            _FORKING_THREAD.submit(self._fork, log).result()

    def _fork(self, log: IO[bytes]) -> None:
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        self._process = subprocess.Popen(
            [*launcher, *self.args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._env,
            cwd=self._cwd,
            start_new_session=True,
        )

    def wait_until(self, ready: Callable[[], bool], *, what: str, timeout: float) -> None:
        """Wait until `ready` returns true, at most `timeout` seconds.

        Raises ChildFailedError with the end of the log when the process ends first or the time is over;
        `what` completes "waited for ...".
        """
        deadline = time.monotonic() + timeout
        while not ready():
            if not self.running:
                raise ChildFailedError(f"{self.name} ended with {self.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ChildFailedError(f"{self.name}: waited {timeout:g} s for {what}:\n{self.tail()}")
            time.sleep(_POLL_SECONDS)

    def wait(self, timeout: float) -> int:
        """Wait for the process to end by itself; returns the exit code, subprocess.TimeoutExpired when it does not."""
        return self._started().wait(timeout)

    def send_signal(self, number: signal.Signals) -> None:
        """Send one signal; nothing happens when the process has ended."""
        self._started().send_signal(number)

    def pause(self) -> None:
        """Stop the process where it is (SIGSTOP): its connections stay open and nothing answers."""
        self.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        self.send_signal(signal.SIGCONT)

    def terminate(self, timeout: float = 5.0) -> None:
        """Ask the process to end (SIGTERM), and kill it when it has not after `timeout` seconds."""
        if self._process is None:
            return
        self._process.terminate()
        self.resume()  # a paused process would not see the SIGTERM
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process at once (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def tail(self, lines: int = 20) -> str:
        """The last lines that the process has logged since its last start."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return b"".join(deque(log, maxlen=lines)).decode(errors="replace").rstrip()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of the loopback that nobody listens on now, for a server that must come back on the same port.

    Chosen below the ports that Linux hands out to outgoing connections (32768 and up by default). A port from among
    those can be lost to any client while the server is down, even to a client that reconnects to the very port: on
    the loopback such a connect can get that port as its own and so succeed, connected to itself.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        port = random.randrange(12_000, 32_000)  # noqa: S311 - not a secret
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
