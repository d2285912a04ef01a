"""The agent reads the golden token vectors as an ECU does; the counter rules are the ECU's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from agent.errors import SignatureError, TrustError
from agent.trust.token import parse_token, verify_token

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "token.json").read_text())
TOKEN_KEYS = [
    bytes.fromhex(key["public"]) for name, key in VECTORS["keys"].items() if name.startswith("token_key")
]


def vectors(kind: str, *stages: str) -> list[Any]:
    """Choose vectors; without an announced key there is nothing that the agent could verify with."""
    chosen = [v for v in VECTORS[kind] if v["announcements"] and (not stages or v["stage"] in stages)]
    return [pytest.param(v, id=v["name"]) for v in chosen]


@pytest.mark.parametrize("vector", vectors("accepted"))
def test_an_accepted_token_is_read_and_verified(vector: dict[str, Any]) -> None:
    content = bytes.fromhex(vector["token"])
    claims = verify_token(
        content, bytes.fromhex(vector["key_public"]), vector["vin"], bytes.fromhex(vector["uid"])
    )
    assert claims == parse_token(content)
    said = vector["claims"]
    assert claims.feature == said["feature"]
    assert claims.counter == said["counter"]
    assert claims.allows == bool(said["state"])
    assert claims.link == said["link"]
    assert json.loads(json.dumps(claims.terms)) == said["terms"]
    assert (claims.parameters.hex() if claims.parameters else None) == said["parameters"]
    assert hashlib.sha256(content).hexdigest() == vector["sha256"]


@pytest.mark.parametrize("vector", vectors("refused", "length", "form"))
def test_a_malformed_token_is_refused_without_a_key(vector: dict[str, Any]) -> None:
    with pytest.raises(TrustError):
        parse_token(bytes.fromhex(vector["token"]))


@pytest.mark.parametrize("vector", vectors("refused", "signature"))
def test_a_wrongly_signed_token_is_refused_under_the_announced_key(vector: dict[str, Any]) -> None:
    content = bytes.fromhex(vector["token"])
    announced = announced_key(vector)
    assert announced is not None
    with pytest.raises(SignatureError):
        verify_token(content, announced, vector["vin"], bytes.fromhex(vector["uid"]))


@pytest.mark.parametrize("vector", vectors("refused", "counter", "ecu"))
def test_what_only_the_ecu_can_refuse_is_well_formed_and_signed(vector: dict[str, Any]) -> None:
    announced = announced_key(vector)
    assert announced is not None
    verify_token(bytes.fromhex(vector["token"]), announced, vector["vin"], bytes.fromhex(vector["uid"]))


def announced_key(vector: dict[str, Any]) -> bytes | None:
    """Return the public key of the highest epoch that the vector announces."""
    announced = vector["announcements"][-1:]
    return next((key for key in TOKEN_KEYS for a in announced if key.hex() in a), None)
