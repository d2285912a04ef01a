"""An independent COSE library (cwt) judges the tokens: made by one, accepted by all; mutated, refused by all.

cwt knows COSE and not docs/token.md, so that it may accept what the ECU and the agent refuse. `CLAIMS` and
`ENVELOPES` list every such difference with its reason; a difference of another kind fails the test.
"""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cwt import COSE, COSEAlgs, COSEKey, COSEKeyParams
from hypothesis import given
from hypothesis import strategies as st
from vectors import make_token_vectors as signer

from agent.errors import TrustError
from agent.trust import token as agent_token
from cloud import token as cloud_token
from firmware_sim import token as sim_token

KEY = signer.KEY_1
PRIVATE = Ed25519PrivateKey.from_private_bytes(KEY.seed)
COSE_PUBLIC: dict[int, Any] = {
    COSEKeyParams.KTY: 1,
    COSEKeyParams.CRV: 6,
    COSEKeyParams.ALG: COSEAlgs.EDDSA,
    COSEKeyParams.KID: KEY.kid,
    COSEKeyParams.X: KEY.public,
}
VERIFIER = COSEKey.new(COSE_PUBLIC)
SIGNER = COSEKey.new({**COSE_PUBLIC, COSEKeyParams.D: KEY.seed})

NUMBER = st.integers(1, 0xFFFFFFFF)
RANGE = st.tuples(st.integers(0, 2**31), st.integers(2**31 + 1, 0xFFFFFFFF))


@st.composite
def tokens_asked_for(draw: st.DrawFn) -> dict[str, Any]:
    """Everything that the cloud may be asked to sign."""
    state = draw(st.sampled_from([cloud_token.ALLOWED, cloud_token.DENIED]))
    terms: dict[int, Any] = {}
    if state == cloud_token.ALLOWED and draw(st.booleans()):
        counted = draw(st.dictionaries(st.sampled_from([5, 6, 7]), NUMBER, min_size=1))
        measured = draw(st.dictionaries(st.sampled_from([1, 2, 3, 8]), NUMBER))
        ranges = {4: draw(RANGE)} if draw(st.booleans()) else {}
        terms = {**measured, **ranges, **counted}
    return {
        "vin": draw(st.text("ABCDEFGHJKLMNPRSTUVWXYZ0123456789", min_size=17, max_size=17)),
        "uid": draw(st.binary(min_size=16, max_size=16)),
        "feature_number": draw(st.integers(1, 0xFFFF)),
        "counter": draw(NUMBER),
        "state": state,
        "terms": terms,
        "link": draw(st.sampled_from([1, 2, 3])),
        "parameters": draw(st.binary(max_size=32)),
    }


def external(asked: dict[str, Any]) -> bytes:
    """The external data, made here: by neither of the implementations."""
    link = asked["link"]
    return cbor2.dumps(
        ["openfod-token-v1", asked["vin"] if link & 1 else None, asked["uid"] if link & 2 else None]
    )


def claims(asked: dict[str, Any]) -> dict[int, object]:
    """The claims map, made here."""
    found: dict[int, object] = {1: 1, 2: asked["feature_number"], 3: asked["counter"], 4: asked["state"]}
    if asked["link"] != 3:
        found[5] = asked["link"]
    if asked["terms"]:
        found[6] = {n: list(v) if n == 4 else v for n, v in sorted(asked["terms"].items())}
    if asked["parameters"]:
        found[7] = asked["parameters"]
    return found


def sim_accepts(content: bytes, vin: str = signer.VIN, uid: bytes = signer.UID) -> bool:
    try:
        found = sim_token.parse(content)
        if found.kid != KEY.kid:
            return False
        found.check_signature(KEY.public, vin=vin, uid=uid)
    except sim_token.TokenError:
        return False
    return True


def agent_accepts(content: bytes, vin: str = signer.VIN, uid: bytes = signer.UID) -> bool:
    try:
        agent_token.verify_token(content, KEY.public, vin, uid)
    except TrustError:
        return False
    return True


def oracle_accepts(content: bytes, external_aad: bytes) -> bool:
    try:
        COSE.new(verify_kid=True).decode(content, VERIFIER, external_aad=external_aad)
    except Exception:  # noqa: BLE001 (whatever the library raises on bytes from outside, it is a refusal)
        return False
    return True


