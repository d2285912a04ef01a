"""The vehicle's side: enrolment, and one stream per vehicle.

The certificate of the connection says which vehicle it is; nothing in a
message overrides that. Each signed time answers a nonce that was not answered
before, so a change waits until the vehicle has offered one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud import attestation, enrolment, findings, identity, ingest, rights
from cloud.changes import Changes, Topic
from cloud.director import NONCE_BYTES
from cloud.errors import (
    BeginError,
    ClaimError,
    ForbiddenError,
    ForkError,
    InvalidRequestError,
    RequestError,
    UsageError,
)
from cloud.keyring import Keyring
from cloud.model import IDENTIFIER_PATTERN, Counter, Reported, Versions
from cloud.readings import Attested
from cloud.rights import Rights
from cloud.store import Store, Transaction
from common import log
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb
from openfod.vehicle.v1 import vehicle_service_pb2_grpc

MAX_FEATURES = 256
"""Most features in one status report."""
MAX_REASON = 256
"""Longest reason in a status, characters."""
MAX_ID = 64
"""Longest identifier of a right or a trace in a status, characters."""
MAX_COUNTERS = 256
"""Most token counters in one hello."""
MAX_READ_BACK = 64
"""Longest read-back in evidence, bytes."""
MAX_ENROLMENTS = 4
"""Most enrolments at a time; their callers are strangers, and the others wait."""
MAX_ERROR = 1_024
"""Longest error in an update result, characters."""
SIGNED_TIME_MAX_AGE_MS = 55_000
"""Age of the last signed time from which an offered nonce is answered though nothing changed."""

_log = log.get(__name__)


class EnrolmentService(vehicle_service_pb2_grpc.EnrolmentServiceServicer):
    """Turns claims into device certificates."""

    def __init__(
        self, store: Store, keys: Keyring, vehicles: VehicleService, now_ms: Callable[[], int]
    ) -> None:
        self._store, self._keys, self._vehicles, self._now_ms = store, keys, vehicles, now_ms
        self._places = asyncio.Semaphore(MAX_ENROLMENTS)

    async def Enroll(self, request: pb.EnrollRequest, context: identity.Context) -> pb.EnrollResponse:  # noqa: N802
        """Issues the device certificate of a pre-authorised VIN; the one before ends, and its stream."""

        def work(tx: Transaction) -> enrolment.Issued | ClaimError:
            ca, ca_key, now_ms = self._keys.enrolment_ca, self._keys.enrolment_key, self._now_ms()
            try:
                return enrolment.enrol(tx, request.vin, request.claim_token, key, ca, ca_key, now_ms)
            except ClaimError as error:
                enrolment.note_refusal(tx, request.vin, str(error), now_ms)
                return error  # returned, so that the note is stored

        try:
            # Callers are not known yet: their requests are checked before the database is locked.
            async with self._places:
                key = await asyncio.to_thread(enrolment.device_key, request.csr_der)
                issued = await self._store.run(work)
        except InvalidRequestError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if isinstance(issued, ClaimError):
            _log.warning("enrolment refused", vin=repr(request.vin[:20]), reason=str(issued))
            await context.abort(identity.status_code(issued), issued.told)
        self._vehicles.end_stream(request.vin, "a later enrolment replaced this certificate")
        _log.info("vehicle enrolled", vin=request.vin, source=issued.source)
        return pb.EnrollResponse(certificate_der=issued.certificate_der, source=issued.source)


@dataclass
class _Stream:
    """One vehicle's open stream.

    Args:
        wake: set when rights of the vehicle have changed, or the stream is to end.
        ended: why this certificate may no longer be served; empty while it may.
        nonce: offered by the vehicle and not answered yet.
        due: the vehicle is to get an update as soon as there is a nonce.
        restart_due: an operator has ended one of its journals.
        signed_ms: time that was last signed to it.
        retried_ms: when an update was last sent again because its answer crossed a nonce.
        contact_day: newest day that was counted as one of contact, since 1970.
    """

    device: identity.Device
    source: str
    wake: asyncio.Event
    superseded: bool = False
    ended: str = ""
    opened: bool = False
    nonce: bytes | None = None
    due: bool = False
    restart_due: bool = False
    signed_ms: int = 0
    retried_ms: int = 0
    contact_day: int = 0
    director: Versions = Versions()
    catalogue: Versions = Versions()
    counters: tuple[Counter, ...] = ()
    owner_epoch: int = 0

    @property
    def reported(self) -> Reported:
        """What the vehicle says that it trusts of its director."""
        return Reported(self.director, self.counters, self.owner_epoch)

    @property
    def vin(self) -> str:
        """The vehicle, by its certificate."""
        return self.device.vin


class VehicleService(vehicle_service_pb2_grpc.VehicleServiceServicer):
    """Carries trust updates down, and status and usage up."""

    def __init__(
        self,
        store: Store,
        rights: Rights,
        changes: Changes,
        receipt_keys: Sequence[Ed25519PrivateKey],
        units: ingest.Units,
        attested: Mapping[str, Attested],
        now_ms: Callable[[], int],
    ) -> None:
        self._store, self._rights, self._changes = store, rights, changes
        self._attested = attested
        self._receipt_key, self._units, self._now_ms = receipt_keys[0], units, now_ms
        self._archive_keys = [ingest.archive_key(key) for key in receipt_keys]
        self._streams: dict[str, _Stream] = {}

    def connected(self, vin: str) -> bool:
        """True while the vehicle's stream is open."""
        return vin in self._streams

    def end_stream(self, vin: str, reason: str) -> None:
        """Ends the vehicle's stream at once, if one is open.

        Called after its certificate has ended, so that no new one can begin.
        """
        stream = self._streams.pop(vin, None)
        if stream is not None:
            stream.ended = reason
            stream.wake.set()

    def restart_journal(self, vin: str) -> None:
        """Sends the vehicle's restarts now, if its stream is open here; else each connect brings them."""
        stream = self._streams.get(vin)
        if stream is not None:
            stream.restart_due = True
            stream.wake.set()

    async def Connect(  # noqa: N802 (named by the contract)
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: identity.Context
    ) -> AsyncIterator[pb.ConnectResponse]:
        """Serves one vehicle for as long as its stream lasts."""
        try:
            device = identity.device(context)
            source = await self._store.run(lambda tx: _admit(tx, device))
            with self._changes.watch(Topic.RIGHTS, device.vin) as wake:
                stream = _Stream(device, source, wake)
                self._take_over(stream)
                try:
                    async for response in self._serve(stream, aiter(request_iterator)):
                        yield response
                finally:
                    if self._streams.get(stream.vin) is stream:
                        del self._streams[stream.vin]
                    _log.info("stream ended", vin=stream.vin, superseded=stream.superseded)
        except RequestError as error:
            _log.warning("stream refused", error=error.kind, reason=str(error))
            await context.abort(identity.status_code(error), str(error))
        if stream.superseded:
            await context.abort(grpc.StatusCode.ABORTED, "a newer stream of this vehicle took over")
        if stream.ended:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, stream.ended)

    def _take_over(self, stream: _Stream) -> None:
        older = self._streams.get(stream.vin)
        if older is not None:
            older.superseded = True
            older.wake.set()
        self._streams[stream.vin] = stream

    async def _serve(
        self, stream: _Stream, requests: AsyncIterator[pb.ConnectRequest]
    ) -> AsyncIterator[pb.ConnectResponse]:
        read = asyncio.ensure_future(anext(requests, None))
        wake = asyncio.ensure_future(stream.wake.wait())
        try:
            while True:
                await asyncio.wait({read, wake}, return_when=asyncio.FIRST_COMPLETED)
                if stream.superseded or stream.ended:
                    return
                if wake.done():
                    stream.wake.clear()
                    stream.due = True
                    wake = asyncio.ensure_future(stream.wake.wait())
                if read.done():
                    request = read.result()
                    if request is None:
                        return
                    for response in await self._answer(stream, request):
                        yield response
                    read = asyncio.ensure_future(anext(requests, None))
                if stream.restart_due and stream.opened:
                    for response in await self._restarts(stream):
                        yield response
                if stream.due and stream.nonce is not None and not stream.ended:
                    for response in await self._update(stream):
                        yield response
        finally:
            read.cancel()
            wake.cancel()

    async def _answer(self, stream: _Stream, request: pb.ConnectRequest) -> list[pb.ConnectResponse]:
        payload = request.WhichOneof("payload")
        if stream.opened is (payload == "hello"):
            raise InvalidRequestError("payload", expected="one hello, and it first", found=payload)
        match payload:
            case "hello":
                return await self._hello(stream, request.hello)
            case "nonce_offer":
                stream.nonce = _nonce(request.nonce_offer.nonce)
                if self._now_ms() - stream.signed_ms > SIGNED_TIME_MAX_AGE_MS:
                    stream.due = True
            case "update_result":
                await self._update_result(stream, request.update_result)
            case "feature_status":
                await self._feature_status(stream, request.feature_status)
            case "usage":
                return [await self._usage(stream, request.usage)]
            case _:
                raise InvalidRequestError("payload", expected="a message of the contract", found=payload)
        return []

    async def _hello(self, stream: _Stream, hello: pb.Hello) -> list[pb.ConnectResponse]:
        stream.opened = True
        stream.nonce = _nonce(hello.nonce)
        stream.director, stream.catalogue = _versions(hello.director), _versions(hello.catalogue)
        stream.counters, stream.owner_epoch = _counters(hello), hello.owner_epoch
        now_ms = self._now_ms()

        def note(tx: Transaction) -> None:
            findings.note_set_back(tx, stream.vin, stream.reported, now_ms)
            self._note_contact(tx, stream, now_ms)

        await self._store.run(note)
        _log.info(
            "stream opened",
            vin=stream.vin,
            agent_version=hello.agent_version[:64],
            director_targets=stream.director.targets,
        )
        responses = await self._update(stream)
        receipt = await self._store.run(
            lambda tx: ingest.latest_receipt(tx, stream.source, hello.journal_id[:16], self._receipt_key)
        )
        if receipt is not None:
            signed = usage_pb2.SignedUsageReceipt.FromString(receipt)
            responses.append(pb.ConnectResponse(receipt=signed))
        return responses + await self._restarts(stream)

    async def _restarts(self, stream: _Stream) -> list[pb.ConnectResponse]:
        """The restarts that wait for a new journal of this vehicle."""
        stream.restart_due = False
        found = await self._store.run(lambda tx: ingest.open_restarts(tx, stream.source))
        return [pb.ConnectResponse(journal_restart=signed) for signed in found]

    async def _update(self, stream: _Stream) -> list[pb.ConnectResponse]:
        """Answers the unused nonce; a change that comes meanwhile is due again.

        The nonce stays unused while the vehicle would refuse the answer as a rollback.
        """
        nonce, stream.nonce, stream.due = stream.nonce, None, False
        assert nonce is not None
        now_ms = self._now_ms()

        def work(tx: Transaction) -> pb.TrustUpdate | None:
            _admit(tx, stream.device)  # another process may have ended it
            if not self._rights.catch_up(tx, stream.vin, stream.reported, now_ms):
                return None
            return self._rights.update(tx, stream.vin, nonce, stream.director, stream.catalogue, now_ms)

        update = await self._store.run(work)
        if update is None:
            stream.nonce = nonce
            return []
        stream.signed_ms = now_ms
        if update.director.targets:
            traces = await self._store.run(lambda tx: rights.live_traces(tx, stream.vin))
            _log.info("rights pushed", vin=stream.vin, trace_ids=",".join(traces))
        return [pb.ConnectResponse(trust_update=update)]

    async def _update_result(self, stream: _Stream, result: pb.UpdateResult) -> None:
        _bounded("update_result.error", result.error, MAX_ERROR)
        _bounded("update_result.error_type", result.error_type, MAX_REASON)
        stream.director, stream.catalogue = _versions(result.director), _versions(result.catalogue)
        content = result.SerializeToString(deterministic=True)
        await self._store.run(lambda tx: tx.set_last_update(stream.vin, content))
        self._changes.notify(Topic.STATUS, stream.vin)
        if result.error_type == "ReplayError" and self._now_ms() - stream.retried_ms > SIGNED_TIME_MAX_AGE_MS:
            # A fresh nonce may have crossed the answer to the one before it: once more with that one.
            stream.due, stream.retried_ms = True, self._now_ms()
        if result.error_type:
            _log.warning(
                "the vehicle refused an update", vin=stream.vin, error=result.error_type, reason=result.error
            )

    async def _feature_status(self, stream: _Stream, report: pb.FeatureStatusReport) -> None:
        if len(report.features) > MAX_FEATURES:
            raise InvalidRequestError(
                "feature_status.features", expected=f"at most {MAX_FEATURES}", found=len(report.features)
            )
        for status in report.features:
            if not re.fullmatch(IDENTIFIER_PATTERN, status.feature_id):
                raise InvalidRequestError(
                    "feature_status.feature_id", expected=IDENTIFIER_PATTERN, found=status.feature_id[:64]
                )
            _bounded("feature_status.reason", status.reason, MAX_REASON)
            _bounded("feature_status.entitlement_id", status.entitlement_id, MAX_ID)
            _bounded("feature_status.trace_id", status.trace_id, MAX_ID)
            _bounded("feature_status.evidence.finding", status.evidence.finding, MAX_REASON)
            _bounded("feature_status.evidence.read_back", status.evidence.read_back.hex(), 2 * MAX_READ_BACK)
        features = {s.feature_id: s.SerializeToString(deterministic=True) for s in report.features}
        now_ms = self._now_ms()

        def work(tx: Transaction) -> None:
            tx.replace_status(stream.vin, features)
            for status in report.features:
                if status.HasField("evidence"):
                    findings.note_evidence(tx, stream.vin, status, now_ms)

        await self._store.run(work)
        self._changes.notify(Topic.STATUS, stream.vin)

    async def _usage(self, stream: _Stream, signed: usage_pb2.SignedUsageBatch) -> pb.ConnectResponse:
        try:
            # A full batch takes milliseconds, for which other streams should not wait.
            batch = await asyncio.to_thread(
                ingest.verify, signed, stream.device.key, stream.source, self._units, self._archive_keys
            )
        except UsageError as error:
            return await self._refuse(stream, signed, error)
        try:
            taken = await self._store.run(lambda tx: self._take(tx, stream, signed, batch))
        except UsageError as error:
            return await self._refuse(stream, signed, error)
        _log.info(
            "usage taken",
            source=stream.source,
            journal=batch.journal_id,
            through_seq=taken.through_seq,
            new_records=taken.new_records,
            trace_ids=",".join(batch.trace_ids),
        )
        return pb.ConnectResponse(receipt=usage_pb2.SignedUsageReceipt.FromString(taken.receipt))

    def _note_contact(self, tx: Transaction, stream: _Stream, now_ms: int) -> None:
        """Counts a day of contact, once a day on each stream."""
        day = now_ms // attestation.MS_PER_DAY
        if day != stream.contact_day:
            stream.contact_day = day
            attestation.note_contact(tx, stream.vin, self._attested, now_ms)

    def _take(
        self, tx: Transaction, stream: _Stream, signed: usage_pb2.SignedUsageBatch, batch: ingest.Batch
    ) -> ingest.Taken:
        now_ms = self._now_ms()
        taken = ingest.take(tx, stream.vin, stream.source, batch, self._receipt_key, now_ms)
        fresh = batch.rows[len(batch.rows) - taken.new_records :]
        attestation.follow(tx, stream.vin, fresh, self._attested, now_ms)
        self._note_contact(tx, stream, now_ms)
        if taken.begun_anew:
            findings.note_begun(tx, stream.vin, batch.journal_id, signed.SerializeToString(), now_ms)
        return taken

    async def _refuse(
        self, stream: _Stream, signed: usage_pb2.SignedUsageBatch, error: UsageError
    ) -> pb.ConnectResponse:
        _log.warning("usage refused", source=stream.source, error=error.kind, reason=str(error))
        journal_id = ingest.claimed_journal(signed)
        refused, now_ms = error, self._now_ms()
        vin, source, received = stream.vin, stream.source, signed.SerializeToString()
        if isinstance(refused, ForkError):
            fork = refused
            await self._store.run(lambda tx: findings.note_fork(tx, vin, source, fork, received, now_ms))
        elif isinstance(refused, BeginError):
            begun = refused
            await self._store.run(
                lambda tx: findings.note_refused_begin(tx, vin, source, begun, received, now_ms)
            )
        stored = await self._store.run(lambda tx: tx.receipt(stream.source, journal_id))
        return pb.ConnectResponse(
            usage_refusal=pb.UsageRefusal(
                journal_id=journal_id,
                error_type=error.kind,
                error=str(error),
                stored_through_seq=stored.through_seq if stored else 0,
            )
        )


