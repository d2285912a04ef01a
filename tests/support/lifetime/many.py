"""Lives many seeds on all processors, and says which of them broke a promise."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from support.lifetime.life import Outcome, live
from support.lifetime.planted import BUGS

PROGRESS_S = 20.0
_DAYS_IN_YEAR = 365.25


@dataclass
class Report:
    """What many lives came to.

    Args:
        failed: the outcomes in which a promise did not hold.
        elapsed_s: wall time.
    """

    lives: int = 0
    failed: list[Outcome] = field(default_factory=list)
    days: float = 0.0
    segments: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    elapsed_s: float = 0.0

    @property
    def years_per_minute(self) -> float:
        """Simulated vehicle-years in a minute of wall time."""
        return self.days / _DAYS_IN_YEAR / max(self.elapsed_s, 1e-9) * 60

    def __str__(self) -> str:
        return (
            f"{self.lives} lives of {self.days / max(self.lives, 1):.0f} days, the books compared"
            f" {self.segments} times, in {self.elapsed_s:.0f} s: {self.years_per_minute:.0f} vehicle-years"
            f" a minute; {len(self.failed)} failed"
        )


def live_many(
    seeds: Iterable[int], *, bug: str = "", say: Callable[[str], None] = print, until_found: bool = False
) -> Report:
    """Lives the seeds, in any order, on all processors.

    Args:
        bug: one of `planted.BUGS`, or empty.
        until_found: ends with the first life that fails.
    """
    report, begun = Report(), time.monotonic()
    told_s = begun
    for outcome in _outcomes(list(seeds), bug):
        report.lives += 1
        report.days += outcome.days
        report.segments += outcome.segments
        report.happened.update(outcome.happened)
        report.elapsed_s = time.monotonic() - begun
        if outcome.wrong:
            report.failed.append(outcome)
            if not bug:
                say(
                    f"seed {outcome.seed} (replay: FOD_SEED={outcome.seed} make simulate): "
                    + "; ".join(outcome.wrong[:5])
                )
            if until_found:
                break
        if time.monotonic() - told_s > PROGRESS_S:
            told_s = time.monotonic()
            say(str(report))
    return report


def _outcomes(seeds: list[int], bug: str) -> Iterator[Outcome]:
    world_class = BUGS[bug] if bug else None
    work = partial(live, world_class=world_class)
    workers = min(len(seeds), len(os.sched_getaffinity(0)))
    # A worker of pytest-xdist may not fork while other threads run; its neighbours keep the processors busy.
    if workers <= 1 or "PYTEST_XDIST_WORKER" in os.environ:
        yield from map(work, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(work, seeds, chunksize=5)
