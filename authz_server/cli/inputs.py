"""What administrators type, read before anything is sent: all problems at once, each naming its text."""

import pwd
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from os import getuid
from pathlib import Path
from typing import TypeVar

from authz_server.cli.failures import BadInputError
from authz_server.cli.times import parse_moment, show_moment
from authz_server.policy.addresses import Network, parse_network
from authz_server.policy.identifiers import parse_identifier
from authz_server.store.keys import parse_host_pattern

MAX_TEXT_LENGTH = 500
"""Characters of a reason, a description, an owner or an actor: they are kept with every entry and event."""

_CHANGE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}", re.ASCII)

_COMMENT = re.compile("[#;]")

T = TypeVar("T")


class Reader:
    """Reads several inputs and collects what is wrong with them; `done` raises when anything is."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def read(self, parse: Callable[[str], T], text: str) -> T | None:
        """Return the value, or None after noting the problem (`done` will raise then)."""
        try:
            return parse(text)
        except ValueError as error:
            self.refuse(str(error))
            return None

    def read_all(self, parse: Callable[[str], T], texts: Iterable[str]) -> tuple[T, ...]:
        """Return the values that can be read, each once, in the order given."""
        values = (self.read(parse, text) for text in texts)
        return tuple(dict.fromkeys(value for value in values if value is not None))

    def refuse(self, problem: str) -> None:
        """Note a problem that no parser sees."""
        self._problems.append(problem)

    def done(self) -> None:
        """Raise BadInputError with all problems noted so far, if any."""
        if self._problems:
            raise BadInputError(self._problems)


def networks(reader: Reader, texts: Iterable[str]) -> tuple[Network, ...]:
    """Read CIDRs; one that is given twice counts once."""
    return reader.read_all(parse_network, texts)


def expiry(reader: Reader, text: str | None, now: float) -> int | None:
    """Read when entries end; a moment that has passed is refused."""
    if text is None:
        return None
    moment = reader.read(lambda given: parse_moment(given, now), text)
    if moment is not None and moment <= now:
        reader.refuse(f"--expires {text!r} is in the past (it is {show_moment(now)})")
    return moment


def named(kind: str) -> Callable[[str], str]:
    """Return a parser of names of this kind, such as `a tenant`."""
    return lambda text: parse_identifier(text, kind)


def host_pattern(text: str) -> str:
    """Read `www.example.com` or `*.example.com`, without a port; the case of letters does not matter.

    Raises:
        ValueError: naming the text and how to mend it.
    """
    return parse_host_pattern(text.lower())


def change_id(text: str) -> str:
    """Read a change id that a script chose.

    Raises:
        ValueError: naming the text and what is allowed.
    """
    if not _CHANGE_ID.fullmatch(text):
        raise ValueError(
            f"{text!r} is not a change id: use 1 to 64 letters, digits, '.', '_', ':', '-', "
            "beginning with a letter or digit"
        )
    return text


def line(what: str, *, required: bool = False) -> Callable[[str], str]:
    """Return a parser of a line for people: printable, not too long. Control characters could rewrite a terminal."""

    def parse(text: str) -> str:
        stripped = text.strip()
        if required and not stripped:
            raise ValueError(f"{what} is empty: say in a few words what whoever reads the history must know")
        if not stripped.isprintable():
            raise ValueError(f"{what} {stripped!r} must be one line without control characters")
        if len(stripped) > MAX_TEXT_LENGTH:
            raise ValueError(f"{what} has {len(stripped)} characters: at most {MAX_TEXT_LENGTH}")
        return stripped

    return parse


def lines(reader: Reader, path: Path, columns: Sequence[str], problems_at_most: int = 50) -> list[tuple[str, ...]]:
    """Read a file (`-`: standard input) of lines such as `TENANT INSTANCE`, with blanks or a comma between the columns.

    Empty lines, and what follows a `#`, do not count; a line that is there twice counts once.

    Args:
        reader: takes the problems, each with its line.
        path: of the file.
        columns: what stands in a line, such as `a tenant`; names of that kind are checked.
        problems_at_most: so many are told; more would hide the first ones.
    """
    rows: dict[tuple[str, ...], None] = {}
    problems: list[str] = []
    where = _file_name(path)
    text = _read_file(reader, path)
    if text is None:
        return []
    for number, line_text in enumerate(text.splitlines(), 1):
        words = line_text.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) != len(columns):
            problems.append(f"{where}, line {number}: {line_text.strip()!r} must be {' and '.join(columns)}")
            continue
        for word, kind in zip(words, columns, strict=True):
            try:
                parse_identifier(word, kind)
            except ValueError as error:
                problems.append(f"{where}, line {number}: {error}")
        rows[tuple(words)] = None
    for problem in problems[:problems_at_most]:
        reader.refuse(problem)
    if len(problems) > problems_at_most:
        reader.refuse(f"and {len(problems) - problems_at_most:,} lines more")
    if not rows and not problems:
        reader.refuse(f"{where} names nothing")
    return list(rows)


def feed(reader: Reader, path: Path) -> tuple[Network, ...]:
    """Read a file (`-`: standard input) of networks, one a line; one that is there twice counts once.

    Empty lines, and what follows a `#` or a `;`, do not count. All lines are read before anything is done, and each
    that is wrong is told with its number and text; only of a file that holds no network at all the first is.
    """
    text = _read_file(reader, path)
    if text is None:
        return ()
    found: dict[Network, None] = {}
    problems: list[str] = []
    for number, line_text in enumerate(text.splitlines(), 1):
        word = _COMMENT.split(line_text, maxsplit=1)[0].strip()
        if not word:
            continue
        try:
            found[parse_network(word)] = None
        except ValueError as error:
            problems.append(f"{_file_name(path)}, line {number}: {error}")
    if problems and not found and len(problems) > 1:
        reader.refuse(
            f"{_file_name(path)} is no list of networks: none of {len(problems):,} lines is one. {problems[0]}"
        )
        return ()
    for problem in problems:
        reader.refuse(problem)
    return tuple(found)


def _read_file(reader: Reader, path: Path) -> str | None:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reader.refuse(f"{_file_name(path)} cannot be read: {error}")
        return None


def _file_name(path: Path) -> str:
    return "standard input" if str(path) == "-" else str(path)


def header(text: str) -> tuple[str, str]:
    """Read `name=value`; the name in lower case.

    Raises:
        ValueError: naming the text.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text!r} is not a header: write NAME=VALUE, such as x-tenant-id=acme")
    return name.lower(), value


def operating_system_user() -> str:
    """Return who runs this process, from the system's accounts: unlike USER, the environment cannot forge it."""
    try:
        return pwd.getpwuid(getuid()).pw_name
    except KeyError:  # containers run under ids that have no account
        return f"uid:{getuid()}"
