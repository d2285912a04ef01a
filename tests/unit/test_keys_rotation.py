"""Keys are replaced as one change: signed by holders who may work apart, and whole after any power cut."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tuf.api.metadata import Metadata, Root, Targets

from keys import catalogue, ceremony, files, inventory, roots, rotation
from keys.__main__ import main
from keys.errors import KeyMaterialError, RequestError, ThresholdError, WouldOverwriteError

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "catalogue"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(days=400)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key folder and its signed catalogue, to be copied."""
    base = tmp_path_factory.mktemp("rotation")
    ceremony.init(base / "keys", NOW, replace=False)
    catalogue.sign_catalogue(base / "keys", DEMO, base / "catalogue", NOW)
    return base


@pytest.fixture
def base(fresh: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fresh, tmp_path / "made"))


@pytest.fixture
def folder(base: Path) -> Path:
    return base / "keys"


def _content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _root(folder: Path, name: str) -> Root:
    return roots.load_chain(folder, name).newest.signed


def _keyid(path: Path) -> str:
    return ceremony.signer(files.load_ed25519(path)).public_key.keyid


def _fits(folder: Path, name: str) -> None:
    """Every key in the folder is the one that the newest root names."""
    for key, (_, public) in roots.named_keys(_root(folder, name)).items():
        assert _keyid(folder / name / f"{key}.key") == public.keyid, key


@pytest.mark.parametrize("what", rotation.ROLE_CHANGES)
def test_each_role_is_replaced_and_nothing_else(folder: Path, what: str) -> None:
    name, _, role = what.partition("-")
    before, old = _root(folder, name), _content(folder)
    assert main(["rotate", str(folder), what]) == 0
    after = _root(folder, name)
    assert after.version == 2
    for other, holder in before.roles.items():
        kept = set(holder.keyids) & set(after.roles[other].keyids)
        assert kept == (set() if other == role else set(holder.keyids))
        assert after.roles[other].threshold == holder.threshold
        assert len(after.roles[other].keyids) == len(holder.keyids)
    _fits(folder, name)
    assert (folder / "public" / f"{name}-root.json").read_bytes() == old[f"public/{name}-root.json"]
    gone = {content for path, content in old.items() if path.endswith(".key")}
    assert gone <= set(_content(folder).values()), "an old key is lost"
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_one_lost_key_is_replaced_by_the_two_that_are_left(folder: Path) -> None:
    (folder / "director/root-2.key").unlink()
    before = _root(folder, "director")
    assert main(["rotate", str(folder), "director-root", "--key", "root-2"]) == 0
    after = _root(folder, "director")
    changed = [i for i in range(3) if before.roles["root"].keyids[i] != after.roles["root"].keyids[i]]
    assert changed == [1]
    _fits(folder, "director")


def test_below_the_threshold_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        (folder / f"director/root-{number}.key").unlink()
    before = _content(folder)
    assert main(["rotate", str(folder), "director-timestamp"]) == 1
    assert "needs 1 more of the root keys of version 1: root-1 (" in capsys.readouterr().err
    assert _content(folder) == before


def test_a_renewed_root_has_the_same_keys_and_a_later_end(folder: Path) -> None:
    before = _root(folder, "catalogue")
    outcome = rotation.rotate_roles(folder, "catalogue", [], LATER)
    after = _root(folder, "catalogue")
    assert (outcome.version, outcome.published) == (2, True)
    assert after.roles == before.roles
    assert after.expires == (LATER + ceremony.ROOT_LIFETIME)
    assert not (folder / "retired").exists()


def test_a_folder_of_an_older_installation_gets_its_chain(folder: Path) -> None:
    shutil.rmtree(folder / "public/director")
    assert main(["rotate", str(folder), "director-snapshot"]) == 0
    assert (folder / "public/director/1.root.json").read_bytes() == (
        folder / "public/director-root.json"
    ).read_bytes()
    assert _root(folder, "director").version == 2


