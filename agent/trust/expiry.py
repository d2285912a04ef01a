"""What will end soon, in words: metadata, roots, TLS anchors, and rights that nobody renews.

Does no I/O and reads no clock. Only tells: expiry itself is judged where the
metadata is taken, and rights live by their own terms (`agent.trust.terms`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from agent.model import PlanKind, Rights

DAY_MS = 86_400_000
AHEAD_MS = 14 * DAY_MS
"""How long ahead an end is told."""
ROOT_AHEAD_MS = 90 * DAY_MS
"""The same for roots: a ceremony takes weeks to call."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Something that ends soon, or has ended.

    Args:
        what: such as "catalogue root" or "right ent-0123456789abcdef".
        ends_ms: Unix milliseconds.
        words: the whole of it for people, with what comes next.
    """

    what: str
    ends_ms: int
    words: str


def endings(expires_ms: Mapping[str, int], rights: Rights, now_ms: int) -> tuple[Ending, ...]:
    """List what ends soon or has ended, the earliest first.

    Args:
        expires_ms: expiry of each metadata file, by repository and role (`Verdict.expires_ms`).
        rights: rights that are in use.
        now_ms: trusted time, Unix milliseconds.
    """
    found = [*_metadata(expires_ms, now_ms), *_anchors(rights, now_ms), *_rights(rights, now_ms)]
    return tuple(sorted(found, key=lambda ending: (ending.ends_ms, ending.what)))


def _metadata(expires_ms: Mapping[str, int], now_ms: int) -> Iterator[Ending]:
    for what, ends_ms in expires_ms.items():
        role = what.rpartition(" ")[2]
        # The cloud renews timestamps each day: one that still runs needs no word.
        ahead_ms = {"root": ROOT_AHEAD_MS, "timestamp": 0}.get(role, AHEAD_MS)
        if ends_ms - now_ms <= ahead_ms:
            yield _ending(what, ends_ms, now_ms, "stored rights go on; " + _next_step(what, role))


def _next_step(what: str, role: str) -> str:
    if role == "root":
        return f"the holders of the {what} keys sign the next root (fod-keys rotate)"
    if what == "catalogue targets":
        return "the catalogue is signed anew (fod-keys sign-catalogue)"
    return "the next contact with the cloud renews it, or fod-agent import of a new file"


def _anchors(rights: Rights, now_ms: int) -> Iterator[Ending]:
    last_ms = max((anchor.not_after_ms for anchor in rights.tls_anchors), default=None)
    if last_ms is not None and last_ms - now_ms <= AHEAD_MS:
        next_step = "without a newer one there is no connection then, only fod-agent import"
        yield _ending("last certificate that the cloud is known by", last_ms, now_ms, next_step)


def _rights(rights: Rights, now_ms: int) -> Iterator[Ending]:
    for feature_id, right in rights.entitlements.items():
        ends_ms = right.not_after_s * 1000
        if right.plan_kind is PlanKind.PERPETUAL or not ends_ms or right.display.get("renews") is True:
            continue
        if ends_ms - now_ms <= AHEAD_MS:
            what = f"right {right.entitlement_id} to {feature_id}"
            yield _ending(what, ends_ms, now_ms, "it does not renew by itself")


def _ending(what: str, ends_ms: int, now_ms: int, next_step: str) -> Ending:
    day = datetime.fromtimestamp(ends_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    verb = "ends" if ends_ms > now_ms else "ended"
    return Ending(what, ends_ms, f"{what} {verb} {day}: {next_step}")