@given(tokens_asked_for())
def test_a_token_of_the_cloud_is_accepted_by_all_and_says_the_same_to_all(asked: dict[str, Any]) -> None:
    content = cloud_token.sign(PRIVATE, **asked)
    payload = COSE.new(verify_kid=True).decode(content, VERIFIER, external_aad=external(asked))
    assert cbor2.loads(payload) == claims(asked)
    ecu = sim_token.parse(content)
    ecu.check_signature(KEY.public, vin=asked["vin"], uid=asked["uid"])
    agent = agent_token.verify_token(content, KEY.public, asked["vin"], asked["uid"])
    expected = (asked["feature_number"], asked["counter"], asked["state"] == 1, asked["link"], asked["terms"])
    for said, allowed in ((ecu.claims, ecu.claims.allowed), (agent, agent.allows)):
        assert (said.feature, said.counter, allowed, said.link, dict(said.terms)) == expected
        assert (said.parameters or b"") == asked["parameters"]


@given(tokens_asked_for())
def test_a_token_of_the_oracle_is_the_clouds_byte_for_byte(asked: dict[str, Any]) -> None:
    made = COSE.new().encode(
        cbor2.dumps(claims(asked)),
        SIGNER,
        protected={1: -8, 4: KEY.kid},
        unprotected={},
        external_aad=external(asked),
    )
    assert made == cloud_token.sign(PRIVATE, **asked)
    assert sim_accepts(made, asked["vin"], asked["uid"])
    assert agent_accepts(made, asked["vin"], asked["uid"])


@given(tokens_asked_for(), st.booleans())
def test_another_vin_or_uid_is_refused_by_all_where_the_token_is_linked_to_it(
    asked: dict[str, Any], other_vin: bool
) -> None:
    content = cloud_token.sign(PRIVATE, **asked)
    here = {**asked, "vin": signer.OTHER_VIN} if other_vin else {**asked, "uid": signer.OTHER_UID}
    is_linked = bool(asked["link"] & (1 if other_vin else 2)) and here != asked
    verdicts = {
        "ecu": sim_accepts(content, here["vin"], here["uid"]),
        "agent": agent_accepts(content, here["vin"], here["uid"]),
        "oracle": oracle_accepts(content, external(here)),
    }
    assert verdicts == dict.fromkeys(verdicts, not is_linked)


@st.composite
def mutations(draw: st.DrawFn) -> tuple[dict[str, Any], bytes, bytes]:
    """What was asked for, its token, and the token with a few bytes changed, removed or put in."""
    asked = draw(tokens_asked_for())
    original = cloud_token.sign(PRIVATE, **asked)
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(content) - 1))
        kind = draw(st.sampled_from(["flip", "change", "remove", "insert"]))
        if kind == "flip":
            content[position] ^= 1 << draw(st.integers(0, 7))
        elif kind == "change":
            content[position] = draw(st.integers(0, 255))
        elif kind == "remove":
            del content[position]
        else:
            content[position:position] = draw(st.binary(min_size=1, max_size=4))
    return asked, original, bytes(content)


@given(mutations())
def test_a_mutated_token_is_refused_by_all(mutation: tuple[dict[str, Any], bytes, bytes]) -> None:
    asked, original, content = mutation
    is_same = content == original
    assert sim_accepts(content, asked["vin"], asked["uid"]) == is_same
    assert agent_accepts(content, asked["vin"], asked["uid"]) == is_same
    if oracle_accepts(content, external(asked)) and not is_same:
        # Only outside of what is signed, as in ENVELOPES: the signed parts are those of the original.
        assert signed_parts(content) == signed_parts(original)


def signed_parts(content: bytes) -> tuple[bytes, bytes, bytes]:
    """Protected header, payload and signature, as a lenient reader finds them."""
    protected, _, payload, signature = cbor2.loads(content).value
    return protected, payload, signature


_, PAYLOAD, SIGNATURE = signed_parts(signer.GOOD)
PROTECTED = signed_parts(signer.GOOD)[0]
_REST = signer.dumps(PAYLOAD) + signer.dumps(SIGNATURE)
ENVELOPES = {
    "bytes after the end: a parser that stops at the end does not see them": signer.GOOD + b"\x00",
    "an unprotected header: it is not signed, and nothing in it may mean anything": b"\xd2\x84"
    + signer.dumps(PROTECTED)
    + signer.dumps({4: KEY.kid})
    + _REST,
    "an array of indefinite length: not deterministic": b"\xd2\x9f"
    + signer.dumps(PROTECTED)
    + b"\xa0"
    + _REST
    + b"\xff",
    "a length longer than needed: not deterministic": b"\xd2\x84\x58\x0d" + PROTECTED + b"\xa0" + _REST,
    "a tag longer than needed: not deterministic": b"\xd8\x12" + signer.GOOD[1:],
}


