"""Inputs that once ended in an untyped error, kept small."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.errors import DatabaseError
from agent.signals.database import read
from cloud.catalogue import _release
from cloud.errors import StartError

FEATURE = b"""[feature]
id = "f"
release = %s
title = "t"
withdrawn = false
[ecu]
identifier = "e"
hardware_id = "h"
[actuator]
kind = "none"
"""


def test_a_dbc_of_absurd_statements_alone_is_refused() -> None:
    with pytest.raises(DatabaseError):
        read(b'VERSION "1SG_ P : 0|0@1+ (1,0) [0|0] "" A\n', Path("x.dbc"))


@pytest.mark.parametrize("release", [b"1e999", b"1.9", b"nan", b"true", b'"1"', b"[" * 5000])
def test_a_release_that_is_no_whole_number_is_refused_by_the_cloud(release: bytes) -> None:
    with pytest.raises(StartError, match="not a feature file"):
        _release("features/f/1.toml", FEATURE % release)
