"""The cloud's vocabulary: plain values that its parts pass to one another.

Pure: no I/O, no clock, no randomness. Times in `_ms` are Unix milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

VIN_PATTERN = r"[A-HJ-NPR-Z0-9]{17}"
"""ISO 3779:2009: 17 characters without I, O and Q."""
IDENTIFIER_PATTERN = r"[a-z][a-z0-9-]{1,47}"
"""Features, plans, ECU identifiers and hardware identifiers."""
HEAD_UNIT = "head-unit"
"""ECU identifier of features that live on the agent itself."""


@dataclass(frozen=True, slots=True)
class Ecu:
    """An ECU as built into a vehicle.

    Args:
        uid: 16 bytes, to which its tokens are bound.
        reading_key: Ed25519 public key with which it signs what it counts, 32 bytes; empty if it
            signs nothing.
    """

    identifier: str
    hardware_id: str
    uid: bytes
    reading_key: bytes = b""


@dataclass(frozen=True, slots=True)
class Release:
    """What the cloud needs to know of one signed release of one feature.

    Args:
        path: target path in the catalogue repository.
        content: the signed bytes.
        feature_number: number in a token; 0 if the ECU verifies none.
        meters: meter id -> kind: "duration", "distance", "energy" or "count".
        withdrawn: no new grants; existing rights go on.
        detect_only: no ECU enforces it, which its signed file admits.
        by_use: it may be sold by use, pay-per-use or prepaid.
        dimensions: meter id -> name -> values.
        reading_meter: the meter that the ECU's own counter is compared with; empty if it signs none.
    """

    path: str
    content: bytes
    feature_id: str
    release: int
    title: str
    ecu_identifier: str
    hardware_id: str
    feature_number: int
    withdrawn: bool
    meters: dict[str, str]
    detect_only: bool = False
    by_use: bool = False
    dimensions: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    reading_meter: str = ""


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions of a repository's metadata that a vehicle trusts; 0 means none."""

    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0


@dataclass(frozen=True, slots=True)
class Counter:
    """The highest token counter that a vehicle has trusted for one feature in one ECU."""

    ecu_identifier: str
    feature_id: str
    counter: int


@dataclass(frozen=True, slots=True)
class Reported:
    """What a vehicle says that it trusts: a claim, which decides nothing by itself.

    Args:
        owner_epoch: 0 if it has no rights yet.
    """

    director: Versions = Versions()
    counters: tuple[Counter, ...] = ()
    owner_epoch: int = 0
