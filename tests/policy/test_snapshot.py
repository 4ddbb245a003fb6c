"""A snapshot is the same however it came about, and closes where a record cannot be read."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import CaseMaker, PolicyRoom

from authz_server.policy.access import Enforcement, Entry, Mode, NamedList, Resource, Scope
from authz_server.policy.addresses import parse_network
from authz_server.policy.affinity import Instance, InstanceState, Tenant
from authz_server.policy.networks import UNREADABLE
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.records import Record, RecordKey, RecordKind, Unreadable, entry_key, record_key
from authz_server.policy.snapshot import DecisionOptions, Snapshot, build_snapshot

Keyed = list[tuple[RecordKey, Record | Unreadable]]
OPTIONS = DecisionOptions()


def records_from(seed: int) -> Keyed:
    return [(key, record) for _, key, record in PolicyRoom().records_of(CaseMaker(random.Random(seed)).policy)]


def build(records: Keyed, revision: int = 1, last_good: Snapshot | None = None) -> Snapshot:
    return build_snapshot(records, epoch="e", revision=revision, options=OPTIONS, last_good=last_good)


def content(snapshot: Snapshot) -> dict[str, Any]:
    """Return all that a snapshot holds, tables as plain values, for comparison."""
    return {
        "tables": {name: sorted(table.items()) for name, table in snapshot.tables.items()},
        "sizes": {name: len(table) for name, table in snapshot.tables.items()},
        "counts": snapshot.counts(),
        "degraded": snapshot.degraded_scopes(),
        **{
            name: getattr(snapshot, name)
            for name in (
                *("epoch", "revision", "options", "named_lists", "scopes", "resources", "tenants", "instances"),
                *("problems", "unreadable", "missing", "global_scope", "guarded_resources"),
            )
        },
    }


def spoilt(records: Keyed, rng: random.Random) -> Keyed:
    return [(key, Unreadable(f"{key} is spoilt") if rng.random() < 0.2 else record) for key, record in records]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_records_never_changes_the_snapshot(seed: int) -> None:
    rng = random.Random(seed)
    records = spoilt(records_from(seed), rng)
    before = content(build(records))
    rng.shuffle(records)
    assert content(build(records)) == before


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_changes_give_what_building_from_scratch_gives_and_leave_the_old_one_as_it_was(seed: int) -> None:
    rng = random.Random(seed)
    state = dict(records_from(seed))
    others = dict(records_from(seed + 1))
    snapshot = build(list(state.items()))
    for revision in range(2, 8):
        changes: dict[RecordKey, Record | Unreadable | None] = {}
        for key in rng.sample(sorted(state.keys() | others.keys()), 8):
            new = rng.choice((None, others.get(key), state.get(key), Unreadable(f"{key} is spoilt")))
            changes[key] = new
        before = content(snapshot)
        changed = snapshot.with_changes(revision, changes.items())
        assert content(snapshot) == before
        state.update({key: record for key, record in changes.items() if record is not None})
        for key, record in changes.items():
            if record is None:
                state.pop(key, None)
        assert content(changed) == content(build(list(state.items()), revision, last_good=snapshot))
        snapshot = changed


def entry(cidr: str) -> Entry:
    return Entry(parse_network(cidr), "because", "ana", 1)


GOOD: dict[str, tuple[RecordKey, Record]] = {
    "list": (RecordKey(RecordKind.LIST, "office"), NamedList("office", "people", "ana")),
    "entry": (RecordKey(RecordKind.ENTRY, "10.0.0.0/8", "office"), entry("10.0.0.0/8")),
    "scope": (RecordKey(RecordKind.SCOPE, "global"), Scope("global", Mode.OPEN, Enforcement.SHADOW)),
    "resource": (RecordKey(RecordKind.RESOURCE, "docs"), Resource("docs", (parse_path_pattern("/docs"),))),
    "tenant": (RecordKey(RecordKind.TENANT, "acme"), Tenant("acme", "queue-1")),
    "instance": (RecordKey(RecordKind.INSTANCE, "queue-1"), Instance("queue-1", 5)),
}
STAND_INS: dict[str, Record | int] = {
    "list": NamedList("office"),
    "entry": UNREADABLE,
    "scope": Scope("global", Mode.RESTRICTED, Enforcement.ENFORCE),
    "resource": Resource("docs", (parse_path_pattern("/"),)),
    "tenant": Tenant("acme", None),
    "instance": Instance("queue-1", state=InstanceState.DOWN),
}


def worth(record: Record) -> Record | int:
    """Return what a snapshot keeps of a record."""
    return record.expiry if isinstance(record, Entry) else record


def held(snapshot: Snapshot, key: RecordKey) -> Record | int | None:
    """Return what counts under a key, in the form of `worth`."""
    return snapshot.expiry(key) if key.kind is RecordKind.ENTRY else snapshot.get(key)


BROKEN = Unreadable("the text '{' is not JSON")


@pytest.mark.parametrize("kind", GOOD)
def test_an_unreadable_record_keeps_its_last_good_value(kind: str) -> None:
    key, record = GOOD[kind]
    good = build([(key, record)])
    for snapshot in (good.with_changes(2, [(key, BROKEN)]), build([(key, BROKEN)], 2, last_good=good)):
        assert held(snapshot, key) == worth(record)
        assert snapshot.problems == {key: BROKEN.problem}
        mended = snapshot.with_changes(3, [(key, record)])
        assert mended.problems == {}
        assert content(mended) == content(build([(key, record)], 3))


@pytest.mark.parametrize("kind", GOOD)
def test_an_unreadable_record_keeps_a_value_set_before_in_the_same_batch(kind: str) -> None:
    key, record = GOOD[kind]
    other = {"entry": replace(entry("10.0.0.0/8"), expires_at=7)}.get(kind)
    before = build([(key, other)] if other else [])
    for snapshot in (
        before.with_changes(2, [(key, record), (key, BROKEN)]),
        build([]).with_changes(2, [(key, BROKEN), (key, None), (key, record), (key, BROKEN)]),
    ):
        assert held(snapshot, key) == worth(record)
        assert snapshot.problems == {key: BROKEN.problem}
    removed = before.with_changes(2, [(key, record), (key, None), (key, BROKEN)])
    assert held(removed, key) == STAND_INS[kind]
    assert removed.problems == {key: BROKEN.problem}


@pytest.mark.parametrize("kind", GOOD)
def test_an_unreadable_record_without_a_last_good_value_closes(kind: str) -> None:
    key, _ = GOOD[kind]
    for snapshot in (build([]).with_changes(2, [(key, BROKEN)]), build([(key, BROKEN)], 2)):
        assert held(snapshot, key) == STAND_INS[kind]
        assert snapshot.problems == {key: BROKEN.problem}
        assert content(snapshot.with_changes(3, [(key, None)])) == content(build([], 3))


@pytest.mark.parametrize("kind", GOOD)
def test_records_are_set_replaced_and_removed(kind: str) -> None:
    key, record = GOOD[kind]
    snapshot = build([]).with_changes(2, [(key, record)])
    assert held(snapshot, key) == worth(record)
    assert sum(snapshot.counts().values()) == 1
    removed = snapshot.with_changes(3, [(key, None)])
    assert held(removed, key) is None
    assert held(snapshot, key) == worth(record)
    assert content(removed) == content(build([], 3))


@pytest.mark.parametrize("cidr", ["nonsense", "10.0.0.1/8", ""])
def test_an_entry_key_that_is_no_network_is_a_problem_and_goes_away_with_its_record(cidr: str) -> None:
    key = RecordKey(RecordKind.ENTRY, cidr, "global/block")
    snapshot = build([(key, BROKEN)])
    assert snapshot.problems == {key: BROKEN.problem}
    assert snapshot.degraded_scopes() == ("global",)
    assert content(snapshot.with_changes(2, [(key, None)])) == content(build([], 2))


@pytest.mark.parametrize("cidr", ["203.0.113.7", "::ffff:203.0.113.7", "::FFFF:203.0.113.7/128"])
def test_an_entry_key_in_another_spelling_is_a_record_of_its_own(cidr: str) -> None:
    good = entry("203.0.113.7/32")
    key, other = entry_key("global/block", good), RecordKey(RecordKind.ENTRY, cidr, "global/block")
    both = build([(key, good), (other, BROKEN)])
    assert (both.count(RecordKind.ENTRY, "global/block"), held(both, other)) == (2, None)
    assert content(both.with_changes(2, [(other, None)])) == content(build([(key, good)], 2))
    assert held(both.with_changes(2, [(key, None)]), key) is None
    assert content(build([(other, BROKEN)], 2, last_good=both)) == content(build([(other, BROKEN)], 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_entries_that_cannot_be_read_are_counted_as_they_come_and_go(seed: int) -> None:
    rng = random.Random(seed)
    keys = [RecordKey(RecordKind.ENTRY, cidr, name) for cidr in ("10.0.0.0/8", "10.0.0.1/8") for name in ("a", "b")]
    records = dict.fromkeys(keys[:2], entry("10.0.0.0/8"))
    snapshot, now = build([]), dict[RecordKey, Record | Unreadable]()
    for _ in range(12):
        key = rng.choice(keys)
        value = rng.choice([BROKEN, BROKEN, None, records.get(key, BROKEN)])
        snapshot = snapshot.with_changes(2, [(key, value)])
        now.pop(key, None)
        if value is not None:
            now[key] = value
        broken = [key for key, value in now.items() if value is BROKEN]
        assert snapshot.unreadable == Counter(key.list_name for key in broken)
        assert snapshot.missing == Counter(key.list_name for key in broken if snapshot.expiry(key) is None)
        for name in ("a", "b"):
            assert snapshot.count(RecordKind.ENTRY, name) == sum(key.list_name == name for key in now)


def test_degraded_scopes_are_those_that_use_a_spoilt_or_missing_list() -> None:
    def degraded(*records: tuple[RecordKey, Record | Unreadable]) -> tuple[str, ...]:
        return build(list(records)).degraded_scopes()

    office = GOOD["list"]
    uses_office = (RecordKey(RecordKind.SCOPE, "tenant:acme"), Scope("tenant:acme", block_lists=("office",)))
    spoilt_entry = (RecordKey(RecordKind.ENTRY, "10.0.0.0/8", "office"), BROKEN)
    own_entry = (RecordKey(RecordKind.ENTRY, "10.0.0.0/8", "resource:docs/allow"), BROKEN)
    assert degraded() == ()
    assert degraded(office, uses_office) == ()
    assert degraded(uses_office) == ("tenant:acme",)
    assert degraded(office, spoilt_entry) == ()
    assert degraded(office, uses_office, spoilt_entry, own_entry) == ("resource:docs", "tenant:acme")


def test_resources_are_guarded_by_name_with_the_case_that_the_options_ask_for() -> None:
    records: Keyed = [
        (record_key(resource), resource)
        for resource in (
            Resource("z", (parse_path_pattern("/Zoo"),)),
            Resource("a", (parse_path_pattern("/Ape"),)),
        )
    ]
    scope = Scope("resource:z", Mode.RESTRICTED)
    records.append((record_key(scope), scope))
    folded = build(records)
    plain = build_snapshot(records, epoch="e", revision=1, options=DecisionOptions(fold_path_case=False))
    assert [guarded.resource.paths[0].segments for guarded in folded.guarded_resources] == [("ape",), ("zoo",)]
    assert [guarded.resource.paths[0].segments for guarded in plain.guarded_resources] == [("Ape",), ("Zoo",)]
    assert [guarded.scope for guarded in folded.guarded_resources] == [Scope("resource:a"), scope]
    assert folded.resources["z"].paths[0].segments == ("Zoo",)


@pytest.mark.parametrize(("kind", "keyed"), GOOD.items())
def test_records_name_themselves(kind: str, keyed: tuple[RecordKey, Record]) -> None:
    key, record = keyed
    assert key == (entry_key("office", record) if isinstance(record, Entry) else record_key(record))
    assert str(key) == (f"{kind} {key.name}" + (" in list office" if kind == "entry" else ""))
