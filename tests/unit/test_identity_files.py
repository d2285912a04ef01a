"""The vehicle's key and certificate on disk: private, made once, and checked when read."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from support.edge_cloud import authority, issue

from agent.adapters import identity
from agent.adapters.files import write_durably
from agent.errors import TrustError


def enrolled(directory: Path) -> Path:
    key = identity.make_key(directory)
    identity.save(directory, issue("vehicle", authority(), key).der, "veh-1")
    return directory


def pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, password: bytes = b"") -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def test_key_is_made_once_and_private(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    first = identity.make_key(directory)
    assert identity.make_key(directory).public_key() == first.public_key()
    assert stat.S_IMODE((directory / identity.KEY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    csr = x509.load_der_x509_csr(identity.make_csr(first, "WFDSEAT10N0000001"))
    assert csr.is_signature_valid
    assert csr.public_key() == first.public_key()


def test_identity_comes_back_after_enrolment_and_not_before(tmp_path: Path) -> None:
    assert identity.load(tmp_path) is None
    identity.make_key(tmp_path)
    assert identity.load(tmp_path) is None
    known = identity.load(enrolled(tmp_path))
    assert known is not None
    assert known.source == "veh-1"
    known.key.public_key().verify(known.sign(b"x"), b"x", ec.ECDSA(hashes.SHA256()))
    assert {f.name for f in tmp_path.iterdir()} == {"device.key", "device.crt", "identity.json"}
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in tmp_path.iterdir())


def test_certificate_of_another_key_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    identity.make_key(tmp_path)
    for certificate in (issue("vehicle", authority()).der, b"", b"no certificate"):
        with pytest.raises(TrustError, match=r"not kept|nothing is kept"):
            identity.save(tmp_path, certificate, "veh-1")
    key = identity.make_key(tmp_path)
    with pytest.raises(TrustError, match="names no pseudonym"):
        identity.save(tmp_path, issue("vehicle", authority(), key).der, "")
    assert [f.name for f in tmp_path.iterdir()] == ["device.key"]


@pytest.mark.parametrize(
    "content", [b"", b"x", b"{}", b"[]", b'{"source": 5}', b'{"source": ""}', b"\xff", b"null"]
)
def test_damaged_identity_file_is_named_with_the_next_step(tmp_path: Path, content: bytes) -> None:
    (enrolled(tmp_path) / identity.IDENTITY_FILE).write_bytes(content)
    with pytest.raises(TrustError, match=r"identity\.json is damaged .*enrol again .*enroll --again"):
        identity.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nxx\n"])
def test_damaged_certificate_is_named(tmp_path: Path, content: bytes) -> None:
    (enrolled(tmp_path) / identity.CERTIFICATE_FILE).write_bytes(content)
    with pytest.raises(TrustError, match=r"device\.crt is damaged"):
        identity.load(tmp_path)


def test_certificate_that_was_exchanged_is_named(tmp_path: Path) -> None:
    enrolled(tmp_path)
    (tmp_path / identity.CERTIFICATE_FILE).write_bytes(issue("vehicle", authority()).pem)
    with pytest.raises(TrustError, match=r"device\.crt is for another key"):
        identity.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no key",
        pem(ec.generate_private_key(ec.SECP384R1())),
        pem(ed25519.Ed25519PrivateKey.generate()),
        pem(ec.generate_private_key(ec.SECP256R1()), b"password"),
    ],
)
def test_damaged_or_other_key_is_named_and_kept(tmp_path: Path, content: bytes) -> None:
    path = enrolled(tmp_path) / identity.KEY_FILE
    path.write_bytes(content)
    for act in (identity.load, identity.make_key):
        with pytest.raises(TrustError, match=r"device\.key (is not a readable|holds a key of another)"):
            act(tmp_path)
    assert path.read_bytes() == content


def test_missing_key_is_named(tmp_path: Path) -> None:
    (enrolled(tmp_path) / identity.KEY_FILE).unlink()
    with pytest.raises(TrustError, match=r"device\.key"):
        identity.load(tmp_path)


def test_write_does_not_follow_what_lies_in_its_way(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "file.new").symlink_to(victim)
    write_durably(tmp_path / "file", b"secret")
    assert victim.read_text() == "mine"
    (tmp_path / "file.new").write_text("left over")
    (tmp_path / "file.new").chmod(0o644)
    write_durably(tmp_path / "file", b"secret 2")
    assert (tmp_path / "file").read_bytes() == b"secret 2"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_failure_of_a_write_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="No space"):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"


def test_power_cut_between_the_two_files_of_an_enrolment_is_before_it(tmp_path: Path) -> None:
    enrolled(tmp_path)
    (tmp_path / identity.CERTIFICATE_FILE).unlink()
    assert json.loads((tmp_path / identity.IDENTITY_FILE).read_text()) == {"source": "veh-1"}
    assert identity.load(tmp_path) is None
