"""One-time codes by which a vehicle's present owner agrees to its sale.

A code has 160 bits, works once, for one vehicle, for a limited time; only its
SHA-256 is stored. What a sale does to rights is in `rights`.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from cloud.enrolment import Claim, one_time_token, token_hash
from cloud.errors import InvalidRequestError, TransferCodeError
from cloud.store import Transaction

MAX_CODE_CHARACTERS = 128
"""Longest code."""
MAX_WRONG_TRIES = 10
"""Wrong tries that end a code."""


def begin(tx: Transaction, vin: str, ttl_s: int, random: Callable[[int], bytes], now_ms: int) -> Claim:
    """Makes the vehicle's only open code; one made before ends."""
    code = one_time_token(random)
    expires_ms = now_ms + ttl_s * 1000
    tx.put_transfer(vin, token_hash(code), expires_ms)
    return Claim(code, expires_ms)


def use(tx: Transaction, vin: str, code: str, now_ms: int) -> None:
    """Uses up the code of a sale.

    A wrong try is counted, so whoever calls this stores the transaction also
    if it raises TransferCodeError; the last one ends the code, with an alarm.

    Raises:
        InvalidRequestError: the code is too long.
        TransferCodeError: no code is open, it has ended, or it is another one.
    """
    if len(code) > MAX_CODE_CHARACTERS:
        raise InvalidRequestError(
            "transfer_code", expected=f"at most {MAX_CODE_CHARACTERS} characters", found=len(code)
        )
    opened = tx.transfer(vin)
    if opened is None:
        raise TransferCodeError(f"no sale of vehicle {vin} is open")
    if now_ms >= opened.expires_ms:
        raise TransferCodeError(
            f"the code of vehicle {vin} ended {(now_ms - opened.expires_ms) // 1000} s ago"
        )
    if hmac.compare_digest(opened.code_hash, token_hash(code)):
        tx.end_transfer(vin)
        return
    tries = opened.wrong_tries + 1
    tx.set_wrong_tries(vin, tries)
    if tries >= MAX_WRONG_TRIES:
        tx.end_transfer(vin)
        tx.audit("cloud", "transfer-code-ended", vin, now_ms, alarm=True, wrong_tries=tries)
    raise TransferCodeError(f"wrong code for vehicle {vin}, try {tries} of {MAX_WRONG_TRIES}")
