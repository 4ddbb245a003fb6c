"""What was decided, for people and machines that ask later: JSON lines, and the last denials for the admin page.

A check only appends to a bounded queue; a thread of its own renders and writes, so a slow reader of the log slows no
check. What is not logged (a flood of denials, a full queue) is counted, and the count is logged.

Nothing secret is kept: of a request only its method, host, path without the query, and ids; no cookie, no
authorization header, no body ever reaches this module.
"""

import json
import logging
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from authz_server.observation import PerSecond, facts_of
from authz_server.policy.addresses import Address
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Allowed, Decision
from authz_server.policy.paths import RequestPath

_log = logging.getLogger(__name__)

QUEUE_LENGTH = 10_000
"""Decisions that wait to be written, at most; some 20 MiB of the longest paths."""
RECENT_LENGTH = 200
"""The last denials that are kept for people."""
_SHOWN = {"method": 32, "host": 255, "path": 512, "request_id": 128}
"""Characters of a client's texts that are logged."""
_KEPT_BITS = {4: 24, 6: 48}
"""Bits of an address that anonymizing keeps: as many as web analytics commonly keep."""
_POLL_SECONDS = 0.05
_BATCH_LENGTH = 256
"""Decisions rendered and written at once; other threads run between batches."""


@dataclass(frozen=True, slots=True)
class LogOptions:
    """The operator's settings of the decision log."""

    denials_per_second: int = 100
    """Denials logged in any one second; the rest of that second is counted."""
    allowed_ratio: float = 0.0
    """The part of allowed requests that is logged, from 0 to 1. Those that a shadow scope would have denied count as
    denials."""
    anonymize: bool = False
    """Whether the last 8 bits of IPv4 and the last 80 of IPv6 client addresses are shown as zeros; entries that would
    tell more are left out."""


@dataclass(frozen=True, slots=True)
class Decided:
    """One decision as it waits to be shown."""

    at: float
    """Seconds since the Unix epoch."""
    decision: Decision
    attributes: RequestAttributes | None
    """None when the check request could not be read."""
    revision: int
    seconds: float
    """What the check took."""


class DecisionLog:
    """Logs decisions. `note` is for the thread that answers checks; `run` for a thread of the log's own."""

    def __init__(
        self, options: LogOptions, write: Callable[[str], object] | None, clock: Callable[[], float] = time.time
    ) -> None:
        """Make a log.

        Args:
            options: of the log.
            write: gets lines, each with its line feed, and may block; None: only the last denials are kept.
            clock: seconds since the Unix epoch.
        """
        self.recent: deque[Decided] = deque(maxlen=RECENT_LENGTH)
        """The last denials, oldest first."""
        self.dropped = 0
        """Decisions that were to be logged and found the queue full or the reader gone."""
        self._options = options
        self._write = write
        self._clock = clock
        self._queue: deque[Decided] = deque()
        self._denials = PerSecond(options.denials_per_second)
        self._not_logged: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._stopping = threading.Event()

    @property
    def anonymizes(self) -> bool:
        """Whether client addresses are shown in part only."""
        return self._options.anonymize

    def note(self, decision: Decision, attributes: RequestAttributes | None, revision: int, seconds: float) -> None:
        """Take note of one answered check. Never blocks on the log's reader."""
        if isinstance(decision, Allowed) and not decision.shadow_denials:
            if not self._options.allowed_ratio or random.random() >= self._options.allowed_ratio:  # noqa: S311 - a sample
                return
            self._enqueue(Decided(self._clock(), decision, attributes, revision, seconds))
            return
        decided = Decided(self._clock(), decision, attributes, revision, seconds)
        if not isinstance(decision, Allowed):
            self.recent.append(decided)
        if self._write is None:
            return
        if self._denials.take(decided.at):
            self._enqueue(decided)
        else:
            with self._counting:
                self._not_logged[decision.reason.value] += 1

    def run(self) -> None:
        """Write what is noted until `stop`; then what is left."""
        while not self._stopping.wait(_POLL_SECONDS):
            self._flush()
        self._flush()

    def stop(self) -> None:
        """Make `run` return soon."""
        self._stopping.set()

    def describe(self, decided: Decided) -> dict[str, Any]:
        """Return a decision as it is logged; facts that it lacks are left out."""
        decision, attributes = decided.decision, decided.attributes
        facts: dict[str, Any] = {
            "at": datetime.fromtimestamp(decided.at, UTC).isoformat(timespec="milliseconds"),
            "event": "decision",
        } | facts_of(decision)
        if decision.client_address is not None:
            facts["client_address"] = self._shown(decision.client_address)
        if attributes is not None:
            request = {
                "request_id": attributes.request_id,
                "method": attributes.method,
                "host": attributes.host,
                "path": RequestPath(attributes.path).text,
            }
            facts |= {name: text[: _SHOWN[name]] for name, text in request.items() if text}
        if (deciding := decision.deciding) and deciding.match:
            network = deciding.match.network
            if not (self._options.anonymize and network.prefix_length > _KEPT_BITS[network.version]):
                facts["entry"] = str(network)
        if shadow := decision.shadow_denials:
            facts["shadow"] = [f"{outcome.scope}:{outcome.reason}" for outcome in shadow]
        return facts | {"revision": decided.revision, "microseconds": round(decided.seconds * 1e6)}

    def _shown(self, address: Address) -> str:
        if not self._options.anonymize:
            return str(address)
        bits = 32 if address.version == 4 else 128
        hidden = bits - _KEPT_BITS[address.version]
        return str(Address(address.version, address.value >> hidden << hidden))

    def _enqueue(self, decided: Decided) -> None:
        if self._write is None:
            return
        if len(self._queue) >= QUEUE_LENGTH:
            self.dropped += 1
        else:
            self._queue.append(decided)

    def _flush(self) -> None:
        with self._counting:
            not_logged, self._not_logged = self._not_logged, Counter()
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH_LENGTH))]
            self._put([self.describe(decided) for decided in batch])
        if not_logged:
            at = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
            count = {"count": not_logged.total(), "by_reason": dict(not_logged)}
            self._put([{"at": at, "event": "denials not logged", **count}])

    def _put(self, lines: list[dict[str, Any]]) -> None:
        if self._write is None:
            self.dropped += len(lines)
            return
        try:
            self._write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
        except (OSError, ValueError) as error:  # the reader is gone, or the disk is full: decisions go on without a log
            self.dropped += len(lines)
            self._write = None
            _log.error("the decision log cannot be written any more: %s", error)
