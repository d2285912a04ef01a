"""Registers vehicles, grants and ends rights, and keeps each vehicle's signed set.

Every function works inside one transaction of the store: counters and
versions are stored together with what was signed under them, and before any
of it leaves. Reads no clock and no randomness of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from cloud import catalogue as catalogue_module
from cloud import director, token
from cloud.catalogue import Catalogue, Fresh
from cloud.errors import ExistsError, NotFoundError, NotPossibleError, StartError
from cloud.keyring import Keyring
from cloud.model import HEAD_UNIT, Ecu, Release, Versions
from cloud.plans import Period, Plan, PlanKind, Resale
from cloud.store import EntitlementRow, SetRow, TokenRow, Transaction, VehicleRow
from common import log
from openfod.entitlement.v1 import entitlement_pb2
from openfod.vehicle.v1 import vehicle_service_pb2

MAX_RIGHTS = 256
"""Most rights that one vehicle may have at a time."""
RENEW_AHEAD_MS = 3 * 86_400_000
"""How long before its end a renewing right gets its next period."""

_KINDS = {kind: entitlement_pb2.PlanKind.Value(f"PLAN_KIND_{kind.name}") for kind in PlanKind}
_RESALES = {resale: entitlement_pb2.Resale.Value(f"RESALE_{resale.name}") for resale in Resale}
_SUBSCRIPTION = _KINDS[PlanKind.SUBSCRIPTION]

_log = log.get(__name__)


@dataclass(frozen=True)
class Granted:
    """A new right and the version of the set that carries it."""

    right: entitlement_pb2.Entitlement
    version: int


class Rights:
    """The rules by which rights come, go on and end.

    Args:
        keys: online keys.
        catalogue: the signed catalogue.
        plans: the price list, by plan id.
        random: returns that many unpredictable bytes.
    """

    def __init__(
        self,
        keys: Keyring,
        catalogue: Catalogue,
        plans: Mapping[str, Plan],
        random: Callable[[int], bytes],
    ) -> None:
        self._keys, self._catalogue, self._plans, self._random = keys, catalogue, plans, random

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
        source = f"veh-{self._random(8).hex()}"
        tx.add_vehicle(vin, source, ecus, now_ms)
        self._publish(tx, vin, now_ms)
        return VehicleRow(vin, source, 0, b"")

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
        known_vehicle(tx, vin)
        self.refresh(tx, vin, now_ms)  # a right that has run out blocks no new one
        plan = self._plans.get(plan_id)
        if plan is None:
            raise NotFoundError(
                f"plan {plan_id} is not in the price list; it has {', '.join(sorted(self._plans))}"
            )
        rows = tx.entitlements(vin)
        live = [row for row in rows if not row.revoked_ms]
        for row in live:
            if row.feature_id == plan.feature:
                raise NotPossibleError(
                    f"vehicle {vin} has {row.entitlement_id} for {plan.feature} already; revoke it first"
                )
        if len(live) >= MAX_RIGHTS:
            raise NotPossibleError(f"vehicle {vin} has {len(live)} rights, the limit is {MAX_RIGHTS}")
        kind = _KINDS[plan.kind]
        if plan.kind is PlanKind.TRIAL and tx.trials(account, plan.feature, kind):
            raise NotPossibleError(f"account {account} has had its trial of {plan.feature}")
        ecus = tx.ecus(vin)
        release = self._newest(vin, plan.feature, ecus)
        right = self._right(plan, account, release, trace_id or self._random(16).hex(), now_ms)
        tx.add_entitlement(
            EntitlementRow(
                right.entitlement_id,
                vin,
                plan.feature,
                account,
                kind,
                right.SerializeToString(deterministic=True),
                now_ms,
                0,
                "",
            )
        )
        self._sign_token(tx, vin, ecus, release, right)
        return Granted(right, self._publish(tx, vin, now_ms))

    def revoke(self, tx: Transaction, vin: str, entitlement_id: str, reason: str, now_ms: int) -> int:
        """Ends a right, burns its token and returns the version of the set without it.

        Raises:
            NotFoundError: no such vehicle, or it has no such right.
            NotPossibleError: the right has ended before.
        """
        known_vehicle(tx, vin)
        row = next((r for r in tx.entitlements(vin) if r.entitlement_id == entitlement_id), None)
        if row is None:
            raise NotFoundError(f"vehicle {vin} has no right {entitlement_id}")
        if row.revoked_ms:
            raise NotPossibleError(f"right {entitlement_id} has ended before: {row.revoke_reason}")
        self._end(tx, vin, row, reason, now_ms)
        return self._publish(tx, vin, now_ms)

    def refresh(self, tx: Transaction, vin: str, now_ms: int) -> bool:
        """Starts the next periods, ends what has run out and renews signatures, where due.

        Tokens with a limit of the ECU's own are signed anew with the set, so
        that a vehicle that is seen now and then never runs into their limit.

        Returns:
            True if a new set was signed.
        """
        signed = tx.vehicle_set(vin)
        changed = signed is None or signed.expires_ms - now_ms < _ms(director.SET_RENEW_BELOW)
        ecus = tx.ecus(vin)
        for row in tx.entitlements(vin):
            if row.revoked_ms:
                continue
            right = entitlement_pb2.Entitlement.FromString(row.content)
            end_ms = right.validity.not_after_s * 1000
            renews = right.plan_kind == _SUBSCRIPTION and right.display_terms.renews
            if end_ms and renews and now_ms >= end_ms - RENEW_AHEAD_MS:
                right.validity.not_after_s = _end_s(right, row.granted_ms, now_ms + RENEW_AHEAD_MS)
                tx.set_entitlement(row.entitlement_id, right.SerializeToString(deterministic=True))
                changed = True
            elif end_ms and not renews and now_ms >= end_ms + right.offline_grace_s * 1000:
                self._end(tx, vin, row, "its period is over", now_ms)
                changed = True
        if changed:
            self._renew_tokens(tx, vin, ecus)
            self._publish(tx, vin, now_ms)
        return changed

    # --- what a vehicle is sent -------------------------------------------

    def update(
        self,
        tx: Transaction,
        vin: str,
        nonce: bytes,
        has_director: Versions,
        has_catalogue: Versions,
        now_ms: int,
    ) -> vehicle_service_pb2.TrustUpdate:
        """Answers a nonce with the signed time and with whatever is newer than the vehicle has.

        Args:
            nonce: 16 bytes that nothing has answered yet.
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
        if row.version > has_director.snapshot:
            update.director.snapshot = row.snapshot
        if row.version > has_director.targets:
            update.director.targets = row.targets
            self._add_targets(tx, vin, row, update)
        self._add_catalogue(tx, has_catalogue, update, now_ms)
        if row.version < has_director.targets:
            _log.error(
                "the vehicle has a newer set than this database: was it restored from a backup?",
                vin=vin,
                vehicle_version=has_director.targets,
                database_version=row.version,
            )
        return update

    def _add_targets(
        self, tx: Transaction, vin: str, row: SetRow, update: vehicle_service_pb2.TrustUpdate
    ) -> None:
        # What the signed set lists, not what is newest now: the catalogue may have grown since.
        listed = json.loads(row.targets)["signed"]["targets"]
        update.director_targets.add(path=director.ENTITLEMENTS_PATH, content=row.entitlements)
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
        if fresh.timestamp_version > has.timestamp:
            update.catalogue.timestamp = fresh.timestamp
        if fresh.snapshot_version > has.snapshot:
            update.catalogue.snapshot = fresh.snapshot
        if self._catalogue.targets_version > has.targets:
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
                tx.add_plan_terms(plan.id, plan.version, plan.terms_sha256)
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
        if previous is not None and not catalogue_module.needs_fresh(self._catalogue, previous, now_ms):
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
            display_terms=entitlement_pb2.DisplayTerms(
                price_minor=plan.price_minor,
                currency=plan.currency,
                period=plan.period,
                renews=plan.renews,
                use_prices=[
                    entitlement_pb2.UsePrice(
                        meter_id=p.meter, price_minor=p.price_minor, per_units=p.per_units
                    )
                    for p in plan.use_prices
                ],
            ),
            trace_id=trace_id,
        )
        limits = entitlement_pb2.Validity(ignition_cycles=plan.ignition_cycles, operating_s=plan.operating_s)
        if plan.period:
            limits.not_after_s = _end_s(right, now_ms, now_ms)
        if limits.ByteSize():
            right.validity.CopyFrom(limits)
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
        terms = {}
        if right is not None and right.validity.ignition_cycles:
            terms[token.TERM_IGNITION_CYCLES] = right.validity.ignition_cycles
        if right is not None and right.validity.operating_s:
            terms[token.TERM_OPERATING_S] = right.validity.operating_s
        content = token.sign(
            self._keys.token,
            vin=vin,
            uid=ecu.uid,
            feature_number=feature_number,
            counter=counter,
            state=token.DENIED if right is None else token.ALLOWED,
            terms=terms,
        )
        tx.put_token(vin, TokenRow(ecu.identifier, feature_id, ecu.hardware_id, counter, content))

    def _end(self, tx: Transaction, vin: str, row: EntitlementRow, reason: str, now_ms: int) -> None:
        """Ends a right and burns what was signed for it, whatever the catalogue says by now."""
        tx.end_entitlement(row.entitlement_id, now_ms, reason)
        ecus = {ecu.identifier: ecu for ecu in tx.ecus(vin)}
        for signed in tx.tokens(vin):
            if signed.feature_id == row.feature_id:
                number = token.feature_number(signed.content)
                self._put_token(tx, vin, ecus[signed.ecu_identifier], row.feature_id, number, None)

    def _renew_tokens(self, tx: Transaction, vin: str, ecus: Sequence[Ecu]) -> None:
        """Starts the ECU's own limits of all live rights anew."""
        for row in tx.entitlements(vin):
            right = entitlement_pb2.Entitlement.FromString(row.content)
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
        newest = {row.feature_id: row for row in tx.entitlements(vin)}
        chosen = [
            self._chosen(row, ecus)
            for row in newest.values()
            if not row.revoked_ms or self._fitting(row, ecus)
        ]
        return sorted(chosen, key=lambda r: r.path)

    def _publish(self, tx: Transaction, vin: str, now_ms: int) -> int:
        """Signs the next version of a vehicle's set; returns the version."""
        previous = tx.vehicle_set(vin)
        version = 1 if previous is None else previous.version + 1
        live = [row for row in tx.entitlements(vin) if not row.revoked_ms]
        rights = [entitlement_pb2.Entitlement.FromString(row.content) for row in live]
        listed = director.entitlements(vin, version, rights)
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
            [listed, *features, *tokens],
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


def live_traces(tx: Transaction, vin: str) -> list[str]:
    """Trace-ids of the grants of a vehicle's live rights."""
    live = [row.content for row in tx.entitlements(vin) if not row.revoked_ms]
    return [entitlement_pb2.Entitlement.FromString(content).trace_id for content in live]


def _fits(release: Release, ecus: Sequence[Ecu]) -> bool:
    if release.ecu_identifier == HEAD_UNIT:
        return True
    return any(e.identifier == release.ecu_identifier and e.hardware_id == release.hardware_id for e in ecus)


def _end_s(right: entitlement_pb2.Entitlement, granted_ms: int, now_ms: int) -> int:
    """End of the period in which `now_ms` lies, Unix seconds."""
    period = Period.parse(right.display_terms.period)
    assert period is not None
    index = 1
    while period.start_ms(granted_ms, index) <= now_ms:
        index += 1
    # Rounded up: a period that ends before its last millisecond would begin anew until that has passed.
    return -(-period.start_ms(granted_ms, index) // 1000)


def _ms(duration: timedelta) -> int:
    return duration // timedelta(milliseconds=1)
