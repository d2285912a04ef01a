"""The vehicle's real journal against the cloud's real books: merges, restarts, and what is sent again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lifetime.office import DEVICE_KEY, RECEIPT_KEY, SqlTables, signed_batch
from support.real_journal import JOURNAL, SOURCE, START_MS, RealJournal, totals, use

from agent.adapters.journal import Restart
from agent.errors import JournalError
from cloud import ingest
from cloud.errors import ChainError, EndedJournalError, ForkError
from openfod.usage.v1 import usage_pb2

NEW_JOURNAL = "ffeeddccbbaa9988"


class Road:
    """A vehicle's store, the cloud, and the way between them."""

    def __init__(self, folder: Path) -> None:
        self.journal = RealJournal(folder / "agent.db")
        self.cloud = SqlTables()
        self.now_ms = START_MS

    def send(self, first_seq: int, count: int, *, journal_id: str = JOURNAL) -> int:
        """Marks, sends and takes a batch, as the agent does; returns the position of the receipt."""
        self.journal.store.mark_sent(first_seq, count)
        contents = [record.content for record in self.journal.store.marked(first_seq, count)]
        return self.take(contents, journal_id)

    def take(self, contents: list[bytes], journal_id: str = JOURNAL) -> int:
        """What the cloud does with a batch."""
        self.now_ms += 1000
        signed = signed_batch(journal_id, tuple(contents))
        archive = (ingest.archive_key(RECEIPT_KEY),)
        batch = ingest.verify(signed, DEVICE_KEY.public_key(), SOURCE, {}, archive)
        vin = "WFDSEAT10N0000001"
        taken = self.cloud.run(lambda tx: ingest.take(tx, vin, SOURCE, batch, RECEIPT_KEY, self.now_ms))
        return taken.through_seq

    def receipt(self, through_seq: int) -> None:
        """The vehicle keeps a receipt."""
        self.journal.store.store_receipt(through_seq, b"receipt", b"signature")

    def billed(self) -> dict[tuple[object, ...], tuple[int, int]]:
        """What the cloud holds, by right and dimensions."""
        return totals(usage_pb2.UsageRecord.FromString(row.content) for row in self.cloud.taken())


@pytest.fixture
def road(tmp_path: Path) -> Iterator[Road]:
    made = Road(tmp_path)
    yield made
    made.journal.store.close()


def test_merged_windows_are_taken_to_the_unit_and_only_once(road: Road) -> None:
    journal = road.journal
    journal.add(50)
    road.receipt(road.send(1, 50))
    journal.add(1_500)
    journal.head, merged = journal.store.merge_unsent()
    assert merged == 1_500
    journal.add(20)
    last = road.send(51, 500)
    assert last == journal.head.seq
    assert road.billed() == totals(journal.booked)
    assert road.send(51, 500) == last, "the same again changes nothing"
    assert road.billed() == totals(journal.booked)


def test_a_merge_of_merges_in_small_batches_is_taken_to_the_unit(road: Road) -> None:
    journal = road.journal
    journal.add(30)
    road.receipt(road.send(1, 30))
    for _ in range(3):
        journal.add(1_200)
        journal.head, _ = journal.store.merge_unsent()
    journal.add(7)
    at = 31
    while at <= journal.head.seq:
        road.receipt(road.send(at, 3))
        at = journal.store.load().acked_seq + 1
    assert road.billed() == totals(journal.booked)


def test_what_was_sent_without_a_receipt_is_never_merged(road: Road) -> None:
    journal = road.journal
    journal.add(40)
    road.send(1, 40)  # its receipt is lost
    journal.add(1_100)
    journal.head, _ = journal.store.merge_unsent()
    road.receipt(road.send(1, 500))
    assert road.billed() == totals(journal.booked)


def test_a_vehicle_set_back_goes_on_by_an_operators_word_and_loses_nothing(
    road: Road, tmp_path: Path
) -> None:
    journal = road.journal
    journal.add(60)
    road.receipt(road.send(1, 60))
    journal.store.close()
    image = tmp_path / "image.db"
    shutil.copy(journal.path, image)
    journal.open()
    journal.add(25)
    road.receipt(road.send(61, 25))
    lost = totals(journal.booked)
    # The disk is set back to the image; the vehicle goes on and makes other records 61 and following.
    journal.store.close()
    for suffix in ("-wal", "-shm"):
        Path(f"{journal.path}{suffix}").unlink(missing_ok=True)
    shutil.copy(image, journal.path)
    journal.open()
    journal.booked.clear()
    journal.add(10, lambda number: use(10_000 + number))
    with pytest.raises(ForkError):
        road.send(61, 10)
    assert road.billed() == lost

    made = road.cloud.run(lambda tx: ingest.restart(tx, SOURCE, JOURNAL, 61, RECEIPT_KEY, road.now_ms))
    content = made.SerializeToString(deterministic=True)
    restart = Restart(JOURNAL, made.fork_seq, made.head_seq, made.head_hash, content, b"signature")
    assert journal.store.check_restart(restart)
    journal.head = journal.store.restart_journal(restart, NEW_JOURNAL)
    assert not journal.store.check_restart(restart), "once"
    assert road.send(1, 500, journal_id=NEW_JOURNAL) == 10
    expected = dict(lost)
    for key, (value, gap) in totals(journal.booked).items():
        before = expected.get(key, (0, 0))
        expected[key] = before[0] + value, before[1] + gap
    assert road.billed() == expected
    # The ended journal takes nothing more, and the new one no second beginning.
    with pytest.raises(EndedJournalError):
        road.take(_older(tmp_path / "older.db", image), JOURNAL)
    assert road.billed() == expected


def _older(path: Path, image: Path) -> list[bytes]:
    """Records that a second copy of the image makes."""
    shutil.copy(image, path)
    second = RealJournal(path)
    second.add(3, lambda number: use(20_000 + number))
    records = [record.content for record in second.store.records(61, 63)]
    second.store.close()
    return records


def test_a_batch_behind_a_hole_that_no_merge_explains_is_refused(road: Road) -> None:
    journal = road.journal
    journal.add(20)
    road.receipt(road.send(1, 10))
    with pytest.raises(ChainError):
        road.take([record.content for record in journal.store.records(15, 20)])
    with pytest.raises(JournalError):
        journal.store.restart_journal(Restart(NEW_JOURNAL, 1, 1, bytes(32), b"", b""), JOURNAL)
