"""The operator's settings: `AUTHZ_*` variables and a YAML file, the environment first. Nothing else reads either.

All problems are reported at once, each under the name that the operator wrote, and never with a secret in it. A
setting that does not exist is a problem too: a mistyped `AUTHZ_TRUSTED_PEER` must not silently trust everybody.
"""

import difflib
import os
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit, urlunsplit

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from yaml.parser import ParserError
from yaml.scanner import ScannerError

from authz_server.ext_authz.transport import TransportName
from authz_server.policy.addresses import Network, parse_network
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import DecisionOptions, MissingClientAddress, MissingTenant, UnknownTenant
from authz_server.policy.tenant import SourceKind, TenantSource, parse_tenant_source
from authz_server.store.address import RedisAddress, RedisTls

ENV_PREFIX = "AUTHZ_"
CONFIG_VARIABLE = "AUTHZ_CONFIG"
"""Names the YAML file where no `--config` does."""

HIDDEN = "***"
"""What is shown in place of a secret."""

_ALLOWING = (Reason.ALLOWED, Reason.ALLOWLISTED)

_HEADER_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,4}", re.ASCII)
"""Few hyphens, for many backends cannot tell them from underscores: each spelling is removed from requests."""

_HOP_BY_HOP_HEADERS = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""They end at the next hop (RFC 9110, section 7.6.1)."""
_RESERVED_HEADERS = _HOP_BY_HOP_HEADERS | {"host", "content-length", "x-request-id"}
_RESERVED_PREFIXES = ("x-envoy-", "x-forwarded-")

_UNKNOWN_TO_ENVOY = (418, 425, 451)
"""Statuses of HTTP that the enumeration envoy.type.v3.StatusCode lacks."""

_REDIS_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,62}", re.ASCII)
"""No braces: the prefix becomes the keys' hash tag."""

_REPLICA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)

_SERVICE_LINK = re.compile(
    r"(.*_)?(SERVICE_HOST=.*|SERVICE_PORT(_.*)?=\d+|PORT=\w+://.*|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*)",
    re.ASCII | re.DOTALL,
)
"""What Kubernetes puts into every container for a Service called `authz` or `authz-...` (enableServiceLinks)."""


_SECRETS = ("redis_url", "redis_password", "redis_sentinel_password")
"""Settings whose values no message shows."""

_DEFAULT_URL = SecretStr("redis://127.0.0.1:6379/0")