@pytest.mark.parametrize("content", ENVELOPES.values(), ids=ENVELOPES)
def test_what_differs_outside_the_signed_bytes_is_refused_here_although_cose_allows_it(
    content: bytes,
) -> None:
    assert oracle_accepts(content, signer.dumps(signer.external()))
    assert not sim_accepts(content)
    assert not agent_accepts(content)


CLAIMS = {
    "an unknown claim": signer.dumps({**signer.COMMON, 8: 1}),
    "an unknown term is not 'no limit'": signer.dumps({**signer.COMMON, 6: {5: 1, 9: 1}}),
    "a counter of 0": signer.dumps({**signer.COMMON, 3: 0}),
    "no claims at all": b"free text",
    "claims in another order": bytes.fromhex("a4020101010301" + "0401"),
}


@pytest.mark.parametrize("payload", CLAIMS.values(), ids=CLAIMS)
def test_what_the_token_key_signs_outside_the_contract_is_refused_here_although_cose_allows_it(
    payload: bytes,
) -> None:
    content = signer.sign1(payload, signer.external(), KEY)
    assert oracle_accepts(content, signer.dumps(signer.external()))
    assert not sim_accepts(content)
    assert not agent_accepts(content)


VALUE = st.one_of(
    st.integers(-2, 3),
    st.sampled_from([23, 24, 255, 256, 0xFFFF, 0x10000, 0xFFFFFFFF, 0x1_0000_0000, 1 << 64]),
    st.binary(max_size=34),
    st.lists(st.integers(-1, 0x1_0000_0000), max_size=3),
    st.sampled_from([None, True, 1.5, "1"]),
)
GOOD_TERMS = st.dictionaries(st.sampled_from([1, 2, 3, 5, 6, 7, 8]), NUMBER, min_size=1)
NEARLY_CLAIMS = st.fixed_dictionaries(
    {n: st.one_of(st.just(1), st.just(1), VALUE) for n in (1, 2, 3, 4)},
    optional={
        5: st.one_of(st.just(3), VALUE),
        6: st.one_of(GOOD_TERMS, st.dictionaries(st.integers(-1, 9), VALUE, max_size=9), VALUE),
        7: VALUE,
        8: VALUE,
    },
)


@given(NEARLY_CLAIMS, st.booleans())
def test_ecu_and_agent_draw_the_same_line_through_what_the_token_key_may_sign(
    found: dict[int, object], in_order: bool
) -> None:
    payload = cbor2.dumps({**found} if in_order else dict(reversed(found.items())))
    content = signer.sign1(payload, signer.external(3), KEY)
    assert sim_accepts(content) == agent_accepts(content)


def announcement_nrc(content: bytes) -> int | None:
    """What the ECU answers to an announcement; None if it takes it."""
    try:
        sim_token.verify_announcement(content, root=signer.ROOT.public)
    except sim_token.TokenError as error:
        return error.nrc
    return None


def announcement_is_read(content: bytes) -> bool:
    """True if the agent finds it well-formed; its signature is the ECU's to judge."""
    try:
        agent_token.parse_announcement(content)
    except TrustError:
        return False
    return True


def oracle_accepts_announcement(content: bytes) -> bool:
    root = COSEKey.new(
        {**COSE_PUBLIC, COSEKeyParams.KID: signer.ROOT.kid, COSEKeyParams.X: signer.ROOT.public}
    )
    aad = cbor2.dumps(["openfod-token-key-v1"])
    try:
        COSE.new(verify_kid=True).decode(content, root, external_aad=aad)
    except Exception:  # noqa: BLE001 (as above)
        return False
    return True


@given(st.integers(0, 2**33), st.binary(min_size=30, max_size=34), st.booleans())
def test_ecu_agent_and_oracle_agree_on_announcements(epoch: int, key: bytes, by_root: bool) -> None:
    root = signer.ROOT if by_root else signer.FOREIGN
    content = signer.sign1(signer.dumps({1: epoch, 2: key}), ["openfod-token-key-v1"], root)
    is_formed = 1 <= epoch < 2**32 and len(key) == 32
    assert announcement_nrc(content) == (0x31 if not is_formed else None if by_root else 0x33)
    assert announcement_is_read(content) == is_formed
    assert oracle_accepts_announcement(content) == by_root
