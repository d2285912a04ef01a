"""Makes reading.json, the golden vectors of docs/reading.md.

To make it anew: `PYTHONPATH=tests python tests/vectors/make_reading_vectors.py`.

Builds every byte from cbor2 and cryptography alone, as make_token_vectors.py
does. The keys are published test keys: never use them for anything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cbor2
from vectors.make_token_vectors import FOREIGN, OTHER_UID, UID, Key, dumps

ECU_KEY = Key("ECU reading key")
"""The seat module's own key."""

DESCRIPTION = [
    "Golden vectors of docs/reading.md for an ECU, the cloud and the agent. All bytes are lower-case hex.",
    "keys: published test keys; seed is the Ed25519 private key, kid the first 8 bytes of SHA-256(public).",
    (
        "accepted: what the ECU with this uid and keys.ecu signs for these claims; executions null: it "
        "counts none. response is the whole UDS answer to request."
    ),
    (
        "refused: what the cloud does not take from the ECU with this uid, and why: form (malformed; no key "
        "is needed to see it), uid (of another ECU) or signature."
    ),
]
COSE_SIGN1 = 18
BIG = 2**53


def claims(
    *,
    uid: bytes = UID,
    feature: int = 1,
    reading: int = 1,
    token_counter: int = 1,
    on_ms: int = 0,
    executions: int | None = 0,
) -> dict[int, object]:
    """The claims of one reading."""
    found: dict[int, object] = {1: 1, 2: uid, 3: feature, 4: reading, 5: token_counter, 6: on_ms}
    return found if executions is None else {**found, 7: executions}


def sign(
    said: Mapping[int, object] | bytes,
    key: Key = ECU_KEY,
    *,
    context: str = "openfod-reading-v1",
    kid: bytes | None = None,
    unprotected: Mapping[int, object] | None = None,
    tag: int = COSE_SIGN1,
) -> bytes:
    """A reading with whatever claims, as the ECU with `key` would sign them."""
    payload = said if isinstance(said, bytes) else dumps(dict(said))
    protected = dumps({1: -8, 4: kid or key.kid})
    signature = key.private.sign(dumps(["Signature1", protected, dumps([context]), payload]))
    return dumps(cbor2.CBORTag(tag, [protected, dict(unprotected or {}), payload, signature]))


