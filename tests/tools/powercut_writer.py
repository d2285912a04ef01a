"""Writes the real journal until the power goes; runs in the guest.

Every commit is acknowledged on standard output, which leaves the machine: what
was acknowledged must be there after the cut.
"""

from __future__ import annotations

import sys
from pathlib import Path

from support.real_journal import RealJournal

from agent.adapters import journal as limits

MERGE_EVERY = 25
"""Commits between two merges."""


def main() -> None:
    """Books one window a commit, and merges now and then."""
    limits.MERGE_RECORDS = 20
    journal = RealJournal(Path(sys.argv[1]) / "agent.db")
    number = 0
    while True:
        journal.add(1)
        number += 1
        sys.stdout.write(f"ACK {number}\n")
        sys.stdout.flush()
        if number % MERGE_EVERY == 0:
            journal.head, _ = journal.store.merge_unsent()


if __name__ == "__main__":
    main()
