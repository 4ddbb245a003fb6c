"""Every reading of a path that a backend might take.

Between Envoy and the code that serves a path stand servers and frameworks that disagree on what it says: they
decode escapes once or twice, treat backslash as slash, merge slashes, resolve dot segments, drop `;parameters`, take
`//name/` for a host.
A resource applies when ANY of these readings matches, so no spelling slips past it. More readings can only make
more resources apply, and a resource can only deny what would otherwise be allowed; it never opens anything.
"""

import re
from collections.abc import Collection, Container
from dataclasses import dataclass, field
from posixpath import normpath
from typing import Final
from urllib.parse import unquote_to_bytes

Segments = tuple[str, ...]
"""A path pattern cut at its slashes, without what stands before the first one."""

MAX_PATH_LENGTH: Final = 8192
"""Characters of a path without its query; longer ones are refused, as common backends do by default."""
MAX_ODD_PATH_LENGTH: Final = 2048
"""The same for a path that can be read in more than one way: its readings, up to some two hundred, cost time."""
MAX_TWICE_ESCAPED_PATH_LENGTH: Final = 512
"""The same for a path with an escaped `%`: it has up to three times as many. Slow answers are a way past the policy
too, where Envoy fails open, so no path may take more than some milliseconds."""

_ESCAPED_PERCENT: Final = "%25"
_ENCODED_SLASH: Final = re.compile(r"%2f", re.IGNORECASE)
_END: Final = re.compile(r"[?#\0]")
"""Where a backend that has decoded may take the path to end: at a query, a fragment, or the end of a C string."""
_PARAMETERS: Final = re.compile(r";[^/]*")
_EMPTY: Final = chr(0xD800)
_NUL: Final = chr(0xD801)
"""Stand in for empty segments and NULs; decoding never yields these two. (mypyc has no such characters in literals.)"""


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A path, the same with a suffix such as `.json`, and everything beneath. A segment `*` is any one segment."""

    text: str
    segments: Segments
    expression: re.Pattern[str] = field(repr=False, compare=False)
    """The segments again, ready for matching."""

    def matches(self, reading: str) -> bool:
        """Tell whether the reading lies at or beneath this pattern."""
        return self.expression.match(reading) is not None


def parse_path_pattern(text: str) -> PathPattern:
    """Read a pattern such as `/docs`, `/api/*/docs` or `/`; one slash at the end means nothing.

    Patterns are written plainly: what requests spell in many ways has one spelling here.

    Raises:
        ValueError: naming the text and how to mend it.
    """
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is not a path pattern: it must begin with '/'")
    if "//" in text:
        raise ValueError(f"{text!r} is not a path pattern: it has empty segments ('//')")
    segments = tuple(segment for segment in text.split("/") if segment)
    for segment in segments:
        if segment in (".", "..") or is_odd(segment) or "?" in segment:
            raise ValueError(
                f"{text!r} is not a path pattern: write the segment {segment!r} plainly, "
                "without dots, escapes, '\\', ';', '?' or '#'"
            )
        if "*" in segment and segment != "*":
            raise ValueError(f"{text!r} is not a path pattern: '*' stands for one whole segment only")
    return _pattern(text, segments)


def fold_case(pattern: PathPattern) -> PathPattern:
    """Return the pattern for comparison with readings whose case is folded."""
    return _pattern(pattern.text, tuple(fold_text(segment) for segment in pattern.segments))


def fold_text(text: str) -> str:
    """Return the text without letter case, where any backend may ignore it.

    Backends compare lower case, upper case or both, so that some take the Turkish dotted capital and dotless small
    letter for a plain `i` (Java does); casefold alone does not. No letter becomes a sign that cuts paths or queries.
    """
    if text.isascii():
        return text.lower()
    return text.upper().casefold().replace("i\u0307", "i")


def first_name(path: str) -> str:
    """Return a path's first segment up to its first dot, without spaces at the end.

    It is the same for a pattern that does not begin with `*` and for every reading that lies within it.
    """
    return path[1:].partition("/")[0].partition(".")[0].rstrip(" ")


def is_odd(path: str) -> bool:
    """Tell whether a path (without query) can be read in more than one way, letter case apart.

    For that it must hold one of these; searching for each is three times as fast as one regular expression is.
    """
    return "%" in path or "//" in path or "/." in path or "\\" in path or ";" in path or "#" in path or "\0" in path


def read_path(path: str, *, fold_case: bool) -> frozenset[str]:
    """Return every reading of a path (without query); each begins with a slash.

    For a path without escapes, backslashes, parameters, empty or dot segments there is just one.

    Args:
        path: begins with a slash, or is `*`, which is read as the root.
        fold_case: whether to return the readings as a backend takes them that ignores letter case.
    """
    if not is_odd(path):
        text = f"/{path[1:]}"
        return frozenset((fold_text(text) if fold_case else text,))
    # One character for each byte: an escape stands for a byte, and a letter's bytes may be decoded at different hops.
    plain = path.encode("utf-8", "surrogatepass").decode("latin-1")
    once = _decoded({plain})
    twice = _decoded(once | _cleaned_up(once))
    texts = {text.encode("latin-1").decode("utf-8", "surrogateescape") for text in {plain} | once | twice}
    if fold_case:
        texts = {fold_text(text) for text in texts}
    texts |= {text.replace("\\", "/") for text in texts}
    texts |= {_END.split(text, maxsplit=1)[0] for text in texts}
    texts |= {_without_host(text) for text in texts}
    texts |= {_PARAMETERS.sub("", text) for text in texts if ";" in text}
    texts |= {_merged(text) for text in texts}
    texts |= {_resolved(text) for text in texts}
    texts |= {_merged(text) for text in texts}
    return frozenset(texts)


class RequestPath:
    """The path of one request and its readings: made only when something asks for them, and kept."""

    __slots__ = ("_exact", "_folded", "query", "text")

    def __init__(self, path: str) -> None:
        self.text, _, self.query = path.partition("?")
        """The path up to its query string, and that without the question mark."""
        self._exact: frozenset[str] | None = None
        self._folded: frozenset[str] | None = None

    def is_too_long(self) -> bool:
        """Tell whether the path (without query) is longer than this server reads, given how odd it is."""
        path = self.text
        if len(path) <= MAX_TWICE_ESCAPED_PATH_LENGTH:
            return False
        if not is_odd(path):
            return len(path) > MAX_PATH_LENGTH
        return _ESCAPED_PERCENT in path or len(path) > MAX_ODD_PATH_LENGTH

    def may_begin_with(self, names: Container[str], *, fold_case: bool) -> bool:
        """Tell whether the `first_name` of any reading can be one of these; always, when there are many readings."""
        if is_odd(self.text):
            return True
        name = first_name(self.text)
        return (fold_text(name) if fold_case else name) in names

    def readings(self, *, fold_case: bool) -> Collection[str]:
        """Return what `read_path` returns, each once."""
        if not is_odd(self.text):
            text = f"/{self.text[1:]}"
            return (fold_text(text) if fold_case else text,)
        if not fold_case:
            if self._exact is None:
                self._exact = read_path(self.text, fold_case=False)
            return self._exact
        if self._folded is None:
            if self._exact is not None and all(text.isascii() for text in self._exact):
                self._folded = frozenset(fold_text(text) for text in self._exact)
            else:  # other letters take longer to fold in hundreds of readings than the readings take to make
                self._folded = read_path(self.text, fold_case=True)
        return self._folded


def _pattern(text: str, segments: Segments) -> PathPattern:
    """Return a pattern that also takes what backends of some makes take for the same.

    Windows drops dots and spaces at the end of a name. Rails serves `/docs` as `/docs.json` too, or with any other
    suffix, unless told otherwise (its routes end in an optional format), and Spring did until 5.3.
    """
    steps = ["/[^/]*" if segment == "*" else f"/{re.escape(segment)}[. ]*" for segment in segments]
    suffix = "(?:\\.[^/]*)?" if segments else ""
    return PathPattern(text, segments, re.compile(f"{''.join(steps)}{suffix}(?:/|\\Z)"))


def _decoded(texts: set[str]) -> set[str]:
    """Decode the escapes once: everything, and everything but the encoded slashes."""
    escaped = {text for text in texts if "%" in text}
    escaped |= {_ENCODED_SLASH.sub("%252F", text) for text in escaped}
    return {unquote_to_bytes(text.encode("latin-1")).decode("latin-1") for text in escaped}


def _cleaned_up(texts: set[str]) -> set[str]:
    """Return what a hop passes on that cleans a path up, where another decoding may follow.

    Dots that are still encoded then stand where the cleaned-up ones were: to resolve both at once says another path.
    """
    texts = {text for text in texts if "%" in text}
    texts |= {text.replace("\\", "/") for text in texts}
    texts |= {_merged(text) for text in texts}
    return {_resolved(text) for text in texts}


def _without_host(text: str) -> str:
    """Return what a URL parser makes of a path that begins with two slashes: it takes the first name for a host."""
    if not text.startswith("//"):
        return text
    return "/" + text.lstrip("/").partition("/")[2]


def _merged(text: str) -> str:
    while "//" in text:
        text = text.replace("//", "/")
    return text


def _resolved(text: str) -> str:
    """Resolve dot segments as RFC 3986, section 5.2.4 does; `..` at the root stays at the root.

    `normpath` does it ten times faster than a loop over the segments could. It would merge slashes and drop the last
    one, and early releases of Python 3.11 stop at a NUL.
    """
    if "/." not in text:
        return text
    # Twice, since of three slashes the second ends one match and cannot begin the next.
    marked = text.replace("//", f"/{_EMPTY}/").replace("//", f"/{_EMPTY}/").replace("\0", _NUL)
    resolved = normpath(marked)
    if text.endswith("/") and resolved != "/":
        resolved += "/"
    return resolved.replace(_EMPTY, "").replace(_NUL, "\0")
