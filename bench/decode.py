"""Decoding the frames of a real car: the agent's collector beside cantools, in one run."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from agent.adapters.bus import RawFrame
from agent.adapters.replay import replay_log
from agent.signals.database import load as load_database
from agent.signals.mapping import MappingEntry
from agent.signals.plan import DecodePlan
from agent.signals.state import Collector

DATA = Path(os.environ.get("OPENFOD_TEST_DATA", "../shared/data"))
LOG = DATA / "civic_typeR_turnonanddrive.log"
DBC = DATA / "honda_civic_touring_2016_can_generated.dbc"
ROUNDS = 5


def main() -> None:
    """Prints microseconds per frame of a known message; skipped without the log."""
    if not LOG.exists():
        print(f"skipped: {LOG} is not here (set OPENFOD_TEST_DATA)")
        return
    database = load_database(DBC)
    entries = [
        MappingEntry(message=m.name, signal=s.name, vss=f"Bench.M{i}.S{j}", max_age_ms=1000)
        for i, m in enumerate(database.messages.values())
        for j, s in enumerate(m.signals)
    ]
    plan = DecodePlan.compile(database, entries, "b", [e.vss for e in entries])
    by_id = {m.frame_id: m for m in database.messages.values()}
    frames = [f for f in replay_log(LOG, "b") if f.can_id in by_id]
    raw = [RawFrame(f.can_id, f.data, f.monotonic_ns) for f in frames]
    ours, theirs = [], []
    for _ in range(ROUNDS):
        collector = Collector([plan])
        begun = time.process_time()
        collector.feed("b", raw)
        ours.append(time.process_time() - begun)
        begun = time.process_time()
        for frame in frames:
            by_id[frame.can_id].decode(frame.data, decode_choices=False, allow_truncated=True)
        theirs.append(time.process_time() - begun)
    scale = 1e6 / len(frames)
    own, peer = statistics.median(ours) * scale, statistics.median(theirs) * scale
    print(f"all signals of {len(frames)} frames: ours {own:.2f} µs a frame, cantools {peer:.2f}")
    print(f"ratio of medians {peer / own:.2f}")
