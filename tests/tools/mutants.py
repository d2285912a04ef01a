"""Mutation testing: changes one thing of a module at a time, and asks the tests whether they notice.

    python -m tools.mutants [--only FILE] [--sample N] [--json]

A mutant that no test notices survives. A survivor is a missing test, or a change of nothing that is
decided; those of the second kind are listed in tests/mutants.toml with the reason. Exit 1 on a survivor
that is not listed, and on a listed one that does not survive any more.

How: tests are collected once, and once run under a line tracer, which tells the tests that reach each
line, and their time. For each mutant a forked child puts the changed code into the living functions and
runs those tests, the shortest first, until one fails. What runs at import (constants, defaults, classes)
is changed in a child that has loaded only third-party packages, and imports the rest anew.

Limits: error texts and log lines are not mutated. Files must not change during a run. A result is kept
(.cache/mutants) until the module changes, or the test that killed the mutant, or any test if none did;
what else they import does not count, so `--fresh` is for nightly runs.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import gc
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest

from common.config import ConfigError, option, read

ROOT = Path(__file__).parents[2]
LISTED = ROOT / "tests/mutants.toml"
KEPT = ROOT / ".cache/mutants/results.json"
LOG = ROOT / ".cache/mutants/log"

GUARD_TESTS = ("tests/*/test_guard*.py", "tests/properties/test_uds_fuzz.py")
TRUST_TESTS = (
    "tests/*/test_trust_*.py",
    "tests/*/test_tuf_*.py",
    "tests/*/test_uptane_*.py",
    "tests/attacks/test_clock_*.py",
    "tests/attacks/test_disk_*.py",
    "tests/attacks/test_import_*.py",
    "tests/attacks/test_former_owner.py",
    "tests/*/test_expiry.py",
    "tests/*/test_floors.py",
    "tests/*/test_grant_log*.py",
    "tests/vectors/test_agent_token_vectors.py",
    "tests/vectors/test_catalogue_vectors.py",
)
MODULES = {
    "agent/features/guard.py": GUARD_TESTS,
    **{str(path.relative_to(ROOT)): TRUST_TESTS for path in sorted((ROOT / "agent/trust").glob("[!_]*.py"))},
}
"""What is mutated, and the tests that may notice."""

SLACK_S = 5.0
"""Processor time that a mutant gets beyond five times that of its tests; one that takes more is noticed."""
PATIENCE_S = 60.0
"""Time that it gets beyond ten times that, if it waits instead of working."""
MAX_MEMORY_BYTES = 8 * 2**30
"""Address space of a child: a mutant may build up data without end."""
COLD_TEST_S = 120.0
"""Time for the tests of a mutant that is imported anew."""

# --- what is changed ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change.

    Args:
        index: which of the module's changes, in order of the text.
        function: outermost function or method around it; "" at module or class level.
        lines: first and last line of the change, and first line of its statement.
        change: before and after, as in tests/mutants.toml.
        occurrence: from 1, among equal changes of this function.
    """

    index: int
    file: str
    function: str
    lines: tuple[int, int, int]
    change: str
    occurrence: int

    @property
    def key(self) -> str:
        """Names the mutant as long as its function's text keeps its order."""
        return f"{self.file} {self.function or '(module)'}: {self.change} #{self.occurrence}"


_OPPOSITE: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.FloorDiv,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitXor: (ast.BitOr,),
}
_TWINS = {"min": "max", "max": "min", "any": "all", "all": "any", "startswith": "endswith"}
_BY_KEY = {"get", "pop", "setdefault", "startswith", "endswith", "removeprefix", "removesuffix", "partition"}
"""Methods whose first text decides something; other texts are for people."""
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_HOLDERS = (
    *(ast.expr, ast.keyword, ast.arguments, ast.pattern),
    *(ast.Return, ast.Assign, ast.AugAssign, ast.AnnAssign),
)
"""What shows a constant of its own with a little of what is around it."""

Change = tuple[ast.AST, str, object, str]
"""A node, the field of it that is changed (with an index in a list), its new value, and how it reads."""


def changes(tree: ast.Module) -> Iterator[tuple[Change, str, ast.stmt]]:
    """Yield every change of a module, with its outermost function and its statement."""
    for statement in tree.body:
        yield from _of_statement(statement, "", in_function=False)


