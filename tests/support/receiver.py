"""An HTTP receiver of CloudEvents on loopback that counts as OpenMeter does: each (source, id) once.

It can be told to fail, to wait, to take a batch and not say so, and to refuse.
"""

from __future__ import annotations

import json
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Event = dict[str, Any]


@dataclass
class Answer:
    """How one request is answered; `takes` is whether its events count."""

    status: int = 204
    takes: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    hangs_up: bool = False


@dataclass
class Receiver:
    """What arrived."""

    url: str = ""
    answer: Callable[[int, list[Event]], Answer] = lambda _number, _events: Answer()
    requests: list[tuple[dict[str, str], list[Event]]] = field(default_factory=list)
    taken: dict[tuple[str, str], Event] = field(default_factory=dict)
    raw: list[bytes] = field(default_factory=list)
    repeats: int = 0
    errors: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, headers: dict[str, str], body: bytes) -> Answer:
        """Counts one request."""
        events: list[Event] = json.loads(body)
        with self.lock:
            self.requests.append((headers, events))
            self.raw.append(body)
            answer = self.answer(len(self.requests), events)
            for event in events if answer.takes else ():
                key = event["source"], event["id"]
                if key in self.taken:
                    self.repeats += 1
                    if self.taken[key] != event:
                        self.changed.append(event["id"])
                self.taken.setdefault(key, event)
            return answer

    def sums(self) -> Counter[tuple[object, ...]]:
        """Units of billable use by subject, right, meter and dimensions."""
        found: Counter[tuple[object, ...]] = Counter()
        for event in self.taken.values():
            if event["type"] == "org.openfod.usage.v1":
                data = event["data"]
                dimensions = tuple(sorted(data["dimensions"].items()))
                found[event["subject"], data["entitlement_id"], data["meter"], dimensions] += data["value"]
        return found


@contextmanager
def receiving(
    answer: Callable[[int, list[Event]], Answer] | None = None, tls: tuple[Path, Path] | None = None
) -> Iterator[Receiver]:
    """Runs a receiver on a free port of loopback, with a TLS certificate and key if they are given."""
    receiver = Receiver()
    if answer is not None:
        receiver.answer = answer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            body = self.rfile.read(size)
            if len(body) < size:  # the sender died in the middle
                self.close_connection = True
                return
            headers = {"path": self.path, **{k.lower(): v for k, v in self.headers.items()}}
            told = receiver.take(headers, body)
            if told.hangs_up:
                self.close_connection = True
                return
            self.send_response(told.status)
            for name, value in told.headers.items():
                self.send_header(name, value)
            if told.status != 204:
                self.send_header("Content-Length", str(len(told.body)))
            self.end_headers()
            if told.status != 204:
                self.wfile.write(told.body)

        def log_message(self, *_args: object) -> None:
            """Says nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, _request: object, _address: object) -> None:
            """A sender that is killed resets its connection."""
            error = sys.exc_info()[1]
            if not isinstance(error, ConnectionError):
                receiver.errors.append(repr(error))

    server = Server(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_address[1]}/api/v1/events"
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        receiver.url = receiver.url.replace("http://127.0.0.1", "https://localhost")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert receiver.errors == [], receiver.errors
