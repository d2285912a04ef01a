"""Starts next periods and ends what has run out, whether or not the vehicle is seen.

One transaction for each vehicle, and nothing is remembered between runs: what
is due stands in the database, so a run that was interrupted, or that comes
after a long downtime, goes on with whatever is due by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from cloud.changes import Changes, Topic
from cloud.errors import NotPossibleError
from cloud.rights import Rights
from cloud.store import Store
from common import log

_log = log.get(__name__)


class Renewals:
    """The renewal job of one server.

    Args:
        now_ms: the cloud's clock, Unix milliseconds.
    """

    def __init__(self, store: Store, rights: Rights, changes: Changes, now_ms: Callable[[], int]) -> None:
        self._store, self._rights, self._changes, self._now_ms = store, rights, changes, now_ms

    async def run_due(self) -> int:
        """Does what is due now; returns how many vehicles got a new set of rights.

        A vehicle that cannot be served is logged, and holds up no other one.
        """
        now_ms = self._now_ms()
        changed = 0
        for vin in await self._store.run(lambda tx: tx.due_vehicles(now_ms)):
            try:
                signed = await self._store.run(partial(self._rights.refresh, vin=vin, now_ms=now_ms))
            except NotPossibleError as error:
                _log.error("rights cannot be renewed", vin=vin, reason=str(error))
                continue
            if signed:
                changed += 1
                self._changes.notify(Topic.RIGHTS, vin)
        if changed:
            _log.info("rights renewed or ended", vehicles=changed)
        return changed

    async def run_for_ever(self, interval_s: float) -> None:
        """Does what is due, again and again, until it is cancelled."""
        while True:
            try:
                await self.run_due()
            except SQLAlchemyError as error:
                _log.error("the database did not serve the renewals; trying again", reason=str(error))
            await asyncio.sleep(interval_s)
