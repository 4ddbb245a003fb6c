"""Log lines on standard error: JSON for machines, or columns for people. Other libraries' lines look the same.

Our own lines do not go through standard logging, which would take three times as long: each change that is applied is
logged between checks.
"""

import logging
import sys
from contextlib import suppress
from typing import Literal, TextIO

import structlog


def set_up_logging(level: str, log_format: Literal["auto", "json", "console"]) -> None:
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
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    )
    handler = logging.StreamHandler(sys.stderr)
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
    file = _StandardError(sys.stderr)
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda name: _Logger(name, file),
        cache_logger_on_first_use=False,  # a later call, as in tests, takes effect
    )


class _Logger(structlog.WriteLogger):
    """Writes rendered lines."""

    def __init__(self, name: str, file: "_StandardError") -> None:
        super().__init__(file)  # type: ignore[arg-type]
        self.name = name


class _StandardError:
    """Lines that nobody takes (the reader is gone, the disk full) are dropped: whoever tells of something goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def _is_not_about_metadata(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Invalid encoding on")
