"""The command `fod-sim`: simulated vehicle, serial CAN adapter, log replay and diagnostic tester."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import can
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common import cli
from common import log as logs
from common.config import ConfigError, read
from firmware_sim import adapter_run, control, replay, tester
from firmware_sim.adapter import BITRATES
from firmware_sim.frame import Frame
from firmware_sim.hub import CHANNEL, HOST, to_message
from firmware_sim.hub_client import HubError
from firmware_sim.run import ScenarioError, simulate
from firmware_sim.scenario import BusConfig, Scenario
from firmware_sim.transport import TransportError, open_bus

_Number = TypeVar("_Number", int, float)

CONNECT_TIMEOUT_S = 5.0
CLIENT_TIMEOUT_S = 60.0
"""How long a replay waits for a first client if it is asked to."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; exit codes 0 done, 1 failed, 2 wrong use or configuration."""
    arguments = _parser().parse_args(argv)
    logs.configure(arguments.log_level)
    try:
        return int(arguments.command(arguments))
    except (ConfigError, ScenarioError) as error:
        return cli.fail(str(error), code=cli.EXIT_USAGE)
    except (TransportError, HubError, adapter_run.SourceError) as error:
        return cli.fail(str(error))
    except (replay.ReplayError, tester.TesterError) as error:
        return cli.fail(str(error))
    except BrokenPipeError:
        return cli.EXIT_FAILED  # whoever read our output has gone
    except KeyboardInterrupt:
        return cli.EXIT_FAILED


def _run(arguments: argparse.Namespace) -> int:
    scenario = read(arguments.scenario, Scenario)
    commands = arguments.stdin or scenario.control == "stdin"
    asyncio.run(simulate(scenario, commands=commands, until_eof=arguments.stdin))
    return cli.EXIT_DONE


def _replay(arguments: argparse.Namespace) -> int:
    known = None if arguments.dbc is None else replay.known_ids(arguments.dbc)
    summary = asyncio.run(_replay_on_a_bus(arguments, known))
    if arguments.json:
        cli.print_json(summary.as_json())
    else:
        ids = f"{len(summary.ids)} identifiers"
        if summary.known is not None:
            ids += f", {summary.known} of them in the DBC"
        print(f"{summary.frames} frames in {summary.duration_s:.1f} s; {ids}")
        print(f"{summary.left_out} error and CAN FD frames left out")
    return cli.EXIT_DONE


async def _replay_on_a_bus(arguments: argparse.Namespace, known: frozenset[int] | None) -> replay.Summary:
    if arguments.interface is not None or arguments.host is not None:
        with _join(arguments) as joined:

            def send(frame: Frame) -> None:
                joined.send(to_message(frame))

            return await replay.replay(arguments.log, send, speed=arguments.speed, known=known)
    config = BusConfig(
        transport=arguments.bus,
        channel=arguments.channel or "vcan0",
        port=arguments.port,
        slcan=arguments.slcan,
    )
    opened = await open_bus(config)
    try:
        cli.print_event("ready", **opened.ready)
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        while arguments.wait_client and opened.socketcand is not None and opened.socketcand.client_count == 0:
            if time.monotonic() > deadline:
                raise TransportError(f"no client has joined within {CLIENT_TIMEOUT_S:.0f} s")
            await asyncio.sleep(0.02)
        return await replay.replay(
            arguments.log, lambda frame: opened.bus.send(frame, None), speed=arguments.speed, known=known
        )
    finally:
        await opened.close()


def _adapter(arguments: argparse.Namespace) -> int:
    log_only = (arguments.rate, arguments.seconds, arguments.wait_client or None)
    if arguments.log is None and any(value is not None for value in log_only):
        return cli.fail("--rate, --seconds and --wait-client go with --log", code=cli.EXIT_USAGE)
    options = adapter_run.Options(
        log=arguments.log,
        rate=arguments.rate,
        duration_s=arguments.seconds,
        wait_client=arguments.wait_client,
        host=arguments.host,
        port=arguments.port,
        channel=arguments.socketcan,
        fd=arguments.fd,
        bitrate=arguments.bitrate,
        link=arguments.link,
        faults=arguments.fault,
    )
    asyncio.run(adapter_run.run(options))
    return cli.EXIT_DONE


