"""Tells the streams of one process that something of a vehicle has changed.

Holds no state of its own: whoever is woken reads the database. Used on the
event loop only.
"""

from __future__ import annotations

import asyncio
import enum
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Topic(enum.Enum):
    """What changed."""

    RIGHTS = "rights"
    STATUS = "status"


class Changes:
    """Wakes those who watch a vehicle."""

    def __init__(self) -> None:
        self._watchers: dict[tuple[Topic, str], set[asyncio.Event]] = defaultdict(set)

    def notify(self, topic: Topic, vin: str) -> None:
        """Wakes everyone who watches this topic of this vehicle."""
        for event in self._watchers.get((topic, vin), ()):
            event.set()

    def notify_all(self, topic: Topic) -> None:
        """Wakes everyone who watches this topic of any vehicle."""
        for watched, vin in list(self._watchers):
            if watched is topic:
                self.notify(topic, vin)

    @contextmanager
    def watch(self, topic: Topic, vin: str) -> Iterator[asyncio.Event]:
        """An event that is set at each change; whoever waits clears it before reading."""
        event = asyncio.Event()
        watchers = self._watchers[topic, vin]
        watchers.add(event)
        try:
            yield event
        finally:
            watchers.discard(event)
            if not watchers:
                del self._watchers[topic, vin]
