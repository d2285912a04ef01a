"""The feed's order and its consumer: real database, real HTTP receiver, every way in which it says no."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from support.cloud_world import ACCOUNT, JOURNAL, START_MS, VIN, chain, demo_keys
from support.receiver import Answer, Receiver, receiving
from urllib3.util import Timeout

from cloud.errors import ExportError, StartError
from cloud.export import consumer
from cloud.export.consumer import Consumer
from cloud.export.targets import FileTarget, HttpTarget, check_url, read_token
from cloud.store import EntitlementRow, Store, UsageRow

SOURCE = "veh-0123456789abcdef"
RIGHT = "ent-0123456789abcdef"


def open_store(folder: Path) -> Store:
    return Store(sa.make_url(f"sqlite:///{folder / 'cloud.db'}"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)

    def work(tx: Any) -> None:
        tx.add_vehicle(VIN, SOURCE, [], START_MS)
        tx.add_entitlement(
            EntitlementRow(RIGHT, VIN, "seat-heating", ACCOUNT, 1, b"", START_MS, 0, "", 1, START_MS)
        )

    opened.run_here(work)
    yield opened
    opened.close()


def add(
    store: Store, count: int, *, first: int = 1, source: str = SOURCE, journal: str = JOURNAL, **fields: Any
) -> None:
    contents = chain(source, count, first=first, **fields)
    rows = [UsageRow(journal, first + i, content, bytes(32)) for i, content in enumerate(contents)]
    store.run_here(lambda tx: tx.add_usage(source, rows, [1] * count, START_MS))


def working(
    store: Store,
    target: FileTarget | HttpTarget,
    *,
    name: str = "default",
    first: int | None = None,
    slept: list[float] | None = None,
    **options: Any,
) -> Consumer:
    to = f"file:{target.path}" if isinstance(target, FileTarget) else target.url
    options = {"batch": 10, "sleep": (slept if slept is not None else []).append, **options}
    row = consumer.begin(store, name, to, first, START_MS)
    return Consumer(store, row, target, random=Random(1).random, **options)


def drain(consumer_: Consumer) -> int:
    total = 0
    while count := consumer_.step():
        total += count
    return total


def seqs(receiver: Receiver) -> list[int]:
    return [event["data"]["seq"] for event in receiver.taken.values()]


def position(store: Store, name: str = "default") -> int:
    row = store.run_here(lambda tx: tx.consumer(name))
    assert row is not None
    return row.position


# --- order ---------------------------------------------------------------------


def test_places_have_no_hole_and_follow_seq_whenever_they_are_given(store: Store) -> None:
    add(store, 7)
    assert store.run_here(lambda tx: tx.number_usage(5)) == 5
    add(store, 3, source="veh-aaaa", journal="f" * 16)
    add(store, 4, first=8)
    while store.run_here(lambda tx: tx.number_usage(2)):
        pass
    rows = store.run_here(lambda tx: tx.feed(0, 100))
    assert [row.position for row in rows] == list(range(1, 15))
    mine = [
        json.loads(sent.content)["data"]["seq"]
        for sent in store.run_here(lambda t: consumer.read(t, 0, 100))
        if json.loads(sent.content)["source"] == SOURCE
    ]
    assert mine == list(range(1, 12))
    assert store.run_here(lambda tx: tx.number_usage(2)) == 0


def test_consumers_that_number_while_usage_comes_in_leave_no_hole(store: Store, tmp_path: Path) -> None:
    begin = threading.Barrier(4)
    seen: list[list[int]] = [[], []]

    def ingest(number: int) -> None:
        other = open_store(tmp_path)
        begin.wait(10)
        for block in range(20):
            add(other, 5, first=1 + 5 * block, source=f"veh-{number}", journal=f"{number:016x}")
        other.close()

    def read(into: list[int]) -> None:
        other = open_store(tmp_path)
        begin.wait(10)
        while len(into) < 200:
            into.extend(sent.position for sent in other.run_here(lambda tx: consumer.read(tx, len(into), 7)))
        other.close()

    threads = [threading.Thread(target=ingest, args=(n,)) for n in (1, 2)]
    threads += [threading.Thread(target=read, args=(into,)) for into in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert seen == [list(range(1, 201))] * 2


# --- HTTP ----------------------------------------------------------------------


def test_a_receiver_gets_each_event_once_in_order_with_openmeters_content_type(store: Store) -> None:
    add(store, 25)
    with receiving() as receiver:
        assert drain(working(store, HttpTarget(receiver.url, token="secret"))) == 25
    assert seqs(receiver) == list(range(1, 26))
    assert receiver.repeats == 0
    assert [len(events) for _, events in receiver.requests] == [10, 10, 5]
    headers = receiver.requests[0][0]
    assert headers["path"] == "/api/v1/events"
    assert headers["content-type"] == "application/cloudevents-batch+json"
    assert headers["authorization"] == "Bearer secret"
    assert {event["subject"] for event in receiver.taken.values()} == {ACCOUNT}
    assert position(store) == 25


def test_it_goes_on_where_it_stood_and_sends_what_came_since(store: Store) -> None:
    add(store, 5)
    with receiving() as receiver:
        drain(working(store, HttpTarget(receiver.url)))
        add(store, 5, first=6)
        assert drain(working(store, HttpTarget(receiver.url))) == 5
    assert seqs(receiver) == list(range(1, 11))
    assert receiver.repeats == 0


@pytest.mark.parametrize("status", [500, 502, 503, 408, 425, 429])
def test_a_busy_receiver_gets_the_same_again_after_a_wait(store: Store, status: int) -> None:
    add(store, 12)
    slept: list[float] = []

    def answer(number: int, _events: object) -> Answer:
        return Answer(status, takes=False) if number <= 4 else Answer()

    with receiving(answer) as receiver:
        drain(working(store, HttpTarget(receiver.url), slept=slept))
    assert seqs(receiver) == list(range(1, 13))
    assert receiver.raw[:4] == [receiver.raw[0]] * 4
    assert len(slept) == 4
    assert all(0 <= wait <= min(60, 2**n) for n, wait in enumerate(slept, start=1))


def test_a_receiver_that_takes_and_does_not_say_so_sees_the_same_bytes_again(store: Store) -> None:
    add(store, 30)

    def answer(number: int, _events: object) -> Answer:
        return {0: Answer(500), 1: Answer(hangs_up=True)}.get(number % 3, Answer())

    with receiving(answer) as receiver:
        drain(working(store, HttpTarget(receiver.url)))
    assert seqs(receiver) == list(range(1, 31))
    assert receiver.repeats > 0
    assert receiver.changed == []


def test_a_receiver_that_asks_for_time_gets_it(store: Store) -> None:
    add(store, 1)
    slept: list[float] = []
    wanted = ["17", "Thu, 01 Jan 1970 00:01:40 GMT", "99999999", "soon"]

    def answer(number: int, _events: object) -> Answer:
        if number > len(wanted):
            return Answer()
        return Answer(429, takes=False, headers={"Retry-After": wanted[number - 1]})

    with receiving(answer) as receiver:
        drain(working(store, HttpTarget(receiver.url, now_s=lambda: 50.0), slept=slept))
    assert slept[:3] == [17.0, 50.0, 3_600.0]
    assert slept[3] < 16


def test_a_receiver_that_is_not_there_or_too_slow_is_tried_again_and_given_up_when_asked(
    store: Store,
) -> None:
    add(store, 1)
    gone: list[float] = []
    with pytest.raises(ExportError, match="gave up after 3 tries"):
        drain(working(store, HttpTarget("http://127.0.0.1:9/api/v1/events"), attempts=3, slept=gone))
    assert len(gone) == 2
    held = threading.Event()

    def answer(number: int, _events: object) -> Answer:
        if number == 1:
            held.wait(5)
        return Answer()

    with receiving(answer) as receiver:
        target = HttpTarget(receiver.url, timeout=Timeout(connect=1, read=0.2))
        slow = working(store, target, name="slow", sleep=lambda _s: held.set())
        drain(slow)
    assert seqs(receiver) == [1]
    assert position(store, "slow") == 1


@pytest.mark.parametrize("status", [400, 422, 413])
def test_the_event_that_is_refused_is_named_and_nothing_behind_it_is_sent(store: Store, status: int) -> None:
    add(store, 25)

    def answer(_number: int, events: list[Any]) -> Answer:
        bad = any(event["data"]["seq"] == 14 for event in events)
        return Answer(status, takes=False, body=b"no such\nmeter") if bad else Answer()

    with receiving(answer) as receiver:
        target = HttpTarget(receiver.url)
        with pytest.raises(
            ExportError, match=rf"event {JOURNAL}/14 at position 14 is refused.*no such meter"
        ):
            drain(working(store, target))
        assert position(store) == 13
        assert seqs(receiver) == list(range(1, 14))
        drain(working(store, target, skip=True))
    assert sorted(seqs(receiver)) == [n for n in range(1, 26) if n != 14]
    aside = store.run_here(lambda tx: tx.events_set_aside())
    assert [(row.name, row.position) for row in aside] == [("default", 14)]
    assert "no such meter" in aside[0].reason


def test_a_receiver_that_refuses_everything_is_not_skipped_for_ever(store: Store) -> None:
    add(store, 150)
    with receiving(lambda _n, _e: Answer(400, takes=False)) as receiver:
        skipping = working(store, HttpTarget(receiver.url), skip=True)
        with pytest.raises(ExportError, match="more than 100 set aside"):
            drain(skipping)
    assert position(store) == 100


@pytest.mark.parametrize("status", [301, 307, 401, 403, 404, 405, 415])
def test_an_answer_about_how_we_ask_stops_and_skips_no_event(store: Store, status: int) -> None:
    add(store, 3)
    headers = {"Location": "http://127.0.0.1:9/"}
    with receiving(lambda _n, _e: Answer(status, takes=False, headers=headers)) as receiver:
        target = HttpTarget(receiver.url)
        with pytest.raises(ExportError, match=f"HTTP {status}.*check the URL and the token"):
            drain(working(store, target, skip=True))
    assert len(receiver.requests) == 1
    assert position(store) == 0


def test_nothing_is_sent_to_a_receiver_whose_certificate_does_not_verify(store: Store) -> None:
    add(store, 3)
    keys = demo_keys() / "keys"
    with receiving(tls=(keys / "tls/server.crt", keys / "tls/server.key")) as receiver:
        stranger = HttpTarget(receiver.url, token="secret")
        with pytest.raises(ExportError, match=r"(?i)certificate verify failed.*gave up after 2 tries"):
            drain(working(store, stranger, attempts=2))
        assert receiver.requests == []
        known = HttpTarget(receiver.url, token="secret", ca=keys / "public/tls-ca.crt")
        assert drain(working(store, known)) == 3
    with pytest.raises(ExportError, match="TLS cannot be switched off"):
        HttpTarget(receiver.url, ca=keys / "missing.crt")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/api/v1/events",
        "https://user:word@example.org/",
        "ftp://127.0.0.1/",
        "127.0.0.1:80",
        "http://localhost.example.org/",
        "https://",
        "",
    ],
)
def test_a_url_that_leaks_or_is_none_is_refused(url: str) -> None:
    with pytest.raises(ExportError, match="--to"):
        check_url(url)


@pytest.mark.parametrize("content", [b"", b"two words", b"a\nb", "é".encode(), b"x" * 8_193])
def test_a_file_without_a_token_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="expected one token"):
        read_token(path)
    path.write_bytes(b" om_123\n")
    assert read_token(path) == "om_123"


# --- replay, names ---------------------------------------------------------------


def test_a_replay_from_any_point_is_equal_to_the_byte(store: Store, tmp_path: Path) -> None:
    add(store, 23)
    drain(working(store, whole := FileTarget(tmp_path / "whole"), name="whole", batch=7))
    whole.close()
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    assert len(lines) == 23
    for first in range(1, 25):
        path = tmp_path / f"from-{first}"
        target = FileTarget(path)
        drain(working(store, target, name=f"from-{first}", first=first))
        target.close()
        assert path.read_bytes() == b"".join(lines[first - 1 :])
    with receiving() as receiver:
        target_ = HttpTarget(receiver.url)
        drain(working(store, target_))
        drain(working(store, target_, first=12))
    assert receiver.repeats == 12
    assert receiver.changed == []
    with pytest.raises(ExportError, match="holds positions 1 to 23"):
        working(store, target_, first=25)


def test_two_consumers_have_two_positions(store: Store, tmp_path: Path) -> None:
    add(store, 20)
    with receiving() as receiver:
        http = working(store, HttpTarget(receiver.url), name="biller")
        http.step()
        file = working(store, FileTarget(tmp_path / "usage"), name="archive")
        drain(file)
        assert (position(store, "biller"), position(store, "archive")) == (10, 20)
        drain(http)
    assert seqs(receiver) == list(range(1, 21))


def test_a_name_is_for_one_target_and_one_process(store: Store, tmp_path: Path) -> None:
    add(store, 20)
    with receiving() as receiver:
        first = working(store, HttpTarget(receiver.url))
        second = working(store, HttpTarget(receiver.url))
        with pytest.raises(ExportError, match="give another --name"):
            working(store, FileTarget(tmp_path / "usage"))
        first.step()
        with pytest.raises(ExportError, match="moved by another process"):
            second.step()
    assert position(store) == 10
    holder = FileTarget(tmp_path / "held")
    with pytest.raises(ExportError, match="another process exports into this file"):
        FileTarget(tmp_path / "held")
    holder.close()


# --- the file ------------------------------------------------------------------


def test_a_tail_that_was_torn_anywhere_is_cut_and_written_again(store: Store, tmp_path: Path) -> None:
    add(store, 20)
    path = tmp_path / "usage"
    target = FileTarget(path)
    half = working(store, target)
    half.step()
    done = path.stat().st_size
    row = store.run_here(lambda tx: tx.consumer("default"))
    assert row is not None
    # Killed after the file was written and before the position moved.
    target.append(done, store.run_here(lambda tx: consumer.read(tx, 10, 10)))
    target.close()
    whole = path.read_bytes()
    for torn in sorted({done, done + 1, len(whole) - 1, len(whole), *range(done, len(whole), 97)}):
        path.write_bytes(whole[:torn])
        target = FileTarget(path)
        working(store, target)
        assert path.read_bytes() == whole[:done]
        target.close()
    target = FileTarget(path)
    drain(working(store, target))
    target.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("change", ["longer", "shorter", "foreign"])
def test_a_file_that_somebody_changed_is_left_as_it_is(store: Store, tmp_path: Path, change: str) -> None:
    add(store, 5)
    path = tmp_path / "usage"
    if change != "foreign":
        target = FileTarget(path)
        drain(working(store, target))
        target.close()
    content = path.read_bytes() if path.exists() else b""
    changed = {"longer": content + b"x", "shorter": content[:-1], "foreign": b"my letters\n"}[change]
    path.write_bytes(changed)
    target = FileTarget(path)
    with pytest.raises(ExportError, match=r"was cut or replaced|are not ours"):
        working(store, target)
    target.close()
    assert path.read_bytes() == changed


def test_a_file_is_no_place_for_a_replay_of_what_it_holds(store: Store, tmp_path: Path) -> None:
    add(store, 5)
    target = FileTarget(tmp_path / "usage")
    drain(working(store, target))
    with pytest.raises(ExportError, match="each once"):
        working(store, target, first=1)
    target.close()


def test_a_full_disk_moves_nothing_and_the_next_start_goes_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, 20)
    path = tmp_path / "usage"
    target = FileTarget(path)
    exporting = working(store, target)
    exporting.step()
    real = __import__("os").pwrite

    def full(file: int, content: bytes, offset: int) -> int:
        if len(content) < 1_000:
            raise OSError(28, "No space left on device")
        return int(real(file, content[:1_000], offset))

    with monkeypatch.context() as patch:
        patch.setattr("cloud.export.targets.os.pwrite", full)
        with pytest.raises(ExportError, match="No space left"):
            exporting.step()
    target.close()
    assert position(store) == 10
    target = FileTarget(path)
    drain(working(store, target))
    target.close()
    lines: Sequence[bytes] = path.read_bytes().splitlines()
    assert [json.loads(line)["data"]["seq"] for line in lines] == list(range(1, 21))
    assert path.stat().st_mode & 0o777 == 0o600


# --- the database ----------------------------------------------------------------


def test_a_program_beside_the_server_makes_and_changes_no_schema(tmp_path: Path) -> None:
    url = sa.make_url(f"sqlite:///{tmp_path / 'cloud.db'}")
    with pytest.raises(StartError, match="no such database"):
        Store(url, serving=False)
    assert not (tmp_path / "cloud.db").exists()
    Store(url).close()
    with sa.create_engine(url).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0007'")
    with pytest.raises(StartError, match="database schema is 0007"):
        Store(url, serving=False)
