"""The second copy of the floors: `floors.json`, in a folder of its own.

An attacker who brings back an older copy of the database meets the floors of
the newer one here, if this folder lies on another partition. Written after
the database: a power cut between the two leaves this copy behind, which is
harmless, because the higher of both counts. A damaged copy is named and not
used; it can then neither lower a floor nor raise one by a flipped digit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from agent.adapters.files import write_durably
from agent.errors import FloorsError
from agent.trust.floors import floors_to_json, read_floors
from agent.trust.verifier import Floors

FILE = "floors.json"
FORM = 1
"""Version of the file's form."""
MAX_BYTES = 1_048_576
"""Largest file that is read: 256 features and as many counters, with room."""


class FloorsFile:
    """The file of one vehicle; used by one thread at a time."""

    def __init__(self, folder: Path, vin: str) -> None:
        self.path = folder / FILE
        self._vin = vin

    def read(self) -> Floors | None:
        """Returns the floors; None if there is no such file.

        Raises:
            FloorsError: it is damaged, of another vehicle, or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FloorsError(f"{self.path} cannot be read: {error.strerror}; {_NEXT_STEP}") from error
        try:
            return self._parse(content)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FloorsError(f"{self.path} is damaged: {error}; {_NEXT_STEP}") from error

    def _parse(self, content: bytes) -> Floors:
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        document = json.loads(content)
        if not isinstance(document, dict) or document.get("form") != FORM:
            raise ValueError(f"it is not of form {FORM}")
        if document["vin"] != self._vin:
            raise ValueError(f"it is of another vehicle than {self._vin}")
        floors = document["floors"]
        if document["sha256"] != _digest(floors):
            raise ValueError("its content does not have the hash that it names")
        return read_floors(floors)

    def write(self, floors: Floors) -> None:
        """Replaces the file, durably.

        Raises:
            FloorsError: it cannot be written; the old one is there.
        """
        content = floors_to_json(floors)
        document = {"form": FORM, "vin": self._vin, "sha256": _digest(content), "floors": content}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_durably(self.path, json.dumps(document).encode())
        except OSError as error:
            raise FloorsError(f"{self.path} cannot be written: {error.strerror}") from error


_NEXT_STEP = "the floors in the database count; the next update writes this file anew"


def _digest(floors: object) -> str:
    return hashlib.sha256(json.dumps(floors, sort_keys=True).encode()).hexdigest()
