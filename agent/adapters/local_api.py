"""The agent's local interface: HTTP on a Unix socket that only its owner may open.

`GET /v1/status` answers what `fod-agent status` shows. The answer is made by
the agent's loop, so that it is one consistent moment, and is never cacheable:
a revoked right must not live on in a client. `POST /v1/import` takes a file of
rights; the file is verified like every other update, so that the socket grants
nothing.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from agent.errors import AgentError, NotRunningError, TransportError
from common import log

MAX_SOCKET_PATH = 100
"""Longest path of a Unix socket that every system takes (108 less the end)."""
ANSWER_S = 5.0
"""Longest wait for an answer, and for each piece of a request."""
IMPORT_S = 60.0
"""Longest wait until a file of rights is verified and on disk, behind what the disk has to do before."""
MAX_CLIENTS = 32
"""Clients served at once; one more is turned away."""
MAX_ANSWER_BYTES = 4_194_304
"""Longest answer that `ask` reads."""
MAX_BODY_BYTES = 4_194_304
"""Longest body of a request: a file of rights."""
STATUS, IMPORT = "/v1/status", "/v1/import"

_log = log.get(__name__)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = MAX_CLIENTS
    status: Callable[[], dict[str, object]]
    take: Callable[[bytes], dict[str, object]]

    def __init__(self, path: str, handler: type[BaseHTTPRequestHandler]) -> None:
        self._places = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(path, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:  # noqa: BLE001 (as socketserver does)
            self.handle_error(request, client_address)
        finally:
            self._places.release()  # before the client sees the end: it may ask again at once
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 (signature given)
        # Mostly a client that went away before its answer.
        _log.info("a local client was not answered", reason=repr(sys.exception()))


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = ANSWER_S

    def do_GET(self) -> None:
        if self.path == STATUS:
            self._answer_with(self.server.status)
        else:
            self._answer(404, {"error": f"{self.path} is not here; try {STATUS}"})

    def do_POST(self) -> None:
        self.close_connection = True
        length = self.headers.get("Content-Length", "")
        if self.path != IMPORT:
            self._answer(404, {"error": f"{self.path} takes nothing; try {IMPORT}"})
        elif not length.isascii() or not length.isdigit():
            self._answer(411, {"error": "the length of the body is missing"})
        elif len(length) > 10 or int(length) > MAX_BODY_BYTES:  # noqa: PLR2004 (digits, before int reads them)
            self._answer(413, {"error": f"expected at most {MAX_BODY_BYTES} bytes"})
        else:
            # Read even if it is refused: a client that is still sending would miss the answer.
            content = self.rfile.read(int(length))
            if not self._is_owner():
                self._answer(403, {"error": "only the owner of the socket may bring rights"})
            elif len(content) == int(length):
                late = "the file may still be taken: look at fod-agent status, or bring it again"
                self._answer_with(lambda: self.server.take(content), IMPORT_S, f"; {late}")

    def _is_owner(self) -> bool:
        """Whether the other side is this agent's own user, or root (unix(7), SO_PEERCRED)."""
        size = struct.calcsize("3i")
        credentials = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        _, uid, _ = struct.unpack("3i", credentials)
        return uid in {0, os.geteuid()}

    def _answer_with(
        self, make: Callable[[], dict[str, object]], limit_s: float = ANSWER_S, late: str = ""
    ) -> None:
        try:
            self._answer(200, make())
        except TimeoutError:
            self._answer(503, {"error": f"the agent did not answer within {limit_s:.0f} s{late}"})
        except AgentError as error:
            self._answer(422, {"error": error.kind, "reason": str(error)})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Refuses what is not HTTP, or not GET, in the form of every other answer."""
        self.close_connection = True
        self._answer(code, {"error": message or http.client.responses.get(code, "refused")})

    def _answer(self, code: int, content: dict[str, object]) -> None:
        body = json.dumps(content, default=str).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (name given)
        """Says nothing: a status page asks often."""

    def address_string(self) -> str:
        return "local"


class LocalApi:
    """Serves the local interface until `close`."""

    def __init__(
        self,
        path: Path,
        status: Callable[[], dict[str, object]],
        take: Callable[[bytes], dict[str, object]],
    ) -> None:
        """Opens the socket, mode 0600.

        Args:
            status: makes the status, called in a thread of the server; raises
                TimeoutError if the loop does not answer.
            take: takes a file of rights and returns what changed, called in the
                same way; raises AgentError if it is refused.

        Raises:
            TransportError: the socket cannot be made.
        """
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise TransportError(
                f"{path}: a socket's path has at most {MAX_SOCKET_PATH} bytes; set state.api_socket"
            )
        self._path = path
        before = os.umask(0o177)
        try:
            if path.exists() and not path.is_socket():
                raise TransportError(f"{path} is not a socket and is left alone; set state.api_socket")
            path.unlink(missing_ok=True)
            self._server = _Server(str(path), _Handler)
        except OSError as error:
            raise TransportError(f"{path}: {error.strerror}") from error
        finally:
            os.umask(before)
        self._server.status, self._server.take = status, take
        self._thread = threading.Thread(target=self._server.serve_forever, name="local-api", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Closes the socket and removes it."""
        self._server.shutdown()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._unix_path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._unix_path))


def ask(path: Path, resource: str = STATUS) -> dict[str, object]:
    """Asks a running agent.

    Raises:
        NotRunningError: none is running there.
        TransportError: it did not answer.
    """
    status, content = _exchange(path, "GET", resource, None, 2 * ANSWER_S)
    if status != http.client.OK:
        raise TransportError(f"the agent at {path} answered {status}: {content}")
    return content


def bring(path: Path, content: bytes) -> dict[str, object]:
    """Hands a running agent a file of rights; returns what changed, or its refusal.

    A refusal holds `error` and `reason`; the answer to what was taken does not.

    Raises:
        NotRunningError: none is running there.
        TransportError: it did not answer.
    """
    status, answer = _exchange(path, "POST", IMPORT, content, 2 * IMPORT_S)
    if status not in {http.client.OK, http.client.UNPROCESSABLE_ENTITY}:
        raise TransportError(f"the agent at {path} answered {status}: {answer}")
    return answer


def _exchange(
    path: Path, method: str, resource: str, body: bytes | None, timeout_s: float
) -> tuple[int, dict[str, object]]:
    connection = _UnixConnection(path, timeout_s)
    try:
        try:
            connection.connect()
        except OSError as error:
            raise NotRunningError(f"no agent answers at {path}: {error}") from error
        connection.request(method, resource, body)
        response = connection.getresponse()
        content = json.loads(response.read(MAX_ANSWER_BYTES))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise TransportError(f"no agent answers at {path}: {error}") from error
    finally:
        connection.close()
    if not isinstance(content, dict):
        raise TransportError(f"the agent at {path} answered {response.status}: {content}")
    return response.status, content
