"""Clients that keep asking while something happens."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from authz_server.demo.stage import Answer, Client

_PAUSE_SECONDS = 0.002
"""Between two requests of one client: the point is to see each change soon, not to load the machine."""


class Traffic:
    """Some clients, one thread each, that send the same request until the block ends."""

    def __init__(self, addresses: tuple[str, ...], port: int, path: str) -> None:
        self._clients = [Client(address, port) for address in addresses]
        self._path = path
        self._lock = threading.Lock()
        self._answers: list[Answer] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(client,)) for client in self._clients]

    def answers(self) -> list[Answer]:
        """All answers so far, in the order in which they were received."""
        with self._lock:
            return list(self._answers)

    def wait_for(self, wanted: Callable[[list[Answer]], bool], *, seconds: float) -> bool:
        """Wait until the answers so far are as wanted; False when they are not within `seconds`."""
        deadline = time.monotonic() + seconds
        while not wanted(self.answers()):
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_SECONDS)
        return True

    def wait_for_more(self, count: int, *, seconds: float) -> bool:
        """Wait until `count` further answers are there."""
        enough = len(self.answers()) + count
        return self.wait_for(lambda answers: len(answers) >= enough, seconds=seconds)

    def _run(self, client: Client) -> None:
        while not self._ended.is_set():
            answer = client.ask(self._path, {})
            with self._lock:
                self._answers.append(answer)
            self._ended.wait(_PAUSE_SECONDS)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        for client in self._clients:
            client.close()
