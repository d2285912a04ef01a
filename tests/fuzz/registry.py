"""The parsers of bytes from outside, by name, each with genuine inputs to begin from.

A target's function takes any bytes. It returns True if they were taken and False if they were refused
with an error of ours; any other exception is a finding, and so is a hang. Seeds are made when they are
asked for, from the project's own examples and from keys that are made at run time.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 16_384
"""Longest input that a target gets, unless it says otherwise."""


@dataclass(frozen=True)
class Target:
    """One parser.

    Args:
        run: parses; returns whether the bytes were taken.
        seeds: makes genuine inputs, each of which `run` takes.
        max_bytes: longest input.
    """

    name: str
    run: Callable[[bytes], bool]
    seeds: Callable[[], Iterable[bytes]]
    max_bytes: int


TARGETS: dict[str, Target] = {}


def target(
    name: str, seeds: Callable[[], Iterable[bytes]], *, max_bytes: int = MAX_BYTES
) -> Callable[[Callable[[bytes], bool]], Callable[[bytes], bool]]:
    """Registers a function under a name."""

    def register(run: Callable[[bytes], bool]) -> Callable[[bytes], bool]:
        assert name not in TARGETS, name
        TARGETS[name] = Target(name, run, seeds, max_bytes)
        return run

    return register


def register(
    name: str,
    parse: Callable[[bytes], object],
    refusal: type[Exception] | tuple[type[Exception], ...],
    seeds: Callable[[], Iterable[bytes]],
    *,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Registers a parser that raises `refusal` and nothing else."""

    @target(name, seeds, max_bytes=max_bytes)
    def run(content: bytes) -> bool:
        try:
            parse(content)
        except refusal:
            return False
        return True


def cut(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Reads pieces, each with a number from 0 to 15 and 0 to 15 bytes."""
    at = 0
    while at < len(content):
        size = content[at] & 0x0F
        yield content[at] >> 4, content[at + 1 : at + 1 + size]
        at += 1 + size


def joined(*pieces: tuple[int, bytes]) -> bytes:
    """Writes pieces: the inverse of `cut`."""
    return b"".join(bytes([number << 4 | len(data)]) + data for number, data in pieces)


def chosen(content: bytes, count: int) -> tuple[int, bytes]:
    """Reads a choice among `count` from the first byte; returns it and the rest."""
    return (content[0] % count if content else 0), content[1:]


@functools.cache
def scratch() -> Path:
    """A folder for parsers that want a path; removed at the end of the process."""
    folder = tempfile.TemporaryDirectory(prefix="openfod-fuzz-")
    _folders.append(folder)
    return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []
