"""The operator's side: vehicles, rights, usage and invoices.

Every call needs an operator's certificate; every writing call is written to
the audit log with the name in it, in the transaction that it changes.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from cloud import enrolment, identity, invoice
from cloud.catalogue import Catalogue
from cloud.changes import Changes, Topic
from cloud.errors import ExistsError, InvalidRequestError, RequestError
from cloud.model import HEAD_UNIT, IDENTIFIER_PATTERN, VIN_PATTERN, Ecu
from cloud.rights import Rights, known_vehicle
from cloud.store import EntitlementRow, RequestRow, Store, Transaction, UsageRow, VehicleRow
from cloud.vehicle_service import VehicleService
from common import log
from openfod.entitlement.v1 import entitlement_pb2
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.operator.v1 import operator_service_pb2_grpc
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2

MAX_ECUS = 64
"""Most ECUs of one vehicle."""
UID_BYTES = 16
"""Length of an ECU's unique identifier."""
MAX_REASON = 256
"""Longest reason of a revocation, characters."""
MAX_PAGE = 1_000
"""Most usage records in one answer."""

_ACCOUNT = r"acc-[0-9a-z-]{1,40}"
_ENTITLEMENT = r"ent-[0-9a-f]{16}"
_TRACE = r"([0-9a-f]{32})?"
_PAGE = r"([0-9a-f]{16}/[0-9]{1,16})?"

_log = log.get(__name__)
_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)
_Self = TypeVar("_Self")

_Handler = Callable[[_Self, _Request, str], Awaitable[_Response]]
_Method = Callable[[_Self, _Request, identity.Context], Awaitable[_Response]]


def _operator_call(handler: _Handler[_Self, _Request, _Response]) -> _Method[_Self, _Request, _Response]:
    """Lets operators in only, and turns our errors into gRPC's."""

    @functools.wraps(handler)
    async def method(self: _Self, request: _Request, context: identity.Context) -> _Response:
        try:
            return await handler(self, request, identity.operator(context))
        except RequestError as error:
            _log.warning("request refused", call=handler.__name__, error=error.kind, reason=str(error))
            await context.abort(identity.status_code(error), str(error))

    return method


