"""The composition root: builds the rooms, serves, and leaves in the right order.

Leaving: not ready first, so that endpoints take us out; meanwhile go on answering; then finish what is in flight; then
the follower, the report of this server and the store; the admin port last, so that it can be asked until the end. A
second signal skips all that.
"""

import asyncio
import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from authz_server.admin.app import build_admin_app
from authz_server.admin.listening import AdminServer, CannotListenError, open_socket
from authz_server.build import hot_path
from authz_server.decision_log import DecisionLog, LogOptions
from authz_server.ext_authz.check_response import ResponseOptions
from authz_server.ext_authz.checker import Checker, Checks
from authz_server.ext_authz.choice import choose_transport
from authz_server.ext_authz.transport import TlsFiles, TransportError
from authz_server.health import ComponentName, HealthState
from authz_server.loader import ChildLoader, Source
from authz_server.metrics import Metrics, StateCollector
from authz_server.policy.snapshot import Snapshot
from authz_server.refresher import LostChanges, Refresher, RefresherStatus
from authz_server.replicas import Registry, Reporter
from authz_server.settings import Settings, parse_listen
from authz_server.store.interface import Event, Store
from authz_server.store.redis_store import RedisStore
from authz_server.tasks import cancel

if TYPE_CHECKING:
    from authz_server.tracing import Tracing

EXIT_OK = 0
EXIT_FAILED = 1
"""It could not start, a part of it ended unexpectedly, or a second signal made it leave at once."""

FAULT_SECONDS = 1.0
"""At most one internal error in this time is logged: clients may be able to provoke them."""
_LOG_CLOSE_SECONDS = 2.0
"""How long the decision log may take for its last lines."""
_ANNOUNCE_SECONDS = 1.0
"""How long the first load may wait for the first report; a store that hangs holds up nothing else."""
_LEAVE_SECONDS = 1.0
"""How long taking the report back may take at the end."""
_RECORDS_LOGGED = 50
"""So many of the records that a change touches stand in one line of the log."""

_log = structlog.get_logger("authz_server")


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code. Logs must have been set up."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, stopping)
    try:
        async with AsyncExitStack() as stack:
            exit_code = await _serve(settings, stopping, stack)
    except (CannotListenError, TransportError) as error:
        _log.error("cannot start", problem=str(error))
        exit_code = EXIT_FAILED
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    _log.info("stopped", exit_code=exit_code)
    return exit_code


