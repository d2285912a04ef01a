"""A new owner, even one who reads the vehicle's disk, finds nothing of the owner before."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cloud_world import JOURNAL, Device, Stream, chain, play, signed_batch
from support.cloud_world import World as World_
from support.edge_store import open_store, trust
from support.engine_world import MS, World, entitlement

from agent.adapters.archive import seal
from agent.adapters.store import MAX_OWN, SEAL_RECORDS, Store
from agent.boot import _raised
from agent.errors import TrustError
from agent.events import StoreTrust, StoreUsage
from agent.metering.record import Head, Record, Use, append
from agent.model import MeterKind, Rights, TrustedTime
from agent.trust.grant_log import LogEntry, changes, follow
from agent.trust.verifier import Floors
from cloud import ingest
from cloud.ingest import archive_key
from openfod.usage.v1 import usage_pb2

OLD_ACCOUNT, OLD_RIGHT = "acc-former-4711", "ent-former-0815"
NEW_ACCOUNT, NEW_RIGHT = "acc-present-12", "ent-present-99"
NOW = TrustedTime(1_790_000_000_000, 40, "signed")
ARCHIVE = archive_key(Ed25519PrivateKey.from_private_bytes(bytes(32))).public_key().public_bytes_raw()


class Journal:
    """A vehicle's store with a journal of genuine records."""

    def __init__(self, path: Path) -> None:
        self.path = path / "agent.db"
        self.store: Store = open_store(self.path)
        self.head = Head(self.store.journal_id())
        right = replace(entitlement(1), entitlement_id=OLD_RIGHT, account=OLD_ACCOUNT)
        first = trust(1)
        self.rights = Rights(1, {right.feature_id: right}, owner_epoch=1)
        self.entries = changes(
            self.store.load().log_head, replace(first.verdict, rights=self.rights), NOW, before={}
        )
        self._store_trust(self.rights, self.entries, False)

    def use(self, count: int, *, right: str = OLD_RIGHT, account: str = OLD_ACCOUNT) -> None:
        """Appends records of a right."""
        records: list[Record] = []
        for _ in range(count):
            use = Use("seat", "m", MeterKind.DURATION, right, account, "", (), 5, 0, "", 1, 2, True)
            self.head, record = append(self.head, "veh-1", use)
            records.append(record)
        self.store.store_usage(StoreUsage(2, tuple(records), (), {(right, "m"): self.head.seq}, NOW.unix_ms))

    def sell(self) -> None:
        """Takes the set of a new owner."""
        right = replace(entitlement(1), entitlement_id=NEW_RIGHT, account=NEW_ACCOUNT)
        rights = Rights(2, {right.feature_id: right}, owner_epoch=2)
        verdict = replace(trust(2).verdict, rights=rights)
        stored = self.store.load()
        entries, new_owner = follow(
            stored.log_head, verdict, NOW, before=self.rights, owner_epoch=stored.owner_epoch
        )
        self._store_trust(rights, entries, new_owner)

    def _store_trust(self, rights: Rights, entries: tuple[LogEntry, ...], new_owner: bool) -> None:
        command = trust(rights.version)
        self.store.store_trust(
            StoreTrust(1, replace(command.verdict, rights=rights), NOW.unix_ms, 10, True, entries, new_owner),
            Floors(owner_epoch=rights.owner_epoch),
        )

    def receipt(self, through_seq: int, key: bytes = ARCHIVE) -> None:
        """Keeps a receipt, and seals what may be sealed then."""
        self.store.store_receipt(through_seq, b"receipt", b"signature", key)
        while self.store.seal_former(seal):
            pass

    def on_disk(self) -> bytes:
        """Every byte of the vehicle's folder."""
        return b"".join(path.read_bytes() for path in sorted(self.path.parent.iterdir()))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def test_after_a_sale_no_byte_of_the_former_owner_is_left_to_read(journal: Journal) -> None:
    journal.use(3)
    assert OLD_ACCOUNT.encode() in journal.on_disk()
    journal.receipt(3)
    journal.sell()
    journal.receipt(3)
    found = journal.on_disk()
    assert OLD_ACCOUNT.encode() not in found
    assert OLD_RIGHT.encode() not in found
    stored = journal.store.load()
    assert stored.used == {}
    assert [b"owner" in e or b"granted" in e for e in journal.store.grant_log()] == [True, True]
    assert (stored.head.seq, stored.head.hash) == (3, journal.head.hash)  # the chain goes on


