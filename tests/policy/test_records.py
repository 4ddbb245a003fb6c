"""Keys of records."""

import gc

from authz_server.policy.records import RecordKey, RecordKeys, RecordKind


def test_keys_are_a_set_of_those_that_were_added() -> None:
    wanted = [RecordKey(RecordKind.ENTRY, "10.0.0.0/8", name) for name in ("office", "global/block")]
    wanted += [RecordKey(RecordKind.TENANT, "acme"), RecordKey(RecordKind.SCOPE, "global")]
    keys = RecordKeys()
    assert (len(keys), list(keys)) == (0, [])
    keys.update(wanted[:3])
    keys.update(wanted[1:])
    assert len(keys) == 4
    assert sorted(keys) == sorted(wanted)


def test_many_keys_are_not_many_objects_for_the_garbage_collector() -> None:
    keys = RecordKeys()
    gc.collect()
    before = len(gc.get_objects())
    keys.update(RecordKey(RecordKind.ENTRY, f"10.0.{number}.0/24", "office") for number in range(200))
    assert len(gc.get_objects()) - before < 20
