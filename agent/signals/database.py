"""Loads a signal database, even a malformed one, and says what it left out.

About a third of the public DBC files break the grammar somewhere. A DBC that
does not parse as a whole is therefore cut into its statements; those that do
not parse, or that ask for absurd sizes, are skipped and reported by line.
KCD, ARXML and SYM files load as a whole or not at all. Signals that overlap or
leave their message are loaded; the decode plan refuses those that do not fit.
Raises only DatabaseError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cantools.database
from cantools.database.can import Database, Message

from agent.errors import DatabaseError

MAX_MESSAGE_BYTES: Final = 1785
"""Longest message: 255 packets of 7 bytes (transport protocol of SAE J1939-21)."""
MAX_MULTIPLEXER_IDS: Final = 65_536
"""Most multiplexer values that one SG_MUL_VAL_ statement may list as ranges."""
MAX_SKIPPED: Final = 1000
"""Statements that may be skipped; a file with more is not taken for a DBC."""
MAX_SKIPPED_TEXT: Final = 120
"""Characters of a skipped statement or a reason that a report keeps."""

_FORMATS: Final = {".dbc": "dbc", ".kcd": "kcd", ".arxml": "arxml", ".sym": "sym"}

_KEYWORDS: Final = (
    "VERSION|NS_|BS_|BU_|BO_|BO_TX_BU_|CM_|EV_|ENVVAR_DATA_|SGTYPE_|SGTYPE_VAL_|SIGTYPE_VALTYPE_|"
    "BA_|BA_DEF_|BA_DEF_DEF_|BA_DEF_DEF_REL_|BA_DEF_REL_|BA_DEF_SGTYPE_|BA_SGTYPE_|BA_REL_|BU_BO_REL_|"
    "BU_EV_REL_|BU_SG_REL_|VAL_|VAL_TABLE_|CAT_|CAT_DEF_|FILTER|SIG_GROUP_|SIG_VALTYPE_|SIG_TYPE_REF_|"
    "SG_MUL_VAL_"
)
_START: Final = re.compile(rf"(?:{_KEYWORDS})(?=[\s:]|$)")
# What a statement looks like where a text is still open: then the text's end is missing.
_START_IN_TEXT: Final = re.compile(
    r'BO_\s+\d+\s+\w+\s*:|CM_\s+(?:"|(?:SG_|BO_|BU_|EV_)\s)|VAL_\s+\d+\s+\w+\s+\d|BA_(?:DEF_(?:DEF_)?)?\s+"'
)
_MESSAGE: Final = re.compile(r"\s*BO_\s+(\d+)\s+(\w+)\s*:")
_SIZE: Final = re.compile(r"BO_\s+\d+\s+\w+\s*:\s*(\d+)")
_PLACE: Final = re.compile(r"SG_\s[^:]{0,300}:\s*(\d+)\s*\|\s*(\d+)")
_RANGE: Final = re.compile(r"(\d+)\s*-\s*(\d+)")

# What is given up, in this order, when the statements parse one by one but not together.
_DISPENSABLE: Final = (
    ("attributes", re.compile(r"BA_")),
    ("comments, groups and lists", re.compile(r"CM_|SIG_GROUP_|BO_TX_BU_|EV_|ENVVAR_DATA_|CAT_|FILTER")),
    ("all but messages", re.compile(r"(?!BO_\s|SIG_VALTYPE_|SG_MUL_VAL_)")),
)

# Without these, floats would be read as integers and multiplexed signals where they are not.
_CHANGES_DECODING: Final = re.compile(r"SIG_VALTYPE_|SG_MUL_VAL_")
_TARGET: Final = re.compile(r"\w+\s+(\d+)\b")
# These must name a signal that exists; the parser refuses the whole file otherwise.
_REFERS: Final = re.compile(r"\s*(?:VAL_|SIG_VALTYPE_)\s+(\d+)\s+(\w+)")
_SIGNAL_NAME: Final = re.compile(r"^\s*SG_\s+(\w+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A statement of a database file that is not used.

    Args:
        line: its first line in the file, from 1; 0 if it is not known.
        statement: its beginning, at most MAX_SKIPPED_TEXT characters.
        reason: what is wrong with it.
        message: name of the message that is missing with it, or "".
    """

    line: int
    statement: str
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class SignalDatabase:
    """The messages of one file, by name, and what of it was skipped."""

    path: Path
    messages: Mapping[str, Message]
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True)
class _Statement:
    line: int
    text: str

    def skipped(self, reason: str) -> Skipped:
        message = _MESSAGE.match(self.text)
        first_line = self.text.strip().partition("\n")[0]
        return Skipped(
            line=self.line,
            statement=first_line[:MAX_SKIPPED_TEXT],
            reason=reason[:MAX_SKIPPED_TEXT],
            message=message.group(2) if message else "",
        )


