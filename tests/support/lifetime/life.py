"""What befalls a vehicle in some months, chosen by a seed, and what must hold in the end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from support.engine_world import FEATURE, entitlement
from support.lifetime.car import AGE_MS, SeatEcu
from support.lifetime.disk import Image
from support.lifetime.office import Backup, SqlTables, Tables
from support.lifetime.verified import VerifiedWorld
from support.lifetime.world import World

from agent.model import Entitlement, PlanKind, Quota
from openfod.usage.v1 import usage_pb2

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
MONTH_S = 30 * 86_400


@dataclass(frozen=True)
class Outcome:
    """How a life went.

    Args:
        digest: over everything that was logged, recorded and taken: a replay has the same one.
        days: virtual time lived.
        segments: how often the books were compared with the truth.
    """

    seed: int
    wrong: tuple[str, ...]
    digest: str
    days: float
    segments: int
    happened: dict[str, int]


class Life:
    """One life; `run` lives it, `wrong` says which promises did not hold."""

    def __init__(self, seed: int, world: World) -> None:
        self.seed, self.world = seed, world
        self.random = Random(seed ^ 0x5EED)
        # A third of all lives are calm: nothing blurs what they bill, so that one unit too much is seen.
        self.is_calm = self.random.random() < 0.33
        world.is_crisp = self.is_calm or self.random.random() < 0.3
        self._number = seed * 1000
        self._backup: Backup | None = None
        self._image: Image | None = None
        self._paid_until_s = 0
        self._wants_journal = False

    # --- the plan --------------------------------------------------------------

    def run(self) -> None:
        """Drives, parks for days, and whatever comes between."""
        world, random = self.world, self.random
        for _ in range(random.randint(7, 11)):
            self.trip()
            self._while_parked()
            world.run_ms(
                random.choice((20 * 60_000, 9 * HOUR_MS, DAY_MS, 5 * DAY_MS, 14 * DAY_MS, 33 * DAY_MS))
            )
        self.end()

    def trip(self) -> None:
        """From the key's turn to the head unit's sleep."""
        world, random, car = self.world, self.random, self.world.car
        world.is_online = random.random() < 0.8
        car.ecu.wake()
        car.is_on, car.speed_kmh = True, 0.0
        car.is_pressed = not self.is_calm and random.random() < 0.5
        world.wake_bus()
        if random.random() < 0.3:
            world.run_ms(random.randint(0, 30_000))
        world.power_on()
        world.run_ms(random.randint(3_000, 20_000))
        if self.is_calm:
            world.change(self._press)
        for _ in range(random.randint(2, 7)):
            if not self.is_calm or random.random() < 0.2:
                random.choices(self._faults, self._weights)[0](self)
            world.run_ms(random.randint(3_000, 50_000))
            world.change(random.choice((self._drive, self._drive, self._halt, self._press)))
            world.run_ms(random.randint(8_000, 60_000))
        self._arrive()

    def _arrive(self) -> None:
        world, random, car = self.world, self.random, self.world.car
        world.change(self._halt)
        world.run_ms(random.randint(1_000, 20_000))
        if self.is_calm:
            world.change(self._release_button)
        self._mend()
        if random.random() < 0.3:
            world.run_ms(90_000)
            self._check_rest()
        world.change(self._key_off)
        world.run_ms(random.choice((2_000, 30_000, 90_000)))
        world.crash_in = None
        world.stop()
        car.is_on = False

    def end(self) -> None:
        """Everything is healed, the right ends, and the last records go out."""
        world, car = self.world, self.world.car
        self.is_calm = True
        if world.is_copy:
            world.new_journal()
        self._mend()
        world.is_online = True
        car.ecu.wake()
        car.is_on, car.speed_kmh, car.is_pressed = True, 0.0, False
        world.wake_bus()
        world.power_on()
        world.run_ms(20_000)
        # A vehicle that a restored cloud has forgotten learns of it when it next sends something.
        world.office.grant(entitlement(self._number + 1, plan_kind=PlanKind.PERPETUAL, ignition_cycles=0))
        world.push()
        world.run_ms(70_000)
        world.change(self._press)
        world.run_ms(30_000)
        world.change(self._press)
        world.office.revoke()
        world.push()
        world.run_ms(100_000)
        world.change(self._key_off)
        world.run_ms(20_000)
        self._check_end()
        world.stop()

    # --- drives ------------------------------------------------------------------

    def _drive(self) -> None:
        self.world.car.speed_kmh = self.random.choice((20.0, 60.0, 130.0))

    def _halt(self) -> None:
        self.world.car.speed_kmh = 0.0

    def _press(self) -> None:
        self.world.car.is_pressed = not self.world.car.is_pressed

    def _release_button(self) -> None:
        self.world.car.is_pressed = False

    def _key_off(self) -> None:
        self.world.car.is_on = False

    def _mend(self) -> None:
        """What is broken is whole again; a crash that was to come does not."""
        world = self.world
        world.crash_in = None
        world.lost_frames = set()
        world.car.ecu.is_silent = world.disk.is_full = world.is_repeating = False
        world.send_frames()
        if world.engine is None:
            world.start_again()

    # --- faults within a drive -------------------------------------------------------

    def _crash_soon(self) -> None:
        self.world.crash_in = self.random.randint(1, 80)

    def _power_cut(self) -> None:
        if self.world.engine is not None:
            self.world.cut_power()
            self.world.at(self.random.randint(2_000, 90_000), self.world.start_again)

    def _kill(self) -> None:
        if self.world.engine is not None:
            self.world.kill()
            self.world.at(self.random.randint(300, 40_000), self.world.start_again)

    def _partition(self) -> None:
        if self.world.is_online:
            self.world.cut_network()
        else:
            self.world.join_network()

    def _repeat(self) -> None:
        self.world.happened["repeated messages"] += 1
        self.world.is_repeating = not self.world.is_repeating

    def _fill_disk(self) -> None:
        self.world.happened["full disk"] += 1
        self.world.disk.is_full = True
        self.world.at(self.random.randint(5_000, 100_000), self._free_disk)

    def _free_disk(self) -> None:
        self.world.disk.is_full = False

    def _silence_ecu(self) -> None:
        self.world.happened["silent ECU"] += 1
        self.world.car.ecu.is_silent = not self.world.car.ecu.is_silent

    def _reset_ecu(self) -> None:
        self.world.happened["ECU reset"] += 1
        self.world.change(lambda: setattr(self.world.car.ecu, "on", False))

    def _lose_frames(self) -> None:
        """Longer than a signal may be silent: what comes and goes in less is the meters' stated limit."""
        self.world.happened["lost frames"] += 1
        names = sorted(self.world.car.frames())
        self.world.lost_frames = {self.random.choice(names)}
        self.world.run_ms(AGE_MS + self.random.randint(5_000, 40_000))
        self.world.lost_frames = set()
        self.world.send_frames()

    def _change_rights(self) -> None:
        self._rights()
        self.world.push()

    _faults: tuple[Callable[[Life], None], ...] = (
        _crash_soon, _power_cut, _kill, _partition, _repeat, _fill_disk,
        _silence_ecu, _reset_ecu, _lose_frames, _change_rights,
    )  # fmt: skip
    _weights = (8, 3, 3, 4, 2, 2, 1, 1, 2, 4)

    # --- rights and money -----------------------------------------------------------

    def _while_parked(self) -> None:
        random, world = self.random, self.world
        for _ in range(random.randint(0, 2)):
            self._rights()
        if self.is_calm:
            return
        if self._backup is None or random.random() < 0.2:
            self._backup = world.office.backup()
        elif random.random() < 0.06:
            world.happened["cloud restored"] += 1
            self._restore_cloud(self._backup)
        if world.is_copy and random.random() < 0.5:
            world.new_journal()
        if self._image is None or random.random() < 0.1:
            self._image = world.disk.image(world.now_ms) if not world.is_copy else None
        elif random.random() < 0.04:
            world.happened["image restored"] += 1
            world.disk.put_back(self._image)
            world.note_copy()
            self._image = None
        if random.random() < 0.05:
            world.happened["ECU swap"] += 1
            world.car.ecu = SeatEcu()
            world.office.publish_again(0, 0)

    def _restore_cloud(self, backup: Backup) -> None:
        """The operator brings rights to where they were: what was ended stays so, what was paid goes on."""
        office = self.world.office
        wanted, counter, owner = office.current, office.rights.counter, office.rights.owner_epoch
        version = office.rights.version
        self.world.restore_cloud(backup)
        office.rights.current, office.rights.owner_epoch = wanted, owner
        office.publish_again(version, counter)

    def _rights(self) -> None:
        office, world, now_s = self.world.office, self.world, self.world.utc_ms // 1000
        right = office.current
        choice = self.random.random()
        if right is None:
            if choice < 0.85:
                world.happened["grant"] += 1
                office.grant(self._new_right(now_s))
            return
        if choice < 0.2:
            world.happened["revocation"] += 1
            office.revoke()
        elif choice < 0.35:
            world.happened["price change"] += 1
            office.price_minor = self.random.choice((30, 60, 90))
        elif choice < 0.41:
            world.happened["sale"] += 1
            office.sell(self._new_right(now_s) if self.random.random() < 0.6 else None)
        elif right.plan_kind is PlanKind.SUBSCRIPTION and right.not_after_s:
            if self.random.random() < 0.7:
                world.happened["renewal"] += 1
                office.grant(replace(right, not_after_s=max(now_s, right.not_after_s) + MONTH_S))
            else:
                world.happened["failed payment"] += 1
                if now_s > right.not_after_s + right.offline_grace_s:
                    office.revoke()

    def _new_right(self, now_s: int) -> Entitlement:
        self._number += 1
        account = self.random.choice(("acc-anna", "acc-ben"))
        kind = self.random.random()
        if kind < 0.25:
            return entitlement(
                self._number,
                account=account,
                plan_kind=PlanKind.PERPETUAL,
                plan_id="seat-heating-forever",
                ignition_cycles=0,
            )
        if kind < 0.35:
            return entitlement(
                self._number, account=account, quotas=(Quota("active-time", 120_000, hard=True),)
            )
        return entitlement(
            self._number, account=account, not_after_s=now_s + MONTH_S, offline_grace_s=7 * 86_400
        )

    # --- what must hold ---------------------------------------------------------------

    def _check_rest(self) -> None:
        """At rest with the key on and nothing broken for a while: what is bought works, what ended is off."""
        world = self.world
        verdict = world.disk.durable.verdict
        if world.engine is None or verdict is None or FEATURE not in verdict.rights.tokens:
            return
        right = verdict.rights.entitlements.get(FEATURE)
        token = verdict.rights.tokens[FEATURE]
        if right is None and world.car.ecu.on:
            world.violations.append("a right has ended, the car stands, and the feature is on")
        is_usable = world.car.ecu.cycles_left > 0 or token.counter > world.car.ecu.counter
        is_old = token.counter < world.car.ecu.counter
        is_bought = right is not None and right.plan_kind is PlanKind.PERPETUAL
        works = world.state() == "ACTIVE" and world.car.ecu.on
        if is_bought and is_usable and not is_old and not works:
            world.violations.append(f"what was bought outright does not work: {world.state()}")

    def _check_end(self) -> None:
        world = self.world
        if world.car.ecu.on:
            world.violations.append("the feature is on without a right, at rest and with everything healed")
        if world.state() not in {"LOCKED", "NONE"}:
            world.violations.append(f"the feature ends in {world.state()}")
        state = world.disk.state
        if world.office.holds(state.journal_id) != state.count:
            world.violations.append(
                f"the cloud holds {world.office.holds(state.journal_id)} of {state.count} records"
            )
        if state.acked_seq != state.count:
            world.violations.append(f"receipts reach to {state.acked_seq} of {state.count} records")
        self._check_invoice()

    def _check_invoice(self) -> None:
        """What is billed: never more than the truth, in units and in money, at the price of the grant."""
        world = self.world
        taken = [usage_pb2.UsageRecord.FromString(row.content) for row in world.office.tables.taken()]
        if len({record.id for record in taken}) != len(taken):
            world.violations.append("the cloud bills a record twice")
        lines = world.office.invoice(world.utc_ms)
        prices = {key: price for key, (_, price) in world.office.prices.items()}
        truths = {"active-time": world.car.heated_ms, "heated-distance": world.car.heated_m}
        for meter, truth in truths.items():
            billed = sum(line.quantity for line in lines if line.meter_id == meter)
            sent = sum(record.value for record in taken if record.meter_id == meter)
            if billed != sent:
                world.violations.append(f"{meter}: the invoice has {billed}, the records {sent}")
            if billed > truth + 1e-6:
                world.violations.append(f"{meter}: billed {billed} in all, truth {truth:.1f}")
        for line in lines:
            if line.meter_id == "active-time":
                price = prices[line.entitlement.entitlement_id]
                expected = (2 * line.quantity * price + HOUR_MS) // (2 * HOUR_MS)
                if line.amount_minor != expected:
                    world.violations.append(f"{line.description}: {line.amount_minor}, expected {expected}")


def live(seed: int, *, world_class: type[World] | None = None, tables: Tables | None = None) -> Outcome:
    """Lives one life and says what did not hold.

    Args:
        world_class: in which world; None: in one life of fifty in that with
            the real verifier.
        tables: of the cloud; None: in one life of fifty the real ones.
    """
    closing = None
    if world_class is None:
        world_class = VerifiedWorld if seed % 50 == 0 else World
        if tables is None and seed % 50 == 25:
            tables = closing = SqlTables()
    world = world_class(seed, tables)
    Life(seed, world).run()
    outcome = _outcome(seed, world)
    if closing is not None:
        closing.close()
    return outcome


def _outcome(seed: int, world: World) -> Outcome:
    content = hashlib.sha256()
    for line in world.log:
        content.update(line.encode())
    for row in world.office.tables.taken():
        content.update(row.content)
    content.update(repr((world.car.heated_ms, world.car.heated_m, world.now_ms)).encode())
    return Outcome(
        seed,
        tuple(world.violations),
        content.hexdigest(),
        world.now_ms / DAY_MS,
        world.segments,
        dict(world.happened),
    )
