"""`fod-sim` as its users meet it: real processes, real sockets, exit codes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import can
import pytest
from support.sim_hub import receive, running_hub, wait_for
from support.sim_process import SimProcess, write_scenario
from support.sim_world import DATA, DATABASE, EXTENDED, INSTALL, token
from vectors import make_token_vectors as signer

from common import config
from firmware_sim import replay as sim_replay
from firmware_sim.__main__ import main
from firmware_sim.run import build
from firmware_sim.scenario import Scenario

FORGED = signer.sign1(signer.dumps(signer.COMMON), signer.external(), signer.FOREIGN)


def is_named(name: str) -> Any:
    return lambda event: event["event"] == name


def ask(capsys: pytest.CaptureFixture[str], port: int, *requests: str) -> tuple[int, list[dict[str, Any]]]:
    code = main(["tester", "--port", str(port), "--json", *requests])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.e2e
def test_an_owner_cannot_forge_and_a_genuine_token_heats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with SimProcess(write_scenario(tmp_path)) as sim:
        ready = sim.wait_for(is_named("ready"))
        port = ready["port"]
        assert ready == {
            "event": "ready",
            "interface": "socketcand",
            "host": "127.0.0.1",
            "port": port,
            "channel": "can0",
            "slcan": ready["slcan"],
        }
        sim.wait_for(lambda e: e["event"] == "ok" and e["command"] == "ignition on")
        assert sim.tell("seat 2") == {"event": "ok", "command": "seat 2"}
        assert [e["reason"] for e in sim.events if e["event"] == "heater-refused"] == ["NO_TOKEN"]

        code, answers = ask(capsys, port, "1003", "31010F0D" + FORGED.hex())
        assert code == 1
        assert (answers[1]["nrc"], answers[1]["nrc_name"]) == (0x33, "SecurityAccessDenied")
        assert sim.wait_for(is_named("token-refused"))["nrc"] == 0x33

        code, answers = ask(capsys, port, "1003", "31010F0D" + token(1, terms={5: 9}).hex(), "220F21")
        assert code == 0
        assert answers[2]["response"] == "620f21" + "0100" + "00000001" + "00000009" + "ffffffff"
        assert sim.wait_for(is_named("heater"))["level"] == 2
        sim.wait_for(is_named("token-accepted"))

        with can.Bus(
            interface="slcan", channel=ready["slcan"], bitrate=500_000, sleep_after_open=0, ignore_config=True
        ) as serial:
            heat: Any = DATABASE.decode_message("SEAT_HEAT", bytes(receive(serial, 704).data))
        assert (str(heat["HeatLevel"]), str(heat["FeatureState"])) == ("MEDIUM", "ON")

        assert sim.tell("drive 20 21")["event"] == "ok"
        sim.wait_for(is_named("drive-ended"))
        assert sim.tell("fly")["event"] == "error"
        truth = sim.tell("truth")
        assert truth["heater_on_ms"] > 1000
        assert truth["heated_distance_m"] == truth["total_distance_m"] > 0
        assert sim.tell("quit")["event"] == "ok"
        sim.wait_for(is_named("ended"))
        assert sim.process.wait(20) == 0
    lines = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert lines[-1]["heated_distance_m"] == truth["heated_distance_m"]
    assert {"unix_ms", "monotonic_ns", "odometer_m"} <= set(lines[0])
    assert json.loads((tmp_path / "state" / "seat.json").read_text())["rights"]["1"]["counter"] == 1


@pytest.mark.e2e
@pytest.mark.parametrize("how", ["sigterm", "end of input"])
def test_it_ends_cleanly(tmp_path: Path, how: str) -> None:
    with SimProcess(write_scenario(tmp_path)) as sim:
        sim.wait_for(is_named("ready"))
        if how == "sigterm":
            sim.process.send_signal(signal.SIGTERM)
        else:
            assert sim.process.stdin is not None
            sim.process.stdin.close()
        sim.wait_for(is_named("ended"))
        assert sim.process.wait(20) == 0
        assert sim.process.stderr is not None
        assert "Traceback" not in sim.process.stderr.read()


# --- configuration ---


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("odometer_m = 1000", "odometer_m = -1", "vehicle.odometer_m"),
        ("slcan = true", "slkan = true", "bus.slkan: unknown key"),
        ('"root.pub"', '"missing.pub"', "no such file"),
        ('"root.pub"', '"key-1.cose"', "not a public key"),
        ('["key-1.cose"]', '["root.pub"]', "announcement of a token key refused"),
        ("features = [1]", "features = []", "at least one feature"),
        ("features = [1]", "features = [0]", "features[0]"),
        ("0x7E0", "0x744", "used more than once"),
        ('do = "ignition on"', 'do = "ignition onn"', "timeline[0].do"),
        ('kind = "powertrain"', 'kind = "toaster"', "expected one of"),
        ("features = [1]", "features = [1]\nterms = [9]", "terms[0]"),
        ("features = [1]", 'features = [1]\nown = ["sundial"]', "expected one of clock, odometer"),
        ('kind = "powertrain"', 'kind = "powertrain"\nown = ["clock"]', "nothing in 'own'"),
    ],
)
def test_a_wrong_scenario_names_the_key_and_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    path = write_scenario(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert main(["run", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_the_demo_scenario_is_valid_once_its_keys_are_made(tmp_path: Path) -> None:
    write_scenario(tmp_path)
    keys = "../../run/demo/keys/public/"
    text = (Path(__file__).parents[2] / "deploy" / "demo" / "scenario.toml").read_text(encoding="utf-8")
    text = text.replace(f"{keys}token-root.pub", "root.pub").replace(f"{keys}token-key-1.cose", "key-1.cose")
    scenario = config.parse(text.encode(), tmp_path / "scenario.toml", Scenario)
    assert scenario.vehicle.vin == signer.VIN
    assert scenario.ecu[0].request_id == 0x744


@pytest.mark.parametrize(
    ("profile", "term", "is_taken"),
    [
        ("", {1: 9}, False),
        ("", {3: 9}, False),
        ("", {3: 9, 5: 9}, True),
        ('own = ["clock"]', {1: 9}, True),
        ('own = ["clock"]', {3: 9}, False),
        ('own = ["odometer"]', {3: 9}, True),
        ('own = ["odometer"]', {1: 9}, False),
        ("terms = [5, 6, 7, 8]", {3: 9, 5: 9}, False),
        ("terms = [5, 6, 7, 8]", {5: 9}, True),
    ],
)
def test_a_scenario_says_which_limits_the_ecu_takes_and_what_it_measures_itself(
    tmp_path: Path, profile: str, term: dict[int, int | list[int]], is_taken: bool
) -> None:
    path = write_scenario(tmp_path)
    path.write_text(path.read_text().replace("features = [1]", f"features = [1]\n{profile}"))
    vehicle = build(config.read(path, Scenario), now_ns=0)
    vehicle.request("seat-module", EXTENDED, 0)
    answer = vehicle.request("seat-module", INSTALL + token(1, terms=term), 0)
    assert answer is not None
    assert answer[:3] == (bytes.fromhex("71010F") if is_taken else bytes.fromhex("7F3131"))


def test_a_broken_state_file_is_not_begun_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_scenario(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "seat.json").write_text("{")
    assert main(["run", str(path)]) == 2
    assert "not a state file" in capsys.readouterr().err


def test_a_port_that_is_taken_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_hub() as hub:
        path = write_scenario(tmp_path)
        path.write_text(path.read_text().replace("slcan = true", f"port = {hub.server.port}"))
        assert main(["run", str(path)]) == 1
        assert "cannot be opened" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["run"], ["replay"], ["tester"]])
def test_every_command_has_help_with_an_example(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert f"Example:\n  fod-sim {command[0]}" in capsys.readouterr().out


# --- tester ---


@pytest.mark.parametrize("text", ["xyz", "", "22@/nowhere/at/all"])
def test_a_request_that_cannot_be_read_exits_1(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tester", "--port", "1", text]) == 1
    assert "error:" in capsys.readouterr().err


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with running_hub() as hub:
        command = ["tester", "--port", str(hub.server.port), "--ecu", "powertrain", "--timeout", "0.1"]
        assert main([*command, "22F190"]) == 1
    assert "no answer" in capsys.readouterr().err


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with running_hub() as hub:
        port = hub.server.port
    assert main(["tester", "--port", str(port), "22F190"]) == 1
    assert "cannot join socketcand" in capsys.readouterr().err


# --- replay ---


def candump(folder: Path, count: int, *, step_s: float = 0.001) -> Path:
    path = folder / "drive.log"
    lines = [
        f"({1 + i * step_s:.6f}) can0 {0x2C0 if i % 2 else 0x111:03X}#{i % 256:02X}" for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_log_is_replayed_onto_a_bus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_hub() as hub:
        command = ["replay", str(candump(tmp_path, 300)), "--dbc", str(DATA / "openfod_sim.dbc")]
        assert (
            main([*command, "--host", "127.0.0.1", "--port", str(hub.server.port), "--speed", "0", "--json"])
            == 0
        )
        wait_for(lambda: len(hub.recorder.frames) == 300)
    summary = json.loads(capsys.readouterr().out)
    assert (summary["frames"], summary["ids"], summary["ids_known"]) == (300, 2, 1)
    assert [f.data[0] for f in hub.recorder.frames] == [i % 256 for i in range(300)]


def test_a_log_keeps_its_rhythm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = candump(tmp_path, 20, step_s=0.02)
    assert main(["replay", str(path), "--bus", "socketcand", "--speed", "2", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.partition("\n")[0])["event"] == "ready"
    assert 0.19 <= json.loads(out.partition("\n")[2])["duration_s"] < 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.log", b"(1.0) can0 123#00\nnonsense\n"),
        ("broken.asc", b"\x00\xff\xfe"),
        ("broken.xyz", b""),
        ("jump.log", b"(1.0) can0 123#00\n(99999.0) can0 123#00\n"),
    ],
)
def test_a_malformed_log_is_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert main(["replay", str(path), "--bus", "socketcand"]) == 1
    assert "error:" in capsys.readouterr().err


def test_a_missing_log_or_database_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(sim_replay.ReplayError, match="cannot be read"):
        list(sim_replay.messages(tmp_path / "missing.log"))
    bad = tmp_path / "bad.dbc"
    bad.write_text("VERSION nonsense")
    with pytest.raises(sim_replay.ReplayError, match="not a signal database"):
        sim_replay.known_ids(bad)
