"""fod-cloud: the server, and the operator's commands to it."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cloud import client, config, server
from cloud.errors import StartError
from cloud.export import command as export_command
from common import cli, log
from common.config import ConfigError
from openfod.operator.v1 import operator_service_pb2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command is None:
            return _serve(arguments.config)
        if arguments.command is export_command.run:
            return int(export_command.run(arguments))
        settings = config.read_operator(arguments.config)
        return client.run(settings, lambda stub: int(arguments.command(stub, arguments)))
    except (ConfigError, StartError) as error:
        return cli.fail(str(error), code=cli.EXIT_USAGE)


def _serve(path: Path) -> int:
    settings = config.read(path)
    log.configure(settings.log.level, settings.log.form)

    def ready(cloud: server.Cloud) -> None:
        cli.print_event("ready", port=cloud.port, enrolment_port=cloud.enrolment_port)

    asyncio.run(server.serve(path, settings, ready))
    return cli.EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fod-cloud", description="Grants features and bills their use.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the server")
    serve.add_argument("--config", type=Path, required=True, metavar="FILE")
    serve.set_defaults(command=None)

    _add_vehicle_commands(commands)

    grant = _command(commands, "grant", "grant a vehicle the right of a plan", client.grant)
    grant.add_argument("vin", metavar="VIN")
    grant.add_argument("plan", metavar="PLAN")
    grant.add_argument("--account", required=True, metavar="ACC", help="billing account, such as acc-4711")
    grant.add_argument("--wait", action="store_true", help="wait until the vehicle reports it active")

    revoke = _command(commands, "revoke", "end a right", client.revoke)
    revoke.add_argument("vin", metavar="VIN")
    revoke.add_argument("entitlement", metavar="ENTITLEMENT")
    revoke.add_argument("--reason", required=True, help="why, for the audit log and the driver")

    export_command.add(
        _command(commands, "export", "carry usage to a biller, as CloudEvents", export_command.run)
    )

    bundle = _command(commands, "export-bundle", "write a vehicle's rights to a file", client.export_bundle)
    bundle.add_argument("vin", metavar="VIN")
    bundle.add_argument("--out", type=Path, required=True, metavar="FILE")
    bundle.add_argument("--force", action="store_true", help="replace the file")

    restore = _command(
        commands, "confirm-restore", "confirm that the database was restored", client.confirm_restore
    )
    restore.add_argument(
        "--backup-time", type=_moment, required=True, metavar="ISO", help="such as 2026-03-31T12:00:00Z"
    )
    restore.add_argument("--reason", required=True, help="why, for the audit log")

    audit = _command(commands, "audit", "list the audit log", client.list_audit)
    audit.add_argument("--vin", default="", metavar="VIN", help="only of this vehicle")
    audit.add_argument("--alarms", action="store_true", help="only what a person should look at")

    reading: list[tuple[str, str, Callable[[client.Stub, argparse.Namespace], int]]] = [
        ("entitlements", "list a vehicle's rights", client.list_entitlements),
        ("watch", "follow what a vehicle's features report", client.watch),
        ("usage", "list a vehicle's usage", client.list_usage),
    ]
    for name, text, command in reading:
        _command(commands, name, text, command).add_argument("vin", metavar="VIN")
    _add_payment_commands(commands)
    return parser


def _add_payment_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    invoice = _command(commands, "invoice", "show what is to be billed, or close an invoice", client.invoice)
    invoice.add_argument("whom", metavar="VIN|ACCOUNT", help="an account's covers all its vehicles")
    invoice.add_argument("--close", action="store_true", help="fix its lines for ever (of an account)")
    invoice.add_argument(
        "--period", type=_period, metavar="MONTH|FROM/TO", help="to close, such as 2026-03 (UTC)"
    )

    invoices = _command(commands, "invoices", "list closed invoices", client.list_invoices)
    invoices.add_argument("account", nargs="?", default="", metavar="ACCOUNT", help="only of this account")
    invoices.add_argument("--number", type=int, default=0, metavar="N", help="show the lines of one")
    invoices.add_argument(
        "--verify", action="store_true", help="rate each one again from its records, and compare"
    )

    correct = _command(commands, "correct", "credit or debit something on the next invoice", client.correct)
    correct.add_argument("number", type=int, metavar="NUMBER", help="of the closed invoice")
    correct.add_argument(
        "--minor", type=int, required=True, metavar="N", help="minor units, such as -150 for a credit"
    )
    correct.add_argument("--reason", required=True, help="why, for the account and the audit log")

    payment = _command(commands, "payment", "say how a subscription's payment went", client.payment)
    payment.add_argument("vin", metavar="VIN")
    payment.add_argument("entitlement", metavar="ENTITLEMENT")
    payment.add_argument("state", choices=("failed", "paid"))

    top_up = _command(commands, "top-up", "add bought units to a prepaid right", client.top_up)
    top_up.add_argument("vin", metavar="VIN")
    top_up.add_argument("entitlement", metavar="ENTITLEMENT")
    top_up.add_argument("--packs", type=int, default=1, metavar="N", help="how often the plan's units")

    change = _command(commands, "change-plan", "move a right to other terms", client.change_plan)
    change.add_argument("vin", metavar="VIN")
    change.add_argument("entitlement", metavar="ENTITLEMENT")
    change.add_argument("plan", metavar="PLAN", help="its own for the newest version, or another one")

    _command(commands, "renew", "start next periods and end what has run out, now", client.renew)


def _add_vehicle_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    vehicle = commands.add_parser("vehicle", help="register vehicles, and what changes with them")
    vehicle_commands = vehicle.add_subparsers(required=True, metavar="COMMAND")
    add = _command(vehicle_commands, "add", "register a vehicle", client.add_vehicle)
    add.add_argument("vin", metavar="VIN")
    add.add_argument(
        "--ecu",
        type=_ecu,
        action="append",
        default=[],
        metavar="IDENT:HWID:UIDHEX[:KEYHEX]",
        help="ECU as built in, and the public key with which it signs what it counts, if it has one;"
        " may be given several times",
    )
    _command(vehicle_commands, "list", "list the vehicles", client.list_vehicles)

    claim = _command(vehicle_commands, "claim", "let a vehicle enrol once more", client.claim)
    claim.add_argument("vin", metavar="VIN")
    claim.add_argument("--reason", required=True, help="why, for the audit log")

    block = _command(vehicle_commands, "block", "end a vehicle's certificate at once", client.block)
    block.add_argument("vin", metavar="VIN")
    block.add_argument("--reason", required=True, help="why, for the audit log")

    rebind = _command(vehicle_commands, "rebind", "bind the rights to a replaced ECU", client.rebind)
    rebind.add_argument("vin", metavar="VIN")
    rebind.add_argument("ecu", metavar="ECU", help="identifier, such as seat-module")
    rebind.add_argument("old_uid", type=_uid, metavar="OLD_UID", help="of the ECU that was taken out, hex")
    rebind.add_argument("new_uid", type=_uid, metavar="NEW_UID", help="of the ECU that was put in, hex")
    rebind.add_argument(
        "--reading-key",
        type=_key,
        default=b"",
        metavar="KEYHEX",
        help="with which the new ECU signs what it counts",
    )
    rebind.add_argument("--reason", required=True, help="why, for the audit log")

    evidence = _command(vehicle_commands, "evidence", "list both sides of a fork", client.list_evidence)
    evidence.add_argument("vin", metavar="VIN")
    evidence.add_argument("--out", type=Path, metavar="DIR", help="write the stored and the received bytes")

    restart = _command(
        vehicle_commands, "restart-journal", "confirm an honest restore of a vehicle", client.restart_journal
    )
    restart.add_argument("vin", metavar="VIN")
    restart.add_argument("--journal", required=True, metavar="ID", help="that has forked, 16 hex digits")
    restart.add_argument(
        "--evidence", type=int, default=0, metavar="NUMBER", help="that shows where; else the lowest position"
    )
    restart.add_argument(
        "--request-id", default="", metavar="UUID", help="repeat a request under its id; a new one if absent"
    )
    restart.add_argument("--reason", required=True, help="why, for the audit log")

    transfer = vehicle_commands.add_parser("transfer", help="sell a vehicle")
    transfer_commands = transfer.add_subparsers(required=True, metavar="COMMAND")
    begin = _command(transfer_commands, "begin", "make the present owner's code", client.begin_transfer)
    begin.add_argument("vin", metavar="VIN")
    complete = _command(
        transfer_commands, "complete", "hand over with the owner's code", client.complete_transfer
    )
    complete.add_argument("vin", metavar="VIN")
    complete.add_argument("--code", required=True, metavar="CODE", help="as the present owner gave it away")
    complete.add_argument("--account", required=True, metavar="ACC", help="the new owner's billing account")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    command: Callable[..., int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=command)
    return parser


def _ecu(text: str) -> operator_service_pb2.Ecu:
    match = re.fullmatch(r"([^:]+):([^:]+):([0-9a-fA-F]{32})(?::([0-9a-fA-F]{64}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            "expected IDENT:HWID:UIDHEX, the uid in 32 hex digits, and perhaps :KEYHEX, the key in 64;"
            f" found {text!r}"
        )
    return operator_service_pb2.Ecu(
        ecu_identifier=match[1],
        hardware_id=match[2],
        ecu_uid=bytes.fromhex(match[3]),
        reading_key=bytes.fromhex(match[4] or ""),
    )


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a time such as 2026-03-31T12:00:00Z: {error}") from error
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text} has no time zone; append Z for UTC")
    return moment


def _period(text: str) -> tuple[int, int]:
    """Start and end of a month or an interval, Unix milliseconds."""
    month = re.fullmatch(r"([0-9]{4})-(0[1-9]|1[0-2])", text)
    if month is not None:
        year, number = int(month[1]), int(month[2])
        start = datetime(year, number, 1, tzinfo=UTC)
        end = datetime(year + number // 12, number % 12 + 1, 1, tzinfo=UTC)
    else:
        first, _, last = text.partition("/")
        start, end = _moment(first), _moment(last)
    return int(start.timestamp()) * 1000, int(end.timestamp()) * 1000


def _uid(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{32}", text):
        raise argparse.ArgumentTypeError(f"expected a uid in 32 hex digits; found {text!r}")
    return bytes.fromhex(text)


def _key(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"expected an Ed25519 public key in 64 hex digits; found {text!r}")
    return bytes.fromhex(text)


if __name__ == "__main__":
    sys.exit(main())
