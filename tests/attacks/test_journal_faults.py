"""Every fault of the disk under the journal has a known outcome, and none loses or invents use."""

from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.agent_world import SOURCE, AgentWorld
from support.real_journal import RealJournal, follow_chain, totals, use

from agent import events as ev
from agent.adapters.journal import Restart
from agent.errors import JournalError, RestartError
from agent.metering.record import RESTART_DOMAIN
from openfod.usage.v1 import usage_pb2

# In a mount namespace of its own: a file system of 1 MB that gets full, or read-only.
MOUNTED = """
import subprocess, sys
from pathlib import Path
from agent.errors import JournalError
from support.real_journal import RealJournal, totals
folder = Path(sys.argv[1])
def sh(*words): subprocess.run(words, check=True)
sh("mount", "-t", "tmpfs", "-o", "size=1M", "disk", str(folder))
journal = RealJournal(folder / "state" / "agent.db")
journal.add(200)
"""


def in_a_file_system_of_its_own(folder: Path, story: str) -> str:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1) here")
    program = MOUNTED + textwrap.dedent(story)
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", sys.executable, "-c", program, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["tests", "."])},
        cwd=Path(__file__).parents[2],
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_full_disk_loses_nothing_and_goes_on_once_there_is_space(tmp_path: Path) -> None:
    said = in_a_file_system_of_its_own(
        tmp_path,
        """
        (folder / "ballast").write_bytes(bytes(300_000))
        before, refused = journal.head, 0
        for _ in range(40):
            held, booked = journal.head, len(journal.booked)
            try:
                journal.add(100)
            except JournalError as error:
                refused += 1
                print(error)
                assert journal.store.load().head == held == journal.head
                assert len(journal.booked) == booked
        assert refused > 5
        (folder / "ballast").unlink()
        journal.add(100)
        assert totals(journal.kept()) == totals(journal.booked)
        journal.store.close()
        journal.open()
        assert totals(journal.kept()) == totals(journal.booked)
        """,
    )
    assert "cannot be written: database or disk is full" in said


def test_read_only_file_system_is_refused_at_start_and_waited_for_while_running(tmp_path: Path) -> None:
    said = in_a_file_system_of_its_own(
        tmp_path,
        """
        journal.store.close()
        sh("mount", "-o", "remount,ro", str(folder))
        try:
            journal.open()
        except JournalError as error:
            print("at start:", error)
        sh("mount", "-o", "remount,rw", str(folder))
        journal.open()
        assert totals(journal.kept()) == totals(journal.booked)
        """,
    )
    assert "agent.db cannot be opened: Read-only file system" in said


