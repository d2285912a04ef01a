"""Makes every key, root and certificate of a new installation in one folder.

The layout is described in keys/README.md. All keys are made here at once for
a demonstration or a test bench; in real life each stays where its holder
works. Nothing that exists is overwritten.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from pathlib import Path

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Role, Root, Snapshot, Targets, Timestamp

from keys import certificates, files, roots
from keys.errors import WouldOverwriteError

ROOT_LIFETIME = timedelta(days=5 * 365)
"""Validity of a root: a new one is signed well before."""
HOLDERS = 3
"""Keys of each role that is held offline."""
THRESHOLD = 2
"""Signatures that a role held offline needs."""
TOKEN_EPOCH = 1
"""Epoch of the first token key."""
OPERATOR = "operator"
"""Name in the first operator certificate."""


def init(folder: Path, now: datetime, *, replace: bool) -> Path | None:
    """Makes all keys below `folder`.

    Args:
        now: UTC; the roots' lifetime counts from it.
        replace: move a folder that has content aside instead of refusing.

    Returns:
        where the old folder was moved to, or None if there was none.

    Raises:
        WouldOverwriteError: the folder has content and `replace` is False.
    """
    moved = _make_room(folder, now, replace=replace)
    files.make_folder(folder)
    _repository(folder, "catalogue", now, offline_targets=True)
    _repository(folder, "director", now, offline_targets=False)
    _token_keys(folder)
    receipt = _ed25519(folder / "receipt" / "receipt.key")
    files.write(folder / "public" / "receipt.pub", files.public_pem(receipt.public_key()))
    _certificates(folder)
    return moved


def signer(key: Ed25519PrivateKey) -> CryptoSigner:
    """A TUF signer around a key that was made here."""
    return CryptoSigner(key)


def refuse_existing(*paths: Path) -> None:
    """Refuses to write where something stands.

    Raises:
        WouldOverwriteError: names the first such file.
    """
    for path in paths:
        if path.exists():
            raise WouldOverwriteError(f"{path} exists; nothing was written")


def _make_room(folder: Path, now: datetime, *, replace: bool) -> Path | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not replace:
        raise WouldOverwriteError(
            f"{folder} has content, and lost keys cannot be made again; nothing was written. "
            "--force moves the folder aside first"
        )
    moved = folder.with_name(f"{folder.name}.replaced-{now:%Y%m%dT%H%M%S%fZ}")
    folder.rename(moved)
    return moved


def _ed25519(path: Path) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    files.write(path, files.private_pem(key))
    return key


def _repository(folder: Path, name: str, now: datetime, *, offline_targets: bool) -> None:
    """Makes the keys of one TUF repository and its root, signed by all root keys."""
    numbered = range(1, HOLDERS + 1)
    names = {
        Root.type: [f"root-{i}" for i in numbered],
        Targets.type: [f"targets-{i}" for i in numbered] if offline_targets else ["targets"],
        Snapshot.type: ["snapshot"],
        Timestamp.type: ["timestamp"],
    }
    signers = {
        role: [CryptoSigner(_ed25519(folder / name / f"{key}.key")) for key in keys]
        for role, keys in names.items()
    }
    root = Root(
        version=1,
        expires=(now + ROOT_LIFETIME).replace(microsecond=0),
        keys={s.public_key.keyid: s.public_key for group in signers.values() for s in group},
        roles={
            role: Role([s.public_key.keyid for s in group], THRESHOLD if len(group) > 1 else 1)
            for role, group in signers.items()
        },
        consistent_snapshot=True,
    )
    metadata = Metadata(root)
    for signer in signers[Root.type]:
        metadata.sign(signer, append=True)
    metadata.verify_delegate(Root.type, metadata)
    content = roots.to_bytes(metadata)
    files.write(folder / roots.first_path(name), content)
    files.write(folder / roots.chain_path(name, 1), content)


def _token_keys(folder: Path) -> None:
    root = _ed25519(folder / "token" / "root.key")
    key = _ed25519(folder / "token" / f"key-{TOKEN_EPOCH}.key")
    announcement = announce_token_key(root, key.public_key(), TOKEN_EPOCH)
    files.write(folder / "token" / f"key-{TOKEN_EPOCH}.cose", announcement)
    files.write(folder / "public" / f"token-key-{TOKEN_EPOCH}.cose", announcement)
    files.write(folder / "public" / "token-root.pub", files.public_pem(root.public_key()))


def announce_token_key(root: Ed25519PrivateKey, key: Ed25519PublicKey, epoch: int) -> bytes:
    """Signs the announcement of a token key with the token root (docs/token.md, "Keys").

    Args:
        epoch: 1 to 4,294,967,295; higher than that of every key announced before.

    Returns:
        a tagged COSE_Sign1 (RFC 9052, section 4.2) in deterministic CBOR.
    """
    kid = hashlib.sha256(root.public_key().public_bytes_raw()).digest()[:8]
    protected = cbor2.dumps({1: -8, 4: kid}, canonical=True)
    payload = cbor2.dumps({1: epoch, 2: key.public_bytes_raw()}, canonical=True)
    signature = root.sign(announcement_to_sign(protected, payload))
    return cbor2.dumps(cbor2.CBORTag(18, [protected, {}, payload, signature]), canonical=True)


def announcement_to_sign(protected: bytes, payload: bytes) -> bytes:
    """The Sig_structure of an announcement (RFC 9052, section 4.4)."""
    external = cbor2.dumps(["openfod-token-key-v1"], canonical=True)
    return cbor2.dumps(["Signature1", protected, external, payload], canonical=True)


def _certificates(folder: Path) -> None:
    tls, tls_key = _authority(folder, "tls", "OpenFoD TLS CA")
    enrolment, enrolment_key = _authority(folder, "enrolment", "OpenFoD enrolment CA")

    server_key = _p256(folder / "tls" / "server.key")
    server = certificates.server(server_key.public_key(), tls, tls_key)
    files.write(folder / "tls" / "server.crt", server.public_bytes(Encoding.PEM))

    operator_key = _p256(folder / "operator" / "operator.key")
    operator = certificates.operator(OPERATOR, operator_key.public_key(), enrolment, enrolment_key)
    files.write(folder / "operator" / "operator.crt", operator.public_bytes(Encoding.PEM))


def _authority(folder: Path, area: str, name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = _p256(folder / area / "ca.key")
    certificate = certificates.authority(name, key)
    pem = certificate.public_bytes(Encoding.PEM)
    files.write(folder / area / "ca.crt", pem)
    files.write(folder / "public" / f"{area}-ca.crt", pem)
    return certificate, key


def _p256(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    files.write(path, files.private_pem(key))
    return key
