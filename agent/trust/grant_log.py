"""What was granted, changed and ended on this vehicle, and what its ECUs said besides: a log for the owner.

Pure. Entries are chained by SHA-256: who edits, reorders or drops one breaks
the chain, or ends at another head than the one that the agent's status names.
Limit: the chain is not signed. Who may write the database can write a new
chain from the start; only a head that was noted before tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from agent.errors import GrantLogError
from agent.model import Entitlement, Quota, Rights, TrustedTime, Verdict

GENESIS = bytes(32)
"""What the first entry names as the hash before it."""
MAX_EXPORT_BYTES = 64 * 1024 * 1024
"""Longest export that is read."""
_UNKNOWN_MS = 10**12
"""Uncertainty from which it counts as unknown."""
_END = "end"


class LogHead(NamedTuple):
    """Where the log ends.

    Args:
        seq: number of the last entry, 0 if there is none.
        hash: SHA-256 of its bytes.
    """

    seq: int = 0
    hash: bytes = GENESIS


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry as it is stored; `content` is one line of JSON."""

    seq: int
    hash: bytes
    content: bytes

    @property
    def head(self) -> LogHead:
        """The log's end, once this is its last entry."""
        return LogHead(self.seq, self.hash)


def entry(head: LogHead, kind: str, now: TrustedTime, facts: Mapping[str, object]) -> LogEntry:
    """Makes the entry that follows a head.

    Args:
        kind: "granted", "changed", "ended", "evidence" or "owner".
        now: trusted time; its source and uncertainty are noted with it.
        facts: what happened, as JSON values.
    """
    content = {
        "seq": head.seq + 1,
        "previous": head.hash.hex(),
        "kind": kind,
        "at_ms": now.unix_ms,
        "time_source": now.source,
        "uncertainty_ms": now.uncertainty_ms if now.uncertainty_ms < _UNKNOWN_MS else None,
        **facts,
    }
    line = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return LogEntry(head.seq + 1, hashlib.sha256(line).digest(), line)


def follow(
    head: LogHead, verdict: Verdict, now: TrustedTime, *, before: Rights, owner_epoch: int
) -> tuple[tuple[LogEntry, ...], bool]:
    """The entries for a newly verified set, and whether the vehicle has a new owner with it.

    A new owner's log begins anew and names the head of the one before, which
    the former owner may have exported; it says nothing of their rights.

    Args:
        before: the set before.
        owner_epoch: the epoch that the log is of, 0 if there was none.
    """
    if not 0 < owner_epoch < verdict.rights.owner_epoch:
        return changes(head, verdict, now, before=before.entitlements), False
    ended = {"entries": head.seq, "head": head.hash.hex()}
    facts = {"epoch": verdict.rights.owner_epoch, "log_before": ended, "signed_by": _signed(verdict)}
    first = entry(LogHead(), "owner", now, facts)
    return (first, *changes(first.head, verdict, now, before={})), True


def changes(
    head: LogHead, verdict: Verdict, now: TrustedTime, *, before: Mapping[str, Entitlement]
) -> tuple[LogEntry, ...]:
    """The entries for a newly verified set of the same owner, in a fixed order; empty if no right changes.

    Args:
        before: rights of the set before, by feature.
    """
    rights, entries = verdict.rights, list[LogEntry]()

    def add(kind: str, facts: Mapping[str, object]) -> None:
        last = entries[-1].head if entries else head
        entries.append(entry(last, kind, now, {**facts, "signed_by": _signed(verdict)}))

    after = rights.entitlements
    for feature_id in sorted(before.keys() | after.keys()):
        old, new = before.get(feature_id), after.get(feature_id)
        if old == new:
            continue
        is_same = old is not None and new is not None and old.entitlement_id == new.entitlement_id
        if old is not None and not is_same:
            add("ended", _facts(old))
        if new is not None:
            spec = rights.features.get(feature_id)
            release = {"release": spec.release if spec else 0}
            add("changed" if is_same else "granted", _facts(new) | release)
    return tuple(entries)


def _signed(verdict: Verdict) -> dict[str, int]:
    return {"director": verdict.director.targets, "catalogue": verdict.catalogue.targets}


