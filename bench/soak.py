"""An hour at full load: memory, processor time, wake-ups and journal of a running agent (`make soak`).

The real cloud, vehicle and agent, with a granted feature that is metered. Beside the vehicle's bus, the
agent reads a second one: a serial adapter that carries a full 500 kbit/s bus (4,500 frames/s), 17 % of its
frames subscribed, each with a value that changes. Prints a line a minute; exits with 1 if memory grew or
passed the limit, or if a frame was lost and not said.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from deploy.demo.stage import VIN, Stage

SECONDS = int(os.environ.get("SECONDS", "3600"))
RATE = 4_500
"""Frames a second: a full bus of 500 kbit/s."""
IDS, SUBSCRIBED = 100, 17
MAX_MB = 96
MAX_GROWTH_MB = 2.0
"""Of the median of the last quarter above that of the second: more is growth."""
LOG_FRAMES = 90_000
STEP_S = 60


@dataclass(frozen=True)
class Sample:
    """What the system says of the agent's process, and the agent of itself."""

    at_s: float
    rss_mb: float
    cpu_s: float
    switches: int
    database_mb: float
    records: int
    frames: int
    lost: int


def main() -> None:
    """Runs for SECONDS, in steps of a minute."""
    with tempfile.TemporaryDirectory(prefix="openfod-") as folder, Stage(Path(folder) / "soak") as stage:
        _begin(stage)
        samples = [_sample(stage)]
        print(f"{'min':>4} {'RSS MB':>7} {'CPU %':>6} {'wake-ups/s':>10} {'frames/s':>8} {'lost':>5} "
              f"{'records':>8} {'db MB':>6}")  # fmt: skip
        begun, step_s = samples[0].at_s, min(STEP_S, SECONDS / 4)
        while samples[-1].at_s - begun < SECONDS:
            time.sleep(step_s)
            samples.append(_sample(stage))
            _print(samples[-2], samples[-1], begun)
    sys.exit(_judged(samples))


def _begin(stage: Stage) -> None:
    stage.done("fod-keys", "init", stage.keys)
    stage.done("fod-keys", "sign-catalogue", stage.keys, "deploy/demo/catalogue", stage.folder / "catalogue")
    stage.start_cloud()
    stage.start_vehicle()
    config = ("--json", "--config", stage.cloud_config)
    ecu = stage.seat_ecu
    claim = stage.done("fod-cloud", "vehicle", "add", VIN, "--ecu", ecu, *config).data["claim_token"]
    line = stage.folder / "load.tty"
    log = _write_load(stage.folder)
    words = ("--log", log, "--rate", str(RATE), "--seconds", str(SECONDS + 120), "--link", line)
    stage.start("load", "fod-sim", "adapter", *words)
    agent = stage.write_agent_config()
    agent.write_text(agent.read_text() + _second_bus(stage.folder, line))
    stage.done("fod-agent", "enroll", "--config", agent, "--claim", claim)
    stage.start_agent()
    stage.done("fod-cloud", "grant", VIN, "seat-heating-monthly", "--account", "acc-soak", "--wait", *config)
    stage.tell("seat 2")
    stage.tell("drive 0 1369")


def _write_load(folder: Path) -> Path:
    """A database, a mapping and a log of a full bus; ids in turn, each with a counter that moves."""
    names = [f"LOAD_{number}" for number in range(IDS)]
    messages = [
        f'BO_ {0x100 + i} {name}: 8 ECU\n SG_ Value : 0|32@1+ (0.1,0) [0|0] "km/h" Agent\n'
        for i, name in enumerate(names)
    ]
    (folder / "load.dbc").write_text('VERSION ""\n\nBU_: ECU Agent\n\n' + "\n".join(messages))
    mapped = [
        f'[[signals]]\nvss = "Vehicle.Load.Value{i}"\nmessage = "{name}"\nsignal = "Value"\n'
        f'unit = "km/h"\nmax_age_ms = 1000\n'
        for i, name in enumerate(names[:SUBSCRIBED])
    ]
    (folder / "load.toml").write_text("\n".join(mapped))
    log = folder / "load.log"
    with log.open("w") as file:
        for number in range(LOG_FRAMES):
            payload = (number // IDS).to_bytes(4, "little") + bytes(4)
            file.write(f"({number / RATE:.6f}) can0 {0x100 + number % IDS:03X}#{payload.hex().upper()}\n")
    return log


def _second_bus(folder: Path, line: Path) -> str:
    return (
        f'\n[[buses]]\nname = "load"\ninterface = "slcan"\nchannel = "{line}"\nbitrate = 500000\n'
        f'database = "{folder / "load.dbc"}"\nsignals = "{folder / "load.toml"}"\n'
    )


def _sample(stage: Stage) -> Sample:
    process = Path(f"/proc/{stage.agent.pid}")
    status = stage.status()
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    switches = sum(
        int(text.split()[1])
        for task in (process / "task").iterdir()
        for text in (task / "status").read_text().splitlines()
        if text.startswith("voluntary_ctxt_switches")
    )
    memory = next(text for text in (process / "status").read_text().splitlines() if text.startswith("VmRSS"))
    counts = status["bus_counts"]["load"]
    return Sample(
        at_s=time.monotonic(),
        rss_mb=int(memory.split()[1]) / 1024,
        cpu_s=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        switches=switches,
        database_mb=sum(p.stat().st_size for p in stage.device_folder().glob("agent.db*")) / 2**20,
        records=status["journal"]["records"],
        frames=counts["frames"],
        lost=counts["lost"] + counts.get("dropped", 0),
    )


def _print(before: Sample, now: Sample, begun: float) -> None:
    took_s = now.at_s - before.at_s
    print(
        f"{(now.at_s - begun) / 60:4.0f} {now.rss_mb:7.1f} {(now.cpu_s - before.cpu_s) / took_s * 100:6.1f} "
        f"{(now.switches - before.switches) / took_s:10.0f} {(now.frames - before.frames) / took_s:8.0f} "
        f"{now.lost:5} {now.records:8} {now.database_mb:6.2f}",
        flush=True,
    )


def _judged(samples: list[Sample]) -> int:
    quarter = max(1, len(samples) // 4)
    early = statistics.median(s.rss_mb for s in samples[quarter : 2 * quarter] or samples)
    late = statistics.median(s.rss_mb for s in samples[-quarter:])
    first, last = samples[0], samples[-1]
    took_s = last.at_s - first.at_s
    highest = max(s.rss_mb for s in samples)
    print(
        f"{took_s / 60:.0f} min: memory at most {highest:.1f} MB (goal ≤ {MAX_MB}), {late - early:+.1f} MB"
        f" from second to last quarter; CPU {(last.cpu_s - first.cpu_s) / took_s * 100:.1f} % of a core; "
        f"{(last.switches - first.switches) / took_s:.0f} wake-ups/s; lost {last.lost}; "
        f"{last.records - first.records} records, database {last.database_mb:.2f} MB"
    )
    return int(highest > MAX_MB or late - early > MAX_GROWTH_MB or last.lost > 0)


if __name__ == "__main__":
    main()
