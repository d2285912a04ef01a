"""What the demonstration prints: numbered chapters, commands with their output, and what held."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from common import cli

WIDTH = 118
"""Longest line, characters."""
MAX_LINES = 12
"""Longest output of a command that is shown whole."""
_INDENT = "   "
_ARROW = " -> "


class StepFailedError(Exception):
    """An expectation of the story did not hold."""


@dataclass(frozen=True)
class Step:
    """An expectation, and what was found."""

    chapter: int
    expected: str
    found: str
    held: bool


class Page:
    """Prints the story and keeps what was expected and what was found."""

    def __init__(self) -> None:
        self._chapter = 0
        self.steps: list[Step] = []
        """In the order of the story."""

    def chapter(self, title: str) -> None:
        """Begins a chapter."""
        self._chapter += 1
        print(f"\n{self._chapter}. {title}\n", flush=True)

    def say(self, text: str) -> None:
        """A paragraph."""
        _wrapped(text, first="", rest="")

    def command(self, line: str, output: str, *, most: int = MAX_LINES) -> None:
        """A command as one would type it, and the first lines of what it printed."""
        print(f"{_INDENT}$ {line}")
        lines = output.splitlines()
        for text in lines[:most]:
            print(f"{_INDENT}  {_shortened(text)}".rstrip())
        if len(lines) > most:
            print(f"{_INDENT}  … {len(lines) - most} more lines")
        print(flush=True)

    def live(self, line: str) -> None:
        """One line of what goes on now."""
        print(f"{_INDENT}| {line}", flush=True)

    def log(self, name: str, lines: list[str]) -> None:
        """Lines of a program's log, without date and trace-ids."""
        for line in lines:
            moment, _, rest = line.partition(" ")
            words = [w for w in rest.split() if not w.startswith(("trace_id", "grant_trace_id"))]
            _wrapped(f"{name} {moment[11:23]} {' '.join(words)}", first="  ", rest=" " * 8)
        print(flush=True)

    def table(self, headers: list[str], rows: list[tuple[str, ...]]) -> None:
        """A small table."""
        cells = [headers, *map(list, rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
        for row in cells:
            print(_INDENT + "  " + "   ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)))
        print(flush=True)

    def check(self, expected: str, found: object, *, held: bool) -> None:
        """Notes whether an expectation held.

        Raises:
            StepFailedError: it did not.
        """
        step = Step(self._chapter, expected, str(found), held)
        self.steps.append(step)
        _wrapped(f"{'[ok]' if held else '[FAILED]'} {expected}: {step.found}", first="", rest=" " * 5)
        if not held:
            raise StepFailedError(f"chapter {step.chapter}: expected: {expected}; found: {step.found}")

    def summary(self) -> None:
        """The table of everything that was expected."""
        print()
        cli.print_table(
            ["", "expected", "found", "held"],
            [(s.chapter, s.expected, _cut(s.found, 52), "yes" if s.held else "NO") for s in self.steps],
        )


def _wrapped(text: str, *, first: str, rest: str) -> None:
    lines = textwrap.fill(text, WIDTH, initial_indent=_INDENT + first, subsequent_indent=_INDENT + rest)
    print(lines, flush=True)


def _shortened(line: str) -> str:
    """A line that fits; of a request and its answer, the answer stays whole."""
    request, arrow, answer = line.partition(_ARROW)
    if arrow and len(line) > WIDTH:
        return f"{request[:47]} …{arrow}{answer}"
    return _cut(line, WIDTH)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + " …"
