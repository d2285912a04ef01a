"""What a price list may offer, and what rights, catalogue and plans must keep over restarts."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cbor2
import grpc
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from support.cloud_world import (
    DAY_MS,
    DEMO,
    START_MS,
    VIN,
    World,
    code_of,
    demo_keys,
    open_world,
    play,
    record,
    signed_batch,
    verify_with_tuf,
    write_config,
)
from tuf.api.metadata import Metadata, Root

from cloud import catalogue as cloud_catalogue
from cloud import keyring
from cloud.errors import StartError
from cloud.readings import ReadingRow
from cloud.store import Store
from common.config import ConfigError
from keys import catalogue
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.usage.v1 import usage_pb2

Story = Callable[[World], Awaitable[None]]
DEMO_PLANS = (DEMO / "plans.toml").read_text()


def _plan(plan_id: str, kind: str, extra: str = "", *, price: int = 0) -> str:
    return (
        f'[[plans]]\nid = "{plan_id}"\nversion = 1\nfeature = "drivers-logbook"\nkind = "{kind}"\n'
        f'title = "t"\ncurrency = "EUR"\nprice_minor = {price}\nresale = "goes-with-account"\n{extra}\n'
    )


def _use(meter: str, price: int = 2) -> str:
    return f'[[plans.use_prices]]\nmeter = "{meter}"\nprice_minor = {price}\nper_units = 1000\n'


def _tier(above: int) -> str:
    return f"[[plans.use_prices.tiers]]\nabove_units = {above}\nprice_minor = 1\nper_units = 1000\n"


def _quota(meter: str = "distance", hard: str = "true", more: str = "") -> str:
    return f'[[plans.quotas]]\nmeter = "{meter}"\nlimit = 10000\nhard = {hard}\n{more}\n'


def _config(folder: Path, plans: str) -> Path:
    (folder / "plans.toml").write_text(plans)
    return write_config(folder, **{str(DEMO / "plans.toml"): "plans.toml"})


def _run(path: Path, story: Story | None = None, now_ms: int = START_MS) -> None:
    async def run() -> None:
        async with open_world(path, now_ms) as world:
            if story is not None:
                await asyncio.wait_for(story(world), 30)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (_plan("x-x", "prepaid", price=1000), "a prepaid plan has one, a hard one"),
        (_plan("x-x", "prepaid", _quota(hard="false")), "a prepaid plan has one, a hard one"),
        (_plan("x-x", "prepaid", _use("distance") + _quota()), "prepaid use is paid already"),
        (
            _plan("x-x", "prepaid", _quota()).replace("goes-with-account", "stays-with-vehicle"),
            "units that were bought belong to the account",
        ),
        (_plan("x-x", "prepaid", _quota("speed")), "quotas: speed is no meter of drivers-logbook"),
        (_plan("x-x", "perpetual", _quota()), "what was bought outright has no hard quota"),
        (_plan("x-x", "pay-per-use", _use("time") + _quota(hard="false")), "needs one use price"),
        (_plan("x-x", "pay-per-use", _use("distance") * 2), "priced more than once for the same use"),
        (_plan("x-x", "pay-per-use", _use("distance") + _quota() * 2), "has more than one quota"),
        (
            _plan("x-x", "pay-per-use", _use("distance") + _quota()).replace(
                "goes-with-account", "stays-with-vehicle"
            ),
            "would begin anew at a sale",
        ),
        (
            _plan("x-x", "pay-per-use", _use("time") + 'dimension = "motion"\n'),
            "given together or not at all",
        ),
        (
            _plan("x-x", "pay-per-use", _use("time") + 'dimension = "motion"\nvalue = "flying"\n'),
            "has no motion 'flying'; known: driving, parked",
        ),
        (
            _plan("x-x", "pay-per-use", _use("distance") + "included_units = 9\n" + _tier(9)),
            "above_units: expected more than 9, found 9",
        ),
        (
            _plan("x-x", "pay-per-use", _use("distance") + _tier(9) + _tier(8)),
            "expected more than 9, found 8",
        ),
        (
            _plan("x-x", "pay-per-use", _use("distance") + "".join(_tier(n) for n in range(1, 10))),
            "9 tiers are more than the limit of 8",
        ),
        (_plan("x-x", "pay-per-use", "payment_grace_s = 9\n" + _use("distance")), "can miss a payment"),
        (_plan("x-x", "trial", 'period = "P1M"\nentry_minor = 1'), "a trial costs nothing"),
        (
            _plan("x-x", "pay-per-use", _use("distance") + _quota(more="warn_percent = [80, 50]")),
            "ascending, each once",
        ),
        (
            _plan("x-x", "pay-per-use", _use("distance") + _quota(more="warn_percent = [0]")),
            "expected 1 to 100",
        ),
        (_plan("x-x", "pay-per-use"), "use_prices: missing"),
        (_plan("x-x", "trial", 'period = "P1M"', price=4900), "a trial costs nothing"),
        (_plan("x-x", "trial", 'period = "P1M"\n' + _use("distance")), "a trial costs nothing"),
        (
            _plan("x-x", "pay-per-use", "ignition_cycles = 9\n" + _use("distance")),
            "ignition_cycles: no ECU measures it",
        ),
        (
            _plan("x-x", "pay-per-use", "operating_s = 9\n" + _use("distance")),
            "operating_s: no ECU measures it",
        ),
    ],
)
def test_a_plan_that_gives_use_away_or_promises_what_nobody_measures_is_refused(
    tmp_path: Path, plan: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        _run(_config(tmp_path, plan))


def _with_catalogue(folder: Path, path: Path, edit: Callable[[Path], None], name: str = "signed") -> None:
    """Signs an edited copy of the demonstration's catalogue and makes `path` name it."""
    source = folder / f"{name}-source"
    shutil.copytree(DEMO / "catalogue", source)
    edit(source)
    catalogue.sign_catalogue(
        demo_keys() / "keys", source, folder / name, datetime.fromtimestamp(START_MS / 1000, UTC)
    )
    text = path.read_text()
    path.write_text(text.replace(str(demo_keys() / "catalogue"), str(folder / name)))


