"""Reads who is calling from the certificate of the TLS connection alone, and says no in gRPC's words."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from cloud.enrolment import OPERATOR_URN, VEHICLE_URN
from cloud.errors import (
    ClaimError,
    ExistsError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    NotPossibleError,
    RequestError,
)
from cloud.model import VIN_PATTERN

Context = grpc.aio.ServicerContext[Any, Any]

_OPERATOR_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_VIN = re.compile(VIN_PATTERN)


@dataclass(frozen=True)
class Device:
    """A vehicle's device certificate.

    Args:
        fingerprint: SHA-256 over the certificate in DER.
    """

    vin: str
    key: EllipticCurvePublicKey
    fingerprint: bytes


def operator(context: Context) -> str:
    """Name in the caller's operator certificate.

    Raises:
        ForbiddenError: it is not an operator's.
    """
    name, _ = _named(context, OPERATOR_URN, "an operator")
    if not _OPERATOR_NAME.fullmatch(name):
        raise ForbiddenError("the certificate's operator name has not the form of one")
    return name


def device(context: Context) -> Device:
    """VIN and key of the caller's device certificate.

    Raises:
        ForbiddenError: it is not a vehicle's.
    """
    vin, certificate = _named(context, VEHICLE_URN, "a vehicle")
    key = certificate.public_key()
    if not _VIN.fullmatch(vin) or not isinstance(key, EllipticCurvePublicKey):
        raise ForbiddenError("the certificate is not that of a vehicle's P-256 device key")
    fingerprint = hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()
    return Device(vin, key, fingerprint)


def _named(context: Context, urn: str, whom: str) -> tuple[str, x509.Certificate]:
    pem = b"".join(context.auth_context().get("x509_pem_cert", ()))
    if not pem:
        raise ForbiddenError(f"this call needs the client certificate of {whom}")
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise ForbiddenError("the client certificate names nobody (no subject alternative name)") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1 or not uris[0].startswith(urn):
        raise ForbiddenError(f"this call is for {whom}; the certificate names {', '.join(uris) or 'nobody'}")
    return uris[0].removeprefix(urn), certificate


_CODES: dict[type[RequestError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    ExistsError: grpc.StatusCode.ALREADY_EXISTS,
    NotPossibleError: grpc.StatusCode.FAILED_PRECONDITION,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    ClaimError: grpc.StatusCode.UNAUTHENTICATED,
}


def status_code(error: RequestError) -> grpc.StatusCode:
    """The gRPC status by which a client learns of this error (AIP-193)."""
    return _CODES[type(error)]