def test_a_vehicles_chain_is_never_longer_than_it_follows(folder: Path) -> None:
    for _ in range(roots.MAX_ROOTS - 1):
        rotation.rotate_roles(folder, "director", [], NOW)
    assert any("0 more roots" in line for line in inventory.take(folder, NOW).warnings)
    before = _content(folder)
    with pytest.raises(RequestError, match="root 32 is the last of 32"):
        rotation.rotate_roles(folder, "director", [], NOW)
    assert _content(folder) == before


# --- the catalogue under new targets keys ---------------------------------------------


def _is_signed(folder: Path, repository: Path, root_version: int, version: int) -> bool:
    root = Metadata[Root].from_bytes((folder / roots.chain_path("catalogue", root_version)).read_bytes())
    metadata = Metadata[Targets].from_bytes((repository / f"metadata/{version}.targets.json").read_bytes())
    found = root.signed.get_verification_result("targets", metadata.signed_bytes, metadata.signatures)
    return found.verified


def test_the_catalogue_stands_under_the_old_and_the_new_root(base: Path, folder: Path) -> None:
    repository = base / "catalogue"
    command = ["rotate", str(folder), "catalogue-targets", "--catalogue", str(repository)]
    assert main(command) == 0
    assert [_is_signed(folder, repository, n, 2) for n in (1, 2)] == [True, True]
    assert not catalogue.sign_catalogue(folder, DEMO, repository, NOW).written


def test_without_the_catalogue_it_is_signed_again_afterwards(base: Path, folder: Path) -> None:
    repository = base / "catalogue"
    outcome = rotation.rotate_roles(folder, "catalogue", ["targets"], NOW)
    assert "fod-keys sign-catalogue" in outcome.next_steps[0]
    signed = catalogue.sign_catalogue(folder, DEMO, repository, NOW)
    assert (signed.version, signed.written, signed.added) == (2, True, ())
    assert [_is_signed(folder, repository, n, 2) for n in (1, 2)] == [False, True]
    assert (repository / "metadata/2.root.json").exists()


def test_the_catalogue_is_signed_by_a_threshold_of_the_holders(base: Path, folder: Path) -> None:
    repository = base / "catalogue"
    (folder / "catalogue/targets-3.key").unlink()
    again = catalogue.sign_catalogue(folder, DEMO, repository, NOW + timedelta(days=200))
    assert again.written
    (folder / "catalogue/targets-1.key").unlink()
    before = _content(repository)
    with pytest.raises(ThresholdError, match="expected 2 signatures under root 1, found 1"):
        catalogue.sign_catalogue(folder, DEMO, repository, NOW + timedelta(days=400))
    assert _content(repository) == before


# --- holders who work apart ---------------------------------------------------------------


