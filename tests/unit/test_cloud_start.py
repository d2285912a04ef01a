"""What the cloud refuses to start with: no TLS, keys that do not fit, a database of the future."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from support.cloud_world import DEMO, demo_keys, open_world, write_config

from cloud import config, keyring, schema, server
from cloud.__main__ import main
from cloud.errors import StartError
from cloud.store import Store
from common.config import ConfigError


def _start(path: Path) -> None:
    async def run() -> None:
        async with open_world(path):
            raise AssertionError("it must not start")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tls/server.crt", "server.certificate"),
        ("tls/server.key", "server.key"),
        ("enrolment/ca.crt", "server.client_ca"),
    ],
)
def test_missing_tls_material_stops_the_start(tmp_path: Path, name: str, key: str) -> None:
    path = write_config(tmp_path, **{str(demo_keys() / "keys" / name): str(tmp_path / "missing")})
    with pytest.raises(ConfigError) as caught:
        config.read(path)
    assert f"{key}: no such file: {tmp_path / 'missing'}; TLS cannot be switched off" in str(caught.value)


@pytest.mark.parametrize("name", ["tls/server.crt", "tls/server.key"])
def test_empty_tls_material_stops_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").write_bytes(b"")
    path = write_config(tmp_path, **{str(demo_keys() / "keys" / name): str(tmp_path / "empty")})
    with pytest.raises(ConfigError, match="TLS cannot be switched off"):
        _start(path)


def test_a_server_key_of_another_certificate_stops_the_start(tmp_path: Path) -> None:
    other = str(demo_keys() / "keys/operator/operator.key")
    path = write_config(tmp_path, **{str(demo_keys() / "keys/tls/server.key"): other})
    with pytest.raises(StartError, match="cannot listen"):
        _start(path)


@pytest.mark.parametrize(
    ("table", "key", "other"),
    [
        ("director", "director/timestamp.key", "director/snapshot.key"),
        ("director", "director/snapshot.key", "catalogue/snapshot.key"),
        ("director", "director/targets.key", "catalogue/targets-1.key"),
        ("catalogue", "catalogue/timestamp.key", "director/timestamp.key"),
        ("catalogue", "catalogue/snapshot.key", "director/snapshot.key"),
    ],
)
def test_a_key_that_its_root_does_not_name_stops_the_start(
    tmp_path: Path, table: str, key: str, other: str
) -> None:
    path = write_config(tmp_path)
    text = path.read_text()
    (tmp_path / "other.key").write_bytes((demo_keys() / "keys" / other).read_bytes())
    path.write_text(text.replace(str(demo_keys() / "keys" / key), str(tmp_path / "other.key")))
    with pytest.raises(StartError, match=r"other\.key: key \w+ is not the \w+ key of the root"):
        keyring.load(config.read(path))


@pytest.mark.parametrize(
    ("key", "other", "reason"),
    [
        ("token/key-1.key", "tls/ca.key", "expected an Ed25519 key"),
        ("enrolment/ca.key", "token/root.key", "expected a P-256 key"),
        ("enrolment/ca.key", "tls/ca.key", "not the key of the enrolment CA"),
        ("receipt/receipt.key", "public/receipt.pub", "not an unencrypted PEM private key"),
        ("public/director-root.json", "public/receipt.pub", "not a root that its own keys signed"),
    ],
)
def test_a_key_of_another_kind_stops_the_start(tmp_path: Path, key: str, other: str, reason: str) -> None:
    folder = demo_keys() / "keys"
    path = write_config(tmp_path, **{f'"{folder / key}"': f'"{folder / other}"'})
    with pytest.raises(StartError, match=reason):
        keyring.load(config.read(path))


@pytest.mark.parametrize("name", ["metadata/1.targets.json", "targets/features/seat-heating/1.toml"])
def test_a_tampered_catalogue_stops_the_start(tmp_path: Path, name: str) -> None:
    shutil.copytree(demo_keys() / "catalogue", tmp_path / "catalogue")
    path = write_config(tmp_path, **{str(demo_keys() / "catalogue"): str(tmp_path / "catalogue")})
    content = (tmp_path / "catalogue" / name).read_bytes()
    (tmp_path / "catalogue" / name).write_bytes(content.replace(b"seat-heating", b"seat-cooling"))
    with pytest.raises(StartError, match="signed"):
        _start(path)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("ignition_cycles = 200 ", "ignition_cycles = 0 ", "which the ECU measures by itself"),
        ('feature = "seat-heating"', 'feature = "seat-cooling"', "is not in the catalogue"),
        ('meter = "active-time"', 'meter = "passive-time"', "is no meter"),
        ('period = "P1M"', 'period = "P1H"', "expected an ISO 8601 duration"),
        ('period = "P1M"', 'period = ""', "a plan of kind subscription has one"),
        ('id = "logbook-per-km"', 'id = "seat-heating-monthly"', "occurs more than once"),
        ("price_minor = 499 ", "price_minor = 4.99 ", "expected a whole number"),
    ],
)
def test_a_price_list_that_does_not_fit_stops_the_start(
    tmp_path: Path, old: str, new: str, reason: str
) -> None:
    text = (DEMO / "plans.toml").read_text()
    assert old in text
    (tmp_path / "plans.toml").write_text(text.replace(old, new))
    path = write_config(tmp_path, **{str(DEMO / "plans.toml"): "plans.toml"})
    with pytest.raises(ConfigError, match=reason):
        _start(path)


def test_a_database_in_memory_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path, **{"sqlite:///cloud.db": "sqlite://"})
    with pytest.raises(ConfigError, match=r"store\.url: a database in memory would forget every right"):
        config.read(path)


def test_a_file_whose_name_is_too_long_is_missing(tmp_path: Path) -> None:
    path = write_config(tmp_path, **{str(DEMO / "plans.toml"): "9" * 300})
    with pytest.raises(ConfigError, match="plans: no such file"):
        config.read(path)


def test_a_relative_database_starts_at_the_configurations_folder(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    assert config.database_url(path, config.read(path).store).database == str(tmp_path / "cloud.db")


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    url = sa.make_url(f"sqlite:///{tmp_path}/cloud.db")
    Store(url).close()
    with sqlite3.connect(tmp_path / "cloud.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    before = (tmp_path / "cloud.db").read_bytes()
    with pytest.raises(StartError, match="schema 9999 is newer than this program knows"):
        Store(url)
    assert (tmp_path / "cloud.db").read_bytes() == before


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cloud.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StartError, match="database cannot be used"):
        Store(sa.make_url(f"sqlite:///{tmp_path}/cloud.db"))


def test_migrations_make_the_tables_that_the_code_uses(tmp_path: Path) -> None:
    url = sa.make_url(f"sqlite:///{tmp_path}/cloud.db")
    Store(url).close()
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()


def test_rights_of_before_are_due_and_their_trials_stay_had(tmp_path: Path) -> None:
    url = sa.make_url(f"sqlite:///{tmp_path}/cloud.db")
    settings = Config()
    settings.set_main_option("script_location", "cloud:migrations")
    scripts = ScriptDirectory.from_config(settings).walk_revisions()
    before = next(str(s.down_revision) for s in scripts if "invoices_" in s.module.__name__)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        settings.attributes["connection"] = connection
        command.upgrade(settings, before)
        vehicle = "INSERT INTO vehicles (vin, source, created_ms, enrolled_ms, last_update) VALUES"
        connection.exec_driver_sql(f"{vehicle} ('V', 'veh-0', 0, 0, x'')")
        for number, account, kind in ((1, "acc-1", 3), (2, "acc-1", 3), (3, "acc-2", 2)):
            connection.exec_driver_sql(
                "INSERT INTO entitlements VALUES (?, 'V', 'seat-heating', ?, ?, x'', 0, 0, '', 1, 0)",
                (f"ent-{number}", account, kind),
            )
    engine.dispose()
    store = Store(url)
    had = [store.run_here(lambda tx, a=a: tx.had_trial(a, "seat-heating")) for a in ("acc-1", "acc-2")]  # type: ignore[misc]
    assert had == [True, False]
    assert store.run_here(lambda tx: tx.due_vehicles(0)) == ["V"]
    store.close()


def test_every_commit_is_synced_and_foreign_keys_hold(tmp_path: Path) -> None:
    store = Store(sa.make_url(f"sqlite:///{tmp_path}/cloud.db"))
    found = [
        store.run_here(lambda tx, name=name: tx._connection.exec_driver_sql(f"PRAGMA {name}").scalar())  # type: ignore[misc]
        for name in ("journal_mode", "synchronous", "foreign_keys")
    ]
    assert found == ["wal", 2, 1]
    with pytest.raises(sa.exc.IntegrityError):
        store.run_here(lambda tx: tx.put_claim("WFDSEAT10N0000009", bytes(32), 0))
    store.close()


def test_an_exception_undoes_the_whole_piece_of_work(tmp_path: Path) -> None:
    store = Store(sa.make_url(f"sqlite:///{tmp_path}/cloud.db"))

    def work(tx: object) -> None:
        tx.add_vehicle("WFDSEAT10N0000001", "veh-0", [], 0)  # type: ignore[attr-defined]
        raise KeyError

    with pytest.raises(KeyError):
        store.run_here(work)
    assert store.run_here(lambda tx: tx.vehicles()) == []
    store.close()


def test_the_server_says_when_it_is_ready_and_stops_on_sigterm(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "cloud", "serve", "--config", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=20)
    assert (process.returncode, rest) == (0, b"")
    assert ready["event"] == "ready"
    assert ready["port"] != ready["enrolment_port"]


def test_a_wrong_configuration_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, **{"claim_ttl_s = 3600": 'claim_ttl_s = "an hour"\ncolour = "red"'})
    assert main(["serve", "--config", str(path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith(f"error: {path}:") for line in errors)


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    async def run() -> None:
        path = write_config(tmp_path)
        async with open_world(path) as world:
            other = tmp_path / "other"
            other.mkdir()
            taken = write_config(other)
            text = taken.read_text()
            taken.write_text(
                text.replace('listen = "127.0.0.1:0" ', f'listen = "127.0.0.1:{world.cloud.port}" ', 1)
            )
            with pytest.raises(StartError, match="cannot listen on"):
                await server.start(taken, config.read(taken))

    asyncio.run(run())
