"""Evaluates the catalogue's conditions: expressions over signals, or unknown.

Pure: no I/O, no clock, no randomness. The language is a small part of CEL
(cel.dev): comparisons, arithmetic, logic, `in`, `? :`, and the functions
listed here. Anything else is refused when a condition is compiled, and so is
every name that is not a declared input. A condition whose inputs are not all
known is unknown, as is one whose evaluation fails or yields no boolean; unknown
is never true. The evaluator is loaded without the command line that its
package would import with it. A compiled condition serves one thread.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from agent.errors import ConditionError
from agent.model import ConditionSpec, SignalValue

if TYPE_CHECKING:
    from types import ModuleType

    from cel.cel import Context, Program

MAX_EXPRESSION_CHARS: Final = 1024
"""Longest source of a condition."""
MAX_INPUTS: Final = 32
"""Most signals that one condition may read."""
MAX_KNOWN: Final = 256
"""Most results of one condition that are remembered."""
MAX_DEPTH: Final = 16
"""Deepest nesting of brackets in a condition."""

_FUNCTIONS: Final = frozenset({"double", "int", "size", "string"})
_METHODS: Final = frozenset({"contains", "endsWith", "startsWith"})
_WORDS: Final = frozenset({"true", "false", "in"})

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:\.[A-Za-z][A-Za-z0-9]*)*", re.ASCII)
_TOKEN: Final = re.compile(
    r"""(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)
      | (?P<text>"[^"'\\\r\n]*"|'[^'"\\\r\n]*')
      | (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
      | (?P<operator>==|!=|<=|>=|&&|\|\||[-+*/%<>!?:,()\[\]])
      | (?P<space>[ \t\r\n]+)""",
    re.VERBOSE | re.ASCII,
)


def _load_evaluator() -> ModuleType:
    """Loads the extension module alone: its package imports a command line, ten times as slow."""
    name = "cel.cel"
    if name in sys.modules:
        return sys.modules[name]
    package = importlib.util.find_spec("cel")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            file = Path(folder, f"cel{suffix}")
            spec = importlib.util.spec_from_file_location(name, file) if file.exists() else None
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                # An extension module is initialised once; a later `import cel` must find this one.
                sys.modules[name] = module
                return module
    raise ImportError("common-expression-language is not installed; conditions cannot be evaluated")


_evaluator: Final = _load_evaluator()


class Condition:
    """A compiled condition; made by `compile`."""

    def __init__(self, spec: ConditionSpec, program: Program, context: Context) -> None:
        self.spec = spec
        self._program = program
        self._context = context
        # Only what changed is handed to the evaluator again; that is most of the cost.
        self._given: list[SignalValue | None] = [None] * len(spec.inputs)
        self._known: dict[tuple[tuple[type, SignalValue], ...], bool | None] = {}
        """What values gave before: many meters ask the same."""

    @classmethod
    def compile(cls, spec: ConditionSpec) -> Condition:
        """Compiles `spec`.

        Raises:
            ConditionError: not in the language, an undeclared name, or beyond a limit.
        """
        if len(spec.expression) > MAX_EXPRESSION_CHARS:
            found = len(spec.expression)
            raise ConditionError(f"condition of {found} characters; the limit is {MAX_EXPRESSION_CHARS}")
        if len(spec.inputs) > MAX_INPUTS:
            raise ConditionError(f"condition with {len(spec.inputs)} inputs; the limit is {MAX_INPUTS}")
        for name in spec.inputs:
            if not _NAME.fullmatch(name):
                raise ConditionError(f"condition {spec.expression!r}: input {name!r} is not a VSS name")
        source = _rewritten(spec)
        try:
            program = cast("Program", _evaluator.compile(source))
        except ValueError as error:
            reason = str(error).partition("ERROR: ")[2].partition("\n")[0]
            raise ConditionError(f"condition {spec.expression!r} is not CEL: {reason}") from error
        return cls(spec, program, cast("Context", _evaluator.Context()))

    def evaluate(self, values: Mapping[str, SignalValue | None]) -> bool | None:
        """True or false, or None for unknown.

        Args:
            values: by VSS name; an input that is missing or None is unknown.
        """
        inputs = [values.get(name) for name in self.spec.inputs]
        if None in inputs:
            return None
        key = tuple([(type(value), value) for value in inputs if value is not None])
        if key in self._known:
            return self._known[key]
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        result = self._known[key] = self._evaluated(inputs)
        return result

    def _evaluated(self, inputs: list[SignalValue | None]) -> bool | None:
        try:
            for index, value in enumerate(inputs):
                if value is not self._given[index]:
                    self._context.add_variable(f"v{index}", value)
                    self._given[index] = value
            result = self._program.execute(self._context)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            # What the evaluator raises for operands that an operator is not defined for.
            return None
        return result if isinstance(result, bool) else None


def _rewritten(spec: ConditionSpec) -> str:
    """The source with each input replaced by a variable of its own; checks every token.

    One flat variable for each input costs a fifth of nested maps, and leaves
    no other name that the evaluator could find.
    """
    variables = {name: f"v{index}" for index, name in enumerate(spec.inputs)}
    parts: list[str] = []
    position = depth = 0
    source = spec.expression
    while position < len(source):
        token = _TOKEN.match(source, position)
        if token is None:
            raise ConditionError(f"condition {source!r}: not allowed at character {position + 1}")
        text, position = token.group(), token.end()
        if token.lastgroup == "name":
            text = _name(text, variables, spec, is_call=source[position:].lstrip().startswith("("))
        depth += (text in "([") - (text in ")]")
        if depth > MAX_DEPTH:
            raise ConditionError(f"condition {source!r}: nested deeper than {MAX_DEPTH}")
        parts.append(text)
    return "".join(parts)


def _name(name: str, variables: Mapping[str, str], spec: ConditionSpec, *, is_call: bool) -> str:
    if is_call and name != "in":
        if name in _FUNCTIONS:
            return name
        owner, _, method = name.rpartition(".")
        if method in _METHODS and owner in variables:
            return f"{variables[owner]}.{method}"
        raise ConditionError(f"condition {spec.expression!r}: no function {name!r}")
    if name in _WORDS:
        return name
    if name not in variables:
        known = ", ".join(spec.inputs) or "none"
        raise ConditionError(f"condition {spec.expression!r} reads {name}; declared inputs: {known}")
    return variables[name]
