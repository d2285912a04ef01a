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
    SignerLimitError,
    TransferCodeError,
)
from cloud.model import VIN_PATTERN

Context = grpc.aio.ServicerContext[Any, Any]

ROLE_URN = "urn:openfod:role:"
"""SAN URI of an operator's role, before it; without one the role is OPERATOR."""
OPERATOR = "operator"
"""Role that may call everything."""
WORKSHOP = "workshop"
"""Role that re-binds and reads, and never grants."""
WORKSHOP_CALLS = frozenset({"RebindEcu", "ExportBundle", "ListVehicles", "ListAudit", "ListEntitlements"})
"""What a workshop may call; the audit log only of one vehicle at a time."""

_OPERATOR_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_VIN = re.compile(VIN_PATTERN)
_MAX_SHOWN = 64


@dataclass(frozen=True)
class Device:
    """A vehicle's device certificate.

    Args:
        fingerprint: SHA-256 over the certificate in DER.
    """

    vin: str
    key: EllipticCurvePublicKey
    fingerprint: bytes


@dataclass(frozen=True)
class Operator:
    """A person or system with an operator's certificate, and the role that it names."""

    name: str
    role: str

    @property
    def actor(self) -> str:
        """As the audit log names it."""
        return f"operator:{self.name}"

    def may(self, call: str, *, vin: str) -> None:
        """Judges one call.

        Args:
            call: name of the RPC.
            vin: the vehicle that it is about; empty if it is about none or all.

        Raises:
            ForbiddenError: the role does not allow it.
        """
        if self.role == OPERATOR:
            return
        if self.role != WORKSHOP:
            raise ForbiddenError(f"role {self.role[:_MAX_SHOWN]!r} is none of {OPERATOR}, {WORKSHOP}")
        if call not in WORKSHOP_CALLS:
            raise ForbiddenError(f"a {WORKSHOP} may not call {call}; it needs role {OPERATOR}")
        if call == "ListAudit" and not vin:
            raise ForbiddenError(f"a {WORKSHOP} may read the audit log of one vehicle; name its VIN")


def operator(context: Context) -> Operator:
    """Name and role in the caller's operator certificate; the role is not judged here.

    Raises:
        ForbiddenError: it is not an operator's.
    """
    (name, *others), _ = _named(context, OPERATOR_URN, "an operator")
    name = name.removeprefix(OPERATOR_URN)
    if not _OPERATOR_NAME.fullmatch(name):
        raise ForbiddenError("the certificate's operator name has not the form of one")
    if not others:
        return Operator(name, OPERATOR)
    if len(others) > 1 or not others[0].startswith(ROLE_URN):
        raise ForbiddenError(f"the certificate of operator {name} names more than one role")
    return Operator(name, others[0].removeprefix(ROLE_URN))


def device(context: Context) -> Device:
    """VIN and key of the caller's device certificate.

    Raises:
        ForbiddenError: it is not a vehicle's.
    """
    uris, certificate = _named(context, VEHICLE_URN, "a vehicle")
    vin = uris[0].removeprefix(VEHICLE_URN)
    if len(uris) > 1:
        raise ForbiddenError(f"the certificate of vehicle {vin[:_MAX_SHOWN]} names others too")
    key = certificate.public_key()
    if not _VIN.fullmatch(vin) or not isinstance(key, EllipticCurvePublicKey):
        raise ForbiddenError("the certificate is not that of a vehicle's P-256 device key")
    fingerprint = hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()
    return Device(vin, key, fingerprint)


def _named(context: Context, urn: str, whom: str) -> tuple[list[str], x509.Certificate]:
    """The certificate and its URIs, of which exactly one begins with `urn`, and that one first."""
    pem = b"".join(context.auth_context().get("x509_pem_cert", ()))
    if not pem:
        raise ForbiddenError(f"this call needs the client certificate of {whom}")
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise ForbiddenError("the client certificate names nobody (no subject alternative name)") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    mine = [uri for uri in uris if uri.startswith(urn)]
    if len(mine) != 1:
        raise ForbiddenError(f"this call is for {whom}; the certificate names {', '.join(uris) or 'nobody'}")
    return mine + [uri for uri in uris if uri not in mine], certificate


_CODES: dict[type[RequestError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    ExistsError: grpc.StatusCode.ALREADY_EXISTS,
    NotPossibleError: grpc.StatusCode.FAILED_PRECONDITION,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    ClaimError: grpc.StatusCode.UNAUTHENTICATED,
    SignerLimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TransferCodeError: grpc.StatusCode.UNAUTHENTICATED,
}


def status_code(error: RequestError) -> grpc.StatusCode:
    """The gRPC status by which a client learns of this error (AIP-193)."""
    return _CODES[type(error)]
