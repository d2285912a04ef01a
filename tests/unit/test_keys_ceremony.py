"""What `fod-keys init` makes, and what it never does."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime
from pathlib import Path

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from tuf.api.metadata import Metadata, Root

from keys import ceremony, inventory
from keys.__main__ import main
from keys.errors import KeyMaterialError, WouldOverwriteError

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PRIVATE = {
    *(f"{name}/root-{i}.key" for name in ("catalogue", "director") for i in (1, 2, 3)),
    *(f"catalogue/targets-{i}.key" for i in (1, 2, 3)),
    *(f"{name}/{role}.key" for name in ("catalogue", "director") for role in ("snapshot", "timestamp")),
    "director/targets.key",
    "token/root.key",
    "token/key-1.key",
    "receipt/receipt.key",
    "tls/ca.key",
    "tls/server.key",
    "enrolment/ca.key",
    "operator/operator.key",
}
PUBLIC = {
    "director-root.json",
    "catalogue-root.json",
    "director/1.root.json",
    "catalogue/1.root.json",
    "tls-ca.crt",
    "enrolment-ca.crt",
    "receipt.pub",
    "token-root.pub",
    "token-key-1.cose",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ceremony") / "keys"
    ceremony.init(folder, NOW, replace=False)
    return folder


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_every_key_is_made_and_only_public_halves_are_to_be_shipped(made: Path) -> None:
    files = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert {f for f in files if f.endswith(".key")} == PRIVATE
    assert {f.removeprefix("public/") for f in files if f.startswith("public/")} == PUBLIC
    assert not any(b"PRIVATE" in (made / "public" / name).read_bytes() for name in PUBLIC)


def test_files_and_folders_are_the_owners_alone(made: Path) -> None:
    for path in (made, *made.rglob("*")):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.parametrize(
    ("name", "thresholds"),
    [
        ("director", {"root": (2, 3), "targets": (1, 1), "snapshot": (1, 1), "timestamp": (1, 1)}),
        ("catalogue", {"root": (2, 3), "targets": (2, 3), "snapshot": (1, 1), "timestamp": (1, 1)}),
    ],
)
def test_roots_have_their_thresholds(made: Path, name: str, thresholds: dict[str, tuple[int, int]]) -> None:
    root = Metadata[Root].from_bytes((made / "public" / f"{name}-root.json").read_bytes())
    root.verify_delegate(Root.type, root)
    assert root.signed.version == 1
    assert root.signed.consistent_snapshot
    assert root.signed.expires.year == 2030
    found = {role: (r.threshold, len(r.keyids)) for role, r in root.signed.roles.items()}
    assert found == thresholds
    assert len(root.signed.keys) == sum(count for _, count in thresholds.values())


def test_certificates_do_not_need_a_clock_and_name_their_use(made: Path) -> None:
    for path in made.rglob("*.crt"):
        certificate = _certificate(path)
        assert certificate.not_valid_before_utc.year == 1970
        assert certificate.not_valid_after_utc == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    for area in ("tls", "enrolment"):
        constraints = _certificate(made / area / "ca.crt").extensions.get_extension_for_class(
            x509.BasicConstraints
        )
        assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    server, operator = _certificate(made / "tls/server.crt"), _certificate(made / "operator/operator.crt")
    server.verify_directly_issued_by(_certificate(made / "public/tls-ca.crt"))
    operator.verify_directly_issued_by(_certificate(made / "public/enrolment-ca.crt"))
    for certificate, use in (
        (server, ExtendedKeyUsageOID.SERVER_AUTH),
        (operator, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [use]
    names = operator.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:openfod:operator:operator"]


def test_the_token_key_is_announced_by_the_token_root(made: Path) -> None:
    root = load_pem_public_key((made / "public/token-root.pub").read_bytes())
    assert isinstance(root, Ed25519PublicKey)
    protected, unprotected, payload, signature = cbor2.loads(
        (made / "public/token-key-1.cose").read_bytes()
    ).value
    external = cbor2.dumps(["openfod-token-key-v1"], canonical=True)
    root.verify(signature, cbor2.dumps(["Signature1", protected, external, payload], canonical=True))
    assert unprotected == {}
    claims = cbor2.loads(payload)
    assert claims[1] == 1
    assert len(claims[2]) == 32


def test_existing_keys_are_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "precious.key").write_text("precious")
    with pytest.raises(WouldOverwriteError, match="nothing was written"):
        ceremony.init(folder, NOW, replace=False)
    assert [p.name for p in folder.iterdir()] == ["precious.key"]
    moved = ceremony.init(folder, NOW, replace=True)
    assert moved is not None
    assert (moved / "precious.key").read_text() == "precious"
    assert (folder / "tls/ca.key").exists()


def test_show_lists_keys_roots_and_certificates(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(made), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    entries = found["files"]
    assert {e["file"] for e in entries if e["kind"].endswith("key")} == PRIVATE
    assert [(r["repository"], r["version"]) for r in found["roots"]] == [("catalogue", 1), ("director", 1)]
    assert all("root 2 of 3" in r["thresholds"] for r in found["roots"])
    assert {e["expires"] for e in entries if e["kind"].startswith("certificate")} == {"never"}
    ids = {e["identifier"] for e in entries if e["file"].startswith("director/")}
    assert ids == set(found["roots"][1]["keys"].values())
    assert [(e["epoch"], e["is_announced"]) for e in found["epochs"]] == [(1, True)]
    assert found["missing"] == []
    assert main(["show", str(made)]) == 0
    assert "PRIVATE" not in out + capsys.readouterr().out


def test_show_says_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(KeyMaterialError, match="fod-keys init"):
        inventory.take(tmp_path, NOW)
    for name in ("x.key", "x.crt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("nothing")
        with pytest.raises(KeyMaterialError, match=name):
            inventory.take(folder, NOW)