def read(content: bytes, path: Path) -> SignalDatabase:
    """Reads the database at `path`, whose content is here; its format follows from the suffix.

    Raises:
        DatabaseError: not a known format, or without any message.
    """
    database_format = _FORMATS.get(path.suffix.lower())
    if database_format is None:
        raise DatabaseError(f"{path}: expected a file {', '.join(_FORMATS)}; found suffix {path.suffix!r}")
    return parse(_text(content, database_format), path, database_format)


def parse(text: str, path: Path, database_format: str = "dbc") -> SignalDatabase:
    """Like `read`, for a text that is decoded; `path` names it in errors.

    Raises:
        DatabaseError: if it holds no message that can be used.
    """
    if database_format == "dbc":
        loaded, skipped = _load_tolerantly(text, path)
    else:
        loaded, skipped = _load(text, path, database_format), []
    messages: dict[str, Message] = {}
    for message in loaded.messages:
        if message.name in messages:
            earlier = f"0x{messages[message.name].frame_id:X}"
            reason = f"a later message has its name; the one with identifier {earlier} is not used"
            skipped.append(Skipped(0, message.name[:MAX_SKIPPED_TEXT], reason))
        messages[message.name] = message
    if not messages:
        why = "".join(f"; line {s.line} was skipped: {s.reason}" for s in skipped[:1])
        raise DatabaseError(f"{path}: expected at least one message; found none{why}")
    return SignalDatabase(path=path, messages=messages, skipped=tuple(skipped))


def _text(raw: bytes, database_format: str) -> str:
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        # Older DBC and SYM tools write the Windows code page.
        encoding = "cp1252" if database_format in ("dbc", "sym") else "utf-8"
        return raw.decode(encoding, errors="replace").replace("\r\n", "\n")


def _load(text: str, path: Path, database_format: str) -> Database:
    try:
        loaded = cantools.database.load_string(text, database_format, strict=False)
    except cantools.database.Error as error:
        found = " ".join(str(error).split())[:MAX_SKIPPED_TEXT]
        raise DatabaseError(f"{path}: expected a {database_format} database; found: {found}") from error
    if not isinstance(loaded, Database):
        raise DatabaseError(f"{path}: expected a CAN database; found {type(loaded).__name__}")
    return loaded


def _load_tolerantly(text: str, path: Path) -> tuple[Database, list[Skipped]]:
    skipped: list[Skipped] = []
    statements: list[_Statement] = []
    for statement in _statements(text):
        reason = _absurd(statement.text)
        if reason is None:
            statements.append(statement)
        else:
            skipped.append(statement.skipped(reason))
    if not skipped:
        try:
            return _load(_joined(statements), path, "dbc"), []
        except DatabaseError:
            statements = _sound(statements, path, skipped)
    else:
        statements = _sound(statements, path, skipped)
    statements = _consistent(statements, path, skipped)
    for what, kind in _DISPENSABLE:
        try:
            return _load(_joined(statements), path, "dbc"), sorted(skipped, key=lambda s: s.line)
        except DatabaseError:
            dropped = [s for s in statements if kind.match(s.text.lstrip())]
            statements = [s for s in statements if not kind.match(s.text.lstrip())]
            skipped += [s.skipped(f"{what} do not fit the rest of the file") for s in dropped]
    return _load(_joined(statements), path, "dbc"), sorted(skipped, key=lambda s: s.line)


