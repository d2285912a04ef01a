"""Keeps what does not fit about a vehicle: each finding once, with an alarm in the audit log.

What a vehicle says about itself decides nothing here: it is kept for a person.
"""

from __future__ import annotations

from cloud.errors import BeginError, ForkError
from cloud.model import Reported
from cloud.store import EvidenceRow, Transaction
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

CLOUD_BEHIND = "cloud-behind"
"""The vehicle trusts newer versions than this database knows: was it restored from a backup?"""
SET_BACK = "set-back"
"""The vehicle trusts older versions than it had confirmed: an old disk image, or a clone."""
FORK = "journal-fork"
"""Two histories of one journal: a clone, or a changed record."""
BEGUN = "journal-begun"
"""A journal that began though another was in use: a lost disk, a clone, or usage that was to be lost."""
EVIDENCE = "evidence"
"""Something on the vehicle that no right explains."""
MAX_FINDINGS = 64
"""Most findings of one kind that are kept for one vehicle; it could make up any number."""
MAX_EVIDENCE_BYTES = 16 * 1_048_576
"""Most bytes of received batches that are kept as evidence about one vehicle."""


def add(tx: Transaction, vin: str, kind: str, text: str, now_ms: int, **facts: object) -> bool:
    """Keeps a finding and raises the alarm, unless it is known or there are MAX_FINDINGS of its kind.

    Returns:
        True if it is new and kept.
    """
    known = [row.text for row in tx.findings(vin) if row.kind == kind]
    if text in known or len(known) >= MAX_FINDINGS:
        return False
    tx.add_finding(vin, kind, text, now_ms)
    tx.audit("cloud", kind, vin, now_ms, alarm=True, finding=text, **facts)
    return True


def note_set_back(tx: Transaction, vin: str, reported: Reported, now_ms: int) -> None:
    """Notes versions that are older than what the vehicle confirmed before.

    It gets the present set all the same: to refuse it would let an owner keep
    revoked rights for longer. Behind a newer root versions may begin anew.
    """
    vehicle = tx.lock_vehicle(vin)
    if vehicle is None or not vehicle.last_update:
        return
    confirmed, found = pb.UpdateResult.FromString(vehicle.last_update).director, reported.director
    if found.root > confirmed.root:
        return
    older = {
        role: (getattr(confirmed, role), getattr(found, role))
        for role in ("root", "timestamp", "snapshot", "targets")
        if getattr(found, role) < getattr(confirmed, role)
    }
    if older:
        words = ", ".join(f"{role} {had}, now {has}" for role, (had, has) in older.items())
        add(tx, vin, SET_BACK, f"older director metadata than it had confirmed: {words}", now_ms)


def note_fork(tx: Transaction, vin: str, source: str, fork: ForkError, received: bytes, now_ms: int) -> None:
    """Notes two histories of one journal, and keeps both sides.

    Args:
        source: the vehicle's pseudonym.
        received: the batch as received and signed.
    """
    behind = any(e.journal_id == fork.journal_id and e.seq <= fork.seq for e in tx.evidence(vin))
    if behind and not fork.exact:
        return  # the next batch of a history that is known to differ already
    is_new = add(
        tx,
        vin,
        FORK,
        str(fork),
        now_ms,
        journal=fork.journal_id,
        seq=fork.seq,
        stored_hash=fork.stored.hex(),
        received_hash=fork.received.hex(),
    )
    if is_new:
        row = tx.usage_at(source, fork.stored_in, fork.seq)
        stored = row.content if row else b""
        _keep(tx, vin, FORK, fork.journal_id, fork.seq, str(fork), stored, received, now_ms)


def note_begun(tx: Transaction, vin: str, journal_id: str, received: bytes, now_ms: int) -> None:
    """Notes a journal that began, and was taken, though the vehicle had used another."""
    text = (
        f"journal {journal_id} begins anew beside an older one, and no restart explains that; it was taken. "
        "Was the vehicle's disk lost or replaced? Usage that was not sent by then may be missing"
    )
    if add(tx, vin, BEGUN, text, now_ms, journal=journal_id):
        _keep(tx, vin, BEGUN, journal_id, 1, text, b"", received, now_ms)


def note_refused_begin(
    tx: Transaction, vin: str, source: str, error: BeginError, received: bytes, now_ms: int
) -> None:
    """Notes a journal that was refused, because nothing explains what its first record names.

    One that names the end of a stored journal counts as a fork of that: a restart
    may be missing in this database, and an operator can confirm it again.
    """
    text, head = str(error), tx.receipt(source, error.follows)
    kind, journal_id = (FORK, error.follows) if head else (BEGUN, error.journal_id)
    if not add(tx, vin, kind, text, now_ms, journal=journal_id):
        return
    seq, stored = 1, b""
    if head is not None:
        seq = head.through_seq + 1
        (stored,) = tx.usage_contents(source, error.follows, head.through_seq, head.through_seq)
    _keep(tx, vin, kind, journal_id, seq, text, stored, received, now_ms)


def _keep(
    tx: Transaction,
    vin: str,
    kind: str,
    journal_id: str,
    seq: int,
    text: str,
    stored: bytes,
    received: bytes,
    now_ms: int,
) -> None:
    if tx.evidence_bytes(vin) + len(received) > MAX_EVIDENCE_BYTES:
        received = b""
    tx.add_evidence(vin, EvidenceRow(0, kind, journal_id, seq, text, stored, received, now_ms))


def note_evidence(tx: Transaction, vin: str, status: pb.FeatureStatus, now_ms: int) -> None:
    """Notes what an ECU said that no right explains."""
    evidence = status.evidence
    add(
        tx,
        vin,
        EVIDENCE,
        f"{status.feature_id}: {evidence.finding}",
        now_ms,
        feature_id=status.feature_id,
        read_back=evidence.read_back.hex(),
        counter=evidence.counter,
        seen_ms=evidence.at_ms,
    )
