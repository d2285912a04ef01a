"""The operator's commands: each calls the operator API and shows the answer.

Never touches the database: what a command may do is what the server lets the
operator's certificate do.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from cloud import config
from common import cli
from common.config import ConfigError
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.operator.v1 import operator_service_pb2_grpc
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2

CALL_TIMEOUT_S = 30.0
"""How long one call may take."""
WAIT_TIMEOUT_S = 600.0
"""How long `grant --wait` waits for the vehicle."""
MAX_RESPONSE_BYTES = 64 * 1_048_576
"""Largest answer."""

_ACCOUNT_PREFIX = "acc-"

Stub = operator_service_pb2_grpc.OperatorServiceStub

_UNITS = {
    usage_pb2.UNIT_MILLISECOND: "ms",
    usage_pb2.UNIT_METRE: "m",
    usage_pb2.UNIT_MILLIWATT_HOUR: "mWh",
    usage_pb2.UNIT_ONE: "",
}
_NEXT_STEPS = {
    grpc.StatusCode.UNAVAILABLE: "is fod-cloud serve running, and does operator.root_ca fit its certificate?",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the server did not answer in time; try again",
    grpc.StatusCode.PERMISSION_DENIED: "use an operator certificate of the enrolment CA that has the role",
}


def run(settings: config.Operator, command: Callable[[Stub], int]) -> int:
    """Runs one command over a channel to the operator API; returns the exit code."""
    credentials = grpc.ssl_channel_credentials(
        _read("operator.root_ca", settings.root_ca),
        _read("operator.key", settings.key),
        _read("operator.certificate", settings.certificate),
    )
    options = [
        ("grpc.ssl_target_name_override", settings.server_name),
        ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ]
    with grpc.secure_channel(settings.endpoint, credentials, options) as channel:
        try:
            return command(Stub(channel))
        except grpc.RpcError as error:
            return cli.fail(_explain(settings.endpoint, cast("grpc.Call", error)))
        except KeyboardInterrupt:
            return cli.EXIT_FAILED


def _explain(endpoint: str, error: grpc.Call) -> str:
    next_step = _NEXT_STEPS.get(error.code())
    details = (error.details() or error.code().name.lower()).splitlines()[0]
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        details = f"cannot reach {endpoint}"
    return f"{details} ({next_step})" if next_step else details


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{key}: {path}: cannot be read: {error.strerror}"]) from error


# --- commands ------------------------------------------------------------------


def add_vehicle(stub: Stub, arguments: argparse.Namespace) -> int:
    """Registers a vehicle and shows its claim token once."""
    request = pb.CreateVehicleRequest(vin=arguments.vin, ecus=arguments.ecu, request_id=str(uuid.uuid4()))
    answer = stub.CreateVehicle(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    print(f"registered {answer.vehicle.vin} as {answer.vehicle.source}")
    print(f"claim token, shown only now, valid until {_time(answer.claim_expires_ms)}:")
    print(answer.claim_token)
    return cli.EXIT_DONE


def list_vehicles(stub: Stub, arguments: argparse.Namespace) -> int:
    """Lists the vehicles."""
    answer = stub.ListVehicles(pb.ListVehiclesRequest(), timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    cli.print_table(
        ["VIN", "source", "owner", "enrolled", "connected", "last update", "ECUs", "findings"],
        [
            (
                v.vin,
                v.source,
                v.owner_epoch,
                f"blocked {_time(v.blocked_ms)}" if v.blocked_ms else _time(v.enrolled_ms),
                "yes" if v.connected else "no",
                _update(v.last_update) if v.HasField("last_update") else "-",
                ", ".join(f"{e.ecu_identifier} ({e.hardware_id})" for e in v.ecus) or "-",
                "; ".join(v.findings) or "-",
            )
            for v in answer.vehicles
        ],
    )
    return cli.EXIT_DONE


def claim(stub: Stub, arguments: argparse.Namespace) -> int:
    """Makes a claim for a second enrolment and shows it once."""
    request = pb.CreateClaimRequest(vin=arguments.vin, reason=arguments.reason, request_id=str(uuid.uuid4()))
    answer = stub.CreateClaim(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    print(f"the certificate that {arguments.vin} has now ends when it enrols with this")
    print(f"claim token, shown only now, valid until {_time(answer.claim_expires_ms)}:")
    print(answer.claim_token)
    return cli.EXIT_DONE


def block(stub: Stub, arguments: argparse.Namespace) -> int:
    """Ends a vehicle's certificate and its stream."""
    request = pb.BlockVehicleRequest(vin=arguments.vin, reason=arguments.reason, request_id=str(uuid.uuid4()))
    answer = stub.BlockVehicle(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    print(f"blocked {arguments.vin}; its rights go on by their own terms")
    print(f"let it in again with: fod-cloud vehicle claim {arguments.vin}, and a new enrolment")
    return cli.EXIT_DONE


def rebind(stub: Stub, arguments: argparse.Namespace) -> int:
    """Binds a vehicle's rights to a replaced ECU."""
    request = pb.RebindEcuRequest(
        vin=arguments.vin,
        ecu_identifier=arguments.ecu,
        old_uid=arguments.old_uid,
        new_uid=arguments.new_uid,
        new_reading_key=arguments.reading_key,
        reason=arguments.reason,
        request_id=str(uuid.uuid4()),
    )
    answer = stub.RebindEcu(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    print(f"{arguments.ecu} of {arguments.vin} is now {arguments.new_uid.hex()}, version {answer.version}")
    if answer.burning_tokens:
        print("tokens that switch the features off for ever on the ECU that was taken out, in hex:")
    for content in answer.burning_tokens:
        print(content.hex())
    return cli.EXIT_DONE


def begin_transfer(stub: Stub, arguments: argparse.Namespace) -> int:
    """Begins a sale and shows the owner's code once."""
    request = pb.BeginTransferRequest(vin=arguments.vin, request_id=str(uuid.uuid4()))
    answer = stub.BeginTransfer(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    print("give this to the present owner, and to nobody else; whoever has it can complete the sale")
    print(f"transfer code, shown only now, valid until {_time(answer.expires_ms)}:")
    print(answer.transfer_code)
    return cli.EXIT_DONE


def complete_transfer(stub: Stub, arguments: argparse.Namespace) -> int:
    """Completes a sale with the owner's code."""
    request = pb.CompleteTransferRequest(
        vin=arguments.vin,
        transfer_code=arguments.code,
        account=arguments.account,
        request_id=str(uuid.uuid4()),
    )
    answer = stub.CompleteTransfer(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    print(f"sold {arguments.vin} to {arguments.account}, its owner {answer.owner_epoch}")
    cli.print_table(
        ["right", "feature", "plan", "now"],
        [
            (
                r.entitlement.entitlement_id,
                r.entitlement.feature_id,
                f"{r.entitlement.plan_id} v{r.entitlement.plan_version}",
                word,
            )
            for word, records in (("stays with the vehicle", answer.kept), ("ended", answer.ended))
            for r in records
        ],
    )
    return cli.EXIT_DONE


def export_bundle(stub: Stub, arguments: argparse.Namespace) -> int:
    """Writes all rights of a vehicle into a file that only its owner can read."""
    if arguments.out.exists() and not arguments.force:
        return cli.fail(f"{arguments.out} exists; replace it with --force")
    answer = stub.ExportBundle(pb.ExportBundleRequest(vin=arguments.vin), timeout=CALL_TIMEOUT_S)
    try:
        _write_private(arguments.out, answer.bundle)
    except OSError as error:
        return cli.fail(f"{arguments.out}: cannot be written: {error.strerror}")
    if arguments.json:
        return _dump(
            {"file": str(arguments.out), "bytes": len(answer.bundle), "expires_ms": answer.expires_ms}
        )
    print(f"wrote {arguments.out}: {len(answer.bundle)} bytes, good until {_time(answer.expires_ms)}")
    print(f"on the vehicle: fod-agent import {arguments.out.name}")
    return cli.EXIT_DONE


def confirm_restore(stub: Stub, arguments: argparse.Namespace) -> int:
    """Confirms that the cloud's database was restored from a backup."""
    request = pb.ConfirmRestoreRequest(
        backup_ms=int(arguments.backup_time.timestamp() * 1000),
        reason=arguments.reason,
        request_id=str(uuid.uuid4()),
    )
    answer = stub.ConfirmRestore(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    print(f"confirmed; until {_time(answer.until_ms)} versions move past what vehicles report")
    return cli.EXIT_DONE


def list_evidence(stub: Stub, arguments: argparse.Namespace) -> int:
    """Lists what is kept of forks and of journals that began anew; with --out, writes both sides to files."""
    answer = stub.ListEvidence(pb.ListEvidenceRequest(vin=arguments.vin), timeout=CALL_TIMEOUT_S)
    if arguments.out is not None:
        try:
            arguments.out.mkdir(mode=0o700, parents=True, exist_ok=True)
            for found in answer.evidence:
                for side in ("stored", "received"):
                    if content := getattr(found, side):
                        _write_private(arguments.out / f"{found.evidence_id}-{side}.pb", content)
        except OSError as error:
            return cli.fail(f"{arguments.out}: cannot be written: {error.strerror}")
    if arguments.json:
        return _json(answer)
    cli.print_table(
        ["number", "found", "kind", "journal", "position", "stored", "received", "finding"],
        [
            (
                e.evidence_id,
                _time(e.found_ms),
                e.kind,
                e.journal_id,
                e.seq,
                f"{len(e.stored)} bytes" if e.stored else "none",
                f"{len(e.received)} bytes" if e.received else "not kept: limit",
                e.finding,
            )
            for e in answer.evidence
        ],
    )
    if arguments.out is not None:
        print(f"wrote both sides to {arguments.out}: NUMBER-stored.pb (openfod.usage.v1.UsageRecord)")
        print("and NUMBER-received.pb (openfod.usage.v1.SignedUsageBatch)")
    return cli.EXIT_DONE


def restart_journal(stub: Stub, arguments: argparse.Namespace) -> int:
    """Confirms that a vehicle was honestly restored, so that its journal goes on in a new one."""
    request = pb.RestartJournalRequest(
        vin=arguments.vin,
        journal_id=arguments.journal,
        evidence_id=arguments.evidence,
        reason=arguments.reason,
        request_id=arguments.request_id or str(uuid.uuid4()),
    )
    answer = stub.RestartJournal(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    made = answer.restart
    print(
        f"journal {made.journal_id} of {arguments.vin} ends at record {made.head_seq}; what is stored stays"
    )
    print(f"the vehicle moves its own records from {made.fork_seq} on into a new journal when it connects")
    return cli.EXIT_DONE


def list_audit(stub: Stub, arguments: argparse.Namespace) -> int:
    """Lists the audit log."""
    entries = list(_audit(stub, arguments.vin, alarms_only=arguments.alarms))
    if arguments.json:
        return _dump([_plain(entry) for entry in entries])
    cli.print_table(
        ["when", "who", "what", "VIN", "alarm", "facts"],
        [
            (_time(e.at_ms), e.actor, e.action, e.vin or "-", "ALARM" if e.alarm else "-", e.detail)
            for e in entries
        ],
    )
    return cli.EXIT_DONE


def grant(stub: Stub, arguments: argparse.Namespace) -> int:
    """Grants a right; with --wait, follows it until the vehicle confirms it."""
    started_ns = time.monotonic_ns()
    request = pb.GrantEntitlementRequest(
        vin=arguments.vin, plan_id=arguments.plan, account=arguments.account, request_id=str(uuid.uuid4())
    )
    answer = stub.GrantEntitlement(request, timeout=CALL_TIMEOUT_S)
    right = answer.entitlement
    result = {"grant": _plain(answer)}
    if not arguments.json:
        print(
            f"granted {right.entitlement_id}: {right.feature_id} by {right.plan_id}, trace {right.trace_id}"
        )
    if not arguments.wait:
        return _dump(result) if arguments.json else cli.EXIT_DONE
    status = _follow(stub, arguments.vin, right.entitlement_id, quiet=arguments.json)
    if status is None:
        return cli.fail(
            f"{arguments.vin} has not confirmed {right.feature_id} within {WAIT_TIMEOUT_S:.0f} s; the right "
            f"stands, follow it with: fod-cloud watch {arguments.vin}"
        )
    waited_ms = (time.monotonic_ns() - started_ns) // 1_000_000
    if arguments.json:
        _dump({**result, "status": _plain(status), "waited_ms": waited_ms})
    elif status.state == vehicle_service_pb2.FEATURE_STATE_ACTIVE:
        print(f"active {waited_ms} ms after the grant; on the vehicle: {status.activation_ms} ms")
    else:
        nrc = f", NRC 0x{status.nrc:02X}" if status.nrc else ""
        cli.fail(f"{right.feature_id}: {status.reason or 'fault'}{nrc}")
    return cli.EXIT_DONE if status.state == vehicle_service_pb2.FEATURE_STATE_ACTIVE else cli.EXIT_FAILED


def revoke(stub: Stub, arguments: argparse.Namespace) -> int:
    """Ends a right."""
    request = pb.RevokeEntitlementRequest(
        vin=arguments.vin,
        entitlement_id=arguments.entitlement,
        reason=arguments.reason,
        request_id=str(uuid.uuid4()),
    )
    answer = stub.RevokeEntitlement(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    print(f"revoked {arguments.entitlement}; the vehicle releases it when that is safe")
    return cli.EXIT_DONE


def list_entitlements(stub: Stub, arguments: argparse.Namespace) -> int:
    """Lists a vehicle's rights and what its features report."""
    request = pb.ListEntitlementsRequest(vin=arguments.vin)
    answer = stub.ListEntitlements(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    cli.print_table(
        ["right", "feature", "plan", "account", "granted", "ended", "quota", "on the vehicle"],
        [
            (
                r.entitlement.entitlement_id,
                r.entitlement.feature_id,
                f"{r.entitlement.plan_id} v{r.entitlement.plan_version}",
                r.entitlement.account,
                _time(r.granted_ms),
                _ending(r),
                _quotas(r),
                _status(r.feature_status) if r.HasField("feature_status") else "not reported",
            )
            for r in answer.entitlements
        ],
    )
    return cli.EXIT_DONE


def watch(stub: Stub, arguments: argparse.Namespace) -> int:
    """Shows each change of a vehicle's features until it is interrupted."""
    for answer in stub.WatchFeatures(pb.WatchFeaturesRequest(vin=arguments.vin)):
        if arguments.json:
            cli.print_event("features", **_plain(answer))
            continue
        print(f"last update: {_update(answer.last_update) if answer.HasField('last_update') else 'none yet'}")
        for status in answer.features:
            print(f"  {status.feature_id}: {_status(status)}")
    return cli.EXIT_DONE


def list_usage(stub: Stub, arguments: argparse.Namespace) -> int:
    """Lists a vehicle's usage records."""
    pages = list(_usage(stub, arguments.vin))
    records = [record for page in pages for record in page.records]
    dates = [dated for page in pages for dated in page.dated]
    if arguments.json:
        return _dump(
            [{**_plain(r), "dated": _plain(d)} for r, d in zip(records, dates, strict=True)],
        )
    cli.print_table(
        ["id", "feature", "meter", "value", "not metered", "dimensions", "from", "to", "clock", "dated"],
        [
            (
                r.id,
                r.feature_id,
                r.meter_id,
                _quantity(r.value, r.unit),
                _gap(r.gap, r.unit, unbounded=r.gap_unbounded),
                ", ".join(f"{d.name}={d.value}" for d in r.dimensions) or "-",
                _time(r.window_start_ms),
                _time(r.window_end_ms),
                usage_pb2.ClockTrust.Name(r.clock_trust).removeprefix("CLOCK_TRUST_").lower(),
                _dated(r, d),
            )
            for r, d in zip(records, dates, strict=True)
        ],
    )
    return cli.EXIT_DONE


def invoice(stub: Stub, arguments: argparse.Namespace) -> int:
    """Shows what no invoice has billed yet, or closes an account's invoices for a period."""
    if arguments.close:
        return _close_invoice(stub, arguments)
    if arguments.period:
        return cli.fail("--period goes with --close; a preview shows all that is open", code=cli.EXIT_USAGE)
    is_account = arguments.whom.startswith(_ACCOUNT_PREFIX)
    request = pb.PreviewInvoiceRequest(
        vin="" if is_account else arguments.whom, account=arguments.whom if is_account else ""
    )
    answer = stub.PreviewInvoice(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    for found in answer.invoices:
        print(f"Invoice preview for {found.account}, as of {_time(found.rated_ms)}")
        _show_lines(found)
    if not answer.invoices:
        print("nothing to bill that no closed invoice has")
    _explain_lines()
    return cli.EXIT_DONE


def _close_invoice(stub: Stub, arguments: argparse.Namespace) -> int:
    if not arguments.whom.startswith(_ACCOUNT_PREFIX):
        return cli.fail("an invoice is closed for an account, such as acc-4711", code=cli.EXIT_USAGE)
    if not arguments.period:
        return cli.fail("--close needs --period, such as 2026-03", code=cli.EXIT_USAGE)
    start_ms, end_ms = arguments.period
    request = pb.CloseInvoiceRequest(
        account=arguments.whom,
        period_start_ms=start_ms,
        period_end_ms=end_ms,
        request_id=str(uuid.uuid4()),
    )
    answer = stub.CloseInvoice(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _dump([_plain_closed(closed) for closed in answer.invoices])
    for closed in answer.invoices:
        _show_closed(closed)
    if not answer.invoices:
        print("nothing to bill: no invoice was made")
    _explain_lines()
    return cli.EXIT_DONE


def list_invoices(stub: Stub, arguments: argparse.Namespace) -> int:
    """Lists closed invoices; with --number shows one, with --verify rates each one again."""
    found = list(_invoices(stub, arguments.account, rate_again=arguments.verify))
    if arguments.number:
        found = [c for c in found if pb.Invoice.FromString(c.content).number == arguments.number]
        if not found:
            return cli.fail(f"no closed invoice has number {arguments.number}")
    wrong = [
        f"invoice {pb.Invoice.FromString(closed.content).number}: its records give other lines now than when"
        " it was closed"
        for closed in found
        if arguments.verify and not closed.rated_again
    ]
    if arguments.json:
        _dump([_plain_closed(closed) for closed in found])
    elif arguments.number:
        _show_closed(found[0])
        _explain_lines()
    else:
        cli.print_table(
            ["number", "account", "from", "to", "total", "lines", "closed", "SHA-256"],
            [
                (
                    invoice.number,
                    invoice.account,
                    _time(invoice.period_start_ms),
                    _time(invoice.period_end_ms),
                    money(invoice.total_minor, invoice.currency),
                    len(invoice.lines),
                    _time(closed.closed_ms),
                    closed.sha256.hex(),
                )
                for closed in found
                for invoice in [pb.Invoice.FromString(closed.content)]
            ],
        )
    if wrong:
        return cli.fail("; ".join(wrong))
    if arguments.verify and not arguments.json:
        print(f"{len(found)} rated again from their records: the same bytes")
    return cli.EXIT_DONE


def correct(stub: Stub, arguments: argparse.Namespace) -> int:
    """Adds a credit or a debit to the next invoice of a closed one's account."""
    request = pb.CreateCorrectionRequest(
        invoice_number=arguments.number,
        amount_minor=arguments.minor,
        reason=arguments.reason,
        request_id=str(uuid.uuid4()),
    )
    answer = stub.CreateCorrection(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    what = "credit" if arguments.minor < 0 else "debit"
    print(
        f"{what} of {money(abs(arguments.minor), answer.currency)} for invoice {arguments.number}; "
        f"it is a line of the next invoice of {answer.account}"
    )
    return cli.EXIT_DONE


def payment(stub: Stub, arguments: argparse.Namespace) -> int:
    """Says that a payment failed or was made."""
    states = {"failed": pb.PAYMENT_STATE_FAILED, "paid": pb.PAYMENT_STATE_PAID}
    request = pb.ReportPaymentRequest(
        vin=arguments.vin,
        entitlement_id=arguments.entitlement,
        state=states[arguments.state],
        request_id=str(uuid.uuid4()),
    )
    answer = stub.ReportPayment(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    right = answer.entitlement
    ends = _time(right.entitlement.validity.not_after_s * 1000)
    if right.revoked_ms:
        print(f"{arguments.entitlement} has ended: {right.revoke_reason}")
    elif right.payment_failed_ms:
        print(f"{arguments.entitlement} ends at {ends} unless it is paid; version {answer.version}")
    else:
        print(f"{arguments.entitlement} is paid and goes on to {ends}; version {answer.version}")
    return cli.EXIT_DONE


def top_up(stub: Stub, arguments: argparse.Namespace) -> int:
    """Adds bought units to a prepaid right."""
    request = pb.TopUpEntitlementRequest(
        vin=arguments.vin,
        entitlement_id=arguments.entitlement,
        packs=arguments.packs,
        request_id=str(uuid.uuid4()),
    )
    answer = stub.TopUpEntitlement(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    (quota,) = answer.entitlement.entitlement.quotas
    print(f"{arguments.entitlement}: {quota.limit} of {quota.meter_id} bought; version {answer.version}")
    return cli.EXIT_DONE


def change_plan(stub: Stub, arguments: argparse.Namespace) -> int:
    """Moves a right to other terms from its next period on."""
    request = pb.ChangePlanRequest(
        vin=arguments.vin,
        entitlement_id=arguments.entitlement,
        plan_id=arguments.plan,
        request_id=str(uuid.uuid4()),
    )
    answer = stub.ChangePlan(request, timeout=CALL_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    print(
        f"{arguments.entitlement} has {arguments.plan} version {answer.plan_version} "
        f"from {_time(answer.from_ms)}"
    )
    return cli.EXIT_DONE


def renew(stub: Stub, arguments: argparse.Namespace) -> int:
    """Starts next periods and ends what has run out, now."""
    answer = stub.RunRenewals(pb.RunRenewalsRequest(), timeout=WAIT_TIMEOUT_S)
    if arguments.json:
        return _json(answer)
    print(f"{answer.vehicles} vehicles got a new set of rights")
    return cli.EXIT_DONE


def _show_closed(closed: pb.ClosedInvoice) -> None:
    found = pb.Invoice.FromString(closed.content)
    print(
        f"Invoice {found.number} for {found.account}, {_time(found.period_start_ms)} to "
        f"{_time(found.period_end_ms)}, closed {_time(closed.closed_ms)}"
    )
    _show_lines(found)
    print(f"SHA-256: {closed.sha256.hex()}")


def _show_lines(found: pb.Invoice) -> None:
    plans: dict[str, set[str]] = {}
    for line in found.lines:
        plans.setdefault(line.entitlement_id, set()).add(_plan(line))
    cli.print_table(
        ["what", "quantity", "price", "amount", "declared gap"],
        [
            (
                line.description + (f" [{_plan(line)}]" if len(plans[line.entitlement_id]) > 1 else ""),
                _quantity(line.quantity, line.unit),
                money(line.price_minor, found.currency)
                + (f" per {_quantity(line.per_units, line.unit)}" if line.meter_id else ""),
                money(line.amount_minor, found.currency),
                _gap(line.declared_gap, line.unit, unbounded=False) if line.meter_id else "-",
            )
            for line in found.lines
        ],
    )
    print(f"Total: {money(found.total_minor, found.currency)}")


def _plan(line: pb.InvoiceLine) -> str:
    return f"{line.plan_id} version {line.plan_version}"


def _explain_lines() -> None:
    print("Each line is quantity times price, rounded once, half up, to the smallest unit of the currency.")
    print("A declared gap could not be metered, and is not billed.")
    print("A right's fixed price is due at the start of each of its periods.")


def _ending(record: pb.EntitlementRecord) -> str:
    if record.revoked_ms:
        return f"{_time(record.revoked_ms)}: {record.revoke_reason}"
    if record.payment_failed_ms:
        return f"a payment failed; unpaid, at {_time(record.entitlement.validity.not_after_s * 1000)}"
    return "-"


def _quotas(record: pb.EntitlementRecord) -> str:
    parts = [
        f"{use.used} of {use.limit} {use.meter_id} used" + ("" if use.hard else " (more is billed)")
        for use in record.quota_uses
    ]
    return ", ".join(parts) or "-"


def _plain_closed(closed: pb.ClosedInvoice) -> dict[str, object]:
    """A closed invoice with its lines, beside the bytes that count."""
    return {**_plain(closed), "invoice": _plain(pb.Invoice.FromString(closed.content))}


# --- words for people ------------------------------------------------------------


def money(minor: int, currency: str) -> str:
    """An amount in words for people: 499 EUR minor units are "EUR 4.99", a credit "EUR -4.99"."""
    decimals = _DECIMALS.get(currency, 2)
    if decimals == 0:
        return f"{currency} {minor}"
    whole, rest = divmod(abs(minor), 10**decimals)
    return f"{currency} {'-' if minor < 0 else ''}{whole}.{rest:0{decimals}d}"


# ISO 4217: currencies whose minor unit is not a hundredth.
_DECIMALS = {
    **dict.fromkeys(["BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND"], 0),
    **dict.fromkeys(["VUV", "XAF", "XOF", "XPF"], 0),
    **dict.fromkeys(["BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"], 3),
}


def _follow(
    stub: Stub, vin: str, entitlement_id: str, *, quiet: bool
) -> vehicle_service_pb2.FeatureStatus | None:
    """Waits until the vehicle reports this right active or at fault; None if it takes too long."""
    ends = (vehicle_service_pb2.FEATURE_STATE_ACTIVE, vehicle_service_pb2.FEATURE_STATE_FAULT)
    shown = ""
    try:
        for answer in stub.WatchFeatures(pb.WatchFeaturesRequest(vin=vin), timeout=WAIT_TIMEOUT_S):
            for status in answer.features:
                if status.entitlement_id != entitlement_id:
                    continue
                if status.state in ends:
                    return status
                if not quiet and shown != (shown := _status(status)):
                    print(shown)
    except grpc.RpcError as error:
        if cast("grpc.Call", error).code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
    return None


def _dated(record: usage_pb2.UsageRecord, dated: pb.DatedWindow) -> str:
    """How the cloud dates a record of a weak clock, and between which signed times."""
    if record.clock_trust == usage_pb2.CLOCK_TRUST_SIGNED:
        return "as it says"
    bounds = f"between {_time(dated.earliest_end_ms)} and {_time(dated.latest_end_ms)}"
    return f"{_time(dated.start_ms)} to {_time(dated.end_ms)} (ended {bounds})"


def _usage(stub: Stub, vin: str) -> Iterable[pb.ListUsageResponse]:
    token = ""
    while True:
        page = stub.ListUsage(pb.ListUsageRequest(vin=vin, page_token=token), timeout=CALL_TIMEOUT_S)
        yield page
        token = page.next_page_token
        if not token:
            return


def _audit(stub: Stub, vin: str, *, alarms_only: bool) -> Iterable[pb.AuditEntry]:
    token = ""
    while True:
        request = pb.ListAuditRequest(vin=vin, alarms_only=alarms_only, page_token=token)
        page = stub.ListAudit(request, timeout=CALL_TIMEOUT_S)
        yield from page.entries
        token = page.next_page_token
        if not token:
            return


def _invoices(stub: Stub, account: str, *, rate_again: bool) -> Iterable[pb.ClosedInvoice]:
    token = ""
    while True:
        request = pb.ListInvoicesRequest(account=account, page_token=token, rate_again=rate_again)
        page = stub.ListInvoices(request, timeout=WAIT_TIMEOUT_S if rate_again else CALL_TIMEOUT_S)
        yield from page.invoices
        token = page.next_page_token
        if not token:
            return


def _write_private(path: Path, content: bytes) -> None:
    """Writes a file with mode 0600, whole or not at all, also if the power fails."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if ms else "-"


def _quantity(value: int, unit: int) -> str:
    return f"{value} {_UNITS.get(unit, '')}".rstrip()  # type: ignore[call-overload]


def _gap(gap: int, unit: int, *, unbounded: bool) -> str:
    if unbounded:
        return "unknown"
    return _quantity(gap, unit) if gap else "-"


def _status(status: vehicle_service_pb2.FeatureStatus) -> str:
    state = vehicle_service_pb2.FeatureState.Name(status.state).removeprefix("FEATURE_STATE_").lower()
    return f"{state} ({status.reason})" if status.reason else state


def _update(result: vehicle_service_pb2.UpdateResult) -> str:
    if result.error_type:
        return f"refused: {result.error_type}: {result.error}"
    return f"version {result.director.targets}"


def _plain(message: Message) -> dict[str, object]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _json(message: Message) -> int:
    return _dump(_plain(message))


def _dump(value: object) -> int:
    cli.print_json(value)
    return cli.EXIT_DONE