def test_io_error_changes_nothing_and_the_next_write_holds(tmp_path: Path) -> None:
    journal = RealJournal(tmp_path / "agent.db")
    journal.add(300)
    before, booked = journal.store.load(), len(journal.booked)
    size = tmp_path.joinpath("agent.db-wal").stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in range(3):
        # The kernel refuses each write beyond this size: to SQLite an I/O error.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(JournalError, match="disk I/O error"):
                journal.add(1_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        assert journal.store.load() == before
        assert len(journal.booked) == booked
    journal.add(1_000)
    assert totals(journal.kept()) == totals(journal.booked)
    journal.store.close()


def test_torn_log_leaves_whole_commits_only(tmp_path: Path) -> None:
    journal = RealJournal(tmp_path / "agent.db")
    journal.store.close()
    journal.open()
    for _ in range(6):
        journal.add(20)
    log, base = (tmp_path / "agent.db-wal").read_bytes(), (tmp_path / "agent.db").read_bytes()
    dice = random.Random(2)
    lengths = set[int]()
    for size in (*range(0, len(log), 512 * 5), len(log)):
        for rest in (b"", bytes(4096), dice.randbytes(4096)):
            torn = tmp_path / f"torn-{size}-{len(lengths)}-{len(rest)}-{rest[:2].hex()}"
            torn.mkdir()
            (torn / "agent.db").write_bytes(base)
            (torn / "agent.db-wal").write_bytes(log[:size] + rest)
            copy = RealJournal(torn / "agent.db")
            kept = copy.kept()
            follow_chain(kept)
            assert kept == journal.booked[: len(kept)]
            lengths.add(len(kept))
            copy.store.close()
            shutil.rmtree(torn)
    assert lengths == {0, 20, 40, 60, 80, 100, 120}
    journal.store.close()


def test_corrupt_page_is_found_at_start_and_the_file_is_kept(tmp_path: Path) -> None:
    journal = RealJournal(tmp_path / "agent.db")
    journal.add(1_000)
    journal.store.close()
    good, dice = (tmp_path / "agent.db").read_bytes(), random.Random(4)
    found = 0
    for page in range(4096, len(good) - 4096, 4096 * 9):
        damaged = good[:page] + dice.randbytes(4096) + good[page + 4096 :]
        (tmp_path / "agent.db").write_bytes(damaged)
        with pytest.raises(JournalError, match="put a backup in its place"):
            journal.open()
        assert (tmp_path / "agent.db").read_bytes() == damaged
        found += 1
    assert found > 5


def test_store_that_fails_kills_the_journal_and_a_write_that_holds_revives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.app.STORE_RETRY_S", 0.01)
    world = AgentWorld(tmp_path)
    with world.boot() as life:
        app = life.app
        tries = []

        def job() -> None:
            tries.append(1)
            if len(tries) < 6:
                raise JournalError("agent.db cannot be written: disk I/O error")

        app._write(job, ev.Persisted(99))
        said: list[object] = [app._queue.get(timeout=5) for _ in range(3)]
        assert said == [
            ev.JournalDead("agent.db cannot be written: disk I/O error"),
            ev.Persisted(99),
            ev.JournalAlive(),
        ]
        app._step(ev.JournalDead("agent.db cannot be written: disk I/O error"))
        (problem,) = life.status["problems"]
        assert "use cannot be written down" in problem
        assert "free space" in problem
        app._step(ev.JournalAlive())
        assert app._status()["problems"] == []


# --- an honest restore ---------------------------------------------------------------


def forked(tmp_path: Path) -> tuple[RealJournal, Restart]:
    """A vehicle that was set back to record 50 of 100 and went on with 30 records of its own."""
    journal = RealJournal(tmp_path / "agent.db")
    journal.add(50)
    journal.acknowledge(40)
    journal.store.close()
    image = (tmp_path / "agent.db").read_bytes()
    journal.open()
    journal.add(50)
    cloud_head = journal.head
    journal.store.close()
    (tmp_path / "agent.db").write_bytes(image)
    journal.booked = journal.booked[:50]
    journal.open()
    journal.add(30, lambda n: use(n, value=7))
    return journal, Restart(cloud_head.journal_id, 51, 100, cloud_head.hash, b"restart", b"signature")


NEW = "ffeeddccbbaa9988"


def test_restart_moves_the_vehicles_own_records_behind_the_clouds_head(tmp_path: Path) -> None:
    journal, restart = forked(tmp_path)
    own = journal.booked[50:]
    head = journal.store.restart_journal(restart, NEW)
    assert (head.journal_id, head.seq, journal.store.journal_id()) == (NEW, 30, NEW)
    kept = journal.kept()
    assert [(r.id, r.seq) for r in kept] == [(f"{NEW}/{n}", n) for n in range(1, 31)]
    assert kept[0].prev_hash == restart.head_hash
    assert totals(kept) == totals(own)
    # What both sides hold of the old journal is still shown, with its receipts.
    assert [j for j, _ in journal.store.own_records()] == ["00112233445566aa"] * 50 + [NEW] * 30
    assert [(r.journal, r.through_seq) for r in journal.store.receipts()] == [("00112233445566aa", 40)]
    journal.store.close()
    journal.open()
    assert journal.head == head
    assert journal.store.load().acked_seq == 0
    # Repeated by a cloud that has heard nothing of it yet: nothing happens.
    assert journal.store.check_restart(restart) is False
    with pytest.raises(RestartError, match="this one is"):
        journal.store.check_restart(restart._replace(content=b"another"))
    journal.add(3)
    assert journal.kept()[30].prev_hash == head.hash
    journal.store.close()


def test_restart_of_a_vehicle_without_own_records_begins_an_empty_journal(tmp_path: Path) -> None:
    journal, restart = forked(tmp_path)
    db = sqlite3.connect(tmp_path / "agent.db")
    db.execute("DELETE FROM record WHERE seq > 50")
    db.commit()
    db.close()
    head = journal.store.restart_journal(restart, NEW)
    assert (head.seq, head.hash) == (0, restart.head_hash)
    journal.store.close()
    journal.open()
    assert journal.head == head
    journal.add(1)
    assert journal.kept()[0].prev_hash == restart.head_hash
    journal.store.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fork_seq": 40}, "has signed for this vehicle's own records up to 40"),
        ({"fork_seq": 82}, "the journal here ends at 80"),
        ({"head_seq": 50}, "nothing has forked"),
        ({"journal_id": "0" * 16}, "this one is 00112233445566aa"),
    ],
)
def test_restart_that_does_not_fit_the_records_is_refused(
    tmp_path: Path, changes: dict[str, int], words: str
) -> None:
    journal, restart = forked(tmp_path)
    before, kept = journal.store.load(), journal.kept()
    with pytest.raises(RestartError, match=words):
        journal.store.restart_journal(restart._replace(**changes), NEW)  # type: ignore[arg-type]
    assert (journal.store.load(), journal.kept()) == (before, kept)
    journal.store.close()


