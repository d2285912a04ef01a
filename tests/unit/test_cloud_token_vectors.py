"""The cloud's signer gives the published token vectors byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud import token

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "token.json").read_text())
KEYS = {
    key["public"]: Ed25519PrivateKey.from_private_bytes(bytes.fromhex(key["seed"]))
    for key in VECTORS["keys"].values()
}
LINKED_TO_BOTH = {"linked to both, said explicitly"}


def _claims(vector: dict[str, Any]) -> dict[int, object]:
    found = vector["claims"]
    claims: dict[int, object] = {1: found["version"], 2: found["feature"], 3: found["counter"]}
    claims[4] = found["state"]
    if found["link"] != token.LINK_BOTH or vector["name"] in LINKED_TO_BOTH:
        claims[5] = found["link"]
    if found["terms"]:
        claims[6] = {int(term): limit for term, limit in found["terms"].items()}
    if found["parameters"] is not None:
        claims[7] = bytes.fromhex(found["parameters"])
    return claims


@pytest.mark.parametrize("vector", VECTORS["accepted"], ids=[v["name"] for v in VECTORS["accepted"]])
def test_accepted_vector_is_reproduced(vector: dict[str, Any]) -> None:
    link = vector["claims"]["link"]
    made = token.sign_claims(
        KEYS[vector["key_public"]],
        _claims(vector),
        vin=None if link == token.LINK_UID else vector["vin"],
        uid=None if link == token.LINK_VIN else bytes.fromhex(vector["uid"]),
    )
    assert made.hex() == vector["token"]


def test_what_the_director_signs_is_the_common_vector() -> None:
    vector = VECTORS["accepted"][0]
    made = token.sign(
        KEYS[vector["key_public"]],
        vin=vector["vin"],
        uid=bytes.fromhex(vector["uid"]),
        feature_number=vector["claims"]["feature"],
        counter=vector["claims"]["counter"],
        state=token.ALLOWED,
        terms={token.TERM_IGNITION_CYCLES: 200},
    )
    assert made.hex() == vector["token"]
    assert len(made) < 128


SIGNABLE = [
    v
    for v in VECTORS["accepted"]
    if v["name"] not in LINKED_TO_BOTH
    and (set(v["claims"]["terms"]) & {"5", "6", "7"} or not set(v["claims"]["terms"]) & {"1", "2", "3", "4"})
]


@pytest.mark.parametrize("vector", SIGNABLE, ids=[v["name"] for v in SIGNABLE])
def test_every_term_link_and_parameter_is_signed_as_published(vector: dict[str, Any]) -> None:
    claims = vector["claims"]
    made = token.sign(
        KEYS[vector["key_public"]],
        vin=vector["vin"],
        uid=bytes.fromhex(vector["uid"]),
        feature_number=claims["feature"],
        counter=claims["counter"],
        state=claims["state"],
        terms={int(n): tuple(v) if isinstance(v, list) else v for n, v in claims["terms"].items()},
        link=claims["link"],
        parameters=bytes.fromhex(claims["parameters"] or ""),
    )
    assert made.hex() == vector["token"]


def test_the_common_cases_fit_into_128_bytes() -> None:
    """Both links and one or two terms, at their largest values, with the largest counter and feature."""
    numbers: dict[int, token.Limit] = dict.fromkeys(range(1, 9), token.MAX_LIMIT) | {4: (2**31, 2**31 + 1)}
    for first in (5, 6, 7):
        for second, limit in numbers.items():
            made = _sign(
                terms={first: numbers[first], second: limit},
                counter=token.MAX_COUNTER,
                feature_number=token.MAX_FEATURE,
            )
            assert len(made) <= 128, (first, second, len(made))


def _sign(**changed: Any) -> bytes:
    claims: dict[str, Any] = {
        "vin": "WFDSEAT10N0000001",
        "uid": bytes(16),
        "feature_number": 1,
        "counter": 1,
        "state": token.ALLOWED,
        "terms": {},
    }
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    return token.sign(key, **{**claims, **changed})


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"counter": 0}, "counter"),
        ({"counter": 2**32}, "counter"),
        ({"feature_number": 0}, "feature"),
        ({"feature_number": 2**16}, "feature"),
        ({"state": 2}, "state"),
        ({"state": token.DENIED, "terms": {5: 1}}, "terms"),
        ({"link": 0}, "link"),
        ({"link": 4}, "link"),
        ({"vin": "SHORT"}, "VIN"),
        ({"uid": bytes(15)}, "uid"),
        ({"parameters": bytes(33)}, "parameters"),
        ({"terms": {5: 0}}, "term 5"),
        ({"terms": {6: 2**32}}, "term 6"),
        ({"terms": {7: -1}}, "term 7"),
        ({"terms": {0: 1, 5: 1}}, "number of a term"),
        ({"terms": {9: 1, 5: 1}}, "number of a term"),
        ({"terms": {4: 5, 5: 1}}, "range"),
        ({"terms": {3: (1, 2), 5: 1}}, "range"),
        ({"terms": {4: (2, 2), 5: 1}}, "odometer, to"),
        ({"terms": {4: (0, 2**32), 5: 1}}, "odometer, to"),
        ({"terms": {1: 1_900_000_000}}, "beside"),
        ({"terms": {4: (1, 2), 8: 120}}, "beside"),
    ],
    ids=str,
)
def test_claims_outside_the_contract_are_not_signed(changed: dict[str, Any], what: str) -> None:
    assert len(_sign()) > 64
    with pytest.raises(ValueError, match=what):
        _sign(**changed)
