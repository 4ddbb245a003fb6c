"""Asks a server what a gateway and a kubelet ask: is it ready, and what does it decide about one request."""

from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.check_request import EXTERNAL_ADDRESS_HEADER
from authz_server.ext_authz.grpcio_transport import SERVICE
from authz_server.ext_authz.health_service import SERVICE as HEALTH_SERVICE


class ProbeError(Exception):
    """The server did not answer as one that serves; the message says what came instead."""


@dataclass(frozen=True, slots=True)
class ClientTlsFiles:
    """PEM files of one who asks."""

    ca: Path
    """The authorities that the server's certificate is checked against."""
    certificate: Path | None = None
    """The own certificate chain, for mutual TLS."""
    key: Path | None = None
    """The key of `certificate`."""


@dataclass(frozen=True, slots=True)
class Probed:
    """What a server that serves decided."""

    allowed: bool
    reason: str


async def probe(target: str, *, client_address: str, tls: ClientTlsFiles | None, timeout_seconds: float) -> Probed:
    """Ask for the server's health, and then for a decision about GET / of one client.

    Args:
        target: `host:port`.
        client_address: who the request comes from, as Envoy would say it.
        tls: None asks in plain text.
        timeout_seconds: for each of the two questions.

    Raises:
        ProbeError: it cannot be reached, does not serve, or cannot decide; or a TLS file cannot be read.
    """
    channel = grpc.aio.insecure_channel(target) if tls is None else grpc.aio.secure_channel(target, _credentials(tls))
    async with channel:
        try:
            health = await channel.unary_unary(
                f"/{HEALTH_SERVICE}/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )(health_pb2.HealthCheckRequest(), timeout=timeout_seconds, wait_for_ready=True)
            if health.status != health_pb2.HealthCheckResponse.SERVING:
                raise ProbeError("it says that it is not ready")
            answer = await channel.unary_unary(
                f"/{SERVICE}/Check",
                request_serializer=ext_authz_pb2.CheckRequest.SerializeToString,
                response_deserializer=ext_authz_pb2.CheckResponse.FromString,
            )(_request(client_address), timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise ProbeError(f"{error.code().name}: {error.details()}") from None
    return Probed(answer.status.code == 0, answer.dynamic_metadata.fields["reason"].string_value)


def _request(client_address: str) -> ext_authz_pb2.CheckRequest:
    request = ext_authz_pb2.CheckRequest()
    http = request.attributes.request.http
    http.method, http.host, http.path = "GET", "probe.invalid", "/"
    http.headers[EXTERNAL_ADDRESS_HEADER] = client_address
    return request


def _credentials(tls: ClientTlsFiles) -> grpc.ChannelCredentials:
    try:
        return grpc.ssl_channel_credentials(
            root_certificates=tls.ca.read_bytes(),
            certificate_chain=tls.certificate.read_bytes() if tls.certificate else None,
            private_key=tls.key.read_bytes() if tls.key else None,
        )
    except OSError as error:
        raise ProbeError(f"{error.filename!r} cannot be read: {error.strerror}") from None
