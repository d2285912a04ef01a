"""fod-agent: the command line of the in-vehicle agent."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from agent import __version__
from agent.config import DEFAULT_PATH, AgentConfig, load
from agent.errors import AgentError, ConditionError, NotRunningError, TransportError, TrustError
from common import log
from common.cli import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, fail, print_json, print_table
from common.config import ConfigError

if TYPE_CHECKING:  # a command loads what it needs
    from agent.adapters.store import Store


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        config = load(arguments.config)
    except ConfigError as error:
        return fail(str(error), code=EXIT_USAGE)
    log.configure(config.log.level, config.log.form)
    try:
        code: int = arguments.command(config, arguments)
    except AgentError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or arguments.config}: {error.strerror or error}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fod-agent",
        description="The in-vehicle agent for features on demand.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong use or configuration.",
    )
    parser.add_argument("--version", action="version", version=f"fod-agent {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, handler: object, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"Example: {example}",
        )
        sub.set_defaults(command=handler)
        sub.add_argument(
            "--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help=f"default: {DEFAULT_PATH}"
        )
        return sub

    enroll = command(
        "enroll",
        _enroll,
        "Make the device key here, and get its certificate with a one-time claim.",
        "fod-agent enroll --config agent.toml --claim TOKEN",
    )
    enroll.add_argument("--claim", required=True, metavar="TOKEN", help="as printed by fod-cloud vehicle add")
    enroll.add_argument(
        "--again", action="store_true", help="replace the key and certificate of an enrolled vehicle"
    )
    enroll.add_argument("--json", action="store_true", help="print one JSON document")
    command("run", _run, "Run the agent until it is told to end.", "fod-agent run --config agent.toml")
    status = command(
        "status",
        _status,
        "Show rights, features, trusted time, what will end soon, journal and buses.",
        "fod-agent status --config agent.toml --json",
    )
    status.add_argument("--json", action="store_true", help="print one JSON document")
    live = command(
        "watch",
        _watch,
        "Show live signals, buses and messages: those of the agent if it runs, else listen on its buses.",
        "fod-agent watch --config agent.toml --filter speed",
    )
    live.add_argument("--filter", default="", metavar="NAME", help="only names that contain it")
    live.add_argument(
        "--interval", type=_interval, default=0.5, metavar="S", help="seconds between two looks; default: 0.5"
    )
    live.add_argument("--once", action="store_true", help="listen for one interval, show it and end")
    live.add_argument("--json", action="store_true", help="print one JSON document a line")
    take = command(
        "import",
        _import,
        "Take rights from a file: for a workshop without network. Judged as the cloud's own answers are.",
        "fod-agent import --config agent.toml VIN.bundle",
    )
    take.add_argument("file", type=Path, metavar="FILE", help="as written by fod-cloud export-bundle")
    take.add_argument("--json", action="store_true", help="print one JSON document")
    history = command(
        "log",
        _log,
        "Show what was granted, changed and ended here, and what the ECUs said besides.",
        "fod-agent log --config agent.toml --export log.jsonl",
    )
    history.add_argument("--json", action="store_true", help="print one JSON document")
    files = history.add_mutually_exclusive_group()
    files.add_argument("--export", type=Path, metavar="FILE", help="write the log to a new file")
    files.add_argument("--verify", type=Path, metavar="FILE", help="check an export; reads nothing else")
    history.add_argument("--head", metavar="HASH", help="head that the export must end at, from status")
    usage = command(
        "usage",
        _usage,
        "Show what was used under each right since this owner has the vehicle, and what of it is reported.",
        "fod-agent usage --config agent.toml --json",
    )
    usage.add_argument("--json", action="store_true", help="print one JSON document")
    statement = command(
        "export",
        _export,
        "Write everything that was reported about this vehicle under its present owner to a file.",
        "fod-agent export --config agent.toml usage.jsonl",
    )
    statement.add_argument("file", type=Path, metavar="FILE", help="a new file; with --verify one to check")
    statement.add_argument(
        "--verify", action="store_true", help="check an export by its chain and the cloud's receipts"
    )
    statement.add_argument("--head", metavar="HASH", help="head that the export must end at, from usage")
    statement.add_argument("--json", action="store_true", help="print one JSON document")
    check = command(
        "check",
        _check,
        "Check configuration, keys, signal databases and stored rights; change nothing.",
        "fod-agent check --config agent.toml",
    )
    check.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _enroll(config: AgentConfig, arguments: argparse.Namespace) -> int:
    from agent.adapters import identity, link
    from openfod.vehicle.v1 import vehicle_service_pb2 as pb

    directory, cloud = config.state.directory, config.cloud
    roots: tuple[bytes, ...] = (link.read_ca(cloud.root_ca),)
    if arguments.again:
        key = identity.stage(directory)
        roots = _known_servers(config, roots[0])
    elif identity.load(directory) is not None:
        raise AgentError(
            f"this vehicle is enrolled already ({directory / identity.CERTIFICATE_FILE}); nothing was"
            " changed; with a new claim of the operator's: fod-agent enroll --again --claim TOKEN"
        )
    else:
        key = identity.make_key(directory)
    request = pb.EnrollRequest(
        vin=config.vehicle.vin,
        claim_token=arguments.claim,
        csr_der=identity.make_csr(key, config.vehicle.vin),
    )
    answer = link.enroll(cloud.enrolment_endpoint, b"".join(roots), cloud.server_name, request)
    keep = identity.swap if arguments.again else identity.save
    keep(directory, answer.certificate_der, answer.source)
    if arguments.json:
        print_json({"vin": config.vehicle.vin, "source": answer.source, "directory": str(directory)})
    else:
        print(f"{config.vehicle.vin} is enrolled; its usage is reported as {answer.source}.")
        print(f"The device key was made here and stays in {directory / identity.KEY_FILE}.")
        if arguments.again:
            print("Rights and journal are kept. An agent that runs goes on with the old key: restart it.")
    return EXIT_DONE


def _known_servers(config: AgentConfig, ca: bytes) -> tuple[bytes, ...]:
    """How an enrolled vehicle knows the cloud: as its stored rights say."""
    from agent.adapters.clock import SystemClock
    from agent.adapters.link import server_roots
    from agent.adapters.store import Store
    from agent.boot import BUILD_MS, STORE_FILE, read

    path = config.state.directory / STORE_FILE
    if not path.exists():
        return (ca,)
    store = Store(path, boot_id=SystemClock().boot_id(), journal_id=None)
    try:
        start = read(config, store)
    finally:
        store.close()
    anchors = start.verdict.rights.tls_anchors if start.verdict else ()
    return server_roots(anchors, ca, max(start.stored.mark_ms, BUILD_MS))


def _import(config: AgentConfig, arguments: argparse.Namespace) -> int:
    from agent import importing
    from agent.adapters import local_api

    with arguments.file.open("rb") as file:
        content = file.read(importing.MAX_BUNDLE_BYTES + 1)
    try:
        if len(content) > importing.MAX_BUNDLE_BYTES:  # refused here: no agent need be asked
            raise NotRunningError
        answer = local_api.bring(config.api_socket, content)
    except NotRunningError:
        try:
            answer = importing.import_stored(config, content)
        except (TrustError, ConditionError) as error:
            answer = {"error": error.kind, "reason": str(error)}
    taken = "error" not in answer
    if arguments.json:
        print_json({"taken": taken, **answer})
    elif taken:
        _print_import(answer)
    else:
        return fail(f"refused, nothing was changed: {answer['error']}: {answer['reason']}")
    return EXIT_DONE if taken else EXIT_FAILED


def _print_import(answer: dict[str, object]) -> None:
    before, now = answer["rights_version_before"], answer["rights_version"]
    print(f"Rights of version {now} are verified and stored (before: {before or 'none'}).")
    words = {"gained": "New", "changed": "Changed", "ended": "Ended"}
    rows = [
        (word, entry["feature"], entry["entitlement"])
        for key, word in words.items()
        if isinstance(entries := answer[key], list)
        for entry in entries
    ]
    if rows:
        print_table(("", "feature", "right"), rows)
    else:
        print("No right has changed.")
    print(f"Signed {_when(answer['signed_ms'])}; not a contact with the cloud.")


def _run(config: AgentConfig, _arguments: argparse.Namespace) -> int:
    from agent.buses import Buses

    # Frames gather while the rest, which takes most of a start, is loaded.
    buses = Buses(config)
    with contextlib.ExitStack() as unless_ready:
        unless_ready.callback(buses.close)
        buses.open()
        from agent.app import App

        app = App(config, buses=buses)
        unless_ready.pop_all()
    return app.run()


def _status(config: AgentConfig, arguments: argparse.Namespace) -> int:
    from agent.adapters import local_api

    try:
        status = local_api.ask(config.api_socket)
        status["running"] = True
    except TransportError as error:
        status = _stored_status(config)
        status["running"] = False
        status["not_running"] = str(error)
    if arguments.json:
        print_json(status)
    else:
        _print_status(status)
    return EXIT_DONE


def _watch(config: AgentConfig, arguments: argparse.Namespace) -> int:
    from agent.watch import watch

    watch(
        config,
        interval_s=arguments.interval,
        once=arguments.once,
        wanted=arguments.filter,
        as_json=arguments.json,
        out=sys.stdout,
    )
    return EXIT_DONE


def _interval(text: str) -> float:
    from agent.watch import MAX_INTERVAL_S, MIN_INTERVAL_S

    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not MIN_INTERVAL_S <= seconds <= MAX_INTERVAL_S:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected {MIN_INTERVAL_S} to {MAX_INTERVAL_S:.0f} seconds"
        )
    return seconds


def _log(config: AgentConfig, arguments: argparse.Namespace) -> int:
    from agent.trust import grant_log

    if arguments.verify is not None:
        return _verify_log(arguments)
    if arguments.head is not None:
        return fail("--head goes with --verify", code=EXIT_USAGE)
    contents = _stored_log(config)
    head = grant_log.verify_chain(contents)
    if arguments.export is not None:
        with arguments.export.open("xb") as file:
            file.write(grant_log.export(contents))
    entries = [json.loads(content) for content in contents]
    if arguments.json:
        print_json({"entries": entries, "head": head.hash.hex()})
    elif arguments.export is not None:
        print(f"{head.seq} entries are in {arguments.export}; head {head.hash.hex()}")
    else:
        rows = [(_when(e["at_ms"]), e["kind"], e.get("feature", "-"), grant_log.summary(e)) for e in entries]
        print_table(("time", "what", "feature", "facts"), rows)
        print(f"{head.seq} entries, head {head.hash.hex()}")
    return EXIT_DONE


def _usage(config: AgentConfig, arguments: argparse.Namespace) -> int:
    from agent.metering import statement

    with _looking(config) as store:
        report: dict[str, object] = {"usage": [], "receipts": []}
        if store is not None:
            receipts, head = store.receipts(), store.head()
            acked = {r.journal: r.through_seq for r in receipts}
            acked |= statement.agreed(r.content for r in store.restarts())
            amounts = statement.amounts(store.own_records(), store.pruned(), acked)
            report["journal"] = {"id": head.journal_id, "records": head.seq, "head": head.hash.hex()}
            report["usage"] = [
                {
                    **key._asdict(),
                    "unit": statement.unit_name(key.unit),
                    "dimensions": dict(key.dimensions),
                    **asdict(amount),
                }
                for key, amount in amounts.items()
            ]
            report["receipts"] = [
                {
                    "journal": r.journal,
                    "through": r.through_seq,
                    "stored_ms": statement.receipt_time_ms(r.content),
                }
                for r in receipts
            ]
    if arguments.json:
        print_json(report)
    else:
        _print_usage(report)
    return EXIT_DONE


def _print_usage(report: dict[str, object]) -> None:
    usage, receipts = report["usage"], report["receipts"]
    assert isinstance(usage, list)
    assert isinstance(receipts, list)
    rows = [
        (
            u["entitlement"],
            u["feature"],
            u["meter"],
            ", ".join(f"{name} {value}" for name, value in u["dimensions"].items()) or "-",
            f"{u['reported']} {u['unit']}",
            f"{u['waiting']} {u['unit']}",
            f"{u['reported_gap'] + u['waiting_gap']} {u['unit']}{' or more' if u['unbounded'] else ''}",
            max(u["receipts"].values(), default="-"),
        )
        for u in usage
    ]
    if not rows:
        print("Nothing was used under a right of the present owner.")
        return
    titles = (
        "right",
        "feature",
        "meter",
        "when",
        "reported",
        "waiting",
        "not metered",
        "receipt to",
    )
    print_table(titles, rows)
    if receipts:
        last = receipts[-1]
        print(f"Last receipt: record {last['through']} of {last['journal']}, {_when(last['stored_ms'])}")
    print("Windows that are still open are not in it.")


def _export(config: AgentConfig, arguments: argparse.Namespace) -> int:
    from agent.adapters import identity
    from agent.metering import statement

    if arguments.verify:
        return _verify_export(config, arguments)
    if arguments.head is not None:
        return fail("--head goes with --verify", code=EXIT_USAGE)
    known = identity.load(config.state.directory)
    lines, size = 0, 0
    with _looking(config) as store, arguments.file.open("xb") as file:
        if store is not None:
            for line in statement.export(
                known.source if known else "",
                store.own_records(),
                ((r.journal, r.content, r.signature) for r in store.receipts()),
                store.pruned(),
                ((r.content, r.signature) for r in store.restarts()),
            ):
                file.write(line)
                lines, size = lines + 1, size + len(line)
    if arguments.json:
        print_json({"file": str(arguments.file), "lines": lines, "bytes": size})
    else:
        print(f"{lines} lines are in {arguments.file}; check them with: fod-agent export --verify FILE")
    return EXIT_DONE


def _verify_export(config: AgentConfig, arguments: argparse.Namespace) -> int:
    from agent.adapters.receipts import receipt_key, verified_receipt
    from agent.metering import statement

    key = receipt_key(config.trust.receipt_key)
    if arguments.file.stat().st_size > statement.MAX_EXPORT_BYTES:
        return fail(f"{arguments.file} has more than {statement.MAX_EXPORT_BYTES} bytes")
    with arguments.file.open("rb") as file:
        checked = statement.verify_export(
            file,
            lambda content, signature: verified_receipt(key, content, signature),
            expected_head=arguments.head,
        )
    if arguments.json:
        print_json(checked._asdict())
        return EXIT_DONE
    print(
        f"{arguments.file} is whole: {checked.records} records, {checked.covered} of them under a signed"
        f" receipt, {checked.summed} more as sums; head {checked.head or '-'}"
    )
    if arguments.head is None:
        print("Compare the head with that of fod-agent status, or give it with --head.")
    return EXIT_DONE


@contextlib.contextmanager
def _looking(config: AgentConfig) -> Iterator[Store | None]:
    """The store to look at, beside a running agent; None if nothing was ever stored."""
    from agent.adapters.clock import SystemClock
    from agent.adapters.store import Store
    from agent.boot import STORE_FILE

    path = config.state.directory / STORE_FILE
    if not path.exists():
        yield None
        return
    store = Store(path, boot_id=SystemClock().boot_id(), journal_id=None)
    with contextlib.closing(store), store.at_one_moment():
        yield store


def _stored_log(config: AgentConfig) -> tuple[bytes, ...]:
    from agent.adapters.clock import SystemClock
    from agent.adapters.store import Store
    from agent.boot import STORE_FILE

    path = config.state.directory / STORE_FILE
    if not path.exists():
        return ()
    store = Store(path, boot_id=SystemClock().boot_id(), journal_id=None)
    try:
        return store.grant_log()
    finally:
        store.close()


def _verify_log(arguments: argparse.Namespace) -> int:
    from agent.trust import grant_log

    with arguments.verify.open("rb") as file:
        content = file.read(grant_log.MAX_EXPORT_BYTES + 1)
    head = grant_log.verify_export(content, expected_head=arguments.head)
    if arguments.json:
        print_json({"entries": head.seq, "head": head.hash.hex()})
    else:
        print(f"{arguments.verify} is whole: {head.seq} entries, head {head.hash.hex()}")
        if arguments.head is None:
            print("Compare the head with that of fod-agent status, or give it with --head.")
    return EXIT_DONE


def _stored_status(config: AgentConfig) -> dict[str, object]:
    """What the store says while no agent runs; reads only."""
    from agent.adapters import identity
    from agent.adapters.clock import SystemClock
    from agent.adapters.store import Store
    from agent.boot import BUILD_MS, STORE_FILE, read
    from agent.trust.expiry import endings

    directory = config.state.directory
    known = identity.load(directory)
    status: dict[str, object] = {"vin": config.vehicle.vin, "source": known.source if known else ""}
    if not (directory / STORE_FILE).exists():
        return status
    store = Store(directory / STORE_FILE, boot_id=SystemClock().boot_id(), journal_id=None)
    try:
        start = read(config, store)
    finally:
        store.close()
    stored = start.stored
    now_ms = max(stored.mark_ms, BUILD_MS)
    source = "mark" if stored.mark_ms > BUILD_MS else "build"
    status["time"] = {"unix_ms": now_ms, "uncertainty_ms": None, "source": source}
    status["problems"] = list(start.problems)
    status["last_contact_ms"] = stored.contact_ms
    status["journal"] = {
        "id": stored.head.journal_id,
        "records": stored.head.seq,
        "stored": stored.head.seq,
        "receipts_to": stored.acked_seq,
        "head": stored.head.hash.hex(),
        "dead": "",
    }
    status["log"] = {"entries": stored.log_head.seq, "head": stored.log_head.hash.hex()}
    verdict = start.verdict
    if verdict is not None:
        status["rights_version"] = verdict.rights.version
        status["warnings"] = [
            asdict(ending) for ending in endings(verdict.expires_ms, verdict.rights, now_ms)
        ]
        status["features"] = [
            {
                "feature": feature_id,
                "state": "STORED",
                "reason": "the agent is not running",
                "entitlement": right.entitlement_id,
                "activation_ms": 0,
            }
            for feature_id, right in sorted(verdict.rights.entitlements.items())
        ]
    return status


def _print_status(status: dict[str, object]) -> None:
    who = f"reported as {status['source']}" if status["source"] else "not enrolled (fod-agent enroll)"
    print(f"Vehicle {status['vin']}, {who}")
    if not status["running"]:
        print(f"The agent is not running ({status['not_running']}).")
        print("What follows is what it has stored." if "journal" in status else "It has stored nothing yet.")
    else:
        why = f" ({status['link_reason']})" if status.get("link_reason") else ""
        print(f"Cloud: {status['link']}{why}; last signed answer {_when(status['last_contact_ms'])}")
    moment = status.get("time")
    if isinstance(moment, dict):
        doubt = moment["uncertainty_ms"]
        known = isinstance(doubt, int) and doubt < 10**12
        unsure = f"at most {doubt} ms behind" if known else "uncertainty unknown"
        print(f"Trusted time: {_when(moment['unix_ms'])} ({moment['source']}, {unsure})")
    for problem in _texts(status.get("problems")):
        print(f"Problem: {problem}")
    for ending in _texts(status.get("warnings"), "words"):
        print(f"Warning: {ending}")
    if status.get("last_refusal"):
        print(f"Last refused update: {status['last_refusal']}")
    features = status.get("features")
    if isinstance(features, list) and features:
        print()
        rows = [
            (
                f["feature"],
                f["state"],
                f["reason"],
                f["entitlement"] or "-",
                f"{f['activation_ms']} ms" if f["activation_ms"] else "-",
            )
            for f in features
        ]
        print_table(("feature", "state", "why", "right", "grant to on"), rows)
    elif "journal" in status:
        print("\nNo features: no right has arrived yet.")
    quotas = status.get("quotas")
    if isinstance(quotas, list) and quotas:
        print()
        amounts = [
            (
                q["feature"],
                q["meter"],
                f"{q['used']} of {q['limit']}",
                "suspends" if q["hard"] else "more is billed",
                q["warning"] or "-",
            )
            for q in quotas
        ]
        print_table(("feature", "meter", "quota used", "at its end", "warning"), amounts)
    journal = status.get("journal")
    if isinstance(journal, dict):
        print(
            f"\nJournal {journal['id']}: {journal['records']} records,"
            f" receipts up to {journal['receipts_to']}"
        )
    history = status.get("log")
    if isinstance(history, dict):
        print(f"Log: {history['entries']} entries, head {history['head']}")
    buses = status.get("buses")
    if isinstance(buses, dict):
        counts = status.get("bus_counts")
        counts = counts if isinstance(counts, dict) else {}
        controllers = status.get("controllers")
        controllers = controllers if isinstance(controllers, dict) else {}
        for name, state in buses.items():
            controller = controllers.get(name, "unknown")
            said = "" if controller == "unknown" else f", {controller}"
            print(f"Bus {name}: {state}{said}{_counts(counts.get(name, {}))}")
    signals = status.get("signals")
    if isinstance(signals, dict) and signals:
        print()
        readings = [(name, _value(s["value"]), s["unit"], _age(s["age_ms"])) for name, s in signals.items()]
        print_table(("signal", "value", "unit", "age"), readings)


def _counts(counts: dict[str, int]) -> str:
    """What a bus brought that is worth a word."""
    named = (
        ("frames", "frames"),
        ("dropped", "dropped"),
        ("lost", "times lost"),
        ("error_frames", "error frames"),
        ("malformed", "malformed"),
    )
    return "".join(f", {counts[key]} {what}" for key, what in named if counts.get(key))


def _texts(found: object, key: str = "") -> list[str]:
    """The texts of a list, or of one key of each of its entries."""
    entries = found if isinstance(found, list) else []
    return [str(entry[key]) if key else str(entry) for entry in entries]


def _when(unix_ms: object) -> str:
    if not isinstance(unix_ms, int) or unix_ms == 0:
        return "never"
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _value(value: object) -> str:
    if value is None:
        return "unknown"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _age(age_ms: object) -> str:
    return f"{age_ms} ms" if isinstance(age_ms, int) else "never seen"


def _check(config: AgentConfig, arguments: argparse.Namespace) -> int:
    from agent.adapters import identity, signal_table
    from agent.adapters.receipts import receipt_key
    from agent.boot import anchors
    from agent.trust.verifier import check_anchors

    report: dict[str, object] = {"vin": config.vehicle.vin}
    problems: list[str] = []
    buses: dict[str, object] = {}
    for bus in config.buses:
        try:
            compiled = signal_table.compile_anew(bus)
        except AgentError as error:
            problems += str(error).splitlines()
            continue
        skipped = [{"file": str(bus.database), **asdict(s)} for s in compiled.skipped] if compiled else []
        notes = compiled.table.notes if compiled else ()
        buses[bus.name] = {
            "interface": bus.interface,
            "channel": bus.channel,
            "messages": compiled.messages if compiled else 0,
            "signals": sorted(compiled.table.infos) if compiled else [],
            "skipped": skipped,
            "not_mapped": [{"file": str(bus.signals), "key": key, "reason": what} for key, what in notes],
        }
    report["buses"] = buses
    for check in (
        lambda: receipt_key(config.trust.receipt_key),
        lambda: check_anchors(anchors(config)),
        lambda: problems.extend(_texts(_stored_status(config).get("problems"))),
    ):
        try:
            check()
        except AgentError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{error.filename}: {error.strerror}")
    try:
        known = identity.load(config.state.directory)
        report["source"] = known.source if known else None
    except AgentError as error:
        problems.append(str(error))
    report["listen_only"] = config.vehicle.listen_only
    report["problems"] = problems
    if arguments.json:
        print_json(report)
    else:
        _print_check(report, buses, problems)
    return EXIT_FAILED if problems else EXIT_DONE


def _print_check(report: dict[str, object], buses: dict[str, object], problems: list[str]) -> None:
    print(f"Vehicle {report['vin']}: {report.get('source') or 'not enrolled yet (fod-agent enroll)'}")
    print("It may only listen." if report["listen_only"] else "It may write to its buses.")
    for name, bus in buses.items():
        assert isinstance(bus, dict)
        print(
            f"Bus {name} ({bus['interface']} {bus['channel']}): {bus['messages']} messages,"
            f" {len(bus['signals'])} signals mapped"
        )
        for skipped in bus["skipped"]:
            place = f"{skipped['file']}:{skipped['line']}"
            print(f"  skipped {place}: {skipped['statement']}: {skipped['reason']}")
        for note in bus["not_mapped"]:
            print(f"  not mapped {note['file']}: {note['key']}: {note['reason']}")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if not problems:
        print("No problems.")


if __name__ == "__main__":
    sys.exit(main())