def _tester(arguments: argparse.Namespace) -> int:
    tx_id, rx_id = tester.ECUS[arguments.ecu]
    tx_id, rx_id = arguments.tx or tx_id, arguments.rx or rx_id
    requests = [tester.read_request(text) for text in arguments.request]
    exchanges: list[tester.Exchange] = []
    with _join(arguments) as bus:
        asking = tester.Tester(bus, tx_id=tx_id, rx_id=rx_id)
        for request in requests:
            exchanges.append(asking.ask(request, timeout_s=arguments.timeout))
            if not arguments.json:
                print(exchanges[-1].in_words(), flush=True)
    if arguments.json:
        cli.print_json([exchange.as_json() for exchange in exchanges])
    refused = any(exchange.nrc is not None for exchange in exchanges)
    return cli.EXIT_FAILED if refused else cli.EXIT_DONE


def _ecu_key(arguments: argparse.Namespace) -> int:
    """Makes an ECU's own key pair, as its factory would, and prints the public half."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        # Never over a key that is there: an ECU has one for its life.
        descriptor = os.open(arguments.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return cli.fail(f"{arguments.file}: cannot be made: {error.strerror}")
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    public = key.public_key().public_bytes_raw().hex()
    if arguments.json:
        cli.print_json({"public": public})
    else:
        print(public)
    return cli.EXIT_DONE


def _join(arguments: argparse.Namespace) -> can.BusABC:
    """Joins a bus that is open already, through python-can."""
    interface = arguments.interface or "socketcand"
    options: dict[str, Any] = {}
    if interface == "socketcand":
        options = {"host": arguments.host or HOST, "port": arguments.port, "tcp_tune": True}
    elif interface == "slcan":
        options = {"bitrate": 500_000, "sleep_after_open": 0}
    channel = arguments.channel
    if channel is None:
        channel = CHANNEL if interface == "socketcand" else "vcan0"
    try:
        if interface == "socketcand":
            # python-can would try again for ten seconds, with a warning each time.
            socket.create_connection((options["host"], options["port"]), timeout=CONNECT_TIMEOUT_S).close()
        return can.Bus(interface=interface, channel=channel, ignore_config=True, **options)
    except (can.CanError, OSError, ValueError) as error:
        raise TransportError(f"cannot join {interface} {channel}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fod-sim", description=__doc__)
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shape = argparse.RawDescriptionHelpFormatter

    run = commands.add_parser(
        "run",
        help="simulate a vehicle in real time",
        description="Simulates the vehicle of a scenario in real time.\n\nExample:\n"
        "  fod-sim run deploy/demo/scenario.toml --stdin",
        epilog=f"Commands, on standard input and in the timeline:\n{control.GRAMMAR}",
        formatter_class=shape,
    )
    run.add_argument("scenario", type=Path, metavar="SCENARIO.toml")
    run.add_argument("--stdin", action="store_true", help="take commands from standard input; end with it")
    run.set_defaults(command=_run)

    again = commands.add_parser(
        "replay",
        help="put a recorded log on a bus",
        description="Puts a log on a bus of its own, or with --host or --interface on one that is open.\n\n"
        "Example:\n  fod-sim replay drive.log --dbc car.dbc --host 127.0.0.1 --port 29536",
        formatter_class=shape,
    )
    again.add_argument("log", type=Path, help="any log that python-can reads")
    again.add_argument("--dbc", type=Path, help="count the identifiers that it describes")
    again.add_argument("--speed", type=_speed, default=1.0, help="1.0 as recorded; 0 as fast as possible")
    again.add_argument("--bus", default="auto", choices=("auto", "socketcan", "socketcand"), help="own bus")
    again.add_argument("--slcan", action="store_true", help="own bus: also a serial adapter")
    again.add_argument("--wait-client", action="store_true", help="own bus: begin when a client has joined")
    again.add_argument("--json", action="store_true")
    _add_bus(again)
    again.set_defaults(command=_replay)

    adapter = commands.add_parser(
        "adapter",
        help="be a serial CAN adapter (slcan) on a pseudo-terminal",
        description="Is a USB-CAN adapter that speaks slcan, on a pseudo-terminal, before a bus or a log.\n"
        "Prints where its serial line is, then runs until its source ends, or Ctrl-C.\n\nExamples:\n"
        "  fod-sim adapter --port 29536 --link /tmp/ttySIM        # before the hub of fod-sim run\n"
        "  fod-sim adapter --log drive.log --rate 4500 --seconds 60   # a full 500 kbit/s bus\n"
        "  fod-sim adapter --log drive.log --link /tmp/ttySIM --fault pull@5 --fault plug@8",
        epilog="Faults: pull (unplugged), plug (plugged again), overrun (loses 10 frames, and says so),\n"
        "garbage (says what no adapter says), bus-off (until the channel is opened again).",
        formatter_class=shape,
    )
    source = adapter.add_mutually_exclusive_group(required=True)
    source.add_argument("--log", type=Path, help="any log that python-can reads")
    source.add_argument("--port", type=_port, help="port of a socketcand hub")
    source.add_argument("--socketcan", metavar="NAME", help="a SocketCAN interface, such as vcan0")
    adapter.add_argument("--host", default=HOST, help=f"of the hub; default: {HOST}")
    adapter.add_argument(
        "--rate", type=_rate, metavar="N", help="frames of the log a second; default: as recorded"
    )
    adapter.add_argument(
        "--seconds", type=_seconds, metavar="S", help="repeat the log for so long; default: once"
    )
    adapter.add_argument("--wait-client", action="store_true", help="begin when the channel has been opened")
    adapter.add_argument("--fd", action="store_true", help="an adapter for CAN FD (commands d, D, b, B, Y)")
    adapter.add_argument(
        "--bitrate",
        type=_bitrate,
        metavar="B",
        help="of the bus; a client that sets another one gets bus errors",
    )
    adapter.add_argument(
        "--link", type=Path, metavar="PATH", help="symbolic link to the serial line; replaced"
    )
    adapter.add_argument(
        "--fault",
        type=_fault,
        action="append",
        default=[],
        metavar="KIND@S",
        help="misbehave after S seconds (with --wait-client: after the channel was opened); may be repeated",
    )
    adapter.set_defaults(command=_adapter)

    ask = commands.add_parser(
        "tester",
        help="send UDS requests to an ECU",
        description="Sends UDS requests and says the answers in words. HEX@FILE puts a file's bytes behind\n"
        "the hex digits. Exit code 1 if the ECU refuses or does not answer.\n\nExample:\n"
        "  fod-sim tester --port 29536 1003 31010F0D@token.cose 220F21",
        formatter_class=shape,
    )
    ask.add_argument("request", nargs="+", metavar="HEX")
    ask.add_argument("--ecu", default="seat-module", choices=sorted(tester.ECUS))
    ask.add_argument("--tx", type=_can_id, help="identifier of requests instead of the ECU's, such as 0x744")
    ask.add_argument("--rx", type=_can_id, help="identifier of answers, such as 0x74C")
    ask.add_argument(
        "--timeout", type=_seconds, default=tester.ANSWER_TIMEOUT_S, help="seconds to wait for an answer"
    )
    ask.add_argument("--json", action="store_true")
    _add_bus(ask)
    ask.set_defaults(command=_tester)

    key = commands.add_parser(
        "ecu-key",
        help="make the key with which an ECU signs what it counted",
        description="Makes an Ed25519 key pair (PEM, mode 0600) and prints its public half in hex, which\n"
        "`fod-cloud vehicle add --ecu IDENT:HWID:UIDHEX:KEYHEX` registers.\n\n"
        "Example:\n  fod-sim ecu-key run/demo/seat-module.key",
        formatter_class=shape,
    )
    key.add_argument("file", type=Path, metavar="FILE", help="must not be there yet")
    key.add_argument("--json", action="store_true")
    key.set_defaults(command=_ecu_key)
    return parser


def _add_bus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interface", choices=("socketcand", "socketcan", "slcan"), help="as in python-can")
    parser.add_argument("--channel", help="as in python-can: vcan0, can0 or /dev/pts/N")
    parser.add_argument("--host", help="of socketcand")
    parser.add_argument("--port", type=_port, default=0, help="of socketcand")


def _port(text: str) -> int:
    return _within(text, 0, 65535, int)


def _can_id(text: str) -> int:
    return _within(text, 0, 0x7FF, lambda digits: int(digits, 0))


def _within(text: str, lowest: float, highest: float, read_number: Callable[[str], _Number]) -> _Number:
    try:
        value = read_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not lowest <= value <= highest:
        raise argparse.ArgumentTypeError(f"{text} is not from {lowest} to {highest}")
    return value


def _speed(text: str) -> float:
    return _within(text, 0, 1000, float)


def _seconds(text: str) -> float:
    return _within(text, 0, 86_400, float)


def _rate(text: str) -> float:
    return _within(text, 0.001, 100_000, float)


def _bitrate(text: str) -> int:
    if text not in map(str, BITRATES):
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(map(str, BITRATES))}")
    return int(text)


def _fault(text: str) -> adapter_run.Fault:
    kind, _, at_s = text.partition("@")
    if kind not in adapter_run.FAULTS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected KIND@S, KIND one of {', '.join(adapter_run.FAULTS)}"
        )
    return adapter_run.Fault(kind, _seconds(at_s))


if __name__ == "__main__":
    sys.exit(main())
