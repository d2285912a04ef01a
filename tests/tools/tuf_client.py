#!/usr/bin/env python3
"""A plain TUF client over the agent's own trust code, for the public TUF conformance suite.

    CLIENT --metadata-dir D init ROOT
    CLIENT --metadata-dir D --metadata-url U refresh
    CLIENT --metadata-dir D --metadata-url U --target-name N [--target-name N2 ...]
           --target-base-url B --target-dir T download

CLIENT is this file started by its path, from any folder; without the project's
packages around it, it goes on under `.venv/bin/python` of its checkout (made by
`make setup`), or name one: `.venv/bin/python tests/tools/tuf_client.py ...`.

Exit code 0 for full success, else 1 with the reason on stderr. D holds the
trusted files under plain names (`root.json`, delegated roles URL-quoted), byte
for byte, each written as soon as it is verified: a refresh that fails keeps
what it had verified. T holds targets under their URL-quoted names.

All trust decisions are in `agent.trust.repository`; here are HTTP, files and
the machine's clock. Bound to no vehicle, with no nonce and no floors.
"""

from __future__ import annotations

import argparse
import http.client
import io
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHECKOUT = Path(__file__).resolve().parents[2]


def _go_on_in_the_checkout() -> None:
    """Find the project's code and packages, whoever started this file and where."""
    sys.path.insert(0, str(CHECKOUT))
    try:
        import tuf  # noqa: F401
    except ModuleNotFoundError:
        python = CHECKOUT / ".venv/bin/python"
        if not python.exists() or os.environ.get("OPENFOD_TUF_CLIENT") == str(python):
            raise
        os.environ["OPENFOD_TUF_CLIENT"] = str(python)
        os.execv(python, [str(python), str(Path(__file__).resolve()), *sys.argv[1:]])


if __name__ == "__main__":
    _go_on_in_the_checkout()

from tuf.api.metadata import MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp  # noqa: E402

from agent.errors import AgentError, LimitError, MalformedError, TransportError, TrustError  # noqa: E402
from agent.trust import binding, repository  # noqa: E402

NAME = "repository"
MAX_NEW_ROOTS = 256
MAX_ROOT_BYTES = 512_000
MAX_TIMESTAMP_BYTES = 16_384
MAX_SNAPSHOT_BYTES = 2_000_000
MAX_TARGETS_BYTES = 5_000_000
SILENCE_S = 10.0
"""Longest wait for the next bytes of an answer."""
FETCH_S = 120.0
"""Longest time for one whole file."""
_ABSENT = {403, 404}  # storage services say either for a file that is not there


class AbsentError(TransportError):
    """The repository has no such file."""