def _of_statement(
    statement: ast.stmt, where: str, *, in_function: bool
) -> Iterator[tuple[Change, str, ast.stmt]]:
    if isinstance(statement, ast.Import | ast.ImportFrom) or _is_for_people(statement):
        return
    if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
        return
    inner = where
    outer = where if in_function else ""
    if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)) and not in_function:
        inner = f"{where}.{statement.name}" if where else statement.name
    for field, value in ast.iter_fields(statement):
        is_body = isinstance(value, list) and value and isinstance(value[0], ast.stmt)
        if is_body:
            within = in_function or isinstance(statement, _FUNCTIONS)
            for index, child in enumerate(value):
                for change in _removed(child, statement, f"{field}[{index}]"):
                    yield change, inner if within else "", child
                yield from _of_statement(child, inner, in_function=within)
            continue
        if field in {"annotation", "returns", "decorator_list"}:
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.ExceptHandler | ast.match_case):
                for index, child in enumerate(part.body):
                    for change in _removed(child, part, f"body[{index}]"):
                        yield change, inner, child
                    yield from _of_statement(child, inner, in_function=in_function)
                yield from ((c, outer, statement) for c in _of_node(part))
            elif isinstance(part, ast.AST) and not isinstance(statement, ast.Raise):
                yield from ((c, outer, statement) for c in _of_node(part))
    yield from ((c, outer, statement) for c in _of_this(statement))
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        if not (in_function and isinstance(target, ast.Name)):  # mostly part of an error's text
            yield from ((c, outer, statement) for c in _text(statement, "value"))


def _is_for_people(statement: ast.stmt) -> bool:
    """Docstrings and log lines decide nothing."""
    if not isinstance(statement, ast.Expr):
        return False
    text = ast.unparse(statement.value)
    return isinstance(statement.value, ast.Constant) or text.startswith(("_log.", "log."))


def _removed(statement: ast.stmt, parent: ast.AST, field: str) -> Iterator[Change]:
    """A check that is not made, an error that is not raised, a state that is not kept."""
    is_kept = isinstance(statement, ast.Assign) and isinstance(
        statement.targets[0], ast.Attribute | ast.Subscript
    )
    is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    jumps = isinstance(statement, ast.Break | ast.Continue)
    if is_kept or isinstance(statement, ast.Raise | ast.AugAssign) or jumps or is_call:
        if _is_for_people(statement):
            return
        yield parent, field, ast.copy_location(ast.Pass(), statement), f"{_short(statement)} → pass"
    if isinstance(statement, ast.Break):
        new: ast.stmt = ast.copy_location(ast.Continue(), statement)
        yield parent, field, new, "break → continue"
    if isinstance(statement, ast.Continue):
        yield parent, field, ast.copy_location(ast.Break(), statement), "continue → break"


def _of_node(node: ast.AST) -> Iterator[Change]:
    """Changes of an expression (or of a handler's or a case's head) and of all in it."""
    if isinstance(node, ast.JoinedStr | ast.stmt):
        return
    yield from _of_this(node)
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "body"} and isinstance(node, ast.ExceptHandler | ast.match_case | ast.arg):
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from _of_node(part)


