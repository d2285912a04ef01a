"""Replaces keys: by a next root that a threshold signs, by the token root's next epoch, or by the TLS CA.

Everything new is made and verified first, then put in place as one (`keys.staging`); what is replaced is
kept in `retired/`. Holders who work apart prepare a root here, sign it each on their own machine, and
publish it when both thresholds are met. Nothing is published that an old client would not follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.signer import Key, SSlibKey
from tuf.api.metadata import Metadata, Root, Targets

from keys import catalogue, ceremony, certificates, files, roots, signers, staging
from keys.errors import KeyMaterialError, RequestError, ThresholdError

REPOSITORIES = ("catalogue", "director")
"""The two TUF repositories."""
ROLE_CHANGES = tuple(
    f"{name}-{role}" for name in REPOSITORIES for role in ("root", "targets", "snapshot", "timestamp")
)
"""What a new root can replace."""
TOKEN = "token"  # noqa: S105
TLS_SERVER = "tls-server"
CHANGES = (*ROLE_CHANGES, TOKEN, TLS_SERVER)
"""Everything that `rotate` replaces."""
AREAS = (*REPOSITORIES, "tls")
"""What can be prepared first and published later."""
MAX_EPOCH = 4_294_967_295
"""Last epoch of a token key (docs/token.md)."""


@dataclass(frozen=True)
class Outcome:
    """What was done.

    Args:
        area: "catalogue", "director", "token" or "tls".
        version: of the root, or epoch of the token key; 0 for TLS.
        published: False if it waits in `prepared/`.
        changes: what differs from before.
        lacking: signatures that a prepared root still needs.
        next_steps: what a person has to do now.
    """

    area: str
    version: int
    published: bool
    changes: tuple[str, ...]
    lacking: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()


# --- roots -------------------------------------------------------------------


def rotate_roles(
    folder: Path,
    name: str,
    roles: Sequence[str],
    now: datetime,
    *,
    only: Sequence[str] = (),
    public: Mapping[str, Path] | None = None,
    hold: bool = False,
    repository: Path | None = None,
) -> Outcome:
    """Replaces the keys of roles by a new root; with no role it renews the root's expiry alone.

    Args:
        folder: the key folder.
        name: "catalogue" or "director".
        roles: TUF roles, all keys of which are replaced.
        now: UTC; the root's lifetime counts from it.
        only: names of the keys to replace, such as "root-2", if not all of the roles.
        public: name of a key -> PEM file of its public half, for a key that is made and kept elsewhere.
        hold: leave it in `prepared/` for other holders' signatures.
        repository: the signed catalogue, to be signed by the old *and* the new targets keys beforehand, so
            that it stands under either root.

    Raises:
        KeyMaterialError: keys or roots are missing or do not fit.
        RequestError: what was asked for does not go together.
        ThresholdError: the holders' keys that are here are too few.
        WouldOverwriteError: a prepared root waits already.
    """
    finish(folder)
    staging.refuse_waiting(folder, name)
    chain = roots.load_chain(folder, name)
    chosen = _chosen(chain.newest.signed, roles, only)
    made, replaced = _new_keys(chosen, public or {})
    expires = (now + ceremony.ROOT_LIFETIME).replace(microsecond=0)
    following = roots.successor(chain.newest.signed, replaced, expires)
    _sign_with_folder(folder, name, chain.newest, following, made)
    missing = roots.lacking(chain.newest, following)
    if missing and not hold:
        raise ThresholdError(
            "\n".join(missing)
            + "\nnothing was written; --prepare lets each holder sign apart (fod-keys sign-root)"
        )
    version = following.signed.version
    if name == "catalogue" and Targets.type in roles:
        steps = _bridge_catalogue(folder, repository, chain, following, made, now)
    elif repository is not None:
        raise RequestError("--catalogue goes with catalogue-targets alone: no other key signs the catalogue")
    else:
        steps = ()
    content = _root_files(folder, name, chain) | {
        f"{name}/{key}.key": files.private_pem(private) for key, private in made.items()
    }
    content[roots.chain_path(name, version)] = roots.to_bytes(following)
    told = roots.changes(chain.newest.signed, following.signed)
    if hold:
        staging.prepare(folder, name, content)
        return Outcome(name, version, published=False, changes=told, lacking=missing, next_steps=steps)
    roots.check_signed(chain.newest, following)
    staging.put(folder, name, content)
    finish(folder)
    return Outcome(name, version, published=True, changes=told, next_steps=(*steps, _restart(name)))


def sign_root(file: Path, previous: Path, key: str) -> tuple[str, ...]:
    """Adds one holder's signature to a prepared root, on whatever machine the holder trusts.

    Args:
        file: the prepared root; written anew with the signature.
        previous: the root before it, as this holder knows it.
        key: PEM file of the private key, or a signer URI.

    Returns:
        what the root changes, in words.

    Raises:
        KeyMaterialError: a file is no root, or the key's signature would not count.
        RequestError: the root does not follow `previous`.
    """
    old, new = roots.parse(previous, files.read(previous)), roots.parse(file, files.read(file))
    roots.check_self_signed(previous, old)
    candidates = roots.signatures(old, new)
    signature = signers.sign(
        signers.uri_of(key), (candidates.signed | candidates.unsigned).values(), new.signed_bytes
    )
    new.signatures[signature.keyid] = signature
    files.write(file, roots.to_bytes(new))
    return roots.changes(old.signed, new.signed)


def publish(folder: Path, area: str, signed: Sequence[Path] = ()) -> Outcome:
    """Puts what was prepared in place, with the signatures that holders sent back.

    Args:
        area: "catalogue", "director" or "tls".
        signed: the prepared root as signed elsewhere.

    Raises:
        KeyMaterialError: nothing is prepared, or a file holds another root.
        ThresholdError: too few have signed; the signatures that came are kept.
    """
    finish(folder)
    waiting = folder / staging.PREPARED / area
    if not waiting.is_dir():
        raise KeyMaterialError(f"{waiting}: nothing is prepared; nothing was written")
    if area not in REPOSITORIES:
        staging.agree(folder, area)
        return Outcome(area, 0, published=True, changes=("server certificate",), next_steps=(_TLS_STEP,))
    chain = roots.load_chain(folder, area)
    path = waiting / roots.chain_path(area, chain.newest.signed.version + 1)
    root = roots.parse(path, files.read(path))
    for file in signed:
        other = roots.parse(file, files.read(file))
        if other.signed_bytes != root.signed_bytes:
            raise KeyMaterialError(f"{file}: is not the root that waits in {path}")
        # A signature that counts is never displaced by one that does not.
        counted = roots.signatures(chain.newest, other).signed
        root.signatures |= {keyid: s for keyid, s in other.signatures.items() if keyid in counted}
    files.write(path, roots.to_bytes(root))
    roots.check_signed(chain.newest, root)
    staging.agree(folder, area)
    finish(folder)
    told = roots.changes(chain.newest.signed, root.signed)
    return Outcome(area, root.signed.version, published=True, changes=told, next_steps=(_restart(area),))


def finish(folder: Path) -> None:
    """Completes a change that was cut short, and retires keys that no root names any more."""
    staging.finish(folder)
    for path in superseded(folder):
        staging.retire(folder, path)
        path.unlink()
        files.sync_folder(path.parent)


def superseded(folder: Path) -> tuple[Path, ...]:
    """Private keys in the folders of holders that nothing names any more."""
    found: list[Path] = []
    for name in REPOSITORIES:
        if not (folder / roots.first_path(name)).exists():
            continue
        named = set(roots.load_chain(folder, name).newest.signed.keys)
        found += [
            path
            for path in sorted((folder / name).glob("*.key"))
            if SSlibKey.from_crypto(files.load_ed25519(path).public_key()).keyid not in named
        ]
    newest = newest_epoch(folder)
    found += [folder / "token" / f"key-{n}.key" for n in _epochs(folder / "token", ".key") if n < newest]
    return tuple(found)


def _chosen(root: Root, roles: Sequence[str], only: Sequence[str]) -> list[str]:
    """Names of the keys to replace."""
    names = [name for name, (role, _) in roots.named_keys(root).items() if role in roles]
    wrong = [name for name in only if name not in names]
    if wrong:
        raise RequestError(f"no such key among {', '.join(names) or 'those to replace'}: {', '.join(wrong)}")
    return [name for name in names if not only or name in only]


def _new_keys(
    chosen: Sequence[str], public: Mapping[str, Path]
) -> tuple[dict[str, Ed25519PrivateKey], dict[str, Key]]:
    """Makes a private key for each name that does not come with a public half."""
    stray = [key for key in public if key not in chosen]
    if stray:
        raise RequestError(f"--public names a key that is not replaced: {', '.join(stray)}")
    made = {key: Ed25519PrivateKey.generate() for key in chosen if key not in public}
    replaced: dict[str, Key] = {key: SSlibKey.from_crypto(made[key].public_key()) for key in made}
    replaced |= {key: _public_key(file) for key, file in public.items()}
    return made, replaced


def _public_key(path: Path) -> Key:
    try:
        key = serialization.load_pem_public_key(files.read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyMaterialError(f"{path}: not a PEM public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyMaterialError(f"{path}: expected an Ed25519 public key, found {type(key).__name__}")
    return SSlibKey.from_crypto(key)


def _sign_with_folder(
    folder: Path,
    name: str,
    previous: Metadata[Root],
    following: Metadata[Root],
    made: Mapping[str, Ed25519PrivateKey],
) -> None:
    """Signs with every root key that is here: holders who work apart sign later."""
    payload = following.signed_bytes
    for key, (role, public) in roots.named_keys(previous.signed).items():
        path = folder / name / f"{key}.key"
        if role == Root.type and path.exists():
            following.signatures[public.keyid] = signers.sign(signers.uri_of(str(path)), [public], payload)
    for key, private in made.items():
        role, public = roots.named_keys(following.signed)[key]
        if role == Root.type:
            following.signatures[public.keyid] = ceremony.signer(private).sign(payload)


def _root_files(folder: Path, name: str, chain: roots.Chain) -> dict[str, bytes]:
    """The first root of the chain, for a folder of an older installation."""
    path = roots.chain_path(name, 1)
    return {} if (folder / path).exists() else {path: chain.contents[1]}


def _bridge_catalogue(
    folder: Path,
    repository: Path | None,
    chain: roots.Chain,
    following: Metadata[Root],
    made: Mapping[str, Ed25519PrivateKey],
    now: datetime,
) -> tuple[str, ...]:
    if repository is None:
        again = f"fod-keys sign-catalogue {folder} SOURCE_DIR REPO_DIR"
        return (f"sign the catalogue again, or the cloud does not start: {again}",)
    new = [ceremony.signer(made[key]) for key in made if key.startswith(Targets.type)]
    version = catalogue.sign_for_both(folder, repository, chain.newest, following, new, now)
    return (f"catalogue version {version} is signed by the old and the new targets keys",)


def _restart(name: str) -> str:
    return f"give the cloud the chain ({name}.root = the folder public/{name}) and the new keys; restart it"


# --- token keys --------------------------------------------------------------


def rotate_token(folder: Path) -> Outcome:
    """Makes the token key of the next epoch, announced by the offline token root (docs/token.md, "Keys").

    Raises:
        KeyMaterialError: the token root is not here, or is not the one whose public half ECUs hold.
    """
    finish(folder)
    root = files.load_ed25519(folder / "token" / "root.key")
    if files.public_pem(root.public_key()) != files.read(folder / "public" / "token-root.pub"):
        raise KeyMaterialError(f"{folder / 'token' / 'root.key'}: not the key of public/token-root.pub")
    epoch = newest_epoch(folder) + 1
    if epoch > MAX_EPOCH:
        raise RequestError(f"epoch {MAX_EPOCH} is the last that an ECU can know")
    key = Ed25519PrivateKey.generate()
    announcement = ceremony.announce_token_key(root, key.public_key(), epoch)
    staging.put(
        folder,
        TOKEN,
        {
            f"token/key-{epoch}.key": files.private_pem(key),
            f"token/key-{epoch}.cose": announcement,
            f"public/token-key-{epoch}.cose": announcement,
        },
    )
    finish(folder)
    step = (
        f"in cloud.toml: token.key = the file token/key-{epoch}.key, token.epoch = {epoch}; start the cloud "
        f"again. Vehicles carry public/token-key-{epoch}.cose to their ECUs"
    )
    return Outcome(TOKEN, epoch, published=True, changes=(f"epoch {epoch}",), next_steps=(step,))


def newest_epoch(folder: Path) -> int:
    """Highest epoch that was announced; 0 if none was."""
    return max(_epochs(folder / "public", ".cose", prefix="token-key-"), default=0)


def _epochs(folder: Path, suffix: str, prefix: str = "key-") -> list[int]:
    numbers = (p.name.removeprefix(prefix).removesuffix(suffix) for p in folder.glob(f"{prefix}*{suffix}"))
    return sorted(int(number) for number in numbers if number.isdecimal())


# --- certificates ------------------------------------------------------------

_TLS_STEP = "start the cloud again; vehicles that know servers by signed certificates must know it before"


def rotate_tls_server(folder: Path, *, hold: bool = False) -> Outcome:
    """Makes a new key and certificate of the server, from the same CA.

    Args:
        hold: leave both in `prepared/tls`, until every vehicle was told.

    Raises:
        KeyMaterialError: the CA is not here.
        WouldOverwriteError: a prepared one waits already.
    """
    finish(folder)
    staging.refuse_waiting(folder, "tls")
    ca, ca_key = _authority(folder, "tls")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certificates.server(key.public_key(), ca, ca_key)
    content = {
        "tls/server.key": files.private_pem(key),
        "tls/server.crt": certificate.public_bytes(serialization.Encoding.PEM),
    }
    changes = ("server certificate",)
    if hold:
        staging.prepare(folder, "tls", content)
        return Outcome("tls", 0, published=False, changes=changes)
    staging.put(folder, "tls", content)
    return Outcome("tls", 0, published=True, changes=changes, next_steps=(_TLS_STEP,))


def issue_operator(folder: Path, name: str, role: str) -> Path:
    """Issues a further operator certificate, with a new key.

    Args:
        name: 1 to 64 characters of A-Z, a-z, 0-9 and `._@-`.
        role: "operator" (everything) or "workshop".

    Returns:
        the certificate's file; its key stands beside it.

    Raises:
        RequestError: the name or the role has not the form of one.
        WouldOverwriteError: this name has a certificate already.
        KeyMaterialError: the enrolment CA is not here.
    """
    finish(folder)
    certificates.check_operator(name, role)
    ceremony.refuse_existing(folder / "operator" / f"{name}.key", folder / "operator" / f"{name}.crt")
    ca, ca_key = _authority(folder, "enrolment")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certificates.operator(name, key.public_key(), ca, ca_key, role=role)
    staging.put(
        folder,
        "operator",
        {
            f"operator/{name}.key": files.private_pem(key),
            f"operator/{name}.crt": certificate.public_bytes(serialization.Encoding.PEM),
        },
    )
    return folder / "operator" / f"{name}.crt"


def _authority(folder: Path, area: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path = folder / area / "ca.key"
    try:
        certificate = x509.load_pem_x509_certificate(files.read(folder / area / "ca.crt"))
        key = serialization.load_pem_private_key(files.read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise KeyMaterialError(f"{folder / area}: CA key or certificate cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise KeyMaterialError(f"{path}: not the key of {folder / area / 'ca.crt'}")
    return certificate, key
