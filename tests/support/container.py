"""What a container runtime does of a pod's security context, by Linux's own tools: needs root, and no Docker.

A container is a process in a mount namespace of its own, whose root file system holds Python, libraries, what the
image's build made, and the mounted files of the pod: read-only but for its volumes. User, capabilities and memory are
limited as the rendered container says.
"""

import contextlib
import os
import shlex
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from authz_server.demo.processes import Child

Object = dict[str, Any]

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}

_START = """
set -eu
root=$1; shift
mount -t tmpfs -o mode=755 tmpfs "$root"
while [ "$1" != -- ]; do
    kind=$1 source=$2 target=$root$3; shift 3
    case $kind in
    link) ln -s "$source" "$target" ;;
    file)
        mkdir -p "${target%/*}"; touch "$target"
        mount --bind "$source" "$target"; mount -o remount,bind,ro "$target" ;;
    folder) mkdir -p "$target"; mount --bind "$source" "$target"; mount -o remount,bind,ro "$target" ;;
    device) mkdir -p "${target%/*}"; touch "$target"; mount --bind "$source" "$target" ;;
    volume) mkdir -p "$target"; mount -t tmpfs -o "size=$source,mode=2770,gid=$fs_group" tmpfs "$target" ;;
    esac
done
shift
mkdir "$root/proc"
mount --rbind /proc "$root/proc"
mount -o remount,ro "$root"
if [ -n "$cgroup" ]; then echo $$ > "$cgroup/cgroup.procs"; fi
exec chroot "$root" "$@"
"""


def memory_bytes(quantity: str) -> int:
    """A quantity of Kubernetes, such as 512Mi, in bytes."""
    for unit, factor in _UNITS.items():
        if quantity.endswith(unit):
            return int(quantity.removesuffix(unit)) * factor
    return int(quantity)


class _MemoryGroup:
    """A control group with a memory limit, of version 1 or 2, whichever the kernel has."""

    def __init__(self, limit: int) -> None:
        root = Path("/sys/fs/cgroup")
        version_1 = root / "memory"
        self.path = (version_1 if version_1.is_dir() else root) / f"authz-test-{uuid.uuid4().hex[:12]}"
        self.path.mkdir()
        name = "memory.limit_in_bytes" if version_1.is_dir() else "memory.max"
        (self.path / name).write_text(str(limit))

    def remove(self) -> None:
        """Remove the group; its process has ended."""
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()


class Container:
    """One container of a pod, as rendered, run from a folder that the image's build made."""

    def __init__(
        self,
        directory: Path,
        image: Path,
        pod: Object,
        args: Sequence[str],
        *,
        environ: Mapping[str, str],
        files: Mapping[str, Path] | None = None,
        volumes: Mapping[str, str] | None = None,
    ) -> None:
        """Describe a container.

        Args:
            directory: for the log.
            image: the virtual environment of the image.
            pod: the specification with one container.
            args: the command line, first the command.
            environ: all variables of the container, beside the image's own.
            files: path in the container -> the file that is mounted there.
            volumes: path in the container -> the size of the volume there.
        """
        (container,) = pod["containers"]
        security, pod_security = container["securityContext"], pod["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        self.memory_limit = memory_bytes(container["resources"]["limits"]["memory"])
        self._group: _MemoryGroup | None = None
        self._root = tempfile.TemporaryDirectory(prefix="authz-container-")
        # Volumes first: the image may stand in a folder of /tmp, which a volume would cover.
        parts = []
        for path, size in (volumes or {}).items():
            parts += ["volume", size.replace("Mi", "m").replace("Gi", "g"), path]
        parts += [*self._system(), "folder", sys.base_prefix, sys.base_prefix, "folder", str(image), str(image)]
        for path, file in (files or {}).items():
            parts += ["file", str(file), path]
        drop = [
            *("setpriv", f"--reuid={pod_security['runAsUser']}", f"--regid={pod_security['runAsGroup']}"),
            *(f"--groups={pod_security['fsGroup']}", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
        ]
        own = {"PATH": f"{image}/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        variables = [f"{name}={value}" for name, value in (own | dict(environ)).items()]
        command = [*drop, "env", "--ignore-environment", *variables, *args]
        self._parts = [self._root.name, *parts, "--", *command]
        self._fs_group = pod_security["fsGroup"]
        self._directory = directory
        self.child: Child | None = None

    def _system(self) -> list[str]:
        parts = []
        for path in _SYSTEM:
            if Path(path).is_symlink():
                parts += ["link", str(Path(path).readlink()), path]
            elif Path(path).is_dir():
                parts += ["folder", path, path]
        for path in ("/etc/ld.so.cache", "/etc/hosts", "/etc/nsswitch.conf"):
            parts += ["file", path, path]
        for path in ("/dev/null", "/dev/urandom"):
            parts += ["device", path, path]
        return parts

    def __enter__(self) -> Self:
        self._group = _MemoryGroup(self.memory_limit)
        words = f"cgroup={shlex.quote(str(self._group.path))} fs_group={self._fs_group}\n{_START}"
        self.child = Child(
            "container",
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", words, "container", *self._parts],
            log_path=self._directory / f"{uuid.uuid4().hex}.log",
            env={"PATH": os.environ["PATH"]},
        )
        try:
            self.child.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.child is not None:
            self.child.kill()
        if self._group is not None:
            self._group.remove()
        self._root.cleanup()

    @property
    def running(self) -> Child:
        """The process; it is the same one from the first shell to the server."""
        assert self.child is not None
        return self.child

    def peak_memory(self) -> int:
        """The most memory that the process has had, in bytes."""
        return int(self.status("VmHWM").split()[0]) * 1024

    def status(self, field: str) -> str:
        """A line of /proc/PID/status."""
        for line in Path(f"/proc/{self.running.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return value.strip()
        raise KeyError(field)

    def writable_mounts(self) -> set[str]:
        """Where the process may write, were its user allowed to; /proc and devices left out."""
        mounts = [line.split()[1:4] for line in Path(f"/proc/{self.running.pid}/mounts").read_text().splitlines()]
        return {
            point
            for point, _, options in mounts
            if not point.startswith(("/proc", "/dev")) and "ro" not in options.split(",")
        }
