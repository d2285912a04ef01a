"""fod-keys: makes the keys of an installation and signs its catalogue.

Works on files only and never opens a connection.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from common import cli
from keys import catalogue, ceremony, inventory
from keys.errors import CatalogueError, KeysError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except CatalogueError as error:
        return cli.fail(str(error), code=cli.EXIT_USAGE)
    except KeysError as error:
        return cli.fail(str(error))
    except OSError as error:
        return cli.fail(f"{error.filename}: {error.strerror}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fod-keys", description="Makes the keys of an installation and signs its catalogue."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="make all keys, roots and certificates in a new folder")
    init.add_argument("folder", type=Path, metavar="DIR")
    init.add_argument("--force", action="store_true", help="move a folder that has content aside first")
    init.set_defaults(run=_init)

    sign = commands.add_parser("sign-catalogue", help="judge and sign the feature files of a catalogue")
    sign.add_argument("keys", type=Path, metavar="KEYS_DIR")
    sign.add_argument("source", type=Path, metavar="SOURCE_DIR", help="folder with features/ID/RELEASE.toml")
    sign.add_argument("repository", type=Path, metavar="REPO_DIR", help="folder to write, or to add to")
    sign.set_defaults(run=_sign)

    show = commands.add_parser("show", help="list keys, roots and certificates")
    show.add_argument("folder", type=Path, metavar="DIR")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_show)
    return parser


def _init(arguments: argparse.Namespace) -> int:
    moved = ceremony.init(arguments.folder, datetime.now(UTC), replace=arguments.force)
    if moved is not None:
        print(f"moved the old keys to {moved}")
    print(f"made keys, roots and certificates in {arguments.folder}; ship only {arguments.folder / 'public'}")
    return cli.EXIT_DONE


def _sign(arguments: argparse.Namespace) -> int:
    signed = catalogue.sign_catalogue(
        arguments.keys, arguments.source, arguments.repository, datetime.now(UTC)
    )
    for path in signed.added:
        print(f"added {path}")
    verb = "signed" if signed.written else "unchanged:"
    print(f"{verb} catalogue version {signed.version} with {signed.releases} releases")
    return cli.EXIT_DONE


def _show(arguments: argparse.Namespace) -> int:
    found = inventory.take(arguments.folder)
    if arguments.json:
        cli.print_json(inventory.as_json(found))
        return cli.EXIT_DONE
    cli.print_table(
        ["file", "kind", "identifier", "expires"],
        [(e.file, e.kind, e.identifier, e.expires or "-") for e in found],
    )
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