def test_after_a_sale_without_any_use_the_log_of_grants_is_gone_too(journal: Journal) -> None:
    assert OLD_RIGHT.encode() in journal.on_disk()
    journal.sell()
    journal.store.seal_former(seal)
    assert OLD_RIGHT.encode() not in journal.on_disk()


def test_a_power_cut_after_a_sale_is_made_good_at_the_next_start(journal: Journal) -> None:
    journal.use(2)
    journal.receipt(2)
    journal.sell()
    copy = journal.path.parent / "after"
    copy.mkdir()
    for path in journal.path.parent.glob("agent.db*"):
        (copy / path.name).write_bytes(path.read_bytes())
    again = open_store(copy / "agent.db")
    assert not again.seal_former(seal)
    assert OLD_ACCOUNT.encode() not in b"".join(p.read_bytes() for p in copy.iterdir())
    again.close()


def test_what_the_cloud_has_not_signed_for_stays_readable_and_is_sealed_by_its_receipt(
    journal: Journal,
) -> None:
    journal.use(4)
    journal.receipt(2)
    journal.sell()
    journal.receipt(2)
    assert [r.is_sealed for r in journal.store.records(1, 4)] == [True, True, False, False]
    assert hashlib.sha256(journal.store.records(4, 4)[0].content).digest() == journal.head.hash
    journal.receipt(4)
    assert all(r.is_sealed for r in journal.store.records(1, 4))


def test_a_feature_that_is_held_after_the_sale_is_the_former_owners_too(journal: Journal) -> None:
    journal.sell()
    journal.use(1)
    journal.use(1, right=NEW_RIGHT, account=NEW_ACCOUNT)
    journal.receipt(2)
    assert [r.is_sealed for r in journal.store.records(1, 2)] == [True, False]
    assert journal.store.load().used == {(NEW_RIGHT, "m"): 2}


def test_what_an_ended_right_had_used_is_gone_too_and_does_not_come_back(journal: Journal) -> None:
    """A right that ended before the sale is in no set; its late records are the former owner's as well."""
    journal.use(1, right="ent-ended-long-ago")
    journal.sell()
    journal.use(1, right="ent-ended-long-ago")  # the engine still had it, or a held feature was released
    journal.receipt(2)
    assert all(r.is_sealed for r in journal.store.records(1, 2))
    assert journal.store.load().used == {}
    assert b"ent-ended-long-ago" not in journal.on_disk()


def test_rights_that_the_new_owner_gets_later_are_the_new_owners(journal: Journal) -> None:
    journal.sell()
    right = replace(entitlement(2), entitlement_id="ent-later", account=NEW_ACCOUNT)
    journal._store_trust(Rights(3, {right.feature_id: right}, owner_epoch=2), (), False)
    journal.use(1, right=NEW_RIGHT, account=NEW_ACCOUNT)
    journal.use(1, right="ent-later", account=NEW_ACCOUNT)
    journal.receipt(2)
    assert not any(r.is_sealed for r in journal.store.records(1, 2))


def test_how_many_rights_are_told_apart_is_bounded_and_the_latest_stay(journal: Journal) -> None:
    journal.sell()
    right = entitlement(1)
    for number in range(MAX_OWN + 5):
        latest = replace(right, entitlement_id=f"ent-{number}")
        journal._store_trust(Rights(3, {latest.feature_id: latest}, owner_epoch=2), (), False)
    own = journal.store._own()
    assert own is not None
    assert len(own) == MAX_OWN
    journal.use(1, right=f"ent-{MAX_OWN + 4}")
    journal.receipt(1)
    assert not journal.store.records(1, 1)[0].is_sealed


def test_a_copy_from_before_the_sale_ends_the_history_with_the_next_set(journal: Journal) -> None:
    """Its own epoch counts, although the second copy of the floors knows of the sale."""
    journal.use(1)
    assert journal.store.load().owner_epoch == 1
    raised = _raised(journal.store.load(), Floors(owner_epoch=2))
    assert (raised.floors.owner_epoch, raised.owner_epoch) == (2, 1)


