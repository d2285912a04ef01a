"""fod-agent watch: what is shown of a running agent and of buses that it opens itself."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
from support.sim_hub import RunningHub, running_hub, wait_for

from agent.adapters.local_api import LocalApi
from agent.config import AgentConfig, load
from agent.watch import BusRow, MessageRow, SignalRow, Snapshot, View, snapshot_of, watch
from firmware_sim.frame import Frame

S = 1_000_000_000
DBC = 'VERSION ""\nBU_: A\nBO_ 256 SPEED: 1 A\n SG_ Speed : 0|8@1+ (1,0) [0|255] "km/h" A\n'
SIGNALS = """
[[signals]]
message = "SPEED"
signal = "Speed"
vss = "Vehicle.Speed"
unit = "km/h"
max_age_ms = 60000
"""
STATUS: dict[str, object] = {
    "buses": {"body": "up", "chassis": "lost"},
    "bus_counts": {"body": {"frames": 100, "dropped": 0, "malformed": 0, "error_frames": 1, "lost": 0}},
    "bus_reasons": {"body": "", "chassis": "cannot be opened: /dev/ttyACM0: no such device"},
    "controllers": {"body": "error-active"},
    "signals": {
        "Vehicle.Speed": {"value": 12.5, "unit": "km/h", "age_ms": 20},
        "Vehicle.Gear": {"value": None, "unit": "", "age_ms": 12_000},
        "Vehicle.Odometer": {"value": None, "unit": "km", "age_ms": None},
    },
    "messages": {"body/SPEED": {"used": 50, "too_short": 0, "check_failed": 0, "repeated": 0, "lost": 0}},
}


def later(status: Mapping[str, Any], *, frames: int, speed: float, failed: int) -> dict[str, object]:
    """The status after some frames."""
    changed: dict[str, Any] = json.loads(json.dumps(status))
    changed["bus_counts"]["body"]["frames"] += frames
    changed["messages"]["body/SPEED"]["used"] += frames - failed
    changed["messages"]["body/SPEED"]["check_failed"] += failed
    changed["signals"]["Vehicle.Speed"]["value"] = speed
    return changed


def view_of(*statuses: Mapping[str, Any], wanted: str = "", colours: bool = False) -> View:
    view = View(wanted, colours=colours)
    for seconds, status in enumerate(statuses):
        view.take(snapshot_of(status, seconds * 2 * S, "agent"))
    return view


AFTER = later(STATUS, frames=200, speed=13.0, failed=3)


# --- the view -----------------------------------------------------------------------


def test_a_status_is_shown_with_unknown_and_stale_said_plainly() -> None:
    text = "\n".join(view_of(STATUS).screen(200, 60))
    assert re.search(r"^body +up +error-active +- +100 +0 +0 +1 +0$", text, re.MULTILINE)
    assert re.search(r"^chassis +lost +unknown +- +0", text, re.MULTILINE)
    assert "chassis: cannot be opened: /dev/ttyACM0: no such device" in text
    assert re.search(r"^Vehicle.Speed +12.5 +km/h +20 ms$", text, re.MULTILINE)
    assert re.search(r"^Vehicle.Gear +stale +12 s$", text, re.MULTILINE)
    assert re.search(r"^Vehicle.Odometer +unknown +km +never heard$", text, re.MULTILINE)


def test_rates_are_of_the_time_between_two_looks() -> None:
    view = view_of(STATUS, AFTER)
    document: Any = view.document(7)
    assert document["buses"]["body"]["frames_per_s"] == 100
    assert document["buses"]["chassis"]["frames_per_s"] == 0
    assert document["messages"]["body/SPEED"]["frames_per_s"] == 100
    assert document["messages"]["body/SPEED"]["check_failed"] == 3
    assert document["signals"]["Vehicle.Gear"] == {
        "value": None,
        "unit": "",
        "age_ms": 12_000,
        "state": "stale",
    }
    assert (document["unix_ms"], document["problem"]) == (7, None)
    assert re.search(r"^body +up +error-active +100.0 +300", "\n".join(view.screen(200, 60)), re.MULTILINE)


def test_counts_of_an_agent_that_has_started_again_are_no_negative_rate() -> None:
    document: Any = view_of(AFTER, STATUS).document(0)
    assert document["buses"]["body"]["frames_per_s"] == 0


def test_news_are_what_has_changed() -> None:
    first = view_of(STATUS).news()
    assert first[0] == "bus body up, controller error-active"
    assert first[1] == (
        "bus chassis lost, controller unknown (cannot be opened: /dev/ttyACM0: no such device)"
    )
    assert "Vehicle.Speed 12.5 km/h" in first
    assert "Vehicle.Odometer unknown km" in first
    assert view_of(STATUS, STATUS).news() == []
    assert view_of(STATUS, AFTER).news() == [
        "message body/SPEED: 3 failed checks, 0 lost",
        "Vehicle.Speed 13 km/h",
    ]
    dropped = json.loads(json.dumps(AFTER))
    dropped["bus_counts"]["body"]["dropped"] = 4
    assert view_of(AFTER, dropped).news() == ["bus body has lost frames: 4 dropped, 0 malformed"]


def test_a_filter_keeps_names_that_contain_it() -> None:
    document: Any = view_of(STATUS, wanted="sPEEd").document(0)
    assert list(document["signals"]) == ["Vehicle.Speed"]
    assert list(document["messages"]) == ["body/SPEED"]
    assert list(document["buses"]) == ["body", "chassis"]


def test_changes_and_failures_stand_out() -> None:
    lines = view_of(STATUS, AFTER, colours=True).screen(200, 60)
    by_name = {re.sub(r"\x1b\[[0-9]*m", "", line).split(" ")[0]: line for line in lines}
    assert by_name["Vehicle.Speed"].startswith("\x1b[1m")
    assert by_name["Vehicle.Gear"].startswith("\x1b[2m")
    assert by_name["body/SPEED"].startswith("\x1b[31m")
    assert by_name["chassis"].startswith("\x1b[31m")
    assert not by_name["body"].startswith("\x1b")
    again = view_of(STATUS, AFTER, AFTER, colours=True).screen(200, 60)
    assert any(line.startswith("Vehicle.Speed") for line in again)  # two seconds later no more


@pytest.mark.parametrize(("width", "height"), [(40, 8), (80, 24), (20, 12), (200, 3), (1, 1)])
def test_a_small_terminal_is_never_overrun(width: int, height: int) -> None:
    many = {f"Vehicle.Signal{n}": SignalRow(n, "", 1) for n in range(100)}
    messages = {f"body/M{n}": MessageRow(n) for n in range(50)}
    view = View()
    view.take(Snapshot(0, "agent", {"body": BusRow("up")}, many, messages))
    lines = view.screen(width, height)
    assert len(lines) <= height
    assert all(len(line) <= max(width, len("... 100 more (--filter NAME)")) for line in lines)
    if height >= 8:
        assert any("more (--filter NAME)" in line for line in lines)


def test_names_and_values_cannot_move_the_cursor() -> None:
    view = View()
    nasty = {"a\x1b[2Jb": SignalRow("x\x1b]0;y\x07", "\r\n", 1)}
    view.take(Snapshot(0, "s\x1b", {"b\x1b": BusRow("up", "\x1b[H")}, nasty, {"m\n": MessageRow(1)}))
    assert "\x1b" not in "".join(view.screen(200, 50)) + "".join(view.news())
    assert all("\n" not in line and "\r" not in line for line in view.screen(200, 50))


def test_an_agent_that_has_gone_is_said_and_its_values_are_no_longer_shown() -> None:
    view = view_of(STATUS)
    view.take(Snapshot(3 * S, "", problem="no agent answers; waiting for it"))
    text = "\n".join(view.screen(200, 60))
    assert "no agent answers; waiting for it" in text
    assert "12.5" not in text
    assert view.news() == ["problem: no agent answers; waiting for it"]
    assert view.document(0)["signals"] == {}
    view.take(Snapshot(4 * S, "", problem="no agent answers; waiting for it"))
    assert view.news() == []
    view.take(snapshot_of(STATUS, 5 * S, "agent"))
    assert "Vehicle.Speed 12.5 km/h" in view.news()


@pytest.mark.parametrize(
    "status", [{}, {"buses": [], "signals": 7, "messages": {"a": None}, "bus_counts": 1}]
)
def test_a_status_of_another_version_is_shown_as_far_as_it_goes(status: dict[str, Any]) -> None:
    view = view_of(status, status)
    view.screen(80, 24)
    view.news()
    json.dumps(view.document(0))


# --- the command -------------------------------------------------------------------------


@pytest.fixture
def link(tmp_path: Path) -> Path:
    return tmp_path / "tty"


@pytest.fixture
def config_path(tmp_path: Path, link: Path) -> Path:
    (tmp_path / "file").touch()
    (tmp_path / "state").mkdir()
    (tmp_path / "car.dbc").write_text(DBC)
    (tmp_path / "signals.toml").write_text(SIGNALS)
    path = tmp_path / "agent.toml"
    path.write_text(
        '[vehicle]\nvin = "WFDSEAT10N0000001"\n'
        '[cloud]\nendpoint = "127.0.0.1:1"\nenrolment_endpoint = "127.0.0.1:2"\nroot_ca = "file"\n'
        '[trust]\ndirector_root = "file"\ncatalogue_root = "file"\nreceipt_key = "file"\n'
        '[state]\ndirectory = "state"\n'
        f'[[buses]]\nname = "body"\ninterface = "slcan"\nchannel = "{link}"\nbitrate = 500_000\n'
        'database = "car.dbc"\nsignals = "signals.toml"\n'
    )
    return path


@pytest.fixture
def config(config_path: Path) -> AgentConfig:
    return load(config_path)


@contextlib.contextmanager
def agent_of(config: AgentConfig, status: Mapping[str, object]) -> Iterator[None]:
    api = LocalApi(config.api_socket, lambda: dict(status), lambda _: {})
    try:
        yield
    finally:
        api.close()


def look(config: AgentConfig, *, as_json: bool = False) -> str:
    out = io.StringIO()
    watch(config, interval_s=0.2, once=True, wanted="", as_json=as_json, out=out)
    return out.getvalue()


def test_a_running_agent_is_asked_and_its_buses_are_left_alone(config: AgentConfig) -> None:
    with agent_of(config, STATUS):
        assert "agent at " in look(config).splitlines()[0]
        document = json.loads(look(config, as_json=True))
    assert document["signals"]["Vehicle.Speed"]["value"] == 12.5


def speed(kmh: int) -> Frame:
    return Frame(0x100, bytes((kmh,)))


class Watching:
    """A running `fod-agent watch`."""

    def __init__(self, config_path: Path, *arguments: str, stdout: int = subprocess.PIPE) -> None:
        command = [sys.executable, "-m", "agent", "watch", "--config", str(config_path), *arguments]
        self.process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def document(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


def keep_sending(hub: RunningHub, watching: Watching, kmh: int) -> dict[str, Any]:
    """Sends a speed until it is shown."""
    while True:
        hub.send(speed(kmh))
        document = watching.document()
        if document["signals"]["Vehicle.Speed"]["value"] == kmh:
            return document


@pytest.mark.e2e
def test_without_an_agent_the_buses_are_heard_until_one_runs(
    config: AgentConfig, config_path: Path, link: Path
) -> None:
    with running_hub(link=link) as hub, Watching(config_path, "--json", "--interval", "0.1") as watching:
        first = watching.document()
        assert first["source"].startswith("own buses, listen-only")
        assert first["signals"]["Vehicle.Speed"] == {
            "value": None,
            "unit": "km/h",
            "age_ms": None,
            "state": "unknown",
        }
        assert keep_sending(hub, watching, 42)["buses"]["body"]["state"] == "up"
        assert keep_sending(hub, watching, 43)["messages"]["body/SPEED"]["used"] > 0
        with agent_of(config, STATUS):
            while not (document := watching.document())["source"].startswith("agent at"):
                pass
            assert document["signals"]["Vehicle.Speed"]["value"] == 12.5
            wait_for(hub.adapter.closed.is_set)  # the buses were let go
        while not (document := watching.document())["problem"]:
            pass
        assert "no agent answers" in document["problem"]
        watching.process.send_signal(signal.SIGTERM)
        assert watching.process.wait(10) == 0


@pytest.mark.e2e
def test_an_adapter_that_is_not_there_is_named(config_path: Path, link: Path) -> None:
    with Watching(config_path, "--once", "--interval", "0.5") as watching:
        said, _ = watching.process.communicate(timeout=20)
    assert f"body: cannot be opened: {link}: no such device; is the adapter plugged in?" in said.decode()
    assert watching.process.returncode == 0


@pytest.mark.e2e
def test_plain_lines_end_cleanly_when_nobody_reads_any_more(config_path: Path, link: Path) -> None:
    with running_hub(link=link) as hub, Watching(config_path, "--interval", "0.1") as watching:
        assert watching.process.stdout is not None
        assert b"bus body opening" in watching.process.stdout.readline()
        watching.process.stdout.close()
        for kmh in range(10_000):
            hub.send(speed(kmh % 256))
            with contextlib.suppress(subprocess.TimeoutExpired):
                watching.process.wait(0.01)
                break
        assert watching.process.returncode == 0
        assert watching.process.stderr is not None
        assert watching.process.stderr.read() == b""


@pytest.mark.e2e
def test_a_terminal_is_redrawn_and_left_as_it_was(config_path: Path, link: Path) -> None:
    near, far = os.openpty()
    with running_hub(link=link) as hub, Watching(config_path, "--interval", "0.1", stdout=far) as watching:
        shown = ""

        def sees(text: str) -> bool:
            nonlocal shown
            hub.send(speed(77))
            while select.select([near], [], [], 0.02)[0]:
                shown += os.read(near, 65_536).decode()
            return text in shown

        wait_for(lambda: sees("\x1b[?1049h\x1b[?25l"))
        wait_for(lambda: sees("Vehicle.Speed  77"))
        watching.process.send_signal(signal.SIGINT)
        wait_for(lambda: sees("\x1b[?25h\x1b[?1049l"))
        assert watching.process.wait(10) == 0
        assert "Traceback" not in shown
    os.close(near)
    os.close(far)


@pytest.mark.e2e
@pytest.mark.parametrize("interval", ["0", "0.01", "x", "99999", "nan"])
def test_an_interval_out_of_range_is_refused(config_path: Path, interval: str) -> None:
    with Watching(config_path, "--interval", interval) as watching:
        _, said = watching.process.communicate(timeout=20)
    assert watching.process.returncode == 2
    assert b"expected 0.1 to 3600 seconds" in said
