"""Bugs on purpose: each must be found by the simulation, or it proves nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from support.lifetime.disk import Disk
from support.lifetime.office import MemoryTables
from support.lifetime.world import World

from agent import events as ev
from agent.engine import Engine
from agent.metering.record import UNITS, Head, Record, Use
from agent.model import Rights
from cloud.store import Transaction, UsageRow
from openfod.usage.v1 import usage_pb2

T = TypeVar("T")


class _SendsAgain(Engine):
    """Now and then appends what the cloud has signed for once more, under a new id."""

    last: Record | None = None

    def step(self, event: ev.Event, now_ns: int) -> list[ev.Command]:
        if isinstance(event, ev.ReceiptStored) and self.last is not None:
            message = usage_pb2.UsageRecord.FromString(self.last.content)
            self._ledger.unsaved.append(
                Use(
                    feature_id=message.feature_id,
                    meter_id=message.meter_id,
                    kind=next(kind for kind, unit in UNITS.items() if unit == message.unit),
                    entitlement_id=message.entitlement_id,
                    account=message.subject,
                    trace_id=message.trace_id,
                    dimensions=tuple((d.name, d.value) for d in message.dimensions),
                    value=message.value,
                    gap=0,
                    gap_reason="",
                    start_ms=message.window_start_ms,
                    end_ms=message.window_end_ms,
                    signed_clock=message.clock_trust == usage_pb2.CLOCK_TRUST_SIGNED,
                )
            )
            self.last = None
        commands = super().step(event, now_ns)
        for command in commands:
            if isinstance(command, ev.StoreUsage) and command.records:
                self.last = command.records[-1]
        return commands


class _CountsOneMore(Engine):
    """Every record has one unit more than was counted."""

    def step(self, event: ev.Event, now_ns: int) -> list[ev.Command]:
        before = self._ledger.head
        commands = super().step(event, now_ns)
        for number, command in enumerate(commands):
            if (
                isinstance(command, ev.StoreUsage)
                and command.records
                and before.seq + 1 == command.records[0].seq
            ):
                records = []
                head = before
                for record in command.records:
                    message = usage_pb2.UsageRecord.FromString(record.content)
                    message.value += 1 if message.value else 0
                    message.prev_hash = head.hash
                    content = message.SerializeToString(deterministic=True)
                    records.append(_record(message.seq, content, message.entitlement_id))
                    head = Head(head.journal_id, message.seq, records[-1].hash)
                commands[number] = changed = replace(command, records=tuple(records))
                self._waiting[command.number] = changed
                self._ledger.head = head
        return commands


class _KeepsRights(Engine):
    """A right that was revoked goes on."""

    def _apply_rights(self, rights: Rights, now_ns: int) -> None:
        kept = {**self._rights.entitlements, **rights.entitlements}
        tokens = {**rights.tokens, **{f: self._rights.tokens[f] for f in kept if f in self._rights.tokens}}
        if not rights.entitlements and kept:
            rights = replace(rights, entitlements=kept, tokens=tokens)
        super()._apply_rights(rights, now_ns)


class _ForgetsItsDeath(Engine):
    """What a crash leaves open is not declared."""

    def step(self, event: ev.Event, now_ns: int) -> list[ev.Command]:
        if isinstance(event, ev.Booted):
            event = replace(event, windows=())
        return super().step(event, now_ns)


class _NeverSyncs(Disk):
    """Says that it is durable what is only written."""

    def sync(self) -> None:
        """Nothing: the system will write it some day."""


class _TakesTwice(MemoryTables):
    """A batch that is known already is billed again."""

    def __init__(self) -> None:
        super().__init__()
        self.again: list[UsageRow] = []
        self._newest: Sequence[UsageRow] = ()

    def run(self, work: Callable[[Transaction], T]) -> T:
        before = {journal: len(rows) for journal, rows in self.journals_held.items()}
        result = super().run(work)
        new = getattr(result, "new_records", None)
        if new == 0 and before:
            rows = self.journals_held[max(before, key=lambda journal: before[journal])]
            self.again.append(rows[-1])
        return result

    def taken(self) -> list[UsageRow]:
        """All rows, and those that were taken again."""
        return super().taken() + self.again


def _record(seq: int, content: bytes, entitlement_id: str) -> Record:
    return Record(seq, content, hashlib.sha256(content).digest(), entitlement_id)


class _AgainWorld(World):
    engine_class = _SendsAgain


class _OneMoreWorld(World):
    engine_class = _CountsOneMore


class _KeepsWorld(World):
    engine_class = _KeepsRights


class _ForgetsWorld(World):
    engine_class = _ForgetsItsDeath


class _NoSyncWorld(World):
    disk_class = _NeverSyncs


class _TwiceWorld(World):
    tables_class = _TakesTwice


BUGS: dict[str, type[World]] = {
    "an acknowledged record sent again under a new id": _AgainWorld,
    "a missing fsync": _NoSyncWorld,
    "a counter off by one": _OneMoreWorld,
    "a revoked right kept": _KeepsWorld,
    "a gap not declared after a crash": _ForgetsWorld,
    "a duplicate batch accepted by the cloud": _TwiceWorld,
}
"""By what is wrong: the world in which it is."""
