"""What the driver sees: `fod-agent usage`, and a file that anyone with the receipt key can check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.agent_world import SOURCE, AgentWorld
from support.real_journal import RealJournal, totals, use

from agent.__main__ import main
from agent.adapters.journal import Restart
from agent.metering.record import RECEIPT_DOMAIN
from openfod.usage.v1 import usage_pb2


class Driver:
    """An enrolled vehicle with a journal, and whoever sits in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("support.real_journal.SOURCE", SOURCE)
        self.world, self.key = AgentWorld(folder), Ed25519PrivateKey.generate()
        pem = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / "receipt.pub").write_bytes(pem)
        self.journal = RealJournal(self.world.state / "agent.db")
        self.file = folder / "usage.jsonl"

    def sign(self, through_seq: int) -> None:
        head_hash = self.journal.store.record_hash(through_seq)
        receipt = usage_pb2.UsageReceipt(
            source=SOURCE,
            journal_id=self.journal.store.journal_id(),
            through_seq=through_seq,
            head_hash=head_hash or b"",
            stored_ms=1_800_000_100_000,
        ).SerializeToString()
        self.journal.store.mark_sent(1, through_seq)
        self.journal.store.store_receipt(through_seq, receipt, self.key.sign(RECEIPT_DOMAIN + receipt))

    def run(self, *words: str) -> int:
        return main([words[0], "--config", str(self.world.path), *words[1:]])


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(tmp_path, monkeypatch)


def usage(driver: Driver, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    capsys.readouterr()
    assert driver.run("usage", "--json") == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def shown(report: dict[str, object]) -> dict[tuple[object, ...], tuple[int, int]]:
    rows = report["usage"]
    assert isinstance(rows, list)
    return {
        (r["entitlement"], r["meter"], tuple(r["dimensions"].items())): (
            r["reported"] + r["waiting"],
            r["reported_gap"] + r["waiting_gap"],
        )
        for r in rows
    }


def test_usage_is_exact_after_pruning_and_merging(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    journal = driver.journal
    journal.add(1_500)
    driver.sign(1_200)
    journal.make_room()
    journal.add(1_100)
    journal.head, count = journal.store.merge_unsent()
    assert count == 1_400
    report = usage(driver, capsys)
    assert shown(report) == totals(journal.booked)
    rows = report["usage"]
    assert isinstance(rows, list)
    assert sum(r["reported"] for r in rows) == sum(r.value for r in journal.booked if r.seq <= 1_200)
    assert sum(r["windows"] for r in rows) == 2_600
    assert report["receipts"] == [
        {"journal": "00112233445566aa", "through": 1_200, "stored_ms": 1_800_000_100_000}
    ]
    assert driver.run("usage") == 0
    said = capsys.readouterr().out
    assert "ent-0000000000000001" in said
    assert "Last receipt: record 1200 of 00112233445566aa, 2027-01-15" in said


def test_before_any_use_it_says_so(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.run("usage") == 0
    assert "Nothing was used" in capsys.readouterr().out


def test_export_is_whole_and_says_how_far_receipts_cover_it(
    driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = driver.journal
    journal.add(1_500)
    driver.sign(1_200)
    journal.make_room()
    kept = len(journal.kept())
    journal.head, _ = journal.store.merge_unsent()
    journal.add(1)
    kept = len(journal.kept())
    assert driver.run("export", str(driver.file)) == 0
    capsys.readouterr()
    head = journal.head.hash.hex()
    assert driver.run("export", str(driver.file), "--verify", "--head", head, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    waiting = sum(r.seq > 1_200 for r in journal.kept())
    assert found == {
        "records": kept,
        "covered": kept - waiting,
        "receipts": 1,
        "summed": 1_200 - (kept - waiting),
        "head": head,
    }
    assert driver.run("export", str(driver.file)) == 1, "an export is never overwritten"


def edits(lines: list[bytes]) -> dict[str, list[bytes]]:
    record = next(i for i, line in enumerate(lines) if b'"record"' in line)
    receipt = next(i for i, line in enumerate(lines) if b'"receipt"' in line)
    changed = lines[record].replace(b"656e742d", b"656e742e", 1)
    return {
        "a record is left out": lines[: record + 3] + lines[record + 4 :],
        "two are swapped": [
            *lines[:record],
            lines[record + 1],
            lines[record],
            *lines[record + 2 :],
        ],
        "one is changed": [*lines[:record], changed, *lines[record + 1 :]],
        "the end is cut off": lines[:-1],
        "the latest are cut off": [*lines[: record + 5], lines[-1]],
        "something follows the end": [*lines, lines[record]],
        "a receipt is left out": lines[:receipt] + lines[receipt + 1 :],
        "nothing is left": [],
        "it is no export": [b"{}"],
        "it is not JSON": [b"\xff\xfe"],
    }


@pytest.mark.parametrize("what", list(edits([b'"record"', b'"receipt"'])))
def test_edited_export_is_refused(driver: Driver, capsys: pytest.CaptureFixture[str], what: str) -> None:
    driver.journal.add(20)
    driver.sign(15)
    assert driver.run("export", str(driver.file)) == 0
    lines = driver.file.read_bytes().splitlines()
    driver.file.write_bytes(b"".join(line + b"\n" for line in edits(lines)[what]))
    assert driver.run("export", str(driver.file), "--verify") == 1
    assert capsys.readouterr().err


def test_export_that_was_made_up_has_no_receipts_that_hold(
    driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.journal.add(20)
    driver.sign(15)
    driver.key = Ed25519PrivateKey.generate()  # not the cloud's
    driver.sign(20)
    assert driver.run("export", str(driver.file)) == 0
    assert driver.run("export", str(driver.file), "--verify") == 1
    assert "signature is not the receipt key's" in capsys.readouterr().err


def test_other_head_than_the_status_names_is_refused(driver: Driver) -> None:
    driver.journal.add(20)
    assert driver.run("export", str(driver.file)) == 0
    assert driver.run("export", str(driver.file), "--verify", "--head", "0" * 64) == 1


def test_after_a_restart_both_journals_are_shown(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    journal = driver.journal
    journal.add(30)
    driver.sign(20)
    old = journal.store.journal_id()
    said = usage_pb2.JournalRestart(
        source=SOURCE, journal_id=old, fork_seq=26, head_seq=40, head_hash=b"c" * 32
    )
    restart = Restart(old, 26, 40, b"c" * 32, said.SerializeToString(), b"signature")
    journal.head = journal.store.restart_journal(restart, "ffeeddccbbaa9988")
    journal.add(5, use)
    report = usage(driver, capsys)
    assert shown(report) == totals(journal.booked)
    rows = report["usage"]
    assert isinstance(rows, list)
    # Cloud and vehicle agree up to the fork, whatever receipt came through.
    assert sum(r["reported"] for r in rows) == sum(r.value for r in journal.booked[:25])
    assert driver.run("export", str(driver.file)) == 0
    assert driver.run("export", str(driver.file), "--verify") == 0


def test_former_owners_use_is_in_neither(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    driver.journal.add(10)
    assert driver.journal.store._db is not None
    driver.journal.store._db.execute("UPDATE record SET owner = 1 WHERE seq <= 6")
    driver.sign(6)
    assert shown(usage(driver, capsys)) == totals(driver.journal.booked[6:])
    assert driver.run("export", str(driver.file)) == 0
    text = driver.file.read_text()
    assert text.count('"record"') == 4
    assert driver.run("export", str(driver.file), "--verify") == 0
