"""Reads one TOML file into a frozen dataclass, or says everything that is wrong.

Refuses unknown keys, missing keys, wrong types, values out of range and files
that do not exist, all at once, each with file and line. No defaults are
guessed: what may be left out has its default in the dataclass.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli

T = TypeVar("T")

MAX_FILE_BYTES = 1_048_576
"""Largest configuration file that is read."""
MAX_SHOWN_CHARS = 80
"""Longest piece of a found value that an error repeats."""


class ConfigError(Exception):
    """A configuration that is refused; `problems` holds one line for each reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class _Rules:
    existing: bool = False
    minimum: float | None = None
    maximum: float | None = None
    pattern: str | None = None
    choices: tuple[str, ...] = ()


def option(
    *,
    default: Any = dataclasses.MISSING,
    existing: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
    pattern: str | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declares a field with rules.

    Args:
        default: value if the key is absent; without one the key is required.
        existing: for a path: a file must be there.
        minimum, maximum: inclusive range of a number.
        pattern: regular expression that a text must match as a whole.
        choices: the only texts allowed.
    """
    rules = _Rules(existing, minimum, maximum, pattern, choices)
    return dataclasses.field(default=default, metadata={"rules": rules})


def read(path: Path, kind: type[T]) -> T:
    """Reads `path` into the dataclass `kind`.

    Relative paths in the file are resolved against the file's folder.

    Raises:
        ConfigError: for all problems of the file together.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    return parse(raw, path, kind)


def parse(raw: bytes, path: Path, kind: type[T]) -> T:
    """Like `read`, for bytes that are already here; `path` names them in errors.

    Raises:
        ConfigError: for all problems together.
    """
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError([f"{path}: it has more than {MAX_FILE_BYTES} bytes, the limit"])
    try:
        text = raw.decode("utf-8")
        document = tomli.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"]) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
        what, _, place = str(error).partition(" (at ")
        digits = re.match(r"line (\d+)", place)
        line = digits[1] if digits else raw.count(b"\n") + 1 if place else ""
        raise ConfigError(
            [f"{path}:{line}: not TOML: {what}" if line else f"{path}: not TOML: {what}"]
        ) from error
    return _checked(_Reader(path, _lines(text)), document, kind, "")


def check(document: object, path: Path, kind: type[T], key: str) -> T:
    """Like `parse`, for a part of a document in another form; `key` is where it stands.

    Raises:
        ConfigError: for all problems together, without lines.
    """
    return _checked(_Reader(path, {}), document, kind, key)


def _checked(reader: _Reader, document: object, kind: type[T], key: str) -> T:
    value = reader.table(document, kind, key)
    if reader.problems:
        raise ConfigError(reader.problems)
    return typing.cast("T", value)


_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_NAME = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER = re.compile(rf"[ \t]*(\[\[?)[ \t]*({_NAME})[ \t]*\]")
_KEY = re.compile(rf"[ \t]*({_NAME})[ \t]*=")
# Texts of several lines and comments; short texts are found too, because either may stand in one.
_NO_KEYS = re.compile(
    r'"""(?:\\[\s\S]|[^\\])*?"{3,5}' + r"|'''[\s\S]*?'{3,5}" + r'|"(?:[^"\\\n]|\\.)*"' + r"|'[^'\n]*'|#[^\n]*"
)


def _lines(text: str) -> dict[str, int]:
    """Line of each key and table, by dotted name; arrays of tables are numbered from 0."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    prefix = ""

    def resolve(parts: list[str]) -> str:
        """Puts the index of the latest element behind each array in the name."""
        name = ""
        for part in parts:
            name = _join(name, part)
            if name in counts:
                name = f"{name}[{counts[name]}]"
        return name

    def blanked(match: re.Match[str]) -> str:
        is_short_text = match[0][0] in "\"'" and match[0][:3] not in {'"""', "'''"}
        return match[0] if is_short_text else "\n" * match[0].count("\n")

    # What stands in a text of several lines or a comment is no key; its lines still count.
    blank = _NO_KEYS.sub(blanked, text)
    for number, line in enumerate(blank.split("\n"), start=1):
        if header := _HEADER.match(line):
            parts = _parts(header[2])
            if header[1] == "[[":
                base = _join(resolve(parts[:-1]), parts[-1])
                counts[base] = counts.get(base, -1) + 1
                prefix = f"{base}[{counts[base]}]"
            else:
                prefix = resolve(parts)
            found.setdefault(prefix, number)
        elif key := _KEY.match(line):
            name = prefix
            for part in _parts(key[1]):
                name = _join(name, part)
                found.setdefault(name, number)
    return found


def _parts(name: str) -> list[str]:
    """The parts of a dotted name; a quoted one as TOML reads it."""
    return [
        next(iter(tomli.loads(f"{part} = 0"))) if part[0] in "\"'" else part
        for part in re.findall(_PART, name)
    ]


class _Reader:
    def __init__(self, path: Path, lines: Mapping[str, int]) -> None:
        self.path, self.lines = path, lines
        self.problems: list[str] = []

    def problem(self, key: str, what: str) -> None:
        line, parent = self.lines.get(key), key
        while line is None and parent:
            parent = parent[: max(parent.rfind("."), parent.rfind("["), 0)]
            line = self.lines.get(parent)
        place = f"{self.path}:{line}" if line else f"{self.path}"
        self.problems.append(f"{place}: {key}: {what}" if key else f"{place}: {what}")

    def table(self, found: object, kind: type, key: str) -> object:
        if not isinstance(found, dict):
            self.problem(key, f"expected a table, found {_describe(found)}")
            return None
        before = len(self.problems)
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
        for name in found:
            if name not in fields:
                known = ", ".join(sorted(fields))
                self.problem(_join(key, name), f"unknown key; known here: {known}")
        values: dict[str, object] = {}
        for name, field in fields.items():
            if name in found:
                rules = field.metadata.get("rules", _Rules())
                values[name] = self.value(found[name], hints[name], _join(key, name), rules)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                self.problem(_join(key, name), "missing; it is required")
        if len(self.problems) > before:
            return None
        value = kind(**values)
        check = getattr(value, "problems", None)
        if check is not None:
            for name, what in check():
                self.problem(_join(key, name), what)
        return value

    def value(self, found: object, hint: Any, key: str, rules: _Rules) -> object:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            (inner,) = (a for a in arguments if a is not type(None))
            return self.value(found, inner, key, rules)
        if origin is tuple:
            return self.array(found, arguments[0], key, rules)
        if origin is dict:
            if not isinstance(found, dict):
                self.problem(key, f"expected a table, found {_describe(found)}")
                return None
            return {n: self.value(v, arguments[1], _join(key, n), rules) for n, v in found.items()}
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.table(found, hint, key)
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            choices = [str(m.value) for m in hint]
            if found not in [m.value for m in hint]:
                self.problem(key, f"expected one of {', '.join(choices)}; found {_shown(found)}")
                return None
            return hint(found)
        return self.scalar(found, hint, key, rules)

    def array(self, found: object, inner: Any, key: str, rules: _Rules) -> object:
        if not isinstance(found, list):
            self.problem(key, f"expected an array, found {_describe(found)}")
            return None
        return tuple(self.value(v, inner, f"{key}[{i}]", rules) for i, v in enumerate(found))

    def scalar(self, found: object, hint: Any, key: str, rules: _Rules) -> object:
        expected = str if hint is Path else hint
        if hint is float and type(found) is int:
            found = float(found) if abs(found) < 2**1023 else math.inf
        if type(found) is not expected or (isinstance(found, float) and not math.isfinite(found)):
            self.problem(key, f"expected {name_of(hint)}, found {_describe(found)}")
            return None
        if isinstance(found, str):
            self.text(found, hint, key, rules)
        elif isinstance(found, int | float) and not isinstance(found, bool):
            if rules.minimum is not None and not found >= rules.minimum:
                self.problem(key, f"expected at least {rules.minimum}, found {found}")
            if rules.maximum is not None and not found <= rules.maximum:
                self.problem(key, f"expected at most {rules.maximum}, found {found}")
        if hint is Path:
            return self.file(str(found), key, rules)
        return found

    def file(self, found: str, key: str, rules: _Rules) -> Path | None:
        try:
            path = self.path.parent / Path(found).expanduser()
            if "\0" in found or (rules.existing and path.exists() and not path.is_file()):
                self.problem(key, f"not a file: {_shown(str(path))}")
            elif rules.existing and not path.exists():
                self.problem(key, f"no such file: {_shown(str(path))}")
        except (OSError, RuntimeError) as error:  # no permission, name too long, no such home
            self.problem(key, f"{_shown(found)} cannot be used: {error}")
            return None
        return path

    def text(self, found: str, hint: Any, key: str, rules: _Rules) -> None:
        if rules.pattern is not None and not re.fullmatch(rules.pattern, found):
            self.problem(key, f"expected text of the form {rules.pattern}, found {_shown(found)}")
        if rules.choices and found not in rules.choices:
            self.problem(key, f"expected one of {', '.join(rules.choices)}; found {_shown(found)}")
        if hint is Path and not found:
            self.problem(key, "expected a path, found an empty text")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def name_of(hint: Any) -> str:
    """What a value of a type is called in errors."""
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    return names.get(hint, str(hint))


def _describe(found: object) -> str:
    kinds: Iterator[tuple[type, str]] = iter(
        [(bool, "true or false"), (dict, "a table"), (list, "an array"), (str, "a text")]
    )
    for kind, name in kinds:
        if isinstance(found, kind):
            return f"{name} ({_shown(found)})" if kind in (bool, str) else name
    return _shown(found)


def _shown(found: object) -> str:
    """A found value, short enough for one line."""
    try:
        text = repr(found)
    except ValueError:  # a whole number of too many digits (sys.set_int_max_str_digits)
        return "a number of too many digits"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"
