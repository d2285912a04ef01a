"""What metadata must look like before anything of it is believed, at each limit."""

from __future__ import annotations

import json

import pytest

from agent.errors import LimitError, MalformedError, ReplayError, VehicleMismatchError
from agent.trust import binding
from agent.trust.binding import Metadata

VIN = "WFDSEAT10N0000001"
NONCE = bytes(range(16))
LAST_MS = 253_402_300_799_000  # 9999-12-31T23:59:59Z


def read(content: bytes, limit: int = 10_000) -> Metadata:
    return binding.read_metadata(content, "director timestamp", limit=limit)


def signed(**fields: object) -> Metadata:
    return read(json.dumps({"signed": {"version": 1, **fields}}).encode())


def nested(depth: int) -> bytes:
    """Metadata whose deepest value lies so deep."""
    return b'{"signed":{"version":1,"x":%b%b}}' % (b"[" * (depth - 2), b"]" * (depth - 2))


# --- form ----------------------------------------------------------------------


def test_as_many_bytes_as_the_limit_says_and_no_more() -> None:
    content = b'{"signed":{"version":1}}'
    assert read(content, len(content)).version == 1
    with pytest.raises(LimitError, match="refused unread"):
        read(content, len(content) - 1)


@pytest.mark.parametrize("version", [1, 2**53])
def test_a_version_within_its_range_is_read(version: int) -> None:
    assert signed(version=version).version == version


@pytest.mark.parametrize("version", [0, -1, 2**53 + 1, True, "1", None, [1]])
def test_a_version_out_of_its_range_is_refused(version: object) -> None:
    with pytest.raises(MalformedError, match="version: expected 1 to 9007199254740992"):
        signed(version=version)


@pytest.mark.parametrize("value", ["1.0", "1e3", "NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_no_integer_is_refused(value: str) -> None:
    with pytest.raises(MalformedError, match="expected integers only"):
        read(b'{"signed":{"version":1,"x":%b}}' % value.encode())


@pytest.mark.parametrize(
    "content",
    [
        b'{"signed":{"version":1},"signed":{"version":2}}',
        b'{"signed":{"version":1,"version":1}}',
        b'{"signed":{"version":1,"x":[{"a":1,"a":2}]}}',
    ],
)
def test_a_key_that_stands_twice_is_refused(content: bytes) -> None:
    with pytest.raises(MalformedError, match="stands twice"):
        read(content)


def test_nesting_as_deep_as_the_limit_says_and_no_deeper() -> None:
    assert read(nested(32)).version == 1
    with pytest.raises(LimitError, match="depth of nesting: 33 is more than the limit of 32"):
        read(nested(33))


def test_what_was_closed_before_gives_no_room_for_more_depth() -> None:
    flat = b"[" + b"[]," * 40 + b"0]"
    content = nested(33).replace(b'"x":', b'"y":%b,"x":' % flat)
    with pytest.raises(LimitError, match="33 is more"):
        read(content)
    assert read(nested(32).replace(b'"x":', b'"y":%b,"x":' % flat)).version == 1


@pytest.mark.parametrize("text", ["[" * 40, '\\"' + "[" * 40, "\\\\", "]" * 40])
def test_brackets_in_a_text_are_no_nesting(text: str) -> None:
    content = b'{"signed":{"version":1,"x":"%b"}}' % text.encode()
    assert read(content).signed["x"] == json.loads(f'"{text}"')


# --- vehicle, nonce and time -----------------------------------------------------


def test_the_vehicle_that_is_named_is_the_only_one() -> None:
    binding.check_vehicle(signed(vin=VIN), VIN)
    with pytest.raises(VehicleMismatchError, match="signed for vehicle WFDSEAT10N0000002"):
        binding.check_vehicle(signed(vin="WFDSEAT10N0000002"), VIN)


@pytest.mark.parametrize("vin", [None, 1, "", "x", "WFDSEAT10N000000O", VIN + "1"])
def test_a_vehicle_that_is_no_vehicle_is_malformed(vin: object) -> None:
    with pytest.raises(MalformedError, match=f"vin: expected {VIN}"):
        binding.check_vehicle(signed(vin=vin), VIN)


@pytest.mark.parametrize("nonce", [b"", NONCE[:15], NONCE + b"\x00"])
def test_a_nonce_of_another_length_is_answered_by_nothing(nonce: bytes) -> None:
    with pytest.raises(ReplayError):
        binding.check_nonce(signed(nonce=nonce.hex()), nonce)


def test_a_live_answer_names_its_nonce_and_is_not_offline() -> None:
    binding.check_live(signed(nonce=NONCE.hex()), NONCE)
    for found in (
        signed(),
        signed(nonce=NONCE.hex(), offline=True),
        signed(nonce=NONCE.hex(), offline=False),
    ):
        with pytest.raises(ReplayError):
            binding.check_live(found, NONCE)


def test_a_file_is_signed_as_one_and_has_no_nonce() -> None:
    binding.check_offline(signed(offline=True))
    refused = [signed(), signed(offline=False), signed(offline=1), signed(offline="true")]
    refused += [signed(offline=True, nonce=NONCE.hex()), signed(offline=True, nonce=None)]
    for found in refused:
        with pytest.raises(ReplayError, match="not made as a file"):
            binding.check_offline(found)


@pytest.mark.parametrize("time_ms", [1, 1_800_000_000_000, LAST_MS])
def test_a_signed_time_from_1970_to_9999_is_read(time_ms: int) -> None:
    assert binding.signed_time_ms(signed(time_ms=time_ms)) == time_ms


@pytest.mark.parametrize("time_ms", [None, 0, -1, LAST_MS + 1, True, "1"])
def test_any_other_signed_time_is_refused(time_ms: object) -> None:
    with pytest.raises(MalformedError, match="time_ms: expected Unix milliseconds"):
        binding.signed_time_ms(signed(time_ms=time_ms))
