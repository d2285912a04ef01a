"""The golden vectors hold for the simulated ECU's verifier, and for an independent COSE library."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cwt import COSE, COSEAlgs, COSEKey, COSEKeyParams

from firmware_sim import token as sim_token

HERE = Path(__file__).parent
VECTORS: dict[str, Any] = json.loads((HERE / "token.json").read_text(encoding="utf-8"))


def by_name(kind: str) -> list[Any]:
    return [pytest.param(v, id=v["name"]) for v in VECTORS[kind]]


def judge(vector: dict[str, Any]) -> tuple[sim_token.Token, sim_token.Freshness]:
    """The checks of an ECU in their order, for one vector."""
    advisory: set[int] = {1, 2} if "clock" not in vector["own"] else set()
    advisory |= {3, 4} if "odometer" not in vector["own"] else set()
    token = sim_token.parse(
        bytes.fromhex(vector["token"]),
        implemented=frozenset(sim_token.Term(number) for number in vector["terms"]),
        advisory=frozenset(sim_token.Term(number) for number in advisory),
    )
    root = bytes.fromhex(vector["root_public"])
    known = [sim_token.verify_announcement(bytes.fromhex(a), root=root) for a in vector["announcements"]]
    newest = max(known, key=lambda a: a.epoch, default=None)
    if newest is None or sim_token.key_id(newest.key) != token.kid:
        raise sim_token.SignatureError("kid unknown or below the highest epoch")
    token.check_signature(newest.key, vin=vector["vin"], uid=bytes.fromhex(vector["uid"]))
    stored = vector["stored"] or {"counter": 0, "sha256": ""}
    return token, sim_token.check_counter(token, **stored)


@pytest.mark.parametrize("vector", by_name("accepted"))
def test_accepted_vector_is_accepted_and_says_what_it_says(vector: dict[str, Any]) -> None:
    token, freshness = judge(vector)
    expected = vector["claims"]
    assert freshness.value == vector["outcome"]
    assert token.sha256 == vector["sha256"]
    assert token.claims.feature == expected["feature"]
    assert token.claims.counter == expected["counter"]
    assert token.claims.allowed == (expected["state"] == 1)
    assert token.claims.link == expected["link"]
    assert json.loads(json.dumps(dict(token.claims.terms))) == expected["terms"]
    assert (token.claims.parameters.hex() or None) == expected["parameters"]


@pytest.mark.parametrize("vector", by_name("accepted"))
def test_accepted_vector_verifies_under_an_independent_cose_library(vector: dict[str, Any]) -> None:
    key = COSEKey.new(
        {
            COSEKeyParams.KTY: 1,
            COSEKeyParams.CRV: 6,
            COSEKeyParams.ALG: COSEAlgs.EDDSA,
            COSEKeyParams.KID: sim_token.key_id(bytes.fromhex(vector["key_public"])),
            COSEKeyParams.X: bytes.fromhex(vector["key_public"]),
        }
    )
    link = vector["claims"]["link"]
    external = [
        "openfod-token-v1",
        vector["vin"] if link & 1 else None,
        bytes.fromhex(vector["uid"]) if link & 2 else None,
    ]
    payload = COSE.new().decode(bytes.fromhex(vector["token"]), key, external_aad=cbor2.dumps(external))
    assert cbor2.loads(payload)[2] == vector["claims"]["feature"]


@pytest.mark.parametrize("vector", by_name("refused"))
def test_refused_vector_is_refused_with_its_nrc(vector: dict[str, Any]) -> None:
    with pytest.raises(sim_token.TokenError) as caught:
        judge(vector)
    assert caught.value.nrc == vector["nrc"]


@pytest.mark.parametrize("vector", [v for v in by_name("refused") if v.values[0]["stage"] == "form"])
def test_malformed_vector_is_seen_without_a_key(vector: dict[str, Any]) -> None:
    with pytest.raises(sim_token.TokenError):
        sim_token.parse(bytes.fromhex(vector["token"]))


def test_the_common_case_is_shorter_than_128_bytes() -> None:
    assert len(bytes.fromhex(VECTORS["accepted"][0]["token"])) < 128


def test_the_file_is_what_its_generator_makes() -> None:
    made = runpy.run_path(str(HERE / "make_token_vectors.py"))["rendered"]()
    assert made == (HERE / "token.json").read_text(encoding="utf-8")
