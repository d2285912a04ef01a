"""The machine's clocks and randomness; everything else gets times handed in."""

from __future__ import annotations

import os
import random
import secrets
import time
from pathlib import Path


class SystemClock:
    """The clocks of a Linux machine.

    The monotonic clock is CLOCK_BOOTTIME: unlike CLOCK_MONOTONIC it goes on
    while the machine is suspended, which is time in which a feature may be on.
    """

    def monotonic_ns(self) -> int:
        """Nanoseconds since boot, suspend included."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def wall_ns(self) -> int:
        """The system's Unix time in nanoseconds; not trusted."""
        return time.time_ns()

    def process_age_ms(self) -> int:
        """Milliseconds since this process began, to a clock tick of 10 ms (proc_pid_stat(5), starttime)."""
        try:
            stat = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
            ticks = int(stat.rpartition(")")[2].split()[19])
        except (OSError, ValueError, IndexError):
            return 0
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000 - ticks * 1000 // os.sysconf(
            "SC_CLK_TCK"
        )

    def boot_id(self) -> str:
        """Identifier of this boot (random(4), /proc/sys/kernel/random/boot_id)."""
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except OSError:
            # Without one, no two monotonic times are ever compared across a restart.
            return secrets.token_hex(16)


class SystemRandom:
    """Random port on the system's generator."""

    def token(self, size: int) -> bytes:
        """`size` unpredictable bytes."""
        return secrets.token_bytes(size)

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high], for jitter; not for secrets."""
        return random.uniform(low, high)  # noqa: S311
