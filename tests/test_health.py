"""Readiness is the AND of the required components, each of which starts not ready."""

import itertools

import pytest

from authz_server.health import Component, ComponentName, HealthState

REQUIRED = (ComponentName.SNAPSHOT, ComponentName.SERVING)


def test_starts_not_ready() -> None:
    health = HealthState()
    assert not health.is_ready()
    assert not any(component.ready for component in health.components.values())


@pytest.mark.parametrize("values", list(itertools.product((True, False), repeat=4)), ids=str)
def test_ready_is_the_and_of_the_required_components(values: tuple[bool, ...]) -> None:
    health = HealthState()
    for name, ready in zip(ComponentName, values, strict=True):
        health.set(name, ready=ready, detail="")
    assert health.is_ready() is all(
        ready for name, ready in zip(ComponentName, values, strict=True) if name in REQUIRED
    )


def test_redis_and_the_snapshot_file_are_not_required() -> None:
    assert {name for name, component in HealthState().components.items() if component.required} == set(REQUIRED)


def test_details_are_kept() -> None:
    health = HealthState()
    health.set(ComponentName.REDIS, ready=False, detail="gone")
    assert health.components[ComponentName.REDIS] == Component(ready=False, detail="gone", required=False)


def test_subscribers_hear_of_changes_of_readiness_only() -> None:
    health = HealthState()
    heard: list[bool] = []
    health.subscribe(heard.append)
    health.set(ComponentName.SNAPSHOT, ready=True, detail="")
    health.set(ComponentName.REDIS, ready=True, detail="")
    assert heard == []
    health.set(ComponentName.SERVING, ready=True, detail="")
    health.set(ComponentName.SNAPSHOT, ready=True, detail="another revision")
    health.set(ComponentName.REDIS, ready=False, detail="gone")
    assert heard == [True]
    health.set(ComponentName.SERVING, ready=False, detail="draining")
    health.set(ComponentName.SNAPSHOT, ready=False, detail="too old")
    assert heard == [True, False]


def test_a_subscriber_sees_the_new_state() -> None:
    health = HealthState()
    seen: list[bool] = []
    health.subscribe(lambda _ready: seen.append(health.is_ready()))
    for name in REQUIRED:
        health.set(name, ready=True, detail="")
    assert seen == [True]
