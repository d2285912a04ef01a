"""The operator's commands, against a running server, in words and in JSON."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from support.cloud_world import (
    ACCOUNT,
    DAY_MS,
    ECU,
    HARDWARE,
    VIN,
    Device,
    Stream,
    World,
    chain,
    open_world,
    signed_batch,
    uid,
    write_config,
)

from cloud import client
from cloud.__main__ import main
from openfod.vehicle.v1 import vehicle_service_pb2 as pb


class Running:
    """A cloud on a thread of its own, and the configuration that reaches it."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        started: Future[World] = Future()

        async def serve() -> None:
            async with open_world(write_config(folder)) as world:
                started.set_result(world)
                await self._stop.wait()

        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serve(),))
        self._thread.start()
        self.world = started.result(20)
        self.config = folder / "cloud.toml"
        text = self.config.read_text()
        old = 'endpoint = "127.0.0.1:0"'
        assert old in text
        self.config.write_text(text.replace(old, f'endpoint = "127.0.0.1:{self.world.cloud.port}"'))

    def do(self, story: object) -> object:
        """Runs a coroutine beside the cloud."""
        assert asyncio.iscoroutine(story)
        return asyncio.run_coroutine_threadsafe(story, self._loop).result(20)

    def later(self, story: object) -> None:
        """Starts a coroutine beside the cloud."""
        assert asyncio.iscoroutine(story)
        asyncio.run_coroutine_threadsafe(story, self._loop)

    def close(self) -> None:
        """Ends the cloud."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    cloud = Running(tmp_path)
    yield cloud
    cloud.close()


def _run(running: Running, *words: str) -> int:
    return main([*words, "--config", str(running.config)])


def _add(running: Running, *more: str) -> int:
    return _run(running, "vehicle", "add", VIN, "--ecu", f"{ECU}:{HARDWARE}:{uid(VIN).hex()}", *more)


def test_from_registration_to_invoice(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert _add(running) == 0
    words = capsys.readouterr().out
    claim = words.splitlines()[-1]
    assert words.startswith(f"registered {VIN} as veh-")

    assert _run(running, "grant", VIN, "seat-heating-monthly", "--account", ACCOUNT) == 0
    right = capsys.readouterr().out.split()[1].rstrip(":")

    async def drive() -> None:
        device = await running.world.enroll(VIN, claim)
        stream = running.world.connect(device)
        await stream.hello()
        records = chain(device.source, 2, value=50_000, entitlement_id=right, gap=7, gap_reason=1)
        await stream.upload(signed_batch(device.key, device.source, records))

    running.do(drive())
    assert _run(running, "entitlements", VIN) == 0
    assert right in capsys.readouterr().out
    assert _run(running, "usage", VIN) == 0
    usage = capsys.readouterr().out
    assert "50000 ms" in usage
    assert "7 ms" in usage
    assert _run(running, "invoice", VIN) == 0
    invoice = capsys.readouterr().out
    assert "EUR 4.99" in invoice
    assert "EUR 0.03 per 60000 ms  EUR 0.05  14 ms" in invoice
    assert "Total: EUR 5.04" in invoice
    assert "rounded once, half up" in invoice
    assert _run(running, "revoke", VIN, right, "--reason", "cancelled") == 0
    assert _run(running, "entitlements", VIN) == 0
    assert "cancelled" in capsys.readouterr().out
    assert _run(running, "vehicle", "list") == 0
    assert "seat-module (openfod-seat-1)" in capsys.readouterr().out


def test_every_reading_command_speaks_json(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert _add(running, "--json") == 0
    assert json.loads(capsys.readouterr().out)["vehicle"]["vin"] == VIN
    assert _run(running, "grant", VIN, "logbook-per-km", "--account", ACCOUNT, "--json") == 0
    assert json.loads(capsys.readouterr().out)["grant"]["entitlement"]["feature_id"] == "drivers-logbook"
    for words in (
        ["vehicle", "list"],
        ["entitlements", VIN],
        ["usage", VIN],
        ["invoice", VIN],
        ["invoice", ACCOUNT],
        ["invoices"],
        ["invoices", ACCOUNT, "--verify"],
        ["renew"],
        ["audit", "--vin", VIN],
    ):
        assert _run(running, *words, "--json") == 0
        json.loads(capsys.readouterr().out)


def test_from_a_payment_to_a_corrected_invoice(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    def say(*words: str, code: int = 0) -> str:
        assert _run(running, *words) == code
        found = capsys.readouterr()
        return found.out or found.err

    _add(running)
    capsys.readouterr()
    right = say("grant", VIN, "seat-heating-monthly", "--account", ACCOUNT).split()[1].rstrip(":")
    assert "is paid and goes on to 2026-04-30 12:00:00Z" in say("payment", VIN, right, "paid")
    assert say("renew") == "0 vehicles got a new set of rights\n"
    assert "is not prepaid" in say("top-up", VIN, right, code=1)
    assert "has plan seat-heating-monthly version 1 already" in say(
        "change-plan", VIN, right, "seat-heating-monthly", code=1
    )
    assert "has ended: a payment failed" in say("payment", VIN, right, "failed")

    running.world.now_ms[0] += 2 * DAY_MS
    assert "an invoice is closed for an account" in say("invoice", VIN, "--close", code=2)
    assert "--close needs --period" in say("invoice", ACCOUNT, "--close", code=2)
    assert "--period goes with --close" in say("invoice", ACCOUNT, "--period", "2026-03", code=2)
    words = say("invoice", ACCOUNT, "--close", "--period", "2026-03")
    assert "Invoice 1 for acc-4711, 2026-03-01 00:00:00Z to 2026-04-01 00:00:00Z, closed 2026-04-02" in words
    assert "Heated driver's seat: 1 started period of P1M  " in words
    assert "Total: EUR 4.99" in words
    assert say("invoice", ACCOUNT, "--close", "--period", "2026-03") == words
    digest = words.partition("SHA-256: ")[2].split()[0]
    assert digest in say("invoices", ACCOUNT)
    assert digest in say("invoices", "--number", "1")
    assert "no closed invoice has number 2" in say("invoices", "--number", "2", code=1)
    assert "1 rated again from their records: the same bytes" in say("invoices", "--verify")

    words = say("correct", "1", "--minor", "-150", "--reason", "it broke")
    assert words == "credit of EUR 1.50 for invoice 1; it is a line of the next invoice of acc-4711\n"
    assert "Total: EUR -1.50" in say("invoice", ACCOUNT)
    words = say("invoice", ACCOUNT, "--close", "--period", "2026-04-01T00:00:00Z/2026-04-02T00:00:00Z")
    assert "credit for invoice 1: it broke" in words
    words = say("invoice", ACCOUNT, "--close", "--period", "2026-04-02T00:00:00Z/2026-04-02T01:00:00Z")
    assert "nothing to bill: no invoice was made" in words


@pytest.mark.parametrize("period", ["2026-13", "march", "2026-03-01/2026-04-01", "0000-01"])
def test_a_malformed_period_is_wrong_use(capsys: pytest.CaptureFixture[str], period: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["invoice", ACCOUNT, "--close", "--period", period, "--config", "x"])
    assert caught.value.code == 2
    assert "--period" in capsys.readouterr().err


NEW_UID = bytes(range(16))


def test_from_a_lost_key_to_the_next_owner(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    _add(running)
    running.do(running.world.enroll(VIN, capsys.readouterr().out.splitlines()[-1]))
    assert _run(running, "grant", VIN, "seat-heating-for-ever", "--account", ACCOUNT) == 0
    assert _run(running, "grant", VIN, "logbook-per-km", "--account", ACCOUNT) == 0
    capsys.readouterr()

    assert _run(running, "vehicle", "block", VIN, "--reason", "stolen") == 0
    assert f"blocked {VIN}; its rights go on" in capsys.readouterr().out
    assert _run(running, "vehicle", "list") == 0
    assert "blocked 2026-03-31" in capsys.readouterr().out
    assert _run(running, "vehicle", "claim", VIN, "--reason", "found again") == 0
    words = capsys.readouterr().out
    assert "shown only now, valid until 2026-03-31 13:00:00Z" in words
    running.do(running.world.enroll(VIN, words.splitlines()[-1]))

    swap = ("vehicle", "rebind", VIN, ECU, uid(VIN).hex(), NEW_UID.hex(), "--reason", "water")
    assert _run(running, *swap) == 0
    words = capsys.readouterr().out
    assert f"{ECU} of {VIN} is now {NEW_UID.hex()}" in words
    assert bytes.fromhex(words.splitlines()[-1])[:1] == b"\xd2"  # a tagged COSE_Sign1

    assert _run(running, "vehicle", "transfer", "begin", VIN) == 0
    code = capsys.readouterr().out.splitlines()[-1]
    sale = ("vehicle", "transfer", "complete", VIN, "--account", "acc-0815", "--code")
    assert _run(running, *sale, "guess") == 1
    assert capsys.readouterr().err == (
        "error: the code is unknown, used, late or of another vehicle; "
        "ask the present owner for a new one: fod-cloud vehicle transfer begin\n"
    )
    assert _run(running, *sale, code) == 0
    words = capsys.readouterr().out
    assert words.startswith(f"sold {VIN} to acc-0815, its owner 2\n")
    assert [line.split("  ")[-1].strip() for line in words.splitlines()[-2:]] == [
        "stays with the vehicle",
        "ended",
    ]

    assert _run(running, "audit", "--vin", VIN) == 0
    words = capsys.readouterr().out
    assert "operator:operator  complete-transfer" in words
    assert _run(running, "audit", "--alarms") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # headers alone


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("claim", "--reason", "lost"), "claim_token"),
        (("block", "--reason", "lost"), "vehicle"),
        (("rebind", ECU, uid(VIN).hex(), NEW_UID.hex(), "--reason", "wet"), "burning_tokens"),
        (("transfer", "begin"), "transfer_code"),
    ],
)
def test_every_flow_speaks_json(
    running: Running, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], found: str
) -> None:
    _add(running)
    capsys.readouterr()
    name, *more = words
    place = [name, more.pop(0)] if name == "transfer" else [name]
    assert _run(running, "vehicle", *place, VIN, *more, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert found in answer
    if found == "transfer_code":
        sale = ("complete", VIN, "--code", answer[found], "--account", "acc-0815", "--json")
        assert _run(running, "vehicle", "transfer", *sale) == 0
        assert json.loads(capsys.readouterr().out)["owner_epoch"] == 2


def test_a_malformed_uid_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["vehicle", "rebind", VIN, ECU, "00", "11", "--reason", "x", "--config", "x"])
    assert caught.value.code == 2
    assert "expected a uid in 32 hex digits; found '00'" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["ACTIVE", "FAULT"])
def test_grant_waits_until_the_vehicle_has_answered(
    running: Running, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    async def open_stream() -> tuple[Device, Stream]:
        device = await running.world.device()
        stream = running.world.connect(device)
        await stream.hello()
        await stream.offer()
        return device, stream

    async def confirm(stream: Stream) -> None:
        await stream.update()
        rows = await running.world.cloud.store.run(lambda tx: tx.entitlements(VIN))
        for name in ("PENDING", state):
            status = pb.FeatureStatus(
                feature_id="seat-heating",
                entitlement_id=rows[0].entitlement_id,
                state=pb.FeatureState.Value(f"FEATURE_STATE_{name}"),
                reason="vehicle is moving" if name == "PENDING" else "",
                activation_ms=42 if name == "ACTIVE" else 0,
                nrc=0x33 if name == "FAULT" else 0,
            )
            await stream.send(feature_status=pb.FeatureStatusReport(features=[status]))

    opened = running.do(open_stream())
    assert isinstance(opened, tuple)
    running.later(confirm(opened[1]))
    code = _run(running, "grant", VIN, "seat-heating-monthly", "--account", ACCOUNT, "--wait")
    shown = capsys.readouterr()
    assert code == (0 if state == "ACTIVE" else 1)
    if state == "ACTIVE":
        assert "on the vehicle: 42 ms" in shown.out
    else:
        assert "NRC 0x33" in shown.err


def test_a_refusal_is_one_clear_line(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(running, "grant", VIN, "logbook-per-km", "--account", ACCOUNT) == 1
    error = capsys.readouterr().err
    assert error == f"error: vehicle {VIN} is not registered; first: fod-cloud vehicle add {VIN}\n"


def test_a_server_out_of_reach_is_said_with_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, **{'endpoint = "127.0.0.1:0"': 'endpoint = "127.0.0.1:1"'})
    assert main(["vehicle", "list", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: cannot reach 127.0.0.1:1 (is fod-cloud serve running")
    assert len(error.splitlines()) == 1


def test_an_operator_needs_none_of_the_servers_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    text = path.read_text()
    head, _, rest = text.partition("[operator]")
    operator, _, tail = rest.partition("[store]")
    path.write_text(
        head.replace("/keys/", "/gone/")
        + "[operator]"
        + operator
        + "[store]"
        + tail.replace("/keys/", "/gone/")
    )
    assert main(["vehicle", "list", "--config", str(path)]) == 1
    assert "cannot reach" in capsys.readouterr().err


def test_a_missing_operator_key_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, **{"operator/operator.key": "operator/missing.key"})
    assert main(["vehicle", "list", "--config", str(path)]) == 2
    assert "operator.key: " in capsys.readouterr().err


def test_the_key_of_an_ecu_is_registered_with_it_and_asking_again_needs_the_same(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    ecu = f"{ECU}:{HARDWARE}:{uid(VIN).hex()}"
    for _ in range(2):
        assert _run(running, "vehicle", "add", VIN, "--ecu", f"{ecu}:{'ab' * 32}") == 0
    assert _run(running, "vehicle", "add", VIN, "--ecu", f"{ecu}:{'cd' * 32}") == 1
    assert "is registered already; it was not changed" in capsys.readouterr().err
    assert _run(running, "vehicle", "list", "--json") == 0
    (vehicle,) = json.loads(capsys.readouterr().out)["vehicles"]
    assert base64.b64decode(vehicle["ecus"][0]["reading_key"]) == b"\xab" * 32


@pytest.mark.parametrize("ecu", ["seat", "a:b:00", f"a:b:{'0' * 32}:00", f"a:b:{'0' * 32}:{'0' * 64}:"])
def test_a_malformed_ecu_is_wrong_use(ecu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["vehicle", "add", VIN, "--ecu", ecu, "--config", "x"])
    assert caught.value.code == 2
    assert "expected IDENT:HWID:UIDHEX" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("minor", "currency", "text"),
    [
        (499, "EUR", "EUR 4.99"),
        (0, "EUR", "EUR 0.00"),
        (5, "USD", "USD 0.05"),
        (1200, "JPY", "JPY 1200"),
        (1234, "KWD", "KWD 1.234"),
    ],
)
def test_amounts_read_as_people_write_them(minor: int, currency: str, text: str) -> None:
    assert client.money(minor, currency) == text
