"""Registers vehicles, grants and ends rights, and keeps each vehicle's signed set.

Every function works inside one transaction of the store: counters and
versions are stored together with what was signed under them, and before any
of it leaves. Reads no clock and no randomness of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from cloud import catalogue as catalogue_module
from cloud import director, findings, token
from cloud.catalogue import Catalogue, Fresh
from cloud.config import Signer
from cloud.errors import ExistsError, NotFoundError, NotPossibleError, SignerLimitError, StartError
from cloud.keyring import Keyring, is_signed_by
from cloud.model import HEAD_UNIT, Counter, Ecu, Release, Reported, Versions
from cloud.plans import BY_USE, Period, Plan, PlanKind, Resale
from cloud.store import (
    EntitlementRow,
    PurchaseRow,
    SetRow,
    TermsRow,
    TokenRow,
    Transaction,
    VehicleRow,
)
from common import log
from openfod.entitlement.v1 import entitlement_pb2
from openfod.vehicle.v1 import vehicle_service_pb2

MAX_RIGHTS = 256
"""Most rights that one vehicle may have at a time."""
RENEW_AHEAD_MS = 3 * 86_400_000
"""How long before its end a renewing right gets its next period."""
YEAR_MS = 365 * 86_400_000
"""Time over which swapped ECUs of one vehicle are counted."""
HOUR_MS = 3_600_000
SIGNER_ALARM_PERCENT = 80
"""Part of a signer's limit at which the alarm comes."""
MAX_PERIOD_STARTS = 16
"""Most periods that a quota names ahead."""
MAX_JUMP = 1_000_000
"""Most by which one restore moves a version or counter past what this database knows."""
CATALOGUE_JUMP = 1_000_000
"""By which the catalogue's snapshot and timestamp versions move at a confirmed restore."""
NEVER_MS = 2**63 - 1
"""When a right is due that time does not end or change."""
MAX_UNITS = 10**15
"""Most units that a prepaid right holds over its life."""
SOLD = "the vehicle was sold"
"""Why rights end at a sale."""

_KINDS = {kind: entitlement_pb2.PlanKind.Value(f"PLAN_KIND_{kind.name}") for kind in PlanKind}
_RESALES = {resale: entitlement_pb2.Resale.Value(f"RESALE_{resale.name}") for resale in Resale}
_KEY_FOLDER = "token-keys/"
_SUBSCRIPTION = _KINDS[PlanKind.SUBSCRIPTION]
_PREPAID = _KINDS[PlanKind.PREPAID]
_SOLD_BY_USE = frozenset(_KINDS[kind] for kind in BY_USE)
_STAYS = _RESALES[Resale.STAYS_WITH_VEHICLE]

_log = log.get(__name__)


@dataclass(frozen=True)
class Granted:
    """A new right and the version of the set that carries it."""

    right: entitlement_pb2.Entitlement
    version: int


@dataclass(frozen=True)
class Bundle:
    """All rights of a vehicle as one file; `ends_ms`: when the vehicle no longer takes it."""

    update: vehicle_service_pb2.TrustUpdate
    ends_ms: int


@dataclass(frozen=True)
class Rebound:
    """A vehicle with a replaced ECU.

    Args:
        version: of the set that carries the new tokens.
        burning_tokens: switch the features off for ever on the ECU that was taken out.
    """

    version: int
    burning_tokens: tuple[bytes, ...]


@dataclass(frozen=True)
class Sold:
    """A sold vehicle: the rights of the new owner, those that went with the account before."""

    owner_epoch: int
    kept: tuple[EntitlementRow, ...]
    ended: tuple[EntitlementRow, ...]
    version: int


