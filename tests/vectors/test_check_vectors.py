"""Checksums against values that were not computed by this code, and against frames of real cars.

Origins: AUTOSAR profiles by autosar-e2e 1.0.0 (github.com/zariiii9003/autosar-e2e),
the all-zero frame of profile 1 also in AUTOSAR_PRS_E2EProtocol R22-11, 6.3; Toyota,
Subaru and Hyundai by opendbc 0.3.1; VW and Chrysler frames recorded in cars and
published in opendbc's tests. The CRCs themselves against crccheck.
"""

from __future__ import annotations

import pytest
from crccheck.crc import (  # type: ignore[import-untyped]
    Crc8Autosar,
    Crc8SaeJ1850,
    Crc16CcittFalse,
    CrcXmodem,
)
from hypothesis import given
from hypothesis import strategies as st
from support.signals_data import data_file, load

from agent.adapters.replay import replay_log
from agent.errors import DatabaseError
from agent.signals.checks import Check, DataIdMode, Scheme, j1850_crc, residue

PROFILE_1 = (
    ("both", 0, "18b0e652e44da7f2"),
    ("both", 0, "aa059e260e271365"),
    ("both", 0, "2aaea3a6d07f5c0c"),
    ("both", 2, "332f411024083fd2"),
    ("both", 2, "f8c95e5e5d983195"),
    ("alternating", 0, "9700d90e945de2e8"),
    ("alternating", 0, "e545e781cc75f636"),
    ("alternating", 0, "685e99095aa30016"),
    ("alternating", 2, "5a67d0609b540d6b"),
    ("alternating", 2, "8f0beb1524179c3d"),
    ("low", 0, "1140ad6cb6dd210f"),
    ("low", 0, "cf95acd3cf92c190"),
    ("low", 2, "5930e53038b370a1"),
    ("nibble", 0, "c9b0bd93f50ae695"),
    ("nibble", 0, "8fb58c659ce2b10c"),
    ("nibble", 2, "b0d7f6b03e97818e"),
    ("nibble", 2, "96d583be42b24c6b"),
)
"""Data id 0xABCD."""
PROFILE_2 = ("1be0ed24ec636a8a", "87a7271e58662792", "25aff84e58056d8f")
"""Data ids 1 to 16."""
PROFILE_5 = (
    (0, "953cedd094ba97ae"),
    (0, "34a3442ee2db611a91bfe39469733a92"),
    (4, "47d58fa3946a18300372555f"),
)
"""Data id 0x1234."""
VW = (
    (0x86, 0x86, ("6b00bd0000000000", "ee010a0000000000", "0303bea212000000", "600f62c000000000")),
    (0x9F, 0xF5, ("11302e00051c8030", "5b318e0305530030", "cb32d30605730030", "e23f0500050a0030")),
)
"""LWI_01 and LH_EPS_03 of an MQB car: identifier, data id for every counter, frames."""
MAKERS = (
    ("toyota", 0x1D2, "d235f11829fb3847"),
    ("toyota", 0x224, "22e44cb633"),
    ("subaru", 0x119, "9e707a90b405420f"),
    ("subaru", 0x13A, "3a69779edfb5b934"),
    ("chrysler", 0x11C, "2405157f54b12ef6"),
    ("chrysler", 0x292, "1400000020cc"),  # recorded in a Pacifica
    ("chrysler", 0x23B, "012075"),
    ("hyundai-canfd", 0x50, "1cf9f8c6eff26b50"),
    ("hyundai-canfd", 0x1CF, "31fd3177d161e79587a766ec30e40374"),
    ("hyundai-canfd", 0xA0, "bef1905cad87bd4c77e2983f27745ccb9a31052e944cf1b2"),
    ("hyundai-canfd", 0x35, "9da8a2c7fb1b7d3e3f73f414af6e0d935520dd4c2147738606f2bf7ec70209e0"),
    # By hand: 1+2+3+4+5+6+7+8+9+A+B+C+D+E+F = 120, and the low nibble of the last byte makes it 128.
    ("hyundai", 0x260, "123456789abcdef8"),
)


def assert_every_flipped_bit_is_seen(check: Check, can_id: int, payload: bytes) -> None:
    remaining = residue(check, can_id)
    assert remaining(payload) == 0
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        assert remaining(bytes(flipped)) != 0, f"bit {bit}"


@pytest.mark.parametrize(("mode", "offset", "frame"), PROFILE_1)
def test_profile_1(mode: str, offset: int, frame: str) -> None:
    check = Check("e2e-1", data_id=0xABCD, data_id_mode=mode, offset=offset)
    payload = bytes.fromhex(frame)
    remaining = residue(check, 0x100)
    assert remaining(payload) == 0
    # The nibble beside the counter is data but in variant 1C; every bit is under the CRC all the same.
    for bit in range(64):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        assert remaining(bytes(flipped)) != 0
    other = Check("e2e-1", data_id=0x1234, data_id_mode=mode, offset=offset)
    assert residue(other, 0x100)(payload) != 0, "a frame of another sender"


