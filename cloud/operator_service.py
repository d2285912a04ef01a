"""The operator's side: vehicles, rights, usage and invoices.

Every call needs an operator's certificate and a role that may make it; every
writing call is written to the audit log with the name in it, in the
transaction that it changes, and so is each one that was refused.
Reading calls show what the present owner of a vehicle has and used; only
invoices, which are per account, cover the owners before too.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message

from cloud import config, dating, enrolment, findings, identity, ingest, invoice, rating, transfer
from cloud.catalogue import Catalogue
from cloud.changes import Changes, Topic
from cloud.errors import (
    ExistsError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    NotPossibleError,
    RequestError,
    SignerLimitError,
    TransferCodeError,
)
from cloud.model import HEAD_UNIT, IDENTIFIER_PATTERN, VIN_PATTERN, Ecu
from cloud.plans import MAX_PRICE_MINOR
from cloud.rating import Span
from cloud.renewal import Renewals
from cloud.rights import Rights, known_vehicle
from cloud.store import (
    AuditRow,
    EntitlementRow,
    EvidenceRow,
    InvoiceRow,
    OpenUsageRow,
    RequestRow,
    Store,
    Transaction,
    UsageRow,
    VehicleRow,
)
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
READING_KEY_BYTES = 32
"""Length of the Ed25519 public key with which an ECU signs what it counts."""
MAX_REASON = 256
"""Longest reason, characters."""
MAX_PAGE = 1_000
"""Most usage records or audit entries in one answer."""
MAX_PACKS = 1_000
"""Most purchases in one request."""
MAX_ROLE = 64
"""Longest piece of an unknown role that the audit log repeats, characters."""
READING_CALLS = frozenset(
    {
        "ListVehicles",
        "ListEntitlements",
        "ListUsage",
        "PreviewInvoice",
        "ListInvoices",
        "ListEvidence",
        "ListAudit",
        "WatchFeatures",
    }
)
"""Calls that change nothing; of those, only the ones beyond the caller's role are audited."""

_JOURNAL = r"[0-9a-f]{16}"
_ACCOUNT = r"acc-[0-9a-z-]{1,40}"
_ENTITLEMENT = r"ent-[0-9a-f]{16}"
_TRACE = r"([0-9a-f]{32})?"
_PAGE = r"([0-9a-f]{16}/[0-9]{1,16})?"
_NUMBER_PAGE = r"([0-9]{1,18})?"

_log = log.get(__name__)
_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)
_Writing = TypeVar(
    "_Writing",
    pb.CreateClaimRequest,
    pb.BlockVehicleRequest,
    pb.RebindEcuRequest,
    pb.BeginTransferRequest,
    pb.CompleteTransferRequest,
    pb.ConfirmRestoreRequest,
    pb.CloseInvoiceRequest,
    pb.CreateCorrectionRequest,
    pb.ReportPaymentRequest,
    pb.TopUpEntitlementRequest,
    pb.ChangePlanRequest,
    pb.RestartJournalRequest,
)

_Handler = Callable[["OperatorService", _Request, identity.Operator], Awaitable[_Response]]
_Method = Callable[["OperatorService", _Request, identity.Context], Awaitable[_Response]]