def _of_this(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, _HOLDERS):
        yield from _of_constants(node)
    match node:
        case ast.Compare(ops=ops):
            for index, operator in enumerate(ops):
                for opposite in _OPPOSITE[type(operator)]:
                    yield _changed(node, f"ops[{index}]", opposite())
            for side in ("left", *(f"comparators[{i}]" for i in range(len(node.comparators)))):
                yield from _text(node, side)
        case ast.BoolOp(values=values):
            yield _changed(node, "op", _OPPOSITE[type(node.op)][0]())
            for index in range(len(values)):
                rest = [v for i, v in enumerate(values) if i != index]
                whole = rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
                yield _changed(node, "", None, whole=whole)
        case ast.UnaryOp(op=ast.Not()):
            yield _changed(node, "", None, whole=ast.Call(ast.Name("bool", ast.Load()), [node.operand], []))
        case ast.UnaryOp(op=ast.USub()):
            yield _changed(node, "op", ast.UAdd())
        case ast.BinOp(op=operator) if type(operator) in _OPPOSITE:
            yield _changed(node, "op", _OPPOSITE[type(operator)][0]())
        case ast.AugAssign(op=operator) if type(operator) in _OPPOSITE:
            yield _changed(node, "op", _OPPOSITE[type(operator)][0]())
        case ast.Dict(keys=keys):
            for index in range(len(keys)):
                yield from _text(node, f"keys[{index}]")
        case ast.Set(elts=elements) | ast.Tuple(elts=elements) | ast.List(elts=elements):
            for index in range(len(elements)):
                yield from _text(node, f"elts[{index}]")
        case ast.Subscript():
            yield from _text(node, "slice")
        case ast.MatchValue():
            yield from _text(node, "value")
        case ast.Call():
            yield from _of_call(node)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant):
                yield _changed(node, "test", ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=filters):
            for index in range(len(filters)):
                yield _changed(node, f"ifs[{index}]", ast.Constant(True))
        case ast.Return(value=value) if value is not None and ast.unparse(value) != "None":
            if not isinstance(value, ast.Constant):
                yield _changed(node, "value", ast.Constant(None))
        case ast.ExceptHandler(type=ast.Tuple(elts=elements)):
            for index, element in enumerate(elements):
                others = ast.Tuple([e for i, e in enumerate(elements) if i != index], ast.Load())
                yield node, "type", others, f"except {ast.unparse(element)} → not caught"


def _of_constants(node: ast.AST) -> Iterator[Change]:
    for field, value in ast.iter_fields(node):
        for index, part in enumerate(value if isinstance(value, list) else [value]):
            place = f"{field}[{index}]" if isinstance(value, list) else field
            match part:
                case ast.Constant(value=bool() as constant):
                    yield _changed(node, place, ast.Constant(not constant))
                case ast.Constant(value=int() as constant):
                    yield _changed(node, place, ast.Constant(constant + 1))
                    yield _changed(node, place, ast.Constant(constant - 1))
                case ast.Constant(value=bytes() as constant):
                    yield _changed(node, place, ast.Constant(constant + b"\x00"))


def _of_call(call: ast.Call) -> Iterator[Change]:
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name in _TWINS:
        field = "func.id" if isinstance(call.func, ast.Name) else "func.attr"
        yield _changed(call, field, _TWINS[name])
    if name in _BY_KEY and call.args:
        yield from _text(call, "args[0]")
    arguments = call.args
    if len(arguments) > 1 and not any(isinstance(a, ast.Starred) for a in arguments):
        if ast.dump(arguments[0]) != ast.dump(arguments[1]) and name not in {"min", "max"}:
            yield _changed(call, "args", [arguments[1], arguments[0], *arguments[2:]])
        if name not in {"to_bytes", "from_bytes"}:  # big-endian is Python's own default
            yield _changed(call, "args", arguments[:-1])
    for index, keyword in enumerate(call.keywords):
        if keyword.arg is not None and ast.unparse(keyword) != "strict=False":  # Python's own default
            yield _changed(call, "keywords", [k for i, k in enumerate(call.keywords) if i != index])


def _text(node: ast.AST, field: str) -> Iterator[Change]:
    found = _get(node, field)
    if isinstance(found, ast.Constant) and isinstance(found.value, str):
        yield _changed(node, field, ast.Constant(found.value + "~"))


def _changed(node: ast.AST, field: str, value: object, *, whole: ast.expr | None = None) -> Change:
    """Describe a change of a field; `whole` stands for the node itself where a field cannot say it."""
    if whole is not None:
        return node, "", whole, f"{_short(node)} → {_short(whole)}"
    after = copy.deepcopy(node)
    _set(after, field, copy.deepcopy(value))
    return node, field, value, f"{_short(node)} → {_short(after)}"


def _short(node: ast.AST) -> str:
    if isinstance(node, ast.If | ast.While):
        node = node.test
    if isinstance(node, ast.comprehension):
        node = ast.GeneratorExp(ast.Name("…"), [node])
    text = " ".join(ast.unparse(ast.fix_missing_locations(node)).split())
    return text if len(text) <= 160 else f"{text[:150]}… {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _get(node: ast.AST, field: str) -> object:
    value: Any = node
    for part in field.split("."):
        name, _, index = part.partition("[")
        value = getattr(value, name)
        value = value[int(index[:-1])] if index else value
    return value


