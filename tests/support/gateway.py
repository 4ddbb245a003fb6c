"""What stands behind and in front of a real Envoy in tests: the authorization server in a thread, and a blunt client.

`AuthzServer` is the real transport, checker and decision over a snapshot that a test can replace at any moment; only
the store and the refresher are missing. `ask` sends what it is told, byte by byte: forged, repeated and mixed-case
headers included, which a well-mannered HTTP library would refuse or mend.
"""

import asyncio
import contextlib
import http.client
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Self

from authz_server.demo.envoy_config import Address
from authz_server.ext_authz.check_response import ResponseOptions
from authz_server.ext_authz.checker import Checked, Checker, Checks
from authz_server.ext_authz.choice import choose_transport
from authz_server.ext_authz.transport import TlsFiles, TransportName, ignore_wait
from authz_server.health import HealthState
from authz_server.policy.access import (
    GLOBAL_SCOPE,
    Entry,
    Mode,
    Resource,
    Scope,
    Side,
    own_list,
    resource_scope,
)
from authz_server.policy.addresses import parse_network
from authz_server.policy.affinity import Instance, Tenant
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.records import Record, RecordKey, entry_key, record_key
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot
from authz_server.policy.tenant import parse_tenant_source

_START_SECONDS = 20.0
_STOP_SECONDS = 20.0
_ANSWER_SECONDS = 15.0
_MAX_REQUEST_BYTES = 16 * 1024 * 1024
"""Far above the default, so that large messages are decoded and not just measured."""

TENANT_HEADER_SOURCE = (parse_tenant_source("header:x-tenant-id"),)
"""`DecisionOptions.tenant_sources` for requests that name their tenant in x-tenant-id."""


def policy(
    *,
    blocked: Iterable[str] = (),
    allowed: Iterable[str] = (),
    restricted: bool = False,
    offices: Mapping[str, Sequence[str]] = MappingProxyType({}),
    pins: Mapping[str, str] = MappingProxyType({}),
    held: Iterable[str] = (),
    instances: Iterable[str] = (),
    options: DecisionOptions | None = None,
    revision: int = 1,
) -> Snapshot:
    """Build a snapshot.

    Args:
        blocked: CIDRs of the global block list.
        allowed: CIDRs of the global allow list.
        restricted: whether the global scope admits only `allowed`.
        offices: path of a restricted resource -> the CIDRs that it admits.
        pins: tenant id -> instance name.
        held: ids of the pinned tenants that are held.
        instances: names of the registered instances.
        options: the operator's settings; None: the defaults.
        revision: the snapshot's.
    """
    records: list[tuple[RecordKey, Record]] = []

    def add(record: Scope | Resource | Tenant | Instance) -> None:
        records.append((record_key(record), record))

    def add_entries(scope: str, side: Side, cidrs: Iterable[str]) -> None:
        list_name = own_list(scope, side)
        entries = [Entry(parse_network(cidr), "test", "tester", created_at=0) for cidr in cidrs]
        records.extend((entry_key(list_name, entry), entry) for entry in entries)

    add(Scope(GLOBAL_SCOPE, Mode.RESTRICTED if restricted else Mode.OPEN))
    add_entries(GLOBAL_SCOPE, Side.BLOCK, blocked)
    add_entries(GLOBAL_SCOPE, Side.ALLOW, allowed)
    for number, (path, cidrs) in enumerate(offices.items()):
        name = f"resource-{number}"
        add(Resource(name, (parse_path_pattern(path),)))
        add(Scope(resource_scope(name), Mode.RESTRICTED))
        add_entries(resource_scope(name), Side.ALLOW, cidrs)
    for instance in instances:
        add(Instance(instance))
    held = set(held)
    for tenant, instance in pins.items():
        add(Tenant(tenant, instance, held=tenant in held))
    return build_snapshot(records, epoch="test", revision=revision, options=options or DecisionOptions())


