"""Structured logging: a sentence for people, and fields for machines.

Text goes to standard error as one line a record, in journald's habit of
KEY=value fields, or as one JSON object a line. Nothing that is logged can make
a line of its own, or reach the terminal as a control code: what another side
sent may be logged as it is. Never pass a secret as a field.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from datetime import UTC, datetime

_FIELDS = "openfod_fields"


class Log:
    """A named logger whose keyword arguments become the record's fields."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, **fields: object) -> None:
        """Details for a developer."""
        self._emit(logging.DEBUG, message, fields)

    def info(self, message: str, **fields: object) -> None:
        """What an operator wants to see."""
        self._emit(logging.INFO, message, fields)

    def warning(self, message: str, **fields: object) -> None:
        """Something went wrong and was handled."""
        self._emit(logging.WARNING, message, fields)

    def error(self, message: str, **fields: object) -> None:
        """Something went wrong and needs a person."""
        self._emit(logging.ERROR, message, fields)

    def _emit(self, level: int, message: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", message, extra={_FIELDS: fields})


def get(name: str) -> Log:
    """Returns the logger of a module."""
    return Log(name)


def configure(level: str = "info", form: str = "text") -> None:
    """Sends all records to standard error.

    Args:
        level: "debug", "info", "warning" or "error".
        form: "text" or "json".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Libraries speak only when something is wrong.
    for noisy in ("can", "isotp", "tuf", "alembic", "urllib3", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, _FIELDS, {})
        words = [f"{k}={_quote(v)}" for k, v in fields.items()]
        message = printable(record.getMessage())
        line = " ".join([_time(record), f"{record.levelname:7}", f"{record.name}:", message, *words])
        if record.exc_info:
            # Indented, so that no line of it can pass for a record.
            trace = self.formatException(record.exc_info).split("\n")
            line += "".join(f"\n    {printable(part)}" for part in trace)
        return line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in getattr(record, _FIELDS, {}).items():
            entry[f"{name}_" if name in entry else name] = _finite(value)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def printable(text: str) -> str:
    """`text` as one line without control codes: those are written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _quote(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    return printable(json.dumps(text, ensure_ascii=False))


def _finite(value: object) -> object:
    """JSON has no word for a float that is not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
