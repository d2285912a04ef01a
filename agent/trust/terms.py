"""Judges whether one right is live: its time, its grace and its odometer range.

Does no I/O and reads no clock. The expiry of metadata never enters here: it
gates what is newly taken, while a right that was taken lives by its own terms.
Ignition cycles and operating time are the ECU's business; how much was used the
meters say, and what that means for a quota is judged here.
"""

from __future__ import annotations

from typing import NamedTuple

from agent.model import Entitlement, PlanKind, Quota, TrustedTime

_MS_PER_S = 1000
_PERCENT = 100


class Right(NamedTuple):
    """What one right allows now.

    Args:
        live: the feature may be activated.
        reason: why, for people.
        ends_ms: when it has to be judged again at the latest, because its time
            or its grace ends then, Unix milliseconds; None: time does not end it.
        undecided: not live only because the odometer is not known. Nothing may
            be newly activated on it; what is active need not be taken away.
    """

    live: bool
    reason: str
    ends_ms: int | None = None
    undecided: bool = False


class QuotaState(NamedTuple):
    """How far a quota is used up.

    Args:
        used, limit: in the meter's unit; of the running period, if the quota has periods.
        stage: highest stage of warning that is reached, percent; 0: none.
        beyond: the limit is reached: a hard quota suspends, a soft one is billed as overage.
        words: for people; changes with the stage, not with each unit. Empty if there is nothing to say.
    """

    meter_id: str
    used: int
    limit: int
    hard: bool
    stage: int
    beyond: bool
    words: str


def period_of(quota: Quota, now: TrustedTime) -> int | None:
    """Start of the period that a quota counts now, Unix seconds; None if it is for the whole right.

    Before its first period it counts that one already: a clock that is late gives nothing away.
    """
    if not quota.period_starts_s:
        return None
    begun = [start for start in quota.period_starts_s if start * _MS_PER_S <= now.unix_ms]
    return max(begun, default=quota.period_starts_s[0])


def judge_quota(quota: Quota, used: int) -> QuotaState:
    """Judge how far a quota is used up.

    Args:
        used: since the start of its period, or under the whole right, in the meter's unit.
    """
    reached = [stage for stage in quota.warn_percent if used * _PERCENT >= quota.limit * stage]
    beyond = used >= quota.limit
    words = ""
    if beyond and quota.hard:
        words = f"quota of {quota.meter_id} is used up: limit {quota.limit}"
    elif beyond:
        words = f"overage: {quota.meter_id} is beyond its quota of {quota.limit}, and more is billed"
    elif reached:
        words = f"{reached[-1]} % of the quota of {quota.meter_id} is used"
    return QuotaState(quota.meter_id, used, quota.limit, quota.hard, max(reached, default=0), beyond, words)


def judge(
    entitlement: Entitlement, *, now: TrustedTime, last_contact_ms: int, odometer_m: int | None
) -> Right:
    """Judge a right by its own terms.

    A perpetual right is live whatever the clock says: what was bought outright
    must survive a vehicle that has lost its time for good.

    Past `not_after_s` a right goes on for its offline grace only while the
    vehicle has had no contact with its cloud since: after a contact the cloud
    has had its chance to renew, and did not.

    Args:
        entitlement: verified right.
        now: trusted time.
        last_contact_ms: signed time of the last verified update, Unix
            milliseconds; 0 if there never was one.
        odometer_m: odometer in metres; None if it is stale or missing.

    Returns:
        Whether it is live, and why.
    """
    if entitlement.plan_kind is PlanKind.PERPETUAL:
        return Right(live=True, reason="bought outright")
    begin_ms = entitlement.not_before_s * _MS_PER_S
    if now.unix_ms < begin_ms:
        return Right(live=False, reason="its time has not begun", ends_ms=begin_ms)
    by_time = _judge_end(entitlement, now.unix_ms, last_contact_ms)
    if not by_time.live:
        return by_time
    return _judge_odometer(entitlement, odometer_m) or by_time


def _judge_end(entitlement: Entitlement, now_ms: int, last_contact_ms: int) -> Right:
    end_ms = entitlement.not_after_s * _MS_PER_S
    grace_end_ms = end_ms + entitlement.offline_grace_s * _MS_PER_S
    if end_ms == 0:
        return Right(live=True, reason="in force, without an end")
    if now_ms < end_ms:
        failed = entitlement.display.get("payment_failed")
        reason = "in force, but a payment failed: it ends soon unless it is paid" if failed else "in force"
        return Right(live=True, reason=reason, ends_ms=end_ms)
    if entitlement.display.get("payment_failed"):
        return Right(live=False, reason="a payment failed, and its grace has ended")
    if last_contact_ms >= end_ms:
        return Right(live=False, reason="its time has ended, and the cloud did not renew it")
    if now_ms < grace_end_ms:
        return Right(live=True, reason="in its offline grace", ends_ms=grace_end_ms)
    return Right(live=False, reason="its time and its offline grace have ended")


def _judge_odometer(entitlement: Entitlement, odometer_m: int | None) -> Right | None:
    """Return why the odometer ends the right; None if it does not."""
    from_m, to_m = entitlement.odometer_from_m, entitlement.odometer_to_m
    if from_m == 0 and to_m == 0:
        return None
    if odometer_m is None:
        return Right(live=False, reason="its odometer range cannot be checked", undecided=True)
    if odometer_m < from_m:
        return Right(live=False, reason="its odometer range has not begun")
    if to_m and odometer_m >= to_m:
        return Right(live=False, reason="its odometer range has ended")
    return None
