"""What a catalogue must be before it is signed, and what stays as it was signed."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root, Targets

from keys import catalogue, ceremony
from keys.__main__ import main
from keys.errors import CatalogueError, KeyMaterialError
from keys.lint import lint

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "catalogue"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SEAT = "features/seat-heating/1.toml"
LOGBOOK = "features/drivers-logbook/1.toml"


@pytest.fixture(scope="module")
def key_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue") / "keys"
    ceremony.init(folder, NOW, replace=False)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(DEMO, tmp_path / "source")
    return tmp_path / "source"


def _edit(source: Path, path: str, old: str, new: str) -> None:
    text = (source / path).read_text()
    assert old in text
    (source / path).write_text(text.replace(old, new))


def _targets(repository: Path, version: int) -> Metadata[Targets]:
    return Metadata[Targets].from_bytes((repository / f"metadata/{version}.targets.json").read_bytes())


def test_the_demo_catalogue_is_signed_by_two_of_three(key_folder: Path, source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    signed = catalogue.sign_catalogue(key_folder, source, repository, NOW)
    assert (signed.version, signed.releases, signed.added) == (1, 2, (LOGBOOK, SEAT))
    root = Metadata[Root].from_bytes((repository / "metadata/1.root.json").read_bytes())
    metadata = _targets(repository, 1)
    root.verify_delegate(Targets.type, metadata)
    assert metadata.signed.expires == NOW + timedelta(days=365)
    for path, info in metadata.signed.targets.items():
        content = (repository / "targets" / path).read_bytes()
        info.verify_length_and_hashes(content)
        assert content == (source / path).read_bytes()
    assert metadata.signed.targets[SEAT].custom == {"hardware_ids": ["openfod-seat-1"], "release_counter": 1}


def test_an_unchanged_catalogue_is_signed_again_only_before_it_ends(
    key_folder: Path, source: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    catalogue.sign_catalogue(key_folder, source, repository, NOW)
    later = catalogue.sign_catalogue(key_folder, source, repository, NOW + timedelta(days=100))
    assert (later.version, later.written) == (1, False)
    later = catalogue.sign_catalogue(key_folder, source, repository, NOW + timedelta(days=200))
    assert (later.version, later.written) == (2, True)


def test_a_new_release_is_added_and_the_old_one_stays(key_folder: Path, source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    catalogue.sign_catalogue(key_folder, source, repository, NOW)
    second = SEAT.replace("1.toml", "2.toml")
    shutil.copy(source / SEAT, source / second)
    _edit(source, second, "release = 1  ", "release = 2  ")
    signed = catalogue.sign_catalogue(key_folder, source, repository, NOW)
    assert (signed.version, signed.added) == (2, (second,))
    assert set(_targets(repository, 2).signed.targets) == {SEAT, second, LOGBOOK}


def test_a_signed_release_never_changes_or_vanishes(key_folder: Path, source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    catalogue.sign_catalogue(key_folder, source, repository, NOW)
    before = {p: p.read_bytes() for p in repository.rglob("*") if p.is_file()}
    _edit(source, SEAT, "max_s = 14400", "max_s = 14401")
    (source / LOGBOOK).unlink()
    with pytest.raises(CatalogueError) as caught:
        catalogue.sign_catalogue(key_folder, source, repository, NOW)
    assert len(caught.value.problems) == 2
    assert "an edit is a new release" in str(caught.value)
    assert "was signed and is missing" in str(caught.value)
    assert {p: p.read_bytes() for p in repository.rglob("*") if p.is_file()} == before


def test_a_repository_of_other_keys_is_left_alone(key_folder: Path, source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    catalogue.sign_catalogue(key_folder, source, repository, NOW)
    ceremony.init(tmp_path / "other", NOW, replace=False)
    with pytest.raises(KeyMaterialError, match="belongs to other keys"):
        catalogue.sign_catalogue(tmp_path / "other", source, repository, NOW)
    shutil.copy(key_folder / "director/targets.key", tmp_path / "other/catalogue/targets-2.key")
    with pytest.raises(KeyMaterialError, match=r"targets-2\.key: its key is none of those whose"):
        catalogue.sign_catalogue(tmp_path / "other", source, tmp_path / "fresh", NOW)


def test_tampered_metadata_is_not_built_upon(key_folder: Path, source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    catalogue.sign_catalogue(key_folder, source, repository, NOW)
    path = repository / "metadata/1.targets.json"
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":9'))
    with pytest.raises(KeyMaterialError, match="not signed by this root's targets keys"):
        catalogue.sign_catalogue(key_folder, source, repository, NOW)


READ_BACK = '[read_back]\ndid = 1\nmask = "FF"\nactive = "01"\ninterval_s = 1\n'
REFUSED: dict[str, tuple[str, str, str, str]] = {
    "unknown key": (SEAT, "[hold]", "[hold]\nmin_s = 1", "hold.min_s: unknown key"),
    "id of another path": (SEAT, 'id = "seat-heating"', 'id = "seat-cooling"', "as in the path"),
    "release of another path": (SEAT, "release = 1  ", "release = 2  ", "as in the path"),
    "safety": (SEAT, "safety_relevant = false", "safety_relevant = true", "are refused"),
    "unlisted service": (SEAT, '"31 01 0F 0D"', '"11 01 0F 0D"', "expected 31 01 and a routine"),
    "stop as activation": (SEAT, '"31 01 0F 0D"', '"31 02 0F 0D"', "expected 31 01 and a routine"),
    "payload in activation": (SEAT, '"31 01 0F 0D"', '"31 01 0F 0D FF"', "expected 31 01 and a routine"),
    "release by another service": (SEAT, '"31 01 0F 0E 00 01"', '"2E 0F 0E 00"', "expected 31 01 or 31 02"),
    "not hex": (SEAT, '"31 01 0F 0D"', '"31 1 0F 0D"', "expected bytes as in"),
    "kind of the future": (SEAT, 'kind = "token"', 'kind = "frame"', "expected one of token, none"),
    "ecu-token without token": (LOGBOOK, '"detect-only"', '"ecu-token"', 'needs kind "token"'),
    "frames of a head unit": (LOGBOOK, "[actuator]", '[actuator]\nactivate = "31 01 0F 0D"', "remove it"),
    "no bus": (SEAT, 'bus = "body"\n', "", "ecu.bus: missing"),
    "same identifiers": (SEAT, "response_id = 0x74C", "response_id = 0x744", "another identifier"),
    "empty condition": (LOGBOOK, 'activate]\nwhen = "true"', 'activate]\nwhen = " "', "empty"),
    "unlisted input": (SEAT, 'when = "Vehicle.Speed < 1.0"\ninputs = ["Vehicle.Speed"]',
                       'when = "Vehicle.Speed < 1.0"\ninputs = []', "and not listed"),
    "unread input": (LOGBOOK, 'when = "true"\ninputs = []', 'when = "true"\ninputs = ["Vehicle.Speed"]',
                     "is listed and not read"),
    "unknown meter": (SEAT, 'kind = "duration"', 'kind = "luck"', "expected one of duration, distance"),
    "no odometer": (LOGBOOK, 'odometer = "Vehicle.TraveledDistance"\n', "", "a distance meter needs it"),
    "meter twice": (LOGBOOK, 'id = "time"', 'id = "distance"', "occurs more than once"),
    "blind mask": (SEAT, 'mask = "FF"', 'mask = "00"', "looks at no bit"),
    "active outside mask": (SEAT, 'mask = "FF"', 'mask = "FE"', "bits outside mask"),
    "mask of another length": (SEAT, 'mask = "FF"', 'mask = "FF FF"', "expected 2 bytes"),
    "read-back of a head unit": (LOGBOOK, "[hold]", READ_BACK + "[hold]", "has nothing to read back"),
    "not CEL": (SEAT, 'when = "Vehicle.Speed < 1.0"', 'when = "Vehicle.Speed <"', "when: not CEL: "),
    "not TOML": (SEAT, "[feature]", "[feature", "not TOML"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "old", "new", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_file_and_reason(source: Path, path: str, old: str, new: str, expected: str) -> None:
    _edit(source, path, old, new)
    with pytest.raises(CatalogueError) as caught:
        lint(source)
    assert expected in str(caught.value)
    assert all(problem.startswith(str(source / path)) for problem in caught.value.problems)


def test_a_token_needs_a_read_back(source: Path) -> None:
    text = (source / SEAT).read_text()
    before, _, rest = text.partition("[read_back]")
    (source / SEAT).write_text(before + rest[rest.index("[conditions.activate]") :])
    with pytest.raises(CatalogueError, match="read_back: missing"):
        lint(source)


def test_all_problems_of_all_files_come_at_once_with_their_lines(source: Path) -> None:
    _edit(source, SEAT, "safety_relevant = false", "safety_relevant = true")
    _edit(source, SEAT, "max_s = 14400", "max_s = 0")
    _edit(source, LOGBOOK, "withdrawn = false", "withdrawn = 0")
    with pytest.raises(CatalogueError) as caught:
        lint(source)
    line = (source / SEAT).read_text().splitlines().index("max_s = 0") + 1
    assert len(caught.value.problems) == 3
    assert f"{source / SEAT}:{line}: hold.max_s: expected at least 1, found 0" in caught.value.problems


def test_a_feature_number_belongs_to_one_feature_of_a_hardware(source: Path) -> None:
    other = source / "features/seat-massage/1.toml"
    other.parent.mkdir()
    other.write_text((source / SEAT).read_text().replace('id = "seat-heating"', 'id = "seat-massage"'))
    with pytest.raises(CatalogueError, match="belongs to feature seat-heating"):
        lint(source)


@pytest.mark.parametrize("name", ["features/README.md", "features/seat-heating/01.toml", "features/1.toml"])
def test_a_file_in_another_place_is_refused(source: Path, name: str) -> None:
    (source / name).write_text("")
    with pytest.raises(CatalogueError, match=r"expected a plain file features/<id>/<release>\.toml"):
        lint(source)


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="no feature file"):
        lint(tmp_path)


def test_the_commands_tell_right_from_wrong(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, repository = str(tmp_path / "keys"), str(tmp_path / "repository")
    assert main(["sign-catalogue", keys, str(source), repository]) == 1  # no keys yet
    assert "cannot be read" in capsys.readouterr().err
    assert main(["init", keys]) == 0
    assert main(["init", keys]) == 1
    assert main(["init", keys, "--force"]) == 0
    assert "moved the old keys to" in capsys.readouterr().out
    assert main(["sign-catalogue", keys, str(source), repository]) == 0
    assert "signed catalogue version 1 with 2 releases" in capsys.readouterr().out
    _edit(source, SEAT, "safety_relevant = false", "safety_relevant = true")
    assert main(["sign-catalogue", keys, str(source), repository]) == 2
    assert "error: " in capsys.readouterr().err
