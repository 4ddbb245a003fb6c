"""A bare grpcio server that sends every message back: the reference that the server's own price is compared with."""

import grpc

from authz_server.ext_authz.grpcio_transport import SERVICE
from authz_server.ext_authz.transport import TlsFiles
from loadtest.served import Serving


class EchoTransport:
    """Has the face of a transport and asks no checker anything."""

    shed = 0

    def __init__(self, checker: Serving, *, listen: str, tls: TlsFiles | None, health: object) -> None:
        del tls, health
        self._checker, self._listen = checker, listen

    async def start(self) -> int:
        """Listen, and return the port."""
        handler = grpc.unary_unary_rpc_method_handler(self._echo)
        self._server = grpc.aio.server(handlers=(grpc.method_handlers_generic_handler(SERVICE, {"Check": handler}),))
        port: int = self._server.add_insecure_port(self._listen)
        await self._server.start()
        return port

    async def drain(self, grace_seconds: float) -> None:
        """Stop."""
        await self._server.stop(grace_seconds)

    async def _echo(self, data: bytes, _context: object) -> bytes:
        self._checker.answers += 1
        return data