async def _serve(settings: Settings, stopping: asyncio.Event, stack: AsyncExitStack) -> int:
    health = HealthState()
    metrics = Metrics()
    log = DecisionLog(_log_options(settings), _to_standard_output if settings.decision_log == "stdout" else None)
    file_watch = FileWatch(settings.snapshot_file, health)
    store, loader = _store_and_loader(settings, file_watch)

    reporter = _reporter(store, settings)
    watch = StatusWatch(health, lambda: refresher.current)

    def on_status(status: RefresherStatus) -> None:
        if watch(status):
            reporter.again()
        if status.position:
            reporter.applied(status.position, status.lost)

    async def follow() -> None:
        await reporter.announced(at_most_seconds=_ANNOUNCE_SECONDS)
        await refresher.run()

    refresher = Refresher(
        store,
        settings.decision_options(),
        loader=loader,
        on_event=_event_watch(metrics),
        on_status=on_status,
        on_lost=log_lost,
        max_age_seconds=settings.max_snapshot_age_seconds,
    )

    def current() -> Snapshot | None:
        return refresher.current

    def age_seconds() -> float | None:
        return refresher.status.age_seconds(time.monotonic()) if refresher.status.position else None

    metrics.registry.register(
        StateCollector(
            current=current,
            age_seconds=age_seconds,
            connected=lambda: refresher.status.connected,
            incident=lambda: bool(refresher.status.incident),
            edited=lambda: len(refresher.status.edited),
            lost=lambda: refresher.status.lost,
            ready=health.is_ready,
            source=lambda: refresher.status.source,
            file_problem=lambda: file_watch.problem,
            log_dropped=lambda: log.dropped,
            shed=lambda: transport.shed,
            in_flight=lambda: transport.in_flight,
            packed_bytes=lambda: loader.packed_bytes,
            registry=lambda: reporter.registry,
        )
    )
    tracing = _tracing(settings)
    checker = Checker(
        current,
        _response_options(settings),
        max_request_bytes=settings.max_request_bytes,
        kept_headers=tracing.headers if tracing else frozenset(),
        observe=Observer(metrics, log, tracing),
        observe_unavailable=metrics.count_unavailable,
    )
    transport, transport_name, why = choose_transport(
        settings.transport,
        checker,
        listen=settings.listen,
        tls=_tls_files(settings),
        health=health,
        max_request_bytes=settings.max_request_bytes,
        max_wait_seconds=settings.max_wait_seconds,
        observe_wait=metrics.observe_wait,
    )
    admin = AdminServer(
        build_admin_app(
            health=health,
            registry=metrics.registry,
            current=current,
            age_seconds=age_seconds,
            log=log,
            servers=lambda: Registry.read(store),
        )
    )

    # Everything is left in the reverse order of these lines, also when one of them fails.
    stack.push_async_callback(store.close)
    stack.callback(loader.close)
    stack.enter_context(_writing(log))
    if tracing:
        stack.push_async_callback(asyncio.to_thread, tracing.close)
    admin_host, admin_port = parse_listen(settings.admin_listen)
    listening = stack.enter_context(open_socket(admin_host, admin_port))
    admin_task = asyncio.create_task(admin.serve([listening]), name="admin port")
    stack.push_async_callback(_stop_admin, admin, admin_task)
    # C-core does not say why it cannot listen; the operating system does.
    open_socket(*parse_listen(settings.listen)).close()
    grpc_port = await transport.start()
    reporting = asyncio.create_task(reporter.run(), name="reporter")
    stack.push_async_callback(_leave, reporter, reporting)
    follower = asyncio.create_task(follow(), name="refresher")
    stack.push_async_callback(cancel, follower)
    stack.push_async_callback(transport.drain, settings.grace_seconds)

    _log.info(
        "serving",
        grpc=_host_port(parse_listen(settings.listen)[0], grpc_port),
        transport=transport_name.value,
        transport_because=why,
        hot_path=hot_path(),
        admin=_host_port(admin_host, listening.getsockname()[1]),
        redis=str(settings.store_address()),
    )
    health.subscribe(lambda ready: _log.info("ready") if ready else _log.warning("not ready", why=_missing(health)))
    health.set(ComponentName.SERVING, ready=True, detail="accepts checks")
    exit_code = await _until_stopped(stopping, {admin_task, follower})

    health.set(ComponentName.SERVING, ready=False, detail="draining: checks are still answered")
    _log.info("draining", seconds=settings.drain_seconds)
    await asyncio.sleep(settings.drain_seconds)
    _log.info("finishing", at_most_seconds=settings.grace_seconds)
    return exit_code


class StatusWatch:
    """Turns what the refresher says into components of health, and its changes into log lines."""

    def __init__(self, health: HealthState, current: Callable[[], Snapshot | None]) -> None:
        self._health = health
        self._current = current
        self._last = RefresherStatus()

    def __call__(self, status: RefresherStatus) -> bool:
        """Take note of a new status, and return whether the store is told of differently than before."""
        snapshot = self._current()
        if snapshot:
            detail = f"revision {snapshot.revision} of epoch {snapshot.epoch}"
            if status.source is Source.FILE:
                detail += ", from the snapshot file and not confirmed by the store yet"
        elif status.position:
            detail = "too old: the store has not confirmed it for longer than max_snapshot_age_seconds"
        else:
            detail = f"not loaded: {status.problem}"
        if snapshot and (status.loads != self._last.loads or self._last.position is None):
            before = self._last.position
            replaced = before is not None and before.epoch != snapshot.epoch
            # Another epoch is another policy: restored, or made anew and empty, and perhaps not by intent.
            _log.log(
                logging.WARNING if replaced else logging.INFO,
                "the policy was replaced by another" if replaced else "snapshot loaded",
                epoch=snapshot.epoch,
                revision=snapshot.revision,
                source=str(status.source),
                counts=snapshot.counts(),
                degraded_scopes=snapshot.degraded_scopes(),
                epoch_before=before.epoch if before else None,
                revision_before=before.revision if before else None,
            )
        news = (status.connected, status.problem) != (self._last.connected, self._last.problem)
        if news:
            if status.connected and status.problem:
                consequence = "decisions follow what can be followed" if status.incident else ""
                _log.error("the policy in redis is not sound", problem=status.problem, consequence=consequence)
            elif status.connected:
                _log.info("redis connected")
            else:
                consequence = "decisions go on from the last snapshot" if snapshot else "checks get UNAVAILABLE"
                _log.warning("redis not usable", problem=status.problem, consequence=consequence)
        self._last = status
        self._health.set(ComponentName.SNAPSHOT, ready=snapshot is not None, detail=detail)
        sound = status.connected and not status.problem
        self._health.set(ComponentName.REDIS, ready=sound, detail=status.problem or "connected")
        return news


