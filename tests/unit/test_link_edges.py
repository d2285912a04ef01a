"""The link against clouds that are wrong, silent, rude, or not there."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.edge_cloud import (
    DEADLINE_S,
    Dice,
    authority,
    deaf_server,
    issue,
    linked,
    serve,
)

from agent.adapters import link as link_module
from agent.adapters.link import MAX_MESSAGE_BYTES, enroll, read_ca
from agent.errors import TransportError
from agent.events import UpdateArrived, UsageRefused
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

STOP_S = 2.0


def wait_for_end(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
    for _ in requests:
        pass
    yield from ()


def end_at_once(_requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
    yield from ()


def say(*messages: bytes) -> Any:
    def answer(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        yield from messages
        for _ in requests:
            pass

    return answer


def test_stream_opens_over_mutual_tls_and_carries_messages() -> None:
    refusal = pb.ConnectResponse()
    refusal.usage_refusal.error_type = "ChainError"
    update = pb.ConnectResponse()
    update.trust_update.SetInParent()
    messages = (refusal.SerializeToString(), update.SerializeToString())
    with serve(say(*messages)) as port, linked(port) as (_, listener):
        listener.up()
        assert listener.next() == UsageRefused("ChainError", "", 0)
        assert isinstance(listener.next(), UpdateArrived)


def test_server_of_another_ca_is_refused_and_told_so() -> None:
    stranger = issue("localhost", issue("another CA"), ip="127.0.0.1")
    with serve(wait_for_end, stranger) as port, linked(port) as (_, listener):
        reason = listener.down().reason
    assert f"127.0.0.1:{port}" in reason
    assert "not from the CA in cloud.root_ca" in reason


def test_server_of_another_name_is_refused_and_told_so() -> None:
    other = issue("other.example", authority())
    with serve(wait_for_end, other) as port, linked(port, name="localhost") as (_, listener):
        reason = listener.down().reason
    assert "another name; see cloud.server_name" in reason


def test_server_without_tls_is_refused_and_there_is_no_fallback() -> None:
    seen: list[bytes] = []

    def listen(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        seen.extend(requests)
        yield from ()

    with serve(listen, with_tls=False) as port, linked(port) as (link, listener):
        reason = listener.down().reason
        link.send(pb.ConnectRequest(hello=pb.Hello(nonce=b"x")))
        assert "does not speak TLS" in reason
    assert seen == []


def test_ca_that_is_no_certificate_is_refused() -> None:
    with serve(wait_for_end) as port, linked(port, roots=lambda: (b"no certificate",)) as (_, listener):
        assert listener.down().reason


def test_nobody_there_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    begin = time.monotonic()
    with linked(port) as (_, listener):
        assert "nothing listens there" in listener.down().reason
    assert time.monotonic() - begin < DEADLINE_S / 2


def test_stop_is_prompt_while_a_deaf_server_is_connected() -> None:
    with deaf_server() as port, linked(port) as (link, _):
        begin = time.monotonic()
        link.stop()
        assert time.monotonic() - begin < STOP_S
        assert not link._thread.is_alive()


def test_deaf_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "CONNECT_S", 0.3)
    with deaf_server() as port, linked(port) as (_, listener):
        assert "no connection within" in listener.down().reason


def test_stop_is_prompt_while_the_cloud_says_nothing_and_while_waiting() -> None:
    with serve(wait_for_end) as port, linked(port) as (link, listener):
        listener.up()
        begin = time.monotonic()
        link.stop()
        assert time.monotonic() - begin < STOP_S
        assert not link._thread.is_alive()
    dice = Dice()
    dice.wanted = 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with linked(port, dice=dice) as (link, listener):
        listener.down()
        assert dice.enough.wait(DEADLINE_S)
        begin = time.monotonic()
        link.stop()
        assert time.monotonic() - begin < STOP_S
        assert not link._thread.is_alive()


def test_backoff_grows_with_jitter_when_each_stream_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "BACKOFF_MOST_S", 3.0)
    dice = Dice()
    dice.wanted = 5
    with serve(end_at_once) as port, linked(port, dice=dice) as (_, listener):
        assert dice.enough.wait(DEADLINE_S)
        for _ in range(3):
            listener.up()
            assert listener.down().reason == "the cloud ended the stream"
    assert dice.bounds == [0.5, 1, 2, 3, 3]


def test_backoff_begins_anew_once_the_cloud_has_spoken() -> None:
    def speak_and_end(_requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        yield pb.ConnectResponse().SerializeToString()

    dice = Dice()
    dice.wanted = 3
    with serve(speak_and_end) as port, linked(port, dice=dice):
        assert dice.enough.wait(DEADLINE_S)
    assert dice.bounds == [0.5] * 3


def test_garbage_and_oversized_messages_end_the_stream_in_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    for message, words in ((b"\xff" * 20, "INTERNAL"), (bytes(MAX_MESSAGE_BYTES + 1), "RESOURCE_EXHAUSTED")):
        with serve(say(message)) as port, linked(port) as (_, listener):
            listener.up()
            assert words in listener.down().reason


def test_cloud_that_does_not_read_is_given_up_and_the_link_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_WAITING", 10)
    block = threading.Event()

    def ignore(_requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        block.wait(DEADLINE_S)
        yield from ()

    big = pb.ConnectRequest()
    big.usage.batch = bytes(200_000)
    with serve(ignore) as port, linked(port) as (link, listener):
        listener.up()
        for _ in range(500):
            link.send(big)
        assert "CANCELLED" in listener.down().reason
        listener.up()
        begin = time.monotonic()
        link.stop()
        assert time.monotonic() - begin < STOP_S
        block.set()


def test_sending_without_a_stream_is_harmless() -> None:
    with deaf_server() as port, linked(port) as (link, _):
        link.send(pb.ConnectRequest())
        link.stop()
        link.send(pb.ConnectRequest())
        link.stop()


def test_stop_before_start_is_harmless_and_prompt() -> None:
    with deaf_server() as port, linked(port) as (link, _):
        link.stop()
        link.stop()


def refused_enrolment(port: int, words: str) -> None:
    with pytest.raises(TransportError, match=words):
        enroll(f"127.0.0.1:{port}", authority().pem, "", pb.EnrollRequest(vin="WFDSEAT10N0000001"))


def test_enrolment_fails_in_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    refused_enrolment(port, "nothing listens there")
    with serve(wait_for_end, issue("localhost", issue("other"), ip="127.0.0.1")) as port:
        refused_enrolment(port, "not from the CA")
    with serve(wait_for_end, with_tls=False) as port:
        refused_enrolment(port, "does not speak TLS")


def test_missing_ca_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(TransportError, match=r"ca\.crt cannot be read: No such file"):
        read_ca(tmp_path / "ca.crt")
