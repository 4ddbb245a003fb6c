"""Moments as administrators write and read them."""

import pytest

from authz_server.cli.times import parse_moment, show_expiry, show_moment, show_span

NOW = 1_800_000_000.75  # 2027-01-15T08:00:00Z


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("30s", 1_800_000_030),
        ("30m", 1_800_001_800),
        ("2h", 1_800_007_200),
        ("7d", 1_800_604_800),
        ("2w", 1_801_209_600),
        ("2027-01-15T08:00:01Z", 1_800_000_001),
        ("2027-01-15T10:00:01+02:00", 1_800_000_001),
        ("2027-01-15 08:00:01Z", 1_800_000_001),
    ],
)
def test_a_moment_is_a_span_from_now_or_a_time_with_its_zone(text: str, moment: int) -> None:
    assert parse_moment(text, NOW) == moment


@pytest.mark.parametrize(
    ("text", "mending"),
    [
        ("tomorrow", "write a span such as 30m"),
        ("", "write a span such as 30m"),
        ("2 h", "write a span such as 30m"),
        ("0h", "write a span such as 30m"),
        ("-2h", "write a span such as 30m"),
        ("٣h", "write a span such as 30m"),
        ("2027-01-15T08:00:01", "append Z for UTC"),
        ("2027-01-15", "append Z for UTC"),
        ("2027-13-15T08:00:01Z", "write a span such as 30m"),
        ("999999999w", "too far away"),
    ],
)
def test_what_is_not_a_moment_is_refused_by_name(text: str, mending: str) -> None:
    with pytest.raises(ValueError, match=mending) as caught:
        parse_moment(text, NOW)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (0.9, "0s"), (59, "59s"), (60, "1m"), (7_199, "1h 59m"), (86_400, "1d"), (90_061, "1d 1h")],
)
def test_a_span_is_shown_in_its_two_largest_units(seconds: float, shown: str) -> None:
    assert show_span(seconds) == shown


def test_an_expiry_says_when_and_how_far() -> None:
    assert show_moment(NOW) == "2027-01-15T08:00:00Z"
    assert show_expiry(None, NOW) == "never"
    assert show_expiry(1_800_007_200, NOW) == "2027-01-15T10:00:00Z (in 1h 59m)"
    assert show_expiry(1_799_999_990, NOW) == "2027-01-15T07:59:50Z (expired 10s ago)"
