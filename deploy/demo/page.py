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
        self._is_open = False
        self.steps: list[Step] = []
        """In the order of the story."""

    def chapter(self, title: str) -> None:
        """Begins a chapter."""
        self._chapter += 1
        self._gap()
        print(f"{self._chapter}. {title}\n", flush=True)

    def say(self, text: str) -> None:
        """A paragraph."""
        self._wrapped(text, first="", rest="")

    def command(self, line: str, output: str, *, most: int = MAX_LINES) -> None:
        """A command as one would type it, and the first lines of what it printed."""
        self._gap()
        print(f"{_INDENT}$ {line}", flush=True)
        self._is_open = True
        lines = output.splitlines()
        for text in lines[:most]:
            print(f"{_INDENT}  {_shortened(text)}".rstrip())
        if len(lines) > most:
            print(f"{_INDENT}  … {len(lines) - most} more lines")
        if lines:
            self._gap()

    def live(self, line: str) -> None:
        """One line of what goes on now."""
        print(f"{_INDENT}| {line}", flush=True)
        self._is_open = True

    def log(self, name: str, lines: list[str]) -> None:
        """Lines of a program's log, without date, level, module and trace-ids."""
        for line in lines:
            moment, _level, _module, *rest = line.split()
            words = [w for w in rest if not w.startswith(("trace_id", "grant_trace_id"))]
            self._wrapped(f"{name} {moment[11:23]} {' '.join(words)}", first="  ", rest=" " * 8)
        self._gap()

    def table(self, headers: list[str], rows: list[tuple[str, ...]]) -> None:
        """A small table."""
        cells = [headers, *map(list, rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
        for row in cells:
            print(_INDENT + "  " + "   ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)))
        self._is_open = True
        self._gap()

    def check(self, expected: str, found: object, *, held: bool) -> None:
        """Notes whether an expectation held.

        Raises:
            StepFailedError: it did not.
        """
        step = Step(self._chapter, expected, str(found), held)
        self.steps.append(step)
        self._wrapped(f"{'[ok]' if held else '[FAILED]'} {expected}: {step.found}", first="", rest=" " * 5)
        if not held:
            raise StepFailedError(f"chapter {step.chapter}: expected: {expected}; found: {step.found}")

    def summary(self) -> None:
        """The table of everything that was expected."""
        self._gap()
        cli.print_table(
            ["", "expected", "found", "held"],
            [(s.chapter, s.expected, _cut(s.found, 52), "yes" if s.held else "NO") for s in self.steps],
        )

    def _wrapped(self, text: str, *, first: str, rest: str) -> None:
        first, rest = _INDENT + first, _INDENT + rest
        print(textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=rest), flush=True)
        self._is_open = True

    def _gap(self) -> None:
        """An empty line, unless there is one already."""
        if self._is_open:
            print(flush=True)
        self._is_open = False


def _shortened(line: str) -> str:
    """A line that fits; of a request and its answer, the answer stays whole."""
    request, arrow, answer = line.partition(_ARROW)
    if arrow and len(line) > WIDTH:
        return f"{request[:47]} …{arrow}{answer}"
    return _cut(line, WIDTH)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + " …"
