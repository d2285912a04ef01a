"""From the files of a bus, as bytes, to its table: which reader is for which file.

Pure. Raises only DatabaseError.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.errors import DatabaseError
from agent.signals import database as databases
from agent.signals import kuksa, mapping
from agent.signals.compiler import compile_table
from agent.signals.database import Skipped
from agent.signals.table import Table


@dataclass(frozen=True, slots=True)
class Compiled:
    """A table, and what of the database was left out.

    Args:
        messages: number of messages in the database.
    """

    table: Table
    messages: int
    skipped: tuple[Skipped, ...]


def compile_sources(
    database_content: bytes, database_path: Path, mapping_content: bytes, mapping_path: Path
) -> Compiled:
    """Reads a database and a mapping, and compiles them; the paths say the forms and stand in errors.

    Raises:
        DatabaseError: one of them cannot be used.
    """
    database = databases.read(database_content, database_path)
    match mapping_path.suffix.lower():
        case ".toml":
            found = mapping.read(mapping_content, mapping_path, database)
        case ".json":
            found = kuksa.read(mapping_content, mapping_path, database)
        case suffix:
            raise DatabaseError(f"{mapping_path}: expected a file .toml or .json; found suffix {suffix!r}")
    return Compiled(compile_table(database, found), len(database.messages), database.skipped)