class SettingsError(Exception):
    """The settings cannot be used."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        """One line each: the setting as it was written, the offending text, how to mend it."""


def parse_listen(text: str) -> tuple[str, int]:
    """Read `host:port` or `[IPv6]:port`; port 0 takes a free one.

    Raises:
        ValueError: naming the text and how to mend it.
    """
    host, colon, port_text = text.rpartition(":")
    if not colon or not host or not (port_text.isascii() and port_text.isdigit()) or int(port_text[:6]) > 65535:
        raise ValueError(f"{text!r} is not where to listen: write host:port, such as 0.0.0.0:9000 or [::]:9000")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: put an IPv6 address into brackets, such as [{host}]:{port_text}")
    return host, int(port_text)


def _listen(text: str) -> str:
    parse_listen(text)
    return text


def _header_name(text: str) -> str:
    if not _HEADER_NAME.fullmatch(text):
        mended = text.lower().replace("_", "-")
        hint = f": write {mended}" if _HEADER_NAME.fullmatch(mended) else ""
        raise ValueError(f"{text!r} is not a header name of a-z, 0-9 and at most four single hyphens{hint}")
    if text in _RESERVED_HEADERS or text.startswith(_RESERVED_PREFIXES):
        raise ValueError(f"{text!r} has a meaning of its own to Envoy or HTTP: choose another header")
    return text


def _redis_prefix(text: str) -> str:
    if not _REDIS_PREFIX.fullmatch(text):
        raise ValueError(f"{text!r} is not a key prefix: use 1 to 63 letters, digits, '.', '_', ':', '-'")
    return text


def _replica_name(text: str) -> str:
    if text and not _REPLICA_NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a name for a server: use 1 to 128 letters, digits, '.', '_', '-'")
    return text


def _redis_url(secret: SecretStr) -> SecretStr:
    """Check what can be checked without connecting; no part of the URL but the scheme is shown, it may be secret."""
    try:
        url = urlsplit(secret.get_secret_value())
        port_given = url.port is not None  # reading it raises when it is not a number
    except ValueError:
        raise ValueError("the port is not a number from 0 to 65535 (or a ':', '/' or '@' is not escaped)") from None
    if url.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must begin with redis:// (rediss:// for TLS, unix:// for a socket)")
    if url.scheme == "unix" and (not url.path or port_given):
        raise ValueError("a unix:// URL names the socket's path, such as unix:///run/valkey.sock")
    if url.scheme != "unix" and not url.hostname:
        raise ValueError("names no host: write redis://host:port/database")
    if url.scheme != "unix" and url.path.strip("/") and not url.path.strip("/").isdecimal():
        raise ValueError("what follows the host must be a database number, such as /0")
    if any("username" in name or "password" in name for name in parse_qs(url.query, keep_blank_values=True)):
        raise ValueError("write user and password before the host (user:password@host) or as settings, not as ?...")
    if url.password == HIDDEN:
        raise ValueError(f"{HIDDEN} is how print-config hides the password: put the password itself there")
    return secret


def _otlp_endpoint(text: str) -> str:
    if not text:
        return text
    try:
        url = urlsplit(text)
        usable = url.scheme in ("http", "https") and url.hostname and url.port
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{text!r} is not where a collector listens: write http://host:port (https:// for TLS)")
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
        raise ValueError("needs packages that are not installed: pip install 'authz-server[tracing]'")
    return text


def _redis_node(text: str) -> str:
    try:
        _, port = parse_listen(text)
    except ValueError:
        port = 0
    if not port:
        raise ValueError(f"{text!r} is not a server: write host:port, such as valkey-0.valkey:26379")
    return text


def _readable(path: Path | None) -> Path | None:
    if path is not None:
        try:
            path.open("rb").close()
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    return path


def _in_a_folder(path: Path | None) -> Path | None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"{str(path)!r} is not a file's name in a folder that there is")
    return path


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text: put it into quotes")  # noqa: TRY004 - pydantic collects ValueError
    return value.strip()


def _parsed_by(parse: Callable[[str], object]) -> PlainValidator:
    return PlainValidator(lambda value: value if isinstance(value, TenantSource | Network) else parse(_text(value)))


def _comma_separated(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _comma_separated_pairs(value: object) -> object:
    if not isinstance(value, str):
        return value
    pairs: dict[str, str] = {}
    for part in value.split(","):
        if not part.strip():
            continue
        name, equals, status = part.partition("=")
        if not equals:
            raise ValueError(f"{part.strip()!r} is not REASON=STATUS, such as blocked=404")
        if name.strip() in pairs:
            raise ValueError(f"{name.strip()!r} is there twice")
        pairs[name.strip()] = status.strip()
    return pairs


def _denying_reason(text: str) -> Reason:
    denying = [str(reason) for reason in Reason if reason not in _ALLOWING]
    if text not in denying:
        raise ValueError(f"{text!r} is not a reason to deny{_did_you_mean(text, denying)}")
    return Reason(text)


def _denied_status(status: int) -> int:
    if not 400 <= status <= 511 or status not in list(HTTPStatus) or status in _UNKNOWN_TO_ENVOY:
        raise ValueError(
            f"{status} is not a status for a denial: use one from 400 to 511 that Envoy knows, such as 404"
        )
    return status


def _none_if_empty(value: object) -> object:
    return None if value == "" else value


Listen = Annotated[str, _parsed_by(_listen)]
HeaderName = Annotated[str, _parsed_by(_header_name)]
DenyingReason = Annotated[Reason, _parsed_by(_denying_reason)]
Source = Annotated[TenantSource, _parsed_by(parse_tenant_source)]
Peer = Annotated[Network, _parsed_by(parse_network)]
RedisNode = Annotated[str, _parsed_by(_redis_node)]
ReadableFile = Annotated[Path | None, AfterValidator(_readable), BeforeValidator(_none_if_empty)]


class Settings(BaseSettings):
    """What an operator can set. Get one by `load_settings`, whose errors are made for people."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        enable_decoding=False,  # lists are written `a, b` in the environment, not as JSON
        frozen=True,
        validate_default=True,  # rules between settings also hold for the ones left out
    )

    listen: Listen = Field(
        "0.0.0.0:9000", description="Where Envoy calls (gRPC), as host:port; port 0 takes a free one"
    )
    admin_listen: Listen = Field(
        "127.0.0.1:9001", description="Where /livez, /readyz, /metrics and /snapshot are served (plain HTTP)"
    )
    tls_certificate: ReadableFile = Field(None, description="PEM file of the gRPC port's certificate and its chain")
    tls_key: ReadableFile = Field(None, description="PEM file of the certificate's key, not encrypted")
    tls_client_ca: ReadableFile = Field(
        None, description="PEM file of the CAs of which clients must show a certificate (mutual TLS)"
    )

    transport: TransportName = Field(
        TransportName.AUTO,
        description="Who serves the gRPC port: `asyncio` (HTTP/2 of this project, a fraction of the CPU, bounded and "
        "shedding), `grpcio` (the reference and the fallback), or `auto`, which takes asyncio",
    )
    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] = Field(
        _DEFAULT_URL,
        description="The store: redis://, rediss:// (TLS) or unix://; a password in it is never shown",
    )
    redis_username: str = Field("", description="User of the store, if not in the URL")
    redis_password: SecretStr = Field(SecretStr(""), description="Password of the store, if not in the URL")
    redis_password_file: ReadableFile = Field(
        None, description="File that holds the password of the store, such as a mounted Secret"
    )
    redis_sentinels: Annotated[tuple[RedisNode, ...], BeforeValidator(_comma_separated)] = Field(
        (), description="Instead of redis_url: host:port of each Sentinel; they name the primary"
    )
    redis_sentinel_primary: str = Field(
        "mymaster", min_length=1, description="What the Sentinels call the primary to use (their `sentinel monitor`)"
    )
    redis_sentinel_username: str = Field("", description="User of the Sentinels themselves, if they have users")
    redis_sentinel_password: SecretStr = Field(SecretStr(""), description="Password of the Sentinels themselves")
    redis_sentinel_password_file: ReadableFile = Field(None, description="File that holds it")
    redis_cluster: Annotated[tuple[RedisNode, ...], BeforeValidator(_comma_separated)] = Field(
        (), description="Instead of redis_url: host:port of some nodes of a Redis Cluster; they name the others"
    )
    redis_database: int = Field(
        0, ge=0, le=16383, description="With redis_sentinels: the database's number (redis_url names its own)"
    )
    redis_tls: bool = Field(
        False, description="With redis_sentinels or redis_cluster: connect by TLS (redis_url says rediss://)"
    )
    redis_tls_ca: ReadableFile = Field(
        None, description="PEM file of the CAs that the store's certificates come from; empty: the system's"
    )
    redis_tls_certificate: ReadableFile = Field(
        None, description="PEM file of the certificate to show to the store, if it asks for one"
    )
    redis_tls_key: ReadableFile = Field(None, description="PEM file of that certificate's key, not encrypted")
    redis_prefix: Annotated[str, _parsed_by(_redis_prefix)] = Field(
        "authz", description="Begins the names of all keys in the store"
    )
    history_events: int = Field(
        100_000,
        ge=1000,
        le=10_000_000,
        description="For authzctl: how many changes the store keeps the history of; a server that was away for "
        "more loads everything",
    )
    history_days: int = Field(
        0,
        ge=0,
        le=3650,
        description="For authzctl: so many days the store keeps every change, even when there are more; whoever writes "
        "must have the same. It needs memory there: about a kilobyte a change",
    )
    replica_name: Annotated[str, _parsed_by(_replica_name)] = Field(
        "",
        description="Name of this server, its own, in `authzctl replica list`, such as the pod's; a restart under the "
        "same name replaces what it reported before. Empty: the host's, and something random",
    )

    trusted_peers: Annotated[tuple[Peer, ...], BeforeValidator(_comma_separated)] = Field(
        (),
        description="Networks of the proxies whose x-envoy-external-address counts; empty: whoever calls through "
        "Envoy. Not behind PROXY protocol, where the peer is the client",
    )
    missing_client_address: MissingClientAddress = Field(
        MissingClientAddress.DENY,
        description="Without a usable x-envoy-external-address: `deny`, or take the connection's `peer`",
    )
    fold_path_case: bool = Field(
        True, description="Whether /DOCS is taken for a reading of /docs, as some backends read it"
    )

    routing_header: HeaderName = Field("x-tenant-instance", description="Header that names the instance to Envoy")
    tenant_header: HeaderName = Field("x-tenant-id", description="Header that names the tenant to the instance")
    tenant_from: Annotated[tuple[Source, ...], BeforeValidator(_comma_separated)] = Field(
        # Made anew: pydantic copies a default at times, which a frozen class does not bear when it is compiled.
        default_factory=lambda: (TenantSource(SourceKind.HEADER, "x-tenant-id"),),
        description="Where requests name their tenant, all are read: `header:NAME`, `query:NAME`, "
        "`host:{tenant}.example.com`, `path:/t/{tenant}/`",
    )
    unknown_tenant: UnknownTenant = Field(
        UnknownTenant.NONE,
        description="For a tenant that is not registered: no instance (`none`), one by `hash`, or `deny`",
    )
    missing_tenant: MissingTenant = Field(
        MissingTenant.ALLOW, description="A request that names no tenant: `allow` or `deny`"
    )

    denied_status: Annotated[
        dict[DenyingReason, Annotated[int, AfterValidator(_denied_status)]], BeforeValidator(_comma_separated_pairs)
    ] = Field(
        {}, description="HTTP status by reason to deny, such as `blocked=404,not_allowlisted=404`; others keep theirs"
    )
    retry_after_seconds: int = Field(1, ge=0, le=3600, description="Retry-After of denials with status 503")
    show_reason: bool = Field(False, description="Whether a denied client is told the reason")
    max_request_bytes: int = Field(
        1 << 20, ge=1 << 10, le=8 << 20, description="Longer check requests are denied as request_too_large"
    )
    max_wait_seconds: float = Field(
        0.1,
        ge=0.01,
        le=10,
        description="Checks that would wait for longer are answered UNAVAILABLE; stay below Envoy's timeout",
    )
    max_snapshot_age_seconds: Annotated[float | None, BeforeValidator(_none_if_empty)] = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="When the store was not heard of for so long, answer UNAVAILABLE; unset: decide from the last "
        "snapshot however old",
    )

    snapshot_file: Annotated[Path | None, AfterValidator(_in_a_folder), BeforeValidator(_none_if_empty)] = Field(
        None,
        description="Where the last good snapshot is kept for a start without the store, such as "
        "/var/lib/authz/snapshot; unset: nowhere",
    )
    snapshot_file_max_age_seconds: float = Field(
        86_400.0,
        ge=60,
        allow_inf_nan=False,
        description="A snapshot file that the store has not confirmed for so long is not served",
    )
    drain_seconds: float = Field(
        15.0,
        ge=0,
        le=3600,
        description="After SIGTERM, how long to go on answering (not ready) while endpoints are taken out",
    )
    grace_seconds: float = Field(10.0, ge=0, le=3600, description="After that, how long calls in flight may take")
    decision_log: Literal["stdout", "off"] = Field(
        "stdout", description="Where decisions are logged as JSON lines (other log lines go to standard error)"
    )
    decision_log_denials_per_second: int = Field(
        100, ge=0, le=100_000, description="Denials logged in any one second; the others are counted, by reason"
    )
    decision_log_allowed_ratio: float = Field(
        0.0, ge=0, le=1, description="The part of allowed requests that is logged, such as 0.001"
    )
    decision_log_anonymize: bool = Field(
        False, description="Whether the log and the admin page show only 24 bits of IPv4 client addresses, 48 of IPv6"
    )
    otlp_endpoint: Annotated[str, AfterValidator(_otlp_endpoint)] = Field(
        "",
        description="Where spans of checks are sent (OTLP over gRPC), such as http://collector:4317; needs the extra "
        "`tracing`; empty: no spans",
    )
    trace_ratio: float = Field(
        0.01, ge=0, le=1, description="The part of checks that get a span, of requests whose trace is sampled"
    )
    traces_per_second: int = Field(10, ge=0, le=10_000, description="At most so many spans, whatever clients send")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least level logged")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`json` lines, `console` for people; `auto` is console on a terminal"
    )

    _written: dict[str, str] = PrivateAttr(default_factory=dict)
    """Each setting that is given -> what to call it in a message."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment beat the file, whose values come as arguments; read nothing else."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings

    # Rules between settings. Each sits at the later of its settings: `info.data` holds the earlier ones that are valid,
    # so that all problems come out at once.

    @field_validator("admin_listen")
    @classmethod
    def _two_ports(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("listen") and parse_listen(value)[1] != 0:
            raise ValueError(f"{value!r} is where listen is: two ports are needed")
        return value

    @field_validator("tls_key")
    @classmethod
    def _key_fits_certificate(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_certificate" not in info.data:
            return key
        certificate: Path | None = info.data["tls_certificate"]
        if key is None and certificate is not None:
            raise ValueError("tls_certificate is set and needs its key")
        if key is not None and certificate is None:
            raise ValueError("tls_key is set and needs tls_certificate")
        if key is not None and certificate is not None:
            _check_pair(certificate, key)
        return key

    @field_validator("tls_client_ca")
    @classmethod
    def _client_ca_needs_certificate(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is None:
            return path
        if "tls_certificate" in info.data and info.data["tls_certificate"] is None:
            raise ValueError("tls_client_ca is set and needs tls_certificate and tls_key")
        _check_authorities(path)
        return path

    @field_validator("redis_username")
    @classmethod
    def _one_username(cls, value: str, info: ValidationInfo) -> str:
        if value and "redis_url" in info.data and urlsplit(info.data["redis_url"].get_secret_value()).username:
            raise ValueError("redis_url names a user too: write it in one place")
        return value

    @field_validator("redis_password")
    @classmethod
    def _one_password(cls, value: SecretStr, info: ValidationInfo) -> SecretStr:
        if value.get_secret_value() == HIDDEN:
            raise ValueError(f"{HIDDEN} is how print-config hides the password: put the password itself there")
        if value and "redis_url" in info.data and urlsplit(info.data["redis_url"].get_secret_value()).password:
            raise ValueError("redis_url holds a password too: write it in one place")
        return value

    @field_validator("redis_password_file")
    @classmethod
    def _one_password_or_file(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is None:
            return path
        if info.data.get("redis_password"):
            raise ValueError("redis_password is set too: write the password in one place")
        if "redis_url" in info.data and urlsplit(info.data["redis_url"].get_secret_value()).password:
            raise ValueError("redis_url holds a password too: write it in one place")
        if not _read_secret(path):
            raise ValueError(f"{str(path)!r} is empty")
        return path

    @field_validator("redis_sentinels", "redis_cluster")
    @classmethod
    def _one_place(cls, nodes: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if nodes and info.data.get("redis_url", _DEFAULT_URL) != _DEFAULT_URL:
            raise ValueError("redis_url names a server too: write where the store is in one place")
        if nodes and info.data.get("redis_sentinels"):
            raise ValueError("redis_sentinels is set too: write where the store is in one place")
        return nodes

    @field_validator(
        "redis_sentinel_username", "redis_sentinel_password", "redis_sentinel_password_file", "redis_database"
    )
    @classmethod
    def _of_sentinels(cls, value: object, info: ValidationInfo) -> object:
        if value and "redis_sentinels" in info.data and not info.data["redis_sentinels"]:
            raise ValueError("it goes with redis_sentinels, which is not set")
        if isinstance(value, Path) and info.data.get("redis_sentinel_password"):
            raise ValueError("redis_sentinel_password is set too: write the password in one place")
        if isinstance(value, Path) and not _read_secret(value):
            raise ValueError(f"{str(value)!r} is empty")
        if isinstance(value, SecretStr) and value.get_secret_value() == HIDDEN:
            raise ValueError(f"{HIDDEN} is how print-config hides the password: put the password itself there")
        return value

    @field_validator("redis_tls")
    @classmethod
    def _tls_of_several(cls, wanted: bool, info: ValidationInfo) -> bool:
        several = {"redis_sentinels", "redis_cluster"}
        if wanted and several <= info.data.keys() and not any(info.data[name] for name in several):
            raise ValueError("it goes with redis_sentinels or redis_cluster: write rediss:// in redis_url")
        return wanted

    @field_validator("redis_tls_ca", "redis_tls_certificate")
    @classmethod
    def _only_with_tls(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is None:
            return path
        url: SecretStr | None = info.data.get("redis_url")
        if url and not info.data.get("redis_tls", True) and urlsplit(url.get_secret_value()).scheme != "rediss":
            raise ValueError("the store is reached without TLS: write rediss:// in redis_url, or set redis_tls")
        if info.field_name == "redis_tls_ca":
            _check_authorities(path)
        return path

    @field_validator("redis_tls_key")
    @classmethod
    def _key_fits_our_certificate(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        if "redis_tls_certificate" not in info.data:
            return key
        certificate: Path | None = info.data["redis_tls_certificate"]
        if (key is None) is not (certificate is None):
            raise ValueError("redis_tls_certificate and redis_tls_key go together")
        if key is not None and certificate is not None:
            _check_pair(certificate, key)
        return key

    @field_validator("tenant_header")
    @classmethod
    def _two_headers(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("routing_header"):
            raise ValueError(f"{value!r} is routing_header too: two headers are needed")
        return value

    @field_validator("tenant_from")
    @classmethod
    def _routing_header_names_no_tenant(
        cls, value: tuple[TenantSource, ...], info: ValidationInfo
    ) -> tuple[TenantSource, ...]:
        routing = TenantSource(SourceKind.HEADER, info.data.get("routing_header", ""))
        if routing in value:
            raise ValueError(f"{str(routing)!r} is routing_header, which the server alone writes")
        return value

    def decision_options(self) -> DecisionOptions:
        """Return what a decision depends on."""
        return DecisionOptions(
            trusted_peers=self.trusted_peers,
            missing_client_address=self.missing_client_address,
            tenant_sources=self.tenant_from,
            unknown_tenant=self.unknown_tenant,
            missing_tenant=self.missing_tenant,
            fold_path_case=self.fold_path_case,
        )

    def store_address(self) -> RedisAddress:
        """Return where the store is, with users and passwords."""
        password = self.redis_password.get_secret_value()
        if self.redis_password_file:
            password = _read_secret(self.redis_password_file)
        if not self.redis_sentinels and not self.redis_cluster:
            return self.url_address(self._url_with(password))
        sentinel_password = self.redis_sentinel_password.get_secret_value()
        if self.redis_sentinel_password_file:
            sentinel_password = _read_secret(self.redis_sentinel_password_file)
        return RedisAddress(
            sentinels=tuple(map(parse_listen, self.redis_sentinels)),
            primary=self.redis_sentinel_primary if self.redis_sentinels else "",
            cluster=tuple(map(parse_listen, self.redis_cluster)),
            database=self.redis_database,
            username=self.redis_username,
            password=password,
            sentinel_username=self.redis_sentinel_username,
            sentinel_password=sentinel_password,
            tls=self._redis_tls_files() if self.redis_tls else None,
        )

    def url_address(self, url: str) -> RedisAddress:
        """Return the address of one server, with this URL's user and password and our TLS files."""
        return RedisAddress(url, tls=self._redis_tls_files() if urlsplit(url).scheme == "rediss" else None)

    def _redis_tls_files(self) -> RedisTls:
        return RedisTls(self.redis_tls_ca, self.redis_tls_certificate, self.redis_tls_key)

    def _url_with(self, password: str) -> str:
        url = urlsplit(self.redis_url.get_secret_value())
        user = self.redis_username or unquote(url.username or "")
        password = password or unquote(url.password or "")
        if not user and not password:
            return url.geturl()
        where = url.netloc.rpartition("@")[2]
        return urlunsplit(url._replace(netloc=f"{quote(user, safe='')}:{quote(password, safe='')}@{where}"))

    def store_origin(self) -> str:
        """Return what names the store and the policy in it, without user and password."""
        if self.redis_sentinels or self.redis_cluster:
            return f"{self.store_address()} {self.redis_prefix}"
        url = urlsplit(self.redis_url.get_secret_value())
        where = urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2], query="", fragment=""))
        return f"{where} {self.redis_prefix}"

    def shown(self) -> dict[str, tuple[object, str]]:
        """Return every setting by name with its value as a file would say it, and where it came from; no secrets."""
        values = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name == "redis_url":
                value = hide_password(value.get_secret_value())
            elif isinstance(value, SecretStr):
                value = HIDDEN if value else ""
            origin = self._written.get(name, "default").removesuffix(f": {name}")
            values[name] = (_as_written(value), origin)
        return values

    def written_as(self, name: str) -> str:
        """Return what to call a setting in a message: where the operator wrote it, else its variable."""
        return self._written.get(name, ENV_PREFIX + name.upper())


