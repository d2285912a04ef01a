"""Merging what was never sent loses resolution and nothing else: sums are exact, however often it is done."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.metering.ledger import MAX_AMOUNT
from agent.metering.merge import Kept, merge, rechain
from agent.metering.record import GAP_REASONS, GENESIS_HASH, Head, Record, Use, append
from agent.model import MeterKind
from openfod.usage.v1 import usage_pb2

JOURNAL = "00112233445566aa"
Sums = dict[tuple[object, ...], tuple[int, int, int, int, bool]]

amounts = st.one_of(st.integers(0, 100), st.integers(MAX_AMOUNT - 3, MAX_AMOUNT))


@st.composite
def uses(draw: st.DrawFn) -> Use:
    gap, unbounded = draw(amounts), draw(st.booleans())
    reasons = sorted(GAP_REASONS.keys() - {""})
    reason = draw(st.sampled_from(reasons)) if gap or unbounded else draw(st.sampled_from(["", "AGENT_DOWN"]))
    start_ms = draw(st.integers(0, 10**13))
    return Use(
        feature_id=draw(st.sampled_from(["seat", "logbook"])),
        meter_id=draw(st.sampled_from(["active", "way"])),
        kind=draw(st.sampled_from([MeterKind.DURATION, MeterKind.DISTANCE])),
        entitlement_id=draw(st.sampled_from(["ent-1", "ent-2"])),
        account=draw(st.sampled_from(["acc-1", "acc-2"])),
        trace_id="0" * 32,
        dimensions=draw(st.sampled_from([(), (("motion", "driving"),), (("motion", "parked"),)])),
        value=draw(amounts),
        gap=gap,
        gap_reason=reason,
        start_ms=start_ms,
        end_ms=start_ms + draw(st.integers(0, 10**6)),
        signed_clock=draw(st.booleans()),
        gap_unbounded=unbounded,
    )


journals = st.lists(uses(), min_size=1, max_size=30)


def chain(head: Head, made: Iterable[Use]) -> tuple[Head, list[Record]]:
    records = []
    for use in made:
        head, record = append(head, "veh-1", use)
        records.append(record)
    return head, records


def read(records: Iterable[Record]) -> list[usage_pb2.UsageRecord]:
    return [usage_pb2.UsageRecord.FromString(record.content) for record in records]


def sums(records: Iterable[Record]) -> Sums:
    """By all that a bill or a driver tells apart: value, gap, first start, last end, whether unbounded."""
    found: Sums = defaultdict(lambda: (0, 0, 2**63, 0, False))
    for r in read(records):
        key = (
            r.feature_id,
            r.meter_id,
            r.entitlement_id,
            r.subject,
            r.unit,
            tuple((d.name, d.value) for d in r.dimensions),
            r.clock_trust,
        )
        value, gap, start_ms, end_ms, unbounded = found[key]
        found[key] = (
            value + r.value,
            gap + r.gap,
            min(start_ms, r.window_start_ms),
            max(end_ms, r.window_end_ms),
            unbounded or r.gap_unbounded,
        )
    return dict(found)


def check_chain(kept: Kept, last: Head, merged: list[Record], windows: int) -> None:
    """What the cloud checks of a merge, and what each record must keep to."""
    before = last.hash
    for position, (record, message) in enumerate(zip(merged, read(merged), strict=True), start=1):
        assert (message.seq, message.prev_hash) == (last.seq + position, before)
        assert (message.id, record.seq) == (f"{JOURNAL}/{message.seq}", message.seq)
        assert record.hash == hashlib.sha256(record.content).digest()
        range_ = message.merged
        assert (range_.first_seq, range_.last_seq) == (kept.seq + 1, last.seq)
        assert range_.before_hash == kept.hash
        assert range_.records >= 1
        assert max(message.value, message.gap) <= MAX_AMOUNT
        assert message.gap_reason or not (message.gap or message.gap_unbounded)
        without = (usage_pb2.GAP_REASON_UNSPECIFIED, usage_pb2.GAP_REASON_AGENT_DOWN)
        assert message.gap or message.gap_unbounded or message.gap_reason in without
        before = record.hash
    assert sum(m.merged.records for m in read(merged)) == windows


@settings(max_examples=150, deadline=None)
@given(journals, st.integers(0, 30))
def test_sums_are_exact_and_the_chain_goes_on(made: list[Use], sent: int) -> None:
    head, records = chain(Head(JOURNAL), made)
    sent = min(sent, len(records) - 1)
    kept = Kept(sent, records[sent - 1].hash if sent else GENESIS_HASH)
    unsent = records[sent:]
    end, merged = merge(head, kept, (r.content for r in unsent))
    assert sums(merged) == sums(unsent)
    check_chain(kept, head, list(merged), len(unsent))
    assert (end.seq, end.hash) == (merged[-1].seq, merged[-1].hash)
    again = merge(head, kept, (r.content for r in unsent))
    assert again == (end, merged), "the same records give the same bytes"


@settings(max_examples=100, deadline=None)
@given(st.lists(journals, min_size=2, max_size=4))
def test_merges_of_merges_lose_nothing(stretches: list[list[Use]]) -> None:
    head, kept = Head(JOURNAL), Kept(0, GENESIS_HASH)
    all_records: list[Record] = []
    unsent: list[Record] = []
    for stretch in stretches:
        head, more = chain(head, stretch)
        all_records += more
        last = head
        head, merged = merge(head, kept, (r.content for r in (*unsent, *more)))
        unsent = list(merged)
        check_chain(kept, last, unsent, len(all_records))
        assert sums(unsent) == sums(all_records)


@settings(max_examples=100, deadline=None)
@given(journals)
def test_a_merge_of_what_is_merged_changes_no_sum(made: list[Use]) -> None:
    head, records = chain(Head(JOURNAL), made)
    kept = Kept(0, GENESIS_HASH)
    head, once = merge(head, kept, (r.content for r in records))
    _, twice = merge(head, kept, (r.content for r in once))
    assert len(twice) == len(once)
    assert sums(twice) == sums(once) == sums(records)
    reasons = [(m.gap_reason, m.merged.records) for m in read(once)]
    assert [(m.gap_reason, m.merged.records) for m in read(twice)] == reasons


@settings(max_examples=100, deadline=None)
@given(journals, st.integers(0, 30))
def test_records_that_move_to_a_new_journal_say_what_they_said(made: list[Use], fork: int) -> None:
    head, records = chain(Head(JOURNAL), made)
    fork = min(fork, len(records) - 1)
    if fork % 2:
        _, merged = merge(head, Kept(0, GENESIS_HASH), (r.content for r in records))
        records, fork = list(merged), 0
    start = Head("ffeeddccbbaa9988", 0, b"c" * 32)
    end, moved = rechain(start, (r.content for r in records[fork:]))
    before = start.hash
    for number, (old, new) in enumerate(zip(read(records[fork:]), read(moved), strict=True), start=1):
        assert (new.id, new.seq, new.prev_hash) == (f"{start.journal_id}/{number}", number, before)
        assert not new.HasField("merged")
        before = moved[number - 1].hash
        for message in (old, new):
            for place in ("id", "seq", "prev_hash", "merged"):
                message.ClearField(place)
        assert old == new
    assert end.hash == before
