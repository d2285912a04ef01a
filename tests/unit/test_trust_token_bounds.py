"""A token's form at each of its limits, and which key and which ECU it may be verified for."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from vectors import make_token_vectors as signer

from agent.errors import LimitError, MalformedError, SignatureError
from agent.trust.token import TokenClaims, parse_announcement, parse_token, verify_token

U16, U32 = 65_535, 4_294_967_295


def token(claims: Any = None, **other: object) -> bytes:
    """A token of the published key; `other` replaces claims by name."""
    numbers = {"version": 1, "feature": 2, "counter": 3, "state": 4, "link": 5, "terms": 6, "parameters": 7}
    content: dict[int, object] = {1: 1, 2: 1, 3: 1, 4: 1} if claims is None else claims
    content |= {numbers[name]: value for name, value in other.items()}
    return signer.sign1(signer.dumps(content), signer.external(), signer.KEY_1)


def parts(*entries: object, tag: int = 18) -> bytes:
    return signer.dumps(cbor2.CBORTag(tag, list(entries)))


HEADER = signer.dumps({1: -8, 4: signer.KEY_1.kid})
PAYLOAD = signer.dumps({1: 1, 2: 1, 3: 1, 4: 1})
SIGNATURE = bytes(64)


def verify(content: bytes, **changes: bytes) -> TokenClaims:
    inputs: dict[str, bytes] = {"public_key": signer.KEY_1.public, "uid": signer.UID, **changes}
    return verify_token(content, inputs["public_key"], signer.VIN, inputs["uid"])


# --- verifying -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"public_key": signer.KEY_1.public[:31]}, {"uid": signer.UID + b"\x00"}, {"uid": b""}]
)
def test_a_key_or_a_uid_of_another_length_verifies_nothing(changes: dict[str, bytes]) -> None:
    with pytest.raises(MalformedError, match="expected 32 and 16 bytes"):
        verify(token(), **changes)


def test_a_token_that_names_another_key_than_its_signer_is_refused() -> None:
    header = signer.dumps({1: -8, 4: signer.KEY_2.kid})
    content = signer.sign1(PAYLOAD, signer.external(), signer.KEY_1, protected=header)
    with pytest.raises(SignatureError, match="expected key"):
        verify(content)


@pytest.mark.parametrize("size", [1, 12, 13, 14, 23, 24, 32])  # with 12, the payload has 23 bytes
def test_parameters_of_every_length_of_head_are_verified(size: int) -> None:
    assert verify(token(parameters=bytes(size))).parameters == bytes(size)


@pytest.mark.parametrize("size", [23, 24, 25, 128, 255, 256, 257])
def test_what_is_bound_is_encoded_in_its_shortest_form(size: int) -> None:
    name = "V" * size
    content = signer.sign1(PAYLOAD, signer.external(vin=name), signer.KEY_1)
    assert verify_token(content, signer.KEY_1.public, name, signer.UID).counter == 1


@pytest.mark.parametrize("link", [1, 2, 3])
def test_each_link_is_verified_with_what_it_binds(link: int) -> None:
    claims: dict[int, object] = {1: 1, 2: 1, 3: 1, 4: 1, 5: link}
    content = signer.sign1(signer.dumps(claims), signer.external(link), signer.KEY_1)
    assert verify(content).link == link
    foreign = signer.sign1(
        signer.dumps(claims), signer.external(link, signer.OTHER_VIN, signer.OTHER_UID), signer.KEY_1
    )
    with pytest.raises(SignatureError):
        verify(foreign)


# --- claims ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("feature", value) for value in (1, U16)),
        *(("counter", value) for value in (1, U32)),
        *(("state", value) for value in (0, 1)),
        *(("link", value) for value in (1, 2, 3)),
        *(("terms", {number: value}) for number in (1, 2, 3, 8) for value in (0, U32)),
        *(("terms", {number: value}) for number in (5, 6, 7) for value in (1, U32)),
        *(("terms", {4: value}) for value in ([0, 1], [0, U32], [U32 - 1, U32])),
        *(("parameters", bytes(size)) for size in (1, 32)),
    ],
)
def test_a_claim_at_its_bound_is_read(name: str, value: object) -> None:
    found = parse_token(token(**{name: value}))
    said: object = {
        "feature": found.feature,
        "counter": found.counter,
        "state": int(found.allows),
        "link": found.link,
        "terms": {k: list(v) if isinstance(v, tuple) else v for k, v in found.terms.items()},
        "parameters": found.parameters,
    }[name]
    assert said == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("version", value) for value in (0, 2, b"\x01")),
        *(("feature", value) for value in (0, U16 + 1, "1", [1])),
        *(("counter", value) for value in (0, -1, -6, U32 + 1)),
        *(("state", value) for value in (-1, 2)),
        *(("link", value) for value in (0, 4)),
        *(("terms", {number: value}) for number in (1, 2, 3, 8) for value in (-1, U32 + 1)),
        *(("terms", {number: value}) for number in (5, 6, 7) for value in (0, U32 + 1)),
        *(("terms", {4: value}) for value in ([1, 1], [2, 1], [-1, 1], [0, U32 + 1], [0], [0, 1, 2], 1)),
        *(("terms", {number: 1}) for number in (0, 9, -1)),
        *(("terms", value) for value in ({}, [1], 1, {"1": 1})),
        *(("parameters", value) for value in (b"", bytes(33), "text", 1)),
    ],
)
def test_a_claim_beyond_its_bound_is_refused(name: str, value: object) -> None:
    with pytest.raises(MalformedError):
        parse_token(token(**{name: value}))


@pytest.mark.parametrize("missing", [1, 2, 3, 4])
def test_a_claim_that_must_be_there_is(missing: int) -> None:
    claims: dict[int, object] = {1: 1, 2: 1, 3: 1, 4: 1}
    del claims[missing]
    with pytest.raises(MalformedError):
        parse_token(token(claims))


@pytest.mark.parametrize("number", [0, 8, -1, "x", b"x"])
def test_a_claim_that_is_not_known_is_refused(number: int | str | bytes) -> None:
    claims: dict[object, object] = {1: 1, 2: 1, 3: 1, 4: 1, number: 1}
    with pytest.raises(MalformedError, match="numbers 1 to 7"):
        parse_token(signer.sign1(signer.dumps(claims), signer.external(), signer.KEY_1))


def test_what_takes_away_has_no_terms() -> None:
    with pytest.raises(MalformedError, match="none when state is 0"):
        parse_token(token(state=0, terms={5: 1}))
    assert parse_token(token(state=0)).allows is False


# --- envelope --------------------------------------------------------------------


def test_a_token_of_the_longest_length_is_read_to_its_end_and_a_longer_one_is_not() -> None:
    """256 bytes are read, and then found to be no token; 257 are not read at all."""
    longest = parts(HEADER, {}, bytes(256 - len(parts(HEADER, {}, b"", SIGNATURE)) - 1), SIGNATURE)
    assert len(longest) == 256
    with pytest.raises(MalformedError):
        parse_token(longest)
    with pytest.raises(LimitError, match="257 is more than the limit of 256"):
        parse_token(longest + b"\x00")


@pytest.mark.parametrize(
    "content",
    [
        parts(HEADER, {}, PAYLOAD, SIGNATURE, tag=17),
        parts(HEADER, {}, PAYLOAD, SIGNATURE, tag=19),
        parts(HEADER, {}, PAYLOAD),
        parts(HEADER, {}, PAYLOAD, SIGNATURE, b""),
        parts(HEADER, {1: 1}, PAYLOAD, SIGNATURE),
        parts(HEADER, [], PAYLOAD, SIGNATURE),
        parts(HEADER, {}, "p" * 9, SIGNATURE),
        parts(HEADER, {}, [PAYLOAD], SIGNATURE),
        parts(HEADER, {}, PAYLOAD, "s" * 64),
        parts(HEADER, {}, PAYLOAD, SIGNATURE[:63]),
        parts(HEADER, {}, PAYLOAD, SIGNATURE + b"\x00"),
        parts(signer.dumps({1: -7, 4: signer.KEY_1.kid}), {}, PAYLOAD, SIGNATURE),
        parts(signer.dumps({1: -9, 4: signer.KEY_1.kid}), {}, PAYLOAD, SIGNATURE),
        parts(signer.dumps({1: -8, 4: signer.KEY_1.kid[:7]}), {}, PAYLOAD, SIGNATURE),
        parts(signer.dumps({1: -8, 4: signer.KEY_1.kid + b"\x00"}), {}, PAYLOAD, SIGNATURE),
        parts(signer.dumps({1: -8, 3: signer.KEY_1.kid}), {}, PAYLOAD, SIGNATURE),
        parts(signer.dumps({1: -8, 4: signer.KEY_1.kid, 5: 1}), {}, PAYLOAD, SIGNATURE),
        parts(HEADER, {}, signer.dumps([1]), SIGNATURE),
        parts(HEADER, {}, PAYLOAD + b"\x00", SIGNATURE),
        parts(HEADER, {}, PAYLOAD, SIGNATURE) + b"\x00",
        signer.dumps([HEADER, {}, PAYLOAD, SIGNATURE]),
        signer.dumps(cbor2.CBORTag(18, cbor2.CBORTag(18, [HEADER, {}, PAYLOAD, SIGNATURE]))),
        b"",
    ],
)
def test_any_other_envelope_is_refused(content: bytes) -> None:
    assert parse_token(parts(HEADER, {}, PAYLOAD, SIGNATURE)).counter == 1
    with pytest.raises(MalformedError):
        parse_token(content)


def payload(raw: str) -> bytes:
    return parts(HEADER, {}, bytes.fromhex(raw), SIGNATURE)


@pytest.mark.parametrize(
    "raw",
    [
        "A4 01 01 02 01 03 01 04 18 01",  # 1 in two bytes
        "A4 01 01 02 01 03 18 17 04 01",  # 23 in two bytes
        "A4 01 01 02 01 03 19 00 FF 04 01",  # 255 in three
        "A4 01 01 02 01 03 1A 00 00 FF FF 04 01",  # 65,535 in five
        "A4 01 01 02 01 03 1B 00 00 00 00 FF FF FF FF 04 01",  # 2^32 - 1 in nine
        "A4 01 01 02 01 03 1C 04 01",  # a reserved length
        "BF 01 01 02 01 03 01 04 01 FF",  # an indefinite length
        "A4 01 01 02 01 04 01 03 01",  # keys out of order
        "A5 01 01 02 01 03 01 03 01 04 01",  # a key twice
        "A5 01 01 02 01 03 01 04 01 80 01",  # an array as a key
        "A4 01 01 02 01 03 01 04 F5",  # true
        "A4 01 01 02 01 03 01 04 F9 3C 00",  # 1.0
        "A5 01 01 02 01 03 01 04 01 61 FF 01",  # text that is not UTF-8
        "A4 01 01 02 01 03 01 04 C1 01",  # a tag
        "A4 01 01 02 01 03 01 04",  # ends inside
    ],
)
def test_any_encoding_but_the_deterministic_one_is_refused(raw: str) -> None:
    assert parse_token(payload("A4 01 01 02 01 03 01 04 01")).counter == 1
    with pytest.raises(MalformedError):
        parse_token(payload(raw))


@pytest.mark.parametrize(
    ("raw", "counter"), [("17", 23), ("18 18", 24), ("19 01 00", 256), ("1A 00 01 00 00", 65_536)]
)
def test_each_shortest_form_is_read(raw: str, counter: int) -> None:
    assert parse_token(payload(f"A4 01 01 02 01 03 {raw} 04 01")).counter == counter


def test_nesting_as_deep_as_the_limit_says_is_read_and_no_deeper() -> None:
    """Claim 6 lies at depth 1 of its own; an array in it ends in "malformed" while it may be read at all."""
    with pytest.raises(MalformedError):
        parse_token(payload("A5 01 01 02 01 03 01 04 01 06 81 81 81 00"))
    with pytest.raises(LimitError, match="5 is more than the limit of 4"):
        parse_token(payload("A5 01 01 02 01 03 01 04 01 06 81 81 81 81 00"))


# --- announcements ------------------------------------------------------------------


def announced(content: dict[object, object]) -> bytes:
    return signer.sign1(signer.dumps(content), ["openfod-token-key-v1"], signer.ROOT)


@pytest.mark.parametrize("epoch", [1, U32])
def test_the_epoch_of_an_announcement_is_read(epoch: int) -> None:
    assert parse_announcement(announced({1: epoch, 2: signer.KEY_1.public})) == epoch


@pytest.mark.parametrize(
    "content",
    [
        {1: 0, 2: bytes(32)},
        {1: U32 + 1, 2: bytes(32)},
        {1: 1, 2: bytes(31)},
        {1: 1, 2: bytes(33)},
        {1: 1, 2: bytes(32), 3: 1},
        {1: 1},
        {1: b"", 2: bytes(32)},
        {1: 1, 2: "x" * 32},
    ],
)
def test_an_announcement_of_another_form_is_refused(content: dict[object, object]) -> None:
    with pytest.raises(MalformedError):
        parse_announcement(announced(content))