def test_holders_sign_apart_and_the_root_is_published_when_both_thresholds_are_met(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safes = tmp_path / "safes"
    safes.mkdir()
    for number in (1, 2, 3):
        (folder / f"director/root-{number}.key").rename(safes / f"root-{number}.key")
    card = Ed25519PrivateKey.generate()
    (safes / "card.key").write_bytes(files.private_pem(card))
    (safes / "card.pub").write_bytes(files.public_pem(card.public_key()))
    before = _content(folder)

    command = ["rotate", str(folder), "director-root", "--key", "root-3"]
    assert main([*command, "--public", f"root-3={safes / 'card.pub'}", "--prepare"]) == 0
    assert {k: v for k, v in _content(folder).items() if not k.startswith("prepared/")} == before
    prepared = folder / "prepared/director/public/director/2.root.json"
    assert main(["publish", str(folder), "director"]) == 1
    assert "needs 2 more of the root keys of version 1" in capsys.readouterr().err
    with pytest.raises(WouldOverwriteError, match="fod-keys publish"):
        rotation.rotate_roles(folder, "director", ["timestamp"], NOW)

    sent = []
    for key in ("root-1", "card", "root-3"):
        sent.append(tmp_path / f"by-{key}.json")
        shutil.copy(prepared, sent[-1])
        first = str(folder / "public/director-root.json")
        assert (
            main(["sign-root", str(sent[-1]), "--previous", first, "--key", str(safes / f"{key}.key")]) == 0
        )
    assert f"root: key {ceremony.signer(card).public_key.keyid[:16]} comes" in capsys.readouterr().out
    assert main(["publish", str(folder), "director", str(sent[0]), str(sent[1])]) == 1  # 1 old, 2 new
    assert _root(folder, "director").version == 1
    assert main(["publish", str(folder), "director", str(sent[2])]) == 0
    root = _root(folder, "director")
    assert root.roles["root"].keyids[2] == ceremony.signer(card).public_key.keyid
    assert not (folder / "prepared").exists()


def test_a_signature_that_counts_is_not_displaced_by_a_forged_one(folder: Path, tmp_path: Path) -> None:
    rotation.rotate_roles(folder, "director", ["timestamp"], NOW, hold=True)
    prepared = folder / "prepared/director/public/director/2.root.json"
    document = json.loads(prepared.read_bytes())
    for signature in document["signatures"]:
        signature["sig"] = "00" * 64
    (tmp_path / "forged.json").write_text(json.dumps(document))
    assert rotation.publish(folder, "director", [tmp_path / "forged.json"]).published
    assert roots.load_chain(folder, "director").newest.signed.version == 2


def test_a_holder_signs_only_what_follows_the_root_that_he_knows(folder: Path, tmp_path: Path) -> None:
    rotation.rotate_roles(folder, "director", [], NOW)
    rotation.rotate_roles(folder, "director", [], NOW, hold=True)
    prepared = folder / "prepared/director/public/director/3.root.json"
    before = prepared.read_bytes()
    key = str(folder / "director/root-1.key")
    with pytest.raises(RequestError, match="expected root version 2, found 3"):
        rotation.sign_root(prepared, folder / "public/director-root.json", key)
    with pytest.raises(KeyMaterialError, match="none of those whose signature would count"):
        rotation.sign_root(
            prepared, folder / "public/director/2.root.json", str(folder / "catalogue/root-1.key")
        )
    with pytest.raises(KeyMaterialError, match="no private key that can sign here"):
        rotation.sign_root(prepared, folder / "public/director/2.root.json", "file2:/nowhere.pem")
    other = tmp_path / "other.json"
    other.write_bytes((folder / "public/director/2.root.json").read_bytes())
    with pytest.raises(KeyMaterialError, match="is not the root that waits"):
        rotation.publish(folder, "director", [other])
    assert prepared.read_bytes() == before


# --- a cut at every write ---------------------------------------------------------------------


class _CutError(Exception):
    pass


def _cut_after(monkeypatch: pytest.MonkeyPatch, allowed: int) -> list[int]:
    """Lets that many renames and removals happen, and fails at the next, as a power cut does."""
    done = [0]

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if done[0] >= allowed:
                raise _CutError
            done[0] += 1
            return original(*args, **kwargs)

        return call

    for owner, name in ((Path, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (os, "open")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return done


CHANGES: dict[str, Callable[[Path], object]] = {
    "online keys": lambda base: rotation.rotate_roles(
        base / "keys", "director", ["timestamp", "snapshot"], NOW
    ),
    "root keys": lambda base: rotation.rotate_roles(base / "keys", "director", ["root"], NOW),
    "catalogue": lambda base: rotation.rotate_roles(
        base / "keys", "catalogue", ["targets"], NOW, repository=base / "catalogue"
    ),
    "token": lambda base: rotation.rotate_token(base / "keys"),
    "tls": lambda base: rotation.rotate_tls_server(base / "keys"),
    "operator": lambda base: rotation.issue_operator(base / "keys", "shop", "workshop"),
}


def _state(folder: Path) -> str:
    """The change as the folder shows it: of each kind all old or all new."""
    _fits(folder, "director")
    _fits(folder, "catalogue")
    newest = rotation.newest_epoch(folder)
    assert (folder / f"token/key-{newest}.key").exists()
    certificate = x509.load_pem_x509_certificate((folder / "tls/server.crt").read_bytes())
    held = {e.identifier for e in inventory.take(folder, NOW).files if e.file == "tls/server.key"}
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert held == {hashlib.sha256(spki).hexdigest()}
    assert (folder / "operator/shop.key").exists() == (folder / "operator/shop.crt").exists()
    versions = [_root(folder, name).version for name in ("director", "catalogue")]
    return f"{versions} {newest} {certificate.serial_number} {(folder / 'operator/shop.crt').exists()}"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_cut_at_any_write_leaves_the_old_or_the_new_and_no_key_is_lost(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    old_state = _state(fresh / "keys")
    old_keys = {v for k, v in _content(fresh / "keys").items() if k.endswith((".key", ".crt"))}
    outcomes = []
    for cut in range(400):
        base = Path(shutil.copytree(fresh, tmp_path / str(cut)))
        with monkeypatch.context() as patch:
            _cut_after(patch, cut)
            try:
                change(base)
                finished = True
            except _CutError:
                finished = False
        folder = base / "keys"
        agreed = folder / "agreed"
        is_decided = finished or (agreed.exists() and any(p.suffix != ".new" for p in agreed.iterdir()))
        if not is_decided and True not in outcomes:
            assert _state(folder) == old_state  # usable as it is, without any repair
            assert catalogue.sign_catalogue(folder, DEMO, base / "catalogue", NOW).releases == 2
        rotation.finish(folder)
        assert old_keys <= set(_content(folder).values()), f"a key is lost at cut {cut}"
        assert not list(agreed.glob("*")) or not is_decided
        outcomes.append(_state(folder) != old_state)
        assert catalogue.sign_catalogue(folder, DEMO, base / "catalogue", NOW).releases == 2
        shutil.rmtree(base)
        if finished:
            break
    assert finished, "the cuts did not reach the end"
    assert outcomes == sorted(outcomes), "a later cut brought the old state back"
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert len(outcomes) > 8


def test_what_a_cut_left_half_made_does_not_stand_in_the_way(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(fresh, tmp_path / "cut"))
    with monkeypatch.context() as patch:
        _cut_after(patch, 12)
        with pytest.raises(_CutError):
            CHANGES["online keys"](base)
    CHANGES["online keys"](base)
    _fits(base / "keys", "director")
    assert _root(base / "keys", "director").version == 2


def test_the_next_command_finishes_what_was_decided_before_a_cut(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cut in range(100):
        base = Path(shutil.copytree(fresh, tmp_path / str(cut)))
        with monkeypatch.context() as patch:
            _cut_after(patch, cut)
            with pytest.raises(_CutError):
                CHANGES["online keys"](base)
        if (base / "keys/agreed/director").exists():
            break
    folder = base / "keys"
    assert "is not all in place yet" in inventory.take(folder, NOW).warnings[0]
    assert main(["renew", str(folder), "director"]) == 0
    _fits(folder, "director")
    assert _root(folder, "director").version == 3
    assert inventory.take(folder, NOW).warnings == ()


# --- token keys, certificates, operators ---------------------------------------------------------


def test_the_next_token_epoch_is_announced_and_the_old_key_is_retired(folder: Path) -> None:
    assert main(["rotate", str(folder), "token", "--json"]) == 0
    assert main(["rotate", str(folder), "token"]) == 0
    found = inventory.take(folder, NOW)
    assert [(e.epoch, e.is_announced, e.private_key) for e in found.epochs] == [
        (1, True, ""),
        (2, True, ""),
        (3, True, "token/key-3.key"),
    ]
    assert len({e.kid for e in found.epochs}) == 3
    assert (folder / "token/key-3.cose").read_bytes() == (folder / "public/token-key-3.cose").read_bytes()
    retired = {p.name for p in (folder / "retired/token").iterdir()}
    assert retired == {"key-1.1.key", "key-2.1.key"}


def test_a_token_epoch_needs_the_root_that_ecus_know(folder: Path) -> None:
    shutil.copy(folder / "receipt/receipt.key", folder / "token/root.key")
    before = _content(folder)
    with pytest.raises(KeyMaterialError, match=r"not the key of public/token-root\.pub"):
        rotation.rotate_token(folder)
    assert _content(folder) == before


def test_a_server_certificate_can_be_prepared_before_the_server_uses_it(folder: Path) -> None:
    before = (folder / "tls/server.crt").read_bytes()
    assert main(["rotate", str(folder), "tls-server", "--prepare"]) == 0
    assert (folder / "tls/server.crt").read_bytes() == before
    prepared = (folder / "prepared/tls/tls/server.crt").read_bytes()
    assert main(["publish", str(folder), "tls"]) == 0
    assert (folder / "tls/server.crt").read_bytes() == prepared != before
    assert (folder / "retired/tls/server.1.crt").read_bytes() == before
    ca = x509.load_pem_x509_certificate((folder / "tls/ca.crt").read_bytes())
    x509.load_pem_x509_certificate(prepared).verify_directly_issued_by(ca)


def test_operators_have_their_roles_and_none_is_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["operator", str(folder), "shop-7", "--role", "workshop"]) == 0
    assert main(["operator", str(folder), "desk"]) == 0
    uris = {}
    for name in ("shop-7", "desk"):
        certificate = x509.load_pem_x509_certificate((folder / f"operator/{name}.crt").read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris[name] = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == {
        "shop-7": ["urn:openfod:operator:shop-7", "urn:openfod:role:workshop"],
        "desk": ["urn:openfod:operator:desk"],
    }
    kinds = {e.file: e.kind for e in inventory.take(folder, NOW).files}
    assert kinds["operator/shop-7.crt"] == "certificate (role workshop)"
    before = _content(folder)
    assert main(["operator", str(folder), "desk", "--role", "workshop"]) == 1
    assert main(["operator", str(folder), "../desk"]) == 2
    assert "exists; nothing was written" in capsys.readouterr().err
    assert _content(folder) == before


# --- show, and wrong use ------------------------------------------------------------------------------


def test_show_warns_of_what_ends_and_names_what_is_missing(folder: Path) -> None:
    assert inventory.take(folder, NOW).warnings == ()
    end = _root(folder, "director").expires
    assert inventory.take(folder, end - timedelta(days=180)).warnings == ()
    warnings = inventory.take(folder, end - timedelta(days=179)).warnings
    assert warnings[1] == (
        f"director root 1 ends in 179 days ({end:%Y-%m-%d}); renew it with: fod-keys renew {folder} director"
    )
    assert "ended" in inventory.take(folder, end + timedelta(days=1)).warnings[0]
    keyid = _keyid(folder / "director/root-2.key")
    for name in ("director/root-2.key", "tls/ca.key", "token/key-1.key"):
        (folder / name).unlink()
    assert inventory.take(folder, NOW).missing == (
        f"director/root-2.key (key {keyid[:16]} is held elsewhere or lost)",
        "tls/ca.key",
        "token/key-1.key",
    )


def test_show_refuses_a_forged_announcement_and_a_broken_chain(folder: Path) -> None:
    rotation.rotate_roles(folder, "director", ["root"], NOW)
    forged = ceremony.announce_token_key(
        Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate().public_key(), 1
    )
    genuine = (folder / "public/token-key-1.cose").read_bytes()
    (folder / "public/token-key-1.cose").write_bytes(forged)
    with pytest.raises(KeyMaterialError, match="not an announcement"):
        inventory.take(folder, NOW)
    (folder / "public/token-key-1.cose").write_bytes(genuine)
    (folder / "public/director/2.root.json").write_bytes(
        (folder / "public/catalogue/1.root.json").read_bytes()
    )
    with pytest.raises(KeyMaterialError, match=r"2\.root\.json: does not follow version 1"):
        inventory.take(folder, NOW)


@pytest.mark.parametrize(
    "words",
    [
        ["director-root", "catalogue-root"],
        ["token", "director-root"],
        ["token", "--prepare"],
        ["tls-server", "--key", "root-1"],
        ["director-root", "--key", "root-4"],
        ["director-root", "--public", "root-1"],
        ["director-root", "--key", "root-1", "--public", "root-2=x.pem"],
        ["director-timestamp", "--catalogue", "x"],
    ],
)
def test_what_does_not_go_together_is_refused_and_writes_nothing(folder: Path, words: list[str]) -> None:
    before = _content(folder)
    assert main(["rotate", str(folder), *words]) == 2
    assert _content(folder) == before
