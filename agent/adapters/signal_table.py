"""The table that the frames of a bus are read by: compiled once, then read from a file.

Compiling needs cantools and a tenth of a second to several; reading needs
neither. The file is a cache: one that is missing, damaged, of other sources or
of another version is made anew, and a disk that takes none stops nobody.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent.adapters.files import write_durably
from agent.config import BusConfig
from agent.errors import DatabaseError
from agent.signals import table as tables
from agent.signals.table import Table
from common import log

if TYPE_CHECKING:
    from agent.signals.sources import Compiled

MAX_DATABASE_BYTES: Final = 16 * 1024 * 1024
"""Largest signal database that is read."""
MAX_MAPPING_BYTES: Final = 8 * 1024 * 1024
"""Largest mapping that is read: a VSS tree with everything in it has half a megabyte."""
MAX_TABLE_BYTES: Final = 64 * 1024 * 1024
"""Largest stored table that is read."""

_log = log.get(__name__)


def load(bus: BusConfig, directory: Path) -> Table | None:
    """The table of a bus, from its file in `directory` if that is of the same sources.

    Returns:
        None for a bus without signals.

    Raises:
        DatabaseError: the database or the mapping cannot be used.
    """
    if bus.database is None or bus.signals is None:
        return None
    database = read(bus.database, MAX_DATABASE_BYTES)
    mapping = read(bus.signals, MAX_MAPPING_BYTES)
    key = tables.source_key(database, mapping, f"{bus.database.suffix} {bus.signals.suffix}".lower())
    path = directory / f"signals-{bus.name}.table"
    begun_ns = time.monotonic_ns()
    try:
        table = tables.from_bytes(_read_own(path), key)
    except (DatabaseError, OSError) as error:
        reason = str(error)
    else:
        _log.debug("signals are read by the stored table", bus=bus.name, took_ms=_ms_since(begun_ns))
        return table
    compiled = _compiled(bus.database, database, bus.signals, mapping)
    _log.info("signals are compiled", bus=bus.name, why=reason, took_ms=_ms_since(begun_ns))
    for skipped in compiled.skipped:
        _log.warning(
            "a part of the signal database is not used",
            file=str(bus.database),
            line=skipped.line,
            reason=skipped.reason,
        )
    for note, what in compiled.table.notes:
        _log.warning("a part of the mapping is not used", file=str(bus.signals), key=note, reason=what)
    try:
        write_durably(path, tables.to_bytes(compiled.table, key))
    except OSError as error:
        _log.warning("the table of signals is not kept; the next start compiles again", error=str(error))
    return compiled.table


def compile_anew(bus: BusConfig) -> Compiled | None:
    """Compiles the files of a bus, whatever is stored: for reports on them; None without signals.

    Raises:
        DatabaseError: the database or the mapping cannot be used.
    """
    if bus.database is None or bus.signals is None:
        return None
    database = read(bus.database, MAX_DATABASE_BYTES)
    return _compiled(bus.database, database, bus.signals, read(bus.signals, MAX_MAPPING_BYTES))


def _compiled(database_path: Path, database: bytes, mapping_path: Path, mapping: bytes) -> Compiled:
    from agent.signals.sources import compile_sources  # brings cantools

    return compile_sources(database, database_path, mapping, mapping_path)


def read(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        DatabaseError: it cannot be read, or is larger.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise DatabaseError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise DatabaseError(f"{path}: expected at most {limit} bytes; found more, nothing is used")
    return content


def _read_own(path: Path) -> bytes:
    """A stored table, if only this user could write it.

    Raises:
        DatabaseError, OSError: it is not there, or not ours.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        others = stat.S_IWGRP | stat.S_IWOTH
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & others:
            raise DatabaseError(f"{path} is not a file of this user alone")
        content = file.read(MAX_TABLE_BYTES + 1)
    if len(content) > MAX_TABLE_BYTES:
        raise DatabaseError(f"{path} is larger than any table")
    return content


def _ms_since(begun_ns: int) -> float:
    return round((time.monotonic_ns() - begun_ns) / 1e6, 1)