def _set(node: ast.AST, field: str, value: object) -> None:
    *path, last = field.split(".")
    holder: Any = _get(node, ".".join(path)) if path else node
    name, _, index = last.partition("[")
    if index:
        getattr(holder, name)[int(index[:-1])] = value
    else:
        setattr(holder, name, value)


class Module:
    """A module's text, and all that may be changed in it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        self._changes = list(changes(self._tree))
        self.mutants = list(self._mutants())

    def _mutants(self) -> Iterator[Mutant]:
        seen: Counter[tuple[str, str]] = Counter()
        for index, ((node, _, _, text), function, statement) in enumerate(self._changes):
            seen[function, text] += 1
            first = last = statement.lineno
            if isinstance(node, ast.expr | ast.keyword | ast.pattern):
                first, last = node.lineno, node.end_lineno or node.lineno
            lines = (first, last, statement.lineno)
            yield Mutant(index, self.file, function, lines, text, seen[function, text])

    def uses(self, mutant: Mutant) -> tuple[str, set[int]] | None:
        """Say what a change at import can reach: the name of a constant ("": none), and lines.

        None if that cannot be told: a class, or what other constants are made of.
        """
        statement = self._changes[mutant.index][2]
        if isinstance(statement, _FUNCTIONS):  # a default
            return "", set(range(statement.lineno, (statement.end_lineno or 0) + 1))
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if statement not in self._tree.body or not isinstance(target, ast.Name):
            return None
        lines: set[int] = set()
        for top in self._tree.body:
            found = {
                node.lineno for node in ast.walk(top) if isinstance(node, ast.Name) and node.id == target.id
            }
            if top is statement or not found:
                continue
            if not isinstance(top, _FUNCTIONS) or min(found) < top.body[0].lineno:  # used at import
                return None
            lines |= found
        return target.id, lines

    def compile(self, mutant: Mutant) -> CodeType:
        """Compile the module with one of its changes."""
        node, field, value, _ = self._changes[mutant.index][0]
        if not field:
            node, field = _place(self._tree, node)
        before = _get(node, field)
        _set(node, field, value)
        try:
            tree = ast.fix_missing_locations(self._tree)
            return compile(tree, str(ROOT / self.file), "exec", dont_inherit=True)
        finally:
            _set(node, field, before)


def _place(tree: ast.AST, wanted: ast.AST) -> tuple[ast.AST, str]:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is wanted:
                return parent, name
            for index, item in enumerate(value if isinstance(value, list) else ()):
                if item is wanted:
                    return parent, f"{name}[{index}]"
    raise LookupError(f"{ast.dump(wanted)} is not in its tree")


# --- children ----------------------------------------------------------------


class Verdicts:
    """Hears in a child whether a test has failed."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = f"import of {report.nodeid}"


@dataclasses.dataclass
class Child:
    """A forked process that tries one mutant."""

    mutant: Mutant
    pid: int
    pipe: int
    until_s: float


class Nursery:
    """Runs children, at most `places` at a time, and tells what became of them."""

    def __init__(self, places: int, tell: Callable[[Mutant, str], None]) -> None:
        self._places, self._tell = places, tell
        self._children: list[Child] = []

    def start(self, mutant: Mutant, limit_s: float, work: Callable[[], str]) -> None:
        """Start a child.

        Args:
            limit_s: processor time that it gets.
            work: returns the test that failed, or "".
        """
        while len(self._children) >= self._places:
            self._wait()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _be_child(reader, writer, limit_s, work)
        os.close(writer)
        until_s = time.monotonic() + PATIENCE_S + 10 * limit_s
        self._children.append(Child(mutant, pid, reader, until_s))

    def finish(self) -> None:
        """Wait for all children."""
        while self._children:
            self._wait()

    def _wait(self) -> None:
        soonest_s = min(child.until_s for child in self._children)
        ready, _, _ = select.select(
            [child.pipe for child in self._children], [], [], max(0.0, soonest_s - time.monotonic())
        )
        for child in list(self._children):
            late = time.monotonic() >= child.until_s
            if child.pipe not in ready and not late:
                continue
            said = os.read(child.pipe, 4096).decode(errors="replace") if child.pipe in ready else ""
            if late and not said:
                os.kill(child.pid, signal.SIGKILL)
            os.close(child.pipe)
            os.waitpid(child.pid, 0)
            self._children.remove(child)
            self._tell(child.mutant, said or "timeout")


