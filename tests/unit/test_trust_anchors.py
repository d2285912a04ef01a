"""The signed list of server certificates, at each of its limits."""

from __future__ import annotations

import base64
import json

import pytest

from agent.errors import LimitError, MalformedError
from agent.model import TlsAnchor
from agent.trust.anchors import parse_tls_anchors

LAST_MS = 253_402_300_799_000  # 9999-12-31T23:59:59Z
DER = b"\x30\x03\x02\x01\x00"


def server(**changes: object) -> dict[str, object]:
    text = base64.b64encode(DER).decode()
    return {"certificate": text, "not_before_ms": 1, "not_after_ms": 2, **changes}


def listed(*servers: object, **more: object) -> bytes:
    return json.dumps({"servers": list(servers), **more}).encode()


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (1, 2), (LAST_MS - 1, LAST_MS), (0, LAST_MS)])
def test_a_time_within_its_range_is_read(begin: int, end: int) -> None:
    found = parse_tls_anchors(listed(server(not_before_ms=begin, not_after_ms=end)))
    assert found == (TlsAnchor(DER, begin, end),)


@pytest.mark.parametrize(
    "changes",
    [
        {"not_before_ms": -1},
        {"not_before_ms": 2},
        {"not_before_ms": 3},
        {"not_before_ms": False},
        {"not_before_ms": "1"},
        {"not_after_ms": LAST_MS + 1},
        {"not_after_ms": True, "not_before_ms": 0},
        {"not_after_ms": None},
    ],
)
def test_any_other_time_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedError, match=r"servers\[1\]: expected not_before_ms before not_after_ms"):
        parse_tls_anchors(listed(server(), server(**changes)))


@pytest.mark.parametrize("text", ["", None, 1, "MAM=~", "MAM", "M\nAMCAQA=", "é"])
def test_what_is_no_base64_of_anything_is_refused(text: object) -> None:
    with pytest.raises(MalformedError, match=r"servers\[0\].certificate: "):
        parse_tls_anchors(listed(server(certificate=text)))


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"[1]",
        b"null",
        b'"servers"',
        b"{}",
        listed(),
        listed(server(), more=1),
        json.dumps({"servers": server()}).encode(),
        json.dumps({"servers": "x"}).encode(),
        b'{"servers": 1}',
        json.dumps({"server": [server()]}).encode(),
        listed(server(more=1)),
        listed({"certificate": "MAM=", "not_before_ms": 1}),
        listed(["certificate", "not_before_ms", "not_after_ms"]),
        listed(1),
    ],
)
def test_another_form_is_refused(content: bytes) -> None:
    with pytest.raises(MalformedError, match=r"tls\.json(: | servers)"):
        parse_tls_anchors(content)


def test_as_many_servers_and_bytes_as_the_limits_say_and_no_more() -> None:
    assert len(parse_tls_anchors(listed(*[server()] * 8))) == 8
    with pytest.raises(LimitError, match=r"servers: 9 is more than the limit of 8"):
        parse_tls_anchors(listed(*[server()] * 9))
    content = listed(server())
    assert len(parse_tls_anchors(content + b" " * (16_384 - len(content)))) == 1
    with pytest.raises(LimitError, match=r"bytes: 16385 is more than the limit of 16384"):
        parse_tls_anchors(content + b" " * (16_385 - len(content)))
