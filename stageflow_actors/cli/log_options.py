"""`--log-level` and `--log-format`: the logging of commands that run a cluster, on stderr.

Without these options, the logging that the user's module configures holds, and a module that configures none gets
warnings as text.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, TextIO, TypeVar

import click

__all__ = ["configure_logging", "log_options"]

F = TypeVar("F", bound=Callable[..., Any])

LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def log_options(command: F) -> F:
    """`--log-level LEVEL` and `--log-format text|json`, as `log_level` and `log_format`, both `str | None`."""
    level = click.option(
        "--log-level",
        type=click.Choice(LEVELS, case_sensitive=False),
        default=None,
        help="Least level of the log records of all loggers.  [default: that of the module, or WARNING]",
    )
    form = click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default=None,
        help="Format of log records on stderr; json is one object per line.  [default: that of the module, or text]",
    )
    return level(form(command))


def configure_logging(log_level: str | None, log_format: str | None) -> None:
    """Apply the options; call it after the user's module has been imported, whose handlers stay."""
    if log_level is None and log_format is None:
        return
    root = logging.root
    if log_level is not None:
        root.setLevel(log_level.upper())
    formatter = _JsonFormatter() if log_format == "json" else logging.Formatter(TEXT_FORMAT)
    on_stderr = [one for one in root.handlers if getattr(one, "stream", None) in (sys.stderr, sys.__stderr__)]
    if not on_stderr and (log_format is not None or not root.handlers):
        own = _StderrHandler()
        own.setFormatter(formatter)
        root.addHandler(own)
    elif log_format is not None:
        for handler in on_stderr:
            handler.setFormatter(formatter)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the time: a progress bar replaces it while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The current `sys.stderr`."""
        return sys.stderr


class _JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, attributes, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        fields |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            fields["exception"] = record.exc_text
        if record.stack_info:
            fields["stack"] = record.stack_info
        return json.dumps(fields, default=repr)