def _be_child(reader: int, writer: int, limit_s: float, work: Callable[[], str]) -> None:
    """Never returns."""
    os.close(reader)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s) + 1, int(limit_s) + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    said = "killed"
    try:
        failed = work()
        said = f"killed by {failed}" if failed else "survived"
    except BaseException as error:  # noqa: BLE001 (whatever it is, the mutant was noticed)
        said = f"killed by {error!r}"
    finally:
        os.write(writer, said.encode()[:4000])
        os._exit(0)


# --- functions that are changed in place --------------------------------------


class WarmServer:
    """A pytest plugin: collects, runs the tests once under a tracer, then forks for each mutant."""

    def __init__(
        self,
        module: Module,
        todo: Sequence[Mutant],
        jobs: int,
        tell: Callable[[dict[str, object]], None],
    ) -> None:
        self._path = str(ROOT / module.file)
        self._module = module
        self._todo, self._jobs, self._tell = todo, jobs, tell
        self._item = ""
        self._reached: dict[str, set[int]] = defaultdict(set)
        self._seconds: dict[str, float] = {}
        self._verdicts = Verdicts()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        session.config.pluginmanager.register(self._verdicts)
        self._trace(session.items)
        self._tell({"loaded": _third_parties(), "tests": len(items), "seconds": sum(self._seconds.values())})
        if self._verdicts.failed:
            self._tell({"error": f"without any mutation, this fails already: {self._verdicts.failed}"})
            return True
        functions = _functions(self._path)
        nursery = Nursery(self._jobs, lambda m, said: self._tell({"index": m.index, "result": said}))
        for mutant in self._todo:
            try:
                patch = _patch(self._module, mutant, functions.get(mutant.function, []))
            except SyntaxError as error:
                self._tell({"index": mutant.index, "result": f"killed by the compiler: {error.msg}"})
                continue
            if patch is None:
                self._tell({"index": mutant.index, "result": "cold", "tests": self._tests_of_import(mutant)})
                continue
            names = self._tests_of(mutant)
            if not names:
                self._tell({"index": mutant.index, "result": "unreached"})
                continue
            chosen = [items[name] for name in names]
            limit_s = SLACK_S + 5 * sum(self._seconds[name] for name in names)
            nursery.start(mutant, limit_s, lambda chosen=chosen, patch=patch: self._try(chosen, patch))  # type: ignore[misc]
        nursery.finish()
        return True

    def _trace(self, items: Sequence[pytest.Item]) -> None:
        """Run every test once, and note the lines of the module that it reaches."""

        def local(frame: FrameType, event: str, _argument: object) -> Any:
            if event == "line":
                self._reached[self._item].add(frame.f_lineno)
            return local

        def called(frame: FrameType, _event: str, _argument: object) -> Any:
            return local if frame.f_code.co_filename == self._path else None

        for item, following in zip(items, [*items[1:], None], strict=True):
            self._item = item.nodeid
            _empty_caches()
            begun_s = time.process_time()
            threading.settrace(called)
            sys.settrace(called)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.settrace(None)
            threading.settrace(None)
            self._seconds[item.nodeid] = time.process_time() - begun_s

    def _tests_of(self, mutant: Mutant) -> list[str]:
        first, last, statement = mutant.lines
        wanted = {statement, *range(first, last + 1)}
        found = [name for name in self._seconds if self._reached[name] & wanted]
        return sorted(found, key=lambda name: self._seconds[name])

    def _tests_of_import(self, mutant: Mutant) -> list[str]:
        everything = sorted(self._seconds, key=lambda name: self._seconds[name])
        uses = self._module.uses(mutant)
        if uses is None:
            return everything
        constant, lines = uses
        word = re.compile(rf"\b{constant}\b")
        users = [
            path for path in (ROOT / "agent").rglob("*.py") if constant and word.search(path.read_text())
        ]
        if any(str(path) != self._path for path in users):
            return everything
        named = {path.name for path in tests_of(mutant.file) if constant and word.search(path.read_text())}
        return [
            name
            for name in everything
            if self._reached[name] & lines or Path(name.partition("::")[0]).name in named
        ]

    def _try(self, items: Sequence[pytest.Item], patch: Callable[[], None]) -> str:
        patch()
        for item, following in zip(items, [*items[1:], None], strict=True):
            _empty_caches()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if self._verdicts.failed:
                return self._verdicts.failed
        return ""


