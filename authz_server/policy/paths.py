"""Every reading of a path that a backend might take.

Between Envoy and the code that serves a path stand servers and frameworks that disagree on what it says: they
decode escapes once or twice, treat backslash as slash, merge slashes, resolve dot segments, drop `;parameters`, take
`//name/` for a host.
A resource applies when ANY of these readings matches, so no spelling slips past it. More readings can only make
more resources apply, and a resource can only deny what would otherwise be allowed; it never opens anything.
"""

import re
from dataclasses import dataclass
from itertools import dropwhile
from urllib.parse import unquote

Segments = tuple[str, ...]
"""A path cut at its slashes, without what stands before the first one."""

MAX_PATH_LENGTH = 8192
"""Characters of a path without its query; longer ones are refused, as common backends do by default."""

_ODD = re.compile(r"[%\\;#\0]|//|/\.")
"""What a path must contain for two backends to read it differently (letter case apart)."""
_ENCODED_SLASH = re.compile(r"%2f", re.IGNORECASE)
_END = re.compile(r"[?#\0]")
"""Where a backend that has decoded may take the path to end: at a query, a fragment, or the end of a C string."""


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A path and everything beneath it. A segment `*` stands for any one segment."""

    text: str
    segments: Segments

    def matches(self, reading: Segments) -> bool:
        """Tell whether the reading lies at or beneath this pattern."""
        if len(reading) < len(self.segments):
            return False
        return all(mine in ("*", theirs) for mine, theirs in zip(self.segments, reading, strict=False))


def parse_path_pattern(text: str) -> PathPattern:
    """Read a pattern such as `/docs`, `/api/*/docs` or `/`.

    Patterns are written plainly: what requests spell in many ways has one spelling here.

    Raises:
        ValueError: naming the text and how to mend it.
    """
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is not a path pattern: it must begin with '/'")
    segments = tuple(segment for segment in text.split("/") if segment)
    if text.rstrip("/") != "".join(f"/{segment}" for segment in segments):
        raise ValueError(f"{text!r} is not a path pattern: it has empty segments ('//')")
    for segment in segments:
        if segment in (".", "..") or _ODD.search(segment) or "?" in segment:
            raise ValueError(
                f"{text!r} is not a path pattern: write the segment {segment!r} plainly, "
                "without dots, escapes, '\\', ';', '?' or '#'"
            )
        if "*" in segment and segment != "*":
            raise ValueError(f"{text!r} is not a path pattern: '*' stands for one whole segment only")
    return PathPattern(text, segments)


def fold_case(pattern: PathPattern) -> PathPattern:
    """Return the pattern for comparison with readings whose case is folded."""
    return PathPattern(pattern.text, tuple(_folded(segment) for segment in pattern.segments))


def path_without_query(path: str) -> str:
    """Return the path up to its query string."""
    return path.partition("?")[0]


def read_path(path: str) -> frozenset[Segments]:
    """Return every reading of a path (without query) that begins with a slash.

    For a path without escapes, backslashes, parameters, empty or dot segments there is just one.
    """
    if _ODD.search(path) is None:
        return frozenset((tuple(path[1:].split("/")),))
    # One character for each byte: an escape stands for a byte, and a letter's bytes may be decoded at different hops.
    texts = {path.encode("utf-8", "surrogatepass").decode("latin-1")}
    for _ in range(2):
        texts |= {decoded for text in texts if "%" in text for decoded in _decoded(text)}
    texts = {text.encode("latin-1").decode("utf-8", "surrogateescape") for text in texts}
    texts |= {text.replace("\\", "/") for text in texts}
    texts |= {_END.split(text, maxsplit=1)[0] for text in texts}
    readings = {tuple(text[1:].split("/")) for text in texts}
    readings |= {_without_host(reading) for reading in readings}
    readings |= {tuple(segment.partition(";")[0] for segment in reading) for reading in readings}
    readings |= {_merged(reading) for reading in readings}
    readings |= {_resolved(reading) for reading in readings}
    readings |= {_merged(reading) for reading in readings}
    return frozenset(readings)


def fold_readings(readings: frozenset[Segments]) -> frozenset[Segments]:
    """Return the readings as a backend that ignores letter case takes them."""
    return frozenset(tuple(_folded(segment) for segment in reading) for reading in readings)


def _folded(text: str) -> str:
    """Return the text without letter case, where any backend may ignore it.

    Backends compare lower case, upper case or both, so that some take the Turkish dotted capital and dotless small
    letter for a plain `i` (Java does); casefold alone does not.
    """
    if text.isascii():
        return text.lower()
    return text.upper().casefold().replace("\u0307", "")


def _decoded(text: str) -> tuple[str, str]:
    """Decode the escapes once: everything, and everything but the encoded slashes."""
    slashes_kept = _ENCODED_SLASH.sub("%252F", text)
    return unquote(text, encoding="latin-1"), unquote(slashes_kept, encoding="latin-1")


def _without_host(reading: Segments) -> Segments:
    """Return what a URL parser makes of a path that begins with two slashes: it takes the first name for a host."""
    if len(reading) < 2 or reading[0]:
        return reading
    return tuple(dropwhile(lambda segment: not segment, reading))[1:]


def _merged(reading: Segments) -> Segments:
    return tuple(segment for segment in reading if segment)


def _resolved(reading: Segments) -> Segments:
    """Resolve dot segments as RFC 3986, section 5.2.4 does; `..` at the root stays at the root."""
    resolved: list[str] = []
    for segment in reading:
        if segment == "..":
            if resolved:
                resolved.pop()
        elif segment != ".":
            resolved.append(segment)
    return tuple(resolved)
