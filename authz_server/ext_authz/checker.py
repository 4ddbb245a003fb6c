"""Bytes in, bytes out: one check, whatever the transport. Synchronous; nothing here waits, locks or reads a socket.

What a request causes is a denial; what our own state causes is CannotDecideError, which transports turn into the RPC
error UNAVAILABLE, and then Envoy's fail-open setting has the word. Keep the two apart: a client that could make us
raise would walk through every mesh that fails open.
"""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from authz_server.ext_authz.check_request import BadCheckRequestError, read_check_request
from authz_server.ext_authz.check_response import ResponseOptions, ResponseWriter
from authz_server.policy.attributes import RequestAttributes
from authz_server.policy.decision import Decision, Denied, decide
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import DecisionOptions, Snapshot
from authz_server.policy.tenant import SourceKind

_log = logging.getLogger(__name__)


class CannotDecideError(Exception):
    """This server cannot decide about anything now; the message says why. Never caused by a request."""


class Checked(NamedTuple):
    """A check that was answered, for metrics and logs."""

    decision: Decision
    attributes: RequestAttributes | None
    """None when the check request could not be read."""
    revision: int
    """Of the snapshot that the decision was made from; 0 when it needed none."""
    seconds: float
    """From the first byte read to the last byte written."""
    error: Exception | None = None
    """What was raised, when the reason is INTERNAL_ERROR."""


class Checker:
    """Answers checks from whatever snapshot is current at that moment."""

    def __init__(
        self,
        current: Callable[[], Snapshot | None],
        options: ResponseOptions,
        *,
        max_request_bytes: int,
        kept_headers: frozenset[str] = frozenset(),
        observe: Callable[[Checked], None],
        observe_unavailable: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make a checker.

        Args:
            current: returns the snapshot to decide from; None while there is none.
            options: of the answers.
            max_request_bytes: longer check requests are denied without being decoded.
            kept_headers: names, in lower case, of headers that `observe` wants to see beside those that name a tenant.
            observe: gets every answered check. What it raises changes no answer.
            observe_unavailable: called for every check that ends in CannotDecideError instead. Must not raise.
            clock: returns seconds since the Unix epoch, for entries that expire.
        """
        self._current = current
        self._writer = ResponseWriter(options)
        self._max_request_bytes = max_request_bytes
        self._kept_headers = kept_headers
        self._observe = observe
        self._observe_unavailable = observe_unavailable
        self._clock = clock
        self._options: DecisionOptions | None = None
        """What `_read_headers` was made from: the same object in one snapshot after the other."""
        self._read_headers = kept_headers
        # Written beforehand, so that nothing of a request can make this answer fail too.
        self._internal_error = Denied(Reason.INTERNAL_ERROR)
        self._internal_error_answer = self._writer.write(self._internal_error, request_id="", revision=0)
        self._observer_failed = False

    def check(self, data: bytes) -> bytes:
        """Answer one CheckRequest with one CheckResponse, both as bytes.

        A check request that is too long or cannot be read is denied with or without a snapshot: no policy would let
        it pass, and an error instead would hand it to fail-open, which lets it pass.

        Raises:
            CannotDecideError: there is no snapshot to decide from.
        """
        started = time.perf_counter()
        try:
            answer, decision, attributes, revision = self._answer(data)
            error = None
        except CannotDecideError:
            self._observe_unavailable()
            raise
        except Exception as raised:  # noqa: BLE001  (the one edge: a fault that a request can provoke must deny it)
            answer, decision, attributes, revision = self._internal_error_answer, self._internal_error, None, 0
            error = raised
        try:
            self._observe(Checked(decision, attributes, revision, time.perf_counter() - started, error))
        except Exception:  # noqa: BLE001  (the answer stands: who counts checks has no say in them)
            if not self._observer_failed:  # said once: at thousands of checks a second the log is the next fault
                self._observer_failed = True
                _log.exception("checks are answered but not observed any more, or not all of them")
        return answer

    def _answer(self, data: bytes) -> tuple[bytes, Decision, RequestAttributes | None, int]:
        snapshot = self._current()
        if snapshot is not None and snapshot.options is not self._options:
            self._options = snapshot.options
            self._read_headers = self._kept_headers | {
                source.name for source in snapshot.options.tenant_sources if source.kind is SourceKind.HEADER
            }
        attributes: RequestAttributes | None = None
        revision = 0
        decision: Decision
        if len(data) > self._max_request_bytes:
            decision = Denied(Reason.REQUEST_TOO_LARGE)
        else:
            try:
                attributes = read_check_request(data, self._read_headers)
            except BadCheckRequestError:
                decision = Denied(Reason.BAD_REQUEST)
            else:
                if snapshot is None:
                    raise CannotDecideError("there is no policy snapshot, or it is too old")
                revision = snapshot.revision
                decision = decide(attributes, snapshot, self._clock())
        request_id = attributes.request_id if attributes else ""
        answer = self._writer.write(decision, request_id=request_id, revision=revision)
        return answer, decision, attributes, revision
