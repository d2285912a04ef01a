"""fod-agent for people and programs, before enrolment, without an agent, and with a wrong file."""

from __future__ import annotations

import json
import logging
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.edge_cloud import authority, issue
from support.edge_store import open_store, trust, usage
from support.signals_data import SMALL_DBC

from agent.__main__ import main
from agent.adapters import identity
from agent.adapters.local_api import LocalApi
from agent.boot import STORE_FILE
from agent.model import TrustedTime
from agent.trust.grant_log import GENESIS, LogEntry, LogHead, entry, export

VIN = "WFDSEAT10N0000001"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


@pytest.fixture
def config(tmp_path: Path) -> Path:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (tmp_path / "ca.crt").write_bytes(authority().pem)
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    (tmp_path / "receipt.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "root.json").write_text("{}")
    path = tmp_path / "agent.toml"
    path.write_text(
        f'[vehicle]\nvin = "{VIN}"\n'
        f'[cloud]\nendpoint = "127.0.0.1:{port}"\nenrolment_endpoint = "127.0.0.1:{port}"\n'
        'root_ca = "ca.crt"\n'
        '[trust]\ndirector_root = "root.json"\ncatalogue_root = "root.json"\nreceipt_key = "receipt.pub"\n'
        '[state]\ndirectory = "state"\n[[buses]]\nname = "body"\ninterface = "virtual"\nchannel = "x"\n'
    )
    return path


def enrol(config: Path) -> Path:
    directory = config.parent / "state"
    key = identity.make_key(directory)
    identity.save(directory, issue("vehicle", authority(), key).der, "veh-1")
    return directory


def files(config: Path) -> dict[str, bytes]:
    return {
        str(f): f.read_bytes()
        for f in config.parent.rglob("*")
        if f.is_file() and f.suffix not in {".db-shm", ".db-wal"}
    }


@pytest.mark.parametrize("command", ["", "enroll", "run", "status", "import", "check"])
def test_help_is_there_for_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "Exit codes" in out or "Example: fod-agent" in out


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["enroll"], ["status", "--colour"], ["run", "--json"], ["import"]]
)
def test_wrong_use_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: fod-agent" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "status", "check"])
def test_wrong_configuration_ends_with_2_and_every_problem(
    config: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text().replace(VIN, "short").replace("ca.crt", "none.crt") + "x = 1\n")
    assert main([command, "--config", str(config)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    errors = shown.err.splitlines()
    assert [line.startswith(f"error: {config}:") for line in errors] == [True] * 3
    assert main([command, "--config", str(config.parent / "none.toml")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {config.parent}/none.toml: cannot be read: No such file or directory\n"
    )


def test_run_before_enrolment_says_what_to_do(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(config)]) == 1
    assert capsys.readouterr().err == (
        "error: this vehicle is not enrolled; run: fod-agent enroll --claim TOKEN\n"
    )


def test_status_before_enrolment_is_clear_and_changes_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(config)
    assert main(["status", "--config", str(config)]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"Vehicle {VIN}, not enrolled (fod-agent enroll)"
    assert second.startswith("The agent is not running (no agent answers at ")
    assert third == "It has stored nothing yet."
    assert main(["status", "--json", "--config", str(config)]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["vin"], status["running"], status["source"]) == (VIN, False, "")
    assert files(config) == before


def test_status_shows_what_is_stored_and_changes_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = enrol(config)
    store = open_store(directory / STORE_FILE)
    store.store_usage(usage(1, 2))
    store.close()
    before = files(config)
    assert main(["status", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert f"Vehicle {VIN}, reported as veh-1" in out
    assert "Journal 00112233445566aa: 2 records, receipts up to 0" in out
    assert "No features: no right has arrived yet." in out
    assert main(["status", "--json", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out)["journal"]["records"] == 2
    assert files(config) == before


def test_status_of_an_empty_store_is_an_error_and_makes_no_journal(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = enrol(config) / STORE_FILE
    store.touch()
    assert main(["status", "--config", str(config)]) == 1
    assert "is damaged: it is empty" in capsys.readouterr().err
    assert store.read_bytes() == b""


def test_status_asks_the_agent_that_runs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = enrol(config)
    api = LocalApi(
        directory / "agent.sock",
        lambda: {
            "vin": VIN,
            "source": "s",
            "link": "up",
            "last_contact_ms": 0,
            "quotas": [
                {
                    "feature": "drivers-logbook",
                    "entitlement": "ent-0",
                    "meter": "distance",
                    "used": 80_000,
                    "limit": 100_000,
                    "hard": True,
                    "warning": "80 % of the quota of distance is used",
                }
            ],
        },
        lambda _: {},
    )
    try:
        assert main(["status", "--config", str(config)]) == 0
        words = capsys.readouterr().out
        assert "Cloud: up; last signed answer never" in words
        assert "80000 of 100000  suspends    80 % of the quota of distance is used" in words
        assert main(["status", "--json", "--config", str(config)]) == 0
        assert json.loads(capsys.readouterr().out)["running"] is True
    finally:
        api.close()


def test_second_enrolment_is_refused_and_nothing_changes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enrol(config)
    before = files(config)
    assert main(["enroll", "--claim", "x", "--config", str(config)]) == 1
    err = capsys.readouterr().err
    assert "is enrolled already" in err
    assert "device.crt" in err
    assert files(config) == before


def test_enrolment_without_a_cloud_fails_in_words_and_keeps_its_key(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["enroll", "--claim", "secret-claim", "--config", str(config)]) == 1
    err = capsys.readouterr().err
    assert "nothing listens there" in err
    assert "secret-claim" not in err
    key = (config.parent / "state" / "device.key").read_bytes()
    assert main(["enroll", "--claim", "x", "--config", str(config)]) == 1
    assert (config.parent / "state" / "device.key").read_bytes() == key


def test_check_names_every_problem_and_changes_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "receipt.pub").write_text("no key")
    before = files(config)
    assert main(["check", "--config", str(config)]) == 1
    shown = capsys.readouterr()
    assert "It may only listen." in shown.out
    assert "not enrolled yet (fod-agent enroll)" in shown.out
    assert "Bus body (virtual x)" in shown.out
    assert shown.err.count("problem: ") >= 2
    assert "receipt.pub is not a public key" in shown.err
    assert main(["check", "--json", "--config", str(config)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["vin"], report["listen_only"], len(report["problems"]) >= 2) == (VIN, True, True)
    assert files(config) == before


def test_check_names_what_of_database_and_mapping_is_not_used(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "broken.dbc").write_text(SMALL_DBC.replace("m0 : 8|16@1-", "m0 : 8|16@1*"))
    leaf = {"type": "sensor", "datatype": "float", "dbc2vss": {"signal": "SPEED"}}
    missing = {"type": "sensor", "datatype": "float", "dbc2vss": {"signal": "FIRST"}}
    (config.parent / "vss_dbc.json").write_text(json.dumps({"Speed": leaf, "First": missing}))
    text = config.read_text()
    assert 'channel = "x"\n' in text
    files_of_bus = 'database = "broken.dbc"\nsignals = "vss_dbc.json"\n'
    config.write_text(text.replace('channel = "x"\n', f'channel = "x"\n{files_of_bus}'))
    main(["check", "--config", str(config)])
    shown = capsys.readouterr().out
    assert "broken.dbc:10: BO_ 2147484160 SELECTED: 4 A: Invalid syntax" in shown
    assert "vss_dbc.json: First.dbc2vss.signal: broken.dbc has no signal 'FIRST'" in shown
    main(["check", "--json", "--config", str(config)])
    bus = json.loads(capsys.readouterr().out)["buses"]["body"]
    assert bus["signals"] == ["Speed"]
    assert [(Path(s["file"]).name, s["line"], s["message"]) for s in bus["skipped"]] == [
        ("broken.dbc", 10, "SELECTED")
    ]
    assert [(Path(n["file"]).name, n["key"]) for n in bus["not_mapped"]] == [
        ("vss_dbc.json", "First.dbc2vss.signal")
    ]


def test_damaged_identity_is_named_with_the_next_step(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (enrol(config) / "identity.json").write_text("")
    for command in (["run"], ["status"], ["enroll", "--claim", "x"]):
        assert main([*command, "--config", str(config)]) == 1
        assert "enrol again with a new claim" in capsys.readouterr().err


# --- the owner's log -----------------------------------------------------------------------


def log_entries() -> list[LogEntry]:
    made: list[LogEntry] = []
    for number in range(5):
        head = made[-1].head if made else LogHead()
        now = TrustedTime(1_800_000_000_000 + number, 40, "signed")
        made.append(entry(head, "evidence", now, {"feature": "f", "finding": f"finding {number}"}))
    return made


ENTRIES = log_entries()
LINES = [e.content for e in ENTRIES]
WHOLE, HEAD = export(LINES), ENTRIES[-1].head


@pytest.fixture
def logged(config: Path) -> Path:
    """The configuration of a vehicle with a log."""
    store = open_store(config.parent / "state" / STORE_FILE)
    store.store_trust(replace(trust(1), entries=tuple(ENTRIES)), store.load().floors)
    store.close()
    return config


def log_command(config: Path, *arguments: str) -> int:
    return main(["log", "--config", str(config), *arguments])


def test_the_log_is_shown_exported_and_verified(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = logged.parent / "log.jsonl"
    assert log_command(logged) == 0
    assert "finding 4" in (shown := capsys.readouterr().out)
    assert f"5 entries, head {HEAD.hash.hex()}" in shown
    assert log_command(logged, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["entries"]), found["head"]) == (5, HEAD.hash.hex())
    assert log_command(logged, "--export", str(file)) == 0
    assert file.read_bytes() == WHOLE
    assert log_command(logged, "--verify", str(file), "--head", HEAD.hash.hex()) == 0
    assert "is whole: 5 entries" in capsys.readouterr().out
    assert log_command(logged, "--verify", str(file), "--json") == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 5
    assert main(["status", "--config", str(logged), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["log"] == {"entries": 5, "head": HEAD.hash.hex()}


def test_an_edited_export_and_a_wrong_head_fail_and_say_why(
    logged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = logged.parent / "log.jsonl"
    file.write_bytes(WHOLE.replace(b"finding 2", b"finding 9"))
    assert log_command(logged, "--verify", str(file)) == 1
    assert "entry 4: expected number 4 after" in capsys.readouterr().err
    file.write_bytes(export(LINES[:4]))
    assert log_command(logged, "--verify", str(file), "--head", HEAD.hash.hex()) == 1
    assert "expected head" in capsys.readouterr().err
    assert log_command(logged, "--export", str(file)) == 1
    assert file.read_bytes() == export(LINES[:4])
    assert log_command(logged, "--head", HEAD.hash.hex()) == 2


def test_an_entry_edited_in_the_database_is_found(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(logged.parent / "state" / STORE_FILE)) as db, db:
        db.execute("DELETE FROM grant_log WHERE seq = 2")
    assert log_command(logged) == 1
    assert "entry 2: expected number 2 after" in capsys.readouterr().err


def test_a_vehicle_without_a_store_has_an_empty_log(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert log_command(config, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"entries": [], "head": GENESIS.hex()}
