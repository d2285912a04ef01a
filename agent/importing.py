"""Rights as a file, for a workshop without network: read, verify, keep, and say what changed.

The file is a serialised `openfod.vehicle.v1.TrustUpdate`. It is judged as an
update of the stream is, but for the nonce (`agent.trust.verifier.verify_bundle`).
"""

from __future__ import annotations

from dataclasses import asdict

from google.protobuf.message import DecodeError

from agent.adapters.clock import SystemClock, SystemRandom
from agent.adapters.store import Store
from agent.boot import BUILD_MS, STORE_FILE, Keeper, floors_file, read
from agent.config import AgentConfig
from agent.errors import MalformedError
from agent.events import StoreTrust
from agent.metering.ledger import check_conditions
from agent.model import Rights, TrustBytes, Verdict
from agent.trust.clock import TrustedClock
from agent.trust.grant_log import follow
from agent.trust.verifier import Floors, verify_bundle
from agent.wire import bounded, trust_update_from_proto
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

MAX_BUNDLE_BYTES = 4_194_304
"""Largest file of rights that is read; as large as a message of the stream may be."""


def verify(content: bytes, trusted: TrustBytes, *, vin: str, now_ms: int, floors: Floors) -> Verdict:
    """Verifies a file of rights; arguments as of `verify_bundle`.

    Raises:
        TrustError: it is not to be trusted; says why.
        ConditionError: the catalogue holds a condition that this agent cannot compile.
    """
    bounded("file of rights, bytes", limit=MAX_BUNDLE_BYTES, found=len(content))
    try:
        message = pb.TrustUpdate.FromString(content)
    except DecodeError as error:
        raise MalformedError(f"file of rights: not a TrustUpdate message: {error}") from error
    bundle = trust_update_from_proto(message)
    verdict = verify_bundle(trusted, bundle, vin=vin, now_ms=now_ms, floors=floors)
    for feature in verdict.rights.features.values():
        check_conditions(feature)
    return verdict


def changes(before: Rights, verdict: Verdict) -> dict[str, object]:
    """What a file of rights changed, as plain values."""
    old = {right.entitlement_id: right for right in before.entitlements.values()}
    new = {right.entitlement_id: right for right in verdict.rights.entitlements.values()}

    def listed(ids: set[str]) -> list[dict[str, str]]:
        features = {**old, **new}
        return [{"entitlement": i, "feature": features[i].feature_id} for i in sorted(ids)]

    return {
        "taken": True,
        "rights_version_before": before.version,
        "rights_version": verdict.rights.version,
        "gained": listed(new.keys() - old.keys()),
        "ended": listed(old.keys() - new.keys()),
        "changed": listed({i for i in old.keys() & new.keys() if old[i] != new[i]}),
        "director": asdict(verdict.director),
        "catalogue": asdict(verdict.catalogue),
        "signed_ms": verdict.signed_ms,
    }


def import_stored(config: AgentConfig, content: bytes) -> dict[str, object]:
    """Takes a file of rights into the store while no agent runs; returns what changed.

    Raises:
        TrustError: it is not to be trusted; nothing was changed.
        JournalError: the store cannot be used, or an agent holds it.
    """
    clock = SystemClock()
    store = Store(
        config.state.directory / STORE_FILE,
        boot_id=clock.boot_id(),
        journal_id=SystemRandom().token(8).hex(),
    )
    try:
        start = read(config, store)
        now_ns = clock.monotonic_ns()
        keeper = Keeper(store, floors_file(config), start.stored)
        time = TrustedClock(mark_ms=start.stored.mark_ms, build_ms=BUILD_MS, monotonic_ns=now_ns)
        verdict = verify(
            content,
            start.trusted,
            vin=config.vehicle.vin,
            now_ms=keeper.judged_at_ms(time.now(now_ns).unix_ms),
            floors=start.stored.floors,
        )
        now = time.raise_to(verdict.signed_ms, now_ns).now(now_ns)
        before = start.verdict.rights if start.verdict else Rights(version=0)
        entries, new_owner = follow(
            start.stored.log_head, verdict, now, before=before, owner_epoch=start.stored.owner_epoch
        )
        keeper.keep(StoreTrust(0, verdict, now.unix_ms, verdict.signed_ms, False, entries, new_owner))
    finally:
        store.close()
    return changes(before, verdict)
