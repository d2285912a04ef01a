"""Power cuts of the real journal on ext4, in a guest whose disk has a volatile cache.

    python -m tools.powercut --cuts 5              # nothing acknowledged may be missing
    python -m tools.powercut --cuts 1 --control    # without barriers: something must be missing

QEMU's blklogwrites driver logs every write and flush of the guest's disk. The
guest is killed at a random moment, the disk thrown away and built anew from the
log: all that was there at the last flush, and a random part of what was written
since, as a cache without power leaves it. The file system replays its own
journal (e2fsck), and the agent's journal is opened and compared with what was
acknowledged. Exit status 77: there can be no guest here, and why.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from support.real_journal import RealJournal, follow_chain, totals, use
from tools import guest

from agent.errors import JournalError

DISK = replace(
    guest.QEMU,
    name="qemu-disk",
    modules=(*guest.QEMU.modules, "virtio_blk", "crc32c_generic", "ext4"),
    late_modules=(),
)
"""An emulated machine that knows ext4 on a virtio disk."""
DISK_BYTES = 64 * 1024 * 1024
BOOT_S, RUN_S = 150.0, 12.0
"""Longest wait for the first commit; longest time from there to the cut."""
FEWEST_ACKS = 30
MAGIC = 0x6A736677736872
"""Of a log of writes (Documentation/admin-guide/device-mapper/log-writes.rst)."""
FLUSH, FUA, DISCARD = 1, 2, 4


class WriterError(Exception):
    """The writer did not come to write; the text holds what the guest said."""


class Write(NamedTuple):
    """One entry of the log."""

    offset: int
    content: bytes
    flags: int
    length: int


def read_log(path: Path) -> Iterator[Write]:
    """The whole entries of a log; its last one may have been cut."""
    with path.open("rb") as file:
        magic, version, _, sector = struct.unpack("<QQQI", file.read(28))
        if (magic, version) != (MAGIC, 1):
            raise ValueError(f"{path} is no log of writes")
        position = sector
        while True:
            file.seek(position)
            head = file.read(32)
            if len(head) < 32:
                return
            first, count, flags, _ = struct.unpack("<QQQQ", head)
            if not (first or count or flags):
                return
            position += sector
            content = b""
            if not flags & DISCARD:
                file.seek(position)
                content = file.read(count * sector)
                if len(content) < count * sector:
                    return
                position += count * sector
            yield Write(first * sector, content, flags, count * sector)


def rebuild(log: Path, base: Path, disk: Path, dice: random.Random) -> tuple[int, int]:
    """Builds the disk that the cut leaves; returns how many flushes there were, and writes that are lost."""
    writes = list(read_log(log))
    flushes = [i for i, write in enumerate(writes) if write.flags & FLUSH]
    last, lost = (flushes[-1] if flushes else -1), 0
    shutil.copyfile(base, disk)
    with disk.open("r+b") as file:
        for i, write in enumerate(writes):
            if i > last and not write.flags & FUA and dice.random() < 0.5:
                lost += 1
                continue
            file.seek(write.offset)
            file.write(bytes(write.length) if write.flags & DISCARD else write.content)
    return len(flushes), lost


def cut(work: Path, base: Path, options: str, dice: random.Random) -> int:
    """Lets the writer run in a guest and kills it; returns the last number it acknowledged."""
    kernel, share = guest.prepare(DISK), Path.cwd()
    disk, log = work / "disk.img", work / "log"
    shutil.copyfile(base, disk)
    log.write_bytes(b"")
    program = f"{sys.executable} -m tools.powercut_writer /mnt"
    command = ["sh", "-c", f"mount -t ext4 -o {options} /dev/vda /mnt && exec {program}"]
    env = {"PYTHONPATH": ".:tests", "PYTHONDONTWRITEBYTECODE": "1"}
    (work / "initrd").write_bytes(guest._memory_disk(DISK, kernel, share, command, env))
    pipes = {name: os.pipe() for name in ("out", "err", "ctl", "console")}
    readers = {name: pipe[0] for name, pipe in pipes.items()}
    writers = {name: pipe[1] for name, pipe in pipes.items()}
    logged = f"driver=blklogwrites,file.driver=file,file.filename={disk},log.driver=file,log.filename={log}"
    arguments = [
        *guest._qemu_arguments(work, writers, kernel, share),
        "-drive",
        f"{logged},log-sector-size=512,log-super-update-interval=1,if=virtio,cache=writeback",
    ]
    said = dict.fromkeys(readers, b"")
    with guest._started(arguments, writers, work) as process:
        ends_s, seen = time.monotonic() + BOOT_S, False
        while time.monotonic() < ends_s and process.poll() is None:
            for reader in select.select(list(readers.values()), [], [], 0.2)[0]:
                name = next(n for n, r in readers.items() if r == reader)
                said[name] += os.read(reader, 65536)
            if not seen and said["out"].count(b"\n") >= FEWEST_ACKS:
                seen, ends_s = True, time.monotonic() + dice.uniform(0.1, RUN_S)
    while select.select([readers["out"]], [], [], 0)[0] and (more := os.read(readers["out"], 65536)):
        said["out"] += more
    for reader in readers.values():
        os.close(reader)
    acks = [line for line in said["out"].split(b"\n")[:-1] if line.startswith(b"ACK ")]
    if len(acks) < FEWEST_ACKS:
        tail = (said["err"] + said["console"])[-3000:].decode(errors="replace")
        monitor = (work / "monitor.log").read_text(errors="replace")[-2000:]
        raise WriterError(f"the writer did not come to write: {tail} {monitor}")
    return int(acks[-1].split()[1])


def found(disk: Path, work: Path) -> int:
    """How many windows the journal on a disk holds, exactly and in one chain.

    Raises:
        JournalError: it is not whole.
    """
    subprocess.run(["e2fsck", "-fy", str(disk)], check=False, capture_output=True)
    folder = work / "found"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("agent.db", "agent.db-wal"):
        subprocess.run(
            ["debugfs", "-R", f"dump /{name} {folder / name}", str(disk)], check=True, capture_output=True
        )
    if not (folder / "agent.db").exists() or not (folder / "agent.db").stat().st_size:
        raise JournalError("agent.db is not there")
    if not (folder / "agent.db-wal").exists() or not (folder / "agent.db-wal").stat().st_size:
        (folder / "agent.db-wal").unlink(missing_ok=True)
    journal = RealJournal(folder / "agent.db")
    kept = journal.kept()
    journal.store.close()
    follow_chain(kept)
    count = sum(r.merged.records if r.HasField("merged") else 1 for r in kept)
    values = sum(value for value, _ in totals(kept).values())
    if values != sum(use(number).value for number in range(1, count + 1)):
        raise JournalError(f"{count} windows do not add up to what they were")
    return count


def main() -> int:
    """Cuts the power as often as asked; exit status 1 if the promise, or the control, does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tools.powercut", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cuts", type=int, default=3)
    parser.add_argument("--control", action="store_true", help="without barriers: it must lose something")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    asked = parser.parse_args()
    dice, lost_any = random.Random(asked.seed), False
    options = "noatime,nobarrier" if asked.control else "noatime"
    missing = [name for name in ("mke2fs", "e2fsck", "debugfs") if shutil.which(name) is None]
    if missing:
        print(f"skipped: no {', '.join(missing)} here (e2fsprogs)", file=sys.stderr)
        return guest.SKIPPED
    with tempfile.TemporaryDirectory(prefix="openfod-powercut-") as made:
        work = Path(made)
        base = work / "base.img"
        with base.open("wb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", str(base)], check=True)
        for number in range(1, asked.cuts + 1):
            begun = time.monotonic()
            try:
                acked = cut(work, base, options, dice)
            except guest.NoGuestError as error:
                print(f"skipped: no guest here: {error}", file=sys.stderr)
                return guest.SKIPPED
            except WriterError as error:
                print(error, file=sys.stderr)
                return 1
            flushes, dropped = rebuild(work / "log", base, work / "cut.img", dice)
            try:
                held = found(work / "cut.img", work)
                problem = "" if held >= acked else f"{acked - held} acknowledged windows are missing"
            except (JournalError, AssertionError, subprocess.CalledProcessError) as error:
                held, problem = 0, f"the journal is not whole: {error}"
            lost_any |= bool(problem)
            print(
                f"cut {number}: {acked} acknowledged, {held} found; {flushes} flushes, {dropped} writes lost;"
                f" {problem or 'nothing acknowledged is missing'} ({time.monotonic() - begun:.0f} s)",
                flush=True,
            )
    if lost_any is not asked.control:
        print(f"seed {asked.seed}: " + ("the control lost nothing" if asked.control else "LOST"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
