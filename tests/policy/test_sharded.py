"""A sharded mapping is a dict that never changes."""

from hypothesis import given
from hypothesis import strategies as st

from authz_server.policy.sharded import Sharded

EDITS = st.lists(st.tuples(st.integers(-5, 5) | st.text("ab", max_size=2), st.none() | st.integers(0, 9)), max_size=20)
LARGE = 10_000
PLAIN: list[dict[object, int]] = [{f"key {number}": number for number in range(size)} for size in (0, 3, LARGE)]
SHARDED = [Sharded(plain.items()) for plain in PLAIN]
"""Made once: they never change."""


def edited(mapping: dict[object, int], edits: list[tuple[object, int | None]]) -> dict[object, int]:
    """Do to a dict what a draft does."""
    result = dict(mapping)
    for key, value in edits:
        if value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


@given(EDITS, EDITS)
def test_it_is_a_dict_and_a_draft_changes_only_the_next_one(
    first: list[tuple[object, int | None]], then: list[tuple[object, int | None]]
) -> None:
    for plain, before in zip(PLAIN, SHARDED, strict=True):
        for edits in (first, then):
            draft = before.draft()
            for key, value in edits:
                draft.put(key, value)
                assert draft.get(key) == value
            after, expected = draft.done(), edited(plain, edits)
            assert (before, len(before)) == (plain, len(plain))
            assert (after, len(after)) == (expected, len(expected))
            for key, _ in [*first, *then]:
                assert after.get(key) == expected.get(key)
                assert (key in after) is (key in expected)
            before, plain = after, expected  # noqa: PLW2901 - the second edits are of what the first made


def test_it_grows_and_shrinks_through_all_its_forms() -> None:
    mapping: Sharded[int, int] = Sharded()
    parts = []
    for end in range(0, LARGE + 1, 1_000):
        assert mapping == {number: number for number in range(max(0, end - 1_000))}
        draft = mapping.draft()
        for number in range(max(0, end - 1_000), end):
            draft.put(number, number)
        mapping = draft.done()
        parts.append(len(mapping.shards))
    assert parts[0] == 1
    assert parts[-1] > 1
    assert max(map(len, mapping.shards)) < 100
    for start in range(0, LARGE, 500):
        draft = mapping.draft()
        for number in range(start, start + 500):
            draft.put(number, None)
        mapping = draft.done()
        assert mapping == {number: number for number in range(start + 500, LARGE)}
    assert len(mapping.shards) == 1