def _operator_call(handler: _Handler[_Request, _Response]) -> _Method[_Request, _Response]:
    """Lets in operators whose role allows the call, and turns our errors into gRPC's."""
    call = handler.__name__

    @functools.wraps(handler)
    async def method(self: OperatorService, request: _Request, context: identity.Context) -> _Response:
        operator = None
        try:
            operator = identity.operator(context)
            operator.may(call, vin=getattr(request, "vin", ""))
            return await handler(self, request, operator)
        except RequestError as error:
            await self.note_refusal(operator, call, request, error)
            await context.abort(identity.status_code(error), error.told)

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
        renewals: Renewals,
        receipt_key: Ed25519PrivateKey,
        *,
        claim_ttl_s: int,
        ownership: config.Ownership,
        restore_window_ms: int,
        now_ms: Callable[[], int],
        random: Callable[[int], bytes],
    ) -> None:
        self._store, self._rights, self._catalogue = store, rights, catalogue
        self._changes, self._vehicles, self._renewals = changes, vehicles, renewals
        self._receipt_key = receipt_key
        self._claim_ttl_s, self._ownership = claim_ttl_s, ownership
        self._restore_window_ms = restore_window_ms
        self._now_ms, self._random = now_ms, random

    async def note_refusal(
        self, operator: identity.Operator | None, call: str, request: Message, error: RequestError
    ) -> None:
        """Logs a refused call; audits it if it was to change something or is beyond the role.

        Malformed fields are the caller's own mistake and may hold any text: only logged.
        """
        _log.warning("request refused", call=call, error=error.kind, reason=str(error))
        beyond_role = isinstance(error, ForbiddenError)
        if operator is None or isinstance(error, InvalidRequestError):
            return
        if call in READING_CALLS and not beyond_role:
            return
        vin = getattr(request, "vin", "")

        def work(tx: Transaction) -> None:
            known = vin if re.fullmatch(VIN_PATTERN, vin) else ""
            tx.audit(
                operator.actor,
                "refused",
                known,
                self._now_ms(),
                alarm=beyond_role or isinstance(error, SignerLimitError),
                call=call,
                role=operator.role[:MAX_ROLE],
                error=error.kind,
                reason=str(error),
            )

        await self._store.run(work)

    # --- writing ----------------------------------------------------------

    @_operator_call
    async def CreateVehicle(  # noqa: N802 (named by the contract)
        self, request: pb.CreateVehicleRequest, operator: identity.Operator
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
            tx.audit(operator.actor, "create-vehicle", vin, now_ms, request_id=request.request_id)
            response = pb.CreateVehicleResponse(vehicle=self._vehicle(tx, vehicle))
            self._remember(tx, operator, request.request_id, request, response, now_ms)
            response.claim_token, response.claim_expires_ms = claim.token, claim.expires_ms
            return response

        response = await self._store.run(work)
        _log.info("vehicle registered", vin=vin, source=response.vehicle.source, operator=operator.name)
        return response

    @_operator_call
    async def GrantEntitlement(  # noqa: N802 (named by the contract)
        self, request: pb.GrantEntitlementRequest, operator: identity.Operator
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
                operator.actor,
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
            operator=operator.name,
            trace_id=right.trace_id,
        )
        return response

    @_operator_call
    async def RevokeEntitlement(  # noqa: N802 (named by the contract)
        self, request: pb.RevokeEntitlementRequest, operator: identity.Operator
    ) -> pb.RevokeEntitlementResponse:
        """Ends a right. The vehicle holds the feature until it is safe to release."""
        request.request_id = request.request_id.lower()  # RFC 9562, section 4: case means nothing
        vin = _vin(request.vin)
        _match("entitlement_id", request.entitlement_id, _ENTITLEMENT)
        _reason(request.reason)
        now_ms = self._now_ms()

        def work(tx: Transaction) -> pb.RevokeEntitlementResponse:
            before = self._answered(tx, operator, request.request_id, request, pb.RevokeEntitlementResponse)
            if before is not None:
                return before
            version = self._rights.revoke(tx, vin, request.entitlement_id, request.reason, now_ms)
            row = next(r for r in tx.entitlements(vin) if r.entitlement_id == request.entitlement_id)
            response = pb.RevokeEntitlementResponse(entitlement=_record(row, tx.status(vin)), version=version)
            tx.audit(
                operator.actor,
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
            operator=operator.name,
            trace_id=response.entitlement.entitlement.trace_id,
        )
        return response

    @_operator_call
    async def CreateClaim(  # noqa: N802 (named by the contract)
        self, request: pb.CreateClaimRequest, operator: identity.Operator
    ) -> pb.CreateClaimResponse:
        """Makes a new one-time claim for a vehicle whose device key was lost or replaced.

        Stored as a hash only: as long as the claim is open, a repetition makes
        a new one, which ends the first; later it shows none.
        """
        vin = _vin(request.vin)
        _reason(request.reason)
        now_ms = self._now_ms()

        def again(tx: Transaction) -> bool:
            claim = tx.claim(vin)
            return claim is not None and not claim.used_ms

        def change(tx: Transaction) -> enrolment.Claim:
            known_vehicle(tx, vin)
            claim = enrolment.make_claim(tx, vin, self._claim_ttl_s, self._random, now_ms)
            tx.audit(
                operator.actor,
                "create-claim",
                vin,
                now_ms,
                request_id=request.request_id,
                reason=request.reason,
                expires_ms=claim.expires_ms,
            )
            return claim

        claim = await self._secret(operator, request, again, change, now_ms)
        _log.info("claim made", vin=vin, operator=operator.name)
        return pb.CreateClaimResponse(claim_token=claim.token, claim_expires_ms=claim.expires_ms)

    @_operator_call
    async def BlockVehicle(  # noqa: N802 (named by the contract)
        self, request: pb.BlockVehicleRequest, operator: identity.Operator
    ) -> pb.BlockVehicleResponse:
        """Ends a vehicle's certificate, its open claim and its stream at once; its rights stay."""
        vin = _vin(request.vin)
        _reason(request.reason)
        now_ms = self._now_ms()

        def change(tx: Transaction) -> pb.BlockVehicleResponse:
            known_vehicle(tx, vin)
            ended = tx.end_devices(vin, now_ms)
            tx.end_claim(vin)
            tx.block(vin, now_ms)
            tx.audit(
                operator.actor,
                "block-vehicle",
                vin,
                now_ms,
                request_id=request.request_id,
                reason=request.reason,
                ended_fingerprints=[fingerprint.hex() for fingerprint in ended],
            )
            return pb.BlockVehicleResponse(vehicle=self._vehicle(tx, known_vehicle(tx, vin)))

        response, is_new = await self._once(operator, request, pb.BlockVehicleResponse, change, now_ms)
        if is_new:  # a repetition may come after the vehicle was let in again
            self._vehicles.end_stream(vin, f"vehicle {vin} is blocked; a new claim lets it in again")
            response.vehicle.connected = False
            _log.warning("vehicle blocked", vin=vin, reason=request.reason, operator=operator.name)
        return response

    @_operator_call
    async def RebindEcu(  # noqa: N802 (named by the contract)
        self, request: pb.RebindEcuRequest, operator: identity.Operator
    ) -> pb.RebindEcuResponse:
        """Binds a vehicle's rights to a replaced ECU; the tokens of the old uid are burned first."""
        vin = _vin(request.vin)
        _match("ecu_identifier", request.ecu_identifier, IDENTIFIER_PATTERN)
        old_uid, new_uid = _uid("old_uid", request.old_uid), _uid("new_uid", request.new_uid)
        reading_key = _reading_key("new_reading_key", request.new_reading_key)
        if old_uid == new_uid:
            raise InvalidRequestError("new_uid", expected="another uid than old_uid", found=new_uid.hex())
        _reason(request.reason)
        now_ms = self._now_ms()

        def change(tx: Transaction) -> pb.RebindEcuResponse:
            rebound = self._rights.rebind(
                tx,
                vin,
                request.ecu_identifier,
                old_uid,
                new_uid,
                per_year=self._ownership.rebinds_per_year,
                now_ms=now_ms,
                reading_key=reading_key,
            )
            tx.audit(
                operator.actor,
                "rebind-ecu",
                vin,
                now_ms,
                request_id=request.request_id,
                reason=request.reason,
                ecu_identifier=request.ecu_identifier,
                old_uid=old_uid.hex(),
                new_uid=new_uid.hex(),
                burning_tokens=[content.hex() for content in rebound.burning_tokens],
            )
            return pb.RebindEcuResponse(
                vehicle=self._vehicle(tx, known_vehicle(tx, vin)),
                version=rebound.version,
                burning_tokens=rebound.burning_tokens,
            )

        response, _ = await self._once(operator, request, pb.RebindEcuResponse, change, now_ms)
        self._changes.notify(Topic.RIGHTS, vin)
        _log.info("ECU re-bound", vin=vin, ecu=request.ecu_identifier, operator=operator.name)
        return response

    @_operator_call
    async def BeginTransfer(  # noqa: N802 (named by the contract)
        self, request: pb.BeginTransferRequest, operator: identity.Operator
    ) -> pb.BeginTransferResponse:
        """Begins the sale of a vehicle: makes a one-time code for its owner.

        Stored as a hash only: as long as the code is open, a repetition makes
        a new one, which ends the first; later it shows none.
        """
        vin = _vin(request.vin)
        now_ms = self._now_ms()

        def again(tx: Transaction) -> bool:
            return tx.transfer(vin) is not None

        def change(tx: Transaction) -> enrolment.Claim:
            known_vehicle(tx, vin)
            code = transfer.begin(tx, vin, self._ownership.transfer_ttl_s, self._random, now_ms)
            tx.audit(
                operator.actor,
                "begin-transfer",
                vin,
                now_ms,
                request_id=request.request_id,
                expires_ms=code.expires_ms,
            )
            return code

        code = await self._secret(operator, request, again, change, now_ms)
        _log.info("sale begun", vin=vin, operator=operator.name)
        return pb.BeginTransferResponse(transfer_code=code.token, expires_ms=code.expires_ms)

    @_operator_call
    async def CompleteTransfer(  # noqa: N802 (named by the contract)
        self, request: pb.CompleteTransferRequest, operator: identity.Operator
    ) -> pb.CompleteTransferResponse:
        """Completes a sale with the code that the present owner gave away.

        Use that the vehicle uploads later under rights of the owner before is
        still taken, and billed to that owner's account.
        """
        vin = _vin(request.vin)
        _match("account", request.account, _ACCOUNT)
        now_ms = self._now_ms()

        def change(tx: Transaction) -> pb.CompleteTransferResponse | TransferCodeError:
            known_vehicle(tx, vin)
            try:
                transfer.use(tx, vin, request.transfer_code, now_ms)
            except TransferCodeError as error:
                return error  # returned, so that the wrong try stays counted
            sold = self._rights.transfer(tx, vin, request.account, now_ms)
            tx.audit(
                operator.actor,
                "complete-transfer",
                vin,
                now_ms,
                request_id=request.request_id,
                account=request.account,
                owner_epoch=sold.owner_epoch,
                kept=[row.entitlement_id for row in sold.kept],
                ended=[row.entitlement_id for row in sold.ended],
            )
            return pb.CompleteTransferResponse(
                owner_epoch=sold.owner_epoch,
                kept=[_record(row, {}) for row in sold.kept],
                ended=[_record(row, {}) for row in sold.ended],
                version=sold.version,
            )

        response, _ = await self._once(operator, request, pb.CompleteTransferResponse, change, now_ms)
        self._changes.notify(Topic.RIGHTS, vin)
        self._changes.notify(Topic.STATUS, vin)
        _log.info("vehicle sold", vin=vin, owner_epoch=response.owner_epoch, operator=operator.name)
        return response

    @_operator_call
    async def ExportBundle(  # noqa: N802 (named by the contract)
        self, request: pb.ExportBundleRequest, operator: identity.Operator
    ) -> pb.ExportBundleResponse:
        """Signs all rights of a vehicle as one file, for a workshop without network."""
        vin = _vin(request.vin)
        now_ms = self._now_ms()

        def work(tx: Transaction) -> pb.ExportBundleResponse:
            made = self._rights.bundle(tx, vin, now_ms)
            content = made.update.SerializeToString(deterministic=True)
            tx.audit(
                operator.actor,
                "export-bundle",
                vin,
                now_ms,
                expires_ms=made.ends_ms,
                sha256=hashlib.sha256(content).hexdigest(),
            )
            return pb.ExportBundleResponse(bundle=content, expires_ms=made.ends_ms)

        response = await self._store.run(work)
        _log.info("bundle made", vin=vin, operator=operator.name)
        return response

    @_operator_call
    async def ConfirmRestore(  # noqa: N802 (named by the contract)
        self, request: pb.ConfirmRestoreRequest, operator: identity.Operator
    ) -> pb.ConfirmRestoreResponse:
        """Confirms that the database was restored, so that versions may move past what vehicles report."""
        _reason(request.reason)
        now_ms = self._now_ms()
        if not 0 < request.backup_ms <= now_ms:
            raise InvalidRequestError(
                "backup_ms", expected=f"a time in the past, 1 to {now_ms}", found=request.backup_ms
            )
        until_ms = now_ms + self._restore_window_ms

        def change(tx: Transaction) -> pb.ConfirmRestoreResponse:
            self._rights.confirm_restore(tx, request.backup_ms, until_ms, now_ms)
            tx.audit(
                operator.actor,
                "confirm-restore",
                "",
                now_ms,
                alarm=True,
                request_id=request.request_id,
                reason=request.reason,
                backup_ms=request.backup_ms,
                until_ms=until_ms,
            )
            return pb.ConfirmRestoreResponse(until_ms=until_ms)

        response, _ = await self._once(operator, request, pb.ConfirmRestoreResponse, change, now_ms)
        self._changes.notify_all(Topic.RIGHTS)
        _log.warning("restore confirmed", operator=operator.name, reason=request.reason)
        return response

    @_operator_call
    async def CloseInvoice(  # noqa: N802 (named by the contract)
        self, request: pb.CloseInvoiceRequest, operator: identity.Operator
    ) -> pb.CloseInvoiceResponse:
        """Closes the invoices of an account for a period: their lines are fixed for ever."""
        account = _match("account", request.account, _ACCOUNT)
        period = Span(request.period_start_ms, request.period_end_ms)
        if not 0 <= period.start_ms < period.end_ms:
            raise InvalidRequestError(
                "period_end_ms", expected=f"more than period_start_ms {period.start_ms}", found=period.end_ms
            )
        now_ms = self._now_ms()

        def change(tx: Transaction) -> pb.CloseInvoiceResponse:
            rows = invoice.close(tx, self._catalogue, account, period, now_ms)
            tx.audit(
                operator.actor,
                "close-invoice",
                "",
                now_ms,
                request_id=request.request_id,
                account=account,
                period_start_ms=period.start_ms,
                period_end_ms=period.end_ms,
                invoices={row.number: row.sha256.hex() for row in rows},
            )
            return pb.CloseInvoiceResponse(invoices=[_closed(row) for row in rows])

        response, _ = await self._once(operator, request, pb.CloseInvoiceResponse, change, now_ms)
        _log.info("invoices closed", account=account, count=len(response.invoices), operator=operator.name)
        return response

    @_operator_call
    async def CreateCorrection(  # noqa: N802 (named by the contract)
        self, request: pb.CreateCorrectionRequest, operator: identity.Operator
    ) -> pb.CreateCorrectionResponse:
        """Adds a credit or a debit to the next invoice of an account; the closed one stays as it is."""
        _reason(request.reason)
        found = request.amount_minor
        if not 1 <= abs(found) <= MAX_PRICE_MINOR:
            raise InvalidRequestError(
                "amount_minor", expected=f"-{MAX_PRICE_MINOR} to {MAX_PRICE_MINOR}, not 0", found=found
            )
        now_ms = self._now_ms()

        def change(tx: Transaction) -> pb.CreateCorrectionResponse:
            row = tx.invoice(request.invoice_number)
            if row is None:
                raise NotFoundError(f"no closed invoice has number {request.invoice_number}")
            tx.add_correction(row, request.amount_minor, request.reason, now_ms)
            tx.audit(
                operator.actor,
                "correct-invoice",
                "",
                now_ms,
                request_id=request.request_id,
                invoice_number=row.number,
                account=row.account,
                currency=row.currency,
                amount_minor=request.amount_minor,
                reason=request.reason,
            )
            return pb.CreateCorrectionResponse(account=row.account, currency=row.currency)

        response, _ = await self._once(operator, request, pb.CreateCorrectionResponse, change, now_ms)
        _log.info("correction made", invoice=request.invoice_number, operator=operator.name)
        return response

    @_operator_call
    async def ReportPayment(  # noqa: N802 (named by the contract)
        self, request: pb.ReportPaymentRequest, operator: identity.Operator
    ) -> pb.ReportPaymentResponse:
        """Says that a payment for a subscription failed or was made."""
        vin = _vin(request.vin)
        _match("entitlement_id", request.entitlement_id, _ENTITLEMENT)
        if request.state not in (pb.PAYMENT_STATE_FAILED, pb.PAYMENT_STATE_PAID):
            raise InvalidRequestError("state", expected="failed or paid", found=request.state)
        paid = request.state == pb.PAYMENT_STATE_PAID
        now_ms = self._now_ms()

        def change(tx: Transaction) -> pb.ReportPaymentResponse:
            version = self._rights.payment(tx, vin, request.entitlement_id, paid=paid, now_ms=now_ms)
            tx.audit(
                operator.actor,
                "payment-made" if paid else "payment-failed",
                vin,
                now_ms,
                request_id=request.request_id,
                entitlement_id=request.entitlement_id,
            )
            return pb.ReportPaymentResponse(
                entitlement=self._one_record(tx, vin, request.entitlement_id), version=version
            )

        response, _ = await self._once(operator, request, pb.ReportPaymentResponse, change, now_ms)
        self._changes.notify(Topic.RIGHTS, vin)
        _log.info(
            "payment reported",
            vin=vin,
            entitlement_id=request.entitlement_id,
            paid=paid,
            operator=operator.name,
        )
        return response

    @_operator_call
    async def TopUpEntitlement(  # noqa: N802 (named by the contract)
        self, request: pb.TopUpEntitlementRequest, operator: identity.Operator
    ) -> pb.TopUpEntitlementResponse:
        """Adds bought units to a prepaid right."""
        vin = _vin(request.vin)
        _match("entitlement_id", request.entitlement_id, _ENTITLEMENT)
        if not 1 <= request.packs <= MAX_PACKS:
            raise InvalidRequestError("packs", expected=f"1 to {MAX_PACKS}", found=request.packs)
        now_ms = self._now_ms()

        def change(tx: Transaction) -> pb.TopUpEntitlementResponse:
            version = self._rights.top_up(tx, vin, request.entitlement_id, request.packs, now_ms)
            tx.audit(
                operator.actor,
                "top-up",
                vin,
                now_ms,
                request_id=request.request_id,
                entitlement_id=request.entitlement_id,
                packs=request.packs,
            )
            return pb.TopUpEntitlementResponse(
                entitlement=self._one_record(tx, vin, request.entitlement_id), version=version
            )

        response, _ = await self._once(operator, request, pb.TopUpEntitlementResponse, change, now_ms)
        self._changes.notify(Topic.RIGHTS, vin)
        _log.info("units bought", vin=vin, entitlement_id=request.entitlement_id, packs=request.packs)
        return response

    @_operator_call
    async def ChangePlan(  # noqa: N802 (named by the contract)
        self, request: pb.ChangePlanRequest, operator: identity.Operator
    ) -> pb.ChangePlanResponse:
        """Moves a right to other terms, from its next period on."""
        vin = _vin(request.vin)
        _match("entitlement_id", request.entitlement_id, _ENTITLEMENT)
        _match("plan_id", request.plan_id, IDENTIFIER_PATTERN)
        now_ms = self._now_ms()

        def change(tx: Transaction) -> pb.ChangePlanResponse:
            right, plan_id = request.entitlement_id, request.plan_id
            from_ms, plan = self._rights.change_plan(tx, vin, right, plan_id, now_ms)
            tx.audit(
                operator.actor,
                "change-plan",
                vin,
                now_ms,
                request_id=request.request_id,
                entitlement_id=right,
                plan_id=plan.id,
                plan_version=plan.version,
                from_ms=from_ms,
            )
            return pb.ChangePlanResponse(
                entitlement=self._one_record(tx, vin, right), from_ms=from_ms, plan_version=plan.version
            )

        response, _ = await self._once(operator, request, pb.ChangePlanResponse, change, now_ms)
        self._changes.notify(Topic.RIGHTS, vin)
        _log.info("plan changed", vin=vin, entitlement_id=request.entitlement_id, plan=request.plan_id)
        return response

    @_operator_call
    async def RunRenewals(  # noqa: N802 (named by the contract)
        self, _request: pb.RunRenewalsRequest, operator: identity.Operator
    ) -> pb.RunRenewalsResponse:
        """Starts next periods and ends what has run out, now."""
        vehicles = await self._renewals.run_due()
        now_ms = self._now_ms()
        await self._store.run(lambda tx: tx.audit(operator.actor, "renew", "", now_ms, vehicles=vehicles))
        return pb.RunRenewalsResponse(vehicles=vehicles)

    @_operator_call
    async def RestartJournal(  # noqa: N802 (named by the contract)
        self, request: pb.RestartJournalRequest, operator: identity.Operator
    ) -> pb.RestartJournalResponse:
        """Ends a forked journal at the cloud's head; the vehicle goes on in a new one that names it."""
        vin = _vin(request.vin)
        _match("journal_id", request.journal_id, _JOURNAL)
        _reason(request.reason)
        now_ms = self._now_ms()

        def change(tx: Transaction) -> pb.RestartJournalResponse:
            source = known_vehicle(tx, vin).source
            fork_seq = _fork_seq(tx, vin, request.journal_id, request.evidence_id)
            made = ingest.restart(tx, source, request.journal_id, fork_seq, self._receipt_key, now_ms)
            tx.audit(
                operator.actor,
                "restart-journal",
                vin,
                now_ms,
                alarm=True,
                request_id=request.request_id,
                reason=request.reason,
                journal=request.journal_id,
                fork_seq=fork_seq,
                head_seq=made.head_seq,
                head_hash=made.head_hash.hex(),
            )
            return pb.RestartJournalResponse(restart=made)

        response, _ = await self._once(operator, request, pb.RestartJournalResponse, change, now_ms)
        self._vehicles.restart_journal(vin)
        _log.warning(
            "journal restarted",
            vin=vin,
            journal=request.journal_id,
            operator=operator.name,
            reason=request.reason,
        )
        return response

    # --- reading ----------------------------------------------------------

    @_operator_call
    async def ListEvidence(  # noqa: N802 (named by the contract)
        self, request: pb.ListEvidenceRequest, _operator: identity.Operator
    ) -> pb.ListEvidenceResponse:
        """Lists both sides of what was found about a vehicle's journals, oldest first."""
        vin = _vin(request.vin)

        def work(tx: Transaction) -> list[EvidenceRow]:
            known_vehicle(tx, vin)
            return tx.evidence(vin)

        return pb.ListEvidenceResponse(
            evidence=[
                pb.JournalEvidence(
                    evidence_id=row.id,
                    kind=row.kind,
                    journal_id=row.journal_id,
                    seq=row.seq,
                    finding=row.text,
                    stored=row.stored,
                    received=row.received,
                    found_ms=row.found_ms,
                )
                for row in await self._store.run(work)
            ]
        )

    @_operator_call
    async def ListAudit(  # noqa: N802 (named by the contract)
        self, request: pb.ListAuditRequest, _operator: identity.Operator
    ) -> pb.ListAuditResponse:
        """Lists the audit log, of one vehicle or of all, the newest entry last."""
        vin = _vin(request.vin) if request.vin else ""
        _match("page_token", request.page_token, _NUMBER_PAGE)
        size = _page_size(request.page_size)

        def work(tx: Transaction) -> list[AuditRow]:
            after = int(request.page_token or 0)
            return tx.audit_page(vin, alarms_only=request.alarms_only, after=after, limit=size + 1)

        rows = await self._store.run(work)
        page = rows[:size]
        return pb.ListAuditResponse(
            entries=[
                pb.AuditEntry(
                    at_ms=row.at_ms,
                    actor=row.actor,
                    action=row.action,
                    vin=row.vin,
                    detail=row.detail,
                    alarm=row.alarm,
                )
                for row in page
            ],
            next_page_token=str(page[-1].id) if len(rows) > size else "",
        )

    @_operator_call
    async def ListVehicles(  # noqa: N802 (named by the contract)
        self, _request: pb.ListVehiclesRequest, _operator: identity.Operator
    ) -> pb.ListVehiclesResponse:
        """Lists the registered vehicles."""

        def work(tx: Transaction) -> list[pb.Vehicle]:
            return [self._vehicle(tx, row) for row in tx.vehicles()]

        return pb.ListVehiclesResponse(vehicles=await self._store.run(work))

    @_operator_call
    async def ListEntitlements(  # noqa: N802 (named by the contract)
        self, request: pb.ListEntitlementsRequest, _operator: identity.Operator
    ) -> pb.ListEntitlementsResponse:
        """Lists the rights of a vehicle's present owner, ended ones included."""
        vin = _vin(request.vin)

        def work(tx: Transaction) -> tuple[pb.ListEntitlementsResponse, list[OpenUsageRow]]:
            owner_epoch = known_vehicle(tx, vin).owner_epoch
            status, signed = tx.status(vin), tx.vehicle_set(vin)
            mine = [row for row in tx.entitlements(vin) if row.owner_epoch == owner_epoch]
            response = pb.ListEntitlementsResponse(
                entitlements=[_record(row, status) for row in mine],
                version=signed.version if signed else 0,
            )
            counts = any(record.entitlement.quotas for record in response.entitlements)
            return response, tx.stored_usage(known_vehicle(tx, vin).source) if counts else []

        response, usage = await self._store.run(work)
        # Long usage takes seconds to read, for which no other vehicle should wait.
        await asyncio.to_thread(_add_quota_uses, response.entitlements, usage, self._now_ms())
        return response

    async def WatchFeatures(  # noqa: N802 (named by the contract)
        self, request: pb.WatchFeaturesRequest, context: identity.Context
    ) -> AsyncIterator[pb.WatchFeaturesResponse]:
        """Streams each change of what a vehicle's features report, the present state first."""

        def work(tx: Transaction) -> pb.WatchFeaturesResponse:
            vehicle = known_vehicle(tx, vin)
            features = [vehicle_service_pb2.FeatureStatus.FromString(c) for c in tx.status(vin).values()]
            # A vehicle that has not heard of its sale yet goes on reporting rights of the owner before.
            earlier = {r.entitlement_id for r in tx.entitlements(vin) if r.owner_epoch < vehicle.owner_epoch}
            return pb.WatchFeaturesResponse(
                features=[status for status in features if status.entitlement_id not in earlier],
                last_update=vehicle_service_pb2.UpdateResult.FromString(vehicle.last_update)
                if vehicle.last_update
                else None,
            )

        operator = None
        try:
            operator = identity.operator(context)
            operator.may("WatchFeatures", vin=request.vin)
            vin = _vin(request.vin)
            with self._changes.watch(Topic.STATUS, vin) as changed:
                while True:
                    changed.clear()
                    yield await self._store.run(work)
                    await changed.wait()
        except RequestError as error:
            await self.note_refusal(operator, "WatchFeatures", request, error)
            await context.abort(identity.status_code(error), error.told)

    @_operator_call
    async def ListUsage(  # noqa: N802 (named by the contract)
        self, request: pb.ListUsageRequest, _operator: identity.Operator
    ) -> pb.ListUsageResponse:
        """Lists the usage records of a vehicle's present owner."""
        vin = _vin(request.vin)
        _match("page_token", request.page_token, _PAGE)
        size = _page_size(request.page_size)
        journal, _, seq = request.page_token.partition("/")

        def work(tx: Transaction) -> tuple[list[UsageRow], dict[str, list[UsageRow]]]:
            vehicle = known_vehicle(tx, vin)
            rows = tx.usage(
                vehicle.source, (journal, int(seq or 0)), size + 1, owner_epoch=vehicle.owner_epoch
            )
            # A weak clock is dated by what stands before and behind it, on whatever page.
            weak = {row.journal_id for row in rows[:size] if dating.is_weak(row.content)}
            return rows, {name: tx.journal(vehicle.source, name) for name in sorted(weak)}

        rows, journals = await self._store.run(work)
        page = rows[:size]
        return pb.ListUsageResponse(
            records=[usage_pb2.UsageRecord.FromString(row.content) for row in page],
            next_page_token=f"{page[-1].journal_id}/{page[-1].seq}" if len(rows) > size else "",
            # A long journal takes seconds, for which no other vehicle should wait.
            dated=await asyncio.to_thread(_dated, page, journals),
        )

    @_operator_call
    async def PreviewInvoice(  # noqa: N802 (named by the contract)
        self, request: pb.PreviewInvoiceRequest, _operator: identity.Operator
    ) -> pb.PreviewInvoiceResponse:
        """Rates what no invoice has billed yet: of a vehicle for each of its accounts, or of an account."""
        if bool(request.vin) == bool(request.account):
            raise InvalidRequestError("vin", expected="a vehicle or an account, not both", found=request.vin)
        vin = _vin(request.vin) if request.vin else ""
        account = _match("account", request.account, _ACCOUNT) if request.account else ""
        now_ms = self._now_ms()

        def work(tx: Transaction) -> list[invoice.Account]:
            if account:
                return [invoice.of_account(tx, self._catalogue, account)]
            return invoice.of_vehicle(tx, self._catalogue, vin, known_vehicle(tx, vin).source)

        accounts = await self._store.run(work)
        # Long usage takes seconds to rate, for which no other vehicle should wait.
        return await asyncio.to_thread(invoice.preview, accounts, now_ms)

    @_operator_call
    async def ListInvoices(  # noqa: N802 (named by the contract)
        self, request: pb.ListInvoicesRequest, _operator: identity.Operator
    ) -> pb.ListInvoicesResponse:
        """Lists closed invoices, by number."""
        account = _match("account", request.account, _ACCOUNT) if request.account else ""
        _match("page_token", request.page_token, _NUMBER_PAGE)
        size = _page_size(request.page_size)

        def work(tx: Transaction) -> pb.ListInvoicesResponse:
            rows = tx.invoices(account, after=int(request.page_token or 0), limit=size + 1)
            page = rows[:size]
            listed = [_closed(row) for row in page]
            if request.rate_again:
                for row, closed in zip(page, listed, strict=True):
                    closed.rated_again = invoice.rated_again(tx, self._catalogue, row) == row.content
            return pb.ListInvoicesResponse(
                invoices=listed, next_page_token=str(page[-1].number) if len(rows) > size else ""
            )

        return await self._store.run(work)

    # ----------------------------------------------------------------------

    def _one_record(self, tx: Transaction, vin: str, entitlement_id: str) -> pb.EntitlementRecord:
        row = next(r for r in tx.entitlements(vin) if r.entitlement_id == entitlement_id)
        return _record(row, tx.status(vin))

    def _vehicle(self, tx: Transaction, row: VehicleRow) -> pb.Vehicle:
        return pb.Vehicle(
            vin=row.vin,
            source=row.source,
            ecus=[
                pb.Ecu(
                    ecu_identifier=e.identifier,
                    hardware_id=e.hardware_id,
                    ecu_uid=e.uid,
                    reading_key=e.reading_key,
                )
                for e in tx.ecus(row.vin)
            ],
            enrolled_ms=row.enrolled_ms,
            connected=self._vehicles.connected(row.vin),
            last_update=vehicle_service_pb2.UpdateResult.FromString(row.last_update)
            if row.last_update
            else None,
            blocked_ms=row.blocked_ms,
            owner_epoch=row.owner_epoch,
            findings=[finding.text for finding in tx.findings(row.vin)],
        )

    async def _once(
        self,
        operator: identity.Operator,
        request: _Writing,
        kind: type[_Response],
        change: Callable[[Transaction], _Response | TransferCodeError],
        now_ms: int,
    ) -> tuple[_Response, bool]:
        """Does a writing request once (AIP-155); a repetition gets the first answer.

        Returns:
            the answer, and whether it is new.

        Raises:
            TransferCodeError: `change` returned it; what it counted is stored.
        """
        request.request_id = request.request_id.lower()  # RFC 9562, section 4: case means nothing

        def work(tx: Transaction) -> tuple[_Response | TransferCodeError, bool]:
            before = self._answered(tx, operator, request.request_id, request, kind)
            if before is not None:
                return before, False
            response = change(tx)
            if not isinstance(response, TransferCodeError):
                self._remember(tx, operator, request.request_id, request, response, now_ms)
            return response, True

        response, is_new = await self._store.run(work)
        if isinstance(response, TransferCodeError):
            raise response
        return response, is_new

    async def _secret(
        self,
        operator: identity.Operator,
        request: _Writing,
        again: Callable[[Transaction], bool],
        change: Callable[[Transaction], enrolment.Claim],
        now_ms: int,
    ) -> enrolment.Claim:
        """Makes a one-time token, of which nothing but a hash and its end are stored.

        Args:
            again: tells whether a repetition may replace what the first request made.

        Returns:
            the token; an empty one for a repetition that comes too late.
        """
        request.request_id = request.request_id.lower()  # RFC 9562, section 4: case means nothing

        def work(tx: Transaction) -> enrolment.Claim:
            before = self._answered(tx, operator, request.request_id, request, pb.CreateClaimResponse)
            if before is not None and not again(tx):
                return enrolment.Claim("", before.claim_expires_ms)
            made = change(tx)
            response = pb.CreateClaimResponse(claim_expires_ms=made.expires_ms)
            self._remember(tx, operator, request.request_id, request, response, now_ms)
            return made

        return await self._store.run(work)

    def _answered(
        self,
        tx: Transaction,
        operator: identity.Operator,
        request_id: str,
        request: Message,
        kind: type[_Response],
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
        before = tx.request(operator.name, request_id)
        if before is None:
            return None
        if before.request_hash != _hash(request):
            raise ExistsError(f"request_id {request_id} was used for another request; nothing was changed")
        return kind.FromString(before.response)

    def _remember(
        self,
        tx: Transaction,
        operator: identity.Operator,
        request_id: str,
        request: Message,
        response: Message,
        now_ms: int,
    ) -> None:
        if tx.request(operator.name, request_id) is None:
            row = RequestRow(_hash(request), response.SerializeToString(deterministic=True))
            tx.add_request(operator.name, request_id, row, now_ms)


def _fork_seq(tx: Transaction, vin: str, journal_id: str, evidence_id: int) -> int:
    """Where a journal forks: the lowest position that evidence shows, or that of one piece of it.

    With the lowest, the vehicle sends everything again that may be missing; it
    refuses one that the cloud has signed for before.
    """
    kept = [e for e in tx.evidence(vin) if e.journal_id == journal_id and e.kind == findings.FORK]
    if not kept:
        raise NotPossibleError(
            f"nothing is known of a fork of journal {journal_id}; nothing was changed. "
            f"See what is: fod-cloud vehicle evidence {vin}"
        )
    if not evidence_id:
        return min(e.seq for e in kept)
    found = next((e.seq for e in kept if e.id == evidence_id), None)
    if found is None:
        raise NotFoundError(f"evidence {evidence_id} is none of a fork of journal {journal_id}")
    return found


def _dated(page: Sequence[UsageRow], journals: Mapping[str, Sequence[UsageRow]]) -> list[pb.DatedWindow]:
    """How each record of a page is dated; `journals` are whole, of those with weak clocks."""
    found: dict[tuple[str, int], dating.Dated] = {}
    for name, rows in journals.items():
        windows = [dating.window(row.content, row.stored_ms) for row in rows]
        found.update(((name, row.seq), dated) for row, dated in zip(rows, dating.dated(windows), strict=True))
    return [
        pb.DatedWindow(
            start_ms=d.start_ms,
            end_ms=d.end_ms,
            earliest_end_ms=d.earliest_end_ms,
            latest_end_ms=d.latest_end_ms,
        )
        for row in page
        for d in [found.get((row.journal_id, row.seq)) or dating.as_signed(row.content, row.stored_ms)]
    ]


def _hash(request: Message) -> bytes:
    name = request.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(name + b"\x00" + request.SerializeToString(deterministic=True)).digest()


def _closed(row: InvoiceRow) -> pb.ClosedInvoice:
    return pb.ClosedInvoice(content=row.content, sha256=row.sha256, closed_ms=row.closed_ms)


def _add_quota_uses(
    records: Iterable[pb.EntitlementRecord], usage: Sequence[OpenUsageRow], now_ms: int
) -> None:
    """Adds how far quotas are used up, by what the vehicle has uploaded."""
    used = [invoice.used(row) for row in usage]
    for record in records:
        record.quota_uses.extend(rating.quota_uses(record.entitlement, used, now_ms))


def _record(row: EntitlementRow, status: dict[str, bytes]) -> pb.EntitlementRecord:
    record = pb.EntitlementRecord(
        entitlement=entitlement_pb2.Entitlement.FromString(row.content),
        granted_ms=row.granted_ms,
        revoked_ms=row.revoked_ms,
        revoke_reason=row.revoke_reason,
        payment_failed_ms=row.payment_failed_ms,
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


def _reason(text: str) -> str:
    if not 1 <= len(text) <= MAX_REASON:
        raise InvalidRequestError("reason", expected=f"1 to {MAX_REASON} characters", found=len(text))
    return text


def _uid(field: str, uid: bytes) -> bytes:
    if len(uid) != UID_BYTES:
        raise InvalidRequestError(field, expected=f"{UID_BYTES} bytes", found=len(uid))
    return uid


def _reading_key(field: str, key: bytes) -> bytes:
    if len(key) not in {0, READING_KEY_BYTES}:
        raise InvalidRequestError(field, expected=f"{READING_KEY_BYTES} bytes or none", found=len(key))
    return key


def _page_size(found: int) -> int:
    if not 0 <= found <= MAX_PAGE:
        raise InvalidRequestError("page_size", expected=f"0 to {MAX_PAGE}", found=found)
    return found or MAX_PAGE


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
        _uid(f"{where}.ecu_uid", ecu.ecu_uid)
        _reading_key(f"{where}.reading_key", ecu.reading_key)
        ecus.append(Ecu(ecu.ecu_identifier, ecu.hardware_id, ecu.ecu_uid, ecu.reading_key))
    for name in ("identifier", "uid"):
        if len({getattr(ecu, name) for ecu in ecus}) < len(ecus):
            raise InvalidRequestError(
                "ecus", expected=f"a different {name} for each ECU", found="a repeated one"
            )
    return ecus
