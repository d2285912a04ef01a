"""Windows that wait for their end over more than one restart."""

from __future__ import annotations

from support.engine_world import INFOS

from agent.metering.ledger import Ledger
from agent.metering.meter import OpenWindow
from agent.metering.record import Head
from agent.model import MeterKind, TrustedTime
from agent.signals.state import SignalState

S = 1_000_000_000
BEGUN_MS = 1_800_000_000_000
SIGNED = TrustedTime(BEGUN_MS + 3_600_000, 250, "signed")


def _ledger() -> Ledger:
    return Ledger("veh-0123456789abcdef", INFOS, lambda *_args, **_fields: None)


def _window(mark_ns: int) -> OpenWindow:
    return OpenWindow(
        feature_id="seat-heating",
        meter_id="active-time",
        entitlement_id="ent-1",
        account="acc-anna",
        trace_id="0" * 32,
        kind=MeterKind.DURATION,
        start_ms=BEGUN_MS,
        mark_ns=mark_ns,
        mark_ms=BEGUN_MS,
        odometer=None,
        odometer_m=None,
    )


def test_a_window_of_an_earlier_boot_is_measured_by_unix_time_after_a_second_restart() -> None:
    """The second start is in the boot of the first, but the window's monotonic mark is of the boot before."""
    first = _ledger()
    head = Head("00000000deadbeef")
    first.restore(head, {}, (_window(900 * S),), same_boot=False, now=SIGNED)
    kept = first.open_windows(now_ns=5 * S, now=SIGNED)
    second = _ledger()
    second.restore(head, {}, kept, same_boot=True, now=SIGNED)
    assert second.resolve(lambda _feature: True, SignalState(INFOS), now_ns=20 * S, now=SIGNED)
    (use,) = second.unsaved
    assert (use.gap, use.gap_unbounded) == (3_600_250, False)
