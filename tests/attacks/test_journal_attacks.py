"""Journals that were merged, forked, cut off or begun anew: what fits is taken once, all else is kept."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from support.cloud_world import (
    JOURNAL,
    OTHER_VIN,
    START_MS,
    VIN,
    Device,
    Stream,
    World,
    chain,
    code_of,
    play,
    record,
    signed_batch,
)

from cloud import findings
from cloud.store import UsageRow
from openfod.operator.v1 import operator_service_pb2 as operator_pb2
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

NEW_JOURNAL = "00112233445566bb"
THIRD_JOURNAL = "00112233445566cc"


def digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def merge(device: Device, first: int, last: int, before: bytes, **changes: Any) -> dict[str, Any]:
    """Fields of a record that stands for a range."""
    range_ = {"first_seq": first, "last_seq": last, "before_hash": before, "records": 1, **changes}
    return {"merged": usage_pb2.MergedWindows(**range_)}


def behind_hole(
    device: Device, first: int, last: int, before: bytes, count: int = 1, **fields: Any
) -> list[bytes]:
    """The records that a merge of `first` to `last` leaves behind."""
    records: list[bytes] = []
    previous = b"\x5a" * 32  # of the last record that was removed: nobody has it any more
    for seq in range(last + 1, last + 1 + count):
        records.append(record(device.source, seq, previous, **merge(device, first, last, before), **fields))
        previous = digest(records[-1])
    return records


async def opened(world: World, vin: str = VIN) -> tuple[Device, Stream]:
    device = await world.device(vin)
    stream = world.connect(device)
    await stream.hello()
    return device, stream


async def take(device: Device, stream: Stream, records: Sequence[bytes], journal: str = JOURNAL) -> int:
    """Uploads what must be taken; returns the receipt's position."""
    answer = await stream.upload(signed_batch(device.key, device.source, records, journal))
    assert answer.WhichOneof("payload") == "receipt", answer
    receipt = usage_pb2.UsageReceipt.FromString(answer.receipt.receipt)
    return receipt.through_seq


async def refuse(
    device: Device, stream: Stream, records: Sequence[bytes], journal: str = JOURNAL
) -> pb.UsageRefusal:
    answer = await stream.upload(signed_batch(device.key, device.source, records, journal))
    assert answer.WhichOneof("payload") == "usage_refusal", answer
    return answer.usage_refusal


async def rows(world: World, device: Device) -> list[UsageRow]:
    return await world.cloud.store.run(lambda tx: tx.usage(device.source))


async def evidence(world: World) -> list[operator_pb2.JournalEvidence]:
    answer = await world.operator.ListEvidence(operator_pb2.ListEvidenceRequest(vin=VIN))
    return list(answer.evidence)


async def restart(world: World, **fields: Any) -> operator_pb2.RestartJournalResponse:
    values = {
        "vin": VIN,
        "journal_id": JOURNAL,
        "reason": "head unit restored in the workshop",
        "request_id": str(uuid.uuid4()),
        **fields,
    }
    answer: operator_pb2.RestartJournalResponse = await world.operator.RestartJournal(
        operator_pb2.RestartJournalRequest(**values)
    )
    return answer


def total(found: Sequence[UsageRow]) -> int:
    return sum(usage_pb2.UsageRecord.FromString(row.content).value for row in found)


# --- merged windows ----------------------------------------------------------------


