"""Signing one vehicle's director metadata beside python-tuf with the same content, in one run.

The vehicle has rights and tokens for ten features: 21 targets. Both make the
same bytes, which is checked first. Ours begins with the contents of the
targets, python-tuf with finished objects: it neither hashes nor builds. CPU
time of one core; serialising the rights, the database and the network are not
in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata
from tuf.api.serialization.json import JSONSerializer

from cloud import director, token
from openfod.entitlement.v1 import entitlement_pb2 as pb

FEATURES = 10
ROUNDS = 500
NOW_MS = int(datetime(2026, 3, 31, 12, tzinfo=UTC).timestamp()) * 1000
VIN, UID = "WFDSEAT10N0000001", bytes(range(16))
VERSION = 41
FEATURE_FILE = Path(__file__).parents[1] / "deploy/demo/catalogue/features/seat-heating/1.toml"

Keys = tuple[CryptoSigner, CryptoSigner, CryptoSigner]
"""Of targets, snapshot and timestamp; also the order of what they sign."""
Made = tuple[bytes, bytes, bytes]


def main() -> None:
    """Prints CPU time per vehicle, vehicles per second, sizes, and ratios to python-tuf."""
    keys = (CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519())
    token_key = Ed25519PrivateKey.generate()
    tokens = _tokens(token_key)
    items = _items(tokens)
    made = _vehicle(keys, items)
    parsed = [(key, Metadata[Any].from_bytes(content)) for key, content in zip(keys, made, strict=True)]
    if made != tuple(_peer(*part) for part in parsed):
        raise RuntimeError("ours and python-tuf's bytes differ: their times cannot be compared")
    whole, peer_whole, timestamp, peer_timestamp, signing = _medians_us(
        lambda: _vehicle(keys, items),
        lambda: [_peer(*part) for part in parsed],
        lambda: _timestamp(keys, made[1]),
        lambda: _peer(*parsed[2]),
        lambda: _tokens(token_key),
    )
    _print(f"targets ({len(items)}), snapshot and timestamp", whole, peer_whole)
    _print("timestamp only", timestamp, peer_timestamp)
    both = whole + signing
    print(
        f"signing {FEATURES} tokens: {signing:.0f} µs; with the metadata {both:.0f} µs, "
        f"{1e6 / both:,.0f} vehicles/s, {100 * signing / both:.0f} % of it tokens"
    )
    names = ("targets", "snapshot", "timestamp")
    parts = ", ".join(f"{name} {len(content):,}" for name, content in zip(names, made, strict=True))
    metadata_bytes, token_bytes = sum(map(len, made)), sum(map(len, tokens))
    print(
        f"size: metadata with tokens {metadata_bytes + token_bytes:,} bytes: {parts}, tokens {token_bytes:,}"
        f"; beside them {len(items[0].content):,} bytes of rights"
    )


def _vehicle(keys: Keys, items: list[director.Item]) -> Made:
    """All that a vehicle gets after a change of its rights."""
    made = director.sign_set(VIN, VERSION, items, targets_key=keys[0], snapshot_key=keys[1], now_ms=NOW_MS)
    return made.targets, made.snapshot, _timestamp(keys, made.snapshot)


def _timestamp(keys: Keys, snapshot: bytes) -> bytes:
    """All that it gets at any other contact."""
    return director.sign_timestamp(
        VIN,
        VERSION,
        set_version=VERSION,
        snapshot=snapshot,
        nonce=UID,
        timestamp_key=keys[2],
        now_ms=NOW_MS,
    )


def _peer(key: CryptoSigner, metadata: Metadata[Any]) -> bytes:
    """What python-tuf needs for the same content when its objects and hashes are there already."""
    metadata.sign(key)
    return metadata.to_bytes(JSONSerializer(compact=True))


def _medians_us(*works: Callable[[], object]) -> list[float]:
    """Median CPU time of each, microseconds; one round runs all of them in turn."""
    taken: list[list[int]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, found in zip(works, taken, strict=True):
            begun = time.process_time_ns()
            work()
            found.append(time.process_time_ns() - begun)
    return [statistics.median(found) / 1e3 for found in taken]


def _print(what: str, ours_us: float, peer_us: float) -> None:
    print(
        f"{what}: ours {ours_us:.0f} µs, {1e6 / ours_us:,.0f} vehicles/s; "
        f"python-tuf {peer_us:.0f} µs, {1e6 / peer_us:,.0f}; ratio of medians {peer_us / ours_us:.2f}"
    )


def _feature(number: int) -> str:
    return f"seat-heating-{number}"


def _tokens(key: Ed25519PrivateKey) -> list[bytes]:
    """One token for each feature, of a subscription that the ECU limits by ignition cycles and hours."""
    terms = {token.TERM_IGNITION_CYCLES: 300, token.TERM_OPERATING_S: 1_080_000}
    return [
        token.sign(
            key,
            vin=VIN,
            uid=UID,
            feature_number=number,
            counter=VERSION,
            state=token.ALLOWED,
            terms=terms,
        )
        for number in range(1, FEATURES + 1)
    ]


def _items(tokens: list[bytes]) -> list[director.Item]:
    """The targets of a vehicle: its rights, and of each feature the signed file and the token."""
    file = FEATURE_FILE.read_bytes()
    items = [director.entitlements(VIN, VERSION, 1, [_right(n) for n in range(1, FEATURES + 1)])]
    for number, content in enumerate(tokens, 1):
        name, ecu, hardware = _feature(number), f"seat-module-{number}", f"openfod-seat-{number}"
        items.append(director.Item(f"features/{name}/1.toml", file, ecu, hardware, 1))
        items.append(director.Item(director.token_path(ecu, name), content, ecu, hardware, VERSION))
    return items


def _right(number: int) -> pb.Entitlement:
    return pb.Entitlement(
        entitlement_id=f"ent-{number:016x}",
        feature_id=_feature(number),
        min_release=1,
        account="acc-4711",
        plan_kind=pb.PLAN_KIND_SUBSCRIPTION,
        plan_id=f"{_feature(number)}-monthly",
        plan_version=1,
        validity=pb.Validity(
            not_after_s=NOW_MS // 1000 + 2_592_000, ignition_cycles=300, operating_s=1_080_000
        ),
        offline_grace_s=604_800,
        resale=pb.RESALE_GOES_WITH_ACCOUNT,
        display_terms=pb.DisplayTerms(price_minor=900, currency="EUR", period="P1M", renews=True),
        trace_id=f"{number:032x}",
    )