class OperatorService(operator_service_pb2_grpc.OperatorServiceServicer):
    """What an operator may do."""

    def __init__(
        self,
        store: Store,
        rights: Rights,
        catalogue: Catalogue,
        changes: Changes,
        vehicles: VehicleService,
        *,
        claim_ttl_s: int,
        now_ms: Callable[[], int],
        random: Callable[[int], bytes],
    ) -> None:
        self._store, self._rights, self._catalogue = store, rights, catalogue
        self._changes, self._vehicles = changes, vehicles
        self._claim_ttl_s, self._now_ms, self._random = claim_ttl_s, now_ms, random

    # --- writing ----------------------------------------------------------

    @_operator_call
    async def CreateVehicle(  # noqa: N802 (named by the contract)
        self, request: pb.CreateVehicleRequest, operator: str
    ) -> pb.CreateVehicleResponse:
        """Registers a vehicle as built and makes its one-time enrolment claim.

        A claim is stored as a hash only, so nobody can show it again: as long
        as the vehicle has not enrolled, a repetition (also one under another
        request_id, with the same ECUs) makes a new claim, which ends the first.
        """
        request.request_id = request.request_id.lower()  # RFC 9562, section 4: case means nothing
        vin = _vin(request.vin)
        ecus = _ecus(request.ecus)
        now_ms = self._now_ms()

        def work(tx: Transaction) -> pb.CreateVehicleResponse:
            before = self._answered(tx, operator, request.request_id, request, pb.CreateVehicleResponse)
            if before is not None and known_vehicle(tx, vin).enrolled_ms:
                return before
            vehicle = self._rights.register(tx, vin, ecus, now_ms)
            claim = enrolment.make_claim(tx, vin, self._claim_ttl_s, self._random, now_ms)
            tx.audit(operator, "create-vehicle", vin, now_ms, request_id=request.request_id)
            response = pb.CreateVehicleResponse(vehicle=self._vehicle(tx, vehicle))
            self._remember(tx, operator, request.request_id, request, response, now_ms)
            response.claim_token, response.claim_expires_ms = claim.token, claim.expires_ms
            return response

        response = await self._store.run(work)
        _log.info("vehicle registered", vin=vin, source=response.vehicle.source, operator=operator)
        return response

    @_operator_call
    async def GrantEntitlement(  # noqa: N802 (named by the contract)
        self, request: pb.GrantEntitlementRequest, operator: str
    ) -> pb.GrantEntitlementResponse:
        """Grants a vehicle the right of a plan."""
        request.request_id = request.request_id.lower()  # RFC 9562, section 4: case means nothing
        vin = _vin(request.vin)
        _match("plan_id", request.plan_id, IDENTIFIER_PATTERN)
        _match("account", request.account, _ACCOUNT)
        _match("trace_id", request.trace_id, _TRACE)
        now_ms = self._now_ms()

        def work(tx: Transaction) -> pb.GrantEntitlementResponse:
            before = self._answered(tx, operator, request.request_id, request, pb.GrantEntitlementResponse)
            if before is not None:
                return before
            granted = self._rights.grant(tx, vin, request.plan_id, request.account, request.trace_id, now_ms)
            response = pb.GrantEntitlementResponse(entitlement=granted.right, version=granted.version)
            right = granted.right
            tx.audit(
                operator,
                "grant",
                vin,
                now_ms,
                request_id=request.request_id,
                entitlement_id=right.entitlement_id,
                plan_id=right.plan_id,
                plan_version=right.plan_version,
                account=right.account,
                trace_id=right.trace_id,
            )
            self._remember(tx, operator, request.request_id, request, response, now_ms)
            return response

        response = await self._store.run(work)
        self._changes.notify(Topic.RIGHTS, vin)
        right = response.entitlement
        _log.info(
            "right granted",
            vin=vin,
            entitlement_id=right.entitlement_id,
            feature=right.feature_id,
            version=response.version,
            operator=operator,
            trace_id=right.trace_id,
        )
        return response

    @_operator_call
    async def RevokeEntitlement(  # noqa: N802 (named by the contract)
        self, request: pb.RevokeEntitlementRequest, operator: str
    ) -> pb.RevokeEntitlementResponse:
        """Ends a right. The vehicle holds the feature until it is safe to release."""
        request.request_id = request.request_id.lower()  # RFC 9562, section 4: case means nothing
        vin = _vin(request.vin)
        _match("entitlement_id", request.entitlement_id, _ENTITLEMENT)
        if not 1 <= len(request.reason) <= MAX_REASON:
            raise InvalidRequestError(
                "reason", expected=f"1 to {MAX_REASON} characters", found=len(request.reason)
            )
        now_ms = self._now_ms()

        def work(tx: Transaction) -> pb.RevokeEntitlementResponse:
            before = self._answered(tx, operator, request.request_id, request, pb.RevokeEntitlementResponse)
            if before is not None:
                return before
            version = self._rights.revoke(tx, vin, request.entitlement_id, request.reason, now_ms)
            row = next(r for r in tx.entitlements(vin) if r.entitlement_id == request.entitlement_id)
            response = pb.RevokeEntitlementResponse(entitlement=_record(row, tx.status(vin)), version=version)
            tx.audit(
                operator,
                "revoke",
                vin,
                now_ms,
                request_id=request.request_id,
                entitlement_id=request.entitlement_id,
                reason=request.reason,
            )
            self._remember(tx, operator, request.request_id, request, response, now_ms)
            return response

        response = await self._store.run(work)
        self._changes.notify(Topic.RIGHTS, vin)
        _log.info(
            "right revoked",
            vin=vin,
            entitlement_id=request.entitlement_id,
            version=response.version,
            operator=operator,
            trace_id=response.entitlement.entitlement.trace_id,
        )
        return response

    # --- reading ----------------------------------------------------------

    @_operator_call
    async def ListVehicles(  # noqa: N802 (named by the contract)
        self, _request: pb.ListVehiclesRequest, _operator: str
    ) -> pb.ListVehiclesResponse:
        """Lists the registered vehicles."""

        def work(tx: Transaction) -> list[pb.Vehicle]:
            return [self._vehicle(tx, row) for row in tx.vehicles()]

        return pb.ListVehiclesResponse(vehicles=await self._store.run(work))

    @_operator_call
    async def ListEntitlements(  # noqa: N802 (named by the contract)
        self, request: pb.ListEntitlementsRequest, _operator: str
    ) -> pb.ListEntitlementsResponse:
        """Lists the rights of a vehicle, ended ones included."""
        vin = _vin(request.vin)

        def work(tx: Transaction) -> pb.ListEntitlementsResponse:
            known_vehicle(tx, vin)
            status, signed = tx.status(vin), tx.vehicle_set(vin)
            return pb.ListEntitlementsResponse(
                entitlements=[_record(row, status) for row in tx.entitlements(vin)],
                version=signed.version if signed else 0,
            )

        return await self._store.run(work)

    async def WatchFeatures(  # noqa: N802 (named by the contract)
        self, request: pb.WatchFeaturesRequest, context: identity.Context
    ) -> AsyncIterator[pb.WatchFeaturesResponse]:
        """Streams each change of what a vehicle's features report, the present state first."""

        def work(tx: Transaction) -> pb.WatchFeaturesResponse:
            last_update = known_vehicle(tx, vin).last_update
            return pb.WatchFeaturesResponse(
                features=[vehicle_service_pb2.FeatureStatus.FromString(c) for c in tx.status(vin).values()],
                last_update=vehicle_service_pb2.UpdateResult.FromString(last_update) if last_update else None,
            )

        try:
            identity.operator(context)
            vin = _vin(request.vin)
            with self._changes.watch(Topic.STATUS, vin) as changed:
                while True:
                    changed.clear()
                    yield await self._store.run(work)
                    await changed.wait()
        except RequestError as error:
            await context.abort(identity.status_code(error), str(error))

    @_operator_call
    async def ListUsage(  # noqa: N802 (named by the contract)
        self, request: pb.ListUsageRequest, _operator: str
    ) -> pb.ListUsageResponse:
        """Lists the usage records of a vehicle."""
        vin = _vin(request.vin)
        _match("page_token", request.page_token, _PAGE)
        if not 0 <= request.page_size <= MAX_PAGE:
            raise InvalidRequestError("page_size", expected=f"0 to {MAX_PAGE}", found=request.page_size)
        size = request.page_size or MAX_PAGE
        journal, _, seq = request.page_token.partition("/")

        def work(tx: Transaction) -> pb.ListUsageResponse:
            rows = tx.usage(known_vehicle(tx, vin).source, (journal, int(seq or 0)), size + 1)
            page = rows[:size]
            more = len(rows) > size
            return pb.ListUsageResponse(
                records=[usage_pb2.UsageRecord.FromString(row.content) for row in page],
                next_page_token=f"{page[-1].journal_id}/{page[-1].seq}" if more else "",
            )

        return await self._store.run(work)

    @_operator_call
    async def PreviewInvoice(  # noqa: N802 (named by the contract)
        self, request: pb.PreviewInvoiceRequest, _operator: str
    ) -> pb.PreviewInvoiceResponse:
        """Rates the usage of a vehicle as of now."""
        vin = _vin(request.vin)
        now_ms = self._now_ms()

        def work(tx: Transaction) -> tuple[list[EntitlementRow], list[UsageRow]]:
            return tx.entitlements(vin), tx.usage(known_vehicle(tx, vin).source)

        rows, usage = await self._store.run(work)
        # Long usage takes seconds to rate, for which no other vehicle should wait.
        return await asyncio.to_thread(invoice.preview, self._catalogue, rows, usage, now_ms)

    # ----------------------------------------------------------------------

    def _vehicle(self, tx: Transaction, row: VehicleRow) -> pb.Vehicle:
        return pb.Vehicle(
            vin=row.vin,
            source=row.source,
            ecus=[
                pb.Ecu(ecu_identifier=e.identifier, hardware_id=e.hardware_id, ecu_uid=e.uid)
                for e in tx.ecus(row.vin)
            ],
            enrolled_ms=row.enrolled_ms,
            connected=self._vehicles.connected(row.vin),
            last_update=vehicle_service_pb2.UpdateResult.FromString(row.last_update)
            if row.last_update
            else None,
        )

    def _answered(
        self, tx: Transaction, operator: str, request_id: str, request: Message, kind: type[_Response]
    ) -> _Response | None:
        """The first answer to this request (AIP-155), or None if it is new.

        Raises:
            ExistsError: the id was used for another content.
        """
        try:
            valid = str(uuid.UUID(request_id)) == request_id
        except ValueError:
            valid = False
        if not valid:
            raise InvalidRequestError("request_id", expected="a UUID", found=request_id[:64])
        before = tx.request(operator, request_id)
        if before is None:
            return None
        if before.request_hash != _hash(request):
            raise ExistsError(f"request_id {request_id} was used for another request; nothing was changed")
        return kind.FromString(before.response)

    def _remember(
        self,
        tx: Transaction,
        operator: str,
        request_id: str,
        request: Message,
        response: Message,
        now_ms: int,
    ) -> None:
        if tx.request(operator, request_id) is None:
            row = RequestRow(_hash(request), response.SerializeToString(deterministic=True))
            tx.add_request(operator, request_id, row, now_ms)


