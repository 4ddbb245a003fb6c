"""Log lines on standard error: JSON for machines, or columns for people. Other libraries' lines look the same."""

import logging
import sys
from typing import Literal

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
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
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
            foreign_pre_chain=shared,
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
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # a later call, as in tests, takes effect
    )


def _is_not_about_metadata(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Invalid encoding on")
