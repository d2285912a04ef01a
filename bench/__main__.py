"""Runs benchmarks: `python -m bench [NAME ...]`, all of them without a name."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from datetime import UTC, datetime

NAMES = (
    "grant_to_on",
    "bus_load",
    "bus_paced",
    "decode",
    "durable_commit",
    "ingest",
    "journal",
    "export",
    "start",
    "sign",
    "slcan_load",
    "token",
    "verify",
)


def main() -> int:
    """Runs what was asked for, and prints the machine first."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME", help=", ".join(NAMES))
    names = parser.parse_args().names or list(NAMES)
    today = datetime.now(UTC).date()
    print(f"{today}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
    for name in names:
        print(f"\n## {name}")
        importlib.import_module(f"bench.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
