"""What is signed is what a vehicle takes: one list of feature files for both parsers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.errors import AgentError
from agent.metering.ledger import check_conditions
from agent.trust.catalogue import parse_feature
from keys.errors import CatalogueError
from keys.lint import lint

FILE = Path(__file__).with_name("catalogue.json")
DOCUMENT: dict[str, Any] = json.loads(FILE.read_text())


@dataclass(frozen=True)
class Vector:
    """One feature file; `refused_by` names nobody, both parsers, or the stricter one that signs."""

    name: str
    feature: str
    content: bytes
    refused_by: tuple[str, ...]
    reason: str


def _vector(entry: dict[str, Any]) -> Vector:
    text = "\n".join(DOCUMENT["bases"][entry["base"]])
    for old, new in entry["edits"]:
        assert old in text, (entry["name"], old)
        text = text.replace(old, new)
    return Vector(
        entry["name"], entry["base"], text.encode(), tuple(entry["refused_by"]), entry.get("reason", "")
    )


VECTORS = [_vector(entry) for entry in DOCUMENT["vectors"]]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v.name)
def test_what_signs_a_feature_file(vector: Vector, tmp_path: Path) -> None:
    path = tmp_path / "features" / vector.feature / "1.toml"
    path.parent.mkdir(parents=True)
    path.write_bytes(vector.content)
    if "keys" not in vector.refused_by:
        assert len(lint(tmp_path)) == 1
        return
    with pytest.raises(CatalogueError) as caught:
        lint(tmp_path)
    assert vector.reason in str(caught.value)


@pytest.mark.parametrize("vector", [v for v in VECTORS if v.refused_by != ("keys",)], ids=lambda v: v.name)
def test_what_takes_a_feature_file(vector: Vector) -> None:
    if not vector.refused_by:
        check_conditions(parse_feature(vector.content))
        return
    with pytest.raises(AgentError):
        check_conditions(parse_feature(vector.content))


def test_nothing_is_signed_that_a_vehicle_refuses() -> None:
    assert {vector.refused_by for vector in VECTORS} == {(), ("keys",), ("keys", "agent")}
