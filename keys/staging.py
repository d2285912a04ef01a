"""Puts several files of a key folder in place as one: all of them, or none.

New files wait in `prepared/AREA` or `agreed/AREA`, laid out as the key folder is. One rename to
`agreed/AREA` decides; what is agreed is then moved into place by `finish`, now or, after a power cut, by the
next command. Whatever a new file replaces is copied to `retired/` first: no key is ever lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from keys import files
from keys.errors import KeyMaterialError, WouldOverwriteError

PREPARED = "prepared"
"""Where new files wait for signatures, or for the moment of the change."""
AGREED = "agreed"
"""Where new files stand that are decided and not yet all in place."""
RETIRED = "retired"
"""Where replaced keys and certificates are kept."""
MAX_RETIRED = 10_000
"""Most retired files of one name."""
_UNFINISHED = ".new"


def prepare(folder: Path, area: str, content: Mapping[str, bytes]) -> Path:
    """Writes files that wait for `agree`; nothing in use changes.

    Args:
        folder: the key folder.
        area: what they belong to, such as "director".
        content: path in the key folder -> bytes.

    Returns:
        the folder in which they wait.

    Raises:
        WouldOverwriteError: other files of this area wait already.
    """
    refuse_waiting(folder, area)
    return _write(folder / PREPARED / area, content)


def put(folder: Path, area: str, content: Mapping[str, bytes]) -> None:
    """Writes files as one: a failure leaves all of the old ones or, after the next `finish`, all new ones.

    Raises:
        WouldOverwriteError: other files of this area wait for their own change.
    """
    refuse_waiting(folder, area)
    _write(folder / AGREED / area, content)
    finish(folder)


def agree(folder: Path, area: str) -> None:
    """Decides for the prepared files of an area and puts them in place."""
    target = folder / AGREED / area
    files.make_folder(target.parent)
    (folder / PREPARED / area).rename(target)
    files.sync_folder(target.parent)
    files.sync_folder(folder / PREPARED)
    finish(folder)


def finish(folder: Path) -> None:
    """Moves every agreed file into its place; does nothing if there is none."""
    for tree in waiting(folder / AGREED):
        for file in sorted(p for p in tree.rglob("*") if p.is_file()):
            place = folder / file.relative_to(tree)
            retire(folder, place)
            files.make_folder(place.parent)
            file.replace(place)
            files.sync_folder(place.parent)
        shutil.rmtree(tree)
    for base in (folder / AGREED, folder / PREPARED):
        if base.is_dir() and not any(base.iterdir()):
            base.rmdir()


def retire(folder: Path, path: Path) -> None:
    """Keeps a copy of a file in `retired/`, under the first number that is free."""
    if not path.exists():
        return
    content = files.read(path)
    base = folder / RETIRED / path.relative_to(folder)
    for number in range(1, MAX_RETIRED + 1):
        target = base.with_name(f"{base.stem}.{number}{base.suffix}")
        if not target.exists():
            files.write(target, content)
            return
        if files.read(target) == content:  # kept already by a run that was cut short
            return
    raise KeyMaterialError(f"{base.parent}: holds {MAX_RETIRED} old files of {base.name}; move them away")


def waiting(base: Path) -> Iterator[Path]:
    """The complete folders below `prepared` or `agreed`."""
    if base.is_dir():
        yield from sorted(p for p in base.iterdir() if p.suffix != _UNFINISHED)


def refuse_waiting(folder: Path, area: str) -> None:
    """Refuses to begin a second change of an area.

    Raises:
        WouldOverwriteError: one waits.
    """
    if (folder / PREPARED / area).exists():
        raise WouldOverwriteError(
            f"{folder / PREPARED / area} waits to be published; nothing was written. Publish it with: "
            f"fod-keys publish {folder} {area}; or move that folder away, its keys are in no use"
        )


def _write(target: Path, content: Mapping[str, bytes]) -> Path:
    fresh = target.with_name(target.name + _UNFINISHED)
    # Left by a run that was cut short: nothing names these keys yet.
    shutil.rmtree(fresh, ignore_errors=True)
    for name, value in content.items():
        files.write(fresh / name, value)
    fresh.rename(target)
    files.sync_folder(target.parent)
    return target
