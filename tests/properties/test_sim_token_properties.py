"""Whatever bytes arrive, the verifier raises its own errors and accepts only what was signed."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sim_world import INSTALL, MemoryStore, ask, seat_module, token
from vectors import make_token_vectors as signer

from firmware_sim import token as sim_token

GOOD = signer.GOOD
ROOT = signer.ROOT.public


def verify(content: bytes) -> sim_token.Token:
    found = sim_token.parse(content)
    if found.kid != signer.KEY_1.kid:
        raise sim_token.SignatureError("unknown kid")
    found.check_signature(signer.KEY_1.public, vin=signer.VIN, uid=signer.UID)
    return found


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The good token with a few bytes changed, removed or put in."""
    content = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(content) - 1))
        kind = draw(st.sampled_from(["change", "remove", "insert"]))
        if kind == "change":
            content[position] = draw(st.integers(0, 255))
        elif kind == "remove":
            del content[position]
        else:
            content[position:position] = draw(st.binary(min_size=1, max_size=8))
    return bytes(content)


@given(mutated())
def test_a_mutated_token_is_never_accepted(content: bytes) -> None:
    if content == GOOD:
        assert verify(content).claims.counter == 7
        return
    with pytest.raises(sim_token.TokenError):
        verify(content)


@given(st.binary(max_size=300))
def test_random_bytes_end_in_a_typed_error(content: bytes) -> None:
    with pytest.raises(sim_token.TokenError):
        sim_token.parse(content)
    with pytest.raises(sim_token.TokenError):
        sim_token.verify_announcement(content, root=ROOT)


ITEMS = st.recursive(
    st.one_of(
        st.integers(-(1 << 70), 1 << 70),
        st.binary(max_size=40),
        st.text(max_size=8),
        st.booleans(),
        st.none(),
        st.floats(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.integers(-2, 10), inner, max_size=8)
    ),
    max_leaves=12,
)


@given(ITEMS)
def test_a_genuine_signature_over_any_payload_ends_in_a_typed_error(item: object) -> None:
    content = signer.sign1(cbor2.dumps(item), signer.external(), signer.KEY_1)
    with pytest.raises(sim_token.TokenError):
        verify(content)  # a whole valid claims map by chance is out of reach: version 1 and three more


@given(st.binary(min_size=1, max_size=120))
def test_a_genuine_signature_over_any_payload_bytes_ends_in_a_typed_error(payload: bytes) -> None:
    with pytest.raises(sim_token.TokenError):
        verify(signer.sign1(payload, signer.external(), signer.KEY_1))


@given(
    st.fixed_dictionaries(
        {1: st.just(1), 2: st.integers(1, 65535), 3: st.integers(1, 0xFFFFFFFF), 4: st.just(1)},
        optional={
            6: st.dictionaries(st.sampled_from([5, 6, 7]), st.integers(1, 0xFFFFFFFF), min_size=1),
            7: st.binary(min_size=1, max_size=32),
        },
    )
)
def test_every_valid_token_is_read_as_it_was_written(claims: dict[int, object]) -> None:
    found = verify(signer.sign1(signer.dumps(claims), signer.external(), signer.KEY_1)).claims
    assert (found.feature, found.counter) == (claims[2], claims[3])
    assert dict(found.terms) == claims.get(6, {})
    assert found.parameters == claims.get(7, b"")


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 1)), max_size=12))
def test_the_stored_counter_never_falls(tokens: list[tuple[int, int]]) -> None:
    store = MemoryStore()
    seat = seat_module(store)
    highest, state = 0, None
    for counter, allowed in tokens:
        answer = ask(seat, INSTALL + token(counter, state=allowed))
        if counter > highest:
            highest, state = counter, allowed
        expected = counter == highest and allowed == state
        assert (answer[0] == 0x71) == expected
        assert store.state.rights[1].counter == highest
        assert store.state.rights[1].allowed == (state == 1)
