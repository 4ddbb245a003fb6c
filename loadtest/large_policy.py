"""A large policy at rest in a real Valkey, a real server that follows it, and one client that asks without pause."""

import asyncio
import dataclasses
import json
import os
import random
import re
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from authz_server.demo.processes import Child
from authz_server.demo.valkey import Valkey
from authz_server.policy.access import Entry, NamedList
from authz_server.policy.addresses import Network
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.records import Record, RecordKey, entry_key, record_key
from authz_server.store.address import RedisAddress
from authz_server.store.interface import Replacement, Store
from authz_server.store.keys import collection
from authz_server.store.redis_store import RedisStore
from loadtest.match_table import MIXES, random_networks
from loadtest.processes import Waits

NETWORKS, TENANTS, INSTANCES = 1_000_000, 100_000, 30
BLOCKED, FEED = "global/block", "feed"
RUNS = 5
_READY_SECONDS = 600.0

T = TypeVar("T")


def entries(list_name: str, networks: Iterable[Network]) -> dict[RecordKey, Record]:
    """Records of a list, by key."""
    made = (Entry(network, "abuse", "ann", 1_700_000_000) for network in networks)
    return {entry_key(list_name, entry): entry for entry in made}


async def replace(store: Store, records: dict[RecordKey, Record]) -> int:
    """Make the collections of these records hold them and nothing else; returns the revision."""
    contents: dict[str, dict[RecordKey, Record]] = {}
    for key, record in records.items():
        contents.setdefault(collection(key), {})[key] = record
    epoch = (await store.position()).epoch
    replaced = await store.replace(
        Replacement(secrets.token_hex(8), epoch, "loadtest", "measured", "loadtest", contents)
    )
    assert replaced.result is not None
    return replaced.result.position.revision


class LargePolicy:
    """A Valkey that holds NETWORKS blocked networks and TENANTS tenants, ended when left."""

    def __init__(self, networks: int = NETWORKS, tenants: int = TENANTS) -> None:
        self.valkey = Valkey(append_only=True)
        self._networks, self._tenants = networks, tenants

    def ask(self, question: Callable[[RedisStore], Awaitable[T]]) -> T:
        """Have something done with a store of its own."""

        async def answered() -> T:
            store = RedisStore(RedisAddress(self.valkey.url))
            try:
                return await question(store)
            finally:
                await store.close()

        return asyncio.run(answered())

    async def _fill(self, store: RedisStore) -> None:
        await store.init(actor="loadtest", reason="measured", change_id=secrets.token_hex(8))
        few: list[Any] = [Instance(f"queue-{number}") for number in range(INSTANCES)]
        few += [Tenant(f"tenant-{number}", f"queue-{number % INSTANCES}") for number in range(self._tenants)]
        few += [NamedList(FEED)]
        await replace(store, {record_key(record): record for record in few})
        networks = random_networks(next(iter(MIXES.values())), self._networks, random.Random(7))
        await replace(store, entries(BLOCKED, networks))

    def __enter__(self) -> Self:
        self.valkey.start()
        try:
            self.ask(self._fill)
        except BaseException:
            self.valkey.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.valkey.close()


class RealServer:
    """`authz-server serve` in a process of its own, ready when entered."""

    def __init__(self, valkey: Valkey, snapshot_file: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="authz-loadtest-")
        self._log = Path(self._folder.name) / "log"
        # The same build as ours, whichever that is; nothing else of our environment is a setting.
        build = {name: value for name, value in os.environ.items() if name in ("PYTHONPATH", "PYTHONSAFEPATH")}
        settings = build | {
            "AUTHZ_LISTEN": "127.0.0.1:0",
            "AUTHZ_ADMIN_LISTEN": "127.0.0.1:0",
            "AUTHZ_REDIS_URL": valkey.url,
            "AUTHZ_SNAPSHOT_FILE": str(snapshot_file or ""),
            "AUTHZ_TENANT_FROM": "header:x-tenant-id",
            "AUTHZ_LOG_FORMAT": "json",
            "AUTHZ_DECISION_LOG": "off",
            "AUTHZ_DRAIN_SECONDS": "0",
        }
        command = [sys.executable, "-m", "authz_server.cli.authz_server", "serve"]
        self._child = Child("server", command, log_path=self._log, env=settings)
        self.ready_seconds = 0.0
        """From the start of the process to ready."""

    @property
    def port(self) -> int:
        """Where checks are answered."""
        return self._listening("grpc")

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    @property
    def log(self) -> Path:
        """Its log, a line of JSON for each event."""
        return self._log

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        text = self._get("/metrics").decode()
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else float("nan")

    def ready(self) -> dict[str, Any]:
        """What /readyz says."""
        answer: dict[str, Any] = json.loads(self._get("/readyz"))
        return answer

    def wait_for_revision(self, revision: int, *, ask_every_seconds: float = 0.2) -> float:
        """Wait until decisions are made from a revision; returns the seconds that it took.

        Each question costs the server some milliseconds, which a client that waits for checks can see.
        """
        began = time.monotonic()
        while self.metric("authz_snapshot_revision") < revision:
            if time.monotonic() - began > _READY_SECONDS:
                raise RuntimeError(f"revision {revision} was not reached: see {self._log}")
            time.sleep(ask_every_seconds)
        return time.monotonic() - began

    def resident_mib(self, field: str = "VmRSS") -> float:
        """Memory now (`VmRSS`) or at most so far (`VmHWM`)."""
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0

    def _listening(self, what: str) -> int:
        with self._log.open() as lines:  # of which there is one for each change, after this one
            for line in lines:
                if '"event": "serving"' in line:
                    return int(json.loads(line)[what].rpartition(":")[2])
        raise RuntimeError(f"the server does not serve: {self._child.tail()}")

    def _get(self, path: str) -> bytes:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._listening('admin')}{path}", timeout=10) as answer:
                body: bytes = answer.read()
        except urllib.error.HTTPError as error:
            body = error.read()
        return body

    def _is_ready(self) -> bool:
        try:
            return bool(self.ready()["ready"])
        except (OSError, RuntimeError):
            return False

    def __enter__(self) -> Self:
        began = time.monotonic()
        self._child.start()
        self._child.wait_until(self._is_ready, what="a ready server", timeout=_READY_SECONDS)
        self.ready_seconds = time.monotonic() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.terminate()
        self._folder.cleanup()


class ClosedLoop:
    """A client in a process of its own that sends the next check as soon as the last is answered, ended when left.

    With a reference, it asks both servers in turn.
    """

    def __init__(self, port: int, reference_port: int | None = None) -> None:
        self._ports = [str(port)] if reference_port is None else [str(port), str(reference_port)]

    @property
    def pid(self) -> int:
        """The process id."""
        return self._client.pid

    def __call__(self, seconds: float | None) -> Waits:
        """Tell how long it waited in the time since the last call, or in the next seconds."""
        if seconds is not None:
            self._report()
            time.sleep(seconds)
        return self._report()

    def _report(self) -> Waits:
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.write("\n")
        self._client.stdin.flush()
        figures = [Waits(**one) for one in json.loads(self._client.stdout.readline())]
        return dataclasses.replace(figures[0], reference=figures[1] if len(figures) > 1 else None)

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "loadtest.closed_loop", *self._ports]
        self._client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self(1.0)  # its first call connects
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._client:  # closes its input, which ends it
            pass
