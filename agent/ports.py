"""What adapters take from outside, so that tests can replace it.

The engine needs no port: it takes events and gives commands (agent/engine.py).
"""

from __future__ import annotations

from typing import Protocol


class Random(Protocol):
    """The agent's source of randomness."""

    def token(self, size: int) -> bytes:
        """`size` bytes that nobody can predict."""
        ...

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high], for jitter."""
        ...
