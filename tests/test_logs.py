"""Log lines: the same for our own and for other libraries' loggers."""

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import structlog

from authz_server.logs import set_up_logging


class Terminal(io.StringIO):
    """A standard error that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("uvicorn").setLevel(logging.NOTSET)
    structlog.reset_defaults()


@pytest.mark.parametrize(
    "logger", [structlog.get_logger("ours"), logging.getLogger("ours")], ids=["structlog", "standard"]
)
def test_json_lines(capsys: pytest.CaptureFixture[str], logger: logging.Logger) -> None:
    set_up_logging("info", "auto")
    logger.warning("gone: é")
    (line,) = capsys.readouterr().err.splitlines()
    parsed = json.loads(line)
    assert parsed.pop("timestamp").endswith("Z"), "UTC"
    assert parsed == {"event": "gone: é", "level": "warning", "logger": "ours"}


def test_fields_and_traces_are_in_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("info", "json")
    structlog.get_logger("ours").error("broken", revision=7, exc_info=RuntimeError("boom"))
    (line,) = capsys.readouterr().err.splitlines()
    parsed = json.loads(line)
    assert parsed["revision"] == 7
    assert "RuntimeError: boom" in parsed["exception"]


def test_a_line_cannot_be_forged_by_what_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("info", "json")
    structlog.get_logger("ours").info("change", reason='x"}\n{"event": "forged"}')
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_disk_that_is_full_stops_nobody_who_tells_of_something(monkeypatch: pytest.MonkeyPatch) -> None:
    with io.TextIOWrapper(Path("/dev/full").open("wb", buffering=0), write_through=True) as stream:
        with pytest.raises(OSError, match="No space left"):
            stream.write("x")
        monkeypatch.setattr("sys.stderr", stream)
        set_up_logging("info", "json")
        structlog.get_logger("ours").info("said")


def test_a_reader_that_hangs_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are told by the thread that answers checks; what no one has read by then is counted."""
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb") as reader, os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("authz_server.logs._MOST_CHARACTERS", 200_000)
        told = structlog.get_logger("ours")
        with set_up_logging("info", "json").in_the_background():
            for number in range(1000):
                told.info("x" * 1000, number=number)
            written, dropped = [], 0
            while len(written) + dropped < 1000:
                line = json.loads(reader.readline())
                if line["event"] == "log lines dropped":
                    dropped += line["lines"]
                else:
                    written.append(line["number"])
            logging.getLogger("theirs").warning("the last")
        told.info("afterwards")
        assert [json.loads(reader.readline())["event"] for _ in range(2)] == ["the last", "afterwards"]
    assert written == sorted(written)
    assert dropped > 500
    assert len(written) > 150


def test_a_reader_that_hangs_keeps_nobody_from_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    monkeypatch.setattr("authz_server.logs._CLOSE_SECONDS", 0.1)
    with os.fdopen(ours, "rb") as reader, os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        told = structlog.get_logger("ours")
        with set_up_logging("info", "json").in_the_background():
            told.info("x" * 1_000_000)
        told.info("nobody waits for this")
        reader.close()  # ends the thread


@pytest.mark.parametrize(("level", "expected"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels(capsys: pytest.CaptureFixture[str], level: str, expected: int) -> None:
    set_up_logging(level, "json")
    logger = structlog.get_logger("ours")
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)("said")
    assert len(capsys.readouterr().err.splitlines()) == expected


@pytest.mark.parametrize(
    ("log_format", "terminal", "json_expected"),
    [
        ("auto", False, True),
        ("auto", True, False),
        ("json", True, True),
        ("console", False, False),
    ],
)
def test_formats(
    monkeypatch: pytest.MonkeyPatch,
    log_format: Literal["auto", "json", "console"],
    terminal: bool,
    json_expected: bool,
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    set_up_logging("info", log_format)
    structlog.get_logger("ours").info("serving", grpc="127.0.0.1:9000")
    text = stream.getvalue()
    assert text.startswith("{") is json_expected
    assert ("\x1b[" in text) is (terminal and not json_expected), "colours only for people at a terminal"
    assert "127.0.0.1:9000" in text


def test_what_clients_write_into_metadata_does_not_fill_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """grpcio logs each such value with a trace, and clients can write some of them through Envoy."""
    set_up_logging("info", "json")
    grpcio = logging.getLogger("grpc._cython.cygrpc")
    grpcio.error("Invalid encoding on 'tracestate' header")
    grpcio.error("something else")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["something else"]
