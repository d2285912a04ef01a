"""Reads cloud.toml: one file for the server and for the operator's commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path

import sqlalchemy
from sqlalchemy.exc import ArgumentError

from common import config
from common.config import option

MAX_TLS_ANCHORS = 8
"""Most certificates by which a vehicle knows the cloud's servers."""
_ENDPOINT = r"[^\s:/]+:[0-9]{1,5}"


@dataclass(frozen=True)
class Server:
    """Table [server]: the two listening ports and their TLS material."""

    listen: str = option(pattern=_ENDPOINT)
    enrolment_listen: str = option(pattern=_ENDPOINT)
    certificate: Path = option()
    key: Path = option()
    client_ca: Path = option()


@dataclass(frozen=True)
class Operator:
    """Table [operator]: how this operator reaches the server."""

    endpoint: str = option(pattern=_ENDPOINT)
    certificate: Path = option()
    key: Path = option()
    root_ca: Path = option()
    server_name: str = option(default="localhost")


@dataclass(frozen=True)
class Store:
    """Table [store]: SQLAlchemy URL; a relative SQLite path starts at the file's folder."""

    url: str


@dataclass(frozen=True)
class Catalogue:
    """Table [catalogue]: the offline-signed repository and the two online keys.

    `root`, here and in [director], is one root file, or a folder of N.root.json from the first one
    that vehicles were built with.
    """

    repository: Path = option()
    snapshot_key: Path = option()
    timestamp_key: Path = option()
    root: Path = option()


@dataclass(frozen=True)
class Director:
    """Table [director]."""

    root: Path = option()
    timestamp_key: Path = option()
    snapshot_key: Path = option()
    targets_key: Path = option()


@dataclass(frozen=True)
class Token:
    """Table [token]; `announcement` is the key's, as the offline token root signed it."""

    key: Path = option()
    epoch: int = option(minimum=1, maximum=4_294_967_295)
    announcement: Path | None = option(default=None)


@dataclass(frozen=True)
class Receipt:
    """Table [receipt]: the key that signs, and older ones whose sealed records may still come."""

    key: Path = option()
    old_keys: tuple[Path, ...] = option(default=())


@dataclass(frozen=True)
class Enrolment:
    """Table [enrolment]."""

    ca_certificate: Path = option()
    ca_key: Path = option()
    claim_ttl_s: int = option(default=3600, minimum=60, maximum=604_800)


@dataclass(frozen=True)
class Ownership:
    """Table [ownership]: bounds of what changes hands."""

    transfer_ttl_s: int = option(default=604_800, minimum=3_600, maximum=7_776_000)
    rebinds_per_year: int = option(default=2, minimum=0, maximum=100)


@dataclass(frozen=True)
class Signer:
    """Table [signer]: most that operators may have signed for the whole fleet in one hour.

    An alarm comes at 80 %. Renewals and answers to nonces are never held back.
    """

    new_rights_per_hour: int = option(default=1_000, minimum=1, maximum=10_000_000)
    revocations_per_hour: int = option(default=1_000, minimum=1, maximum=10_000_000)


@dataclass(frozen=True)
class Renewal:
    """Table [renewal]: how often the server looks for rights to renew or to end."""

    interval_s: int = option(default=300, minimum=1, maximum=86_400)


@dataclass(frozen=True)
class TlsAnchor:
    """A table [[tls.anchors]]: a server's certificate and its validity, which the director signs."""

    certificate: Path
    not_before: str
    not_after: str

    def problems(self) -> Iterator[tuple[str, str]]:
        """Times that are none, or in the wrong order."""
        times = []
        for key in ("not_before", "not_after"):
            try:
                times.append(moment_ms(getattr(self, key)))
            except ValueError:
                yield key, f"expected a time such as 2026-03-31T12:00:00Z, found {getattr(self, key)!r:.60}"
        if len(times) == len(("not_before", "not_after")) and not 0 <= times[0] < times[1]:
            yield "not_after", "must be later than not_before"


@dataclass(frozen=True)
class Tls:
    """Table [tls]: how vehicles know the cloud's servers; without anchors, by the CA of their image."""

    anchors: tuple[TlsAnchor, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """More anchors than a vehicle takes."""
        if len(self.anchors) > MAX_TLS_ANCHORS:
            yield "anchors", f"expected at most {MAX_TLS_ANCHORS}, found {len(self.anchors)}"


@dataclass(frozen=True)
class Restore:
    """Table [restore]: how long after a confirmed restore versions may move past what vehicles report."""

    window_days: int = option(default=30, minimum=1, maximum=365)


@dataclass(frozen=True)
class Log:
    """Table [log]."""

    level: str = option(default="info", choices=("debug", "info", "warning", "error"))
    form: str = option(default="text", choices=("text", "json"))


@dataclass(frozen=True)
class _File:
    """The whole file; which of its files have to exist depends on who reads it."""

    server: Server
    operator: Operator
    store: Store
    catalogue: Catalogue
    director: Director
    token: Token
    receipt: Receipt
    enrolment: Enrolment
    plans: Path = option()
    ownership: Ownership = field(default_factory=Ownership)
    restore: Restore = field(default_factory=Restore)
    signer: Signer = field(default_factory=Signer)
    renewal: Renewal = field(default_factory=Renewal)
    tls: Tls = field(default_factory=Tls)
    log: Log = field(default_factory=Log)


@dataclass(frozen=True)
class CloudConfig(_File):
    """The whole file, for `fod-cloud serve`: every file that it names exists, but for [operator]."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Missing files, and a database that would forget every right."""
        for table in fields(self):
            section = getattr(self, table.name)
            if table.name == "operator":
                continue
            if isinstance(section, Path):
                yield from _missing(table.name, section)
                continue
            for key in fields(section):
                value = getattr(section, key.name)
                if isinstance(value, Path):
                    yield from _missing(f"{table.name}.{key.name}", value)
        try:
            url = sqlalchemy.make_url(self.store.url)
        except ArgumentError:
            yield "store.url", "not a database URL"
            return
        if url.get_backend_name() == "sqlite" and url.database in {None, "", ":memory:"}:
            yield "store.url", "a database in memory would forget every right; name a file"


def read(path: Path) -> CloudConfig:
    """Reads the configuration for the server.

    Raises:
        ConfigError: for all problems together.
    """
    return config.read(path, CloudConfig)


def read_operator(path: Path) -> Operator:
    """Reads the table [operator]; the server's files need not exist here.

    Raises:
        ConfigError: for all problems together.
    """
    return config.read(path, _File).operator


def read_store(path: Path) -> tuple[Store, Log]:
    """Reads the tables [store] and [log]; the server's keys need not be readable here.

    Raises:
        ConfigError: for all problems together.
    """
    file = config.read(path, _File)
    return file.store, file.log


def database_url(path: Path, store: Store) -> sqlalchemy.URL:
    """Resolves a relative SQLite path against the folder of the configuration `path`."""
    url = sqlalchemy.make_url(store.url)
    if url.get_backend_name() == "sqlite":
        url = url.set(database=str(path.resolve().parent / str(url.database)))
    return url


def moment_ms(text: str) -> int:
    """Unix milliseconds of an ISO 8601 time with its zone.

    Raises:
        ValueError: it is none.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return int(moment.timestamp() * 1000)


def _missing(key: str, path: Path) -> Iterator[tuple[str, str]]:
    try:
        found = path.exists()
    except OSError:  # such as a name that is too long
        found = False
    if not found:
        tls = "; TLS cannot be switched off" if key.startswith("server.") else ""
        yield key, f"no such file: {path}{tls}"
