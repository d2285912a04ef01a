"""Signs with a private key that a URI leads to: a file today, a card or an HSM later.

The URIs are securesystemslib's (`file2:/path/to.pem`, `hsm:...`); a plain path means `file2:`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from securesystemslib.exceptions import Error, KeyMismatchError, UnverifiedSignatureError
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, Key, Signature, Signer

from keys.errors import KeyMaterialError


def uri_of(text: str) -> str:
    """The URI for what a person wrote: a URI as it is, a path as `file2:`."""
    if text.partition(":")[0] in SIGNER_FOR_URI_SCHEME:
        return text
    return f"file2:{Path(text).absolute()}"


def sign(uri: str, candidates: Iterable[Key], payload: bytes) -> Signature:
    """Signs with the private half of one of the candidates.

    Args:
        uri: where the private key is.
        candidates: public keys whose signature would count.

    Raises:
        KeyMaterialError: it cannot be used, or is the private half of none of them.
    """
    counting = tuple(candidates)
    for key in counting:
        try:
            signature = Signer.from_priv_key_uri(uri, key).sign(payload)
            key.verify_signature(signature, payload)
        except (KeyMismatchError, UnverifiedSignatureError):
            continue
        except (Error, OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise KeyMaterialError(f"{uri}: no private key that can sign here: {error}") from error
        return signature
    raise KeyMaterialError(
        f"{uri}: its key is none of those whose signature would count: "
        + ", ".join(key.keyid[:16] for key in counting)
    )