def test_restart_at_a_head_that_the_vehicle_holds_itself_is_refused(tmp_path: Path) -> None:
    journal, restart = forked(tmp_path)
    own = journal.store.record_hash(60)
    assert own is not None
    with pytest.raises(RestartError, match="is the same here"):
        journal.store.restart_journal(restart._replace(head_seq=60, head_hash=own), NEW)
    journal.store.close()


def test_only_the_receipt_key_restarts_a_journal(tmp_path: Path) -> None:
    world = AgentWorld(tmp_path)
    with world.boot() as life:
        app = life.app
        key = Ed25519PrivateKey.generate()
        said = usage_pb2.JournalRestart(
            source=SOURCE,
            journal_id=app._store.journal_id(),
            fork_seq=1,
            head_seq=9,
            head_hash=b"h" * 32,
        )

        def arrive(message: usage_pb2.JournalRestart, signer: Ed25519PrivateKey, domain: bytes) -> None:
            content = message.SerializeToString()
            app._restart_arrived(
                usage_pb2.SignedJournalRestart(restart=content, signature=signer.sign(domain + content))
            )
            life.settle()

        before = app._store.journal_id()
        arrive(said, key, RESTART_DOMAIN)
        assert app._store.journal_id() == before
        app._receipt_key = key.public_key()
        arrive(said, key, b"openfod.usage.receipt.v1\x00")
        other = usage_pb2.JournalRestart()
        other.CopyFrom(said)
        other.source = "veh-of-somebody-else"
        arrive(other, key, RESTART_DOMAIN)
        other.CopyFrom(said)
        other.head_hash = b"short"
        arrive(other, key, RESTART_DOMAIN)
        assert app._store.journal_id() == before
        arrive(said, key, RESTART_DOMAIN)
        after = app._store.journal_id()
        assert after != before
        assert app._status()["journal"]["id"] == after  # type: ignore[index]
        arrive(said, key, RESTART_DOMAIN)
        assert app._store.journal_id() == after
