"""Where events go: a file of lines, or an HTTP receiver with OpenMeter's content type."""

from __future__ import annotations

import email.utils
import fcntl
import ipaddress
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import urllib3
from urllib3.util import Timeout, parse_url

from cloud.errors import EventRefusedError, ExportError, ReceiverBusyError
from cloud.export import event

CONTENT_TYPE = "application/cloudevents-batch+json"
"""CloudEvents' JSON batch format, as OpenMeter takes it."""
CONNECT_TIMEOUT_S = 10.0
"""Longest wait for a connection."""
READ_TIMEOUT_S = 60.0
"""Longest wait for an answer."""
MAX_ANSWER_BYTES = 4_096
"""Most that is read of a receiver's answer."""
MAX_TOKEN_BYTES = 8_192
"""Largest token file."""

_ACCEPTED = {200, 201, 202, 204}
_BUSY = {408, 425, 429}
_SERVER_ERRORS = 500
_REFUSED = {400, 413, 422}
"""What is about the content; the rest of 4xx is about how we ask, and no event's fault."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One event as it leaves.

    Args:
        content: in CloudEvents' JSON format, without the end of the line.
    """

    position: int
    id: str
    content: bytes


class FileTarget:
    """Appends events as lines; whoever opened it holds the file until it is closed."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file, readable by its owner only.

        Raises:
            ExportError: it cannot be opened, or another process exports into it.
        """
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise ExportError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ExportError(f"{path}: another process exports into this file") from error

    def recover(self, length: int, following: Sequence[Sent]) -> int:
        """Cuts off what was written behind `length` and is in no position yet; returns how many bytes.

        Args:
            length: bytes that the consumer's position stands for.
            following: events that come next, as many as one batch may hold.

        Raises:
            ExportError: the file is shorter, or its end is not the beginning
                of these events: somebody else has changed it.
        """
        found = os.fstat(self._file).st_size
        if found < length:
            raise ExportError(
                f"{self.path}: has {found} bytes, {length} were exported; it was cut or replaced. "
                "Put it back, or export into another file under another --name"
            )
        if found == length:
            return 0
        expected = b"".join(sent.content + b"\n" for sent in following)
        tail = os.pread(self._file, len(expected) + 1, length)
        if not expected.startswith(tail):
            raise ExportError(
                f"{self.path}: {found - length} bytes behind the {length} that were exported are not ours; "
                "nothing was changed. Move the file away, and export into another under another --name"
            )
        os.ftruncate(self._file, length)
        os.fsync(self._file)
        return found - length

    def append(self, length: int, events: Sequence[Sent]) -> int:
        """Writes events behind `length` and syncs them; returns the length then.

        Raises:
            ExportError: the disk does not take them. They are cut off again at the next start.
        """
        content = b"".join(sent.content + b"\n" for sent in events)
        written = 0
        try:
            while written < len(content):
                written += os.pwrite(self._file, content[written:], length + written)
            os.fsync(self._file)
        except OSError as error:
            raise ExportError(f"{self.path}: cannot be written: {error.strerror}") from error
        return length + len(content)

    def close(self) -> None:
        """Closes the file, and leaves it to others."""
        os.close(self._file)


class HttpTarget:
    """Posts batches of events to one URL, over one connection."""

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        ca: Path | None = None,
        now_s: Callable[[], float] = time.time,
        timeout: Timeout | None = None,
    ) -> None:
        """Prepares the connection; nothing is sent.

        Args:
            token: sent as a bearer token (RFC 6750), empty for none.
            ca: certificates that the receiver's must lead to; None for those of this machine.
            now_s: Unix seconds, to read a Retry-After that is a date.

        Raises:
            ExportError: the URL would send usage in clear over a network, or `ca` cannot be read.
        """
        check_url(url)
        self.url = url
        self._now_s = now_s
        self._headers = {"Content-Type": CONTENT_TYPE, "User-Agent": "openfod-export"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        if ca is not None and not ca.is_file():
            raise ExportError(f"{ca}: no such file; TLS cannot be switched off")
        self._pool = urllib3.PoolManager(
            cert_reqs="CERT_REQUIRED",
            ca_certs=str(ca) if ca else None,
            timeout=timeout or Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
            maxsize=1,
        )

    def post(self, events: Sequence[Sent]) -> None:
        """Sends one batch.

        Raises:
            EventRefusedError: the receiver finds the content wrong.
            ReceiverBusyError: it is to be sent again, later.
            ExportError: the receiver will never take it like this.
        """
        body = event.batch(sent.content for sent in events)
        try:
            answer = self._pool.request(
                "POST",
                self.url,
                body=body,
                headers=self._headers,
                retries=False,
                redirect=False,
                preload_content=False,
            )
            said = answer.read(MAX_ANSWER_BYTES)
            answer.close() if len(said) == MAX_ANSWER_BYTES else answer.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise ReceiverBusyError(f"{self.url}: {error}") from error
        if answer.status in _ACCEPTED:
            return
        words = " ".join(said.decode(errors="replace").split())[:300]
        told = f"{self.url}: HTTP {answer.status}" + (f": {words}" if words else "")
        if answer.status in _BUSY or answer.status >= _SERVER_ERRORS:
            raise ReceiverBusyError(told, self._retry_after_s(answer.headers.get("Retry-After", "")))
        if answer.status in _REFUSED:
            raise EventRefusedError(told)
        raise ExportError(f"{told}. No event is at fault; check the URL and the token")

    def close(self) -> None:
        """Closes the connection."""
        self._pool.clear()

    def _retry_after_s(self, text: str) -> float | None:
        """RFC 9110, section 10.2.3: seconds, or a date; None if it is neither."""
        if text.isascii() and text.isdigit():
            return float(text[:9])
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - self._now_s())
        except (ValueError, OverflowError):
            return None


def check_url(url: str) -> None:
    """Refuses a URL that is none, holds a secret, or would send usage in clear over a network.

    Raises:
        ExportError: and why.
    """
    try:
        parts = parse_url(url)
    except urllib3.exceptions.LocationParseError as error:
        raise ExportError("--to: expected file:PATH or https://HOST/PATH; this is no URL") from error
    if parts.scheme not in {"http", "https"} or not parts.host:
        raise ExportError(f"--to: expected file:PATH or https://HOST/PATH, found scheme {parts.scheme!r}")
    if parts.auth:
        raise ExportError("--to: a URL holds no password; put a token into a file: --token-file")
    if parts.scheme == "http" and not _is_loopback(parts.host):
        raise ExportError(f"--to: http:// to {parts.host} would send usage in clear; use https://")


def read_token(path: Path) -> str:
    """The token in a file, one line.

    Raises:
        ExportError: the file cannot be read, or holds no token.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
    token = content.strip()
    if len(content) > MAX_TOKEN_BYTES or not re.fullmatch(rb"[!-~]+", token):
        raise ExportError(f"{path}: expected one token of printable ASCII characters")
    return token.decode("ascii")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
