"""Attacks on usage: each batch is refused, and what is stored stays as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cloud_world import JOURNAL, OTHER_VIN, VIN, Device, World, chain, play, record, signed_batch

from cloud import ingest
from cloud.store import ReceiptRow, Transaction, VehicleRow
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as vehicle_pb2

Attack = Callable[[Device, list[bytes]], usage_pb2.SignedUsageBatch]


def _head(stored: list[bytes]) -> bytes:
    return hashlib.sha256(stored[-1]).digest()


def _forged(device: Device, stored: list[bytes]) -> usage_pb2.SignedUsageBatch:
    mallory = ec.generate_private_key(ec.SECP256R1())
    return signed_batch(mallory, device.source, chain(device.source, 1, first=4, prev_hash=_head(stored)))


def _altered(device: Device, stored: list[bytes]) -> usage_pb2.SignedUsageBatch:
    signed = signed_batch(
        device.key, device.source, chain(device.source, 1, first=4, prev_hash=_head(stored))
    )
    signed.batch = signed.batch[:-1] + bytes([signed.batch[-1] ^ 1])
    return signed


def _sign(device: Device, records: list[bytes]) -> usage_pb2.SignedUsageBatch:
    return signed_batch(device.key, device.source, records)


def _garbage(device: Device, _stored: list[bytes]) -> usage_pb2.SignedUsageBatch:
    batch = b"\xff\xff\xff"
    signature = device.key.sign(b"openfod.usage.batch.v1\x00" + batch, ec.ECDSA(hashes.SHA256()))
    return usage_pb2.SignedUsageBatch(batch=batch, signature=signature)


def _next(device: Device, stored: list[bytes], **fields: object) -> usage_pb2.SignedUsageBatch:
    return _sign(device, [record(device.source, 4, _head(stored), **fields)])


ATTACKS: dict[str, tuple[Attack, str]] = {
    "another key signs": (_forged, "UsageSignatureError"),
    "altered on the way": (_altered, "UsageSignatureError"),
    "not a batch": (_garbage, "MalformedUsageError"),
    "no record": (lambda d, _s: _sign(d, []), "MalformedUsageError"),
    "too many records": (
        lambda d, s: _sign(d, chain(d.source, 1_001, first=4, prev_hash=_head(s))),
        "MalformedUsageError",
    ),
    "not a record": (lambda d, _s: _sign(d, [b"\xff\xff"]), "MalformedUsageError"),
    "record too large": (
        lambda d, s: _next(d, s, subject="x" * 2_048),
        "MalformedUsageError",
    ),
    "text too long": (lambda d, s: _next(d, s, meter_id="x" * 101), "MalformedUsageError"),
    "value too large": (lambda d, s: _next(d, s, value=10**12 + 1), "MalformedUsageError"),
    "no unit": (lambda d, s: _next(d, s, unit=0), "MalformedUsageError"),
    "window ends before it starts": (lambda d, s: _next(d, s, window_end_ms=1), "MalformedUsageError"),
    "window before 1970": (lambda d, s: _next(d, s, window_start_ms=-1), "MalformedUsageError"),
    "unit of another meter": (lambda d, s: _next(d, s, unit=usage_pb2.UNIT_METRE), "MalformedUsageError"),
    "clock of no kind": (lambda d, s: _next(d, s, clock_trust=0), "MalformedUsageError"),
    "gap without a reason": (lambda d, s: _next(d, s, gap=5), "MalformedUsageError"),
    "reason without a gap": (
        lambda d, s: _next(d, s, gap_reason=usage_pb2.GAP_REASON_EDGE),
        "MalformedUsageError",
    ),
    "reason of the future": (lambda d, s: _next(d, s, gap=5, gap_reason=99), "MalformedUsageError"),
    "dimension twice": (
        lambda d, s: _next(d, s, dimensions=[usage_pb2.Dimension(name="a", value="1")] * 2),
        "MalformedUsageError",
    ),
    "id of another position": (lambda d, s: _next(d, s, id=f"{JOURNAL}/5"), "MalformedUsageError"),
    "hole behind the head": (
        lambda d, s: _sign(d, [record(d.source, 5, _head(s))]),
        "ChainError",
    ),
    "fork at the head": (lambda d, _s: _sign(d, [record(d.source, 4, bytes(32))]), "ChainError"),
    "history rewritten": (lambda d, _s: _sign(d, chain(d.source, 3, value=1)), "ChainError"),
    "last record rewritten": (
        lambda d, s: _sign(d, [record(d.source, 3, hashlib.sha256(s[1]).digest(), value=1)]),
        "ChainError",
    ),
    "hole inside": (
        lambda d, s: _sign(d, [record(d.source, 4, _head(s)), record(d.source, 6, _head(s))]),
        "ChainError",
    ),
    "chain broken inside": (
        lambda d, s: _sign(d, [record(d.source, 4, _head(s)), record(d.source, 5, _head(s))]),
        "ChainError",
    ),
}


@pytest.mark.parametrize(("attack", "error_type"), ATTACKS.values(), ids=ATTACKS.keys())
def test_attack_is_refused_and_state_kept(tmp_path: Path, attack: Attack, error_type: str) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        stored = chain(device.source, 3)
        await stream.upload(signed_batch(device.key, device.source, stored))
        before = await world.cloud.store.run(
            lambda tx: (tx.usage(device.source), tx.receipt(device.source, JOURNAL))
        )

        answer = await stream.upload(attack(device, stored))

        assert answer.WhichOneof("payload") == "usage_refusal"
        assert answer.usage_refusal.error_type == error_type
        assert answer.usage_refusal.error
        if answer.usage_refusal.journal_id:
            assert answer.usage_refusal.stored_through_seq == 3
        after = await world.cloud.store.run(
            lambda tx: (tx.usage(device.source), tx.receipt(device.source, JOURNAL))
        )
        assert after == before
        # The stream goes on, and so does the honest journal.
        honest = chain(device.source, 1, first=4, prev_hash=_head(stored))
        answer = await stream.upload(signed_batch(device.key, device.source, honest))
        assert answer.WhichOneof("payload") == "receipt"

    play(tmp_path, story)


@pytest.mark.parametrize("inside", [False, True], ids=["batch", "record"])
def test_usage_of_another_vehicle_is_refused(tmp_path: Path, inside: bool) -> None:
    async def story(world: World) -> None:
        victim = await world.device(OTHER_VIN)
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        source = device.source if inside else victim.source
        answer = await stream.upload(signed_batch(device.key, source, chain(victim.source, 1)))
        assert answer.usage_refusal.error_type == "ForeignUsageError"
        assert await world.cloud.store.run(lambda tx: tx.usage(victim.source)) == []

    play(tmp_path, story)


def test_a_repeated_batch_is_stored_once_and_gets_the_same_receipt(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        batch = signed_batch(device.key, device.source, chain(device.source, 3))
        first = await stream.upload(batch)
        world.now_ms[0] += 1_000
        assert await stream.upload(batch) == first
        overlapping = signed_batch(device.key, device.source, chain(device.source, 5))
        receipt = usage_pb2.UsageReceipt.FromString((await stream.upload(overlapping)).receipt.receipt)
        assert receipt.through_seq == 5
        rows = await world.cloud.store.run(lambda tx: tx.usage(device.source))
        assert [row.seq for row in rows] == [1, 2, 3, 4, 5]

    play(tmp_path, story)


@pytest.mark.parametrize(
    "fields",
    [
        {"gap_reason": usage_pb2.GAP_REASON_AGENT_DOWN, "gap_unbounded": True},
        {"gap_reason": usage_pb2.GAP_REASON_SIGNAL, "gap_unbounded": True, "value": 10**12},
        {"gap_reason": usage_pb2.GAP_REASON_EDGE, "gap": 10**12},
        {"meter_id": "unheard-of", "unit": usage_pb2.UNIT_ONE},
    ],
    ids=["down without a bound", "clamped", "largest gap", "meter of another catalogue"],
)
def test_what_an_honest_agent_says_is_taken(tmp_path: Path, fields: dict[str, Any]) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        answer = await stream.upload(
            signed_batch(device.key, device.source, chain(device.source, 1, **fields))
        )
        assert answer.WhichOneof("payload") == "receipt", answer

    play(tmp_path, story)


def test_a_vehicle_cannot_begin_journals_without_end(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()

        async def begin(number: int) -> vehicle_pb2.ConnectResponse:
            journal = f"{number:016x}"
            first = record(device.source, 1, bytes(32), id=f"{journal}/1")
            return await stream.upload(signed_batch(device.key, device.source, [first], journal))

        for number in range(ingest.MAX_JOURNALS):
            assert (await begin(number)).WhichOneof("payload") == "receipt"
        refusal = (await begin(ingest.MAX_JOURNALS)).usage_refusal
        assert refusal.error_type == "TooManyJournalsError"
        assert str(ingest.MAX_JOURNALS) in refusal.error
        assert (await begin(0)).WhichOneof("payload") == "receipt"  # a known one goes on

    play(tmp_path, story)


@pytest.mark.parametrize("inside", [False, True], ids=["batch", "record"])
def test_a_refusal_does_not_repeat_what_is_long(tmp_path: Path, inside: bool) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        source = device.source if inside else "v" * 1_000_000
        records = chain("v" * 1_500, 1)
        answer = await stream.upload(signed_batch(device.key, source, records))
        assert answer.usage_refusal.error_type == "ForeignUsageError"
        assert len(answer.usage_refusal.error) < 300

    play(tmp_path, story)


def test_two_streams_that_take_the_same_batch_wait_for_one_another(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        batch = ingest.verify(
            signed_batch(device.key, device.source, chain(device.source, 1)),
            device.key.public_key(),
            device.source,
            {},
            [ingest.archive_key(Ed25519PrivateKey.generate())],
        )
        seen: list[str] = []

        def work(tx: Transaction) -> None:
            lock, read = tx.lock_vehicle, tx.receipt

            def locked(vin: str) -> VehicleRow | None:
                seen.append("lock")
                return lock(vin)

            def receipt(source: str, journal_id: str) -> ReceiptRow | None:
                seen.append("read")
                return read(source, journal_id)

            tx.lock_vehicle = locked  # type: ignore[method-assign]
            tx.receipt = receipt  # type: ignore[method-assign]
            ingest.take(tx, VIN, device.source, batch, Ed25519PrivateKey.generate(), 1)

        await world.cloud.store.run(work)
        assert seen[:2] == ["lock", "read"]

    play(tmp_path, story)