def test_a_reader_of_the_file_only_delays_the_end_of_the_write_ahead_log(journal: Journal) -> None:
    journal.use(2)
    journal.receipt(2)
    reader = sqlite3.connect(journal.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM record").fetchall()
    journal.sell()
    journal.receipt(2)
    assert OLD_ACCOUNT.encode() in journal.on_disk()
    reader.close()
    journal.store.seal_former(seal)
    assert OLD_ACCOUNT.encode() not in journal.on_disk()


def test_a_key_that_another_receipt_key_announced_counts_no_more(journal: Journal) -> None:
    journal.use(1)
    journal.sell()
    journal.store.store_receipt(1, b"r", b"s", ARCHIVE, "stolen")
    assert not journal.store.seal_former(seal, "new")
    assert not journal.store.records(1, 1)[0].is_sealed
    assert journal.store.unsealed == 1
    journal.store.store_receipt(1, b"r", b"s", ARCHIVE, "new")
    journal.store.seal_former(seal, "new")
    assert journal.store.records(1, 1)[0].is_sealed
    assert journal.store.unsealed == 0


def test_only_the_last_receipt_of_the_former_owner_stays(journal: Journal) -> None:
    journal.use(3)
    for through in (1, 2, 3):
        journal.receipt(through)
    journal.sell()
    assert journal.store._read("SELECT through_seq FROM receipt") == [(3,)]


FIRST, SECOND = entitlement(1), replace(entitlement(2), account=NEW_ACCOUNT)


def heated(speed_kmh: float = 0.0) -> World:
    """A vehicle whose seat has been warm for half a minute under the first owner's right."""
    world = World()
    world.boot()
    world.cloud.grant(FIRST)
    world.push()
    world.run_ms(10_000)
    world.speed_kmh = speed_kmh
    world.run_ms(20_000)
    assert world.engine is not None
    assert FIRST.entitlement_id in shown(world)
    return world


def shown(world: World) -> str:
    """All that the agent shows, and what of it the next start would find."""
    assert world.engine is not None
    return json.dumps(world.engine.status(world.now_ms * MS)) + str(world.disk.used) + str(world.disk.log)


def records_of(world: World, entitlement_id: str) -> list[usage_pb2.UsageRecord]:
    found = (usage_pb2.UsageRecord.FromString(r.content) for r in world.disk.records.values())
    return [record for record in found if record.entitlement_id == entitlement_id]


def test_the_running_agent_shows_nothing_of_the_former_owner() -> None:
    world = heated()
    world.cloud.sell(SECOND)
    world.push()
    world.run_ms(5_000)
    assert SECOND.entitlement_id in shown(world)
    assert FIRST.entitlement_id not in shown(world)
    assert world.violations == []


def test_a_feature_that_is_held_through_the_sale_is_metered_for_the_former_owner_and_not_shown() -> None:
    world = heated(speed_kmh=50.0)
    before_ms = sum(r.value for r in records_of(world, FIRST.entitlement_id) if r.meter_id == "active-time")
    world.cloud.sell(None)
    world.push()
    world.run_ms(20_000)
    assert world.state() == "HELD"
    assert world.heating
    assert FIRST.entitlement_id not in shown(world)
    world.speed_kmh = 0.0
    world.run_ms(20_000)
    assert world.state() == "LOCKED"
    used = [r for r in records_of(world, FIRST.entitlement_id) if r.meter_id == "active-time"]
    billed, gap = sum(r.value for r in used), sum(r.gap for r in used)
    assert billed > before_ms
    assert billed <= world.truth.heated_ms <= billed + gap
    assert FIRST.entitlement_id not in shown(world)
    assert world.violations == []


def test_a_window_whose_end_nobody_will_ever_see_is_declared_at_the_sale() -> None:
    world = heated()
    world.kill()
    world.ecu.silent = True
    world.boot()
    world.run_ms(5_000)
    assert any(w.entitlement_id == FIRST.entitlement_id for w in world.disk.windows)
    world.cloud.sell(None)
    world.push()
    world.run_ms(5_000)
    assert not any(w.entitlement_id == FIRST.entitlement_id for w in world.disk.windows)
    last = records_of(world, FIRST.entitlement_id)[-1]
    assert (last.value, last.gap_unbounded) == (0, True)
    assert last.gap_reason == usage_pb2.GAP_REASON_AGENT_DOWN
    assert world.violations == []


def test_without_a_key_nothing_is_sealed_and_nothing_is_lost(journal: Journal) -> None:
    journal.use(2)
    journal.sell()
    journal.receipt(2, b"")
    assert not any(r.is_sealed for r in journal.store.records(1, 2))
    journal.receipt(2)
    assert all(r.is_sealed for r in journal.store.records(1, 2))


def test_a_key_that_nothing_can_be_sealed_to_is_refused_and_changes_nothing(journal: Journal) -> None:
    journal.use(1)
    journal.sell()
    with pytest.raises(TrustError, match="not usable"):
        journal.receipt(1, bytes(32))
    assert hashlib.sha256(journal.store.records(1, 1)[0].content).digest() == journal.head.hash


def test_years_of_records_are_sealed_in_pieces(journal: Journal) -> None:
    journal.use(SEAL_RECORDS + 1)
    journal.sell()
    journal.store.store_receipt(SEAL_RECORDS + 1, b"r", b"s", ARCHIVE)
    assert journal.store.seal_former(seal)
    assert not journal.store.seal_former(seal)
    assert all(r.is_sealed for r in journal.store.records(1, SEAL_RECORDS + 1))


def test_a_store_whose_last_record_is_sealed_starts_again(journal: Journal) -> None:
    journal.use(2)
    journal.sell()
    journal.receipt(2)
    journal.store.close()
    again = open_store(journal.path)
    assert (again.load().head.seq, again.load().head.hash) == (2, journal.head.hash)
    again.close()


# --- the cloud ---------------------------------------------------------------


async def first_receipt(stream: Stream, device: Device, records: Sequence[bytes]) -> usage_pb2.UsageReceipt:
    """Uploads records in the clear; returns the receipt, which names the archive key."""
    answer = await stream.upload(signed_batch(device.key, device.source, records))
    return usage_pb2.UsageReceipt.FromString(answer.receipt.receipt)


def test_sealed_records_are_taken_by_a_restored_cloud_and_once_only(tmp_path: Path) -> None:
    async def story(world: World_) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        clear = chain(device.source, 3)
        receipt = await first_receipt(stream, device, clear[:1])
        sealed = [seal(content, receipt.archive_key, JOURNAL) for content in clear]
        batch = signed_batch(device.key, device.source, [*sealed[:2], clear[2]], sealed=(0, 1))
        for _ in range(2):
            answer = await stream.upload(batch)
            assert usage_pb2.UsageReceipt.FromString(answer.receipt.receipt).through_seq == 3
        stored = await world.cloud.store.run(lambda tx: tx.usage(device.source))
        assert [row.content for row in stored] == clear

    play(tmp_path, story)


def test_an_older_receipt_key_still_opens_and_a_receipt_without_a_key_is_signed_anew(tmp_path: Path) -> None:
    async def story(world: World_) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        clear = chain(device.source, 2)
        receipt = await first_receipt(stream, device, clear[:1])
        old, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        sealed = seal(clear[1], archive_key(old).public_key().public_bytes_raw(), JOURNAL)
        signed = signed_batch(device.key, device.source, [sealed], sealed=(0,))
        keys = [archive_key(new), archive_key(old)]
        batch = ingest.verify(signed, device.key.public_key(), device.source, {}, keys)
        assert [row.content for row in batch.rows] == clear[1:]
        # A cloud whose receipt key was replaced names its new archive key at the next contact.
        content = await world.cloud.store.run(
            lambda tx: ingest.latest_receipt(tx, device.source, JOURNAL, new)
        )
        assert content is not None
        again = usage_pb2.UsageReceipt.FromString(usage_pb2.SignedUsageReceipt.FromString(content).receipt)
        assert again.archive_key == archive_key(new).public_key().public_bytes_raw()
        assert (again.through_seq, again.head_hash) == (receipt.through_seq, receipt.head_hash)

    play(tmp_path, story)


@pytest.mark.parametrize("attack", ["changed", "other key", "other journal", "position", "twice", "clear"])
def test_a_forged_sealed_record_is_refused_and_nothing_is_stored(tmp_path: Path, attack: str) -> None:
    async def story(world: World_) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        clear = chain(device.source, 2)
        receipt = await first_receipt(stream, device, clear[:1])
        key = ARCHIVE if attack == "other key" else receipt.archive_key
        journal = "f" * 16 if attack == "other journal" else JOURNAL
        record = seal(clear[1], key, journal)
        if attack == "changed":
            record = record[:-1] + bytes([record[-1] ^ 1])
        if attack == "clear":
            record = clear[1]
        positions = {"position": (1,), "twice": (0, 0)}.get(attack, (0,))
        answer = await stream.upload(signed_batch(device.key, device.source, [record], sealed=positions))
        assert answer.usage_refusal.error_type == "MalformedUsageError"
        assert answer.usage_refusal.stored_through_seq == 1
        stored = await world.cloud.store.run(lambda tx: tx.usage(device.source))
        assert [row.content for row in stored] == clear[:1]

    play(tmp_path, story)
