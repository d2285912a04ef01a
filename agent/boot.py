"""What the agent starts from, and how trusted state is kept.

At start the stored state is verified again, against the higher of the two
copies of the floors: an older copy of the database is then no trusted state.
What is not valid is named and not used, and never ends the agent: the cloud
sends it anew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from agent.adapters.floors_file import FloorsFile
from agent.adapters.store import Store, Stored
from agent.config import AgentConfig
from agent.errors import ConditionError, FloorsError, RollbackError, TrustError
from agent.events import StoreTrust
from agent.metering.ledger import check_conditions
from agent.model import RepositoryBytes, TrustBytes, Verdict
from agent.trust.floors import highest
from agent.trust.verifier import Floors, floors_after, starts_new_epoch, verify_stored
from common import log

BUILD_MS = 1_795_305_600_000
"""When this version was built (2026-11-22), Unix milliseconds: no trusted time is earlier."""
STORE_FILE = "agent.db"

_log = log.get(__name__)


class Start(NamedTuple):
    """What a store and the second copy of the floors give together.

    Args:
        stored: with the higher floors, and the mark that belongs to them.
        trusted: what the next update is verified against.
        verdict: stored rights, verified again; None if there are none that count.
        problems: what is not used, why, and what comes next; in words.
    """

    stored: Stored
    trusted: TrustBytes
    verdict: Verdict | None
    problems: tuple[str, ...]


def anchors(config: AgentConfig) -> TrustBytes:
    """The roots that ship in the image, as the first trusted state."""
    return TrustBytes(
        director=RepositoryBytes(roots=(config.trust.director_root.read_bytes(),)),
        catalogue=RepositoryBytes(roots=(config.trust.catalogue_root.read_bytes(),)),
    )


def floors_file(config: AgentConfig) -> FloorsFile:
    """The second copy of this vehicle's floors."""
    return FloorsFile(config.floors_directory, config.vehicle.vin)


def read(config: AgentConfig, store: Store) -> Start:
    """Reads and verifies what is stored; changes nothing.

    Raises:
        JournalError: a part of the store cannot be read.
    """
    stored, problems = store.load(), []
    try:
        kept = floors_file(config).read()
    except FloorsError as error:
        kept = None
        problems.append(str(error))
    if kept is not None:
        stored = _raised(stored, kept)
    if not stored.as_of_ms:
        trusted = stored.trust if stored.trust.director.roots else anchors(config)
        return Start(stored, trusted, None, tuple(problems))
    try:
        verdict = verify_stored(
            stored.trust, vin=config.vehicle.vin, as_of_ms=stored.as_of_ms, floors=stored.floors
        )
        for feature in verdict.rights.features.values():
            check_conditions(feature)
    except (TrustError, ConditionError) as error:
        problems.append(_why_not(error))
        return Start(stored, anchors(config), None, tuple(problems))
    return Start(stored, stored.trust, verdict, tuple(problems))


def _why_not(error: TrustError | ConditionError) -> str:
    what = "older than what this vehicle trusted before (an old copy of its disk?)"
    fault = what if isinstance(error, RollbackError) else "not valid"
    return (
        f"stored rights are {fault} and are not used: {error.kind}: {error};"
        " the cloud sends the present ones at the next contact, or fod-agent import takes them from a file"
    )


def _raised(stored: Stored, kept: Floors) -> Stored:
    floors = highest(stored.floors, kept)
    if floors.director_epoch == stored.floors.director_epoch:
        mark_ms, mark_epoch = max(stored.mark_ms, floors.time_ms), stored.mark_epoch
    else:
        # The database is of an epoch that root keys have ended, or is new: its mark counts no more.
        mark_ms, mark_epoch = floors.time_ms, floors.director_epoch
    return replace(stored, floors=floors, mark_ms=mark_ms, mark_epoch=mark_epoch)


class Keeper:
    """Keeps trusted state: the database first, then the second copy of the floors."""

    def __init__(self, store: Store, second: FloorsFile, stored: Stored) -> None:
        self._store, self._second = store, second
        self.floors = stored.floors
        self._mark_epoch = stored.mark_epoch
        self.problem = ""
        """Why the second copy is behind; empty if it is not."""

    def keep(self, command: StoreTrust) -> None:
        """Makes a verified state durable.

        A second copy that cannot be written holds nothing up: it is tried again
        with the next state, and said until then.

        Raises:
            JournalError: nothing was changed.
        """
        floors = floors_after(command.verdict, self.floors)
        # The mark is of the keys that signed it live; a file only raises it (`TrustedClock.raise_to`).
        mark_epoch = floors.director_epoch if command.live or not self._mark_epoch else self._mark_epoch
        self._store.store_trust(command, floors, mark_epoch)
        self.floors, self._mark_epoch = floors, mark_epoch
        try:
            self._second.write(floors)
        except FloorsError as error:
            self.problem = f"the second copy of the floors is behind: {error}"
            _log.error(self.problem)
        else:
            self.problem = ""

    def judged_at_ms(self, now_ms: int) -> int:
        """Time at which expiry is judged; 0, the signed time alone, if the mark is of ended keys.

        So it is after a file of rights has brought new keys: it does not lower
        the time, and a stolen future must not expire the answer that does.
        """
        is_of_these_keys = self._mark_epoch in {"", self.floors.director_epoch}
        return now_ms if is_of_these_keys else 0

    def starts_new_epoch(self, verdict: Verdict) -> bool:
        """Whether root keys replaced the keys that signed the mark on disk."""
        return starts_new_epoch(verdict, replace(self.floors, director_epoch=self._mark_epoch))
