"""The owner's log under a pen: what is edited, reordered, dropped, added or cut is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.engine_world import entitlement

from agent.errors import GrantLogError
from agent.model import TrustedTime
from agent.trust.grant_log import GENESIS, LogEntry, LogHead, entry, export, verify_export

NOW = TrustedTime(1_800_000_000_000, 40, "signed")


def entries(count: int = 5) -> list[LogEntry]:
    made: list[LogEntry] = []
    for number in range(count):
        head = made[-1].head if made else LogHead()
        facts = {"feature": entitlement(number).feature_id, "finding": f"finding {number}"}
        made.append(entry(head, "evidence", replace(NOW, unix_ms=NOW.unix_ms + number), facts))
    return made


ENTRIES = entries()
LINES = [e.content for e in ENTRIES]
WHOLE = export(LINES)
HEAD = ENTRIES[-1].head


def test_a_genuine_export_is_whole() -> None:
    assert verify_export(WHOLE) == HEAD
    assert verify_export(WHOLE, expected_head=HEAD.hash.hex().upper()) == HEAD
    assert verify_export(export([])) == LogHead(0, GENESIS)


def test_an_export_that_an_owner_keeps_stays_readable() -> None:
    first = b'{"at_ms":0,"kind":"evidence","previous":"' + b"0" * 64 + b'","seq":1}'
    digest = "8b23d7e051c81f2ebe73aac5600c45c2232042a563c1efd619443115b0558840"
    kept = first + b'\n{"end": {"entries": 1, "head": "' + digest.encode() + b'"}}\n'
    assert verify_export(kept) == LogHead(1, bytes.fromhex(digest))
    assert export([first]) == kept


def test_an_export_of_64_mib_is_read_and_a_longer_one_is_not() -> None:
    longest = WHOLE.removesuffix(b"\n").ljust(64 * 2**20)
    assert verify_export(longest) == HEAD
    with pytest.raises(GrantLogError, match="more than 67108864 bytes"):
        verify_export(longest + b" ")


def test_any_changed_byte_and_any_cut_is_found() -> None:
    for at in range(len(WHOLE) - 1):
        changed = bytearray(WHOLE)
        changed[at] ^= 0x01
        for other in (bytes(changed), WHOLE[:at]):
            with pytest.raises(GrantLogError):
                verify_export(other)


def test_reordered_dropped_doubled_and_added_entries_are_found() -> None:
    lines = WHOLE.splitlines()
    for other in (
        [lines[1], lines[0], *lines[2:]],
        [*lines[:2], *lines[3:]],
        [*lines[:2], lines[1], *lines[2:]],
        lines[1:],
        lines[:-1],
        lines[:-2] + lines[-1:],
        [*lines, lines[-1]],
        [*lines[:-1], b"{}", lines[-1]],
        [*lines[:-1], b"[]", lines[-1]],
    ):
        with pytest.raises(GrantLogError):
            verify_export(b"\n".join(other) + b"\n")


def test_a_log_that_was_cut_or_made_anew_with_a_fitting_end_is_found_by_the_head_of_the_status() -> None:
    anew: list[LogEntry] = []
    for number in range(5):
        head = anew[-1].head if anew else LogHead()
        anew.append(entry(head, "evidence", NOW, {"finding": f"another finding {number}"}))
    for other in (export(LINES[:3]), export([]), export([e.content for e in anew])):
        assert verify_export(other) != HEAD
        with pytest.raises(GrantLogError, match="expected head"):
            verify_export(other, expected_head=HEAD.hash.hex())


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"[" * 100_000, b"null", b"1\n2"])
def test_what_is_no_export_is_refused_as_such(content: bytes) -> None:
    with pytest.raises(GrantLogError):
        verify_export(content)
