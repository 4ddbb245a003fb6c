"""The image without Docker: its build steps in a clean folder, and what they make under the chart's limits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from support.container import Container
from support.helm import plain_env, render

from authz_server.demo.valkey import Valkey
from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.grpcio_transport import SERVICE

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),  # building takes a minute, and longer where others use the processors too
    pytest.mark.skipif(os.geteuid() != 0, reason="a read-only root file system and another user take root to set up"),
]

ROOT = Path(__file__).parents[2]
CHECKS = 3000
LARGEST_MIB = 120
"""What the image adds to its base image, at most."""


def build_steps() -> list[tuple[list[str], list[str]]]:
    """From the Dockerfile's first stage: the files copied since the step before, and the command of each step."""
    first_stage = (ROOT / "Dockerfile").read_text().split("\nFROM ")[1]
    steps: list[tuple[list[str], list[str]]] = []
    copied: list[str] = []
    for line in first_stage.splitlines():
        word, *rest = line.split()[0:1], line.split()[1:]
        if word == ["COPY"]:
            copied += rest[0][:-1]
        elif word == ["RUN"]:
            steps.append((copied, rest[0]))
            copied = []
    return steps


def test_what_is_copied_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for copied, _ in build_steps() for name in copied} == kept


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The virtual environment that the Dockerfile's steps make, in a folder that holds only what it copies."""
    directory = tmp_path_factory.mktemp("image")
    source, prefix = directory / "src", directory / "opt" / "authz-server"
    source.mkdir()
    prefix.parent.mkdir()
    # Without PYTHONPATH and the like, for it must hold what is built here.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ["PYTHON"] = f"{sys.base_prefix}/bin/python3"
    for copied, command in build_steps():
        for name in copied:
            (source / name).parent.mkdir(exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / name)
        words = [str(prefix) if word == "/opt/authz-server" else word for word in command]
        subprocess.run(
            words,
            cwd=source,
            env=environ,
            check=True,
            capture_output=True,
            timeout=300,
        )
    # Its scripts name the folder; another user must be able to walk there.
    for folder in [prefix, *prefix.parents]:
        if folder.stat().st_uid == os.getuid() and Path("/tmp") in folder.parents:  # noqa: S108 - only modes are changed
            folder.chmod(0o755)
    yield prefix
    shutil.rmtree(prefix)


def test_no_build_tool_is_left(image: Path) -> None:
    packages = next(image.glob("lib/python3*/site-packages"))
    names = {re.split(r"[-.]", path.name)[0].lower() for path in packages.iterdir()}
    assert not names & {
        "pip",
        "setuptools",
        "wheel",
        "hatchling",
        "hatch",
        "uv",
        "pkg_resources",
        "pytest",
        "mypy",
        "mypyc",
    }
    assert not {"pip", "pip3", "hatchling", "activate"} & {path.name for path in (image / "bin").iterdir()}
    assert list(image.parent.iterdir()) == [image], "the build's own folder is gone"
    assert not any(image.parents[1].joinpath("src").rglob("*.so")), "nothing compiled is left beside the sources"


def test_what_is_installed_is_what_is_locked(image: Path) -> None:
    lock = (ROOT / "requirements.txt").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)(?:\[[a-z,]+\])?==([^ \\;]+)", lock, re.MULTILINE))
    packages = next(image.glob("lib/python3*/site-packages"))
    for information in packages.glob("*.dist-info"):
        name, _, version = information.name.removesuffix(".dist-info").partition("-")
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name != "authz-server":
            assert locked[name] == version


def test_size(image: Path) -> None:
    size = sum(path.lstat().st_size for path in image.rglob("*") if not path.is_symlink()) / (1 << 20)
    assert size < LARGEST_MIB
    assert any(image.rglob("server.*.pyc")), "bytecode is there, for nothing can be written later"


