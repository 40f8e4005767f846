"""Logging as JSON lines on standard error. A line contains the time in UTC, the name of the event, and the event's
fields."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str = "info", **fields: str) -> None:
    """Configure structlog for this process; `fields` are added to every line."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**fields)


def keep_handlers_open(logger: logging.Logger) -> None:
    """Make the handlers of a logger ignore `close` until the process ends.

    vLLM calls logging.dictConfig, which closes all handlers, including the one of Ray Serve's log file. A restarted
    Serve controller would then replace this replica, because the replica could not name its log file."""
    for handler in logger.handlers:
        handler.close = handler.flush  # type: ignore[method-assign]
