"""What an ECU signs of its own count, on its way to the cloud (docs/reading.md).

Pure. The agent holds no key for it and changes nothing of it: it asks, bounds
the answer, and lets the next usage record of the feature carry it.
"""

from __future__ import annotations

from agent.model import FeatureSpec

MAX_READING_BYTES = 512
"""Longest reading that a usage record carries."""
_POSITIVE = 0x62


def reading_of(spec: FeatureSpec, answer: bytes) -> bytes | None:
    """Takes the reading out of a ReadDataByIdentifier answer (ISO 14229-1:2020, service 0x22).

    Returns:
        1 to MAX_READING_BYTES bytes as the ECU signed them; None if the answer is of another DID, empty or
        longer.
    """
    if spec.reading is None:
        return None
    head = bytes([_POSITIVE]) + spec.reading.did.to_bytes(2, "big")
    content = answer[len(head) :]
    if not answer.startswith(head) or not 0 < len(content) <= MAX_READING_BYTES:
        return None
    return content