def test_a_price_must_fit_what_older_hardware_is_granted(tmp_path: Path) -> None:
    def add(source: Path) -> None:
        text = (source / "features/seat-heating/1.toml").read_text()
        text = text.replace("release = 1  ", "release = 2  ").replace("openfod-seat-1", "openfod-seat-2")
        text = text.replace("[hold]", '[[meters]]\nid = "on-time"\nkind = "duration"\n\n[hold]')
        (source / "features/seat-heating/2.toml").write_text(text)

    path = _config(tmp_path, DEMO_PLANS.replace('meter = "active-time"', 'meter = "on-time"'))
    _with_catalogue(tmp_path, path, add)
    with pytest.raises(ConfigError, match="on-time is no meter of seat-heating release 1"):
        _run(path)


SEAT_BY_USE = """[[plans]]
id = "seat-by-use"
version = 1
feature = "seat-heating"
kind = "pay-per-use"
title = "t"
currency = "EUR"
price_minor = 0
ignition_cycles = 200
resale = "goes-with-account"
use_prices = [{ meter = "METER", price_minor = 3, per_units = 60000 }]
"""
READING = '[reading]\ndid = 0x0F41\ninterval_s = 600\nmeter = "active-time"\n\n[conditions.activate]\n'


def _with_reading(text: str) -> str:
    if "[reading]" in text:
        return text
    return text.replace("[conditions.activate]\n", READING)


def _without_reading(text: str) -> str:
    before, found, after = text.partition("[reading]\n")
    return before + after[after.index("[") :] if found else text


