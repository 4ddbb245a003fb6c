"""Moments as people write and read them: UTC, ISO 8601, or a span from now such as `2h`."""

import re
from datetime import UTC, datetime

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SPAN = re.compile(r"([1-9][0-9]{0,8})([smhdw])", re.ASCII)
_LATEST = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp())
"""The last day that can be shown: ISO 8601 has four digits for the year."""


def parse_moment(text: str, now: float) -> int:
    """Read a span from `now` (`30m`, `2h`, `7d`) or an ISO 8601 time with its zone; seconds since the Unix epoch.

    Raises:
        ValueError: naming the text and how to mend it.
    """
    if _SPAN.fullmatch(text):
        moment = int(now) + parse_span(text)
    else:
        try:
            parsed = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(
                f"{text!r} is not a time: write a span such as 30m, 2h or 7d, or a time such as 2026-12-31T00:00:00Z"
            ) from None
        if parsed.tzinfo is None:
            raise ValueError(f"{text!r} does not say in which zone: append Z for UTC, or an offset such as +02:00")
        moment = int(parsed.timestamp())
    if moment > _LATEST:
        raise ValueError(f"{text!r} is too far away: the last day is 9999-12-31")
    return moment


def parse_span(text: str) -> int:
    """Read a span such as `30m`, `2h`, `7d`, or 0; return seconds.

    Raises:
        ValueError: naming the text and how to mend it.
    """
    if text == "0":
        return 0
    span = _SPAN.fullmatch(text)
    if not span:
        raise ValueError(f"{text!r} is not a span: write 30m, 2h or 7d, or 0")
    return int(span[1]) * _SECONDS[span[2]]


def show_moment(moment: float) -> str:
    """Return seconds since the Unix epoch as `2026-12-31T00:00:00Z`."""
    return datetime.fromtimestamp(int(moment), UTC).isoformat().replace("+00:00", "Z")


def show_span(seconds: float) -> str:
    """Return a span in its two largest units, such as `1h 59m`."""
    left = int(seconds)
    parts = []
    for unit in ("d", "h", "m", "s"):
        count, left = divmod(left, _SECONDS[unit])
        parts.append((count, unit))
    first = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    shown = [f"{count}{unit}" for count, unit in parts[first : first + 2] if count]
    return " ".join(shown) or "0s"


def show_expiry(expires_at: int | None, now: float) -> str:
    """Return when an entry ends, for people: `never`, or the time and how far it is from `now`."""
    if expires_at is None:
        return "never"
    if expires_at <= now:
        return f"{show_moment(expires_at)} (expired {show_span(now - expires_at)} ago)"
    return f"{show_moment(expires_at)} (in {show_span(expires_at - now)})"
