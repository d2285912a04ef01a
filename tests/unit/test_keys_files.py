"""A private file never has another mode, an old reader or another place, whatever lies where it is made."""

from __future__ import annotations

import stat
from pathlib import Path

from keys import files


def test_what_lies_there_gets_neither_the_content_nor_keeps_its_mode(tmp_path: Path) -> None:
    fresh = tmp_path / "root.key.new"
    fresh.write_bytes(b"")
    fresh.chmod(0o666)
    with fresh.open("rb") as watcher:
        files.write(tmp_path / "root.key", b"PRIVATE")
        assert watcher.read() == b""
    assert stat.S_IMODE((tmp_path / "root.key").stat().st_mode) == 0o600
    assert (tmp_path / "root.key").read_bytes() == b"PRIVATE"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "root.key.new").symlink_to(victim)
    files.write(tmp_path / "root.key", b"PRIVATE")
    assert victim.read_text() == "untouched"
    assert not (tmp_path / "root.key").is_symlink()
