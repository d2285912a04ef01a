"""Serves the three gRPC services over TLS; there is no way to serve without it.

One port takes vehicles and operators, both with client certificates (mTLS);
another takes enrolments, whose callers have none yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from cloud import catalogue, config, ingest, keyring, plans, readings
from cloud.changes import Changes
from cloud.config import CloudConfig
from cloud.errors import StartError
from cloud.operator_service import OperatorService
from cloud.renewal import Renewals
from cloud.rights import Rights
from cloud.store import Store
from cloud.vehicle_service import EnrolmentService, VehicleService
from common import log
from common.config import ConfigError
from openfod.operator.v1 import operator_service_pb2_grpc
from openfod.vehicle.v1 import vehicle_service_pb2_grpc

MAX_REQUEST_BYTES = 4 * 1_048_576
"""Largest message from a client."""
MAX_RESPONSE_BYTES = 36 * 1_048_576
"""Largest message to a client: a trust update with every target at its limit."""
MAX_STREAMS = 100
"""Most calls at a time on one connection."""
KEEPALIVE_MS = 60_000
"""How often a silent connection is asked whether it lives."""
KEEPALIVE_TIMEOUT_MS = 20_000
"""How long it may take to answer."""
CLIENT_PING_MIN_MS = 10_000
"""How often a client may ask the same."""
DAY_MS = 86_400_000
STOP_GRACE_S = 2.0
"""How long calls under way may go on after SIGTERM."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", CLIENT_PING_MIN_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two servers on one port would share its connections by chance.
    ("grpc.so_reuseport", 0),
)

_log = log.get(__name__)


def system_now_ms() -> int:
    """The cloud's clock, Unix milliseconds: what it signs as the time."""
    return time.time_ns() // 1_000_000


@dataclass
class Cloud:
    """A running cloud.

    Args:
        port, enrolment_port: that it listens on.
        renewals: what runs by itself from time to time, and may be run at any.
    """

    port: int
    enrolment_port: int
    store: Store
    renewals: Renewals
    _servers: tuple[grpc.aio.Server, grpc.aio.Server]
    _job: asyncio.Task[None]

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Takes no more calls, lets those under way end, and closes the database."""
        self._job.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._job
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        await asyncio.to_thread(self.store.close)


async def start(
    path: Path,
    settings: CloudConfig,
    *,
    now_ms: Callable[[], int] = system_now_ms,
    random: Callable[[int], bytes] = secrets.token_bytes,
) -> Cloud:
    """Reads everything that the cloud needs and opens its ports.

    Args:
        path: the configuration file, whose folder a relative database path starts at.

    Raises:
        ConfigError, StartError: something is missing, unreadable or does not fit.
    """
    credentials = _credentials(settings, client_ca=settings.server.client_ca)
    enrolment_credentials = _credentials(settings, client_ca=None)
    keys = keyring.load(settings)
    signed = catalogue.load(settings.catalogue.repository, keys.catalogue.root)
    prices = plans.read(settings.plans, signed.releases)

    store = await asyncio.to_thread(Store, config.database_url(path, settings.store))
    rights = Rights(keys, signed, prices, random, settings.signer)
    try:
        await store.run(rights.check)
    except StartError:
        await asyncio.to_thread(store.close)
        raise
    changes = Changes()
    vehicles = VehicleService(
        store, rights, changes, keys.receipt_keys, ingest.units(signed), readings.attested(signed), now_ms
    )
    renewals = Renewals(store, rights, changes, now_ms)
    operators = OperatorService(
        store,
        rights,
        signed,
        changes,
        vehicles,
        renewals,
        keys.receipt_keys[0],
        claim_ttl_s=settings.enrolment.claim_ttl_s,
        ownership=settings.ownership,
        restore_window_ms=settings.restore.window_days * DAY_MS,
        now_ms=now_ms,
        random=random,
    )
    main = grpc.aio.server(options=_OPTIONS)
    vehicle_service_pb2_grpc.add_VehicleServiceServicer_to_server(vehicles, main)
    operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(operators, main)
    enrolment = grpc.aio.server(options=_OPTIONS)
    vehicle_service_pb2_grpc.add_EnrolmentServiceServicer_to_server(
        EnrolmentService(store, keys, vehicles, now_ms), enrolment
    )
    try:
        port = _listen(main, settings.server.listen, credentials)
        enrolment_port = _listen(enrolment, settings.server.enrolment_listen, enrolment_credentials)
    except StartError:
        store.close()
        raise
    await main.start()
    await enrolment.start()
    job = asyncio.create_task(renewals.run_for_ever(settings.renewal.interval_s))
    return Cloud(port, enrolment_port, store, renewals, (main, enrolment), job)


async def serve(path: Path, settings: CloudConfig, ready: Callable[[Cloud], None]) -> None:
    """Serves until SIGTERM or SIGINT; `ready` is called once both ports are open."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    cloud = await start(path, settings)
    _log.info(
        "serving",
        port=cloud.port,
        enrolment_port=cloud.enrolment_port,
        token_epoch=settings.token.epoch,
    )
    ready(cloud)
    await stopping.wait()
    _log.info("stopping")
    await cloud.stop()


def _credentials(settings: CloudConfig, *, client_ca: Path | None) -> grpc.ServerCredentials:
    pair = (_pem(settings.server.key, "PRIVATE KEY"), _pem(settings.server.certificate, "CERTIFICATE"))
    if client_ca is None:
        return grpc.ssl_server_credentials([pair])
    return grpc.ssl_server_credentials(
        [pair], root_certificates=_pem(client_ca, "CERTIFICATE"), require_client_auth=True
    )


def _pem(path: Path, label: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            [f"{path}: cannot be read: {error.strerror}; TLS cannot be switched off"]
        ) from error
    if f"{label}-----".encode() not in content:
        raise ConfigError([f"{path}: holds no PEM {label.lower()}; TLS cannot be switched off"])
    return content


def _listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise StartError(f"cannot listen on {address}: {error}") from error
    if port == 0:
        raise StartError(f"cannot listen on {address}: the port is taken or the TLS material does not fit")
    return port