def _empty_caches() -> None:
    """Forget what cached functions returned: a test that reads it runs no line, and notices no change."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("agent.", "common.")):
            for thing in list(vars(module).values()):
                if hasattr(thing, "cache_clear"):
                    thing.cache_clear()


def _functions(path: str) -> dict[str, list[FunctionType]]:
    """All living functions of a file, by qualified name, however they are wrapped."""
    found: dict[str, list[FunctionType]] = defaultdict(list)
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and thing.__code__.co_filename == path:
            found[thing.__code__.co_qualname].append(thing)
    return found


def _patch(module: Module, mutant: Mutant, functions: Sequence[FunctionType]) -> Callable[[], None] | None:
    """Return what puts the changed code into the functions; None if that cannot be done."""
    codes = [c for c in _codes(module.compile(mutant)) if c.co_qualname == mutant.function]
    if len(codes) != 1 or not functions:
        return None
    (code,) = codes
    if any(function.__code__.co_freevars != code.co_freevars for function in functions):
        return None

    def patch() -> None:
        for function in functions:
            function.__code__ = code

    return patch


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _third_parties() -> list[str]:
    """What is loaded and does not depend on this project, but for its generated code."""
    found = []
    for name, module in list(sys.modules.items()):
        origin = getattr(getattr(module, "__spec__", None), "origin", None) or ""
        inside = origin.startswith(str(ROOT)) and "/.venv/" not in origin
        if name != "__main__" and not inside and not name.startswith(("support", "tools", "vectors")):
            found.append(name)
    return found


# --- what is imported anew -----------------------------------------------------


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module with a change."""

    def __init__(self, module: Module, mutant: Mutant) -> None:
        self._module, self._mutant = module, mutant
        self._name = mutant.file.removesuffix(".py").replace("/", ".")

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=str(ROOT / self._mutant.file))

    def exec_module(self, module: ModuleType) -> None:
        exec(self._module.compile(self._mutant), module.__dict__)


def serve_cold(module: Module, job: dict[str, Any], tell: Callable[[dict[str, object]], None]) -> None:
    """Load third-party packages, then fork for each mutant and import the rest in the child."""
    for name in job["loaded"]:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 (names that only their package can import)
            continue
    nursery = Nursery(job["jobs"], lambda m, said: tell({"index": m.index, "result": said}))

    def work(mutant: Mutant, names: Sequence[str]) -> str:
        sys.meta_path.insert(0, Mutated(module, mutant))
        verdicts = Verdicts()
        # Without parameters: their names may come from the constant that has changed.
        tests = list(dict.fromkeys(name.partition("[")[0] for name in names))
        code = pytest.main([*tests, *_PYTEST_OPTIONS, "-x"], plugins=[verdicts])
        return verdicts.failed or (f"pytest ended with {code}" if code else "")

    for index, names in job["cold"].items():
        mutant = module.mutants[int(index)]
        if names:
            nursery.start(mutant, COLD_TEST_S, lambda m=mutant, n=names: work(m, n))  # type: ignore[misc]
        else:
            tell({"index": mutant.index, "result": "unreached"})
    nursery.finish()


_PYTEST_OPTIONS = (
    *("-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging"),
    *("-o", "timeout=0"),  # the child has a limit of its own
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)


def tests_of(file: str) -> list[Path]:
    """Return the test modules that may notice a change of this module."""
    return sorted({path for pattern in MODULES[file] for path in ROOT.glob(pattern)})


