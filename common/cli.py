"""What the command lines have in common: exit codes and ways of printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from common.log import printable

EXIT_DONE = 0
"""Everything that was asked for was done."""
EXIT_FAILED = 1
"""Something that was asked for could not be done."""
EXIT_USAGE = 2
"""The command line or the configuration is wrong."""


def print_json(value: object) -> None:
    """Prints one JSON document to standard output."""
    json.dump(value, sys.stdout, indent=2, default=str, ensure_ascii=False)
    sys.stdout.write("\n")


def print_event(event: str, **fields: object) -> None:
    """Prints one event as a JSON line, at once, for a program that waits for it."""
    sys.stdout.write(json.dumps({"event": event, **fields}, default=str) + "\n")
    sys.stdout.flush()


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under headers, in columns as wide as they need."""
    cells = [[printable(str(c)) for c in row] for row in rows]
    widths = [max(len(h), *(len(r[i]) for r in cells)) if cells else len(h) for i, h in enumerate(headers)]
    for row in [list(headers), ["-" * w for w in widths], *cells]:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def fail(message: str, *, code: int = EXIT_FAILED) -> int:
    """Prints why a command did not do its work, and returns the exit code."""
    for line in message.splitlines():
        print(f"error: {printable(line)}", file=sys.stderr)
    return code
