"""The local interface: private, never cached, and not held up by one client."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.adapters.local_api import MAX_BODY_BYTES, MAX_CLIENTS, MAX_SOCKET_PATH, LocalApi, ask, bring
from agent.errors import MalformedError, NotRunningError, TransportError


def take(content: bytes) -> dict[str, object]:
    """Takes only one file."""
    if content != b"rights":
        raise MalformedError(f"found {len(content)} bytes")
    return {"taken": True}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


@pytest.fixture
def api(path: Path) -> Iterator[LocalApi]:
    api = LocalApi(path, lambda: {"vin": "X", "signals": {"a": 1}}, take)
    yield api
    api.close()


def client(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(path))
    return connection


def exchange(path: Path, raw: bytes) -> http.client.HTTPResponse:
    with client(path) as connection:
        connection.sendall(raw)
        response = http.client.HTTPResponse(connection)
        response.begin()
        response.body = response.read()  # type: ignore[attr-defined]
        return response


@pytest.mark.usefixtures("api")
def test_status_is_answered_and_never_cached(path: Path) -> None:
    assert ask(path, "/v1/status") == {"vin": "X", "signals": {"a": 1}}
    response = exchange(path, b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (response.status, response.getheader("Cache-Control")) == (200, "no-store")
    assert response.getheader("Content-Type") == "application/json"


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/status/../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/status?x HTTP/1.1\r\n\r\n", 404),
        (b"POST /v1/status HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 404),
        (b"POST /v1/import HTTP/1.1\r\n\r\nhello", 411),
        (b"POST /v1/import HTTP/1.1\r\nContent-Length: -5\r\n\r\nhello", 411),
        (b"POST /v1/import HTTP/1.1\r\nContent-Length: 4194305\r\n\r\nhello", 413),
        (b"POST /v1/import HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nhello", 413),
        (b"POST /v1/import HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 422),
        (b"DELETE /v1/status HTTP/1.1\r\n\r\n", 501),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_all_else_is_refused_in_json_and_never_cached(path: Path, raw: bytes, status: int) -> None:
    response = exchange(path, raw)
    assert response.status == status
    assert response.getheader("Cache-Control") == "no-store"
    assert json.loads(response.body)["error"]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("api")
def test_file_of_rights_is_handed_on_and_its_refusal_handed_back(path: Path) -> None:
    assert bring(path, b"rights") == {"taken": True}
    assert bring(path, b"wrongs") == {"error": "MalformedError", "reason": "found 6 bytes"}
    assert bring(path, bytes(MAX_BODY_BYTES))["error"] == "MalformedError"
    with pytest.raises(TransportError):
        bring(path, bytes(MAX_BODY_BYTES + 1))


@pytest.mark.usefixtures("api")
def test_file_that_ends_early_is_not_handed_on(path: Path) -> None:
    with client(path) as connection:
        connection.sendall(b"POST /v1/import HTTP/1.1\r\nContent-Length: 100\r\n\r\nrights")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1000) == b""


def test_file_of_another_user_is_refused(path: Path, api: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    del api
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    own = os.getuid()
    if own == 0:  # root may: let the socket belong to a user who asks as another one
        monkeypatch.setattr(struct, "unpack", lambda *_: (1, 4243, 4243))
    with pytest.raises(TransportError, match="answered 403"):
        bring(path, b"rights")


def test_no_agent_at_the_socket_is_told_apart(path: Path) -> None:
    with pytest.raises(NotRunningError):
        bring(path, b"rights")
    with pytest.raises(NotRunningError):
        ask(path)


@pytest.mark.usefixtures("api")
def test_socket_is_private(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(path.stat().st_mode)


def test_end_removes_the_socket_and_asking_then_says_so(path: Path) -> None:
    LocalApi(path, dict, take).close()
    assert not path.exists()
    with pytest.raises(TransportError, match="no agent answers"):
        ask(path, "/v1/status")


def test_socket_that_a_crash_left_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    api = LocalApi(path, dict, take)
    assert ask(path, "/v1/status") == {}
    api.close()


def test_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(TransportError, match="is not a socket and is left alone"):
        LocalApi(path, dict, take)
    assert path.read_text() == "mine"


def test_path_that_is_too_long_or_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"at most 100 bytes; set state\.api_socket"):
        LocalApi(Path("/" + "x" * MAX_SOCKET_PATH), dict, take)
    with pytest.raises(TransportError, match="No such file"):
        LocalApi(Path("/tmp/no-such-folder-here/agent.sock"), dict, take)


@pytest.mark.usefixtures("api")
def test_silent_rude_and_vanished_clients_do_not_hold_up_the_others(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        for raw in (b"", b"GET /v1", b"\x00\xff" * 100 + b"\n", b"\n\n", b"GET /v1/status HTTP/1.1\r\n"):
            stack.enter_context(client(path)).sendall(raw)
        for _ in range(5):
            with client(path) as gone:
                gone.sendall(b"GET /v1/status HTTP/1.1\r\n\r\n")
        assert ask(path, "/v1/status")["vin"] == "X"
    assert "Traceback" not in capfd.readouterr().err


def test_number_of_clients_is_bounded_and_places_come_free(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = LocalApi(path, dict, take)
    with ExitStack() as stack:
        waiting = [stack.enter_context(client(path)) for _ in range(MAX_CLIENTS)]
        with client(path) as one_more:
            assert one_more.recv(1) == b""
        for connection in waiting[:2]:
            connection.sendall(b"GET /v1/status HTTP/1.1\r\n\r\n")
            while connection.recv(1000):
                pass
        assert ask(path, "/v1/status") == {}
    api.close()


def test_loop_that_does_not_answer_is_told(path: Path) -> None:
    def late() -> dict[str, object]:
        raise TimeoutError

    api = LocalApi(path, late, take)
    with pytest.raises(TransportError, match=r"answered 503: .*did not answer within"):
        ask(path, "/v1/status")
    api.close()


@pytest.mark.parametrize(
    "answer", [b"", b"garbage\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n[1]", b"HTTP/1.0 200 OK\r\n\r\n{"]
)
def test_answer_of_something_else_is_an_error_in_words(path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TransportError, match=str(path)):
            ask(path, "/v1/status")
        thread.join()