def accepted() -> list[dict[str, Any]]:
    """Readings that fit."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("common case", {"reading": 42, "token_counter": 7, "on_ms": 3_600_000, "executions": 12}),
        ("first reading of a new ECU without a token", {"token_counter": 0}),
        ("an ECU that counts no executions", {"on_ms": 1, "executions": None}),
        ("numbers of one byte", {"reading": 23, "token_counter": 24, "on_ms": 255, "executions": 23}),
        ("numbers of two and four bytes", {"reading": 256, "token_counter": 65_535, "on_ms": 65_536}),
        (
            "the highest numbers",
            {
                "feature": 65_535,
                "reading": 2**32 - 1,
                "token_counter": 2**32 - 1,
                "on_ms": BIG,
                "executions": BIG,
            },
        ),
    ]
    found = []
    for name, changes in cases:
        said = {"feature": 1, "reading": 1, "token_counter": 1, "on_ms": 0, "executions": 0, **changes}
        content = sign(claims(**said))
        # The DIDs of docs/reading.md end at feature 31; a catalogue may name any.
        did = (0x0F40 + min(said["feature"], 31)).to_bytes(2, "big")
        found.append(
            {
                "name": name,
                "uid": UID.hex(),
                **said,
                "reading_hex": content.hex(),
                "request": (b"\x22" + did).hex(),
                "response": (b"\x62" + did + content).hex(),
            }
        )
    return found


def refused() -> list[dict[str, Any]]:
    """Readings that do not fit."""
    good = sign(claims(reading=2))

    def as_reading(number: str) -> bytes:
        """Claims whose claim 4 is encoded like this, hex."""
        plain = dumps(claims(reading=2))
        assert plain.count(b"\x04\x02") == 1
        return plain.replace(b"\x04\x02", b"\x04" + bytes.fromhex(number))

    swapped = b"\xa2" + dumps(2) + dumps(UID) + dumps(1) + dumps(1)
    cases: list[tuple[str, str, bytes]] = [
        ("empty", "form", b""),
        ("longer than 512 bytes", "form", good + bytes(512)),
        ("bytes after the end", "form", good + b"\x00"),
        ("cut", "form", good[:-1]),
        ("another tag", "form", sign(claims(), tag=17)),
        ("an unprotected header", "form", sign(claims(), unprotected={1: 1})),
        ("another version", "form", sign({**claims(), 1: 2})),
        ("a claim that is not in the table", "form", sign({**claims(), 8: 1})),
        ("a missing claim", "form", sign({k: v for k, v in claims().items() if k != 6})),
        ("reading 0", "form", sign(claims(reading=0))),
        ("reading above the highest", "form", sign(claims(reading=2**32))),
        ("feature 65,536", "form", sign(claims(feature=65_536))),
        ("token counter above the highest", "form", sign(claims(token_counter=2**32))),
        ("executions above the highest", "form", sign(claims(executions=BIG + 1))),
        ("a number of two bytes that fits in none", "form", sign(as_reading("1900 02"))),
        ("a number of two bytes that fits in one", "form", sign(as_reading("19 00ff"))),
        ("a number of four bytes that fits in two", "form", sign(as_reading("1a 0000ffff"))),
        ("a number of eight bytes that fits in four", "form", sign(as_reading("1b 00000000ffffffff"))),
        ("an argument that CBOR keeps free", "form", sign(as_reading("1c"))),
        ("claims that end in a number", "form", sign(dumps(claims(on_ms=3_600_000, executions=None))[:-2])),
        ("a claim fewer than the map says", "form", sign(b"\xa7" + dumps(claims(executions=None))[1:])),
        ("bytes after the claims", "form", sign(dumps(claims()) + b"\x00")),
        ("feature 0", "form", sign(claims(feature=0))),
        ("a negative time", "form", sign({**claims(), 6: -1})),
        ("a time above the highest", "form", sign(claims(on_ms=BIG + 1))),
        ("a time that is true", "form", sign({**claims(), 6: True})),
        ("a time that is text", "form", sign({**claims(), 6: "1"})),
        ("a uid of 15 bytes", "form", sign(claims(uid=UID[:15]))),
        ("claims that are a list", "form", sign(dumps([1, UID, 1, 1, 1, 0, 0]))),
        (
            "a number that is longer than it need be",
            "form",
            sign(as_reading("18 02")),
        ),
        ("claims out of order", "form", sign(swapped)),
        ("a map of indefinite length", "form", sign(b"\xbf" + dumps(claims())[1:] + b"\xff")),
        ("of another ECU", "uid", sign(claims(uid=OTHER_UID), FOREIGN)),
        ("of another ECU, signed by this one", "uid", sign(claims(uid=OTHER_UID))),
        ("by another key", "signature", sign(claims(), FOREIGN)),
        ("by another key under this kid", "signature", sign(claims(), FOREIGN, kid=ECU_KEY.kid)),
        ("made as a token", "signature", sign(claims(), context="openfod-token-v1")),
        ("a bit of the time changed", "signature", _flipped(sign(claims(on_ms=3_600_000)))),
        ("a bit of the signature changed", "signature", good[:-1] + bytes([good[-1] ^ 1])),
    ]
    return [
        {"name": name, "uid": UID.hex(), "why": why, "reading_hex": content.hex()}
        for name, why, content in cases
    ]


def _flipped(content: bytes) -> bytes:
    """Halves the time of a reading that names one hour."""
    before = dumps(3_600_000)
    assert content.count(before) == 1
    return content.replace(before, dumps(1_800_000))


def document() -> dict[str, Any]:
    """The whole file."""
    return {
        "description": DESCRIPTION,
        "origin": "generated by this script (make_reading_vectors.py)",
        "specification": "docs/reading.md, version 1; RFC 9052, RFC 8949 section 4.2.1, RFC 8032",
        "keys": {"ecu": ECU_KEY.described(), "foreign": FOREIGN.described()},
        "accepted": accepted(),
        "refused": refused(),
    }


FILE = Path(__file__).with_name("reading.json")

if __name__ == "__main__":
    FILE.write_text(json.dumps(document(), indent=1) + "\n", encoding="utf-8")