class _Faults(logging.Handler):
    """Collects what anything in this process logs as an error: asyncio, grpc, ours."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.name}: {self.format(record)}")


class AuthzServer:
    """The authorization server in a background thread, on a port that the system chose.

    Assign `snapshot` to change the policy; None means that the server cannot decide.
    """

    def __init__(
        self,
        snapshot: Snapshot | None,
        *,
        responses: ResponseOptions | None = None,
        tls: TlsFiles | None = None,
        listen_host: str = "127.0.0.1",
        max_request_bytes: int = _MAX_REQUEST_BYTES,
        observe: Callable[[Checked], None] | None = None,
        transport: TransportName = TransportName.AUTO,
    ) -> None:
        self.snapshot = snapshot
        self.address: Address = (listen_host, 0)
        self.faults: list[str] = []
        """What went wrong and was not a decision: errors logged, exceptions that nobody awaited."""
        self._responses = responses or ResponseOptions()
        self._tls = tls
        self._max_request_bytes = max_request_bytes
        self._observe = observe or self._remember
        self._transport = transport
        self._checked: list[Checked] = []
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._failure: BaseException | None = None

    def checked(self) -> list[Checked]:
        """The checks since the last `clear`, oldest first (unless the constructor was given its own `observe`)."""
        return list(self._checked)

    def clear(self) -> None:
        """Forget the checks so far."""
        self._checked.clear()

    def start(self) -> None:
        """Listen and serve; `address` is then where. Raises what the transport raised when it did not start."""
        # A daemon, for the case that the interpreter ends without unwinding the `with` block.
        self._thread = threading.Thread(target=self._run, name="authz-server", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_SECONDS):
            raise TimeoutError(f"the server did not start within {_START_SECONDS:g} s")
        if self._failure is not None:
            self._thread.join(_STOP_SECONDS)
            raise self._failure

    def stop(self) -> None:
        """Stop serving. Raises TimeoutError when it hangs."""
        if self._thread is None:
            return
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself: it failed
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"the server did not stop within {_STOP_SECONDS:g} s")
        self._thread = None

    def _observe_each(self, checks: Checks) -> None:
        for checked in checks:
            self._observe(checked)

    def _remember(self, checked: Checked) -> None:
        self._checked.append(checked)

    def _run(self) -> None:
        handler = _Faults()
        handler.texts = self.faults
        logging.getLogger().addHandler(handler)
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - start() raises it in the test's thread
            self._failure = error
        finally:
            logging.getLogger().removeHandler(handler)
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        checker = Checker(
            lambda: self.snapshot,
            self._responses,
            max_request_bytes=self._max_request_bytes,
            observe=self._observe_each,
        )
        host = self.address[0]
        listen = f"[{host}]:0" if ":" in host else f"{host}:0"
        transport, _, _ = choose_transport(
            self._transport,
            checker,
            listen=listen,
            tls=self._tls,
            health=HealthState(),
            max_request_bytes=self._max_request_bytes,
            max_wait_seconds=_ANSWER_SECONDS,  # a test may be slow, and is told so by its own time-out
            observe_wait=ignore_wait,
        )
        self.address = (host, await transport.start())
        self._started.set()
        try:
            await self._stop.wait()
        finally:
            await transport.drain(0.2)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


Headers = Sequence[tuple[str, str]]
"""Names as they are to be sent, letter case included, with values; repeated ones repeated."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)

    @property
    def instance(self) -> str | None:
        """The instance that answered, by its own word; None when none did."""
        return self.headers.get("x-served-by")


def ask(
    address: Address,
    path: str = "/",
    *,
    headers: Headers = (),
    method: str = "GET",
    host: str = "site.test",
    source: str | None = None,
    preamble: bytes = b"",
) -> Answer:
    """Send one request on a connection of its own and return the answer.

    Args:
        address: of Envoy.
        path: with its query, sent as it is.
        headers: sent as they are, after Host.
        method: any.
        host: the Host header.
        source: the address that the client binds; None: the system chooses.
        preamble: sent before the request, such as a PROXY protocol header.

    Raises:
        ConnectionError: the connection was closed without an answer.
    """
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers)]
    head = "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1")
    where = None if source is None else (source, 0)
    with socket.create_connection(address, timeout=_ANSWER_SECONDS, source_address=where) as connection:
        connection.sendall(preamble + head)
        response = http.client.HTTPResponse(connection, method=method)
        try:
            response.begin()
            return Answer(response.status, response.headers, response.read())
        finally:
            response.close()
