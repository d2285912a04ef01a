"""Coverage-guided fuzzing of the registered parsers with Atheris (libFuzzer): `make fuzz`.

    python -m fuzz.run [--seconds 60] [--jobs 1] [--target NAME ...]
    python -m fuzz.run --target NAME --input FILE

Each target runs in a process of its own, for so many seconds. What its corpus has learned stays in
.cache/fuzz/NAME/corpus; an input that ends in an untyped error, takes longer than TIMEOUT_S or more
memory than RSS_LIMIT_MB stays in .cache/fuzz/NAME/findings, and the command that repeats it is printed.
Exit 1 if there is any. `--input` runs one file without Atheris, for a traceback in peace.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = ROOT / ".cache/fuzz"
MODULES = ("fuzz.agent_targets", "fuzz.sim_targets", "fuzz.cloud_targets")
INSTRUMENTED = [
    "agent",
    "cantools",
    "cbor2",
    "cloud",
    "common",
    "firmware_sim",
    "isotp",
    "keys",
    "tomli",
    "tuf",
]
"""Packages whose branches guide the fuzzer."""
TIMEOUT_S = 10
"""Longest time for one input."""
RSS_LIMIT_MB = 2_048
"""Most memory of one target's process."""
GRACE_S = 120
"""Time for a target's start and end, beside its seconds."""
MAX_WORD_BYTES = 24
MAX_WORDS = 400


def load() -> None:
    """Imports every module with targets."""
    for name in MODULES:
        importlib.import_module(name)


def names() -> list[str]:
    """All targets."""
    from fuzz.registry import TARGETS

    load()
    return sorted(TARGETS)


def fuzz(name: str, seconds: int) -> None:
    """Fuzzes one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        load()
    from fuzz.registry import TARGETS

    logging.disable(logging.CRITICAL)
    target = TARGETS[name]
    folder = WORK / name
    seeds = list(target.seeds())
    for seed in seeds:
        (folder / "corpus" / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    words = folder / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in _words(seeds)), encoding="ascii")

    def one(content: bytes) -> None:
        try:
            target.run(content)
        except Exception:
            # Beside what libFuzzer keeps: a target with threads of its own may end before it can.
            name = f"error-{hashlib.sha256(content).hexdigest()[:16]}"
            (folder / "findings" / name).write_bytes(content)
            raise

    options = [
        f"-max_total_time={seconds}",
        f"-max_len={max(target.max_bytes, *(len(seed) for seed in seeds))}",
        f"-timeout={TIMEOUT_S}",
        f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-artifact_prefix={folder / 'findings'}/",
        f"-dict={words}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], one)
    atheris.Fuzz()


def _words(seeds: list[bytes]) -> list[bytes]:
    """What the fuzzer may put together anew: the words of the seeds."""
    found: dict[bytes, None] = {}
    for seed in seeds:
        for word in re.findall(rb"[\w.~/-]+|[^\w\s]+", seed):
            if 1 < len(word) <= MAX_WORD_BYTES:
                found[word] = None
    return list(found)[:MAX_WORDS]


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def repeat(name: str, path: Path) -> int:
    """Runs one input; an error ends in its traceback."""
    load()
    from fuzz.registry import TARGETS

    taken = TARGETS[name].run(path.read_bytes())
    print(f"{name}: {'taken' if taken else 'refused'}")
    return 0


def run_all(chosen: list[str], seconds: int, jobs: int) -> int:
    """Fuzzes targets, `jobs` at a time, each in its own process; returns 1 if there are findings."""
    with ThreadPoolExecutor(jobs) as pool:
        reports = pool.map(lambda name: _report_of(name, seconds), chosen)
        failed = 0
        for code, report in reports:
            print(report, flush=True)
            failed += bool(code)
    return 1 if failed else 0


def _report_of(name: str, seconds: int) -> tuple[int, str]:
    """Fuzzes one target; returns its exit code and what there is to say of it."""
    for folder in ("corpus", "findings"):
        (WORK / name / folder).mkdir(parents=True, exist_ok=True)
    before = set((WORK / name / "findings").iterdir())
    log = WORK / name / "log"
    code = _run_one(name, seconds, log)
    text = log.read_text(encoding="utf-8", errors="replace")
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", text)
    covered = re.findall(r"cov: (\d+)", text)
    inputs, edges = executed[1] if executed else "?", covered[-1] if covered else "?"
    lines = [f"{name:20} {inputs:>9} inputs, {edges:>6} edges, exit {code}"]
    findings = sorted(set((WORK / name / "findings").iterdir()) - before)
    lines += [f"  finding: make fuzz TARGET={name} INPUT={path.relative_to(ROOT)}" for path in findings]
    if code and not findings:
        lines.append(f"  failed without an input; see {log.relative_to(ROOT)}")
    return code, "\n".join(lines)


def _run_one(name: str, seconds: int, log: Path) -> int:
    command = [sys.executable, "-m", "fuzz.run", "--target", name, "--seconds", str(seconds), "--alone"]
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=seconds + GRACE_S, check=False
            )
        except subprocess.TimeoutExpired:
            return -1
    return done.returncode


def main() -> int:
    """Runs; returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--target", action="append", help="all if not given")
    parser.add_argument("--input", type=Path, help="run this file alone")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.alone:
        fuzz(options.target[0], options.seconds)
        return 0
    known = names()
    chosen = options.target or known
    if unknown := set(chosen) - set(known):
        parser.error(f"no target {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if options.input:
        return repeat(chosen[0], options.input)
    with contextlib.suppress(KeyboardInterrupt):
        return run_all(chosen, options.seconds, options.jobs)
    return 130


if __name__ == "__main__":
    sys.exit(main())