def test_a_merge_is_taken_once_and_the_journal_goes_on(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        sent = chain(device.source, 3)
        assert await take(device, stream, sent) == 3
        merged = behind_hole(device, 4, 900, digest(sent[-1]), count=3, value=7)
        assert await take(device, stream, merged[:2]) == 902
        assert await take(device, stream, merged) == 903  # over a batch border, and repeated
        after = chain(device.source, 2, first=904, prev_hash=digest(merged[-1]))
        assert await take(device, stream, after) == 905
        for again in ([*sent, *merged, *after], merged, [merged[0]], after):
            assert await take(device, stream, again) == 905
        found = await rows(world, device)
        assert [row.seq for row in found] == [1, 2, 3, 901, 902, 903, 904, 905]
        assert total(found) == 5 * 60_000 + 3 * 7

    play(tmp_path, story)


def test_a_merge_may_begin_the_journal_and_stand_inside_a_batch(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        first = behind_hole(device, 1, 40, bytes(32))
        later = behind_hole(device, 42, 60, digest(first[0]))
        assert await take(device, stream, [*first, *later]) == 61
        assert await evidence(world) == []

    play(tmp_path, story)


@pytest.mark.parametrize(
    ("first", "last", "changes", "error"),
    [
        (5, 900, {}, "ChainError"),  # a window less
        (4, 899, {}, "MalformedUsageError"),  # not right behind the range: a hole remains
        (4, 900, {"before_hash": bytes(32)}, "ChainError"),
        (4, 900, {"before_hash": b""}, "MalformedUsageError"),
        (4, 900, {"records": 0}, "MalformedUsageError"),
        (4, 900, {"records": 898}, "MalformedUsageError"),
        (0, 900, {}, "MalformedUsageError"),
        (4, 901, {}, "MalformedUsageError"),  # stands for itself
        (900, 4, {}, "MalformedUsageError"),
    ],
)
def test_a_merge_that_does_not_fit_is_refused_and_nothing_stored(
    tmp_path: Path, first: int, last: int, changes: dict[str, Any], error: str
) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        sent = chain(device.source, 3)
        await take(device, stream, sent)
        before = await rows(world, device)
        fields = merge(device, first, last, digest(sent[-1]), **changes)
        refusal = await refuse(device, stream, [record(device.source, 901, b"\x5a" * 32, **fields)])
        assert refusal.error_type in {error, "ChainError"}
        assert refusal.stored_through_seq == 3
        assert await rows(world, device) == before

    play(tmp_path, story)


def test_a_merge_over_what_is_stored_is_a_fork(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        sent = chain(device.source, 5)
        await take(device, stream, sent)
        before = await rows(world, device)
        merged = behind_hole(device, 3, 900, digest(sent[1]))
        assert (await refuse(device, stream, merged)).error_type == "ChainError"
        (found,) = await evidence(world)
        assert (found.kind, found.seq, found.stored) == ("journal-fork", 3, sent[2])
        # And the other way round: windows of which the cloud has a merge are no records.
        whole = behind_hole(device, 6, 9, digest(sent[-1]))
        await take(device, stream, whole)
        await refuse(device, stream, chain(device.source, 1, first=6, prev_hash=digest(sent[-1])))
        assert [(e.seq, e.stored) for e in await evidence(world)][1] == (6, whole[0])
        assert (await rows(world, device))[:5] == before

    play(tmp_path, story)


def test_records_of_a_merge_name_the_same_range_and_no_more_windows_than_it_has(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        sent = chain(device.source, 3)
        await take(device, stream, sent)
        head = digest(sent[-1])
        first = record(device.source, 14, b"\x5a" * 32, **merge(device, 4, 13, head, records=9))
        await take(device, stream, [first])
        before = await rows(world, device)
        for fields in (
            merge(device, 4, 12, head),
            merge(device, 3, 13, head),
            merge(device, 4, 13, bytes(32)),
            merge(device, 4, 13, head, records=2),  # eleven of ten
        ):
            await refuse(device, stream, [record(device.source, 15, digest(first), **fields)])
            await refuse(device, stream, [first, record(device.source, 15, digest(first), **fields)])
        plain = record(device.source, 15, digest(first))
        late = record(device.source, 16, digest(plain), **merge(device, 4, 13, head))
        await refuse(device, stream, [plain, late])
        assert await rows(world, device) == before
        await take(device, stream, [record(device.source, 15, digest(first), **merge(device, 4, 13, head))])

    play(tmp_path, story)


# --- evidence --------------------------------------------------------------------------


def test_both_sides_of_a_fork_are_kept_once_and_stand_up_by_themselves(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        sent = chain(device.source, 6)
        await take(device, stream, sent)
        other = chain(device.source, 3, first=4, prev_hash=digest(sent[2]), value=1)
        for _ in range(3):
            refusal = await refuse(device, stream, other)
        assert "fod-cloud vehicle evidence" in refusal.error
        assert "restart-journal" in refusal.error
        # What the same history says next is no other finding.
        await refuse(device, stream, chain(device.source, 1, first=7, prev_hash=digest(other[-1])))
        (found,) = await evidence(world)
        assert (found.kind, found.journal_id, found.seq, found.stored) == (
            "journal-fork",
            JOURNAL,
            4,
            sent[3],
        )
        # The received side carries the device's own signature: nobody else can have made it.
        received = usage_pb2.SignedUsageBatch.FromString(found.received)
        device.key.public_key().verify(
            received.signature, b"openfod.usage.batch.v1\x00" + received.batch, ec.ECDSA(hashes.SHA256())
        )
        assert list(usage_pb2.UsageBatch.FromString(received.batch).records) == other
        # The honest journal goes on.
        assert await take(device, stream, chain(device.source, 1, first=7, prev_hash=digest(sent[-1]))) == 7

    play(tmp_path, story)


def test_an_edit_and_another_order_are_forks(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        sent = chain(device.source, 4)
        await take(device, stream, sent)
        edited = record(device.source, 3, digest(sent[1]), value=1)
        await refuse(device, stream, [edited])
        swapped = [record(device.source, 2, digest(sent[0]), feature_id="other")]
        swapped.append(record(device.source, 3, digest(swapped[0])))
        await refuse(device, stream, swapped)
        assert [e.seq for e in await evidence(world)] == [3, 2]
        assert total(await rows(world, device)) == 4 * 60_000

    play(tmp_path, story)


def test_evidence_stays_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MAX_FINDINGS", 5)
    monkeypatch.setattr(findings, "MAX_EVIDENCE_BYTES", 1_500)

    async def story(world: World) -> None:
        device, stream = await opened(world)
        sent = chain(device.source, 2)
        await take(device, stream, sent)
        for value in range(8):
            await refuse(device, stream, [record(device.source, 2, digest(sent[0]), value=value)])
        found = await evidence(world)
        assert len(found) == 5
        assert 0 < sum(len(e.received) for e in found) <= 1_500
        assert found[-1].received == b""
        assert all(e.stored == sent[1] for e in found)

    play(tmp_path, story)


def test_a_journal_that_begins_anew_is_taken_and_found_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        await take(device, stream, chain(device.source, 2))
        anew = record(device.source, 1, bytes(32), id=f"{NEW_JOURNAL}/1", value=5)
        for _ in range(2):
            assert await take(device, stream, [anew], NEW_JOURNAL) == 1
        (found,) = await evidence(world)
        assert (found.kind, found.journal_id, found.stored) == ("journal-begun", NEW_JOURNAL, b"")
        assert total(await rows(world, device)) == 2 * 60_000 + 5
        alarms = await world.audit(vin=VIN, alarms_only=True)
        assert [entry.action for entry in alarms] == ["journal-begun"]

    play(tmp_path, story)


# --- an honest restore -------------------------------------------------------------------


def test_an_honest_restore_goes_on_in_a_new_journal_by_the_operators_word(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        sent = chain(device.source, 6)
        await take(device, stream, sent)
        # An image of the time after record 3; from there on it has lived another life.
        lived = chain(device.source, 4, first=4, prev_hash=digest(sent[2]), value=11)
        await refuse(device, stream, lived)
        made = (await restart(world)).restart
        assert (made.source, made.fork_seq, made.head_seq) == (device.source, 4, 6)
        assert (made.head_hash, made.confirmed_ms) == (digest(sent[-1]), START_MS)

        async def restarted(stream: Stream) -> None:
            answer = await stream.receive()
            while answer.WhichOneof("payload") != "journal_restart":
                answer = await stream.receive()
            signed = answer.journal_restart
            key = Ed25519PublicKey.from_public_bytes(_public(world.keys / "public/receipt.pub"))
            key.verify(signed.signature, b"openfod.usage.restart.v1\x00" + signed.restart)
            assert usage_pb2.JournalRestart.FromString(signed.restart) == made

        await restarted(stream)  # now
        later = world.connect(device)
        await later.hello()
        await restarted(later)  # and at each connect

        # The old journal takes nothing more: neither history; what is stored gets its receipt again.
        more = chain(device.source, 1, first=7, prev_hash=digest(sent[-1]))
        for records in (more, lived, [*sent, *more]):
            assert (await refuse(device, later, records)).error_type == "EndedJournalError"
        assert await take(device, later, sent) == 6
        assert len(await evidence(world)) == 1

        moved = _moved(device, NEW_JOURNAL, made.head_hash, 4, value=11)
        assert await take(device, later, moved, NEW_JOURNAL) == 4
        assert await take(device, later, moved, NEW_JOURNAL) == 4
        assert total(await rows(world, device)) == 6 * 60_000 + 4 * 11
        assert len(await evidence(world)) == 1
        # A second one behind the same head is a clone that took the same restart.
        clone = _moved(device, THIRD_JOURNAL, made.head_hash, 4, value=12)
        assert (await refuse(device, later, clone, THIRD_JOURNAL)).error_type == "ChainError"
        assert [(e.journal_id, e.stored) for e in await evidence(world)][1:] == [(THIRD_JOURNAL, moved[0])]
        # Nothing waits any more.
        last = world.connect(device)
        await last.hello(NEW_JOURNAL)
        assert (await last.receive()).WhichOneof("payload") == "receipt"
        await last.offer()
        assert await take(device, last, moved, NEW_JOURNAL) == 4

    play(tmp_path, story)


def test_a_journal_behind_a_restart_may_begin_with_a_merge(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        sent = chain(device.source, 4)
        await take(device, stream, sent)
        await refuse(device, stream, chain(device.source, 1, first=2, prev_hash=digest(sent[0]), value=1))
        await restart(world)
        later = world.connect(device)
        await later.hello(NEW_JOURNAL)
        assert (await later.receive()).WhichOneof("payload") == "journal_restart"
        fields = {"id": f"{NEW_JOURNAL}/31", **merge(device, 1, 30, digest(sent[-1]))}
        whole = [record(device.source, 31, b"\x5a" * 32, **fields)]
        assert await take(device, later, whole, NEW_JOURNAL) == 31
        assert await take(device, later, whole, NEW_JOURNAL) == 31

    play(tmp_path, story)


def _moved(device: Device, journal: str, head_hash: bytes, count: int, **fields: Any) -> list[bytes]:
    records: list[bytes] = []
    for seq in range(1, count + 1):
        named = digest(records[-1]) if records else head_hash
        records.append(record(device.source, seq, named, id=f"{journal}/{seq}", **fields))
    return records


def _public(path: Path) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    key = load_pem_public_key(path.read_bytes())
    assert isinstance(key, Ed25519PublicKey)
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def test_without_the_operators_word_no_journal_follows_another(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        sent = chain(device.source, 3)
        await take(device, stream, sent)
        before = await rows(world, device)
        for named in (digest(sent[-1]), digest(sent[0]), b"\x11" * 32):
            refusal = await refuse(device, stream, _moved(device, NEW_JOURNAL, named, 2), NEW_JOURNAL)
            assert refusal.error_type == "BeginError"
            assert "restart-journal" in refusal.error
        assert await rows(world, device) == before
        # What names the stored head is kept: a cloud restored from a backup may have forgotten the restart.
        found, *unexplained = await evidence(world)
        assert (found.journal_id, found.seq, found.stored) == (JOURNAL, 4, sent[-1])
        # The other two say the same, and are kept once.
        assert [(e.kind, e.journal_id, e.seq) for e in unexplained] == [("journal-begun", NEW_JOURNAL, 1)]
        assert unexplained[0].received
        await restart(world)
        moved = _moved(device, NEW_JOURNAL, digest(sent[-1]), 2)
        answer = await stream.upload(signed_batch(device.key, device.source, moved, NEW_JOURNAL))
        while answer.WhichOneof("payload") in {"journal_restart", "trust_update"}:
            answer = await stream.receive()
        assert answer.WhichOneof("payload") == "receipt"

    play(tmp_path, story)


def test_a_restart_needs_a_fork_a_role_and_a_reason_and_happens_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        await world.add_vehicle(OTHER_VIN)
        sent = chain(device.source, 3)
        await take(device, stream, sent)
        code, words = await code_of(restart(world))
        assert (code, "nothing was changed" in words) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        for position in (3, 2):
            lived = chain(
                device.source, 1, first=position, prev_hash=digest(sent[position - 2]), value=position
            )
            await refuse(device, stream, lived)
        state = await world.state()
        for fields, expected in (
            ({"reason": ""}, grpc.StatusCode.INVALID_ARGUMENT),
            ({"journal_id": "nonsense"}, grpc.StatusCode.INVALID_ARGUMENT),
            ({"request_id": "1"}, grpc.StatusCode.INVALID_ARGUMENT),
            ({"vin": OTHER_VIN}, grpc.StatusCode.FAILED_PRECONDITION),
            ({"evidence_id": 999}, grpc.StatusCode.NOT_FOUND),
        ):
            assert (await code_of(restart(world, **fields)))[0] == expected
        workshop = world.as_operator("w", "workshop")
        request = operator_pb2.RestartJournalRequest(
            vin=VIN, journal_id=JOURNAL, reason="r", request_id=str(uuid.uuid4())
        )
        assert (await code_of(workshop.RestartJournal(request)))[0] == grpc.StatusCode.PERMISSION_DENIED
        assert await world.state() == state

        same = str(uuid.uuid4())
        first = await restart(world, request_id=same)
        assert first.restart.fork_seq == 2  # the lowest: nothing that differs may stay behind
        assert await restart(world, request_id=same) == first
        assert (await code_of(restart(world)))[0] == grpc.StatusCode.FAILED_PRECONDITION
        entries = [e for e in await world.audit(vin=VIN, alarms_only=True) if e.action == "restart-journal"]
        assert len(entries) == 1
        assert "restored in the workshop" in entries[0].detail

    play(tmp_path, story)


def test_a_weak_record_is_listed_with_the_dates_around_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device, stream = await opened(world)
        await world.grant()
        right = await world.operator.ListEntitlements(operator_pb2.ListEntitlementsRequest(vin=VIN))
        ent = right.entitlements[0].entitlement.entitlement_id
        weak = {"clock_trust": usage_pb2.CLOCK_TRUST_WEAK, "window_start_ms": 0, "window_end_ms": 5_000}
        records = [record(device.source, 1, bytes(32), entitlement_id=ent)]
        records.append(record(device.source, 2, digest(records[0]), entitlement_id=ent, **weak))
        late = {"window_start_ms": START_MS + 60_000, "window_end_ms": START_MS + 90_000}
        records.append(record(device.source, 3, digest(records[1]), entitlement_id=ent, **late))
        world.now_ms[0] += 3_600_000
        await take(device, stream, records)
        for size in (1, 1_000):  # the same on whatever page
            dated, token = [], ""
            while True:
                page = await world.operator.ListUsage(
                    operator_pb2.ListUsageRequest(vin=VIN, page_size=size, page_token=token)
                )
                dated += page.dated
                token = page.next_page_token
                if not token:
                    break
            assert [(d.start_ms - START_MS, d.end_ms - START_MS) for d in dated] == [
                (0, 60_000),
                (55_000, 60_000),
                (60_000, 90_000),
            ]
            assert (dated[1].earliest_end_ms, dated[1].latest_end_ms) == (
                START_MS + 60_000,
                START_MS + 90_000,
            )
        assert [row.content for row in await rows(world, device)] == records  # never edited

    play(tmp_path, story)
