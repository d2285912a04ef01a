"""Arithmetic on one number, read from the `math` texts of mapping files.

Pure. A text becomes a program: numbers, `x` and names of operations in postfix
order. Only programs of known operations pass, and only they become code, so
that no text of a file is ever evaluated. The notation is that of
py-expression-eval, which Kuksa's CAN provider uses, without its logic and
texts: + - * / % ^ (or **), brackets, PI, E and the functions below. `^` binds
more tightly than a sign before it, and to the right.
Raises only DatabaseError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from agent.errors import DatabaseError

MAX_TOKENS: Final = 128
"""Most numbers, names and signs of one text."""
MAX_NUMBER: Final = 1e30
"""Largest number that a text may hold."""

Token = int | float | str
Program = tuple[Token, ...]
"""In postfix order; a text is `x` or the name of an operation."""

_BINARY: Final = ("+", "-", "*", "/", "%", "^")
_PRECEDENCE: Final = MappingProxyType({"+": 1, "-": 1, "*": 2, "/": 2, "%": 2, "negate": 3, "^": 4})
_UNARY_PRECEDENCE: Final = _PRECEDENCE["negate"]
# Powers are taken of floats: those of whole numbers grow without bound.
_FUNCTIONS: Final[Mapping[str, tuple[int, Callable[..., float]]]] = MappingProxyType(
    {
        "abs": (1, abs),
        "ceil": (1, math.ceil),
        "exp": (1, math.exp),
        "floor": (1, math.floor),
        "log": (1, math.log),
        "max": (2, max),
        "min": (2, min),
        "pow": (2, math.pow),
        "round": (1, round),
        "sqrt": (1, math.sqrt),
    }
)
_CONSTANTS: Final = MappingProxyType({"PI": math.pi, "E": math.e})
_ARITY: Final[Mapping[str, int]] = MappingProxyType(
    dict.fromkeys(_BINARY, 2) | {"negate": 1} | {name: arity for name, (arity, _) in _FUNCTIONS.items()}
)
_TOKEN: Final = re.compile(
    r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|(\*\*|[-+*/%^(),]))", re.ASCII
)


def parse(text: str) -> Program:
    """The program of a text such as "floor((x*40)-100)".

    Raises:
        DatabaseError: it is no arithmetic on `x`; says where.
    """
    return _Parser(text).program()


class _Parser:
    """By precedence climbing; its depth is bounded by the number of tokens."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, int]] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error(position, "expected a number, a name or a sign")
            self._tokens.append((match[0].strip(), match.end() - len(match[0].strip())))
            if len(self._tokens) > MAX_TOKENS:
                raise self._error(position, f"more than {MAX_TOKENS} numbers, names and signs")
            position = match.end()
        self._at = 0
        self._out: list[Token] = []

    def program(self) -> Program:
        self._expression(0)
        if self._at < len(self._tokens):
            raise self._error(self._tokens[self._at][1], "expected an operation or the end")
        return check(tuple(self._out))

    def _peek(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def _take(self, expected: str = "") -> tuple[str, int]:
        if self._at == len(self._tokens):
            raise self._error(len(self._text), f"expected {expected or 'a number'}, found the end")
        symbol, position = self._tokens[self._at]
        if expected and symbol != expected:
            raise self._error(position, f"expected {expected!r}")
        self._at += 1
        return symbol, position

    def _expression(self, least: int) -> None:
        self._operand()
        while True:
            operation = "^" if self._peek() == "**" else self._peek()
            precedence = _PRECEDENCE.get(operation, 0) if operation in _BINARY else 0
            if precedence <= least:
                return
            self._take()
            self._expression(precedence - 1 if operation == "^" else precedence)
            self._out.append(operation)

    def _operand(self) -> None:
        symbol, position = self._take()
        if symbol == "(":
            self._expression(0)
            self._take(")")
        elif symbol in ("-", "+"):
            self._expression(_UNARY_PRECEDENCE)
            if symbol == "-":
                self._out.append("negate")
        elif symbol[0].isdigit() or symbol[0] == ".":
            self._out.append(_number(symbol))
        elif symbol == "x":
            self._out.append(symbol)
        elif symbol in _CONSTANTS:
            self._out.append(_CONSTANTS[symbol])
        elif symbol in _FUNCTIONS:
            self._take("(")
            for nth in range(_FUNCTIONS[symbol][0]):
                if nth:
                    self._take(",")
                self._expression(0)
            self._take(")")
            self._out.append(symbol)
        else:
            known = ", ".join(("x", *_CONSTANTS, *_FUNCTIONS))
            raise self._error(position, f"expected a number, a bracket or one of {known}")

    def _error(self, position: int, what: str) -> DatabaseError:
        return DatabaseError(f"{self._text[:80]!r} at character {position + 1}: {what}")


def _number(text: str) -> int | float:
    number = int(text) if text.isdigit() and len(text) < len(f"{MAX_NUMBER:.0f}") else float(text)
    return min(number, math.inf)


def check(program: Program) -> Program:
    """The program, if it is one.

    Raises:
        DatabaseError: an unknown operation, a number without bound, or operands that do not fit.
    """
    if len(program) > MAX_TOKENS:
        raise DatabaseError(f"a program of {len(program)} steps is longer than the limit of {MAX_TOKENS}")
    depth = 0
    for symbol in program:
        if isinstance(symbol, str):
            arity = 0 if symbol == "x" else _ARITY.get(symbol, -1)
            if arity < 0 or depth < arity:
                raise DatabaseError(f"{symbol[:20]!r} is no operation on {depth} numbers")
            depth -= arity
        elif type(symbol) not in (int, float) or not abs(symbol) <= MAX_NUMBER:
            raise DatabaseError(f"expected a number of at most {MAX_NUMBER:g}, found {symbol!r}")
        depth += 1
    if depth != 1:
        raise DatabaseError(f"a program leaves one number, this one leaves {depth}")
    return program


def compiled(program: Program) -> Callable[[float], int | float | None]:
    """A function of `x`; it returns None where the arithmetic has no finite result.

    Raises:
        DatabaseError: as `check`.
    """
    lines: list[str] = []
    stack: list[str] = []
    for symbol in check(program):
        if symbol == "x":
            stack.append("x")
            continue
        if not isinstance(symbol, str):
            stack.append(repr(symbol))
            continue
        operands = [stack.pop() for _ in range(_ARITY[symbol])][::-1]
        name = f"t{len(lines)}"
        if symbol == "^":
            expression = f"pow({operands[0]}, {operands[1]})"
        elif symbol == "negate":
            expression = f"-{operands[0]}"
        elif symbol in _BINARY:
            expression = f"{operands[0]} {symbol} {operands[1]}"
        else:
            expression = f"{symbol}({', '.join(operands)})"
        lines.append(f"        {name} = {expression}")
        stack.append(name)
    source = "\n".join(
        (
            "def f(x):",
            "    try:",
            *lines,
            f"        return {stack[0]} if isfinite({stack[0]}) else None",
            "    except (ArithmeticError, ValueError):",
            "        return None",
        )
    )
    names: dict[str, object] = {name: function for name, (_, function) in _FUNCTIONS.items()}
    names |= {
        "__builtins__": {},
        "isfinite": math.isfinite,
        "ArithmeticError": ArithmeticError,
        "ValueError": ValueError,
    }
    exec(compile(source, "<arithmetic>", "exec"), names)  # noqa: S102 (made of checked numbers and own names)
    function = names["f"]
    assert callable(function)
    return function
