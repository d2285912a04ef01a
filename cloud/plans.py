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
"""Most prices of use in one plan."""
MAX_TIERS = 8
"""Most tiers of one price, beside its first."""
MAX_QUOTAS = 16
"""Most quotas of one plan."""
MAX_STAGES = 8
"""Most warnings of one quota."""
PERCENT = 100
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
BY_USE = frozenset({PlanKind.PREPAID, PlanKind.PAY_PER_USE})
"""Kinds whose price is the count: they need an ECU that signs it, or a feature that says it cannot count."""

# Keys that came later: left out of the hash of terms while they say nothing, so that it stays as it was.
_LATER_KEYS = frozenset(
    {"dimension", "value", "included_units", "tiers", "entry_minor", "payment_grace_s", "quotas"}
)


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

    def index_at(self, anchor_ms: int, moment_ms: int) -> int:
        """Index of the period in which an instant lies, of those that began at `anchor_ms`; 0 before."""
        # No period is longer than its months of 31 days each, so it is not before this one.
        index = max(0, (moment_ms - anchor_ms) // ((31 * self.months + self.days) * 86_400_000))
        while self.start_ms(anchor_ms, index + 1) <= moment_ms:
            index += 1
        return index

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
class Tier:
    """The price of all units beyond `above_units`, up to the next tier."""

    above_units: int = option(minimum=1, maximum=MAX_PRICE_MINOR)
    price_minor: int = option(minimum=0, maximum=MAX_PRICE_MINOR)
    per_units: int = option(minimum=1, maximum=MAX_PRICE_MINOR)


@dataclass(frozen=True)
class UsePrice:
    """What using a feature costs: price_minor for each per_units units of a meter.

    With `dimension` and `value` only for use with that value; without, for all
    the rest. `included_units` are free in each period of the right, or in the
    whole right if it has no periods; tiers count the same units.
    """

    meter: str = option(pattern=IDENTIFIER_PATTERN)
    price_minor: int = option(minimum=0, maximum=MAX_PRICE_MINOR)
    per_units: int = option(minimum=1, maximum=MAX_PRICE_MINOR)
    dimension: str = option(default="", pattern=f"({IDENTIFIER_PATTERN})?")
    value: str = option(default="", pattern=f"({IDENTIFIER_PATTERN})?")
    included_units: int = option(default=0, minimum=0, maximum=MAX_PRICE_MINOR)
    tiers: tuple[Tier, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """What must fit together."""
        if bool(self.dimension) != bool(self.value):
            yield "value", "dimension and value are given together or not at all"
        if len(self.tiers) > MAX_TIERS:
            yield "tiers", f"{len(self.tiers)} tiers are more than the limit of {MAX_TIERS}"
        before = self.included_units
        for tier in self.tiers:
            if tier.above_units <= before:
                yield "tiers", f"above_units: expected more than {before}, found {tier.above_units}"
            before = tier.above_units


@dataclass(frozen=True)
class Quota:
    """A limit on what may be used: of each period, or of the whole right if it has none.

    Of a prepaid plan it is what one purchase buys. A soft one suspends nothing:
    what is used beyond it is a line of its own, at the meter's price.
    """

    meter: str = option(pattern=IDENTIFIER_PATTERN)
    limit: int = option(minimum=1, maximum=MAX_PRICE_MINOR)
    hard: bool = option()
    warn_percent: tuple[int, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Stages come in order, each once."""
        stages = list(self.warn_percent)
        if stages != sorted(set(stages)) or not all(1 <= stage <= PERCENT for stage in stages):
            yield "warn_percent", f"expected 1 to {PERCENT}, ascending, each once; found {stages}"
        if len(stages) > MAX_STAGES:
            yield "warn_percent", f"{len(stages)} stages are more than the limit of {MAX_STAGES}"


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
    entry_minor: int = option(default=0, minimum=0, maximum=MAX_PRICE_MINOR)
    payment_grace_s: int = option(default=0, minimum=0, maximum=MAX_GRACE_S)
    quotas: tuple[Quota, ...] = ()

    @property
    def length(self) -> Period | None:
        """The period; None for a right without a date of its own."""
        return Period.parse(self.period)

    @property
    def terms_sha256(self) -> bytes:
        """SHA-256 of everything that the plan means; its title is only words."""
        terms = asdict(self, dict_factory=_said)
        del terms["title"]
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
        if self.payment_grace_s and not self.renews:
            yield "payment_grace_s", "only what renews can miss a payment"
        if self.kind is PlanKind.PREPAID:
            yield from self._prepaid_problems()
        if self.kind is PlanKind.PAY_PER_USE and not self.use_prices:
            yield "use_prices", "missing; without one a plan of kind pay-per-use gives its feature away"
        if self.kind is PlanKind.TRIAL and (self.price_minor or self.entry_minor or self.use_prices):
            yield "kind", "a trial costs nothing: no price_minor, no entry_minor and no use_prices"
        yield from self._price_problems()
        yield from self._quota_problems()

    def _prepaid_problems(self) -> Iterator[tuple[str, str]]:
        if len(self.quotas) != 1 or not self.quotas[0].hard:
            yield "quotas", "a prepaid plan has one, a hard one: the units that one purchase buys"
        if self.use_prices:
            yield "use_prices", "prepaid use is paid already; remove them"
        if self.resale is not Resale.GOES_WITH_ACCOUNT:
            yield "resale", "units that were bought belong to the account: goes-with-account"

    def _price_problems(self) -> Iterator[tuple[str, str]]:
        if len(self.use_prices) > MAX_USE_PRICES:
            yield "use_prices", f"{len(self.use_prices)} prices are more than the limit of {MAX_USE_PRICES}"
        of_meter: dict[str, list[UsePrice]] = {}
        for price in self.use_prices:
            of_meter.setdefault(price.meter, []).append(price)
        for meter, prices in sorted(of_meter.items()):
            keys = [(p.dimension, p.value) for p in prices]
            if len(set(keys)) < len(keys):
                yield "use_prices", f"meter {meter} is priced more than once for the same use"
            if len({p.dimension for p in prices} - {""}) > 1:
                yield "use_prices", f"meter {meter} is priced by more than one dimension"

    def _quota_problems(self) -> Iterator[tuple[str, str]]:
        meters = [quota.meter for quota in self.quotas]
        if len(meters) > MAX_QUOTAS:
            yield "quotas", f"{len(meters)} quotas are more than the limit of {MAX_QUOTAS}"
        for meter in sorted({m for m in meters if meters.count(m) > 1}):
            yield "quotas", f"meter {meter} has more than one quota"
        for quota in self.quotas:
            prices = [price for price in self.use_prices if price.meter == quota.meter]
            if self.kind is PlanKind.PERPETUAL and quota.hard:
                yield "quotas", "what was bought outright has no hard quota"
            if not quota.hard and (len(prices) != 1 or prices[0].dimension):
                what = "beyond a soft quota is billed: it needs one use price, without a dimension"
                yield "quotas", f"use of {quota.meter} {what}"
            if not self.period and self.resale is Resale.STAYS_WITH_VEHICLE:
                yield "quotas", "a quota of the whole right would begin anew at a sale: goes-with-account"


def _said(items: list[tuple[str, object]]) -> dict[str, object]:
    """What a plan says, without later keys that say nothing."""
    return {key: value for key, value in items if value or key not in _LATER_KEYS}


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
    for key, meter in [("use_prices", p.meter) for p in plan.use_prices] + [
        ("quotas", q.meter) for q in plan.quotas
    ]:
        if meter not in release.meters:
            known = ", ".join(sorted(release.meters)) or "none"
            yield f"{key}: {meter} is no meter of {name}; known: {known}"
    for price in plan.use_prices:
        values = release.dimensions.get(price.meter, {}).get(price.dimension, ())
        if price.dimension and price.value not in values:
            yield (
                f"use_prices: {price.meter} of {name} has no {price.dimension} {price.value!r};"
                f" known: {', '.join(values) or 'none'}"
            )
    if plan.kind in BY_USE and not release.by_use:
        yield (
            f"kind: {plan.kind.value} needs a count that the ECU itself signs; {name} has enforcement "
            '"ecu-token" and not by_use: where the ECU cannot count, the catalogue must say "detect-only"'
        )
    elif plan.kind in BY_USE and not release.detect_only:
        for meter in sorted({p.meter for p in plan.use_prices} | {q.meter for q in plan.quotas}):
            if meter in release.meters and meter != release.reading_meter:
                yield f"kind: {plan.kind.value}: the ECU of {name} signs no count of {meter} ([reading])"
