"""The journal stays within its limit: what the cloud signed for goes first, what it never saw is merged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.edge_store import power_cut_at_each_statement
from support.real_journal import (
    BOOT,
    DAY_MS,
    JOURNAL,
    LIMIT_BYTES,
    START_MS,
    RealJournal,
    follow_chain,
    totals,
    use,
)

from agent.adapters.journal import MERGE_RECORDS, PRUNE_RECORDS, RETENTION_MS
from agent.adapters.store import LOG_BYTES, Room, Store
from agent.errors import JournalError
from agent.metering.merge import Kept, merge


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[RealJournal]:
    made = RealJournal(tmp_path / "agent.db")
    yield made
    made.store.close()


def all_totals(journal: RealJournal) -> dict[tuple[object, ...], tuple[int, int]]:
    """What records and the sums of removed ones say together."""
    found = totals(journal.kept())
    for pruned in journal.store.pruned_sums():
        dimensions = tuple((name, value) for name, value in pruned.dimensions)
        key = (pruned.entitlement, pruned.meter, dimensions)
        value, gap = found.get(key, (0, 0))
        found[key] = (value + pruned.value, gap + pruned.gap)
    return found


def test_below_its_limit_nothing_is_removed(journal: RealJournal) -> None:
    journal.add(500)
    journal.acknowledge(400)
    assert not journal.store.is_over
    assert journal.make_room(START_MS + 10 * RETENTION_MS) is Room.ENOUGH
    assert len(journal.kept()) == 500


def test_oldest_records_with_a_receipt_go_first_and_their_sums_stay(journal: RealJournal) -> None:
    journal.add(1_500)
    for through in range(100, 1_500, 100):
        journal.acknowledge(through)
    assert journal.store.is_over
    assert journal.make_room() is Room.ENOUGH
    assert LIMIT_BYTES * 7 // 8 < journal.store.used_bytes <= LIMIT_BYTES
    kept = journal.kept()
    assert (kept[-1].seq, len(kept)) == (1_500, 1_500 - kept[0].seq + 1)
    assert 100 < kept[0].seq <= 1_400
    assert all_totals(journal) == totals(journal.booked)
    # The first receipt that is left covers all that was removed; those before it say no more than it does.
    pruned = journal.store.pruned_sums()
    assert max(p.through_seq for p in pruned) == kept[0].seq - 1
    assert sum(p.records for p in pruned) == kept[0].seq - 1
    first = min(r.through_seq for r in journal.store.receipts())
    assert kept[0].seq - 1 <= first < kept[0].seq + 100


def test_all_that_is_past_the_retention_goes_at_once_and_nothing_younger(journal: RealJournal) -> None:
    journal.add(1_500)
    journal.acknowledge(1_200)
    # The windows of records 1 to 899 ended more than 90 days ago.
    now_ms = journal.booked[898].window_end_ms + RETENTION_MS + 1
    assert journal.make_room(now_ms) is Room.ENOUGH
    kept = journal.kept()
    # Ten windows end at the same moment; beyond them only what the limit asks for.
    assert 900 <= kept[0].seq <= 900 + 10
    assert journal.store.used_bytes < LIMIT_BYTES * 7 // 8
    assert all_totals(journal) == totals(journal.booked)


def test_one_transaction_removes_only_so_many(journal: RealJournal) -> None:
    journal.add(3_000)
    journal.acknowledge(3_000)
    assert journal.store.make_room(START_MS) is Room.PRUNED
    assert len(journal.kept()) >= 3_000 - PRUNE_RECORDS


def test_the_end_of_the_chain_and_of_the_last_receipt_always_stay(journal: RealJournal) -> None:
    journal.add(1_500)
    journal.acknowledge(1_500)
    tiny = Store(journal.path.with_name("x.db"), boot_id=BOOT, journal_id=JOURNAL)
    tiny.close()
    journal.store.limit_bytes = 1
    assert journal.make_room(START_MS + 10 * RETENTION_MS) is Room.ENOUGH
    (last,) = journal.kept()
    assert last.seq == 1_500
    before = journal.store.load()
    journal.store.close()
    journal.open()
    assert journal.head == before.head
    assert journal.store.load().acked_seq == 1_500
    assert journal.store.record_hash(1_500) == before.head.hash
    journal.add(1)
    assert all_totals(journal) == totals(journal.booked)


def test_what_was_never_sent_is_merged_and_nothing_else(journal: RealJournal) -> None:
    journal.add(3_000)
    journal.acknowledge(200)
    journal.store.mark_sent(201, 500)
    assert journal.make_room() is Room.MERGE
    before = {r.seq: r for r in journal.kept()}
    head, count = journal.store.merge_unsent()
    assert count == 2_300
    kept = journal.kept()
    # Sent, and not signed for: the cloud may hold them, so they stay as they are.
    assert {r.seq: r for r in kept if r.seq <= 700} == {s: r for s, r in before.items() if s <= 700}
    merged = [r for r in kept if r.seq > 700]
    assert len(merged) == 20  # ten rights, driving and parked
    assert {(r.merged.first_seq, r.merged.last_seq) for r in merged} == {(701, 3_000)}
    assert merged[0].seq == 3_001
    assert (head.seq, journal.store.head()) == (3_020, head)
    assert all_totals(journal) == totals(journal.booked)
    if kept[0].seq == 1:
        follow_chain(kept)
    assert not journal.store.is_over
    journal.head = head
    journal.add(5)
    assert [r.seq for r in journal.kept()][-5:] == [3_021, 3_022, 3_023, 3_024, 3_025]


def test_the_whole_chain_can_be_followed_across_merges(tmp_path: Path) -> None:
    journal = RealJournal(tmp_path / "agent.db")
    for sent in (300, 2, 1):
        journal.add(1_700)
        kept = [r.seq for r in journal.kept()]
        journal.store.mark_sent(kept[-1_700 - (0 if sent == 300 else 1)], sent)
        head, count = journal.store.merge_unsent()
        assert count
        journal.head = head
        follow_chain(journal.kept())
        assert totals(journal.kept()) == totals(journal.booked)
    journal.store.close()


def test_a_batch_goes_on_across_the_hole_that_a_merge_left(journal: RealJournal) -> None:
    journal.add(1_500)
    journal.store.mark_sent(1, 100)
    journal.head, _ = journal.store.merge_unsent()
    journal.acknowledge(100)
    # The next five are 1,400 positions further on.
    journal.store.mark_sent(101, 5)
    sent = journal.store.marked(101, 500)
    assert len(sent) == 5
    assert [m.seq for m in journal.kept() if m.seq > 100][:5] == [1_501, 1_502, 1_503, 1_504, 1_505]
    # Nothing leaves that is not marked as sent.
    assert journal.store.marked(1_506, 500) == ()


def test_few_unsent_records_are_not_worth_a_merge(journal: RealJournal) -> None:
    journal.store.limit_bytes = 1
    journal.add(MERGE_RECORDS - 1)
    assert journal.make_room() is Room.ENOUGH
    assert journal.store.merge_unsent() == (journal.head, 0)
    journal.add(1)
    assert journal.make_room() is Room.MERGE
    journal.head, count = journal.store.merge_unsent()
    assert count == MERGE_RECORDS
    # What is merged already is not merged again until as many new ones are there.
    assert journal.make_room() is Room.ENOUGH
    journal.add(MERGE_RECORDS - 1)
    assert journal.make_room() is Room.ENOUGH
    journal.add(1)
    assert journal.make_room() is Room.MERGE


def test_windows_that_have_nothing_in_common_are_left_as_they_are(journal: RealJournal) -> None:
    journal.add(MERGE_RECORDS, lambda n: use(n, entitlement_id=f"ent-{n}"))
    before = journal.kept()
    assert journal.store.merge_unsent() == (journal.head, 0)
    assert journal.kept() == before


def test_the_store_stays_within_its_limit_through_a_year_offline(journal: RealJournal) -> None:
    highest = 0
    for _ in range(60):
        journal.add(500)
        if journal.store.is_over and journal.make_room() is Room.MERGE:
            journal.head, _ = journal.store.merge_unsent()
        highest = max(highest, journal.store.used_bytes)
    assert highest < LIMIT_BYTES + 500 * 600
    assert journal.path.stat().st_size < LIMIT_BYTES + 500 * 600
    assert all_totals(journal) == totals(journal.booked)


def test_the_log_beside_the_store_is_cut_back_after_a_merge(tmp_path: Path) -> None:
    journal = RealJournal(tmp_path / "agent.db", limit_bytes=5_000_000)
    journal.add(25_000)
    assert journal.make_room() is Room.MERGE
    journal.head, _ = journal.store.merge_unsent()
    journal.add(1)
    assert journal.path.with_name("agent.db-wal").stat().st_size <= LOG_BYTES + 100_000
    journal.store.close()


def test_power_cut_at_any_statement_of_a_merge_leaves_all_windows_or_their_sums(
    journal: RealJournal, tmp_path: Path
) -> None:
    journal.add(1_200)
    journal.acknowledge(100)
    with power_cut_at_each_statement(journal.store, tmp_path / "cuts"):
        journal.head, count = journal.store.merge_unsent()
    assert count == 1_100
    seen = set()
    for cut in (tmp_path / "cuts").iterdir():
        copy = RealJournal(cut / "agent.db")
        assert totals(copy.kept()) == totals(journal.booked)
        follow_chain(copy.kept())
        seen.add(len(copy.kept()))
        copy.store.close()
    assert seen == {1_200, 120}


def test_power_cut_at_any_statement_of_a_pruning_loses_no_sum(journal: RealJournal, tmp_path: Path) -> None:
    journal.add(1_400)
    journal.acknowledge(1_000)
    with power_cut_at_each_statement(journal.store, tmp_path / "cuts"):
        assert journal.store.make_room(START_MS) is Room.PRUNED
    cuts = sorted((tmp_path / "cuts").iterdir(), key=lambda folder: int(folder.name))
    for cut in (cuts[0], *cuts[1:-1:25], cuts[-1]):
        copy = RealJournal(cut / "agent.db")
        assert all_totals(copy) == totals(journal.booked)
        copy.store.close()


def test_a_cloud_that_asks_for_removed_records_again_is_told_so(journal: RealJournal) -> None:
    journal.add(1_500)
    journal.acknowledge(1_200)
    journal.make_room()
    first = journal.kept()[0].seq
    assert first > 1
    with pytest.raises(JournalError, match=f"those before {first} were removed.*its receipts"):
        journal.store.marked(1, 500)
    assert len(journal.store.marked(first, 500)) == 500


def test_a_cloud_that_asks_again_gets_what_a_merge_left(journal: RealJournal) -> None:
    journal.add(1_500)
    journal.head, _ = journal.store.merge_unsent()
    journal.acknowledge(journal.head.seq)
    assert len(journal.store.marked(1, 500)) == 20


def test_months_are_kept_apart_and_a_wrong_clock_spoils_nothing(journal: RealJournal) -> None:
    def window(number: int) -> object:
        end_ms = START_MS + number % 3 * 31 * DAY_MS if number % 10 else 2**62
        return use(number, start_ms=0, end_ms=end_ms)

    journal.add(1_500, window)  # type: ignore[arg-type]
    journal.acknowledge(1_500)
    journal.store.limit_bytes = 1
    journal.make_room()
    assert {p.month for p in journal.store.pruned_sums()} == {"2027-01", "2027-02", "2027-03", "unknown"}
    assert all_totals(journal) == totals(journal.booked)


def test_the_largest_part_of_the_gap_gives_the_reason(journal: RealJournal) -> None:
    def window(number: int) -> object:
        gap, reason = ((5, "EDGE"), (5, "EDGE"), (7, "SIGNAL"))[number % 3]
        return use(number, features=1, gap=gap, gap_reason=reason, dimensions=())

    journal.add(MERGE_RECORDS + 2, window)  # type: ignore[arg-type]
    _, (record,) = merge(
        journal.head, Kept(0, bytes(32)), (r.content for r in journal.store.records(1, 2_000))
    )
    message = journal.booked[0].FromString(record.content)
    assert (message.gap_reason, message.gap) == (1, 334 * 17)  # EDGE: 3,340 of 5,678


def test_copying_the_files_of_a_running_journal_gives_one_that_opens(
    journal: RealJournal, tmp_path: Path
) -> None:
    journal.add(1_500)
    (tmp_path / "copy").mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{journal.path}{suffix}", tmp_path / "copy" / f"agent.db{suffix}")
    copy = RealJournal(tmp_path / "copy" / "agent.db")
    assert copy.head == journal.head
    copy.store.close()