class Rights:
    """The rules by which rights come, go on and end.

    Args:
        keys: online keys.
        catalogue: the signed catalogue.
        plans: the price list, by plan id.
        random: returns that many unpredictable bytes.
        limits: of the signer, over the whole fleet.
    """

    def __init__(
        self,
        keys: Keyring,
        catalogue: Catalogue,
        plans: Mapping[str, Plan],
        random: Callable[[int], bytes],
        limits: Signer = Signer(),  # noqa: B008 (frozen)
    ) -> None:
        self._keys, self._catalogue, self._plans, self._random = keys, catalogue, plans, random
        self._limits = limits
        self._token_key_id = token.key_id(keys.token)
        self._shared_hashes = {item.path: hashlib.sha256(item.content).hexdigest() for item in keys.shared}

    # --- vehicles ---------------------------------------------------------

    def register(self, tx: Transaction, vin: str, ecus: Sequence[Ecu], now_ms: int) -> VehicleRow:
        """Registers a vehicle and signs its first, empty set.

        Raises:
            ExistsError: the VIN is registered with other ECUs or has enrolled,
                or an ECU is built into another vehicle.
        """
        known = tx.lock_vehicle(vin)
        if known is not None:
            if known.enrolled_ms or tx.ecus(vin) != sorted(ecus, key=lambda e: e.identifier):
                raise ExistsError(f"vehicle {vin} is registered already; it was not changed")
            return known
        for ecu in ecus:
            owner = tx.ecu_owner(ecu.uid)
            if owner is not None:
                raise ExistsError(f"ECU uid {ecu.uid.hex()} ({ecu.identifier}) is built into vehicle {owner}")
            _check_reading_key(tx, ecu.uid, ecu.reading_key)
        source = f"veh-{self._random(8).hex()}"
        tx.add_vehicle(vin, source, ecus, now_ms)
        self._publish(tx, vin, now_ms)
        return VehicleRow(vin, source, 0, b"")

    def rebind(
        self,
        tx: Transaction,
        vin: str,
        ecu_identifier: str,
        old_uid: bytes,
        new_uid: bytes,
        *,
        per_year: int,
        now_ms: int,
        reading_key: bytes = b"",
    ) -> Rebound:
        """Binds a vehicle's rights to the ECU that was put in the place of another.

        The tokens of the old uid are burned first, then those of all rights
        are signed for the new uid, with counters above all that the vehicle
        has seen, and published as one set. Limits that an ECU counts by itself
        (ignition cycles, operating time) begin anew on the new one: only the
        old ECU knew what was left. The quota bounds what that gives away.

        Args:
            per_year: swaps that one vehicle may have within YEAR_MS.
            reading_key: with which the new ECU signs what it counts, 32 bytes; empty if it signs
                nothing or its key is registered already.

        Raises:
            NotFoundError: no such vehicle, or it has no such ECU.
            NotPossibleError: another ECU is on record, or the quota is used up.
            ExistsError: the new ECU is built into a vehicle already, or has another reading key.
        """
        known_vehicle(tx, vin)
        old = next((ecu for ecu in tx.ecus(vin) if ecu.identifier == ecu_identifier), None)
        if old is None:
            raise NotFoundError(f"vehicle {vin} has no ECU {ecu_identifier}")
        if old.uid != old_uid:
            raise NotPossibleError(
                f"ECU {ecu_identifier} of vehicle {vin} has another uid on record than {old_uid.hex()}; "
                "read it from the ECU that was taken out"
            )
        owner = tx.ecu_owner(new_uid)
        if owner is not None:
            raise ExistsError(f"ECU uid {new_uid.hex()} is built into vehicle {owner}")
        _check_quota(vin, tx.ecu_swaps(vin, now_ms - YEAR_MS), per_year)
        _check_reading_key(tx, new_uid, reading_key)
        if reading_key:
            tx.put_reading_key(new_uid, reading_key)
        self.refresh(tx, vin, now_ms)  # a right that has run out gets no new token
        signed = [row for row in tx.tokens(vin) if row.ecu_identifier == ecu_identifier]
        burning = [self._burn(tx, vin, old, row) for row in signed]
        # All of them, also of features without a token now: the vehicle remembers them by the ECU's place.
        tx.copy_token_counters(old_uid, new_uid)
        tx.replace_ecu(vin, ecu_identifier, new_uid, now_ms)
        new = replace(old, uid=new_uid, reading_key=reading_key)
        live = {
            row.feature_id: entitlement_pb2.Entitlement.FromString(row.content)
            for row in tx.entitlements(vin)
            if not row.revoked_ms
        }
        for row in signed:
            number = token.feature_number(row.content)
            self._put_token(tx, vin, new, row.feature_id, number, live.get(row.feature_id))
        return Rebound(self._publish(tx, vin, now_ms), tuple(burning))

    def _burn(self, tx: Transaction, vin: str, ecu: Ecu, signed: TokenRow) -> bytes:
        """Signs the token that ends a feature on this ECU for ever."""
        number = token.feature_number(signed.content)
        counter = tx.next_token_counter(ecu.uid, number)
        return self._sign(vin, ecu.uid, number, counter, None)

    def transfer(self, tx: Transaction, vin: str, account: str, now_ms: int) -> Sold:
        """Gives a vehicle to its next owner, whose epoch begins.

        A right that stays becomes one of the new account under a new id, so
        that use before and after the sale is billed to the right one, and its
        token stays as it is; periods that began before are the old account's.
        All other rights end, and their tokens are burned. What the vehicle
        reported of its features, and a claim that was not used, end as well.

        Raises:
            NotFoundError: no such vehicle.
        """
        owner_epoch = known_vehicle(tx, vin).owner_epoch + 1
        self.refresh(tx, vin, now_ms)
        kept, ended = [], []
        for row in tx.entitlements(vin):
            if row.revoked_ms:
                continue
            right = entitlement_pb2.Entitlement.FromString(row.content)
            if right.resale == _STAYS:
                # Later than the grant, whatever the clock did: it is how rating knows what is inherited.
                sold_ms = max(now_ms, row.granted_ms + 1)
                tx.end_entitlement(row.entitlement_id, sold_ms, SOLD)
                right.entitlement_id, right.account = f"ent-{self._random(8).hex()}", account
                right.trace_id = self._random(16).hex()
                kept.append(
                    replace(
                        row,
                        entitlement_id=right.entitlement_id,
                        account=account,
                        content=right.SerializeToString(deterministic=True),
                        granted_ms=sold_ms,
                        owner_epoch=owner_epoch,
                    )
                )
                tx.add_entitlement(kept[-1])
                for terms in tx.terms([row.entitlement_id]).get(row.entitlement_id, ()):
                    tx.put_terms(_of_other(terms, right))
            else:
                self._end(tx, vin, row, SOLD, now_ms)
                ended.append(replace(row, revoked_ms=now_ms, revoke_reason=SOLD))
        tx.set_owner_epoch(vin, owner_epoch)
        tx.replace_status(vin, {})
        tx.end_claim(vin)
        return Sold(owner_epoch, tuple(kept), tuple(ended), self._publish(tx, vin, now_ms))

    # --- rights -----------------------------------------------------------

    def grant(
        self, tx: Transaction, vin: str, plan_id: str, account: str, trace_id: str, now_ms: int
    ) -> Granted:
        """Grants a plan's right and signs the set that carries it.

        Args:
            trace_id: 32 lower-case hex digits; made here if empty.

        Raises:
            NotFoundError: no such vehicle or plan.
            NotPossibleError: the vehicle has not the ECU, has the right, or had
                its trial, or the feature is withdrawn.
        """
        vehicle = known_vehicle(tx, vin)
        self.refresh(tx, vin, now_ms)  # a right that has run out blocks no new one
        plan = self._plan(plan_id)
        rows = tx.entitlements(vin)
        live = [row for row in rows if not row.revoked_ms]
        for row in live:
            if row.feature_id == plan.feature:
                raise NotPossibleError(
                    f"vehicle {vin} has {row.entitlement_id} for {plan.feature} already; revoke it first"
                )
        if len(live) >= MAX_RIGHTS:
            raise NotPossibleError(f"vehicle {vin} has {len(live)} rights, the limit is {MAX_RIGHTS}")
        if plan.kind is PlanKind.TRIAL and tx.had_trial(account, plan.feature):
            raise NotPossibleError(f"account {account} has had its trial of {plan.feature}")
        ecus = tx.ecus(vin)
        release = self._newest(vin, plan.feature, ecus)
        _count(tx, "new_rights", self._limits.new_rights_per_hour, now_ms)
        right = self._right(plan, account, release, trace_id or self._random(16).hex(), now_ms)
        if any(_paid_entry(row, account, plan.feature) for row in rows):
            right.display_terms.entry_minor = 0  # who comes back has paid it
        row = EntitlementRow(
            right.entitlement_id,
            vin,
            plan.feature,
            account,
            _KINDS[plan.kind],
            content=b"",
            granted_ms=now_ms,
            revoked_ms=0,
            revoke_reason="",
            owner_epoch=vehicle.owner_epoch,
            anchor_ms=now_ms,
        )
        tx.add_entitlement(_with_content(row, right))
        if plan.kind is PlanKind.TRIAL:
            tx.add_trial(account, plan.feature)
        self._sign_token(tx, vin, ecus, release, right)
        return Granted(right, self._publish(tx, vin, now_ms))

    def revoke(self, tx: Transaction, vin: str, entitlement_id: str, reason: str, now_ms: int) -> int:
        """Ends a right, burns its token and returns the version of the set without it.

        Raises:
            NotFoundError: no such vehicle, or it has no such right.
            NotPossibleError: the right has ended before.
        """
        known_vehicle(tx, vin)
        row = _live_right(tx, vin, entitlement_id)
        _count(tx, "revocations", self._limits.revocations_per_hour, now_ms)
        self._end(tx, vin, row, reason, now_ms)
        return self._publish(tx, vin, now_ms)

    def payment(self, tx: Transaction, vin: str, entitlement_id: str, *, paid: bool, now_ms: int) -> int:
        """Notes how a payment for a subscription went, and returns the version of the set.

        A payment is for the period up to which the right was renewed. One that
        failed starts the plan's grace, at the begin of that period at the
        earliest; no further period begins meanwhile. One that was made undoes
        that. Said twice, it changes nothing.

        Raises:
            NotFoundError: no such vehicle, or it has no such right.
            NotPossibleError: the right has ended, or does not renew.
        """
        known_vehicle(tx, vin)
        self.refresh(tx, vin, now_ms)
        row = _live_right(tx, vin, entitlement_id)
        right = entitlement_pb2.Entitlement.FromString(row.content)
        if not _renews(right):
            raise NotPossibleError(f"right {entitlement_id} does not renew, so it has no payments")
        if paid and row.payment_failed_ms:
            right.display_terms.payment_failed = False
            right.offline_grace_s = _terms_at(row, _terms_rows(tx, row), now_ms).offline_grace_s
            right.validity.not_after_s = _end_s(right, row.anchor_ms, now_ms)
            _set_period_starts(right, row.anchor_ms, now_ms)
            row = replace(row, payment_failed_ms=0)
        elif not paid and not row.payment_failed_ms:
            self._keep_terms(tx, row)  # the grace without contact, which ends now, is theirs
            end_ms = right.validity.not_after_s * 1000
            # A second before, because the signed end is rounded up to a whole one.
            period_ms = _period_start_ms(right, row.anchor_ms, end_ms - 1000)
            begun_s = -(-_period_start_ms(right, row.anchor_ms, now_ms) // 1000)
            for quota in right.quotas:  # unpaid time gets no new allowance
                kept = [start for start in quota.period_starts_s if start <= begun_s]
                del quota.period_starts_s[:]
                quota.period_starts_s.extend(kept)
            grace_s = self._payment_grace_s(tx, row)
            right.validity.not_after_s = -(-max(now_ms, period_ms) // 1000) + grace_s
            right.display_terms.payment_failed = True
            right.offline_grace_s = 0
            row = replace(row, payment_failed_ms=now_ms)
        else:
            signed = tx.vehicle_set(vin)
            assert signed is not None
            return signed.version
        tx.set_entitlement(_with_content(row, right, _terms_rows(tx, row)))
        if self.refresh(tx, vin, now_ms):  # without any grace it ends at once
            signed = tx.vehicle_set(vin)
            assert signed is not None
            return signed.version
        return self._publish(tx, vin, now_ms)

    def top_up(self, tx: Transaction, vin: str, entitlement_id: str, packs: int, now_ms: int) -> int:
        """Adds bought units to a prepaid right, at the price of its terms; returns the version of the set.

        Raises:
            NotFoundError: no such vehicle, or it has no such right.
            NotPossibleError: the right has ended, is not prepaid, or would hold more than MAX_UNITS.
        """
        known_vehicle(tx, vin)
        row = _live_right(tx, vin, entitlement_id)
        right = entitlement_pb2.Entitlement.FromString(row.content)
        if right.plan_kind != _PREPAID:
            raise NotPossibleError(f"right {entitlement_id} is not prepaid, so nothing can be added to it")
        _count(tx, "new_rights", self._limits.new_rights_per_hour, now_ms)
        bought = tx.purchases([entitlement_id]).get(entitlement_id, [])
        (quota,) = right.quotas
        terms_rows = _terms_rows(tx, row)
        terms = _terms_at(row, terms_rows, now_ms)
        pack = terms.quotas[0].limit
        if not terms_rows:
            pack = quota.limit - sum(purchase.units for purchase in bought)
        if quota.limit + packs * pack > MAX_UNITS:
            raise NotPossibleError(f"right {entitlement_id} would hold more than {MAX_UNITS} units")
        for _ in range(packs):
            price_minor = terms.display_terms.price_minor
            number = len(bought) + 1
            bought.append(PurchaseRow(entitlement_id, number, now_ms, pack, price_minor))
            tx.add_purchase(bought[-1])
        quota.limit += packs * pack
        tx.set_entitlement(_with_content(row, right, terms_rows))
        return self._publish(tx, vin, now_ms)

    def change_plan(
        self, tx: Transaction, vin: str, entitlement_id: str, plan_id: str, now_ms: int
    ) -> tuple[int, Plan]:
        """Moves a right to another plan, or to the newest version of its own.

        The new terms count from the next period on, at once if the right has
        no periods. The vehicle gets them when they count.

        Returns:
            since when they count, Unix milliseconds, and the plan.

        Raises:
            NotFoundError: no such vehicle, right or plan.
            NotPossibleError: the right has ended, has these terms already, or
                the plan is of another feature, kind, period or currency.
        """
        known_vehicle(tx, vin)
        self.refresh(tx, vin, now_ms)
        row = _live_right(tx, vin, entitlement_id)
        right = entitlement_pb2.Entitlement.FromString(row.content)
        plan = self._plan(plan_id)
        for what, has, offered in (
            ("feature", right.feature_id, plan.feature),
            ("kind", right.plan_kind, _KINDS[plan.kind]),
            ("period", right.display_terms.period, plan.period),
            ("renewal", right.display_terms.renews, plan.renews),
            ("currency", right.display_terms.currency, plan.currency),
            ("resale", right.resale, _RESALES[plan.resale]),
        ):
            if has != offered:
                raise NotPossibleError(
                    f"plan {plan_id} has another {what} than right {entitlement_id}: {offered}, not {has}; "
                    "end the right and grant the plan"
                )
        terms = _terms_rows(tx, row)
        newest = entitlement_pb2.Entitlement.FromString(terms[-1].content) if terms else right
        if (newest.plan_id, newest.plan_version) == (plan.id, plan.version):
            raise NotPossibleError(
                f"right {entitlement_id} has plan {plan.id} version {plan.version} already"
            )
        from_ms = now_ms
        if right.display_terms.period:
            from_ms = _end_s(right, row.anchor_ms, now_ms) * 1000
            from_ms = _period_start_ms(right, row.anchor_ms, from_ms)
        self._keep_terms(tx, row)
        changed = self._terms_of(plan, right)
        content = changed.SerializeToString(deterministic=True)
        tx.put_terms(TermsRow(entitlement_id, from_ms, content))
        tx.set_entitlement(_with_content(row, right, _terms_rows(tx, row)))
        self.refresh(tx, vin, now_ms)
        return from_ms, plan

    def _plan(self, plan_id: str) -> Plan:
        plan = self._plans.get(plan_id)
        if plan is None:
            raise NotFoundError(
                f"plan {plan_id} is not in the price list; it has {', '.join(sorted(self._plans))}"
            )
        return plan

    def _terms_of(self, plan: Plan, right: entitlement_pb2.Entitlement) -> entitlement_pb2.Entitlement:
        """A right under the terms of a plan; of a prepaid one the quota is what one purchase buys."""
        changed = entitlement_pb2.Entitlement()
        changed.CopyFrom(right)
        changed.plan_id, changed.plan_version = plan.id, plan.version
        changed.offline_grace_s = plan.offline_grace_s
        changed.validity.ignition_cycles, changed.validity.operating_s = (
            plan.ignition_cycles,
            plan.operating_s,
        )
        entry_minor = right.display_terms.entry_minor
        changed.display_terms.CopyFrom(_display(plan))
        changed.display_terms.entry_minor = entry_minor
        del changed.quotas[:]
        changed.quotas.extend(_quotas(plan))
        return changed

    def _keep_terms(self, tx: Transaction, row: EntitlementRow) -> None:
        """Keeps the terms of the grant beside what follows them."""
        if not _terms_rows(tx, row):
            right = entitlement_pb2.Entitlement.FromString(row.content)
            if right.plan_kind == _PREPAID:
                bought = tx.purchases([row.entitlement_id]).get(row.entitlement_id, [])
                right.quotas[0].limit -= sum(purchase.units for purchase in bought)
            tx.put_terms(TermsRow(row.entitlement_id, 0, right.SerializeToString(deterministic=True)))

    def _payment_grace_s(self, tx: Transaction, row: EntitlementRow) -> int:
        """How long the right goes on after a payment failed, by the version of its plan."""
        right = entitlement_pb2.Entitlement.FromString(row.content)
        return tx.payment_grace_s(right.plan_id, right.plan_version)

    def refresh(self, tx: Transaction, vin: str, now_ms: int) -> bool:
        """Starts the next periods, ends what has run out and renews signatures, where due.

        Tokens with a limit of the ECU's own are signed anew with the set, so
        that a vehicle that is seen now and then never runs into their limit.

        Returns:
            True if a new set was signed.
        """
        signed = tx.vehicle_set(vin)
        retired = any(token.signer_id(row.content) != self._token_key_id for row in tx.tokens(vin))
        changed = signed is None or retired or self._is_stale(signed, now_ms)
        ecus = tx.ecus(vin)
        live = [row for row in tx.entitlements(vin) if not row.revoked_ms]
        changed_terms = tx.terms([row.entitlement_id for row in live])
        for row in live:
            right = entitlement_pb2.Entitlement.FromString(row.content)
            terms = changed_terms.get(row.entitlement_id, [])
            _take_terms(right, _terms_at(row, terms, now_ms), row.anchor_ms, now_ms)
            end_ms = right.validity.not_after_s * 1000
            renews = _renews(right) and not row.payment_failed_ms
            if end_ms and renews and now_ms >= end_ms - RENEW_AHEAD_MS:
                right.validity.not_after_s = _end_s(right, row.anchor_ms, now_ms + RENEW_AHEAD_MS)
                _set_period_starts(right, row.anchor_ms, now_ms)
            elif end_ms and not renews and now_ms >= end_ms + right.offline_grace_s * 1000:
                why = (
                    "a payment failed, and its grace is over"
                    if row.payment_failed_ms
                    else "its period is over"
                )
                self._end(tx, vin, row, why, now_ms)
                changed = True
                continue
            judged = _with_content(row, right, terms)
            if judged != row:
                tx.set_entitlement(judged)
                changed |= judged.content != row.content
        if changed:
            if retired:
                self._sign_tokens_again(tx, vin)
            else:
                self._renew_tokens(tx, vin, ecus)
            self._publish(tx, vin, now_ms)
        return changed

    def _is_stale(self, signed: SetRow, now_ms: int) -> bool:
        """True if a set is about to expire, of replaced keys, or without what all vehicles get now."""
        listed = {
            path: target["hashes"]["sha256"]
            for path, target in json.loads(signed.targets)["signed"]["targets"].items()
            if path == director.TLS_PATH or path.startswith(_KEY_FOLDER)
        }
        return (
            listed != self._shared_hashes
            or signed.expires_ms - now_ms < _ms(director.SET_RENEW_BELOW)
            or not is_signed_by(signed.targets, self._keys.director_targets)
            or not is_signed_by(signed.snapshot, self._keys.director.snapshot)
        )

    # --- what a vehicle is sent -------------------------------------------

    def update(
        self,
        tx: Transaction,
        vin: str,
        nonce: bytes | None,
        has_director: Versions,
        has_catalogue: Versions,
        now_ms: int,
    ) -> vehicle_service_pb2.TrustUpdate:
        """Answers a nonce with the signed time and with whatever is newer than the vehicle has.

        Args:
            nonce: 16 bytes that nothing has answered yet; None for a file.
            has_director, has_catalogue: versions that the vehicle trusts.
        """
        known_vehicle(tx, vin)
        self.refresh(tx, vin, now_ms)
        row = tx.vehicle_set(vin)
        assert row is not None
        version = tx.next_timestamp_version(vin)
        keys = self._keys.director
        update = vehicle_service_pb2.TrustUpdate()
        update.director.timestamp = director.sign_timestamp(
            vin,
            version,
            set_version=row.version,
            snapshot=row.snapshot,
            nonce=nonce,
            timestamp_key=keys.timestamp,
            now_ms=now_ms,
        )
        update.director.roots.extend(keys.roots_after(has_director.root))
        # Behind a new root, versions begin anew: the vehicle may have been led ahead by a stolen key.
        behind = keys.is_behind(has_director.root)
        if behind or row.version > has_director.snapshot:
            update.director.snapshot = row.snapshot
        if behind or row.version > has_director.targets:
            update.director.targets = row.targets
            self._add_targets(tx, vin, row, update)
        self._add_catalogue(tx, has_catalogue, update, now_ms)
        return update

    def bundle(self, tx: Transaction, vin: str, now_ms: int) -> Bundle:
        """Signs all rights of a vehicle as one file, complete from the first root on.

        Raises:
            NotFoundError: no such vehicle.
            NotPossibleError: the vehicle is known to trust newer versions, and would refuse it.
        """
        known_vehicle(tx, vin)
        if any(row.kind == findings.CLOUD_BEHIND for row in tx.findings(vin)):
            raise NotPossibleError(
                f"vehicle {vin} trusts newer versions than this database and would refuse the file; "
                "after a restore: fod-cloud confirm-restore, then let the vehicle connect once"
            )
        update = self.update(tx, vin, None, Versions(), Versions(), now_ms)
        fresh, signed = tx.fresh(), tx.vehicle_set(vin)
        assert fresh is not None
        assert signed is not None
        ends_ms = now_ms // 1000 * 1000 + _ms(director.OFFLINE_LIFETIME)
        return Bundle(update, min(ends_ms, fresh.expires_ms, signed.expires_ms))

    # --- after a restore ----------------------------------------------------

    def confirm_restore(self, tx: Transaction, backup_ms: int, until_ms: int, now_ms: int) -> None:
        """Opens the window in which versions may move past what vehicles report.

        The catalogue's own versions jump once, by CATALOGUE_JUMP: no vehicle is believed for them.
        """
        tx.add_restore(backup_ms, until_ms, now_ms)
        previous = self.fresh_catalogue(tx, now_ms)
        ahead = replace(
            previous,
            snapshot_version=previous.snapshot_version + CATALOGUE_JUMP,
            timestamp_version=previous.timestamp_version + CATALOGUE_JUMP,
        )
        tx.put_fresh(catalogue_module.sign_fresh(self._catalogue, self._keys.catalogue, ahead, now_ms))

    def catch_up(self, tx: Transaction, vin: str, reported: Reported, now_ms: int) -> bool:
        """Makes sure that the next update is not older than what a vehicle trusts.

        A vehicle that reports more than this database knows gets nothing until
        an operator has confirmed a restore; within the window of one, versions
        and counters move past what it reports, once, by at most MAX_JUMP.

        Returns:
            False if the vehicle would refuse the next update as a rollback.
        """
        signed = tx.vehicle_set(vin)
        assert signed is not None
        ahead = self._ahead(tx, vin, signed, reported)
        held = any(row.kind == findings.CLOUD_BEHIND for row in tx.findings(vin))
        if not ahead and self._keys.director.begins_anew(reported.director.root):
            tx.end_findings(vin, findings.CLOUD_BEHIND)
            return True
        if not ahead and not held:
            return True
        restore = tx.open_restore(now_ms)
        if restore is None or tx.caught_up(vin) == restore.id:
            reason = "was the database restored from a backup? then: fod-cloud confirm-restore"
        elif reported.owner_epoch > known_vehicle(tx, vin).owner_epoch:
            reason = "its sale was lost with the restore: complete it again"
        elif any(theirs - ours > MAX_JUMP for ours, theirs in ahead.values()):
            reason = f"more than {MAX_JUMP} ahead: no restore explains that"
        else:
            self._move_past(tx, vin, signed, reported, now_ms)
            tx.set_caught_up(vin, restore.id)
            tx.end_findings(vin, findings.CLOUD_BEHIND)
            moved = {what: list(pair) for what, pair in ahead.items()}
            tx.audit("cloud", "caught-up", vin, now_ms, restore_id=restore.id, moved=moved)
            return True
        if ahead:
            text = f"it trusts newer versions than this database; {reason}"
            facts = {what: {"here": ours, "vehicle": theirs} for what, (ours, theirs) in ahead.items()}
            findings.add(tx, vin, findings.CLOUD_BEHIND, text, now_ms, versions=facts)
        return False

    def _ahead(
        self, tx: Transaction, vin: str, signed: SetRow, reported: Reported
    ) -> dict[str, tuple[int, int]]:
        """What a vehicle has newer than this database: what -> (here, on the vehicle)."""
        counters = {
            f"token counter of {found.ecu_identifier}/{found.feature_id}": (
                tx.token_counter(uid, number),
                found.counter,
            )
            for uid, number, found in self._counters(tx, vin, reported)
        }
        if self._keys.director.begins_anew(reported.director.root):
            # It forgets all of this on the way. Its ECUs do not: what a restore explains counts on.
            pairs = {what: pair for what, pair in counters.items() if pair[1] - pair[0] <= MAX_JUMP}
        else:
            pairs = {
                "targets": (signed.version, reported.director.targets),
                "snapshot": (signed.version, reported.director.snapshot),
                "timestamp": (signed.timestamp_version, reported.director.timestamp),
                "owner epoch": (known_vehicle(tx, vin).owner_epoch, reported.owner_epoch),
                **counters,
            }
        return {what: pair for what, pair in pairs.items() if pair[0] < pair[1]}

    def _counters(self, tx: Transaction, vin: str, reported: Reported) -> list[tuple[bytes, int, Counter]]:
        """Reported counters of ECUs and features that exist: uid, feature number, counter."""
        ecus = tx.ecus(vin)
        uids = {ecu.identifier: ecu.uid for ecu in ecus}
        numbers = {
            (release.ecu_identifier, release.feature_id): release.feature_number
            for releases in self._catalogue.releases.values()
            for release in releases
            if release.feature_number and _fits(release, ecus)
        }
        # A feature may have another number on other hardware: what was signed for this vehicle counts.
        for row in tx.tokens(vin):
            numbers[row.ecu_identifier, row.feature_id] = token.feature_number(row.content)
        return [
            (uids[found.ecu_identifier], number, found)
            for found in reported.counters
            if (number := numbers.get((found.ecu_identifier, found.feature_id)))
            and found.ecu_identifier in uids
        ]

    def _move_past(self, tx: Transaction, vin: str, signed: SetRow, reported: Reported, now_ms: int) -> None:
        """Signs tokens and set anew, above all that the vehicle reported."""
        for uid, number, found in self._counters(tx, vin, reported):
            if found.counter - tx.token_counter(uid, number) <= MAX_JUMP:
                tx.raise_token_counter(uid, number, found.counter)
        above = signed.version
        if not self._keys.director.begins_anew(reported.director.root):
            tx.raise_timestamp_version(vin, reported.director.timestamp)
            above = max(above, reported.director.targets, reported.director.snapshot)
        self._sign_tokens_again(tx, vin)
        self._publish(tx, vin, now_ms, above=above)

    def _sign_tokens_again(self, tx: Transaction, vin: str) -> None:
        """Signs every token of a vehicle anew, with the next counter; burned ones stay burned."""
        ecus = {ecu.identifier: ecu for ecu in tx.ecus(vin)}
        live = {
            row.feature_id: entitlement_pb2.Entitlement.FromString(row.content)
            for row in tx.entitlements(vin)
            if not row.revoked_ms
        }
        for row in tx.tokens(vin):
            number = token.feature_number(row.content)
            right = live.get(row.feature_id)
            self._put_token(tx, vin, ecus[row.ecu_identifier], row.feature_id, number, right)

    def _add_targets(
        self, tx: Transaction, vin: str, row: SetRow, update: vehicle_service_pb2.TrustUpdate
    ) -> None:
        # What the signed set lists, not what is newest now: the catalogue may have grown since.
        listed = json.loads(row.targets)["signed"]["targets"]
        update.director_targets.add(path=director.ENTITLEMENTS_PATH, content=row.entitlements)
        for item in self._keys.shared:
            update.director_targets.add(path=item.path, content=item.content)
        for signed in tx.tokens(vin):
            path = director.token_path(signed.ecu_identifier, signed.feature_id)
            if path in listed:
                update.director_targets.add(path=path, content=signed.content)
        for releases in self._catalogue.releases.values():
            for release in releases:
                if release.path in listed:
                    update.catalogue_targets.add(path=release.path, content=release.content)

    def _add_catalogue(
        self, tx: Transaction, has: Versions, update: vehicle_service_pb2.TrustUpdate, now_ms: int
    ) -> None:
        fresh = self.fresh_catalogue(tx, now_ms)
        update.catalogue.roots.extend(self._keys.catalogue.roots_after(has.root))
        behind = self._keys.catalogue.is_behind(has.root)
        if behind or fresh.timestamp_version > has.timestamp:
            update.catalogue.timestamp = fresh.timestamp
        if behind or fresh.snapshot_version > has.snapshot:
            update.catalogue.snapshot = fresh.snapshot
        if behind or self._catalogue.targets_version > has.targets:
            update.catalogue.targets = self._catalogue.targets

    def check(self, tx: Transaction) -> None:
        """Makes sure that rights keep what they refer to: the catalogue's releases and the plans' terms.

        Raises:
            StartError: a live right's release is missing, so that its vehicle
                would get no update at all, or a plan means something else
                under a version that was offered before.
        """
        offered = tx.plan_terms()
        changed = []
        for plan in self._plans.values():
            known = offered.get((plan.id, plan.version))
            if known is None:
                tx.add_plan_terms(plan.id, plan.version, plan.terms_sha256, plan.payment_grace_s)
            elif known != plan.terms_sha256:
                changed.append(f"{plan.id} version {plan.version}")
        if changed:
            raise StartError(
                f"plans with other terms than when they were first offered: {', '.join(sorted(changed))}; "
                "a change is a new version"
            )
        missing: dict[str, str] = {}
        for row in tx.live_entitlements():
            right = entitlement_pb2.Entitlement.FromString(row.content)
            releases = self._catalogue.releases.get(row.feature_id, ())
            if not any(r.release >= right.min_release for r in releases):
                missing[f"{row.feature_id} from release {right.min_release}"] = row.entitlement_id
        if missing:
            raise StartError(
                "the catalogue lacks what live rights need: "
                + "; ".join(f"{what} (such as {right})" for what, right in sorted(missing.items()))
            )

    def fresh_catalogue(self, tx: Transaction, now_ms: int) -> Fresh:
        """The catalogue's snapshot and timestamp, signed anew where due."""
        previous = tx.fresh()
        if previous is not None and not catalogue_module.needs_fresh(
            self._catalogue, self._keys.catalogue, previous, now_ms
        ):
            return previous
        fresh = catalogue_module.sign_fresh(self._catalogue, self._keys.catalogue, previous, now_ms)
        tx.put_fresh(fresh)
        return fresh

    # ----------------------------------------------------------------------

    def _newest(self, vin: str, feature_id: str, ecus: Sequence[Ecu]) -> Release:
        """The newest release that fits this vehicle; a withdrawn one stops new grants."""
        releases = self._catalogue.releases[feature_id]
        fitting = [release for release in releases if _fits(release, ecus)]
        if not fitting:
            wanted = " or ".join(sorted({f"{r.ecu_identifier} ({r.hardware_id})" for r in releases}))
            built = ", ".join(f"{e.identifier} ({e.hardware_id})" for e in ecus) or "no ECU"
            raise NotPossibleError(f"feature {feature_id} needs ECU {wanted}; vehicle {vin} has {built}")
        if fitting[-1].withdrawn:
            raise NotPossibleError(
                f"feature {feature_id} is withdrawn (release {fitting[-1].release}); existing rights go on"
            )
        return fitting[-1]

    def _right(
        self, plan: Plan, account: str, release: Release, trace_id: str, now_ms: int
    ) -> entitlement_pb2.Entitlement:
        right = entitlement_pb2.Entitlement(
            entitlement_id=f"ent-{self._random(8).hex()}",
            feature_id=plan.feature,
            min_release=release.release,
            account=account,
            plan_kind=_KINDS[plan.kind],
            plan_id=plan.id,
            plan_version=plan.version,
            offline_grace_s=plan.offline_grace_s,
            resale=_RESALES[plan.resale],
            display_terms=_display(plan),
            quotas=_quotas(plan),
            trace_id=trace_id,
        )
        limits = entitlement_pb2.Validity(ignition_cycles=plan.ignition_cycles, operating_s=plan.operating_s)
        if plan.period:
            limits.not_after_s = _end_s(right, now_ms, now_ms)
        if limits.ByteSize():
            right.validity.CopyFrom(limits)
        _set_period_starts(right, now_ms, now_ms)
        return right

    def _sign_token(
        self,
        tx: Transaction,
        vin: str,
        ecus: Sequence[Ecu],
        release: Release,
        right: entitlement_pb2.Entitlement,
    ) -> None:
        """Signs the next token of a right, if its ECU verifies one."""
        if release.feature_number:
            ecu = next(e for e in ecus if e.identifier == release.ecu_identifier)
            self._put_token(tx, vin, ecu, release.feature_id, release.feature_number, right)

    def _put_token(
        self,
        tx: Transaction,
        vin: str,
        ecu: Ecu,
        feature_id: str,
        feature_number: int,
        right: entitlement_pb2.Entitlement | None,
    ) -> None:
        """Signs the next token of a feature; without a right, one that burns all older ones."""
        counter = tx.next_token_counter(ecu.uid, feature_number)
        content = self._sign(vin, ecu.uid, feature_number, counter, right)
        tx.put_token(vin, TokenRow(ecu.identifier, feature_id, ecu.hardware_id, counter, content))

    def _sign(
        self,
        vin: str,
        uid: bytes,
        feature_number: int,
        counter: int,
        right: entitlement_pb2.Entitlement | None,
    ) -> bytes:
        terms = {}
        if right is not None and right.validity.ignition_cycles:
            terms[token.TERM_IGNITION_CYCLES] = right.validity.ignition_cycles
        if right is not None and right.validity.operating_s:
            terms[token.TERM_OPERATING_S] = right.validity.operating_s
        return token.sign(
            self._keys.token,
            vin=vin,
            uid=uid,
            feature_number=feature_number,
            counter=counter,
            state=token.DENIED if right is None else token.ALLOWED,
            terms=terms,
        )

    def _end(self, tx: Transaction, vin: str, row: EntitlementRow, reason: str, now_ms: int) -> None:
        """Ends a right and burns what was signed for it, whatever the catalogue says by now."""
        tx.end_entitlement(row.entitlement_id, now_ms, reason)
        ecus = {ecu.identifier: ecu for ecu in tx.ecus(vin)}
        for signed in tx.tokens(vin):
            if signed.feature_id == row.feature_id:
                number = token.feature_number(signed.content)
                self._put_token(tx, vin, ecus[signed.ecu_identifier], row.feature_id, number, None)

    def _renew_tokens(self, tx: Transaction, vin: str, ecus: Sequence[Ecu]) -> None:
        """Starts the ECU's own limits of live rights anew.

        Of what is sold by use only if the ECU has signed what it counted under
        the present token: nothing else holds an owner who has root.
        """
        read = {row.feature_id: row.token_counter for row in tx.readings(vin) if row.is_verified}
        signed = {row.feature_id: row.counter for row in tx.tokens(vin)}
        for row in tx.entitlements(vin):
            right = entitlement_pb2.Entitlement.FromString(row.content)
            is_read = read.get(row.feature_id, 0) >= signed.get(row.feature_id, 0)
            if right.plan_kind in _SOLD_BY_USE and not is_read:
                continue
            if not row.revoked_ms and (right.validity.ignition_cycles or right.validity.operating_s):
                self._sign_token(tx, vin, ecus, self._chosen(row, ecus), right)

    def _fitting(self, row: EntitlementRow, ecus: Sequence[Ecu]) -> list[Release]:
        """The releases that a right accepts and the vehicle's ECU fits, oldest first."""
        right = entitlement_pb2.Entitlement.FromString(row.content)
        releases = self._catalogue.releases.get(row.feature_id, ())
        return [r for r in releases if r.release >= right.min_release and _fits(r, ecus)]

    def _chosen(self, row: EntitlementRow, ecus: Sequence[Ecu]) -> Release:
        """The highest release that a right accepts and the vehicle's ECU fits."""
        fitting = self._fitting(row, ecus)
        if not fitting:
            right = entitlement_pb2.Entitlement.FromString(row.content)
            raise NotPossibleError(
                f"right {row.entitlement_id} needs {row.feature_id} from release {right.min_release}; "
                "the catalogue has none that fits this vehicle any more"
            )
        return fitting[-1]

    def _releases(self, tx: Transaction, vin: str) -> list[Release]:
        """The release of every feature that this vehicle has or had a right to, by path.

        An ended right whose feature has left the catalogue has none.
        """
        ecus = tx.ecus(vin)
        ended_first = sorted(tx.entitlements(vin), key=lambda row: not row.revoked_ms)
        newest = {row.feature_id: row for row in ended_first}
        chosen = [
            self._chosen(row, ecus)
            for row in newest.values()
            if not row.revoked_ms or self._fitting(row, ecus)
        ]
        return sorted(chosen, key=lambda r: r.path)

    def _publish(self, tx: Transaction, vin: str, now_ms: int, *, above: int = 0) -> int:
        """Signs the next version of a vehicle's set, higher than `above` too; returns the version."""
        previous = tx.vehicle_set(vin)
        version = max(0 if previous is None else previous.version, above) + 1
        live = [row for row in tx.entitlements(vin) if not row.revoked_ms]
        rights = [entitlement_pb2.Entitlement.FromString(row.content) for row in live]
        listed = director.entitlements(vin, version, known_vehicle(tx, vin).owner_epoch, rights)
        releases = self._releases(tx, vin)
        known = {r.feature_id for r in releases}
        features = [
            director.Item(r.path, r.content, r.ecu_identifier, r.hardware_id, r.release) for r in releases
        ]
        tokens = [
            director.Item(
                director.token_path(t.ecu_identifier, t.feature_id),
                t.content,
                t.ecu_identifier,
                t.hardware_id,
                t.counter,
            )
            for t in tx.tokens(vin)
            if t.feature_id in known  # a vehicle takes no token without its feature's file
        ]
        result = director.sign_set(
            vin,
            version,
            [listed, *self._keys.shared, *features, *tokens],
            targets_key=self._keys.director_targets,
            snapshot_key=self._keys.director.snapshot,
            now_ms=now_ms,
        )
        row = SetRow(version, listed.content, result.targets, result.snapshot, result.expires_ms, 0)
        if previous is not None:
            row = replace(row, timestamp_version=previous.timestamp_version)
        tx.put_vehicle_set(vin, row)
        return version


def known_vehicle(tx: Transaction, vin: str) -> VehicleRow:
    """The registered vehicle, locked until the transaction ends.

    Raises:
        NotFoundError: it is not registered.
    """
    vehicle = tx.lock_vehicle(vin)
    if vehicle is None:
        raise NotFoundError(f"vehicle {vin} is not registered; first: fod-cloud vehicle add {vin}")
    return vehicle


def _count(tx: Transaction, kind: str, limit: int, now_ms: int) -> None:
    """Counts what an operator has signed for the fleet, in hours of Unix time.

    Raises:
        SignerLimitError: it is more than the limit; the transaction must not be stored.
    """
    count = tx.count_signing(kind, now_ms // HOUR_MS)
    if count > limit:
        raise SignerLimitError(kind, limit)
    if count == -(-limit * SIGNER_ALARM_PERCENT // 100):
        tx.audit("cloud", "signer-limit-near", "", now_ms, alarm=True, kind=kind, count=count, limit=limit)


def live_traces(tx: Transaction, vin: str) -> list[str]:
    """Trace-ids of the grants of a vehicle's live rights."""
    live = [row.content for row in tx.entitlements(vin) if not row.revoked_ms]
    return [entitlement_pb2.Entitlement.FromString(content).trace_id for content in live]


def _fits(release: Release, ecus: Sequence[Ecu]) -> bool:
    if release.ecu_identifier == HEAD_UNIT:
        return True
    return any(e.identifier == release.ecu_identifier and e.hardware_id == release.hardware_id for e in ecus)


def _check_reading_key(tx: Transaction, uid: bytes, key: bytes) -> None:
    """An ECU has one key for its life: another one would let somebody else speak for it."""
    known = tx.reading_key(uid)
    if key and known is not None and known != key:
        raise ExistsError(f"ECU uid {uid.hex()} is registered with another reading key; it was not changed")


def _check_quota(vin: str, swaps: Sequence[int], per_year: int) -> None:
    """Refuses a swap beyond the quota.

    Args:
        swaps: when ECUs of the vehicle were swapped within the last YEAR_MS, oldest first.
    """
    if len(swaps) < per_year:
        return
    again = "this cloud allows none"
    if per_year:
        moment = datetime.fromtimestamp((swaps[-per_year] + YEAR_MS) // 1000, UTC)
        again = f"possible again from {moment:%Y-%m-%d %H:%M:%SZ}"
    raise NotPossibleError(
        f"{len(swaps)} ECUs of vehicle {vin} were swapped within 365 days, the limit is {per_year}; {again}"
    )


def _end_s(right: entitlement_pb2.Entitlement, anchor_ms: int, now_ms: int) -> int:
    """End of the period in which `now_ms` lies, Unix seconds."""
    period = Period.parse(right.display_terms.period)
    assert period is not None
    # Rounded up: a period that ends before its last millisecond would begin anew until that has passed.
    return -(-period.start_ms(anchor_ms, period.index_at(anchor_ms, now_ms) + 1) // 1000)


def _period_start_ms(right: entitlement_pb2.Entitlement, anchor_ms: int, moment_ms: int) -> int:
    """Start of the period in which an instant lies, Unix milliseconds."""
    period = Period.parse(right.display_terms.period)
    assert period is not None
    return period.start_ms(anchor_ms, period.index_at(anchor_ms, moment_ms))


def _set_period_starts(right: entitlement_pb2.Entitlement, anchor_ms: int, now_ms: int) -> None:
    """Names the periods that quotas are for: the present one, and those up to the right's end."""
    period = Period.parse(right.display_terms.period)
    if period is None or not _renews(right):
        return
    first = period.index_at(anchor_ms, now_ms)
    ahead = (-(-period.start_ms(anchor_ms, first + n) // 1000) for n in range(MAX_PERIOD_STARTS))
    starts = [start for n, start in enumerate(ahead) if n == 0 or start < right.validity.not_after_s]
    for quota in right.quotas:
        del quota.period_starts_s[:]
        quota.period_starts_s.extend(starts)


def _renews(right: entitlement_pb2.Entitlement) -> bool:
    return right.plan_kind == _SUBSCRIPTION and right.display_terms.renews


def _display(plan: Plan) -> entitlement_pb2.DisplayTerms:
    return entitlement_pb2.DisplayTerms(
        price_minor=plan.price_minor,
        currency=plan.currency,
        period=plan.period,
        renews=plan.renews,
        entry_minor=plan.entry_minor,
        use_prices=[
            entitlement_pb2.UsePrice(
                meter_id=p.meter,
                price_minor=p.price_minor,
                per_units=p.per_units,
                dimension=p.dimension,
                value=p.value,
                included_units=p.included_units,
                tiers=[
                    entitlement_pb2.PriceTier(
                        above_units=t.above_units, price_minor=t.price_minor, per_units=t.per_units
                    )
                    for t in p.tiers
                ],
            )
            for p in plan.use_prices
        ],
    )


def _quotas(plan: Plan) -> list[entitlement_pb2.Quota]:
    return [
        entitlement_pb2.Quota(meter_id=q.meter, limit=q.limit, hard=q.hard, warn_percent=q.warn_percent)
        for q in plan.quotas
    ]


def _live_right(tx: Transaction, vin: str, entitlement_id: str) -> EntitlementRow:
    row = next((r for r in tx.entitlements(vin) if r.entitlement_id == entitlement_id), None)
    if row is None:
        raise NotFoundError(f"vehicle {vin} has no right {entitlement_id}")
    if row.revoked_ms:
        raise NotPossibleError(f"right {entitlement_id} has ended before: {row.revoke_reason}")
    return row


def _paid_entry(row: EntitlementRow, account: str, feature_id: str) -> bool:
    """Whether a right of the past has cost this account its entry to a feature."""
    if (row.account, row.feature_id) != (account, feature_id) or row.granted_ms > row.anchor_ms:
        return False
    return entitlement_pb2.Entitlement.FromString(row.content).display_terms.entry_minor > 0


def _take_terms(
    right: entitlement_pb2.Entitlement, terms: entitlement_pb2.Entitlement, anchor_ms: int, now_ms: int
) -> None:
    """Puts the terms that count by now into a right whose plan was changed; bought units stay."""
    if (terms.plan_id, terms.plan_version) == (right.plan_id, right.plan_version):
        return
    failed = right.display_terms.payment_failed
    right.plan_id, right.plan_version = terms.plan_id, terms.plan_version
    right.display_terms.CopyFrom(terms.display_terms)
    right.display_terms.payment_failed = failed
    right.offline_grace_s = 0 if failed else terms.offline_grace_s
    right.validity.ignition_cycles = terms.validity.ignition_cycles
    right.validity.operating_s = terms.validity.operating_s
    if not right.validity.ByteSize():
        right.ClearField("validity")
    if right.plan_kind != _PREPAID:
        del right.quotas[:]
        right.quotas.extend(terms.quotas)
        _set_period_starts(right, anchor_ms, now_ms)


def _terms_rows(tx: Transaction, row: EntitlementRow) -> list[TermsRow]:
    """Terms of a right whose plan was changed, oldest first; empty if it never was."""
    return tx.terms([row.entitlement_id]).get(row.entitlement_id, [])


def _terms_at(row: EntitlementRow, terms: Sequence[TermsRow], now_ms: int) -> entitlement_pb2.Entitlement:
    """The terms that count at an instant."""
    begun = [found for found in terms if found.from_ms <= now_ms]
    return entitlement_pb2.Entitlement.FromString(begun[-1].content if begun else row.content)


def _with_content(
    row: EntitlementRow, right: entitlement_pb2.Entitlement, terms: Sequence[TermsRow] = ()
) -> EntitlementRow:
    """The row with this content, and with the time at which it has to be looked at again."""
    end_ms = right.validity.not_after_s * 1000
    due_ms = NEVER_MS
    if end_ms and _renews(right) and not row.payment_failed_ms:
        due_ms = end_ms - RENEW_AHEAD_MS
    elif end_ms:
        due_ms = end_ms + right.offline_grace_s * 1000
    if terms:
        newest = entitlement_pb2.Entitlement.FromString(terms[-1].content)
        if (newest.plan_id, newest.plan_version) != (right.plan_id, right.plan_version):
            due_ms = min(due_ms, terms[-1].from_ms)
    return replace(row, content=right.SerializeToString(deterministic=True), due_ms=due_ms)


def _of_other(row: TermsRow, right: entitlement_pb2.Entitlement) -> TermsRow:
    """Terms as those of the right that goes on in its place."""
    terms = entitlement_pb2.Entitlement.FromString(row.content)
    terms.entitlement_id, terms.account = right.entitlement_id, right.account
    terms.trace_id = right.trace_id
    return TermsRow(right.entitlement_id, row.from_ms, terms.SerializeToString(deterministic=True))


def _ms(duration: timedelta) -> int:
    return duration // timedelta(milliseconds=1)
