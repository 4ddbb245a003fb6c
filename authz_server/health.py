"""Whether this process should be sent requests: the AND of named components, each of which starts not ready."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class ComponentName(StrEnum):
    """What readiness is made of; the words stand in /readyz."""

    SNAPSHOT = "snapshot"
    """There is a policy to decide from, and it is not too old."""
    SERVING = "serving"
    """Envoy's calls are accepted, and the process is not draining."""
    REDIS = "redis"
    """The store answers. Not required: decisions go on from the last snapshot without it."""
    SNAPSHOT_FILE = "snapshot_file"
    """The last good snapshot is on disk. Not required: only a start without the store needs it."""


_NOT_REQUIRED = (ComponentName.REDIS, ComponentName.SNAPSHOT_FILE)


@dataclass(frozen=True, slots=True)
class Component:
    """One part of what it takes to be ready."""

    ready: bool
    detail: str
    """For people: why, or since when."""
    required: bool
    """Whether the process is not ready without it."""


class HealthState:
    """The components and what they add up to. Used from one thread, the event loop's."""

    def __init__(self) -> None:
        self._components = {
            name: Component(ready=False, detail="not started", required=name not in _NOT_REQUIRED)
            for name in ComponentName
        }
        self._subscribers: list[Callable[[bool], None]] = []

    @property
    def components(self) -> dict[ComponentName, Component]:
        """A copy of the components as they are now."""
        return dict(self._components)

    def is_ready(self) -> bool:
        """Tell whether every required component is ready."""
        return all(component.ready for component in self._components.values() if component.required)

    def set(self, name: ComponentName, *, ready: bool, detail: str) -> None:
        """Say how a component is; subscribers are called before this returns when readiness changes by it."""
        before = self.is_ready()
        self._components[name] = Component(ready, detail, self._components[name].required)
        after = self.is_ready()
        if after is not before:
            for subscriber in self._subscribers:
                subscriber(after)

    def subscribe(self, callback: Callable[[bool], None]) -> None:
        """Call back with the new readiness at every change of it, from now on."""
        self._subscribers.append(callback)
