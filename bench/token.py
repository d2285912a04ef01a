"""Token verification against bare Ed25519 over the same bytes, in one run, and the sizes of tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.trust.token import verify_token
from cloud import token as cloud_token
from firmware_sim import token as sim_token

VIN = "WFDSEAT10N0000001"
UID = bytes.fromhex("0f0d5ea7000000000000000000000001")
ROUNDS = 2000
PER_ROUND = 3
GOAL = 1.2


def main() -> None:
    """Prints the medians of each verification, their ratios to bare Ed25519, and token sizes in bytes."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key()
    raw = public.public_bytes_raw()
    content = _token(key, {cloud_token.TERM_IGNITION_CYCLES: 200})
    signature, signed = _signed_bytes(content)

    def bare() -> None:
        public.verify(signature, signed)

    def as_the_ecu() -> None:
        token = sim_token.parse(content)
        if token.kid != sim_token.key_id(raw):
            raise AssertionError
        token.check_signature(raw, vin=VIN, uid=UID)
        sim_token.check_counter(token, counter=0, sha256="")

    def as_the_agent() -> None:
        verify_token(content, raw, VIN, UID)

    medians = _medians({"bare Ed25519": bare, "simulated ECU": as_the_ecu, "agent": as_the_agent})
    base_us = medians["bare Ed25519"]
    for name, us in medians.items():
        print(f"{name}: median {us:.1f} µs, {us / base_us:.3f} times bare Ed25519 (goal ≤ {GOAL})")
    _print_sizes(key)


def _medians(runs: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Microseconds of CPU per call; the runs take turns, so that noise of the machine meets all of them."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begun = time.thread_time_ns()
            for _ in range(PER_ROUND):
                run()
            taken[name].append((time.thread_time_ns() - begun) / PER_ROUND / 1000)
    return {name: statistics.median(times) for name, times in taken.items()}


def _signed_bytes(content: bytes) -> tuple[bytes, bytes]:
    """The signature of a token and the Sig_structure under it (RFC 9052 section 4.4)."""
    external = b"\x83\x70openfod-token-v1\x71" + VIN.encode() + b"\x50" + UID
    head = b"\x84\x6aSignature1" + content[2:16] + b"\x58" + bytes([len(external)])
    return content[-64:], head + external + content[17:-66]


def _token(
    key: Ed25519PrivateKey,
    terms: dict[int, cloud_token.Limit],
    *,
    counter: int = 7,
    link: int = cloud_token.LINK_BOTH,
    parameters: bytes = b"",
) -> bytes:
    return cloud_token.sign(
        key,
        vin=VIN,
        uid=UID,
        feature_number=1,
        counter=counter,
        state=cloud_token.ALLOWED,
        terms=terms,
        link=link,
        parameters=parameters,
    )


def _print_sizes(key: Ed25519PrivateKey) -> None:
    largest: dict[int, cloud_token.Limit] = dict.fromkeys(range(1, 9), cloud_token.MAX_LIMIT)
    largest[cloud_token.TERM_ODOMETER_RANGE_M] = (cloud_token.MAX_LIMIT - 1, cloud_token.MAX_LIMIT)
    two = {n: largest[n] for n in (4, 5)}
    sizes = {
        "unlimited": _token(key, {}),
        "200 ignition cycles": _token(key, {5: 200}),
        "200 cycles and 100 hours": _token(key, {5: 200, 6: 360_000}),
        "the two longest terms, longest counter": _token(key, two, counter=cloud_token.MAX_COUNTER),
        "all eight terms and 32 bytes of parameters": _token(
            key, largest, counter=cloud_token.MAX_COUNTER, link=cloud_token.LINK_VIN, parameters=bytes(32)
        ),
    }
    print("bytes: " + "; ".join(f"{name} {len(content)}" for name, content in sizes.items()))