class FileWatch:
    """Knows what is wrong with the snapshot file, and logs the changes of that."""

    def __init__(self, path: Path | None, health: HealthState) -> None:
        self.problem: str | None = None if path is None else "not used yet"
        """For people; empty when nothing is wrong, None without a file."""
        self._path = path
        self._health = health
        without = "none is set (snapshot_file): a start needs the store"
        health.set(ComponentName.SNAPSHOT_FILE, ready=path is None, detail=without if path is None else "not used yet")

    def __call__(self, problem: str) -> None:
        """Take note of an attempt to use the file or to write it."""
        if problem and problem != self.problem:
            _log.warning("snapshot file", problem=problem)
        elif not problem and self.problem:
            _log.info("snapshot file in use", path=str(self._path))
        if self._path is not None:
            self.problem = problem
            detail = problem or f"{self._path} is up to date"
            self._health.set(ComponentName.SNAPSHOT_FILE, ready=not problem, detail=detail)


class Observer:
    """Counts, logs and traces what the checker answers, and logs its faults, not more than one in FAULT_SECONDS."""

    def __init__(
        self,
        metrics: Metrics,
        log: DecisionLog,
        tracing: "Tracing | None" = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._decisions = log
        self._tracing = tracing
        self._clock = clock
        self._quiet_until = -math.inf
        self._not_logged = 0

    def __call__(self, checks: Checks) -> None:
        """Take note of what was answered together."""
        self._metrics.observe(checks.decided, checks.seconds)
        note, tracing = self._decisions.note, self._tracing
        for decision, attributes, revision, seconds, error in checks:
            note(decision, attributes, revision, seconds)
            if tracing:
                tracing.note(decision, attributes, revision, seconds)
            if error is not None:
                self._log_fault(error)

    def _log_fault(self, error: Exception) -> None:
        now = self._clock()
        if now < self._quiet_until:
            self._not_logged += 1
            return
        _log.error("internal error: the check was denied", exc_info=error, not_logged_before=self._not_logged)
        self._quiet_until = now + FAULT_SECONDS
        self._not_logged = 0


def _event_watch(metrics: Metrics) -> Callable[[Event], None]:
    """Return what is to be called with each event that was applied."""
    log = _log.bind()  # else structlog would put a logger together for each line

    def watch(event: Event) -> None:
        metrics.observe_change(event.at, time.time())
        log_event(event, log)

    return watch


def log_event(event: Event, log: structlog.typing.FilteringBoundLogger = _log) -> None:
    """Log an applied change in full: the second copy of the audit, should the store lose the first.

    A change of many records is several lines. What a replacement changed is not repeated: it is read from the store,
    and can be millions.
    """
    changed = [{"record": str(record.key), "previous": record.previous, "new": record.new} for record in event.records]
    lines = [changed[start : start + _RECORDS_LOGGED] for start in range(0, len(changed), _RECORDS_LOGGED)] or [[]]
    for number, records in enumerate(lines, 1):
        log.info(
            "change applied",
            epoch=event.position.epoch,
            revision=event.position.revision,
            change_id=event.position.change_id,
            actor=event.actor,
            action=event.action,
            reason=event.reason,
            changed_at=event.at,
            records=records,
            records_in_all=event.size or len(changed),
            counts=event.counts,
            line=f"{number} of {len(lines)}",
        )


def log_lost(lost: LostChanges) -> None:
    """Log the changes that the store no longer knows, so that somebody makes them again."""
    _log.error(
        "changes were lost: the store has gone back in its history",
        lost=lost.count,
        applied=f"revision {lost.applied.revision} of epoch {lost.applied.epoch}",
        found=f"revision {lost.found.revision} of epoch {lost.found.epoch}",
    )
    for event in lost.events:
        _log.error(
            "change lost",
            revision=event.position.revision,
            change_id=event.position.change_id,
            actor=event.actor,
            action=event.action,
            reason=event.reason,
            changed_at=event.at,
            records=[
                {"record": str(record.key), "previous": record.previous, "new": record.new} for record in event.records
            ],
        )


def _on_signal(number: signal.Signals, stopping: asyncio.Event) -> None:
    if stopping.is_set():
        _log.warning("leaving at once", signal=number.name)
        # Not sys.exit: that would wait for the drain, which is what the second signal is there to skip.
        os._exit(EXIT_FAILED)
    _log.info("stopping", signal=number.name)
    stopping.set()


async def _until_stopped(stopping: asyncio.Event, parts: set[asyncio.Task[None]]) -> int:
    """Wait for a signal, or for a part to end, which none should; return the exit code."""
    stop = asyncio.create_task(stopping.wait())
    done, _ = await asyncio.wait({stop, *parts}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    ended = [part for part in parts if part in done]
    for part in ended:
        error = None if part.cancelled() else part.exception()
        _log.critical("a part of the server ended unexpectedly", part=part.get_name(), exc_info=error)
    return EXIT_FAILED if ended else EXIT_OK


async def _stop_admin(admin: AdminServer, task: asyncio.Task[None]) -> None:
    admin.stop()
    await asyncio.wait({task})


async def _leave(reporter: Reporter, task: asyncio.Task[None]) -> None:
    reporter.leave()
    await asyncio.wait({task}, timeout=_LEAVE_SECONDS)
    await cancel(task)


def _reporter(store: Store, settings: Settings) -> Reporter:
    process = secrets.token_hex(4)

    def on_problem(problem: str) -> None:
        if problem:
            _log.warning("not reported", problem=problem, consequence="`authzctl --wait` does not know of this server")
        else:
            _log.info("reporting", replica=reporter.replica)

    reporter = Reporter(
        store, settings.replica_name or f"{socket.gethostname()}-{process}", process, on_problem=on_problem
    )
    return reporter


def _missing(health: HealthState) -> dict[str, str]:
    return {
        str(name): component.detail
        for name, component in health.components.items()
        if component.required and not component.ready
    }


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _to_standard_output(lines: str) -> None:
    sys.stdout.write(lines)
    sys.stdout.flush()


@contextlib.contextmanager
def _writing(log: DecisionLog) -> Iterator[None]:
    """Let a thread write the decision log, and at the end what is left of it."""
    # A daemon: whoever reads standard output may have hung, and must not keep the process from leaving.
    writer = threading.Thread(target=log.run, name="decision log", daemon=True)
    writer.start()
    try:
        yield
    finally:
        log.stop()
        writer.join(_LOG_CLOSE_SECONDS)


def _tracing(settings: Settings) -> "Tracing | None":
    if not settings.otlp_endpoint:
        return None
    # An optional extra, and its import takes longer than all others together.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

    from authz_server.tracing import Tracing  # noqa: PLC0415

    return Tracing(
        OTLPSpanExporter(endpoint=settings.otlp_endpoint),
        ratio=settings.trace_ratio,
        spans_per_second=settings.traces_per_second,
    )


def _log_options(settings: Settings) -> LogOptions:
    return LogOptions(
        denials_per_second=settings.decision_log_denials_per_second,
        allowed_ratio=settings.decision_log_allowed_ratio,
        anonymize=settings.decision_log_anonymize,
    )


def _store_and_loader(settings: Settings, file_watch: FileWatch) -> tuple[RedisStore, ChildLoader]:
    address = settings.store_address()
    loader = ChildLoader(
        {"where": address.as_json(), "prefix": settings.redis_prefix},
        settings.decision_options(),
        origin=settings.store_origin(),
        path=settings.snapshot_file,
        max_age_seconds=settings.snapshot_file_max_age_seconds,
        on_file=file_watch,
    )
    return RedisStore(address, prefix=settings.redis_prefix), loader


def _response_options(settings: Settings) -> ResponseOptions:
    return ResponseOptions(
        routing_header=settings.routing_header,
        tenant_header=settings.tenant_header,
        denied_status=settings.denied_status,
        retry_after_seconds=settings.retry_after_seconds,
        show_reason=settings.show_reason,
    )


def _tls_files(settings: Settings) -> TlsFiles | None:
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return TlsFiles(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