def serve() -> None:
    """Be a server: a job comes on standard input, results leave on standard output, line by line."""
    job = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 1)

    def tell(result: dict[str, object]) -> None:
        out.write(json.dumps(result) + "\n")
        out.flush()

    from hypothesis import Phase, settings

    # No shrinking: that a test fails is all that counts.
    settings.register_profile(
        "mutants", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate), deadline=None
    )
    settings.load_profile("mutants")
    module = Module(job["file"])
    if job["cold"]:
        serve_cold(module, job, tell)
    else:
        todo = [module.mutants[index] for index in job["warm"]]
        names = [str(path) for path in tests_of(job["file"])]
        code = pytest.main([*names, *_PYTEST_OPTIONS], plugins=[WarmServer(module, todo, job["jobs"], tell)])
        if code not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
            raise SystemExit(int(code))


# --- the run -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Listed:
    """A survivor that changes no decision."""

    file: str = option()
    function: str = option()
    change: str = option()
    reason: str = option(pattern=r"(?s).{20,}")
    occurrence: int = option(default=1, minimum=1)

    @property
    def key(self) -> str:
        """As `Mutant.key`."""
        return f"{self.file} {self.function}: {self.change} #{self.occurrence}"


@dataclasses.dataclass(frozen=True)
class ListedFile:
    """tests/mutants.toml."""

    survivors: tuple[Listed, ...] = ()


class Run:
    """Tries the mutants of several modules, and keeps the results."""

    def __init__(self, jobs: int, *, fresh: bool) -> None:
        self.jobs = jobs
        self.results: dict[str, str] = {}
        self._memory = Memory(forget=fresh)

    def module(self, file: str, chosen: Sequence[Mutant]) -> None:
        """Try mutants of one module."""
        digest = _digest(file, tests_of(file))
        known = {mutant.key: self._memory.result(mutant) for mutant in chosen}
        found = {key: result for key, result in known.items() if result}
        todo = {mutant.index: mutant for mutant in chosen if mutant.key not in found}
        _say(f"{file}: {len(chosen)} mutants, {len(found)} known")
        loaded: list[str] = []
        cold: dict[int, list[str]] = {}
        begun_s = time.monotonic()

        def note(result: dict[str, Any]) -> None:
            if "error" in result:
                raise SystemExit(f"{file}: {result['error']}")
            if "loaded" in result:
                loaded.extend(result["loaded"])
                _say(f"{file}: {result['tests']} tests take {result['seconds']:.1f} s under the tracer")
                return
            mutant = todo[result["index"]]
            if result["result"] == "cold":
                cold[mutant.index] = result["tests"]
                return
            found[mutant.key] = result["result"]
            if not _is_killed(result["result"]):
                _say(f"  {result['result']}: line {mutant.lines[0]}: {mutant.key}")

        LOG.parent.mkdir(parents=True, exist_ok=True)
        LOG.unlink(missing_ok=True)
        job: dict[str, Any] = {"file": file, "jobs": self.jobs, "warm": list(todo), "cold": {}}
        try:
            if todo:
                self._serve(job, note)
            if cold:
                _say(f"{file}: {len(cold)} of them are imported anew")
                self._serve({**job, "cold": cold, "loaded": loaded}, note)
        finally:
            is_same = _digest(file, tests_of(file)) == digest
            if is_same:
                self._memory.keep(file, found)
        if not is_same:
            raise SystemExit(f"{file} or one of its tests has changed during the run; run again")
        missing = [todo[index].key for index in todo if todo[index].key not in found]
        if missing:
            raise SystemExit(
                f"{file}: {len(missing)} mutants were not tried, the first is {missing[0]}; see {LOG}"
            )
        _say(f"{file}: done in {time.monotonic() - begun_s:.0f} s")
        self.results |= found

    @staticmethod
    def _serve(job: dict[str, object], note: Callable[[dict[str, Any]], None]) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "tools.mutants", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": "0"},
        ) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            json.dump(job, server.stdin)
            server.stdin.close()
            for line in server.stdout:
                note(json.loads(line))
        if server.returncode:
            raise SystemExit(f"the server of {job['file']} ended with {server.returncode}; see {LOG}")


