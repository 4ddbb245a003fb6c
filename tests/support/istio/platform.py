"""The platform that the practices are tried on: pods on the loopback, services, Envoys of one version."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from authz_server.demo.envoy import Envoy
from authz_server.demo.upstreams import Upstreams
from support.envoys import binary_of
from support.gateway import AuthzServer
from support.istio.clusters import Pod, Service
from support.istio.manifests import Composition
from support.istio.proxies import Gateway, Sidecar

AUTHZ = "authz-server.authz-system.svc.cluster.local"
QUEUE = "queue.platform.svc.cluster.local"
"""The service with an instance of its own for each tenant."""

SITE = "app.example.com"
"""The host that the VirtualServices are for."""

QUEUES = ("queue-1", "queue-2", "queue-3")
ALIKE = ("pod-1", "pod-2", "pod-3", "pod-4")


@dataclass(slots=True)
class Pods:
    """The pods behind the proxies, on the loopback."""

    upstreams: Upstreams
    failing: set[str] = field(default_factory=set)
    """Names of the pods that answer everything with 500."""

    def queue(self, *names: str) -> Service:
        """The queue service with these pods, or all three: those of a StatefulSet."""
        return Service(QUEUE, 80, self._pods(names or QUEUES), labels={})

    def alike(self, host: str, *names: str) -> Service:
        """A service of this host whose pods are alike: these, or all four."""
        return Service(host, 80, self._pods(names or ALIKE))

    def _pods(self, names: tuple[str, ...]) -> list[Pod]:
        return [
            Pod(name, self.upstreams.addresses[name], {"statefulset.kubernetes.io/pod-name": name}) for name in names
        ]


@dataclass(slots=True)
class Launcher:
    """Starts Envoys of one version, which live as long as the module's tests on that version."""

    version: str
    folder: Callable[[], Path]
    stack: ExitStack

    def gateway(self, composition: Composition, *services: Service, listen: str = "127.0.0.1") -> Envoy:
        """A gateway, whose endpoints are those of the services."""
        return self._envoy(Gateway(composition, services, self.folder(), listen).bootstrap())

    def envoy(self, proxy: Gateway | Sidecar) -> Envoy:
        """A proxy that a test has put together."""
        return self._envoy(proxy.bootstrap())

    def _envoy(self, bootstrap: bytes) -> Envoy:
        return self.stack.enter_context(Envoy(bootstrap, name=f"envoy-{self.version}", binary=binary_of(self.version)))


def authz_service(server: AuthzServer) -> Service:
    """The authorization server as a service of the mesh."""
    return Service(AUTHZ, 9000, [Pod("authz-server-0", server.address)], grpc=True)