def _check_pair(certificate: Path, key: Path) -> None:
    try:
        # The password is for OpenSSL, which would otherwise ask the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{str(key)!r} is not the key of {str(certificate)!r}, or one of them is not PEM") from error


def _check_authorities(path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ValueError(f"{str(path)!r} holds no PEM certificate") from error


def hide_password(url: str) -> str:
    """Return the URL with its password, if it has one, hidden."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{HIDDEN}@{parts.netloc.rpartition('@')[2]}"))


def load_settings(config_path: Path | None = None) -> Settings:
    """Read the environment and the YAML file, named by `config_path` or else by AUTHZ_CONFIG.

    Raises:
        SettingsError: with every problem there is.
    """
    if config_path is None and (named := os.environ.get(CONFIG_VARIABLE)):
        config_path = Path(named)
    problems: list[str] = []
    written: dict[str, str] = {}
    """Each setting that is given -> what to call it in a message."""
    values: dict[str, Any] = {}
    if config_path is not None:
        values, written, problems = _read_file(config_path)
    for variable in os.environ:
        name = variable.lower().removeprefix(ENV_PREFIX.lower())
        if name in Settings.model_fields and variable.upper().startswith(ENV_PREFIX):
            written[name] = variable
    problems += _unknown_variables(os.environ)
    try:
        settings = Settings(**values)
    except ValidationError as error:
        problems += [_problem(details, written) for details in error.errors()]
    if problems:
        raise SettingsError(problems)
    settings._written.update(written)
    return settings


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    known = {name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE.removeprefix(ENV_PREFIX)}
    problems = []
    for variable, value in environ.items():
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        name = variable.upper().removeprefix(ENV_PREFIX)  # letter case does not matter for those that there are
        if name not in known and not _SERVICE_LINK.fullmatch(f"{name}={value}"):
            problems.append(f"{variable}: there is no such setting{_did_you_mean(name, known, ENV_PREFIX)}")
    return problems


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return the file's known settings, what to call each in a message, and the problems."""
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    problems = []
    try:
        loader: Any = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is not None and not isinstance(root, yaml.MappingNode):
            return {}, {}, [f"{path}: must hold `name: value` lines"]
        for key_node, value_node in root.value if root else ():
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "(not a name)"
            where = f"{path}:{key_node.start_mark.line + 1}: {name}"
            if name not in Settings.model_fields:
                problems.append(f"{where}: there is no such setting{_did_you_mean(name, Settings.model_fields)}")
            elif name in written:
                problems.append(f"{where}: is there twice, first as {written[name]}")
            else:
                written[name] = where
                try:
                    values[name] = loader.construct_object(value_node, deep=True)
                except (ValueError, LookupError, TypeError):  # PyYAML lets these through: a date 2026-99-99, `!!int x`
                    problems.append(f"{where}: is not plain YAML: a value may need quotes")
    except OSError as error:
        return {}, {}, [f"{path}: cannot be read: {error.strerror}"]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return {}, {}, [f"{path}{_where_not_yaml(error)}"]
    except RecursionError:
        return {}, {}, [f"{path}: is not plain YAML: it is nested too deeply"]
    return values, written, problems


def _where_not_yaml(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Say where a file is not YAML; its text is not shown, for it may be a password that lacks quotes."""
    line = ""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        line = f":{error.problem_mark.line + 1}"
    # The other errors name what stands in the file (an alias, a tag).
    what = error.problem if isinstance(error, ScannerError | ParserError) else "a value may need quotes"
    return f"{line}: is not plain YAML: {what}"


def _problem(details: ErrorDetails, written: Mapping[str, str]) -> str:
    name = str(details["loc"][0])
    what = written.get(name, ENV_PREFIX + name.upper())
    if details["type"] == "value_error":
        message = str(details["ctx"]["error"])
    else:
        message = details["msg"][0].lower() + details["msg"][1:]
        if name not in _SECRETS:
            message = f"{details['input']!r}: {message}"
    inner = ".".join(str(part) for part in details["loc"][1:] if isinstance(part, str) and not part.startswith("["))
    return f"{what}: {inner}: {message}" if inner else f"{what}: {message}"


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _read_secret(path: Path) -> str:
    """Return the file's text without the line end that editors add."""
    return path.read_text(encoding="utf-8").rstrip("\r\n")


def _as_written(value: object) -> object:
    match value:
        case Enum():
            return value.value
        case Path() | TenantSource() | Network():
            return str(value)
        case tuple():
            return [_as_written(item) for item in value]
        case dict():
            return {str(key): item for key, item in value.items()}
    return value