class Memory:
    """Results of earlier runs, each with the digest of what it rests on."""

    def __init__(self, *, forget: bool) -> None:
        is_there = KEPT.exists() and not forget
        self._kept: dict[str, list[str]] = json.loads(KEPT.read_text()) if is_there else {}

    def result(self, mutant: Mutant) -> str | None:
        """Return what is known of a mutant, unless it may have changed since."""
        result, digest = self._kept.get(mutant.key, ("", ""))
        return result if result and digest == self._rests_on(mutant.file, result) else None

    def keep(self, file: str, found: dict[str, str]) -> None:
        """Store results of a module."""
        self._kept |= {key: [result, self._rests_on(file, result)] for key, result in found.items()}
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        KEPT.write_text(json.dumps(self._kept, indent=1))

    @staticmethod
    def _rests_on(file: str, result: str) -> str:
        """A mutant that one test kills stays killed whatever becomes of the other tests."""
        killer = re.match(r"killed by (tests/[^:]+\.py)::", result)
        if killer is None:
            return _digest(file, tests_of(file))
        return _digest(file, [ROOT / killer[1]]) if (ROOT / killer[1]).exists() else ""


def _digest(file: str, tests: Sequence[Path]) -> str:
    """Sum up a module, tests, their helpers and this tool."""
    paths = (ROOT / file, *tests, *sorted((ROOT / "tests/support").glob("*.py")), Path(__file__))
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


def _is_killed(result: str) -> bool:
    return result.startswith("killed") or result == "timeout"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(
    results: dict[str, str], everything: Sequence[Mutant], listed: dict[str, Listed], *, whole: bool
) -> dict[str, Any]:
    """Sum the results up, by module."""
    by_key = {mutant.key: mutant for mutant in everything}
    survivors = [key for key, result in results.items() if not _is_killed(result)]
    rows = {}
    for file in sorted({by_key[key].file for key in results}):
        of_file = [key for key in results if by_key[key].file == file]
        alive = [key for key in of_file if key in survivors]
        rows[file] = {
            "mutants": len(of_file),
            "killed": sum(results[key].startswith("killed") for key in of_file),
            "timeouts": sum(results[key] == "timeout" for key in of_file),
            "listed": sum(key in listed for key in alive),
            "survivors": sum(key not in listed for key in alive),
        }
    tried = {mutant.file for mutant in everything}
    stale = (
        [key for key, entry in listed.items() if entry.file in tried and key not in survivors]
        if whole
        else []
    )
    return {
        "files": rows,
        "unlisted": [
            {**dataclasses.asdict(by_key[key]), "result": results[key]}
            for key in survivors
            if key not in listed
        ],
        "stale": stale,
    }


def print_table(summary: dict[str, Any]) -> None:
    """Print the summary for people."""
    print(f"{'module':32} {'mutants':>8} {'killed':>8} {'timeouts':>8} {'listed':>8} {'survivors':>9}")
    for file, row in summary["files"].items():
        print(
            f"{file:32} "
            + " ".join(f"{row[name]:8}" for name in ("mutants", "killed", "timeouts", "listed")),
            end="",
        )
        print(f" {row['survivors']:9}")
    for found in summary["unlisted"]:
        print(f"\n[[survivors]]  # {found['result']}, line {found['lines'][0]}")
        for name in ("file", "function", "change", "occurrence"):
            value = found[name] or "(module)"
            print(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        print('reason = ""')
    for key in summary["stale"]:
        print(f"listed in {LISTED.name}, but does not survive: {key}")


def main() -> int:
    """Run; returns 1 if there is a survivor that is not listed."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=sorted(MODULES), help="a module; all if not given")
    parser.add_argument("--sample", type=int, default=0, help="try so many mutants, chosen by --seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants tried at a time")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    everything = [mutant for file in options.only or MODULES for mutant in Module(file).mutants]
    chosen = everything
    if options.sample:
        chosen = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    try:
        entries = read(LISTED, ListedFile).survivors if LISTED.exists() else ()
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    run = Run(options.jobs, fresh=options.fresh)
    for file in dict.fromkeys(mutant.file for mutant in chosen):
        run.module(file, [mutant for mutant in chosen if mutant.file == file])
    summary = report(
        run.results, everything, {entry.key: entry for entry in entries}, whole=not options.sample
    )
    if options.json:
        print(json.dumps(summary, indent=1))
    else:
        print_table(summary)
    return 1 if summary["unlisted"] or summary["stale"] else 0


if __name__ == "__main__":
    sys.exit(main())