def test_it_can_do_what_the_settings_offer(image: Path) -> None:
    """The optional parts are in the image."""
    environ = {"AUTHZ_OTLP_ENDPOINT": "http://127.0.0.1:4317", "AUTHZ_TRANSPORT": "asyncio"}
    command = [image / "bin" / "authz-server", "check-config"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "OK\n"), done.stderr


def test_the_hot_path_is_compiled(image: Path) -> None:
    command = [image / "bin" / "authz-server", "--version"]
    done = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "authz-server 0.1.0, hot path: compiled\n"), done.stderr


def log_of(container: Container) -> list[dict[str, object]]:
    text = container.running.log_path.read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_the_chart_s_commands_under_the_chart_s_limits(image: Path, own_valkey: Valkey, tmp_path: Path) -> None:
    found = render()
    (settings := tmp_path / "settings.yaml").write_text(found.one("configmap.yaml")["data"]["settings.yaml"])
    # The pod's variables, but for where to listen and where Valkey is; and leaving quickly.
    replaced = {
        "AUTHZ_REDIS_URL": own_valkey.url,
        "AUTHZ_LISTEN": "127.0.0.1:0",
        "AUTHZ_ADMIN_LISTEN": "127.0.0.1:0",
        "AUTHZ_DRAIN_SECONDS": "0",
    }
    init = found.one("init.yaml")["spec"]["template"]["spec"]
    jobs = [init, init]  # an installation after the first finds a policy
    jobs += [job["spec"]["jobTemplate"]["spec"]["template"]["spec"] for job in found.of("cronjobs.yaml")]
    for pod in jobs:
        (command,) = pod["containers"]
        environ = plain_env(command) | {"AUTHZ_REDIS_URL": own_valkey.url}
        with Container(tmp_path, image, pod, [*command["command"], *command["args"]], environ=environ) as container:
            assert container.running.wait(30) == 0, container.running.tail()

    server = found.container()
    environ = plain_env(server) | replaced
    (state,) = [mount["mountPath"] for mount in server["volumeMounts"] if mount["name"] == "state"]
    (tmp,) = [mount["mountPath"] for mount in server["volumeMounts"] if mount["name"] == "tmp"]
    (size,) = [volume["emptyDir"]["sizeLimit"] for volume in found.pod()["volumes"] if volume["name"] == "state"]
    with Container(
        tmp_path,
        image,
        found.pod(),
        ["authz-server", *server["args"]],
        environ=environ,
        files={environ["AUTHZ_CONFIG"]: settings},
        volumes={state: size, tmp: "16Mi"},
    ) as container:
        container.running.wait_until(
            lambda: any(line["event"] == "ready" for line in log_of(container)), what="ready in the log", timeout=30
        )
        assert container.status("Uid").split() == ["65532"] * 4
        assert container.status("Gid").split() == ["65532"] * 4
        assert {int(container.status(name), 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")} == {0}
        assert container.status("NoNewPrivs") == "1"
        assert container.writable_mounts() == {state, tmp}
        snapshot = Path(f"/proc/{container.running.pid}/root{found.settings()['snapshot_file']}")
        assert snapshot.stat().st_uid == 65532

        (serving,) = [line for line in log_of(container) if line["event"] == "serving"]
        request = ext_authz_pb2.CheckRequest()
        http = request.attributes.request.http
        http.method, http.host, http.path = "GET", "www.example.com", "/"
        http.headers["x-envoy-external-address"] = "203.0.113.7"
        with closing(grpc.insecure_channel(str(serving["grpc"]))) as channel:
            call = channel.unary_unary(f"/{SERVICE}/Check")
            for _ in range(CHECKS):
                answer = ext_authz_pb2.CheckResponse.FromString(call(request.SerializeToString(), timeout=10))
                assert answer.status.code == 0
        peak = container.peak_memory()
        assert peak < container.memory_limit / 4, f"{peak >> 20} MiB without a single entry"
        container.running.send_signal(signal.SIGTERM)
        assert container.running.wait(30) == 0, container.running.tail()