def _hash(request: Message) -> bytes:
    name = request.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(name + b"\x00" + request.SerializeToString(deterministic=True)).digest()


def _record(row: EntitlementRow, status: dict[str, bytes]) -> pb.EntitlementRecord:
    record = pb.EntitlementRecord(
        entitlement=entitlement_pb2.Entitlement.FromString(row.content),
        granted_ms=row.granted_ms,
        revoked_ms=row.revoked_ms,
        revoke_reason=row.revoke_reason,
    )
    if row.feature_id in status:
        found = vehicle_service_pb2.FeatureStatus.FromString(status[row.feature_id])
        if found.entitlement_id == row.entitlement_id:
            record.feature_status.CopyFrom(found)
    return record


def _match(field: str, text: str, pattern: str) -> str:
    if not re.fullmatch(pattern, text):
        raise InvalidRequestError(field, expected=f"text of the form {pattern}", found=text[:64])
    return text


def _vin(text: str) -> str:
    return _match("vin", text, VIN_PATTERN)


def _ecus(found: Sequence[pb.Ecu]) -> list[Ecu]:
    if len(found) > MAX_ECUS:
        raise InvalidRequestError("ecus", expected=f"at most {MAX_ECUS}", found=len(found))
    ecus = []
    for index, ecu in enumerate(found):
        where = f"ecus[{index}]"
        _match(f"{where}.ecu_identifier", ecu.ecu_identifier, IDENTIFIER_PATTERN)
        _match(f"{where}.hardware_id", ecu.hardware_id, IDENTIFIER_PATTERN)
        if ecu.ecu_identifier == HEAD_UNIT:
            raise InvalidRequestError(
                f"{where}.ecu_identifier", expected="an ECU; every vehicle has a head unit", found=HEAD_UNIT
            )
        if len(ecu.ecu_uid) != UID_BYTES:
            raise InvalidRequestError(
                f"{where}.ecu_uid", expected=f"{UID_BYTES} bytes", found=len(ecu.ecu_uid)
            )
        ecus.append(Ecu(ecu.ecu_identifier, ecu.hardware_id, ecu.ecu_uid))
    for name in ("identifier", "uid"):
        if len({getattr(ecu, name) for ecu in ecus}) < len(ecus):
            raise InvalidRequestError(
                "ecus", expected=f"a different {name} for each ECU", found="a repeated one"
            )
    return ecus
