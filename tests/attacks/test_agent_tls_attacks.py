"""TLS by signed validity: real servers on loopback, and an agent that never falls back to anything weaker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.edge_cloud import DEADLINE_S, Pair, authority, issue, linked, serve

from agent.adapters.link import Link, server_roots
from agent.errors import NoValidAnchorError, TransportError
from agent.events import LinkDown
from agent.model import TlsAnchor
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

NOW_MS = 1_800_000_000_000
DAY_MS = 86_400_000


def listed(pair: Pair, begin_ms: int = NOW_MS - DAY_MS, end_ms: int = NOW_MS + DAY_MS) -> TlsAnchor:
    return TlsAnchor(pair.der, begin_ms, end_ms)


@dataclass
class Cloud:
    """A server that notes what it is told."""

    heard: list[bytes] = field(default_factory=list)
    told: threading.Event = field(default_factory=threading.Event)

    def answer(self, requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        for request in requests:
            self.heard.append(request)
            self.told.set()
            yield pb.ConnectResponse().SerializeToString()


@dataclass
class Knowledge:
    """What the agent knows: the signed anchors, and the trusted time."""

    anchors: tuple[TlsAnchor, ...]
    now_ms: int = NOW_MS

    def roots(self) -> tuple[bytes, ...]:
        return server_roots(self.anchors, authority().pem, self.now_ms)


def pinned() -> Pair:
    """A server's certificate of an authority that the agent's image does not know."""
    return issue("localhost", issue("an authority of its own"), ip="127.0.0.1")


def hello(link: Link) -> None:
    link.send(pb.ConnectRequest(hello=pb.Hello(nonce=bytes(16))))


def refused(server: Pair, known: Knowledge, words: str, *, with_tls: bool = True, name: str = "") -> None:
    """Asserts that the agent does not connect, says why, tries again, and tells the server nothing."""
    cloud = Cloud()
    with (
        serve(cloud.answer, server, with_tls=with_tls) as port,
        linked(port, roots=known.roots, name=name) as (link, listener),
    ):
        for _ in range(2):
            assert words in listener.down().reason
            hello(link)
    assert cloud.heard == []


def reached(server: Pair, known: Knowledge) -> None:
    cloud = Cloud()
    with serve(cloud.answer, server) as port, linked(port, roots=known.roots) as (link, listener):
        listener.up()
        hello(link)
        assert cloud.told.wait(DEADLINE_S)


def test_listed_leaf_is_reached_and_needs_no_authority() -> None:
    server = pinned()
    reached(server, Knowledge((listed(server),)))


def test_listed_authority_is_reached() -> None:
    own = issue("an authority of its own")
    reached(issue("localhost", own, ip="127.0.0.1"), Knowledge((listed(own),)))


def test_second_of_two_listed_is_reached() -> None:
    server = pinned()
    reached(server, Knowledge((listed(pinned()), listed(server))))


def test_without_a_list_the_authority_of_the_image_counts() -> None:
    reached(issue("localhost", authority(), ip="127.0.0.1"), Knowledge(()))


@pytest.mark.parametrize("make", [pinned, lambda: issue("localhost", authority(), ip="127.0.0.1")])
def test_server_that_is_not_listed_is_refused_even_under_the_authority_of_the_image(
    make: Callable[[], Pair],
) -> None:
    refused(make(), Knowledge((listed(pinned()),)), "the anchors that the director signed")


def test_server_with_a_listed_ones_name_but_another_key_is_refused() -> None:
    real = pinned()
    fake = issue("localhost", issue("an authority of its own"), ip="127.0.0.1")
    refused(fake, Knowledge((listed(real),)), "the anchors that the director signed")


def test_listed_server_of_another_name_is_refused() -> None:
    other = issue("other.example", issue("an authority of its own"))
    refused(other, Knowledge((listed(other),)), "another name", name="localhost")


def test_plain_text_server_is_refused() -> None:
    refused(pinned(), Knowledge((listed(pinned()),)), "does not speak TLS", with_tls=False)


@pytest.mark.parametrize(
    ("begin_ms", "end_ms"),
    [(NOW_MS - 2 * DAY_MS, NOW_MS - DAY_MS), (NOW_MS - DAY_MS, NOW_MS), (NOW_MS + 1, NOW_MS + DAY_MS)],
    ids=["ended", "ends now", "not yet valid"],
)
@pytest.mark.parametrize("under_image_ca", [False, True])
def test_server_outside_its_signed_validity_is_refused_with_no_fallback(
    begin_ms: int, end_ms: int, *, under_image_ca: bool
) -> None:
    server = issue("localhost", authority(), ip="127.0.0.1") if under_image_ca else pinned()
    refused(server, Knowledge((listed(server, begin_ms, end_ms),)), "fod-agent import")


def test_ended_server_is_refused_while_another_one_is_valid() -> None:
    server = pinned()
    known = Knowledge((listed(server, end_ms=NOW_MS), listed(pinned())))
    refused(server, known, "the anchors that the director signed")


def test_bytes_that_are_no_certificate_do_not_spoil_the_others_and_alone_are_none() -> None:
    server = pinned()
    garbage = TlsAnchor(b"\x30\x03\x02\x01\x00", NOW_MS - DAY_MS, NOW_MS + DAY_MS)
    reached(server, Knowledge((garbage, listed(server))))
    with pytest.raises(NoValidAnchorError):
        server_roots((garbage,), authority().pem, NOW_MS)
    assert issubclass(NoValidAnchorError, TransportError)  # retried


def test_open_connection_is_closed_when_its_validity_ends_and_not_opened_again() -> None:
    server, cloud = pinned(), Cloud()
    known = Knowledge((listed(server),))
    with serve(cloud.answer, server) as port, linked(port, roots=known.roots) as (link, listener):
        listener.up()
        known.now_ms = NOW_MS + DAY_MS - 1
        link.recheck()
        known.now_ms += 1
        link.recheck()
        assert "fod-agent import" in listener.down().reason
        assert "fod-agent import" in listener.down().reason
        hello(link)
    assert cloud.heard == []


def test_open_connection_is_closed_when_an_update_no_longer_lists_its_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    server, cloud = pinned(), Cloud()
    known = Knowledge((listed(server),))
    with serve(cloud.answer, server) as port, linked(port, roots=known.roots) as (link, listener):
        listener.up()
        known.anchors = (listed(pinned()),)
        link.recheck()
        assert "have changed" in listener.down().reason
        assert "the anchors that the director signed" in listener.down().reason
        known.anchors = (*known.anchors, listed(server))
        while isinstance(listener.next(), LinkDown):
            pass  # until the next try, which uses the new list
        hello(link)
        assert cloud.told.wait(DEADLINE_S)


def test_open_connection_goes_on_when_one_more_server_is_listed() -> None:
    server, cloud = pinned(), Cloud()
    known = Knowledge((listed(server),))
    with serve(cloud.answer, server) as port, linked(port, roots=known.roots) as (link, listener):
        listener.up()
        known.anchors = (*known.anchors, listed(pinned()))
        link.recheck()
        hello(link)
        assert cloud.told.wait(DEADLINE_S)


def test_connection_under_the_authority_of_the_image_ends_once_servers_are_listed() -> None:
    server, cloud = issue("localhost", authority(), ip="127.0.0.1"), Cloud()
    known = Knowledge(())
    with serve(cloud.answer, server) as port, linked(port, roots=known.roots) as (link, listener):
        listener.up()
        known.anchors = (listed(pinned()),)
        link.recheck()
        listener.down()
        assert "the anchors that the director signed" in listener.down().reason
