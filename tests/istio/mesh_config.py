"""What istiod-values.yaml files may hold: the part of Istio's MeshConfig that istio/ uses, unknown fields refused.

MeshConfig is no CRD, and no schema of it is published; field names and types are those of istio/api,
mesh/v1alpha1/config.proto (MeshConfig, ExtensionProvider) and mesh/v1alpha1/proxy.proto (ProxyConfig, Topology).
istiod itself goes on without a field that it does not know, with a word in its debug log only (pkg/util/protomarshal,
ApplyYAML): a misspelt `failOpen` would be found by an outage.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from support.envoy_api import envoy_type
from support.istio.messages import duration


def _duration(text: str) -> str:
    duration(text)
    return text


Duration = Annotated[str, AfterValidator(_duration)]
"""In Go's notation, which is what istiod's JSON reader takes for a protobuf Duration."""

Port = Annotated[int, Field(ge=1, le=65535)]

Service = Annotated[str, Field(pattern=r"^([a-z0-9-]+/)?[a-z0-9-]+(\.[a-z0-9-]+)+$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _status(text: str) -> str:
    # pilot/pkg/security/authz/builder/extauthz.go, parseStatusOnError: a code that Envoy's StatusCode names.
    if int(text) not in {code.value for code in envoy_type.StatusCode}:
        raise ValueError(f"Envoy knows no status {text}")
    return text


class ExtAuthzGrpc(Strict):
    service: Service
    port: Port
    timeout: Duration
    """Optional to Istio (600 s); here nobody may forget it."""
    failOpen: bool  # noqa: N815
    statusOnError: Annotated[str, AfterValidator(_status)] | None = None  # noqa: N815


class LogFormat(Strict):
    labels: dict[str, str]


class FileAccessLog(Strict):
    path: str
    logFormat: LogFormat  # noqa: N815


class OpenTelemetry(Strict):
    service: Service
    port: Port


class ExtensionProvider(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    """extauthz.go, validateProviderName."""
    envoyExtAuthzGrpc: ExtAuthzGrpc | None = None  # noqa: N815
    envoyFileAccessLog: FileAccessLog | None = None  # noqa: N815
    opentelemetry: OpenTelemetry | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in (self.envoyExtAuthzGrpc, self.envoyFileAccessLog, self.opentelemetry) if kind]
        if len(kinds) != 1:
            raise ValueError(f"provider {self.name}: exactly one kind, not {len(kinds)}")
        return self


class ProxyProtocol(Strict):
    """PROXY protocol has no options."""


class Topology(Strict):
    numTrustedProxies: Annotated[int, Field(ge=0)] = 0  # noqa: N815
    proxyProtocol: ProxyProtocol | None = None  # noqa: N815

    @model_validator(mode="after")
    def _never_both(self) -> Self:
        if self.numTrustedProxies and self.proxyProtocol is not None:
            raise ValueError("PROXY protocol and trusted proxies: X-Forwarded-For, which clients write, would win")
        return self


class Tracing(Strict):
    sampling: Annotated[float, Field(ge=0, le=100)]
    """In percent."""


class ProxyStatsMatcher(Strict):
    inclusionRegexps: list[str] | None = None  # noqa: N815


class ProxyConfig(Strict):
    gatewayTopology: Topology | None = None  # noqa: N815
    drainDuration: Duration | None = None  # noqa: N815
    terminationDrainDuration: Duration | None = None  # noqa: N815
    tracing: Tracing | None = None
    proxyStatsMatcher: ProxyStatsMatcher | None = None  # noqa: N815


class PathNormalization(Strict):
    normalization: Literal["DEFAULT", "NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"]


class DefaultProviders(Strict):
    tracing: list[str] | None = None


class MeshConfig(Strict):
    extensionProviders: list[ExtensionProvider] | None = None  # noqa: N815
    defaultConfig: ProxyConfig | None = None  # noqa: N815
    pathNormalization: PathNormalization | None = None  # noqa: N815
    enableTracing: bool | None = None  # noqa: N815
    defaultProviders: DefaultProviders | None = None  # noqa: N815

    @model_validator(mode="after")
    def _defaults_exist(self) -> Self:
        names = [provider.name for provider in self.extensionProviders or []]
        used = (self.defaultProviders.tracing or []) if self.defaultProviders else []
        if missing := set(used) - set(names):
            raise ValueError(f"no such provider: {', '.join(sorted(missing))}")
        return self

    @model_validator(mode="after")
    def _no_name_begins_another(self) -> Self:
        # builder.go, generateFilterMatcherForProvider: the filter looks for the prefix istio-ext-authz-NAME.
        names = [provider.name for provider in self.extensionProviders or []]
        for index, name in enumerate(names):
            if any(other.startswith(name) for other in names[:index] + names[index + 1 :]):
                raise ValueError(f"the name of provider {name} begins another one's, or is there twice")
        return self


class IstiodValues(Strict):
    """Values of Istio's chart `istiod`: manifests/charts/istio-control/istio-discovery/values.yaml."""

    meshConfig: MeshConfig | None = None  # noqa: N815
    env: dict[str, str] | None = None
