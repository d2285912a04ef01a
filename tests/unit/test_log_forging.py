"""One record is one line, whatever is logged: nobody can forge a line or drive the terminal."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from common import cli, log

FORGED = "2026-01-01T00:00:00.000Z INFO    agent: all is well"
NASTY = [
    f"x\n{FORGED}",
    f"x\r{FORGED}",
    f"x\u2028{FORGED}",
    f"x\x85{FORGED}",
    "\x1b[2J\x1b[31m",
    "\x00\x7f\x9b",
    "\ud800",
]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def said(capsys: pytest.CaptureFixture[str], form: str, message: str = "m", **fields: object) -> str:
    log.configure("debug", form)
    log.get("agent.test").info(message, **fields)
    return capsys.readouterr().err


def test_text_has_time_level_name_message_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, "text", "feature is on", feature="seat", after_ms=5, why="a b", empty="", käse="ä")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO    agent\.test: feature is on"
        r' feature=seat after_ms=5 why="a b" empty="" käse=ä\n',
        line,
    )


@pytest.mark.parametrize("text", NASTY)
def test_neither_message_nor_field_makes_a_second_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (said(capsys, "text", text), said(capsys, "text", "m", reason=text)):
        assert line.endswith("\n")
        assert line[:-1].isprintable()
        assert len(line.splitlines()) == 1


def test_a_value_cannot_pass_for_a_field_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "text", a='1 level="x"').endswith('m a="1 level=\\"x\\""\n')
    assert said(capsys, "text", a="b=c").endswith('m a="b=c"\n')


@pytest.mark.parametrize("form", ["text", "json"])
def test_trace_of_an_exception_cannot_pass_for_records(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", form)
    try:
        raise ValueError(f"bad\n{FORGED}")
    except ValueError:
        logging.getLogger("library").exception("failed\n%s", FORGED)
    first, *rest = capsys.readouterr().err.splitlines()
    assert FORGED not in first or form == "json" or "\\n" in first
    assert all(line.startswith("    ") for line in rest)
    assert bool(rest) is (form == "text")


@pytest.mark.parametrize("text", NASTY[:-1])
def test_json_gives_back_what_was_logged(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, "json", text, reason=text, count=3, data=b"\x01")
    assert len(line.splitlines()) == 1
    entry = json.loads(line)
    assert (entry["message"], entry["reason"], entry["count"], entry["level"]) == (text, text, 3, "info")
    assert entry["logger"] == "agent.test"


def test_field_cannot_replace_what_the_record_says_itself(capsys: pytest.CaptureFixture[str]) -> None:
    entry = json.loads(said(capsys, "json", level_="x", level="error", time="never", logger="other"))
    assert (entry["level"], entry["logger"]) == ("info", "agent.test")
    assert (entry["time_"], entry["logger_"]) == ("never", "other")


def test_json_has_no_number_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, "json", a=float("nan"), b=float("inf"), c=1.5)
    entry = json.loads(line, parse_constant=pytest.fail)
    assert (entry["a"], entry["b"], entry["c"]) == ("nan", "inf", 1.5)


def test_level_holds(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("warning", "text")
    logger = log.get("agent.test")
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    logger.error("d")
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["WARNING", "ERROR"]


@pytest.mark.parametrize("text", NASTY)
def test_tables_and_errors_reach_the_terminal_as_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_table(("a", "b"), [(text, 1)])
    assert cli.fail(text) == 1
    shown = capsys.readouterr()
    assert len(shown.out.split("\n")) == 4
    assert all(line.isprintable() for line in (shown.out + shown.err).split("\n"))
    assert all(line.startswith("error: ") for line in shown.err.splitlines())