def fetch(url: str, *, limit: int, deadline_s: float = FETCH_S, silence_s: float = SILENCE_S) -> bytes:
    """Get one file over HTTP/1.1, without proxies and redirects.

    Args:
        url: http or https.
        limit: most bytes that are read.
        deadline_s: longest time for all of it, headers included, seconds.
        silence_s: longest wait for the next bytes, seconds.

    Raises:
        AbsentError: it is not there.
        TransportError: it cannot be had, or not in time.
        LimitError: it is longer than the limit.
    """
    parts = urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds:
        raise TransportError(f"{url}: expected an http or https URL")
    connection = kinds[parts.scheme](parts.netloc, timeout=silence_s)
    source = _BoundedSource(connection, time.monotonic() + deadline_s, silence_s)
    try:
        connection.request("GET", parts.path or "/", headers={"Accept-Encoding": "identity"})
        with http.client.HTTPResponse(cast("socket.socket", source), method="GET") as response:
            response.begin()
            if response.status != http.client.OK:
                kind = AbsentError if response.status in _ABSENT else TransportError
                raise kind(f"{url}: HTTP status {response.status}")
            content = response.read(limit + 1)
            missing = response.length or 0
    except (OSError, http.client.HTTPException) as error:  # refused, reset, late, no HTTP
        raise TransportError(f"{url}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if len(content) > limit:
        raise LimitError(f"{url}, bytes", limit=limit, found=len(content))
    if missing:
        raise TransportError(f"{url}: the answer ended {missing} bytes early")
    return content


class _BoundedSource(io.RawIOBase):
    """Bytes of a connection, as long as none of its time limits has passed."""

    def __init__(self, connection: http.client.HTTPConnection, ends_s: float, silence_s: float) -> None:
        super().__init__()
        self._connection, self._ends_s, self._silence_s = connection, ends_s, silence_s

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return what HTTPResponse reads from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Wait for the next bytes."""
        left_s = self._ends_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("not complete in time")
        found: socket.socket = self._connection.sock
        found.settimeout(min(left_s, self._silence_s))
        return found.recv_into(buffer)


class Client:
    """One repository and the folder of what is trusted of it."""

    def __init__(self, folder: Path, url: str, now: datetime) -> None:
        """Takes nothing from anywhere yet.

        Args:
            folder: of trusted metadata; holds `root.json`.
            url: of the repository's metadata.
            now: time at which expiry is judged.
        """
        self._folder = folder
        self._url = url.rstrip("/")
        self._now = now
        self._root: Root
        self._snapshot: Snapshot
        self.targets: Targets

    def refresh(self) -> None:
        """Follow the client workflow (TUF 5.3 to 5.6), and keep each file once it is verified.

        Raises:
            AgentError: with the reason; what was verified before it is kept.
        """
        stored = self._stored(Root.type)
        self._form(Root.type, stored, MAX_ROOT_BYTES)
        self._root = repository.load_root(NAME, stored)
        before = repository.online_keys(self._root)
        self._follow_roots()
        repository.check_root_expiry(NAME, self._root, self._now)
        rotated = before != repository.online_keys(self._root)  # TUF 5.3.11
        timestamp, snapshot = self._earlier(forget=rotated)
        current = self._refresh_timestamp(timestamp)
        self._snapshot = self._refresh_snapshot(current, snapshot)
        self.targets = self.load_targets(Targets.type, self._root)

    def load_targets(self, role: str, delegator: Root | Targets) -> Targets:
        """Return the targets of a role: the stored file if it fits the snapshot, else a new one.

        Raises:
            AgentError: it cannot be had, or does not verify.
        """
        meta = repository.named_targets(NAME, self._snapshot, role)

        def verify(content: bytes) -> Targets:
            self._form(role, content, MAX_TARGETS_BYTES)
            return repository.next_targets(
                NAME, delegator, self._snapshot, content, role=role, reference=self._now
            )

        try:
            return verify(self._stored(role))
        except TrustError:
            pass
        content = self._fetch(role, meta, MAX_TARGETS_BYTES)
        targets = verify(content)
        self._keep(role, content)
        return targets

    def download(self, path: str, base_url: str, folder: Path) -> None:
        """Get one target (TUF 5.7), unless the right one is there already.

        Args:
            path: as the targets metadata name it.
            base_url: of the repository's targets.
            folder: that it is stored in.

        Raises:
            AgentError: nobody lists it, it cannot be had, or does not match.
        """
        info = repository.find_target(path, self.targets, self.load_targets)
        if info is None:
            raise MalformedError(f"target {path}: no role lists it")
        stored = folder / quote(path, safe="")
        if self._is_there(stored, info):
            return
        remote = info.path
        if self._root.consistent_snapshot:
            place, slash, name = remote.rpartition("/")
            remote = f"{place}{slash}{next(iter(info.hashes.values()))}.{name}"
        content = fetch(f"{base_url.rstrip('/')}/{quote(remote)}", limit=info.length)
        repository.check_target(f"target {path}", info, content)
        folder.mkdir(parents=True, exist_ok=True)
        _write(stored, content)

    def _follow_roots(self) -> None:
        for _ in range(MAX_NEW_ROOTS):
            version = self._root.version + 1
            try:
                content = fetch(f"{self._url}/{version}.root.json", limit=MAX_ROOT_BYTES)
            except AbsentError:
                return
            self._form(Root.type, content, MAX_ROOT_BYTES)
            self._root = repository.next_root(NAME, self._root, content)
            self._keep(Root.type, content)

    def _earlier(self, *, forget: bool) -> tuple[Timestamp | None, Snapshot | None]:
        """Return what newer files are held against; neither if the keys of one were rotated."""
        stored = self._stored(Timestamp.type), self._stored(Snapshot.type)
        timestamp = repository.earlier(NAME, self._root, stored[0], Timestamp)
        snapshot = repository.earlier(NAME, self._root, stored[1], Snapshot)
        # Whether a refresh before this one saw the rotation and then failed is
        # known by signatures that do not hold under the present root any more.
        forget = forget or (timestamp is None) or (bool(stored[1]) and snapshot is None)
        return (None, None) if forget else (timestamp, snapshot)

    def _refresh_timestamp(self, trusted: Timestamp | None) -> Timestamp:
        content = fetch(f"{self._url}/{Timestamp.type}.json", limit=MAX_TIMESTAMP_BYTES)
        self._form(Timestamp.type, content, MAX_TIMESTAMP_BYTES)
        timestamp = repository.next_timestamp(NAME, self._root, content, trusted=trusted, reference=self._now)
        if timestamp is not trusted:
            self._keep(Timestamp.type, content)
        return timestamp

    def _refresh_snapshot(self, timestamp: Timestamp, trusted: Snapshot | None) -> Snapshot:
        def verify(content: bytes) -> Snapshot:
            self._form(Snapshot.type, content, MAX_SNAPSHOT_BYTES)
            return repository.next_snapshot(
                NAME, self._root, timestamp, content, trusted=trusted, reference=self._now
            )

        try:
            return verify(self._stored(Snapshot.type))
        except TrustError:
            pass
        content = self._fetch(Snapshot.type, timestamp.snapshot_meta, MAX_SNAPSHOT_BYTES)
        snapshot = verify(content)
        self._keep(Snapshot.type, content)
        return snapshot

    def _fetch(self, role: str, meta: MetaFile, limit: int) -> bytes:
        name = quote(role, safe="")
        file = f"{meta.version}.{name}.json" if self._root.consistent_snapshot else f"{name}.json"
        return fetch(f"{self._url}/{file}", limit=min(meta.length or limit, limit))

    def _stored(self, role: str) -> bytes:
        path = self._path(role)
        return path.read_bytes() if path.exists() else b""

    def _keep(self, role: str, content: bytes) -> None:
        _write(self._path(role), content)

    def _path(self, role: str) -> Path:
        return self._folder / f"{quote(role, safe='')}.json"

    @staticmethod
    def _form(role: str, content: bytes, limit: int) -> None:
        binding.read_metadata(content, f"{NAME} {role}", limit=limit)

    @staticmethod
    def _is_there(stored: Path, info: TargetFile) -> bool:
        try:
            repository.check_target(str(stored), info, stored.read_bytes())
        except (OSError, TrustError):
            return False
        return True


def _write(path: Path, content: bytes) -> None:
    """Replace a file whole: a process that is killed leaves the old or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 for full success, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-base-url")
    parser.add_argument("--target-dir", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    asked = parser.parse_args(arguments)
    if asked.command != "init" and not asked.metadata_url:
        parser.error(f"{asked.command} needs --metadata-url")
    if asked.command == "download" and not (asked.target_name and asked.target_base_url and asked.target_dir):
        parser.error("download needs --target-name, --target-base-url and --target-dir")
    try:
        _run(asked)
    except (AgentError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _run(asked: argparse.Namespace) -> None:
    if asked.command == "init":
        content = asked.root.read_bytes()
        repository.load_root(NAME, content)
        asked.metadata_dir.mkdir(parents=True, exist_ok=True)
        _write(asked.metadata_dir / "root.json", content)
        return
    client = Client(asked.metadata_dir, asked.metadata_url, datetime.now(UTC))
    client.refresh()
    for path in asked.target_name if asked.command == "download" else ():
        client.download(path, asked.target_base_url, asked.target_dir)


if __name__ == "__main__":
    sys.exit(main())
