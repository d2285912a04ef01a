"""Carries the feed to one target and keeps, under a name, how far it has come.

Events are sent first and the position moves after, in the database: what was
sent when the process died is sent again, with the same ids and the same bytes.
In a file, position and length move together, so that it holds each event once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cloud.errors import EventRefusedError, ExportError, ReceiverBusyError
from cloud.export import event
from cloud.export.targets import FileTarget, HttpTarget, Sent
from cloud.store import ConsumerRow, SetAsideRow, Store, Transaction
from common import log
from openfod.usage.v1 import usage_pb2

MAX_BATCH = 1_000
"""Most events in one batch."""
NUMBER_AT_ONCE = 10_000
"""Most records that get their place in one transaction."""
MAX_SET_ASIDE = 100
"""Most events that one run may skip: a receiver that refuses more is what is wrong."""
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
"""Bounds of the wait before events are sent again; it doubles in between."""
LONGEST_RETRY_AFTER_S = 3_600.0
"""Longest wait that a receiver may ask for."""

_log = log.get(__name__)


def read(tx: Transaction, after: int, limit: int) -> list[Sent]:
    """The events behind a position; new records get their places first."""
    rows = tx.feed(after, limit)
    if len(rows) < limit:
        tx.number_usage(NUMBER_AT_ONCE)  # once: a server that takes usage waits for this transaction
        rows = tx.feed(after, limit)
    records = [usage_pb2.UsageRecord.FromString(row.content) for row in rows]
    accounts = tx.accounts(sorted({record.entitlement_id for record in records}))
    return [
        Sent(
            row.position,
            record.id,
            event.encode(event.event(record, accounts.get((row.source, record.entitlement_id)))),
        )
        for row, record in zip(rows, records, strict=True)
    ]


def begin(store: Store, name: str, target: str, first: int | None, now_ms: int) -> ConsumerRow:
    """Finds or makes a consumer.

    Args:
        first: position of the event to begin with, None to go on.

    Raises:
        ExportError: the name is another target's, the feed is not as long, or
            the events before are in its file already.
    """

    def work(tx: Transaction) -> ConsumerRow:
        found = tx.consumer(name)
        if found is not None and found.target != target:
            raise ExportError(f"consumer {name} exports to {found.target}; give another --name for {target}")
        if first is not None:
            head = tx.feed_head()
            if not 1 <= first <= head + 1:
                raise ExportError(
                    f"--from {first}: the feed holds positions 1 to {head}; nothing was changed"
                )
        made = ConsumerRow(name, target, first - 1 if first else 0, 0, now_ms)
        if found is None:
            tx.add_consumer(made)
            return made
        if first is None:
            return found
        if found.file_bytes:
            raise ExportError(
                f"--from {first}: {target} holds events up to {found.position}, each once; "
                "replay into another file under another --name"
            )
        if not tx.move_consumer(found, made):
            raise ExportError(f"consumer {name} is moved by another process; nothing was changed")
        return made

    while first is not None and store.run_here(lambda tx: tx.number_usage(NUMBER_AT_ONCE)) == NUMBER_AT_ONCE:
        pass
    return store.run_here(work)


class Consumer:
    """One named consumer at work; only one process at a time moves it."""

    def __init__(
        self,
        store: Store,
        row: ConsumerRow,
        target: FileTarget | HttpTarget,
        *,
        batch: int,
        skip: bool = False,
        attempts: int | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float],
    ) -> None:
        """Takes up where it stood; cuts off what a file holds beyond its position.

        Args:
            batch: most events at once, 1 to MAX_BATCH.
            skip: sets aside what the receiver refuses, instead of stopping.
            attempts: how often a batch is sent before giving up, None for ever.
            random: uniform in [0, 1).

        Raises:
            ExportError: the file is not as it was left.
        """
        self._store, self._row, self._target, self._batch = store, row, target, batch
        self._skip, self._attempts, self._set_aside = skip, attempts, 0
        self._now_ms, self._sleep, self._random = now_ms, sleep, random
        if isinstance(target, FileTarget):
            following = store.run_here(lambda tx: read(tx, row.position, MAX_BATCH))
            cut = target.recover(row.file_bytes, following)
            if cut:
                _log.info("cut off what was written before its position moved", bytes=cut, consumer=row.name)

    @property
    def position(self) -> int:
        """Of the last event that is exported."""
        return self._row.position

    def step(self) -> int:
        """Exports the next batch; returns how many events that were, 0 at the end of the feed.

        Raises:
            ExportError: it cannot go on; what was exported before stays so.
        """
        events = self._store.run_here(lambda tx: read(tx, self._row.position, self._batch))
        if not events:
            return 0
        if isinstance(self._target, FileTarget):
            self._moved(events[-1].position, self._target.append(self._row.file_bytes, events))
        else:
            self._deliver(self._target, events)
        return len(events)

    def _deliver(self, target: HttpTarget, events: Sequence[Sent]) -> None:
        """Sends a batch; if it is refused, halves it until the event that is at fault stands alone."""
        pieces = [events]
        while pieces:
            piece = pieces.pop()
            try:
                self._post(target, piece)
            except EventRefusedError as error:
                if len(piece) > 1:
                    middle = len(piece) // 2
                    pieces += [piece[middle:], piece[:middle]]
                    continue
                self._refused(piece[0], error)
            self._moved(piece[-1].position, 0)

    def _post(self, target: HttpTarget, events: Sequence[Sent]) -> None:
        attempt = 0
        while True:
            try:
                target.post(events)
                return
            except ReceiverBusyError as error:
                attempt += 1
                if self._attempts is not None and attempt >= self._attempts:
                    raise ExportError(f"{error}; gave up after {attempt} tries") from error
                # Full jitter: receivers that come back are not met by everybody at once.
                wait_s = self._random() * min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(attempt, 16))
                wait_s = max(wait_s, min(error.after_s or 0.0, LONGEST_RETRY_AFTER_S))
                _log.warning(
                    "receiver does not take events now; they are sent again",
                    reason=error,
                    consumer=self._row.name,
                    position=events[0].position,
                    wait_s=round(wait_s, 1),
                )
                self._sleep(wait_s)

    def _refused(self, sent: Sent, error: EventRefusedError) -> None:
        where = f"event {sent.id} at position {sent.position} is refused: {error}"
        if not self._skip:
            raise ExportError(f"{where}. Nothing behind it is sent; --skip sets it aside") from error
        if self._set_aside >= MAX_SET_ASIDE:
            raise ExportError(
                f"{where}. It would be more than {MAX_SET_ASIDE} set aside in one run"
            ) from error
        self._set_aside += 1
        row = SetAsideRow(self._row.name, sent.position, str(error), self._now_ms())
        self._store.run_here(lambda tx: tx.set_aside(row))
        _log.error("event set aside", id=sent.id, position=sent.position, reason=error)

    def _moved(self, position: int, file_bytes: int) -> None:
        old = self._row
        new = replace(old, position=position, file_bytes=file_bytes, moved_ms=self._now_ms())
        if not self._store.run_here(lambda tx: tx.move_consumer(old, new)):
            raise ExportError(
                f"consumer {old.name} was moved by another process; this one stops. "
                "A name is for one process; give another --name"
            )
        self._row = new
