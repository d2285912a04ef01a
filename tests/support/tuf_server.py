"""A TUF repository over HTTP on 127.0.0.1 that signs on demand, and a client to attack it with."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from securesystemslib.signer import CryptoSigner
from tools.tuf_client import main
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

EXPIRES = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
PAST = EXPIRES - timedelta(days=60)
TOP = (Root.type, Timestamp.type, Snapshot.type, Targets.type)


class Repository:
    """What is published, by URL path; every detail may be changed before `publish`."""

    def __init__(self, *, consistent: bool = True, hashes: bool = False) -> None:
        self.keys: dict[str, list[CryptoSigner]] = {role: [CryptoSigner.generate_ed25519()] for role in TOP}
        keys: dict[str, Key] = {
            key.public_key.keyid: key.public_key for role in TOP for key in self.keys[role]
        }
        roles = {role: Role([self.keys[role][0].public_key.keyid], 1) for role in TOP}
        self.root = Root(1, None, EXPIRES, keys, roles, consistent_snapshot=consistent)
        self.timestamp = Timestamp(1, None, EXPIRES, MetaFile(1))
        self.snapshot = Snapshot(1, None, EXPIRES, {})
        self.targets: dict[str, Targets] = {Targets.type: Targets(1, None, EXPIRES, {})}
        self.hashes = hashes
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.sign_root()
        self.publish()

    def sign(self, signed: Any, signers: Iterable[CryptoSigner]) -> bytes:
        """Sign one file."""
        metadata = Metadata(signed)
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def sign_root(self, signers: Iterable[CryptoSigner] | None = None) -> None:
        """Publish the root as it is now."""
        content = self.sign(self.root, self.keys[Root.type] if signers is None else signers)
        self.files[f"/m/{self.root.version}.root.json"] = content

    def next_root(self, signers: Iterable[CryptoSigner] | None = None) -> None:
        """Publish the next root."""
        self.root.version += 1
        self.sign_root(signers)

    def rotate(self, role: str) -> None:
        """Replace a role's keys through a root of both, the old and the new root keys."""
        old = list(self.keys[Root.type])
        for key in self.keys[role]:
            self.root.revoke_key(key.public_key.keyid, role)
        self.keys[role] = [CryptoSigner.generate_ed25519()]
        self.root.add_key(self.keys[role][0].public_key, role)
        self.next_root({key.public_key.keyid: key for key in (*old, *self.keys[Root.type])}.values())

    def add_target(self, path: str, content: bytes, role: str = Targets.type) -> TargetFile:
        """List and serve a target file."""
        info = TargetFile.from_data(path, content, ["sha256"])
        self.targets[role].targets[path] = info
        place, slash, name = path.rpartition("/")
        if self.root.consistent_snapshot:
            name = f"{hashlib.sha256(content).hexdigest()}.{name}"
        self.files[f"/t/{place}{slash}{name}"] = content
        return info

    def delegate(
        self, delegator: str, role: str, paths: list[str] | None, *, threshold: int = 1, **fields: Any
    ) -> None:
        """Delegate paths to a role; it is made if it is new."""
        self.targets.setdefault(role, Targets(1, None, EXPIRES, {}))
        signers = self.keys.setdefault(role, [CryptoSigner.generate_ed25519()])
        found = self._delegations(delegator)
        keyids = [key.public_key.keyid for key in signers]
        found.keys.update({key.public_key.keyid: key.public_key for key in signers})
        assert found.roles is not None
        terminating = fields.pop("terminating", False)
        found.roles[role] = DelegatedRole(role, keyids, threshold, terminating, paths, **fields)

    def delegate_bins(self, bits: int, prefix: str) -> SuccinctRoles:
        """Delegate every path to hash bins."""
        signer = CryptoSigner.generate_ed25519()
        bins = SuccinctRoles([signer.public_key.keyid], 1, bits, prefix)
        for role in bins.get_roles():
            self.targets[role] = Targets(1, None, EXPIRES, {})
            self.keys[role] = [signer]
        key: dict[str, Key] = {signer.public_key.keyid: signer.public_key}
        self.targets[Targets.type].delegations = Delegations(key, succinct_roles=bins)
        return bins

    def publish(self, *, bump: str | None = None) -> None:
        """Sign everything online.

        Args:
            bump: targets whose version grows, and with it those of snapshot and timestamp.
        """
        if bump is not None:
            self.targets[bump].version += 1
            self.snapshot.version += 1
            self.timestamp.version += 1
        for role, targets in self.targets.items():
            content = self._put(role, targets)
            self.snapshot.meta[f"{role}.json"] = self._meta(targets.version, content)
        self.publish_snapshot()

    def publish_snapshot(self) -> None:
        """Sign snapshot and timestamp alone."""
        content = self._put(Snapshot.type, self.snapshot)
        self.timestamp.snapshot_meta = self._meta(self.snapshot.version, content)
        self.publish_timestamp()

    def publish_timestamp(self) -> None:
        """Sign the timestamp alone."""
        self.files["/m/timestamp.json"] = self.sign(self.timestamp, self.keys[Timestamp.type])

    def _put(self, role: str, signed: Any) -> bytes:
        content = self.sign(signed, self.keys[role])
        version = f"{signed.version}." if self.root.consistent_snapshot else ""
        self.files[f"/m/{version}{quote(role, safe='')}.json"] = content
        return content

    def _meta(self, version: int, content: bytes) -> MetaFile:
        return MetaFile.from_data(version, content, ["sha256"]) if self.hashes else MetaFile(version)

    def _delegations(self, delegator: str) -> Delegations:
        targets = self.targets[delegator]
        if targets.delegations is None:
            targets.delegations = Delegations({}, {})
        return targets.delegations


class Server:
    """Serves one repository; remembers what was asked for."""

    def __init__(self, repository: Repository) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                repository.requests.append(self.path)
                content = repository.files.get(self.path) or repository.files.get(unquote(self.path))
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class Client:
    """The client under test, with its two folders."""

    def __init__(self, repository: Repository, url: str, folder: Path) -> None:
        self.repository, self.url = repository, url
        self.metadata, self.targets = folder / "metadata", folder / "targets"
        self.first = folder / "first_root.json"
        self.first.write_bytes(repository.files["/m/1.root.json"])
        assert main(["--metadata-dir", str(self.metadata), "init", str(self.first)]) == 0

    def arguments(self, *names: str) -> list[str]:
        """Return the command line, to refresh or to download."""
        found = ["--metadata-dir", str(self.metadata), "--metadata-url", f"{self.url}/m/"]
        if not names:
            return [*found, "refresh"]
        for name in names:
            found += ["--target-name", name]
        return [*found, "--target-base-url", f"{self.url}/t/", "--target-dir", str(self.targets), "download"]

    def refresh(self) -> int:
        """Refresh, and return the exit code."""
        return main(self.arguments())

    def download(self, *names: str) -> int:
        """Download, and return the exit code."""
        return main(self.arguments(*names))

    def versions(self) -> dict[str, int]:
        """Return the versions that are trusted, by file."""
        return {
            path.name.removesuffix(".json"): Metadata[Any].from_file(str(path)).signed.version
            for path in sorted(self.metadata.glob("*.json"))
        }
