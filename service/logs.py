"""One line per event on stderr: for people by default, as JSON where LACHESIS_LOG_FORMAT=json."""

from __future__ import annotations

import logging
import os
import sys

import structlog


def configure_logging(role: str) -> structlog.stdlib.BoundLogger:
    """Set up logging for this process and return its logger, bound to `role`."""
    level = os.environ.get("LACHESIS_LOG_LEVEL", "INFO").upper()
    as_json = os.environ.get("LACHESIS_LOG_FORMAT") == "json"
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer()
            if as_json
            else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping().get(level, logging.INFO)),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # what stderr is then
    )
    log: structlog.stdlib.BoundLogger = structlog.get_logger(role=role)
    return log
