"""fod-keys: makes and replaces the keys of an installation, and signs its catalogue.

Works on files only and never opens a connection.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from common import cli
from keys import catalogue, ceremony, certificates, inventory, rotation, staging
from keys.errors import CatalogueError, KeysError, RequestError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (CatalogueError, RequestError) as error:
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

    _add_rotation(commands)

    operator = commands.add_parser("operator", help="issue a further operator certificate")
    operator.add_argument("folder", type=Path, metavar="DIR")
    operator.add_argument("name", metavar="NAME")
    operator.add_argument("--role", choices=certificates.ROLES, default="operator")
    operator.set_defaults(run=_operator)

    show = commands.add_parser(
        "show", help="list keys, roots, certificates, and what is missing or ends soon"
    )
    show.add_argument("folder", type=Path, metavar="DIR")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_show)
    return parser


def _add_rotation(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rotate = commands.add_parser("rotate", help="replace keys: by a new root, token epoch or certificate")
    rotate.add_argument("folder", type=Path, metavar="DIR")
    rotate.add_argument(
        "what", nargs="+", choices=rotation.CHANGES, metavar="WHAT", help=", ".join(rotation.CHANGES)
    )
    rotate.add_argument("--key", action="append", default=[], metavar="NAME", help="only this key, as root-2")
    rotate.add_argument(
        "--public",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="public half of a key made elsewhere",
    )
    rotate.add_argument("--catalogue", type=Path, metavar="REPO_DIR", help="signed catalogue, to sign again")
    rotate.set_defaults(run=_rotate)

    renew = commands.add_parser("renew", help="a new root with the same keys and a later expiry")
    renew.add_argument("folder", type=Path, metavar="DIR")
    renew.add_argument("repository", choices=rotation.REPOSITORIES)
    renew.set_defaults(run=_renew)

    sign = commands.add_parser("sign-root", help="add one holder's signature to a prepared root")
    sign.add_argument("file", type=Path, metavar="FILE")
    sign.add_argument("--previous", type=Path, required=True, metavar="ROOT", help="the root before it")
    sign.add_argument("--key", required=True, metavar="KEY", help="PEM file, or a signer URI")
    sign.set_defaults(run=_sign_root)

    publish = commands.add_parser("publish", help="put in place what was prepared and is signed")
    publish.add_argument("folder", type=Path, metavar="DIR")
    publish.add_argument("area", choices=rotation.AREAS)
    publish.add_argument("signed", type=Path, nargs="*", metavar="FILE", help="the root as signed elsewhere")
    publish.set_defaults(run=_publish)

    for parser in (rotate, renew):
        parser.add_argument("--prepare", action="store_true", help="only prepare it, for fod-keys publish")
    for parser in (rotate, renew, publish):
        parser.add_argument("--json", action="store_true", help="print JSON")


def _rotate(arguments: argparse.Namespace) -> int:
    folder, what = arguments.folder, arguments.what
    areas = {w.partition("-")[0] if w in rotation.ROLE_CHANGES else w for w in what}
    if len(areas) > 1:
        raise RequestError(f"one root changes one repository; ask apart for {' and '.join(sorted(areas))}")
    [area] = areas
    if area in rotation.REPOSITORIES:
        outcome = rotation.rotate_roles(
            folder,
            area,
            [w.partition("-")[2] for w in what],
            datetime.now(UTC),
            only=arguments.key,
            public=_public(arguments.public),
            hold=arguments.prepare,
            repository=arguments.catalogue,
        )
    elif (
        arguments.key
        or arguments.public
        or arguments.catalogue
        or (area == rotation.TOKEN and arguments.prepare)
    ):
        raise RequestError(f"--key, --public, --catalogue and --prepare have no meaning for {area}")
    elif area == rotation.TOKEN:
        outcome = rotation.rotate_token(folder)
    else:
        outcome = rotation.rotate_tls_server(folder, hold=arguments.prepare)
    return _tell(outcome, arguments)


def _public(given: Sequence[str]) -> dict[str, Path]:
    pairs = [entry.partition("=") for entry in given]
    wrong = [entry for entry, (name, _, file) in zip(given, pairs, strict=True) if not name or not file]
    if wrong:
        raise RequestError(f"--public: expected NAME=FILE, found {', '.join(wrong)}")
    return {name: Path(file) for name, _, file in pairs}


def _renew(arguments: argparse.Namespace) -> int:
    outcome = rotation.rotate_roles(
        arguments.folder, arguments.repository, [], datetime.now(UTC), hold=arguments.prepare
    )
    return _tell(outcome, arguments)


def _publish(arguments: argparse.Namespace) -> int:
    return _tell(rotation.publish(arguments.folder, arguments.area, arguments.signed), arguments)


def _tell(outcome: rotation.Outcome, arguments: argparse.Namespace) -> int:
    if arguments.json:
        cli.print_json(asdict(outcome))
        return cli.EXIT_DONE
    waits = arguments.folder / staging.PREPARED / outcome.area
    print(f"published: {outcome.area}" if outcome.published else f"prepared: {waits}")
    for line in (*outcome.changes, *outcome.lacking, *(f"next: {step}" for step in outcome.next_steps)):
        print(f"  {line}")
    return cli.EXIT_DONE


def _sign_root(arguments: argparse.Namespace) -> int:
    changes = rotation.sign_root(arguments.file, arguments.previous, arguments.key)
    print(f"signed {arguments.file}, which changes:")
    for line in changes:
        print(f"  {line}")
    return cli.EXIT_DONE


def _operator(arguments: argparse.Namespace) -> int:
    path = rotation.issue_operator(arguments.folder, arguments.name, arguments.role)
    print(f"made {path} with role {arguments.role}, and its key beside it")
    return cli.EXIT_DONE


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
    found = inventory.take(arguments.folder, datetime.now(UTC))
    if arguments.json:
        cli.print_json(asdict(found))
        return cli.EXIT_DONE
    cli.print_table(
        ["file", "kind", "identifier", "expires"],
        [(e.file, e.kind, e.identifier, e.expires or "-") for e in found.files],
    )
    print()
    cli.print_table(
        ["root", "version", "keys", "expires", "days left"],
        [(r.repository, r.version, ", ".join(r.thresholds), r.expires, r.days_left) for r in found.roots],
    )
    print()
    cli.print_table(
        ["token epoch", "key id", "announced", "private key"],
        [(e.epoch, e.kid, "yes" if e.is_announced else "no", e.private_key or "-") for e in found.epochs],
    )
    for title, lines in (("warning", found.warnings), ("missing", found.missing)):
        for line in lines:
            print(f"{title}: {line}")
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