def test_profile_1_as_the_standard_shows_it() -> None:
    assert residue(Check("e2e-1", data_id=0x123), 1)(bytes.fromhex("cc00000000000000")) == 0


@pytest.mark.parametrize("frame", PROFILE_2)
def test_profile_2(frame: str) -> None:
    check = Check("e2e-2", data_ids=tuple(range(1, 17)))
    assert_every_flipped_bit_is_seen(check, 0x100, bytes.fromhex(frame))


@pytest.mark.parametrize(("can_id", "data_id", "frames"), VW)
def test_profile_2_in_a_volkswagen(can_id: int, data_id: int, frames: tuple[str, ...]) -> None:
    for frame in frames:
        assert_every_flipped_bit_is_seen(
            Check("e2e-2", data_ids=(data_id,) * 16), can_id, bytes.fromhex(frame)
        )


@pytest.mark.parametrize(("offset", "frame"), PROFILE_5)
def test_profile_5(offset: int, frame: str) -> None:
    check = Check("e2e-5", data_id=0x1234, offset=offset)
    assert_every_flipped_bit_is_seen(check, 0x100, bytes.fromhex(frame))


@pytest.mark.parametrize(("scheme", "can_id", "frame"), MAKERS)
def test_makers(scheme: str, can_id: int, frame: str) -> None:
    assert_every_flipped_bit_is_seen(Check(scheme), can_id, bytes.fromhex(frame))


@pytest.mark.parametrize("scheme", ["toyota", "subaru", "honda", "hyundai-canfd", "openfod-j1850"])
def test_the_identifier_is_protected(scheme: str) -> None:
    payload = bytes(8)
    assert residue(Check(scheme), 0x100)(payload) != residue(Check(scheme), 0x101)(payload)


def test_honda_holds_for_real_frames() -> None:
    database = load(data_file("honda_civic_touring_2016_can_generated.dbc"))
    residues = {
        m.frame_id: (residue(Check("honda"), m.frame_id), m.length)
        for m in database.messages.values()
        # This one's checksum is not where the database has it.
        if any(s.name == "CHECKSUM" for s in m.signals) and m.name != "ROUGH_WHEEL_SPEED"
    }
    checked = 0
    for frame in replay_log(data_file("civic_typeR_turnonanddrive.log"), "b"):
        if frame.can_id in residues:
            remaining, length = residues[frame.can_id]
            assert remaining(frame.data[:length]) == 0
            checked += 1
    assert checked > 14_000


# --- the CRCs --------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=64))
def test_crc8_j1850_is_that_of_crccheck(data: bytes) -> None:
    assert j1850_crc(data) == Crc8SaeJ1850.calc(data)


@given(st.binary(min_size=2, max_size=64))
def test_the_other_crcs_are_those_of_crccheck(data: bytes) -> None:
    ids = bytes(range(16))
    crc = Crc8Autosar.calc(data[1:] + ids[data[1] & 0xF : (data[1] & 0xF) + 1])
    assert residue(Check("e2e-2", data_ids=tuple(ids)), 1)(bytes([crc]) + data[1:]) == 0
    crc16 = Crc16CcittFalse.calc(data[2:] + b"\x34\x12").to_bytes(2, "little")
    assert residue(Check("e2e-5", data_id=0x1234), 1)(crc16 + data[2:]) == 0
    xmodem = CrcXmodem.calc(data[2:] + b"\x23\x01") ^ {8: 0x5F29, 16: 0x41D, 24: 0x819D, 32: 0x9F5B}.get(
        len(data), 0
    )
    assert residue(Check("hyundai-canfd"), 0x123)(xmodem.to_bytes(2, "little") + data[2:]) == 0


# --- parameters --------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters",
    [
        {"scheme": "none"},
        {"scheme": "e2e-1", "data_id_mode": "some"},
        {"scheme": "e2e-1", "data_id": 0x1_0000},
        {"scheme": "e2e-2"},
        {"scheme": "e2e-2", "data_ids": (1,) * 15},
        {"scheme": "e2e-2", "data_ids": (256,) * 16},
        {"scheme": "e2e-5", "offset": -1},
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(DatabaseError):
        Check(**parameters)  # type: ignore[arg-type]


def test_every_scheme_and_mode_has_a_vector_here() -> None:
    tested = {scheme for scheme, _, _ in MAKERS} | {"e2e-1", "e2e-2", "e2e-5", "honda", "openfod-j1850"}
    assert tested == {scheme.value for scheme in Scheme}
    assert {mode for mode, _, _ in PROFILE_1} == {mode.value for mode in DataIdMode}
