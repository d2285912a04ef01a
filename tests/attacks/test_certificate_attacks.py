"""A certificate of a version that nobody knows is refused like any other that is damaged."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from support import cloud_world

from agent.adapters import identity
from agent.adapters.link import server_roots
from agent.errors import TrustError
from agent.model import TlsAnchor
from cloud import enrolment
from cloud.errors import InvalidRequestError

NOW_MS = 1_800_000_000_000
VERSION_1 = bytes.fromhex("02 01 00")  # RFC 2986, section 4.1
VERSION_3 = bytes.fromhex("A0 03 02 01 02")  # RFC 5280, section 4.1.2.1


def certificate(key: ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloud.example")])
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(begin).not_valid_after(begin + timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def of_unknown_version(der: bytes) -> bytes:
    assert der.count(VERSION_3) == 1
    changed = der.replace(VERSION_3, VERSION_3[:-1] + b"\x20")
    with pytest.raises(x509.InvalidVersion):
        x509.load_der_x509_certificate(changed)
    return changed


def test_a_server_certificate_of_unknown_version_does_not_take_the_others_with_it() -> None:
    der = certificate(ec.generate_private_key(ec.SECP256R1()))
    anchors = [TlsAnchor(content, 0, NOW_MS + 1) for content in (of_unknown_version(der), der)]
    (root,) = server_roots(anchors, b"", NOW_MS)
    assert x509.load_pem_x509_certificate(root).public_bytes(Encoding.DER) == der


def test_a_device_certificate_of_unknown_version_is_not_kept(tmp_path: Path) -> None:
    der = certificate(identity.make_key(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TrustError, match="nothing is kept"):
        identity.save(tmp_path, of_unknown_version(der), "veh-1")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_stored_certificate_of_unknown_version_is_named_as_damaged(tmp_path: Path) -> None:
    identity.save(tmp_path, certificate(identity.make_key(tmp_path)), "veh-1")
    path = tmp_path / identity.CERTIFICATE_FILE
    der = x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)
    changed = of_unknown_version(der)
    path.write_bytes(pem(changed))
    with pytest.raises(TrustError, match="damaged"):
        identity.load(tmp_path)
    assert path.read_bytes() == pem(changed)


def test_a_request_of_unknown_version_is_refused_in_our_words() -> None:
    der = cloud_world.csr(ec.generate_private_key(ec.SECP256R1()))
    place = der.index(VERSION_1)
    changed = der[: place + 2] + b"\x20" + der[place + 3 :]
    with pytest.raises(x509.InvalidVersion):
        x509.load_der_x509_csr(changed)
    with pytest.raises(InvalidRequestError, match="csr_der: expected a PKCS #10 request in DER"):
        enrolment.device_key(changed)


def pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
