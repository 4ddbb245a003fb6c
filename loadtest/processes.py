"""The processes of a measurement: the server, and the load generators (real tools of Debian)."""

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from loadtest.served import COMMON

CHECK = "/envoy.service.auth.v3.Authorization/Check"
IN_FLIGHT = 64
CONNECTIONS = 4
_TICKS = os.sysconf("SC_CLK_TCK")


def tool(name: str, package: str) -> str:
    """The path of a load generator; ends with how to install it when it is missing."""
    path = shutil.which(name)
    if path is None:
        sys.exit(f"{name} is missing: apt-get install {package}")
    return path


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Server:
    """A measured server in a process of its own, ended when left."""

    def __init__(self, transport: str, answer: str = "real") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.served", transport, answer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        if len(line) != 2:
            self._process.kill()
            raise RuntimeError(
                f"{transport}: the server did not start: run python -m loadtest.served {transport} {answer}"
            )
        self.port, self.answer_bytes = int(line[0]), int(line[1])

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far."""
        return cpu_seconds(self.pid)

    def resident_mib(self, field: str = "VmRSS") -> float:
        """Memory now (`VmRSS`) or at most so far (`VmHWM`)."""
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0

    def answers(self) -> int:
        """How many checks the checker has answered so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("answers\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def leave(self) -> None:
        """Have the transport drain, and the process end after that; without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True, slots=True)
class Waits:
    """How long a client waited for answers, in milliseconds."""

    count: int
    refused: int
    """Answered UNAVAILABLE, for they had waited too long already."""
    median: float
    p99: float
    longest: float
    reference: "Waits | None" = None
    """For the server that was asked in turn with this one."""

    @classmethod
    def of(cls, milliseconds: Iterable[float], refused: int) -> Self:
        """Make the figures from single waits, at least one."""
        ranked = sorted(milliseconds)
        count = len(ranked)
        return cls(count, refused, ranked[count // 2], ranked[int(count * 0.99)], ranked[-1])


@contextlib.contextmanager
def h2load(port: int, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """h2load that calls Check with the common message, as the options say; its report is its standard output."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(b"\0" + len(COMMON).to_bytes(4, "big") + COMMON)
        body.flush()
        call = ("-d", body.name, "-H", "content-type: application/grpc", "-H", "te: trailers")
        command = [tool("h2load", "nghttp2-client"), *options, *call, f"http://127.0.0.1:{port}{CHECK}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                yield process
            finally:
                process.kill()


def run_h2load(server: Server, *options: str) -> str:
    """Let h2load run as the options say, and return its report."""
    with h2load(server.port, *options) as process:
        report, _ = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"h2load failed: {' '.join(options)}\n{report}")
    return report


def closed_loop(in_flight: int) -> tuple[str, ...]:
    """The options for h2load to have so many calls in flight all the time."""
    connections = min(in_flight, CONNECTIONS)
    return f"-c{connections}", f"-m{in_flight // connections}"


def read_calls(log: Path, since: float = 0.0, until: float = math.inf) -> tuple[list[tuple[str, int]], float]:
    """Read h2load's log: of each call its HTTP status and microseconds; and the seconds from the first to the last.

    Only of the calls that began between two moments, in seconds since the Unix epoch.
    """
    lines = log.read_text().splitlines()
    rows = [(int(start) / 1e6, status, int(micros)) for start, status, micros in map(str.split, lines)]
    rows = [row for row in rows if since <= row[0] <= until]
    starts = [start for start, _, _ in rows]
    return [(status, micros) for _, status, micros in rows], max(starts) - min(starts) if rows else 0.0


def calls_per_second(server: Server, calls: int) -> float:
    """Make so many calls, IN_FLIGHT at a time; require that each was answered."""
    report = run_h2load(server, f"-n{calls}", *closed_loop(IN_FLIGHT))
    rate = re.search(r"finished in .*?, ([\d.]+) req/s", report)
    succeeded = re.search(r"(\d+) succeeded", report)
    if rate is None or succeeded is None or int(succeeded[1]) != calls:
        raise RuntimeError(f"h2load: not every call was answered:\n{report}")
    return float(rate[1])
