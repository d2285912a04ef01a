"""Chains of TUF roots: reads them, makes the next one, and says who has to sign it.

A root is followed by one with the next version that a threshold of its own root keys *and* a threshold of
the new ones have signed (TUF 1.0.34, section 5.3). `public/NAME-root.json` is the first root, which ships in
vehicle images and never changes; `public/NAME/N.root.json` is the chain from it, which clouds hand on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Key, Metadata, Root, RootVerificationResult
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from keys import files
from keys.errors import KeyMaterialError, RequestError, ThresholdError

MAX_ROOTS = 32
"""Longest chain that a vehicle follows in one update."""


@dataclass(frozen=True)
class Chain:
    """The roots of one repository, verified.

    Args:
        contents: version -> root as signed, from 1, without a hole.
        newest: the last of them.
    """

    contents: Mapping[int, bytes]
    newest: Metadata[Root]


def first_path(name: str) -> str:
    """Path, in the key folder, of the root that ships in vehicle images."""
    return f"public/{name}-root.json"


def chain_path(name: str, version: int) -> str:
    """Path, in the key folder, of one root of the chain."""
    return f"public/{name}/{version}.root.json"


def load_chain(folder: Path, name: str) -> Chain:
    """Reads the chain of a repository; a folder of an older installation has the first root alone.

    Raises:
        KeyMaterialError: a root is missing, does not begin with the one that ships, or is not signed by the
            keys of the one before it.
    """
    first = folder / first_path(name)
    contents = {1: files.read(first)}
    newest = parse(first, contents[1])
    found = {
        int(n) for p in first.parent.glob(f"{name}/*.root.json") if (n := p.name.split(".")[0]).isdecimal()
    }
    for version in range(1, max(found, default=1) + 1):
        path = folder / chain_path(name, version)
        if version == 1:
            if found and files.read(path) != contents[1]:
                raise KeyMaterialError(
                    f"{path}: differs from {first}, the root that vehicles were built with"
                )
            continue
        contents[version] = files.read(path)
        following = parse(path, contents[version])
        try:
            check_signed(newest, following)
        except (ThresholdError, RequestError) as error:
            raise KeyMaterialError(f"{path}: does not follow version {version - 1}: {error}") from error
        newest = following
    return Chain(contents, newest)


def parse(path: Path, content: bytes) -> Metadata[Root]:
    """Reads a root, whoever signed it.

    Raises:
        KeyMaterialError: it is not a root.
    """
    try:
        root = Metadata[Root].from_bytes(content)
    except (DeserializationError, ValueError) as error:
        raise KeyMaterialError(f"{path}: not TUF root metadata: {error}") from error
    if not isinstance(root.signed, Root):
        raise KeyMaterialError(f"{path}: holds {root.signed.type} metadata, not a root")
    return root


def check_self_signed(path: Path, root: Metadata[Root]) -> None:
    """Checks that a root's own keys signed it.

    Raises:
        KeyMaterialError: they did not.
    """
    try:
        root.verify_delegate(Root.type, root)
    except (RepositoryError, ValueError) as error:
        raise KeyMaterialError(f"{path}: not a root that its own keys signed: {error}") from error


def to_bytes(root: Metadata[Root]) -> bytes:
    """A root as it is written."""
    return root.to_bytes(JSONSerializer(compact=True))


def key_name(role: str, index: int, count: int) -> str:
    """Name of a role's key: "timestamp" if there is one, else "root-1" and so on, in the root's order."""
    return role if count == 1 else f"{role}-{index + 1}"


def named_keys(root: Root) -> dict[str, tuple[str, Key]]:
    """Name of each key that a root names -> its role and the key."""
    return {
        key_name(role, index, len(holder.keyids)): (role, root.keys[keyid])
        for role, holder in root.roles.items()
        for index, keyid in enumerate(holder.keyids)
    }


def successor(root: Root, replaced: Mapping[str, Key], expires: datetime) -> Metadata[Root]:
    """Makes the next root, unsigned.

    Args:
        root: the newest.
        replaced: name of a key -> the key in its place.
        expires: UTC, whole seconds.

    Raises:
        RequestError: the chain would be longer than a vehicle follows, or a key stands twice.
    """
    if root.version >= MAX_ROOTS:
        raise RequestError(
            f"root {root.version} is the last of {MAX_ROOTS} that a vehicle follows; ship images with a "
            "newer first root, and begin a new chain"
        )
    following = Root.from_dict(copy.deepcopy(root.to_dict()))
    following.version = root.version + 1
    following.expires = expires
    keys = {name: (role, replaced.get(name, key)) for name, (role, key) in named_keys(root).items()}
    for role in following.roles:
        following.roles[role].keyids = [key.keyid for owner, key in keys.values() if owner == role]
    following.keys = {key.keyid: key for _, key in keys.values()}
    _refuse_shared_keys(following)
    return Metadata(following)


def signatures(previous: Metadata[Root], following: Metadata[Root]) -> RootVerificationResult:
    """Who of the old and of the new root keys has signed a root.

    Raises:
        RequestError: it is not the next version.
    """
    expected, found = previous.signed.version + 1, following.signed.version
    if found != expected:
        raise RequestError(f"expected root version {expected}, found {found}")
    return following.signed.get_root_verification_result(
        previous.signed, following.signed_bytes, following.signatures
    )


def check_signed(previous: Metadata[Root], following: Metadata[Root]) -> None:
    """Checks that a root may follow another (TUF 1.0.34, section 5.3.4 and 5.3.5).

    Raises:
        RequestError: another version, or one key under two ids or in two roles.
        ThresholdError: too few old or new root keys have signed; names who could.
    """
    _refuse_shared_keys(following.signed)
    missing = lacking(previous, following)
    if missing:
        raise ThresholdError("; ".join(missing))
    previous.verify_delegate(Root.type, following)
    following.verify_delegate(Root.type, following)


def lacking(previous: Metadata[Root], following: Metadata[Root]) -> tuple[str, ...]:
    """What signatures a root still needs, in words; empty if none."""
    found = signatures(previous, following)
    sides = ((previous, found.first), (following, found.second))
    return tuple(
        f"needs {result.missing} more of the root keys of version {root.signed.version}: "
        + ", ".join(
            f"{name} ({key.keyid[:16]})"
            for name, (_, key) in named_keys(root.signed).items()
            if key.keyid in result.unsigned
        )
        for root, result in sides
        if not result.verified
    )


def changes(previous: Root, following: Root) -> tuple[str, ...]:
    """What differs between two roots, in words, for a person who is to sign the second."""
    told = [f"version {previous.version} -> {following.version}"]
    if previous.expires.date() != following.expires.date():
        told.append(f"expires {previous.expires:%Y-%m-%d} -> {following.expires:%Y-%m-%d}")
    if previous.consistent_snapshot != following.consistent_snapshot:
        told.append(f"consistent_snapshot {previous.consistent_snapshot} -> {following.consistent_snapshot}")
    for role, after in following.roles.items():
        before = previous.roles[role]
        if before.threshold != after.threshold:
            told.append(f"{role}: threshold {before.threshold} -> {after.threshold}")
        told += [f"{role}: key {k[:16]} goes" for k in before.keyids if k not in after.keyids]
        told += [f"{role}: key {k[:16]} comes" for k in after.keyids if k not in before.keyids]
    return tuple(told)


def _refuse_shared_keys(root: Root) -> None:
    """One key in two places would let one theft count twice."""
    named = [keyid for role in root.roles.values() for keyid in role.keyids]
    public = {
        str(root.keys[keyid].keyval.get("public")).lower().strip() for keyid in named if keyid in root.keys
    }
    if len(public) != len(named):
        raise RequestError(f"root version {root.version}: one key stands in two places, or is missing")