def _admit(tx: Transaction, device: identity.Device) -> str:
    """The vehicle's pseudonym, if this certificate is the one that counts now.

    Raises:
        ForbiddenError: it has ended: replaced by a later enrolment, or the vehicle is blocked.
    """
    vehicle = tx.lock_vehicle(device.vin)
    if vehicle is not None and tx.device_vin(device.fingerprint) == device.vin:
        return vehicle.source
    if vehicle is not None and vehicle.blocked_ms:
        raise ForbiddenError(f"vehicle {device.vin} is blocked; a new claim lets it in again")
    raise ForbiddenError(f"the certificate is not (or no longer) the one of vehicle {device.vin}")


def _nonce(nonce: bytes) -> bytes:
    if len(nonce) != NONCE_BYTES:
        raise InvalidRequestError("nonce", expected=f"{NONCE_BYTES} bytes", found=len(nonce))
    return nonce


def _versions(versions: pb.RepositoryVersions) -> Versions:
    return Versions(versions.root, versions.timestamp, versions.snapshot, versions.targets)


def _counters(hello: pb.Hello) -> tuple[Counter, ...]:
    if len(hello.token_counters) > MAX_COUNTERS:
        raise InvalidRequestError(
            "hello.token_counters", expected=f"at most {MAX_COUNTERS}", found=len(hello.token_counters)
        )
    return tuple(Counter(c.ecu_identifier, c.feature_id, c.counter) for c in hello.token_counters)


def _bounded(field: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise InvalidRequestError(field, expected=f"at most {limit} characters", found=len(text))
