"""Log lines on standard error: JSON for machines, or columns for people. Other libraries' lines look the same.

Our own lines do not go through standard logging, which would take three times as long: each change that is applied is
logged between checks.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, TextIO

import structlog

_MOST_CHARACTERS = 16 << 20
"""Of lines that wait for whoever reads standard error."""
_GATHER_SECONDS = 0.005
"""So long may a line wait for others that are written with it."""
_CLOSE_SECONDS = 2.0
"""How long the last lines may take."""

_log = structlog.get_logger(__name__)


def set_up_logging(level: str, log_format: Literal["auto", "json", "console"]) -> "StandardError":
    """Route structlog and standard logging to standard error.

    Args:
        level: the least level logged, such as `info`.
        log_format: `auto` is for people when standard error is a terminal, else JSON.
    """
    terminal = sys.stderr.isatty()
    for_people = log_format == "console" or (log_format == "auto" and terminal)
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=terminal)]
        if for_people
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_to_json)]
    )
    file = StandardError(sys.stderr)
    handler = logging.StreamHandler(file)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # grpcio logs, with a trace, every metadata value that is not UTF-8. Clients can write some of them (`tracestate`).
    cygrpc = logging.getLogger("grpc._cython.cygrpc")
    cygrpc.filters[:] = [_is_not_about_metadata]
    # uvicorn tells at `info` that it starts and stops; the server's own lines say that better.
    logging.getLogger("uvicorn").setLevel(max(root.level, logging.WARNING))
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda name: _Logger(name, file),
        cache_logger_on_first_use=False,  # a later call, as in tests, takes effect
    )
    return file


class _Logger(structlog.WriteLogger):
    """Writes rendered lines."""

    def __init__(self, name: str, file: "StandardError") -> None:
        super().__init__(file)  # type: ignore[arg-type]
        self.name = name


class StandardError:
    """Lines that nobody takes (the reader is gone, the disk full) are dropped: whoever tells of something goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None
        self._ending = False
        self._lines: list[str] = []
        self._characters = 0
        """Of the lines that wait, and of those that are being written."""
        self._dropped = 0

    def write(self, text: str) -> None:
        """Write a line, now or in the background; called by loggers."""
        with self._changed:
            if self._writer is not None:
                if self._characters + len(text) > _MOST_CHARACTERS:
                    self._dropped += 1
                    return
                if not self._lines:
                    self._changed.notify()
                self._lines.append(text)
                self._characters += len(text)
                return
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        """Called by loggers after each line."""
        if self._writer is None:
            with suppress(OSError, ValueError):
                self._stream.flush()

    @contextmanager
    def in_the_background(self) -> Iterator[None]:
        """Have a thread write what is told meanwhile: a reader that is slow, or has hung, holds nobody up.

        What is more than it can hold is counted and not written. At the end the last lines get a moment.
        """
        # A daemon, and past the stream's own lock: a reader that has hung must not keep the process from leaving.
        self._writer = threading.Thread(target=self._run, name="log", daemon=True)
        self._writer.start()
        try:
            yield
        finally:
            with self._changed:
                self._ending = True
                self._changed.notify()
            self._writer.join(_CLOSE_SECONDS)
            if not self._writer.is_alive():
                self._writer = None

    def _run(self) -> None:
        descriptor = self._stream.fileno()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._ending)
                # To wake for each line takes more time, of the thread that tells it too, than to write it.
                self._changed.wait_for(lambda: self._ending, _GATHER_SECONDS)
                if not self._lines:
                    return
                lines, self._lines = self._lines, []
                dropped, self._dropped = self._dropped, 0
            rest = "".join(lines).encode("utf-8", "backslashreplace")
            with suppress(OSError):
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            with self._changed:
                self._characters -= sum(map(len, lines))
            if dropped:
                _log.warning("log lines dropped", lines=dropped, problem="nobody reads standard error fast enough")


_encode = json.JSONEncoder(ensure_ascii=False, default=repr).encode
"""`json.dumps` with arguments makes an encoder for each text."""


def _to_json(line: Mapping[str, Any], **_: Any) -> str:
    return _encode(line)


def _is_not_about_metadata(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Invalid encoding on")