@pytest.mark.parametrize(
    ("edits", "meter", "reason"),
    [
        ((), "active-time", 'the catalogue must say "detect-only"'),
        ((("active-time", READING),), "active-time", 'the catalogue must say "detect-only"'),
        ((("active-time", READING), ("by_use", "")), "heated-distance", "signs no count of heated-distance"),
        ((("active-time", READING), ("by_use", "")), "active-time", ""),
        ((("detect-only", ""),), "heated-distance", ""),
    ],
)
def test_what_is_sold_by_use_is_counted_by_the_ecu_or_admits_that_nobody_counts(
    tmp_path: Path, edits: tuple[tuple[str, str], ...], meter: str, reason: str
) -> None:
    def edit(source: Path) -> None:
        path = source / "features/seat-heating/1.toml"
        text = path.read_text()
        for what, _ in edits:
            if what == "active-time":
                text = _with_reading(text)
            elif what == "by_use":
                text = text.replace("withdrawn = false", "by_use = true\nwithdrawn = false")
            else:
                text = text.replace('enforcement = "ecu-token"', 'enforcement = "detect-only"')
        path.write_text(text)

    path = _config(tmp_path, SEAT_BY_USE.replace("METER", meter))
    _with_catalogue(tmp_path, path, edit)
    if not reason:
        _run(path)
        return
    with pytest.raises(ConfigError, match=reason):
        _run(path)


@pytest.mark.parametrize(
    ("feature", "edits", "reason"),
    [
        (
            "seat-heating",
            [("withdrawn = false", "by_use = true\nwithdrawn = false")],
            "by_use: the ECU signs",
        ),
    ],
)
def test_a_catalogue_that_was_signed_without_the_lint_is_not_served(
    feature: str, edits: list[tuple[str, str]], reason: str
) -> None:
    text = _without_reading((DEMO / f"catalogue/features/{feature}/1.toml").read_text())
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(StartError, match=reason):
        cloud_catalogue._release(f"features/{feature}/1.toml", text.encode())


def test_what_is_sold_by_use_gets_no_new_token_without_a_reading(tmp_path: Path) -> None:
    """The ECU's own limit is all that holds an owner who has root; a visit alone must not lift it."""

    def edit(source: Path) -> None:
        path = source / "features/seat-heating/1.toml"
        text = _with_reading(path.read_text())
        path.write_text(text.replace("withdrawn = false", "by_use = true\nwithdrawn = false"))

    async def story(world: World) -> None:
        device = await world.device()
        await world.grant("seat-by-use")
        (before,) = await world.cloud.store.run(lambda tx: tx.tokens(VIN))
        world.now_ms[0] += 400 * DAY_MS  # the set is signed anew
        await world.connect(device).hello()
        (after,) = await world.cloud.store.run(lambda tx: tx.tokens(VIN))
        assert after == before
        for is_verified, counter, renewed in ((False, 1, 1), (True, 1, 2), (True, 1, 2), (True, 2, 3)):
            row = ReadingRow("seat-heating", is_verified=is_verified, token_counter=counter)
            await world.cloud.store.run(lambda tx, row=row: tx.put_reading(VIN, row))  # type: ignore[misc]
            world.now_ms[0] += 400 * DAY_MS
            await world.connect(device).hello()
            (after,) = await world.cloud.store.run(lambda tx: tx.tokens(VIN))
            assert after.counter == renewed

    path = _config(tmp_path, SEAT_BY_USE.replace("METER", "active-time"))
    _with_catalogue(tmp_path, path, edit)
    _run(path, story)


def test_a_known_version_of_a_plan_keeps_its_terms(tmp_path: Path) -> None:
    path = _config(tmp_path, DEMO_PLANS)
    _run(path)
    plans = tmp_path / "plans.toml"
    plans.write_text(DEMO_PLANS.replace('title = "Heated seat, monthly', 'title = "Warm seat, monthly'))
    _run(path)
    dearer = DEMO_PLANS.replace("price_minor = 499 ", "price_minor = 599 ")
    plans.write_text(dearer)
    with pytest.raises(StartError, match=r"other terms .* seat-heating-monthly version 1; a change is a new"):
        _run(path)
    plans.write_text(dearer.replace("version = 1", "version = 2"))
    _run(path)


