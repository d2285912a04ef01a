"""The cloud's receipts: the key that signs them, and what they say."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf.message import DecodeError

from agent.errors import MalformedError, TrustError
from agent.metering.record import RECEIPT_DOMAIN
from openfod.usage.v1 import usage_pb2


def receipt_key(path: Path) -> Ed25519PublicKey:
    """The key that signs receipts.

    Raises:
        TrustError: the file is not an Ed25519 public key.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrustError(f"{path} is not a public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise TrustError(f"{path} holds a key of another kind, expected Ed25519")
    return key


def verified_receipt(key: Ed25519PublicKey, content: bytes, signature: bytes) -> usage_pb2.UsageReceipt:
    """A receipt that this key has signed.

    Raises:
        TrustError: another key signed it, or none; MalformedError if it is no receipt.
    """
    try:
        key.verify(signature, RECEIPT_DOMAIN + content)
    except InvalidSignature as error:
        raise TrustError("its signature is not the receipt key's") from error
    try:
        return usage_pb2.UsageReceipt.FromString(content)
    except DecodeError as error:
        raise MalformedError(f"it is not a UsageReceipt: {error}") from error