def _consistent(statements: list[_Statement], path: Path, skipped: list[Skipped]) -> list[_Statement]:
    """Leaves out what misses a skipped statement: its values would be wrong, or it refers to nothing."""
    broken: set[str] = set()
    for lost in skipped:
        if _CHANGES_DECODING.match(lost.statement):
            target = _TARGET.match(lost.statement)
            if target is None:
                raise DatabaseError(
                    f"{path}:{lost.line}: {lost.statement!r} cannot be read, nor which message it changes"
                )
            broken.add(target.group(1))
    kept: list[_Statement] = []
    signals: set[tuple[str, str]] = set()
    for statement in statements:
        header = _MESSAGE.match(statement.text)
        if header and header.group(1) in broken:
            skipped.append(statement.skipped("a skipped statement changes how this message is decoded"))
            continue
        if header:
            signals |= {(header.group(1), name) for name in _SIGNAL_NAME.findall(statement.text)}
        kept.append(statement)
    found: list[_Statement] = []
    for statement in kept:
        refers = _REFERS.match(statement.text)
        if refers and refers.groups() not in signals:
            skipped.append(statement.skipped(f"there is no signal {refers[2]} of message {refers[1]}"))
        else:
            found.append(statement)
    return found


def _sound(statements: list[_Statement], path: Path, skipped: list[Skipped]) -> list[_Statement]:
    """Finds the statements that parse, by halving; those that do not go to `skipped`."""
    if not statements:
        return []
    try:
        _load(_joined(statements), path, "dbc")
    except DatabaseError as error:
        if len(statements) > 1:
            half = len(statements) // 2
            return _sound(statements[:half], path, skipped) + _sound(statements[half:], path, skipped)
        (statement,) = statements
        # Lines and columns would be counted from the statement's own first line.
        reason = (
            re.sub(r" at line \d+, column \d+", "", str(error.__cause__)).removeprefix("DBC: ").strip('"')
        )
        if _MESSAGE.match(statement.text) or reason.startswith("Invalid syntax"):
            if len(skipped) >= MAX_SKIPPED:
                raise DatabaseError(
                    f"{path}: expected a DBC; more than {MAX_SKIPPED} statements fail"
                ) from error
            skipped.append(statement.skipped(reason))
            return []
        # It parses, but refers to what is elsewhere in the file.
    return statements


def _joined(statements: list[_Statement]) -> str:
    return "\n".join(s.text for s in statements) + "\n"


def _statements(text: str) -> Iterator[_Statement]:
    """Cuts a DBC where a keyword begins a line outside of any quoted text."""
    lines: list[str] = []
    first, in_text, names_follow = 1, False, False
    for number, line in enumerate(text.split("\n"), start=1):
        word = line.lstrip()
        starts = (_START_IN_TEXT if in_text else _START).match(word)
        # The list behind NS_ is made of indented keywords that begin nothing.
        if starts and names_follow and line != word and word.rstrip().isidentifier():
            starts = None
        if starts:
            if lines:
                yield _Statement(first, "\n".join(lines))
            lines, first, in_text = [], number, False
            names_follow = word.startswith("NS_")
        lines.append(line)
        in_text ^= line.replace('\\"', "").count('"') % 2 == 1
    yield _Statement(first, "\n".join(lines))


def _absurd(statement: str) -> str | None:
    """Sizes that would cost memory without bound, found before the parser sees them."""
    try:
        for size in _SIZE.findall(statement):
            if int(size) > MAX_MESSAGE_BYTES:
                return f"message of {int(size)} bytes is more than the limit of {MAX_MESSAGE_BYTES}"
        for start, length in _PLACE.findall(statement):
            if not 1 <= int(length) <= 8 * MAX_MESSAGE_BYTES or int(start) >= 8 * MAX_MESSAGE_BYTES:
                return f"signal at bit {int(start)} of {int(length)} bits is beyond every message"
        if "SG_MUL_VAL_" in statement:
            total = sum(max(0, int(to) - int(since) + 1) for since, to in _RANGE.findall(statement))
            if total > MAX_MULTIPLEXER_IDS:
                return f"{total} multiplexer values are more than the limit of {MAX_MULTIPLEXER_IDS}"
    except ValueError:  # int() refuses numbers of more than 4300 digits
        return "a number of thousands of digits"
    return None
