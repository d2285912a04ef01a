"""Keeps what does not fit about a vehicle: each finding once, with an alarm in the audit log.

What a vehicle says about itself decides nothing here: it is kept for a person.
"""

from __future__ import annotations

from cloud.errors import ForkError
from cloud.model import Reported
from cloud.store import Transaction
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

CLOUD_BEHIND = "cloud-behind"
"""The vehicle trusts newer versions than this database knows: was it restored from a backup?"""
SET_BACK = "set-back"
"""The vehicle trusts older versions than it had confirmed: an old disk image, or a clone."""
FORK = "journal-fork"
"""Two histories of one journal: a clone, or a changed record."""
EVIDENCE = "evidence"
"""Something on the vehicle that no right explains."""
MAX_FINDINGS = 64
"""Most findings of one kind that are kept for one vehicle; it could make up any number."""


def add(tx: Transaction, vin: str, kind: str, text: str, now_ms: int, **facts: object) -> None:
    """Keeps a finding and raises the alarm, unless it is known or there are MAX_FINDINGS of its kind."""
    known = [row.text for row in tx.findings(vin) if row.kind == kind]
    if text in known or len(known) >= MAX_FINDINGS:
        return
    tx.add_finding(vin, kind, text, now_ms)
    tx.audit("cloud", kind, vin, now_ms, alarm=True, finding=text, **facts)


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


def note_fork(tx: Transaction, vin: str, fork: ForkError, now_ms: int) -> None:
    """Notes two histories of one journal."""
    add(
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
