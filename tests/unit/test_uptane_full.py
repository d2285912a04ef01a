"""Full verification of plain Uptane for one ECU: what is agreed on, and why the rest is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from support.trust_repo import DAY_MS, NOW_MS, Repository
from tuf.api.metadata import DelegatedRole, Delegations, MetaFile, TargetFile, Targets

from agent.errors import (
    DisagreementError,
    ExpiredError,
    LimitError,
    MalformedError,
    RollbackError,
    SignatureError,
)
from agent.model import RepositoryBytes
from agent.trust.uptane import FullVerdict, full_verification

ECU, HARDWARE, PATH = "brake-1", "brake-hw-3", "images/brake.img"


@dataclass
class World:
    """Both repositories with one image; what `judge` passes may be changed."""

    director: Repository
    image: Repository

    def publish(self) -> None:
        self.director.publish()
        self.image.publish()

    def files(self, name: str) -> RepositoryBytes:
        source: Repository = getattr(self, name)
        return RepositoryBytes(
            tuple(source.roots), source.stamp(), source.snapshot_bytes, source.targets_bytes
        )

    def judge(self, **changed: Any) -> FullVerdict:
        given: dict[str, Any] = {"ecu_identifier": ECU, "hardware_id": HARDWARE, "now_ms": NOW_MS} | changed
        director, image = given.pop("director", None), given.pop("image", None)
        return full_verification(director or self.files("director"), image or self.files("image"), **given)


def target(path: str = PATH, content: bytes = b"image", **custom: object) -> TargetFile:
    info = TargetFile.from_data(path, content, ["sha256"])
    info.unrecognized_fields["custom"] = custom
    return info


@pytest.fixture
def world() -> World:
    director, image = (Repository(NOW_MS, targets_keys=keys, extra={}) for keys in (1, 3))
    director.targets[PATH] = target(ecu_identifier=ECU, hardware_id=HARDWARE, release_counter=4)
    image.targets[PATH] = target(hardware_ids=["other", HARDWARE], release_counter=4)
    found = World(director, image)
    found.publish()
    return found


def test_what_both_repositories_say_is_agreed_on(world: World) -> None:
    verdict = world.judge()
    assert list(verdict.targets) == [PATH]
    assert (verdict.error, verdict.reason) == (None, "")


def test_an_ecu_that_the_director_does_not_name_gets_nothing(world: World) -> None:
    assert world.judge(ecu_identifier="seat-1") == FullVerdict()


def test_each_root_of_a_chain_is_followed(world: World) -> None:
    for _ in range(3):
        world.director.rotate("root")
        world.image.rotate("targets")
    world.publish()
    assert PATH in world.judge().targets
    without = replace(world.files("director"), roots=tuple(world.director.roots[::2]))
    assert isinstance(world.judge(director=without).error, SignatureError)


@pytest.mark.parametrize("name", ["director", "image"])
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_every_role_needs_its_signatures(world: World, name: str, role: str) -> None:
    getattr(world, name).signers[role] = [CryptoSigner.generate_ed25519()]
    world.publish()
    verdict = world.judge()
    assert isinstance(verdict.error, SignatureError)
    assert verdict.reason.startswith(f"SignatureError: {name} {role}")
    assert not verdict.targets


@pytest.mark.parametrize("name", ["director", "image"])
@pytest.mark.parametrize("part", ["roots", "timestamp", "snapshot", "targets"])
def test_a_missing_or_broken_part_is_named(world: World, name: str, part: str) -> None:
    for content in (b"", b"{}", b"\xff"):
        value: Any = (content,) * bool(content) if part == "roots" else content
        broken = replace(world.files(name), **{part: value})
        verdict = world.judge(**{name: broken})
        assert isinstance(verdict.error, MalformedError)
        assert name in verdict.reason


@pytest.mark.parametrize(("days", "what"), [(2, "timestamp"), (6 * 365, "root")])
def test_expired_metadata_is_refused(world: World, days: int, what: str) -> None:
    verdict = world.judge(now_ms=NOW_MS + days * DAY_MS)
    assert isinstance(verdict.error, ExpiredError)
    assert f"director {what}" in verdict.reason
    assert isinstance(world.judge(now_ms=10**18).error, MalformedError)


@pytest.mark.parametrize("name", ["director", "image"])
@pytest.mark.parametrize("part", ["roots", "timestamp", "snapshot", "targets"])
def test_a_part_that_is_too_long_is_refused_though_it_holds(world: World, name: str, part: str) -> None:
    files = world.files(name)
    limit = {"roots": 65_536, "timestamp": 16_384, "snapshot": 65_536, "targets": 524_288}[part]

    def padded(size: int) -> RepositoryBytes:
        if part == "roots":
            return replace(files, roots=(files.roots[0].ljust(size),))
        return replace(files, **{part: getattr(files, part).ljust(size)})

    error = world.judge(**{name: padded(limit + 1)}).error
    assert isinstance(error, LimitError)
    assert name in str(error)
    if part != "snapshot":  # whose length the timestamp names
        assert PATH in world.judge(**{name: padded(limit)}).targets


@pytest.mark.parametrize("name", ["director", "image"])
def test_a_chain_of_more_than_32_roots_is_refused_though_it_holds(world: World, name: str) -> None:
    source: Repository = getattr(world, name)
    while len(source.roots) < 32:
        source.add_root()
    assert PATH in world.judge().targets
    source.add_root()
    assert isinstance(world.judge().error, LimitError)


@pytest.mark.parametrize("name", ["director", "image"])
def test_older_targets_under_a_newer_snapshot_are_refused(world: World, name: str) -> None:
    source: Repository = getattr(world, name)
    older = source.targets_bytes
    world.publish()
    trusted = {f"trusted_{name}": world.files(name)}
    source.edits["snapshot"] = lambda s: s.meta.update({"targets.json": MetaFile(1)})
    source.publish()
    source.targets_bytes = older
    verdict = world.judge(**trusted)
    assert isinstance(verdict.error, RollbackError)
    assert f"{name} targets" in verdict.reason


@pytest.mark.parametrize("name", ["director", "image"])
def test_keys_that_were_rotated_before_do_not_undo_what_is_trusted_since(world: World, name: str) -> None:
    source: Repository = getattr(world, name)
    source.rotate("timestamp")
    older = world.files(name)
    trusted = {f"trusted_{name}": world.files(name)}
    assert isinstance(world.judge(**trusted, **{name: older}).error, RollbackError)


@pytest.mark.parametrize("name", ["director", "image"])
@pytest.mark.parametrize("role", ["timestamp", "snapshot"])
def test_older_metadata_than_trusted_is_refused_until_keys_are_rotated(
    world: World, name: str, role: str
) -> None:
    trusted = {f"trusted_{name}": world.files(name)}
    source: Repository = getattr(world, name)
    source.timestamp_version = 0
    older = source.stamp()
    before = replace(world.files(name), timestamp=older)
    newer = {f"trusted_{name}": world.files(name)}
    assert isinstance(world.judge(**newer, **{name: before}).error, RollbackError)
    source.rotate(role)
    source.publish(1)
    source.timestamp_version = 0
    assert PATH in world.judge(**trusted).targets


Edit = Callable[[World], None]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda w: w.image.targets.clear(), "the image repository does not"),
        (lambda w: w.director.targets.update({PATH: target(content=b"evil!", **ours())}), "sha256"),
        (lambda w: w.director.targets.update({PATH: target(content=b"longer image", **ours())}), "length 12"),
        (lambda w: w.director.targets.update({PATH: target(**ours(hardware_id="x"))}), "hardware_id 'x'"),
        (lambda w: w.image.targets.update({PATH: target(**theirs(hardware_ids=["x"]))}), "lists"),
        (lambda w: w.image.targets.update({PATH: target(**theirs(hardware_ids=HARDWARE))}), "lists"),
        (lambda w: w.image.targets.update({PATH: target(**theirs(release_counter=5))}), "release_counter 4"),
        (lambda w: counted(w, "4", "4"), "release_counter '4'"),
        (lambda w: counted(w, True, 1), "release_counter True"),
        (lambda w: counted(w, None, None), "release_counter None"),
        (
            lambda w: w.director.targets.update({"again": target("again", **ours())}),
            "each ECU identifier once",
        ),
        (
            lambda w: w.director.targets.update({PATH: target(**ours(ecu_identifier=7))}),
            "each ECU identifier",
        ),
    ],
)
def test_repositories_that_disagree_are_refused_with_both_sides(world: World, edit: Edit, words: str) -> None:
    edit(world)
    world.publish()
    verdict = world.judge()
    assert isinstance(verdict.error, DisagreementError)
    assert words in verdict.reason
    assert not verdict.targets


def ours(**changed: Any) -> dict[str, Any]:
    return {"ecu_identifier": ECU, "hardware_id": HARDWARE, "release_counter": 4} | changed


def theirs(**changed: Any) -> dict[str, Any]:
    return {"hardware_ids": [HARDWARE], "release_counter": 4} | changed


def counted(world: World, director: object, image: object) -> None:
    """List a release counter in each repository."""
    world.director.targets[PATH] = target(**ours(release_counter=director))
    world.image.targets[PATH] = target(**theirs(release_counter=image))


def test_an_ecu_that_names_no_counter_takes_any_release_from_the_first(world: World) -> None:
    for counter, error in ((0, None), (-1, RollbackError)):
        counted(world, counter, counter)
        world.publish()
        found = world.judge().error
        assert (found and type(found)) == error


def test_another_hardware_and_an_older_image_are_refused(world: World) -> None:
    assert isinstance(world.judge(hardware_id="brake-hw-2").error, DisagreementError)
    assert isinstance(world.judge(release_counter=5).error, RollbackError)
    assert PATH in world.judge(release_counter=4).targets


def test_targets_without_custom_fields_are_refused(world: World) -> None:
    world.image.targets[PATH].unrecognized_fields.clear()
    world.publish()
    assert "image target" in world.judge().reason


def test_delegations_are_followed_in_the_image_repository_alone(world: World) -> None:
    signer = CryptoSigner.generate_ed25519()
    keyid = signer.public_key.keyid
    delegations = Delegations(
        {keyid: signer.public_key}, {"A": DelegatedRole("A", [keyid], 1, True, ["images/*"])}
    )
    listed = Targets(1, None, expires=world.image._in_days(30), targets={PATH: world.image.targets.pop(PATH)})
    world.image.edits["targets"] = lambda t: setattr(t, "delegations", delegations)
    world.image.edits["snapshot"] = lambda s: s.meta.update({"A.json": MetaFile(1)})
    world.publish()
    world.image.edits.clear()
    assert "image A" in world.judge().reason
    world.image.signers["targets"] = [signer]
    delegated = {"A": world.image._sign(listed)}
    assert PATH in world.judge(delegated=delegated).targets
    world.director.edits["targets"] = lambda t: setattr(t, "delegations", delegations)
    world.publish()
    assert "no delegations" in world.judge(delegated=delegated).reason