def test_a_feature_that_left_the_catalogue_stops_the_start_while_a_right_lives(tmp_path: Path) -> None:
    path = _config(tmp_path, DEMO_PLANS)
    kept: list[Any] = []

    async def grant(world: World) -> None:
        kept.append(await world.device())
        await world.grant()
        kept.append((await world.grant("logbook-per-km")).entitlement)

    _run(path, grant)

    async def end(world: World) -> None:
        world.now_ms[0] += 1
        listed = await world.operator.ListEntitlements(pb.ListEntitlementsRequest(vin=VIN))
        await world.revoke(listed.entitlements[0].entitlement.entitlement_id)

    ended = tmp_path / "ended.toml"
    full = path.read_text()
    _with_catalogue(tmp_path, path, lambda source: shutil.rmtree(source / "features/seat-heating"))
    (tmp_path / "plans.toml").write_text(DEMO_PLANS[DEMO_PLANS.index('[[plans]]\nid = "logbook') :])
    with pytest.raises(StartError, match=r"seat-heating from release 1 \(such as ent-"):
        _run(path)

    ended.write_text(full)
    (tmp_path / "all.toml").write_text(DEMO_PLANS)
    ended.write_text(full.replace('"plans.toml"', '"all.toml"'))
    _run(ended, end)

    async def goes_on(world: World) -> None:
        world.now_ms[0] += 2
        await world.revoke(kept[1].entitlement_id)
        update = await world.connect(kept[0]).hello()
        seen = verify_with_tuf(update, world.now_ms[0])
        assert set(seen.features) == {"features/drivers-logbook/1.toml"}
        assert not seen.tokens

    _run(path, goes_on)


def test_the_end_of_a_right_burns_its_token_whatever_the_catalogue_lists(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        granted = await world.grant()
        (before,) = await world.cloud.store.run(lambda tx: tx.tokens(VIN))
        await world.revoke(granted.entitlement.entitlement_id)
        (after,) = await world.cloud.store.run(lambda tx: tx.tokens(VIN))
        claims = cbor2.loads(cbor2.loads(after.content).value[2])
        assert (claims[2], claims[3], claims[4]) == (1, before.counter + 1, 0)

    play(tmp_path, story)


def test_a_right_that_has_run_out_does_not_block_a_purchase(tmp_path: Path) -> None:
    plans = _plan("try-it", "trial", 'period = "P30D"') + _plan("buy-it", "perpetual", price=100)

    async def story(world: World) -> None:
        await world.device()
        await world.grant("try-it")
        world.now_ms[0] += 60 * DAY_MS
        bought = await world.grant("buy-it")
        listed = await world.operator.ListEntitlements(pb.ListEntitlementsRequest(vin=VIN))
        live = [e.entitlement.entitlement_id for e in listed.entitlements if not e.revoked_ms]
        assert live == [bought.entitlement.entitlement_id]
        code, words = await code_of(world.grant("try-it"))
        assert code is grpc.StatusCode.FAILED_PRECONDITION, words

    _run(_config(tmp_path, plans), story)


def test_a_right_granted_between_two_seconds_is_renewed_once(tmp_path: Path) -> None:
    plans = _plan("a-month", "subscription", 'period = "P1M"\nrenews = true', price=499)

    async def story(world: World) -> None:
        device = await world.device()
        granted = (await world.grant("a-month")).entitlement
        world.now_ms[0] = granted.validity.not_after_s * 1000 - 3 * DAY_MS
        versions = set()
        for _ in range(3):
            await world.connect(device).hello()
            listed = await world.operator.ListEntitlements(pb.ListEntitlementsRequest(vin=VIN))
            versions.add((listed.version, listed.entitlements[0].entitlement.validity.not_after_s))
            world.now_ms[0] += 100
        assert len(versions) == 1
        assert versions.pop()[1] > granted.validity.not_after_s

    _run(_config(tmp_path, plans), story, START_MS + 999)


def test_an_invoice_shows_use_without_a_price_and_refuses_what_it_cannot_carry(tmp_path: Path) -> None:
    plans = _plan(
        "dear", "pay-per-use", _use("distance", 10**12).replace("per_units = 1000", "per_units = 1")
    )

    async def story(world: World) -> None:
        device = await world.device()
        right = (await world.grant("dear")).entitlement.entitlement_id
        stream = world.connect(device)
        await stream.hello()
        previous = bytes(32)
        for seq, (meter, value) in enumerate(
            (("time", 5), ("distance", 9_000_000), ("distance", 9_000_000)), 1
        ):
            is_time = meter == "time"
            content = record(
                device.source,
                seq,
                previous,
                feature_id="drivers-logbook",
                meter_id=meter,
                unit=usage_pb2.UNIT_MILLISECOND if is_time else usage_pb2.UNIT_METRE,
                value=value,
                entitlement_id=right,
                dimensions=[usage_pb2.Dimension(name="seq", value=str(seq))],
            )
            answer = await stream.upload(signed_batch(device.key, device.source, [content]))
            assert answer.WhichOneof("payload") == "receipt", answer
            previous = hashlib.sha256(content).digest()
            if is_time:
                preview = await world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(vin=VIN))
                (line,) = preview.invoices[0].lines
                assert (line.quantity, line.amount_minor) == (5, 0)
                assert line.description == "Driver's logbook: time (seq 1), no price agreed"
        call = world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(vin=VIN))
        code, words = await code_of(call)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "the total of an invoice is beyond" in words

    _run(_config(tmp_path, plans), story)


