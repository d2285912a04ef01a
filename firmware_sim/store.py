"""Keeps an ECU's durable state in a file that is replaced as a whole.

A save returns when file and folder are on the disk; a crash leaves the old
state or the new one, never a mixture. A file that cannot be read is an error
and never an empty state: forgetting would make burnt tokens good again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from firmware_sim.ecu import EcuState, Reason, Right, StoreError, Total

MAX_STATE_BYTES = 65_536
"""Largest state file that is read."""
_FORMAT = 3
_WITHOUT_TOTALS = 2  # the format before this one, of ECUs that signed no readings


class FileStore:
    """A state file.

    Args:
        path: the file; its folder must exist when the state is saved.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> EcuState:
        """Returns what was saved last, or an empty state if there is no file.

        Raises:
            StoreError: the file is there and cannot be used.
        """
        try:
            with self._path.open("rb") as file:
                raw = file.read(MAX_STATE_BYTES + 1)
        except FileNotFoundError:
            return EcuState()
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be read: {error.strerror}") from error
        if len(raw) > MAX_STATE_BYTES:
            raise StoreError(f"{self._path}: longer than {MAX_STATE_BYTES} bytes")
        try:
            return _from_json(json.loads(raw))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise StoreError(f"{self._path}: not a state file: {error}; delete it to begin anew") from error

    def save(self, state: EcuState) -> None:
        """Replaces the file; durable when it returns.

        Raises:
            StoreError: could not be written; the old file is unchanged.
        """
        temporary = self._path.with_name(self._path.name + ".new")
        try:
            with temporary.open("wb") as file:
                file.write(json.dumps(_to_json(state), indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be written: {error.strerror}") from error


def _to_json(state: EcuState) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "token_keys": {str(epoch): key.hex() for epoch, key in state.token_keys.items()},
        "rights": {
            str(number): {
                "counter": right.counter,
                "sha256": right.sha256,
                "allowed": right.allowed,
                "terms": {str(term): value for term, value in right.terms.items()},
                "parameters": right.parameters.hex(),
                "released": right.released,
                "cycles_used": right.cycles_used,
                "operating_ms": right.operating_ms,
                "executions_used": right.executions_used,
                "accepted_s": right.accepted_s,
                "accepted_m": right.accepted_m,
                "ended": int(right.ended),
                "is_final": right.is_final,
                "waits": int(right.waits),
            }
            for number, right in state.rights.items()
        },
        "heard_s": state.heard_s,
        "heard_m": state.heard_m,
        "totals": {
            str(number): {"on_ms": total.on_ms, "executions": total.executions}
            for number, total in state.totals.items()
        },
        "readings": state.readings,
    }


def _from_json(found: Any) -> EcuState:
    if found["format"] not in {_FORMAT, _WITHOUT_TOTALS}:
        raise ValueError(f"format {found['format']!r}, expected {_FORMAT}")
    if found["format"] == _WITHOUT_TOTALS:
        found = {**found, "totals": {}, "readings": 0}
    return EcuState(
        token_keys={int(epoch): bytes.fromhex(key) for epoch, key in found["token_keys"].items()},
        rights={int(number): _right(right) for number, right in found["rights"].items()},
        heard_s=_known(found["heard_s"]),
        heard_m=_known(found["heard_m"]),
        totals={
            int(number): Total(int(total["on_ms"]), int(total["executions"]))
            for number, total in found["totals"].items()
        },
        readings=int(found["readings"]),
    )


def _right(found: Any) -> Right:
    return Right(
        counter=int(found["counter"]),
        sha256=str(found["sha256"]),
        allowed=found["allowed"] is True,
        terms={int(term): _limit(value) for term, value in found["terms"].items()},
        parameters=bytes.fromhex(found["parameters"]),
        released=found["released"] is True,
        cycles_used=int(found["cycles_used"]),
        operating_ms=int(found["operating_ms"]),
        executions_used=int(found["executions_used"]),
        accepted_s=_known(found["accepted_s"]),
        accepted_m=_known(found["accepted_m"]),
        ended=Reason(found["ended"]),
        is_final=found["is_final"] is True,
        waits=Reason(found["waits"]),
    )


def _limit(found: Any) -> int | tuple[int, int]:
    if isinstance(found, list):
        lowest, highest = found
        return int(lowest), int(highest)
    return int(found)


def _known(found: Any) -> int | None:
    return None if found is None else int(found)
