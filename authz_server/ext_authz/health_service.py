"""grpc.health.v1: tells probes and clients whether this server is ready.

The servicer of grpcio-health-checking is not used, only its messages: its watches end only when the watcher hangs up,
so one watcher would hold up every drain for its full grace period.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Protocol

import grpc
from grpc_health.v1 import health_pb2

SERVICE = "grpc.health.v1.Health"


class Readiness(Protocol):
    """Whether the process as a whole is ready for checks."""

    def is_ready(self) -> bool:
        """Tell whether it is ready now."""

    def subscribe(self, callback: Callable[[bool], None]) -> object:
        """Have the callback called, on the server's event loop, with the new value at every change."""


class HealthService:
    """Answers Check, List and Watch for a few services that are ready or not ready together."""

    def __init__(self, readiness: Readiness, services: Iterable[str]) -> None:
        self._readiness = readiness
        self._services = tuple(services)
        self._closed = False
        self._changed = asyncio.Event()
        readiness.subscribe(lambda _ready: self._wake_watchers())

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to add to a grpc.aio server."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(
                    self._check,
                    request_deserializer=health_pb2.HealthCheckRequest.FromString,
                    response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
                ),
                "List": grpc.unary_unary_rpc_method_handler(
                    self._list,
                    request_deserializer=health_pb2.HealthListRequest.FromString,
                    response_serializer=health_pb2.HealthListResponse.SerializeToString,
                ),
                "Watch": grpc.unary_stream_rpc_method_handler(
                    self._watch,
                    request_deserializer=health_pb2.HealthCheckRequest.FromString,
                    response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
                ),
            },
        )

    def close(self) -> None:
        """Say NOT_SERVING from now on, and end the watches once they have said so."""
        self._closed = True
        self._wake_watchers()

    def _wake_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._closed or not self._readiness.is_ready():
            return health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse.SERVING

    async def _check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def _list(self, _request: health_pb2.HealthListRequest, _context: object) -> health_pb2.HealthListResponse:
        statuses = {service: health_pb2.HealthCheckResponse(status=self._status(service)) for service in self._services}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def _watch(
        self, request: health_pb2.HealthCheckRequest, _context: object
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
                told = status
                continue  # it may have changed while the message was on its way
            if self._closed:
                return
            await changed.wait()