def test_a_request_id_is_the_same_in_capitals(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        request_id = str(uuid.uuid4())
        first = await world.grant(request_id=request_id)
        assert await world.grant(request_id=request_id.upper()) == first

    play(tmp_path, story)


@pytest.mark.parametrize(
    "url", ["postgresql://u:secret@h/db", "nodb://x", "sqlite:////proc/no-such-folder/x.db"]
)
def test_a_database_that_cannot_be_used_is_said(url: str) -> None:
    with pytest.raises(StartError, match="database cannot be used") as caught:
        Store(sa.make_url(url))
    assert "secret" not in str(caught.value)


def _roots(folder: Path, count: int) -> Path:
    """A folder of director roots, each signed by the same two keys."""
    keys = demo_keys() / "keys"
    folder.mkdir()
    root = Metadata[Root].from_bytes((keys / "public/director-root.json").read_bytes())
    for version in range(1, count + 1):
        root.signed.version = version
        root.signatures.clear()
        for number in (1, 2):
            key: Any = load_pem_private_key((keys / f"director/root-{number}.key").read_bytes(), None)
            root.sign(CryptoSigner(key), append=True)
        (folder / f"{version}.root.json").write_bytes(root.to_bytes())
    return folder


def test_all_newer_roots_are_sent_in_order(tmp_path: Path) -> None:
    folder = _roots(tmp_path / "roots", 11)
    path = write_config(tmp_path, **{str(demo_keys() / "keys/public/director-root.json"): str(folder)})

    async def story(world: World) -> None:
        device = await world.device()
        update = await world.connect(device).hello()
        sent = [Metadata[Root].from_bytes(root).signed.version for root in update.director.roots]
        assert sent == list(range(1, 12))

    _run(path, story)
    assert list(keyring.load_roots(folder)[0]) == list(range(1, 12))
    (folder / "4.root.json").unlink()
    with pytest.raises(StartError, match="expected version 4, found 5; there must be no hole"):
        _run(path)
