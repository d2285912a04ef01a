"""The command `fod-cloud export`: runs one consumer of the feed, or lists them all."""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from cloud import config
from cloud.errors import ExportError
from cloud.export import consumer
from cloud.export.targets import FileTarget, HttpTarget, check_url, read_token
from cloud.store import Store
from common import cli, log

POLL_S = 1.0
"""How often the end of the feed is looked at."""
PROGRESS_S = 5.0
"""How often a long export says where it is."""
ATTEMPTS_ONCE = 8
"""How often --once sends a batch before it gives up: some minutes."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", metavar="TARGET", help="file:PATH, or a URL such as https://HOST/api/v1/events")
    what.add_argument("--list", action="store_true", help="show all consumers and what they have skipped")
    parser.add_argument(
        "--from",
        dest="first",
        type=_at_least_one,
        metavar="POSITION",
        help="begin with this event of the feed, from 1; without it, go on",
    )
    parser.add_argument("--once", action="store_true", help="end at the end of the feed")
    parser.add_argument(
        "--batch", type=_batch, default=500, metavar="N", help=f"events at once, 1 to {consumer.MAX_BATCH}"
    )
    parser.add_argument(
        "--name", type=_name, default="default", metavar="NAME", help="of this consumer and its position"
    )
    parser.add_argument("--skip", action="store_true", help="set aside events that the receiver refuses")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the receiver's bearer token")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="certificates that the receiver's leads to")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code.

    Raises:
        ConfigError, StartError: the configuration or the database is not usable.
    """
    settings, logging = config.read_store(arguments.config)
    log.configure(logging.level, logging.form)
    store = Store(config.database_url(arguments.config, settings), serving=False)
    try:
        return _list(store, arguments) if arguments.list else _export(store, arguments)
    except ExportError as error:
        return cli.fail(str(error))
    finally:
        store.close()


def _export(store: Store, arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(cli.EXIT_DONE))
    kind, _, path = arguments.to.partition(":")
    target: FileTarget | HttpTarget
    if kind == "file":
        if arguments.token_file or arguments.ca:
            raise ExportError("--token-file and --ca are for a receiver, not for a file")
        name = Path(path).resolve()
        target = FileTarget(name)
        full = f"file:{name}"
    else:
        check_url(arguments.to)
        token = read_token(arguments.token_file) if arguments.token_file else ""
        target = HttpTarget(arguments.to, token=token, ca=arguments.ca)
        full = arguments.to
    try:
        row = consumer.begin(store, arguments.name, full, arguments.first, time.time_ns() // 1_000_000)
        working = consumer.Consumer(
            store,
            row,
            target,
            batch=arguments.batch,
            skip=arguments.skip,
            attempts=ATTEMPTS_ONCE if arguments.once else None,
            random=random.SystemRandom().random,
        )
        return _loop(store, working, arguments)
    except KeyboardInterrupt:
        return cli.EXIT_DONE
    finally:
        target.close()


def _loop(store: Store, working: consumer.Consumer, arguments: argparse.Namespace) -> int:
    sent, told_s = 0, time.monotonic()
    while True:
        count = working.step()
        sent += count
        now_s = time.monotonic()
        if count and now_s - told_s >= PROGRESS_S:
            told_s = now_s
            _tell(arguments, "progress", working.position, store.run_here(lambda tx: tx.feed_head()), sent)
        if count:
            continue
        if arguments.once:
            _tell(arguments, "done", working.position, working.position, sent)
            return cli.EXIT_DONE
        time.sleep(POLL_S)


def _tell(arguments: argparse.Namespace, what: str, position: int, head: int, sent: int) -> None:
    if arguments.json:
        cli.print_event(what, consumer=arguments.name, position=position, head=head, sent=sent)
    else:
        print(f"{what}: consumer {arguments.name} at position {position} of {head}, {sent} sent", flush=True)


def _list(store: Store, arguments: argparse.Namespace) -> int:
    rows = store.run_here(lambda tx: tx.consumers())
    aside = store.run_here(lambda tx: tx.events_set_aside())
    stored = store.run_here(lambda tx: tx.feed_head() + tx.unnumbered_usage())
    if arguments.json:
        cli.print_json(
            {
                "stored": stored,
                "consumers": [
                    {
                        "name": row.name,
                        "target": row.target,
                        "position": row.position,
                        "behind": stored - row.position,
                        "moved_ms": row.moved_ms,
                        "set_aside": [
                            {"position": a.position, "reason": a.reason, "at_ms": a.at_ms}
                            for a in aside
                            if a.name == row.name
                        ],
                    }
                    for row in rows
                ],
            }
        )
        return cli.EXIT_DONE
    cli.print_table(
        ["name", "target", "position", "behind", "moved", "set aside"],
        [
            (
                row.name,
                row.target,
                row.position,
                stored - row.position,
                datetime.fromtimestamp(row.moved_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                ", ".join(str(a.position) for a in aside if a.name == row.name) or "none",
            )
            for row in rows
        ],
    )
    return cli.EXIT_DONE


def _at_least_one(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,15}", text):
        raise argparse.ArgumentTypeError(f"expected a position of the feed, from 1; found {text!r}")
    return int(text)


def _batch(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= consumer.MAX_BATCH:
        raise argparse.ArgumentTypeError(f"expected 1 to {consumer.MAX_BATCH}, found {text!r}")
    return int(text)


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"expected a name such as openmeter, found {text!r}")
    return text
