"""What the cloud signs of a plan is what a vehicle takes and keeps."""

from __future__ import annotations

import asyncio
from pathlib import Path

from support.cloud_world import DEMO, START_MS, VIN, World, open_world, verify_with_tuf, write_config

from agent.model import PlanKind
from agent.wire import entitlements_from_bytes
from cloud import plans
from common import config

PLANS = config.read(DEMO / "plans.toml", plans._PlanFile).plans


def test_every_plan_of_the_demonstration_is_taken_by_a_vehicle(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        for plan in PLANS:
            granted = (await world.grant(plan.id)).entitlement
            seen = verify_with_tuf(await world.connect(device).hello(), world.now_ms[0])
            content = seen.rights.SerializeToString(deterministic=True)
            _, _, (right,) = entitlements_from_bytes(content, VIN)
            assert right.entitlement_id == granted.entitlement_id
            assert right.plan_kind is PlanKind[plan.kind.name]
            assert [(q.meter_id, q.limit, q.hard, q.warn_percent) for q in right.quotas] == [
                (q.meter, q.limit, q.hard, q.warn_percent) for q in plan.quotas
            ]
            starts = (START_MS // 1000,) if plan.renews else ()
            assert all(q.period_starts_s == starts for q in right.quotas)
            assert right.display["entry_minor"] == plan.entry_minor
            assert right.display["use_prices"] == tuple(
                {
                    "meter_id": p.meter,
                    "price_minor": p.price_minor,
                    "per_units": p.per_units,
                    "dimension": p.dimension,
                    "value": p.value,
                    "included_units": p.included_units,
                    "tiers": tuple((t.above_units, t.price_minor, t.per_units) for t in p.tiers),
                }
                for p in plan.use_prices
            )
            await world.revoke(granted.entitlement_id)

    async def run() -> None:
        async with open_world(write_config(tmp_path)) as world:
            await asyncio.wait_for(story(world), 30)

    asyncio.run(run())
    assert {"logbook-monthly", "logbook-prepaid"} <= {plan.id for plan in PLANS}