def terms_in_words(right: Entitlement) -> str:
    """The limits of a right, for people."""
    parts = [
        right.not_before_s and f"from {_date(right.not_before_s)}",
        right.not_after_s and f"until {_date(right.not_after_s)}",
        right.odometer_from_m and f"from {right.odometer_from_m} m on the odometer",
        right.odometer_to_m and f"up to {right.odometer_to_m} m on the odometer",
        right.ignition_cycles and f"{right.ignition_cycles} ignition cycles",
        right.operating_s and f"{right.operating_s} s of operation",
        right.offline_grace_s and f"{right.offline_grace_s} s without contact to the cloud",
        *(_quota(quota) for quota in right.quotas),
    ]
    return ", ".join(part for part in parts if part) or "no limit"


def export(contents: Sequence[bytes]) -> bytes:
    """The log as a file: one entry a line, and an end line that names the head."""
    seq, digest = len(contents), hashlib.sha256(contents[-1]).digest() if contents else GENESIS
    end = json.dumps({_END: {"entries": seq, "head": digest.hex()}}).encode()
    return b"".join(line + b"\n" for line in (*contents, end))


def summary(content: Mapping[str, object]) -> str:
    """One line on an entry, for people; `content` is what its JSON says."""
    kind = content.get("kind")
    if kind == "evidence":
        return f"{content.get('finding')}"
    signed = content.get("signed_by")
    versions = signed if isinstance(signed, dict) else {}
    by = f"director's set {versions.get('director')}, catalogue {versions.get('catalogue')}"
    if kind == "owner":
        return f"owner {content.get('epoch')}; {by}"
    return f"{content.get('entitlement')}: {content.get('plan')}; {content.get('terms')}; {by}"


def verify_export(content: bytes, *, expected_head: str | None = None) -> LogHead:
    """Checks an export from its first entry to its end line.

    Args:
        expected_head: hex digits of the head that the agent's status names, if at hand.

    Returns:
        Its head, to be compared with the one that the status names.

    Raises:
        GrantLogError: edited, reordered, truncated, or no export at all.
    """
    if len(content) > MAX_EXPORT_BYTES:
        raise GrantLogError(f"the export has more than {MAX_EXPORT_BYTES} bytes")
    *lines, last = content.removesuffix(b"\n").split(b"\n")
    head = verify_chain(lines)
    expected = {_END: {"entries": head.seq, "head": head.hash.hex()}}
    if _parsed(last, head.seq + 1) != expected:
        raise GrantLogError(
            f"expected an end line for {head.seq} entries with head {head.hash.hex()},"
            f" found {last[:200].decode(errors='replace')!r}: the log was cut or edited"
        )
    if expected_head is not None and expected_head.lower() != head.hash.hex():
        raise GrantLogError(
            f"expected head {expected_head}, found {head.hash.hex()} after {head.seq} entries: the log was"
            " edited or cut, or it has grown since"
        )
    return head


def verify_chain(contents: Iterable[bytes]) -> LogHead:
    """Checks that each entry names its number and the hash of the one before it.

    Raises:
        GrantLogError: says at which entry, what was expected and what was found.
    """
    head = LogHead()
    for content in contents:
        found = _parsed(content, head.seq + 1)
        link = (found.get("seq"), found.get("previous"))
        if link != (head.seq + 1, head.hash.hex()):
            raise GrantLogError(
                f"entry {head.seq + 1}: expected number {head.seq + 1} after {head.hash.hex()},"
                f" found {link[0]!r} after {link[1]!r}: the log was edited, reordered or cut"
            )
        head = LogHead(head.seq + 1, hashlib.sha256(content).digest())
    return head


def _parsed(content: bytes, number: int) -> dict[str, object]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise GrantLogError(f"entry {number} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise GrantLogError(f"entry {number} is not a JSON object")
    return found


def _facts(right: Entitlement) -> dict[str, object]:
    return {
        "feature": right.feature_id,
        "entitlement": right.entitlement_id,
        "plan": f"{right.plan_id} version {right.plan_version} ({right.plan_kind.name})",
        "terms": terms_in_words(right),
    }


def _quota(quota: Quota) -> str:
    return f"{quota.meter_id} {'at most' if quota.hard else 'above, charged extra:'} {quota.limit}"


def _date(unix_s: int) -> str:
    try:
        return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"Unix second {unix_s}"
