"""Reads one TOML file into a frozen dataclass, or says everything that is wrong.

Refuses unknown keys, missing keys, wrong types, values out of range and files
that do not exist, all at once, each with file and line. No defaults are
guessed: what may be left out has its default in the dataclass.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MAX_FILE_BYTES = 1_048_576
"""Largest configuration file that is read."""


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
        existing: for a path: it must exist.
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
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    return parse(raw, path, kind)


def parse(raw: bytes, path: Path, kind: type[T]) -> T:
    """Like `read`, for bytes that are already here; `path` names them in errors.

    Raises:
        ConfigError: for all problems together.
    """
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError([f"{path}: {len(raw)} bytes is more than the limit of {MAX_FILE_BYTES}"])
    try:
        text = raw.decode("utf-8")
        document = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"]) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError([f"{path}: not TOML: {error}"]) from error
    reader = _Reader(path, _lines(text))
    value = reader.table(document, kind, "")
    if reader.problems:
        raise ConfigError(reader.problems)
    return typing.cast("T", value)


_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"))*)\s*=""")


def _lines(text: str) -> dict[str, int]:
    """Line of each key and table, by dotted name; arrays of tables are numbered from 0."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    prefix = ""

    def resolve(name: str) -> str:
        """Puts the index of the latest element behind each array in the name."""
        parts: list[str] = []
        for part in (p.strip().strip("\"'") for p in name.split(".")):
            parts.append(part)
            joined = ".".join(parts)
            if joined in counts:
                parts[-1] = f"{part}[{counts[joined]}]"
        return ".".join(parts)

    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            name = header.group(2)
            if header.group(1) == "[[":
                *parents, last = [p.strip() for p in name.split(".")]
                parent = resolve(".".join(parents)) if parents else ""
                base = f"{parent}.{last}" if parent else last
                counts[base] = counts.get(base, -1) + 1
                prefix = f"{base}[{counts[base]}]"
            else:
                prefix = resolve(name)
            found.setdefault(prefix, number)
        elif key := _KEY.match(line):
            name = key.group(1).replace('"', "").replace(" ", "")
            found.setdefault(f"{prefix}.{name}" if prefix else name, number)
    return found


class _Reader:
    def __init__(self, path: Path, lines: Mapping[str, int]) -> None:
        self.path, self.lines = path, lines
        self.problems: list[str] = []

    def problem(self, key: str, what: str) -> None:
        line = self.lines.get(key)
        parent = key
        while line is None and "." in parent:
            parent = parent.rpartition(".")[0]
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
                self.problem(key, f"expected one of {', '.join(choices)}; found {found!r}")
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
            found = float(found)
        if type(found) is not expected:
            self.problem(key, f"expected {_name(hint)}, found {_describe(found)}")
            return None
        if isinstance(found, str):
            self.text(found, hint, key, rules)
        elif isinstance(found, int | float) and not isinstance(found, bool):
            if rules.minimum is not None and not found >= rules.minimum:
                self.problem(key, f"expected at least {rules.minimum}, found {found}")
            if rules.maximum is not None and not found <= rules.maximum:
                self.problem(key, f"expected at most {rules.maximum}, found {found}")
        if hint is Path:
            path = Path(str(found)).expanduser()
            path = path if path.is_absolute() else self.path.parent / path
            if rules.existing and not path.exists():
                self.problem(key, f"no such file: {path}")
            return path
        return found

    def text(self, found: str, hint: Any, key: str, rules: _Rules) -> None:
        if rules.pattern is not None and not re.fullmatch(rules.pattern, found):
            self.problem(key, f"expected text of the form {rules.pattern}, found {found!r}")
        if rules.choices and found not in rules.choices:
            self.problem(key, f"expected one of {', '.join(rules.choices)}; found {found!r}")
        if hint is Path and not found:
            self.problem(key, "expected a path, found an empty text")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _name(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    return names.get(hint, str(hint))


def _describe(found: object) -> str:
    kinds: Iterator[tuple[type, str]] = iter(
        [(bool, "true or false"), (dict, "a table"), (list, "an array"), (str, "a text")]
    )
    for kind, name in kinds:
        if isinstance(found, kind):
            return f"{name} ({found!r})" if kind in (bool, str) else name
    return f"{found!r}"
