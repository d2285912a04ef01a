"""A life with the real verifier: every answer of the cloud is signed TUF metadata, every token COSE."""

from __future__ import annotations

from support import trust_repo
from support.engine_world import FEATURE
from support.lifetime.disk import State
from support.lifetime.office import Office, Tables
from support.lifetime.world import World

from agent import events as ev
from agent.errors import ReplayError, TrustError
from agent.model import Entitlement, PlanKind, TrustBytes, Verdict
from agent.trust.verifier import Floors, floors_after, verify_stored, verify_update
from openfod.entitlement.v1 import entitlement_pb2

_RENEW_MS = 12 * 3_600_000
"""Age at which the cloud signs both repositories anew; their shortest expiry is a day."""
_KINDS = {
    PlanKind.PERPETUAL: entitlement_pb2.PLAN_KIND_PERPETUAL,
    PlanKind.SUBSCRIPTION: entitlement_pb2.PLAN_KIND_SUBSCRIPTION,
}


class _SignedOffice(Office):
    """Signs what it publishes."""

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        self.repositories = trust_repo.Cloud()
        self.signed_ms = trust_repo.NOW_MS

    def at(self, now_ms: int) -> None:
        """Lets time pass; metadata that would expire is signed anew."""
        self.repositories.at(now_ms)
        if now_ms - self.signed_ms > _RENEW_MS:
            self.signed_ms = now_ms
            self.repositories.publish_catalogue()
            self.publish_again(0, 0)

    def _publish(self, right: Entitlement | None) -> None:
        super()._publish(right)
        cloud, held = self.repositories, self.rights
        cloud.rights = {FEATURE: _message(right)} if right else {}
        if right is not None or cloud.releases:
            cloud.releases[FEATURE] = 1
            cloud.counters[FEATURE] = held.counter
            cloud.tokens[FEATURE] = trust_repo.make_token(
                cloud.token_key,
                counter=held.counter,
                state=int(right is not None),
                terms={5: 200} if right else None,
            )
        cloud.owner_epoch = held.owner_epoch
        cloud.publish(held.version)


class VerifiedWorld(World):
    """A world in which nothing is taken for granted that is signed."""

    office_class = _SignedOffice
    office: _SignedOffice

    def _send_update(self, nonce: bytes) -> None:
        self.office.nonce = None
        self.office.at(self.utc_ms)
        update = self.office.repositories.answer(nonce)
        self._to_vehicle(lambda: self._tell(ev.UpdateArrived(update)))

    def _stored_verdict(self, state: State) -> Verdict | None:
        if state.verdict is None:
            self._trusted, self._floors = self.office.repositories.provisioned(), Floors()
            return None
        self._trusted, self._floors = state.verdict.state, floors_after(state.verdict, Floors())
        return verify_stored(
            self._trusted, vin=trust_repo.VIN, as_of_ms=state.verdict.signed_ms, floors=self._floors
        )

    def _verify(self, command: ev.Verify) -> None:
        refusal: TrustError = ReplayError("no nonce is waiting")
        for nonce in command.nonces:
            try:
                verdict = self._verified(command.update, nonce, command.now_ms)
            except TrustError as error:
                refusal = error
                if not isinstance(error, ReplayError):
                    break
            else:
                self._trusted, self._floors = verdict.state, floors_after(verdict, self._floors)
                self._tell(ev.UpdateVerified(verdict, nonce, self._now_ns))
                return
        self.happened[f"refused: {refusal.kind}"] += 1
        self._tell(ev.UpdateRefused(refusal.kind, str(refusal)))

    def _verified(self, update: TrustBytes, nonce: bytes, now_ms: int) -> Verdict:
        return verify_update(
            self._trusted, update, vin=trust_repo.VIN, nonce=nonce, now_ms=now_ms, floors=self._floors
        )


def _message(right: Entitlement) -> entitlement_pb2.Entitlement:
    return trust_repo.make_right(
        FEATURE,
        entitlement_id=right.entitlement_id,
        account=right.account,
        plan_kind=_KINDS[right.plan_kind],
        plan_id=right.plan_id,
        validity=entitlement_pb2.Validity(
            not_after_s=right.not_after_s, ignition_cycles=right.ignition_cycles
        ),
        offline_grace_s=right.offline_grace_s,
        quotas=[
            entitlement_pb2.Quota(meter_id=quota.meter_id, limit=quota.limit, hard=quota.hard)
            for quota in right.quotas
        ],
        trace_id=right.trace_id,
    )
