"""Issues the X.509 certificates of an installation (RFC 5280).

No certificate ever expires by date (RFC 5280, section 4.1.2.5: 99991231235959Z):
a vehicle whose clock says 1970 or 2040 must still connect to learn the time.
What ends a certificate's use is signed elsewhere: the cloud keeps one valid
device certificate per vehicle.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from keys.errors import RequestError

NOT_BEFORE = datetime(1970, 1, 1, tzinfo=UTC)
"""Start of every certificate's validity."""
NOT_AFTER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""RFC 5280, section 4.1.2.5: no well-defined expiration date."""
ROLES = ("operator", "workshop")
"""Roles of an operator's certificate: everything; or what a workshop needs, which grants nothing."""

_OPERATOR_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


def authority(name: str, key: EllipticCurvePrivateKey) -> x509.Certificate:
    """Issues a self-signed CA certificate that may issue end entities only (path length 0)."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        _builder(subject, subject, key.public_key(), key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def server(
    key: EllipticCurvePublicKey, ca: x509.Certificate, ca_key: EllipticCurvePrivateKey
) -> x509.Certificate:
    """Issues a TLS server certificate for localhost and 127.0.0.1."""
    names: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    return _end_entity("localhost", key, names, ExtendedKeyUsageOID.SERVER_AUTH, ca, ca_key)


def operator(
    name: str,
    key: EllipticCurvePublicKey,
    ca: x509.Certificate,
    ca_key: EllipticCurvePrivateKey,
    *,
    role: str = "operator",
) -> x509.Certificate:
    """Issues a TLS client certificate that names an operator in a SAN URI, and its role in a second.

    Args:
        name: as `check_operator` takes it.
        role: one of ROLES; "operator" may do everything and is not named.

    Raises:
        RequestError: name or role has not the form of one.
    """
    check_operator(name, role)
    names = [x509.UniformResourceIdentifier(f"urn:openfod:operator:{name}")]
    if role != "operator":
        names.append(x509.UniformResourceIdentifier(f"urn:openfod:role:{role}"))
    return _end_entity(name, key, names, ExtendedKeyUsageOID.CLIENT_AUTH, ca, ca_key)


def check_operator(name: str, role: str) -> None:
    """Checks the name and the role of an operator.

    Raises:
        RequestError: one has not its form.
    """
    if not _OPERATOR_NAME.fullmatch(name):
        raise RequestError(
            "operator name: expected 1 to 64 of A-Z, a-z, 0-9 and . _ @ -, the first a letter or digit; "
            f"found {name!r}"
        )
    if role not in ROLES:
        raise RequestError(f"role: expected one of {', '.join(ROLES)}; found {role!r}")


def _end_entity(
    name: str,
    key: EllipticCurvePublicKey,
    names: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    ca: x509.Certificate,
    ca_key: EllipticCurvePrivateKey,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        _builder(subject, ca.subject, key, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, issuer_key: EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )
