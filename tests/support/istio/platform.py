"""The platform that the practices are tried on: pods on the loopback, services, Envoys of one version."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from authz_server.demo.envoy import Envoy
from authz_server.demo.upstreams import Upstreams
from support.envoys import binary_of
from support.gateway import AuthzServer
from support.istio.clusters import Locality, Pod, Service
from support.istio.manifests import Composition
from support.istio.proxies import Gateway, Sidecar
from support.waiting import wait_until

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

    def queue(self, *names: str, composition: Composition | None = None) -> Service:
        """The queue service with these pods, or all three: those of a StatefulSet.

        With the labels that a composition gives the Service.
        """
        services = [] if composition is None else composition.of_kind("Service")
        labels = next((service.labels for service in services if service.name == "queue"), {})
        return Service(QUEUE, 80, self._pods(names or QUEUES), labels=labels)

    def alike(self, host: str, *names: str) -> Service:
        """A service of this host whose pods are alike: these, or all four."""
        return Service(host, 80, self._pods(names or ALIKE))

    def ip_and_port(self, name: str) -> str:
        """A pod's address as route-by-session has instances named."""
        host, port = self.upstreams.addresses[name]
        return f"{host}-{port}"

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

    def gateway(self, composition: Composition, *services: Service, istio_stats: bool = False) -> Envoy:
        """A gateway, whose endpoints are those of the services."""
        return self._envoy(Gateway(composition, services, self.folder(), istio_stats=istio_stats).bootstrap())

    def sidecar(self, composition: Composition, *services: Service) -> Envoy:
        """A sidecar of a workload that calls the services."""
        return self._envoy(Sidecar(composition, services, self.folder()).bootstrap())

    def changing(
        self,
        kind: type[Gateway] | type[Sidecar],
        composition: Composition,
        *services: Service,
        locality: Locality = ("", "", ""),
    ) -> "Changing":
        """A proxy whose services' pods will change; `locality` is its own."""
        proxy = kind(composition, services, self.folder(), locality=locality)
        return Changing(proxy, self._envoy(proxy.bootstrap()))

    def _envoy(self, bootstrap: bytes) -> Envoy:
        # pilot-agent starts Envoy so: clients are told of a drain at once (`pkg/envoy/proxy.go`, args).
        envoy = Envoy(
            bootstrap, name=f"envoy-{self.version}", binary=binary_of(self.version), drain_strategy="immediate"
        )
        return self.stack.enter_context(envoy)


@dataclass(slots=True)
class Changing:
    """A proxy whose services' pods change, as the control plane would tell it."""

    proxy: Gateway | Sidecar
    envoy: Envoy

    def now(self, service: Service) -> None:
        """The service has these pods now. Returns when Envoy has taken it up, in all the service's clusters."""
        known = {
            name: count
            for name, count in self.envoy.stats("cluster.").items()
            if f"|{service.host}" in name and name.endswith(".update_success")
        }
        assert known, f"no cluster of {service.host}"
        self.proxy.write_pods([service])
        wait_until(lambda: all(self.envoy.stats(name)[name] > count for name, count in known.items()))


def authz_service(server: AuthzServer) -> Service:
    """The authorization server as a service of the mesh."""
    return Service(AUTHZ, 9000, [Pod("authz-server-0", server.address)], grpc=True)
