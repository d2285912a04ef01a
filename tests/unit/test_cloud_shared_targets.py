"""What every vehicle's set carries beside its rights: the token key's announcement and the TLS anchors."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from support.cloud_world import VIN, World, demo_keys, open_world, play, write_config

from agent.model import RepositoryBytes, Rights, TrustBytes
from agent.trust.token import parse_token
from agent.trust.verifier import Floors, verify_bundle
from agent.wire import trust_update_from_proto
from cloud import token
from cloud.config import moment_ms
from cloud.errors import StartError
from common.config import ConfigError
from keys import ceremony, files
from openfod.operator.v1 import operator_service_pb2 as operator_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb


async def rights(world: World) -> Rights:
    """What the agent takes from the vehicle's bundle."""
    answer = await world.operator.ExportBundle(operator_pb2.ExportBundleRequest(vin=VIN))
    public = demo_keys() / "keys/public"
    director, catalogue = ((public / f"{name}-root.json").read_bytes() for name in ("director", "catalogue"))
    roots = TrustBytes(RepositoryBytes(roots=(director,)), RepositoryBytes(roots=(catalogue,)))
    update = trust_update_from_proto(pb.TrustUpdate.FromString(answer.bundle))
    return verify_bundle(roots, update, vin=VIN, now_ms=0, floors=Floors()).rights


def without_shared(folder: Path) -> Path:
    path = write_config(folder)
    text = path.read_text()
    begin, end = text.index("[[tls.anchors]]"), text.index("[receipt]")
    lines = (text[:begin] + text[end:]).splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("announcement")))
    return path


def test_the_agent_takes_both_from_the_demo_configuration(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.device()
        await world.grant()
        found = await rights(world)
        assert found.token_key is not None
        assert found.token_key.epoch == 1
        assert found.token_key.content == (world.keys / "public/token-key-1.cose").read_bytes()
        (anchor,) = found.tls_anchors
        server = x509.load_pem_x509_certificate((world.keys / "tls/server.crt").read_bytes())
        assert anchor.certificate_der == server.public_bytes(Encoding.DER)
        assert anchor.not_before_ms == moment_ms("2025-01-01T00:00:00Z")

    play(tmp_path, story)


def test_a_set_without_them_is_signed_again_once_they_are_configured(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_world(without_shared(tmp_path)) as world:
            device = await world.device()
            await world.grant()
            found = await rights(world)
            assert (found.token_key, found.tls_anchors, found.version) == (None, (), 2)
        async with open_world(write_config(tmp_path)) as world:
            update = await world.connect(device).hello()
            assert json.loads(update.director.targets)["signed"]["version"] == 3
            found = await rights(world)
            assert (found.version, len(found.tls_anchors)) == (3, 1)

    asyncio.run(run())


def new_epoch(folder: Path, announced: int) -> Path:
    """A configuration with another token key, of epoch 2."""
    key, root = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    (folder / "key-2.key").write_bytes(files.private_pem(key))
    (folder / "key-2.cose").write_bytes(ceremony.announce_token_key(root, key.public_key(), announced))
    path = write_config(folder)
    text = path.read_text().replace("\nepoch = 1\n", "\nepoch = 2\n")
    keys = demo_keys() / "keys"
    text = text.replace(f"{keys}/token/key-1.key", f"{folder}/key-2.key")
    path.write_text(text.replace(f"{keys}/public/token-key-1.cose", f"{folder}/key-2.cose"))
    return path


def test_a_new_token_epoch_signs_live_tokens_again_with_next_counters(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_world(write_config(tmp_path)) as world:
            await world.device()
            await world.grant()
            old = (await rights(world)).tokens["seat-heating"]
        async with open_world(new_epoch(tmp_path, 2)) as world:
            found = await rights(world)
            new = found.tokens["seat-heating"]
            assert found.token_key is not None
            assert found.token_key.epoch == 2
            assert new.counter == old.counter + 1
            assert token.signer_id(new.content) != token.signer_id(old.content)
            assert parse_token(new.content).allows
            assert (await rights(world)).tokens["seat-heating"] == new  # once

    asyncio.run(run())


def test_an_announcement_of_another_epoch_stops_the_start(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_world(new_epoch(tmp_path, 3)):
            pass

    with pytest.raises(StartError, match="announces another key or epoch"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("2025-01-01T00:00:00Z", "2037-01-01T00:00:00Z", "later than not_before"),
        ("2025-01-01T00:00:00Z", "2025-01-01T00:00:00", "expected a time"),
        ("2036-01-01T00:00:00Z", "for ever", "expected a time"),
    ],
)
def test_wrong_times_stop_the_start(tmp_path: Path, old: str, new: str, words: str) -> None:
    async def run() -> None:
        async with open_world(write_config(tmp_path, **{old: new})):
            pass

    with pytest.raises(ConfigError, match=words):
        asyncio.run(run())
