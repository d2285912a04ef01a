"""Trusted time: what the director signed for a fresh nonce, carried on by the monotonic clock.

    now = max(build time, persisted mark, last signed time + monotonic time since)

Never goes back by itself, so that nobody gains rights by turning a clock back.
Does no I/O and reads no clock: monotonic times come in. The monotonic clock
restarts at boot, so a `TrustedClock` is made anew at each boot from the mark.

Without a signed time the clock runs on from the mark. Time while the vehicle
was off is then missing, and its uncertainty is unknown. So it is with the time
in rights that came as a file: they were signed some time ago.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from agent.model import TrustedTime

DRIFT_PPM = 100  # of a crystal over the automotive range of temperatures
UNKNOWN_UNCERTAINTY_MS = 2**53 - 1

_NS_PER_MS = 1_000_000


class SignedTime(NamedTuple):
    """A time that the director signed, tied to the monotonic clock.

    Args:
        unix_ms: lower bound of the true time when it was received.
        received_ns: monotonic time when it was received.
        uncertainty_ms: how far the true time may have been ahead of `unix_ms`.
    """

    unix_ms: int
    received_ns: int
    uncertainty_ms: int


@dataclass(frozen=True, slots=True)
class TrustedClock:
    """The trusted clock at one moment; `observe_signed` returns its successor.

    Args:
        mark_ms: time that is never undercut, Unix milliseconds; at boot the
            persisted `now(...).unix_ms` of the last run, 0 if there is none.
        build_ms: when this software was built, Unix milliseconds.
        monotonic_ns: monotonic time at which `mark_ms` was true at least.
        signed: last signed time since boot.
        mark_source: where the mark comes from, as `TrustedTime.source` names it.
    """

    mark_ms: int
    build_ms: int
    monotonic_ns: int
    signed: SignedTime | None = None
    mark_source: str = "mark"

    def now(self, monotonic_ns: int) -> TrustedTime:
        """Return the time at a moment of the monotonic clock.

        `unix_ms` of the answer is also the mark to be persisted.
        """
        floor_ms = max(self.mark_ms, self.build_ms)
        if self.signed is None:
            elapsed_ms = _elapsed_ms(self.monotonic_ns, monotonic_ns)
            source = self.mark_source if self.mark_ms > self.build_ms else "build"
            return TrustedTime(floor_ms + elapsed_ms, UNKNOWN_UNCERTAINTY_MS, source)
        elapsed_ms = _elapsed_ms(self.signed.received_ns, monotonic_ns)
        running_ms = self.signed.unix_ms + elapsed_ms
        latest_ms = running_ms + self.signed.uncertainty_ms + _drift_ms(elapsed_ms)
        if floor_ms > running_ms:  # ahead of what was signed: stands still until that catches up
            return TrustedTime(floor_ms, max(0, latest_ms - floor_ms), "mark")
        return TrustedTime(running_ms, latest_ms - running_ms, "signed")

    def observe_signed(
        self, signed_ms: int, nonce_sent_ns: int, received_ns: int, *, new_epoch: bool = False
    ) -> TrustedClock:
        """Take a verified signed time.

        It was signed at some moment between the sending of the nonce and the
        receipt, so the true time at receipt is `signed_ms` at least, and later
        by the nonce's age at most.

        Args:
            signed_ms: time in the director's verified timestamp, Unix milliseconds.
            nonce_sent_ns: monotonic time when its nonce was sent.
            received_ns: monotonic time when it arrived.
            new_epoch: a threshold of root keys replaced the key that signed
                all earlier times (`verifier.starts_new_epoch`): the mark is
                taken from this time alone, so that a stolen key that signed
                2099 is undone.

        Returns:
            The clock from now on.
        """
        age_ms = _elapsed_ms(nonce_sent_ns, received_ns) + 1  # rounded up
        if new_epoch:
            return replace(
                self,
                mark_ms=signed_ms,
                monotonic_ns=received_ns,
                signed=SignedTime(signed_ms, received_ns, age_ms),
                mark_source="mark",
            )
        held = self.now(received_ns)
        latest_ms = signed_ms + age_ms
        since_ns = self.signed.received_ns if self.signed else self.monotonic_ns
        tolerance_ms = _drift_ms(_elapsed_ms(since_ns, received_ns))
        if signed_ms < held.unix_ms <= latest_ms + tolerance_ms:
            # The signature confirms the running estimate, which is the better lower bound.
            signed = SignedTime(held.unix_ms, received_ns, max(0, latest_ms - held.unix_ms))
        else:
            signed = SignedTime(signed_ms, received_ns, age_ms)
        return replace(
            self, mark_ms=held.unix_ms, monotonic_ns=received_ns, signed=signed, mark_source="mark"
        )

    def raise_to(self, signed_ms: int, received_ns: int) -> TrustedClock:
        """Take the verified signed time of a file: a lower bound, and nothing more.

        Never lowers the time, not even in a new epoch: how old a file is,
        nobody can tell; the next contact undoes a stolen future.

        Args:
            signed_ms: time in the file's verified timestamp, Unix milliseconds.
            received_ns: monotonic time when it was read.

        Returns:
            The clock from now on: unchanged, or of unknown uncertainty.
        """
        if signed_ms <= self.now(received_ns).unix_ms:
            return self
        return replace(self, mark_ms=signed_ms, monotonic_ns=received_ns, signed=None, mark_source="file")


def _elapsed_ms(from_ns: int, to_ns: int) -> int:
    return max(0, to_ns - from_ns) // _NS_PER_MS


def _drift_ms(elapsed_ms: int) -> int:
    return -(-elapsed_ms * DRIFT_PPM // 1_000_000)  # rounded up
