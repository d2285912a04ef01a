"""One list of readings for who signs (the ECU), who carries (the agent) and who judges (the cloud)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cwt import COSE, COSEAlgs, COSEKey, COSEKeyParams
from support.engine_world import catalogue_feature
from vectors import make_reading_vectors

from agent.features.guard import reading_request
from agent.metering.reading import reading_of
from agent.model import ReadingSpec
from cloud.errors import ReadingError
from cloud.readings import parse
from firmware_sim import reading as sim_reading
from firmware_sim.token import key_id

VECTORS: dict[str, Any] = json.loads(make_reading_vectors.FILE.read_text(encoding="utf-8"))
PUBLIC = bytes.fromhex(VECTORS["keys"]["ecu"]["public"])


def by_name(kind: str) -> list[Any]:
    return [pytest.param(v, id=v["name"]) for v in VECTORS[kind]]


@pytest.mark.parametrize("vector", by_name("accepted"))
def test_the_ecu_signs_these_very_bytes(vector: dict[str, Any]) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["keys"]["ecu"]["seed"]))
    names = ("feature", "reading", "token_counter", "on_ms", "executions")
    counted = sim_reading.Counted(**{name: vector[name] for name in names})
    assert sim_reading.sign(key, bytes.fromhex(vector["uid"]), counted).hex() == vector["reading_hex"]


@pytest.mark.parametrize("vector", by_name("accepted"))
def test_the_agent_asks_for_it_and_carries_it_untouched(vector: dict[str, Any]) -> None:
    did = int.from_bytes(bytes.fromhex(vector["request"])[1:])
    feature = replace(catalogue_feature(), reading=ReadingSpec(did, 60, "active-time"))
    assert reading_request(feature).hex() == vector["request"]
    content = reading_of(feature, bytes.fromhex(vector["response"]))
    assert content is not None
    assert content.hex() == vector["reading_hex"]


@pytest.mark.parametrize("vector", by_name("accepted"))
def test_the_cloud_takes_it_for_what_it_says(vector: dict[str, Any]) -> None:
    reading = parse(bytes.fromhex(vector["reading_hex"]))
    reading.check_signature(PUBLIC)
    assert reading.uid.hex() == vector["uid"]
    for name in ("feature", "reading", "token_counter", "on_ms", "executions"):
        assert getattr(reading, name) == vector[name]


@pytest.mark.parametrize("vector", by_name("accepted"))
def test_it_verifies_under_an_independent_cose_library(vector: dict[str, Any]) -> None:
    key = COSEKey.new(
        {
            COSEKeyParams.KTY: 1,
            COSEKeyParams.CRV: 6,
            COSEKeyParams.ALG: COSEAlgs.EDDSA,
            COSEKeyParams.KID: key_id(PUBLIC),
            COSEKeyParams.X: PUBLIC,
        }
    )
    external = cbor2.dumps(["openfod-reading-v1"])
    payload = COSE.new().decode(bytes.fromhex(vector["reading_hex"]), key, external_aad=external)
    assert cbor2.loads(payload)[6] == vector["on_ms"]


@pytest.mark.parametrize("vector", by_name("refused"))
def test_the_cloud_refuses_it_at_the_stage_that_the_list_says(vector: dict[str, Any]) -> None:
    content = bytes.fromhex(vector["reading_hex"])
    if vector["why"] == "form":
        with pytest.raises(ReadingError):
            parse(content)
        return
    reading = parse(content)
    assert (reading.uid.hex() != vector["uid"]) == (vector["why"] == "uid")
    if vector["why"] == "signature":
        with pytest.raises(ReadingError):
            reading.check_signature(PUBLIC)


def test_the_common_case_is_shorter_than_160_bytes_and_the_longest_than_512() -> None:
    sizes = [len(bytes.fromhex(vector["reading_hex"])) for vector in VECTORS["accepted"]]
    assert sizes[0] < 160
    assert max(sizes) <= sim_reading.MAX_READING_BYTES


def test_the_file_is_what_its_generator_makes() -> None:
    assert json.loads(json.dumps(make_reading_vectors.document())) == VECTORS
    assert Path(make_reading_vectors.FILE).read_text(encoding="utf-8").endswith("}\n")


def test_no_changed_bit_of_a_reading_is_taken() -> None:
    content = bytes.fromhex(VECTORS["accepted"][0]["reading_hex"])
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ReadingError):
            parse(bytes(changed)).check_signature(PUBLIC)
