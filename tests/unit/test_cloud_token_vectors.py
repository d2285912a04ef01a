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


@pytest.mark.parametrize(
    ("counter", "state", "terms"),
    [(0, token.ALLOWED, {}), (2**32, token.ALLOWED, {}), (1, token.DENIED, {5: 1})],
    ids=["counter 0", "counter too high", "denied with terms"],
)
def test_claims_outside_the_contract_are_not_signed(counter: int, state: int, terms: dict[int, int]) -> None:
    with pytest.raises(ValueError, match=r"counter|terms"):
        token.sign(
            Ed25519PrivateKey.generate(),
            vin="WFDSEAT10N0000001",
            uid=bytes(16),
            feature_number=1,
            counter=counter,
            state=state,
            terms=terms,
        )
