"""An owner with root on the head unit forges, replays and withholds what the ECU signs: each is found once.

Usage is taken all the same: a reading bills nothing and refuses nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.cloud_world import (
    DAY_MS,
    JOURNAL,
    OTHER_VIN,
    START_MS,
    VIN,
    Device,
    Stream,
    World,
    code_of,
    play,
    record,
    signed_batch,
    uid,
)
from vectors.make_reading_vectors import ECU_KEY, claims, sign
from vectors.make_token_vectors import FOREIGN

from cloud.attestation import FOREIGN as FOREIGN_READING
from cloud.attestation import NO_KEY, SILENT, SILENT_DAYS, follow
from cloud.readings import BACK, EXCESS, Attested, ReadingRow
from cloud.store import FindingRow, Store, UsageRow
from openfod.operator.v1 import operator_service_pb2 as operator_pb2
from openfod.usage.v1 import usage_pb2

WINDOW_MS = 60_000


@dataclass
class Car:
    """A vehicle in contact, one window of use after the other."""

    world: World
    device: Device
    stream: Stream
    seq: int = 0
    head: bytes = bytes(32)

    async def use(self, value: int = WINDOW_MS, reading: bytes = b"", **fields: Any) -> None:
        """Uploads one more window, with what the ECU says."""
        self.seq += 1
        end_ms = START_MS + self.seq * WINDOW_MS
        window = {"window_start_ms": end_ms - WINDOW_MS, "window_end_ms": end_ms}
        content = record(
            self.device.source, self.seq, self.head, value=value, ecu_reading=reading, **window, **fields
        )
        self.head = hashlib.sha256(content).digest()
        answer = await self.stream.upload(signed_batch(self.device.key, self.device.source, [content]))
        assert answer.receipt.receipt, answer

    async def found(self) -> list[tuple[str, str]]:
        """(kind, text) of all that does not fit."""
        rows: list[FindingRow] = await self.look(lambda tx: tx.findings(self.device.vin))
        return [(row.kind, row.text) for row in rows]

    async def latest(self) -> ReadingRow:
        """What the cloud keeps of the seat heating."""
        rows: list[ReadingRow] = await self.look(lambda tx: tx.readings(self.device.vin))
        return rows[0]

    async def look(self, what: Callable[[Any], Any]) -> Any:
        store: Store = self.world.cloud.store
        return await store.run(what)

    async def come_back(self) -> None:
        """Opens a new stream, as after each drive."""
        self.stream = self.world.connect(self.device)
        await self.stream.hello()
        await asyncio.sleep(0)


def said(reading: int, on_ms: int, *, executions: int = 1, token_counter: int = 1, vin: str = VIN) -> bytes:
    """What the seat module of a vehicle signs."""
    return sign(
        claims(uid=uid(vin), reading=reading, on_ms=on_ms, executions=executions, token_counter=token_counter)
    )


def drive(folder: Path, story: Callable[[Car], Awaitable[None]], *, key: bytes = ECU_KEY.public) -> None:
    """Plays a story with a vehicle that has a right."""

    async def begin(world: World) -> None:
        device = await world.device(reading_key=key)
        await world.grant()
        stream = world.connect(device)
        await stream.hello()
        await story(Car(world, device, stream))

    play(folder, begin)


def test_an_honest_vehicle_leads_to_no_finding_and_its_latest_reading_is_kept(tmp_path: Path) -> None:
    async def story(car: Car) -> None:
        for window in range(1, 8):
            await car.use(reading=said(window, window * WINDOW_MS - 100))
        assert await car.found() == []
        row = await car.latest()
        assert (row.reading, row.on_ms, row.is_verified) == (7, 7 * WINDOW_MS - 100, True)
        assert row.content == said(7, 7 * WINDOW_MS - 100)

    drive(tmp_path, story)


@pytest.mark.parametrize("metered", [0, WINDOW_MS // 2])
def test_use_that_is_not_metered_is_found_by_the_next_reading(tmp_path: Path, metered: int) -> None:
    async def story(car: Car) -> None:
        await car.use(reading=said(1, WINDOW_MS))
        await car.use(metered)
        await car.use(metered)
        assert await car.found() == []
        await car.use(metered, reading=said(2, 4 * WINDOW_MS))
        ((kind, text),) = await car.found()
        assert kind == EXCESS
        assert text.startswith("seat-heating: the ECU counted 180000 ms between readings 1 and 2;")
        assert f"{3 * metered} ms were metered" in text
        await car.use(reading=said(3, 5 * WINDOW_MS))
        assert len(await car.found()) == 1  # what fits again is not told again
        answer = await car.world.operator.ListVehicles(operator_pb2.ListVehiclesRequest())
        assert list(answer.vehicles[0].findings) == [text]
        alarms = await car.world.audit(vin=VIN, alarms_only=True)
        assert [entry.action for entry in alarms] == [EXCESS]

    drive(tmp_path, story)


def test_what_is_declared_explains_and_an_unbounded_gap_says_nothing_either_way(tmp_path: Path) -> None:
    async def story(car: Car) -> None:
        await car.use(reading=said(1, WINDOW_MS))
        await car.use(0, gap=2 * WINDOW_MS, gap_reason=2)
        await car.use(reading=said(2, 4 * WINDOW_MS))
        await car.use(0, gap_unbounded=True, gap_reason=2)
        await car.use(reading=said(3, 400 * WINDOW_MS))
        assert await car.found() == []
        await car.use(reading=said(4, 404 * WINDOW_MS))
        assert [kind for kind, _ in await car.found()] == [EXCESS]

    drive(tmp_path, story)


def test_an_old_reading_that_is_sent_again_is_found_and_moves_nothing(tmp_path: Path) -> None:
    async def story(car: Car) -> None:
        first = said(1, 1000)
        await car.use(reading=first)
        await car.use(reading=said(2, WINDOW_MS))
        before = await car.latest()
        await car.use(reading=first)
        await car.use(reading=said(2, WINDOW_MS))
        found = await car.found()
        assert [kind for kind, _ in found] == [BACK, BACK]
        assert "reading 1 of the ECU came again or late: 2 was there before" in found[0][1]
        after = await car.latest()
        assert (after.reading, after.content) == (before.reading, before.content)
        await car.use(reading=said(3, 6 * WINDOW_MS))
        assert [kind for kind, _ in await car.found()] == [BACK, BACK, EXCESS]

    drive(tmp_path, story)


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ({"on_ms": 999}, "on_ms 60000, now 999"),
        ({"executions": 4}, "executions 5, now 4"),
        ({"token_counter": 2}, "token_counter 3, now 2"),
    ],
)
def test_counts_that_go_back_are_found(tmp_path: Path, later: dict[str, int], words: str) -> None:
    async def story(car: Car) -> None:
        before: dict[str, Any] = {"on_ms": WINDOW_MS, "executions": 5, "token_counter": 3}
        await car.use(reading=said(1, **before))
        await car.use(reading=said(2, **{**before, **later}))
        ((kind, text),) = await car.found()
        assert (kind, words in text) == (BACK, True)

    drive(tmp_path, story)


FORGED = {
    "another key": (sign(claims(uid=uid(VIN)), FOREIGN), "signed under kid"),
    "another key under this kid": (sign(claims(uid=uid(VIN)), FOREIGN, kid=ECU_KEY.kid), "does not verify"),
    "the ECU of another vehicle": (said(1, 0, vin=OTHER_VIN), f"of ECU {uid(OTHER_VIN).hex()}"),
    "another feature of this ECU": (sign(claims(uid=uid(VIN), feature=2)), "of feature 2 in the ECU"),
    "no reading at all": (b"nothing of the kind", "expected a COSE_Sign1"),
    "too long": (said(1, 0) + bytes(512), "expected at most 512"),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_reading_that_the_ecu_did_not_sign_is_found_once_and_moves_nothing(
    tmp_path: Path, forged: str
) -> None:
    content, words = FORGED[forged]

    async def story(car: Car) -> None:
        await car.use(reading=said(1, WINDOW_MS))
        before = await car.latest()
        await car.use(reading=content)
        await car.use(reading=content)
        ((kind, text),) = await car.found()
        assert (kind, words in text) == (FOREIGN_READING, True), text
        assert (await car.latest()).content == before.content

    drive(tmp_path, story)


def test_a_reading_of_an_ecu_without_a_key_is_kept_and_told_once(tmp_path: Path) -> None:
    async def story(car: Car) -> None:
        await car.use(reading=said(1, WINDOW_MS))
        await car.use(0, reading=said(2, 900 * WINDOW_MS))
        ((kind, text),) = await car.found()
        assert kind == NO_KEY
        assert uid(VIN).hex() in text
        row = await car.latest()
        assert (row.content, row.is_verified) == (said(2, 900 * WINDOW_MS), False)

    drive(tmp_path, story, key=b"")


def test_a_replaced_ecu_starts_anew_and_late_readings_of_the_old_one_still_count(tmp_path: Path) -> None:
    new = uid("WFDSEAT10N0000009")

    def of_new(reading: int, on_ms: int) -> bytes:
        return sign(claims(uid=new, reading=reading, on_ms=on_ms), FOREIGN)

    async def story(car: Car) -> None:
        await car.use(reading=said(40, 500 * WINDOW_MS))
        await car.world.rebind(new, reading_key=FOREIGN.public)
        await car.use(reading=said(41, 501 * WINDOW_MS))  # was on its way
        await car.use(reading=of_new(1, 7))
        await car.use(reading=of_new(2, 7 + WINDOW_MS))
        assert await car.found() == []
        assert (await car.latest()).ecu_uid == new
        await car.use(reading=said(42, 502 * WINDOW_MS))  # the old part speaks on, from wherever it is now
        ((kind, text),) = await car.found()
        assert (kind, uid(VIN).hex() in text) == (FOREIGN_READING, True)

    drive(tmp_path, story)


def test_the_first_reading_of_all_may_be_of_the_ecu_that_was_taken_out_meanwhile(tmp_path: Path) -> None:
    async def story(car: Car) -> None:
        await car.world.rebind(uid("WFDSEAT10N0000009"))
        await car.use(reading=said(1, WINDOW_MS))
        assert await car.found() == []

    drive(tmp_path, story)


def test_an_ecu_keeps_its_key(tmp_path: Path) -> None:
    async def story(car: Car) -> None:
        new = uid("WFDSEAT10N0000009")
        await car.world.rebind(new, reading_key=FOREIGN.public)
        call = car.world.rebind(uid(VIN), new, reading_key=FOREIGN.public)
        code, words = await code_of(call)
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "registered with another reading key" in words
        await car.world.rebind(uid(VIN), new)  # its own key is known
        await car.use(reading=said(1, 0))
        assert await car.found() == []

    drive(tmp_path, story)


async def _days(car: Car, count: int, act: Callable[[int], Awaitable[None]] | None = None) -> None:
    for day in range(count):
        car.world.now_ms[0] += DAY_MS
        await car.come_back()
        if act is not None:
            await act(day)


def test_readings_that_stop_while_a_token_is_in_force_are_found(tmp_path: Path) -> None:
    async def story(car: Car) -> None:
        await car.use(reading=said(1, WINDOW_MS))
        await _days(car, SILENT_DAYS)
        assert await car.found() == []
        await _days(car, 3)
        ((kind, text),) = await car.found()
        assert kind == SILENT
        assert text.startswith("seat-heating: no reading under token 1 since reading 1, for 7 days")

    drive(tmp_path, story)


def test_a_parked_vehicle_is_not_silent_and_one_reading_ends_a_silence(tmp_path: Path) -> None:
    async def story(car: Car) -> None:
        car.world.now_ms[0] += 60 * DAY_MS
        await car.come_back()
        await _days(car, SILENT_DAYS - 2)
        newest = (await car.look(lambda tx: tx.tokens(VIN)))[0].counter
        await car.use(reading=said(1, 0, token_counter=newest))
        await _days(car, SILENT_DAYS)
        assert await car.found() == []

    drive(tmp_path, story)


def test_without_a_key_or_without_a_right_nothing_is_awaited(tmp_path: Path) -> None:
    async def without_right(world: World) -> None:
        device = await world.device(reading_key=ECU_KEY.public)
        car = Car(world, device, world.connect(device))
        await _days(car, 2 * SILENT_DAYS)
        assert await car.found() == []

    async def story(car: Car) -> None:
        await _days(car, 2 * SILENT_DAYS)
        assert await car.found() == []

    play(tmp_path, without_right)
    (tmp_path / "other").mkdir()
    drive(tmp_path / "other", story, key=b"")


def test_readings_that_were_hoarded_under_an_older_token_do_not_end_a_silence(tmp_path: Path) -> None:
    async def story(car: Car) -> None:
        rights = await car.world.operator.ListEntitlements(operator_pb2.ListEntitlementsRequest(vin=VIN))
        await car.world.revoke(rights.entitlements[0].entitlement.entitlement_id)
        await car.world.grant()
        newest = (await car.look(lambda tx: tx.tokens(VIN)))[0].counter
        assert newest > 1

        async def old(day: int) -> None:
            await car.use(0, reading=said(day + 1, 0, token_counter=1))

        await _days(car, SILENT_DAYS + 3, old)
        ((kind, text),) = await car.found()
        assert (kind, f"under token {newest}" in text) == (SILENT, True)

    drive(tmp_path, story)


def rows(contents: list[bytes]) -> list[UsageRow]:
    """Records as they are stored."""
    seqs = [usage_pb2.UsageRecord.FromString(content).seq for content in contents]
    return [UsageRow(JOURNAL, n, c, hashlib.sha256(c).digest()) for n, c in zip(seqs, contents, strict=True)]


SEAT = {"seat-heating": Attested("active-time", "seat-module", 1)}


def test_the_readings_of_one_merge_are_judged_behind_all_of_its_records(tmp_path: Path) -> None:
    async def story(car: Car) -> None:
        await car.use(reading=said(1, WINDOW_MS))
        merged = usage_pb2.MergedWindows(first_seq=2, last_seq=40, records=39)
        sums = [
            record(
                car.device.source, 41, bytes(32), value=9 * WINDOW_MS, ecu_reading=said(9, 16 * WINDOW_MS)
            ),
            record(car.device.source, 42, bytes(32), value=9 * WINDOW_MS, ecu_reading=said(5, 9 * WINDOW_MS)),
        ]
        for n, content in enumerate(sums):
            message = usage_pb2.UsageRecord.FromString(content)
            message.merged.CopyFrom(merged)
            sums[n] = message.SerializeToString()
        await car.look(lambda tx: follow(tx, VIN, rows(sums), SEAT, START_MS))
        assert await car.found() == []
        assert (await car.latest()).reading == 9
        behind = [record(car.device.source, 43, bytes(32), value=0, ecu_reading=said(10, 26 * WINDOW_MS))]
        await car.look(lambda tx: follow(tx, VIN, rows(behind), SEAT, START_MS))
        assert [kind for kind, _ in await car.found()] == [EXCESS]

    drive(tmp_path, story)


@pytest.mark.parametrize("confirmed", [True, False])
def test_only_a_journal_that_an_operator_let_go_on_excuses_what_was_lost(
    tmp_path: Path, confirmed: bool
) -> None:
    async def story(car: Car) -> None:
        await car.use(reading=said(1, WINDOW_MS))
        head = b"\x01" * 32 if confirmed else bytes(32)
        begun = [record(car.device.source, 1, head, ecu_reading=said(2, 100 * WINDOW_MS))]
        await car.look(lambda tx: follow(tx, VIN, rows(begun), SEAT, START_MS))
        assert [kind for kind, _ in await car.found()] == ([] if confirmed else [EXCESS])

    drive(tmp_path, story)
