"""Children run, end, and never outlive this process."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from authz_server.demo.processes import Child, ChildFailedError

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_child_left")]

SLEEP = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-S",
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]


def is_up(child: Child) -> Callable[[], bool]:
    return lambda: "up" in child.tail()


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


@pytest.mark.parametrize(("args", "code"), [(SLEEP, -signal.SIGTERM), (STUBBORN, -signal.SIGKILL)])
@pytest.mark.parametrize("paused", [False, True])
def test_terminate_asks_first_and_kills_who_does_not_listen(
    args: list[str], code: int, paused: bool, tmp_path: Path
) -> None:
    child = Child("sleeper", args, log_path=tmp_path / "log")
    child.start()
    child.wait_until(is_up(child), what="its first line", timeout=10)
    if paused:
        child.pause()
    child.terminate(timeout=0.3 if args is STUBBORN else 10)
    assert child.returncode == code
    child.terminate()


def test_a_child_has_a_session_of_its_own_so_that_ctrl_c_reaches_only_the_parent(tmp_path: Path) -> None:
    child = Child("sleeper", SLEEP, log_path=tmp_path / "log")
    child.start()
    try:
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
    finally:
        child.kill()


def test_a_child_lives_on_after_the_thread_that_started_it(tmp_path: Path) -> None:
    child = Child("sleeper", SLEEP, log_path=tmp_path / "log")
    thread = threading.Thread(target=child.start)
    thread.start()
    thread.join()
    try:
        child.wait_until(is_up(child), what="its first line", timeout=10)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
    finally:
        child.kill()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_does_not_outlive_a_parent_that_had_no_chance_to_stop_it(end: signal.Signals, tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from authz_server.demo.processes import Child
child = Child("sleeper", {SLEEP!r}, log_path=Path({str(tmp_path / "log")!r}))
child.start()
child.wait_until(lambda: "up" in child.tail(), what="its first line", timeout=10)
print(child.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.send_signal(end)
        parent.wait(10)
        assert eventually(lambda: not is_alive(pid))
    finally:
        parent.kill()
        parent.communicate()


def test_a_child_that_ends_early_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    args = [sys.executable, "-S", "-c", "print('the reason'); raise SystemExit(3)"]
    child = Child("broken", args, log_path=tmp_path / "log")
    child.start()
    with pytest.raises(ChildFailedError, match="broken ended with 3:\nthe reason"):
        child.wait_until(lambda: False, what="anything", timeout=10)


def test_a_child_that_does_not_become_ready_is_an_error_that_says_what_was_waited_for(tmp_path: Path) -> None:
    child = Child("sleeper", SLEEP, log_path=tmp_path / "log")
    child.start()
    try:
        with pytest.raises(ChildFailedError, match=r"sleeper: waited 0\.05 s for a sign"):
            child.wait_until(lambda: False, what="a sign", timeout=0.05)
    finally:
        child.kill()


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    child = Child("nothing", ["/no/such/program"], log_path=tmp_path / "log")
    child.start()
    with pytest.raises(ChildFailedError, match="cannot execute /no/such/program"):
        child.wait_until(lambda: False, what="anything", timeout=10)


def test_started_again_it_shows_only_the_log_of_this_run_and_keeps_the_file(tmp_path: Path) -> None:
    child = Child("greeter", [sys.executable, "-S", "-c", "print('up')"], log_path=tmp_path / "log")
    for _ in range(2):
        child.start()
        assert child.wait(10) == 0
    assert child.tail() == "up"
    assert (tmp_path / "log").read_text() == "up\nup\n"


def test_the_environment_is_the_given_one(tmp_path: Path) -> None:
    args = [sys.executable, "-S", "-c", "import os; print(os.environ.get('HOME'), os.environ['AUTHZ_X'])"]
    child = Child("env", args, log_path=tmp_path / "log", env={"AUTHZ_X": "1"})
    child.start()
    assert child.wait(10) == 0
    assert child.tail() == "None 1"
