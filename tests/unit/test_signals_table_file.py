"""The stored table: a start reads it without cantools, and one that is not right is made again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.signals_data import DEMO_SIGNALS, REPOSITORY, SIMULATED_DBC, decoded

from agent.adapters import signal_table
from agent.config import BusConfig
from agent.errors import DatabaseError
from agent.signals import table as tables
from agent.signals.table import Table

FILE = "signals-body.table"


def bus(database: Path | None = SIMULATED_DBC, signals: Path | None = DEMO_SIGNALS) -> BusConfig:
    return BusConfig(name="body", interface="virtual", channel="x", database=database, signals=signals)


def stored(directory: Path) -> Path:
    signal_table.load(bus(), directory)
    return directory / FILE


@pytest.fixture
def expected(tmp_path: Path) -> Table:
    (tmp_path / "expected").mkdir()
    table = signal_table.load(bus(), tmp_path / "expected")
    assert table is not None
    return table


def is_compiled_again(directory: Path) -> bool:
    """Whether the next load writes the file anew; what it returns must be right in any case."""
    path = directory / FILE
    before = path.lstat() if path.exists() or path.is_symlink() else None
    assert signal_table.load(bus(), directory) is not None
    return before is None or path.lstat().st_ino != before.st_ino


def test_a_table_survives_the_file_exactly(tmp_path: Path, expected: Table) -> None:
    path = stored(tmp_path)
    content = path.read_bytes()
    key = content.split(b" ")[1].decode()
    assert tables.from_bytes(content, key) == expected
    assert path.stat().st_mode & 0o777 == 0o600
    assert not is_compiled_again(tmp_path)
    assert signal_table.load(bus(), tmp_path) == expected


def test_a_later_start_does_not_import_cantools(tmp_path: Path) -> None:
    stored(tmp_path)
    program = f"""
import json, sys
from pathlib import Path
from agent.adapters import signal_table
from agent.config import BusConfig
from agent.signals.state import Collector
bus = BusConfig(name="body", interface="virtual", channel="x",
    database=Path({str(SIMULATED_DBC)!r}), signals=Path({str(DEMO_SIGNALS)!r}))
collector = Collector({{"body": signal_table.load(bus, Path({str(tmp_path)!r}))}})
collector.feed("body", [(160, bytes.fromhex("00" * 8), 1)])
names = ("cantools", "bitstruct", "textparser", "can", "grpc", "agent.signals.database")
print(json.dumps([n for n in names if n in sys.modules]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert json.loads(ran.stdout.splitlines()[-1]) == []


def test_a_change_of_a_source_compiles_again(tmp_path: Path) -> None:
    stored(tmp_path)
    for name, source in (("changed.dbc", SIMULATED_DBC), ("changed.toml", DEMO_SIGNALS)):
        changed = tmp_path / name
        changed.write_bytes(source.read_bytes() + b"\n")
        inode = (tmp_path / FILE).stat().st_ino
        other = bus(changed) if name.endswith("dbc") else bus(signals=changed)
        assert signal_table.load(other, tmp_path) is not None
        assert (tmp_path / FILE).stat().st_ino != inode


def test_every_flipped_bit_of_the_file_compiles_again(tmp_path: Path, expected: Table) -> None:
    path = stored(tmp_path)
    content = path.read_bytes()
    key = content.split(b" ")[1].decode()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(DatabaseError):
            tables.from_bytes(bytes(damaged), key)
    path.write_bytes(content[: len(content) // 2])
    assert is_compiled_again(tmp_path)
    assert signal_table.load(bus(), tmp_path) == expected


def test_a_file_of_another_version_compiles_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FORMAT", tables.FORMAT + 1)
    stored(tmp_path)
    monkeypatch.undo()
    assert is_compiled_again(tmp_path)


def test_a_file_that_others_may_write_is_not_believed(tmp_path: Path) -> None:
    path = stored(tmp_path)
    path.chmod(0o666)
    assert is_compiled_again(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_link_a_folder_or_a_pipe_in_its_place_is_not_read(tmp_path: Path, expected: Table) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(stored(tmp_path).read_bytes())
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).symlink_to(elsewhere)
    assert is_compiled_again(tmp_path)
    assert not (tmp_path / FILE).is_symlink()
    (tmp_path / FILE).unlink()
    os.mkfifo(tmp_path / FILE)
    assert is_compiled_again(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    assert signal_table.load(bus(), tmp_path) == expected


def test_a_folder_that_takes_no_file_stops_nobody(tmp_path: Path, expected: Table) -> None:
    assert signal_table.load(bus(), tmp_path / "missing") == expected


def test_a_bus_without_signals_has_no_table(tmp_path: Path) -> None:
    assert signal_table.load(bus(None, None), tmp_path) is None
    assert not (tmp_path / FILE).exists()


def test_sources_that_are_missing_or_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DatabaseError, match=r"none\.dbc: cannot be read"):
        signal_table.load(bus(tmp_path / "none.dbc"), tmp_path)
    monkeypatch.setattr(signal_table, "MAX_DATABASE_BYTES", 10)
    with pytest.raises(DatabaseError, match="expected at most 10 bytes"):
        signal_table.load(bus(), tmp_path)


def test_a_mapping_of_no_known_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "signals.yaml"
    path.write_text("a: 1\n")
    with pytest.raises(DatabaseError, match=r"expected a file \.toml or \.json"):
        signal_table.load(bus(signals=path), tmp_path)


def test_the_stored_table_decodes(expected: Table) -> None:
    row = next(row for row in expected.messages if row.name == "PT_SPEED")
    assert decoded(row, bytes.fromhex("0000102700000000")) == {"Vehicle.Speed": 100.0}
