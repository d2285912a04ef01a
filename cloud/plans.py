"""Reads the price list: which plans are on offer, and what they cost.

All money is in whole minor units of the currency. A plan that changes is a
new version of the same id; rights keep the version that they were granted at.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cloud.model import IDENTIFIER_PATTERN, Release
from common import config
from common.config import ConfigError, option

MAX_GRACE_S = 7_776_000
"""Longest offline grace: 90 days."""
MAX_PRICE_MINOR = 1_000_000_000_000
"""Highest price in minor units: keeps every sum exact in 64 bits."""
MAX_USE_PRICES = 16
"""Most meters that one plan prices."""
_PERIOD = re.compile(r"P(?:(?P<years>\d{1,3})Y)?(?:(?P<months>\d{1,3})M)?(?:(?P<days>\d{1,4})D)?")


class PlanKind(enum.Enum):
    """How a right is paid for."""

    PERPETUAL = "perpetual"
    SUBSCRIPTION = "subscription"
    TRIAL = "trial"
    WINDOW = "window"
    PREPAID = "prepaid"
    PAY_PER_USE = "pay-per-use"


_LIMITED_IN_TIME = frozenset({PlanKind.SUBSCRIPTION, PlanKind.TRIAL, PlanKind.WINDOW})


class Resale(enum.Enum):
    """What happens to a right when the vehicle is sold."""

    STAYS_WITH_VEHICLE = "stays-with-vehicle"
    GOES_WITH_ACCOUNT = "goes-with-account"


@dataclass(frozen=True)
class Period:
    """A calendar period of ISO 8601, such as P1M."""

    months: int
    days: int

    @classmethod
    def parse(cls, text: str) -> Period | None:
        """Reads "PnYnMnD"; None if the text has another form or means no time."""
        match = _PERIOD.fullmatch(text)
        if match is None:
            return None
        years, months, days = (int(match[n] or 0) for n in ("years", "months", "days"))
        period = cls(years * 12 + months, days)
        return period if period.months or period.days else None

    def start_ms(self, anchor_ms: int, index: int) -> int:
        """Start of period `index` (from 0) of those that began at `anchor_ms`, UTC.

        A month without the anchor's day ends on its last one, and the next
        goes back to the anchor's day.
        """
        anchor = datetime.fromtimestamp(anchor_ms // 1000, UTC)
        month = anchor.month - 1 + self.months * index
        year, month = anchor.year + month // 12, month % 12 + 1
        first = datetime(year, month, 1, anchor.hour, anchor.minute, anchor.second, tzinfo=UTC)
        following = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
        days_in_month = (following - first.replace(hour=0, minute=0, second=0)).days
        moment = first.replace(day=min(anchor.day, days_in_month))
        return int(moment.timestamp()) * 1000 + anchor_ms % 1000 + self.days * index * 86_400_000


@dataclass(frozen=True)
class UsePrice:
    """What using a feature costs: price_minor for each per_units units of a meter."""

    meter: str = option(pattern=IDENTIFIER_PATTERN)
    price_minor: int = option(minimum=0, maximum=MAX_PRICE_MINOR)
    per_units: int = option(minimum=1, maximum=MAX_PRICE_MINOR)


@dataclass(frozen=True)
class Plan:
    """One plan of the price list."""

    id: str = option(pattern=IDENTIFIER_PATTERN)
    version: int = option(minimum=1, maximum=1_000_000)
    feature: str = option(pattern=IDENTIFIER_PATTERN)
    kind: PlanKind = option()
    title: str = option(pattern=r"[^\x00-\x1f]{1,100}")
    currency: str = option(pattern=r"[A-Z]{3}")
    price_minor: int = option(minimum=0, maximum=MAX_PRICE_MINOR)
    resale: Resale = option()
    period: str = option(default="")
    renews: bool = option(default=False)
    offline_grace_s: int = option(default=0, minimum=0, maximum=MAX_GRACE_S)
    ignition_cycles: int = option(default=0, minimum=0, maximum=4_294_967_295)
    operating_s: int = option(default=0, minimum=0, maximum=4_294_967_295)
    use_prices: tuple[UsePrice, ...] = ()

    @property
    def length(self) -> Period | None:
        """The period; None for a right without a date of its own."""
        return Period.parse(self.period)

    @property
    def terms_sha256(self) -> bytes:
        """SHA-256 of everything that the plan means; its title is only words."""
        terms = {key: value for key, value in asdict(self).items() if key != "title"}
        text = json.dumps(terms, sort_keys=True, default=lambda member: member.value)
        return hashlib.sha256(text.encode()).digest()

    def problems(self) -> Iterator[tuple[str, str]]:
        """What must fit together."""
        if self.period and self.length is None:
            yield "period", f"expected an ISO 8601 duration in whole days such as P1M, found {self.period!r}"
        if self.kind in _LIMITED_IN_TIME and not self.period:
            yield "period", f"missing; a plan of kind {self.kind.value} has one"
        if self.kind not in _LIMITED_IN_TIME and self.period:
            yield "period", f"a plan of kind {self.kind.value} has none"
        if self.renews and self.kind is not PlanKind.SUBSCRIPTION:
            yield "renews", "only a subscription renews"
        if self.kind is PlanKind.PERPETUAL and (self.ignition_cycles or self.operating_s):
            yield "kind", "what was bought outright has no limit"
        if self.kind is PlanKind.PREPAID:
            yield "kind", "prepaid is not offered: the price list has no quotas yet that would end it"
        if self.kind is PlanKind.PAY_PER_USE and not self.use_prices:
            yield "use_prices", "missing; without one a plan of kind pay-per-use gives its feature away"
        if self.kind is PlanKind.TRIAL and (self.price_minor or self.use_prices):
            yield "kind", "a trial costs nothing: price_minor is 0, and there are no use_prices"
        meters = [p.meter for p in self.use_prices]
        if len(meters) > MAX_USE_PRICES:
            yield "use_prices", f"{len(meters)} prices are more than the limit of {MAX_USE_PRICES}"
        for meter in sorted({m for m in meters if meters.count(m) > 1}):
            yield "use_prices", f"meter {meter} is priced more than once"


@dataclass(frozen=True)
class _PlanFile:
    plans: tuple[Plan, ...]

    def problems(self) -> Iterator[tuple[str, str]]:
        ids = [p.id for p in self.plans]
        for plan_id in sorted({i for i in ids if ids.count(i) > 1}):
            yield "plans", f"plan {plan_id} occurs more than once"


def read(path: Path, releases: Mapping[str, Sequence[Release]]) -> dict[str, Plan]:
    """Reads the price list and checks it against the catalogue.

    Args:
        releases: feature id -> its releases, oldest first. Those count that a
            vehicle may be granted: the newest of each hardware.

    Returns:
        the plans by id.

    Raises:
        ConfigError: for all problems together.
    """
    problems = []
    plans = config.read(path, _PlanFile).plans
    for number, plan in enumerate(plans):
        where = f"{path}: plans[{number}] ({plan.id})"
        if plan.feature not in releases:
            problems.append(f"{where}: feature: {plan.feature} is not in the catalogue")
            continue
        offered = {r.hardware_id: r for r in releases[plan.feature]}
        for release in offered.values():
            problems.extend(f"{where}: {what}" for what in _misfits(plan, release))
    if problems:
        raise ConfigError(problems)
    return {plan.id: plan for plan in plans}


def _misfits(plan: Plan, release: Release) -> Iterator[str]:
    """Why a plan cannot be granted with this release."""
    name = f"{plan.feature} release {release.release}"
    limits = [n for n in ("ignition_cycles", "operating_s") if getattr(plan, n)]
    if release.feature_number and plan.kind is not PlanKind.PERPETUAL and not limits:
        yield (
            "ignition_cycles: a right that is not perpetual needs ignition_cycles or operating_s, "
            f"which the ECU measures by itself ({name})"
        )
    if not release.feature_number:
        for limit in limits:
            yield f"{limit}: no ECU measures it, because {name} has an actuator of kind none"
    for price in plan.use_prices:
        if price.meter not in release.meters:
            known = ", ".join(sorted(release.meters)) or "none"
            yield f"use_prices: {price.meter} is no meter of {name}; known: {known}"
