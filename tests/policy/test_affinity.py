"""The weighted rendezvous hash: the same answer everywhere, in proportion, with few moves."""

import itertools
from collections import Counter

import pytest

from authz_server.policy.affinity import Instance, InstanceState, rendezvous

EQUAL = [Instance(f"queue-{number}") for number in range(1, 5)]
WEIGHTED = [Instance("queue-1", 1), Instance("queue-2", 2), Instance("queue-3", 7)]
NAMES = [f"tenant-{number}" for number in range(4000)]

GOLDEN_EQUAL = {
    "acme": "queue-4",
    "globex": "queue-3",
    "initech": "queue-3",
    "umbrella": "queue-1",
    "hooli": "queue-1",
    "a": "queue-3",
    "0": "queue-1",
    "n" * 63: "queue-4",
}
GOLDEN_WEIGHTED = {
    "acme": "queue-2",
    "globex": "queue-3",
    "initech": "queue-3",
    "umbrella": "queue-3",
    "hooli": "queue-3",
    "a": "queue-3",
    "0": "queue-1",
    "n" * 63: "queue-3",
}


@pytest.mark.parametrize(("tenant", "instance"), GOLDEN_EQUAL.items())
def test_golden_values_of_equal_instances(tenant: str, instance: str) -> None:
    """Every replica, platform and Python version must agree, so these never change."""
    assert rendezvous(tenant, EQUAL) == instance


@pytest.mark.parametrize(("tenant", "instance"), GOLDEN_WEIGHTED.items())
def test_golden_values_of_weighted_instances(tenant: str, instance: str) -> None:
    assert rendezvous(tenant, WEIGHTED) == instance


def test_order_does_not_matter() -> None:
    for tenant in NAMES[:50]:
        assert len({rendezvous(tenant, order) for order in itertools.permutations(WEIGHTED)}) == 1


def test_tenants_spread_in_proportion_to_weights() -> None:
    counts = Counter(rendezvous(name, WEIGHTED) for name in NAMES)
    for instance in WEIGHTED:
        assert counts[instance.name] == pytest.approx(len(NAMES) * instance.weight / 10, rel=0.1)


@pytest.mark.parametrize("instances", [EQUAL, WEIGHTED], ids=["equal", "weighted"])
def test_an_instance_that_goes_moves_only_its_own_tenants(instances: list[Instance]) -> None:
    """Read backwards: one that comes takes tenants, and moves none between the others."""
    for gone in instances:
        rest = [instance for instance in instances if instance is not gone]
        for name in NAMES[:500]:
            before, after = rendezvous(name, instances), rendezvous(name, rest)
            assert before in (after, gone.name)


def test_more_weight_only_attracts() -> None:
    heavier = [Instance("queue-1", 5), *WEIGHTED[1:]]
    for name in NAMES[:500]:
        before, after = rendezvous(name, WEIGHTED), rendezvous(name, heavier)
        assert after in (before, "queue-1")


@pytest.mark.parametrize("state", [InstanceState.DRAINING, InstanceState.DOWN])
def test_only_active_instances_take_tenants(state: InstanceState) -> None:
    instances = [Instance("queue-1", 100, state), Instance("queue-2")]
    assert {rendezvous(name, instances) for name in NAMES[:200]} == {"queue-2"}
    assert rendezvous("acme", instances[:1]) is None


def test_no_instance_at_all() -> None:
    assert rendezvous("acme", []) is None
