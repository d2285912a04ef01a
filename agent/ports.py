"""What the engine's surroundings must provide; adapters implement it.

The engine itself takes events and gives commands (agent/engine.py); these
protocols are for the loop in agent/app.py and for tests that replace an edge.
"""

from __future__ import annotations

from typing import Protocol

from agent.model import Frame


class Clock(Protocol):
    """The two clocks of the agent."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since boot, suspend included; never goes back."""
        ...

    def wall_ms(self) -> int:
        """The system's Unix time in milliseconds; not trusted."""
        ...

    def boot_id(self) -> str:
        """Identifier of this boot: monotonic times compare only within one."""
        ...


class Random(Protocol):
    """The agent's source of randomness."""

    def token(self, size: int) -> bytes:
        """`size` bytes that nobody can predict."""
        ...

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high], for jitter."""
        ...


class Bus(Protocol):
    """A bus that frames can be sent to."""

    def send(self, frame: Frame) -> None:
        """Sends one frame.

        Raises:
            VehicleError: it could not be sent.
        """
        ...
