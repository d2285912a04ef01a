"""`make run`: one feature on demand, from the grant to the bill, with real processes.

Every figure that is printed was read from one of the programs; every step says
what was expected, and the first that does not hold ends the story with exit
code 1 and the last lines of all logs. Everything is written to run/demo/.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud.readings import Reading, parse
from common.cli import EXIT_DONE, EXIT_FAILED, fail
from deploy.demo import rogue
from deploy.demo.page import Page, StepFailedError
from deploy.demo.stage import DEMO, REPOSITORY, SEAT_ECU, SEAT_HARDWARE, VIN, Stage, StageError
from openfod.vehicle.v1.vehicle_service_pb2 import TrustUpdate

FOLDER = REPOSITORY / "run" / "demo"
ACCOUNT, PLAN = "acc-4711", "seat-heating-monthly"
OTHER_VIN, OTHER_ACCOUNT, OTHER_PLAN = "WFDSEAT10N0000002", "acc-4712", "seat-heating-for-ever"
OTHER_UID = "0f0d5ea7000000000000000000000003"
HILL = (20, 125)
"""First and last second of the UDDS drive cycle's first hill (40 CFR 1066.801)."""
HILL_S = HILL[1] - HILL[0]
CUT_AT_S, BACK_AT_S, REVOKE_AT_S = 20, 36, 88
"""Seconds of the drive at which the agent is killed, the network returns, and the right is revoked."""
DEAD_S = 3.0
"""How long the agent stays dead."""
REVOKE_LATEST_S = 98
"""On a slow machine the drive may be over by then; the vehicle drives the hill once more."""
LIVE_EVERY_S = 4
LOG_LINES = 12
"""Lines of each log that are shown when a step fails."""
NRC_DENIED, NRC_SEQUENCE = "0x33", "0x24"
ACTIVE_TIME, HEATED_DISTANCE = "active-time", "heated-distance"


@dataclass(frozen=True)
class Bill:
    """What the cloud holds of one meter, in the meter's unit.

    Args:
        value: metered and billed.
        gap: declared as not metered, and not billed.
    """

    value: int
    gap: int
    is_bounded: bool


class Story:
    """The chapters, in their order; each goes on where the one before it ended."""

    def __init__(self, stage: Stage, page: Page) -> None:
        self.stage, self.page = stage, page
        self.entitlement = ""
        self.captured = TrustUpdate()
        self._drive_ns = 0
        self._drive_from = 0
        self._before_kill: dict[str, Any] = {}

    def tell(self) -> None:
        """Tells it all.

        Raises:
            StepFailedError: an expectation did not hold.
            StageError: something did not happen in time.
        """
        self.enrolment()
        self.refused_without_a_right()
        self.grant()
        self.drive()
        self.crash_without_network()
        self.network_returns()
        self.attacks()
        self.revocation_in_motion()
        self.bill()

    # --- 1 to 3: standing still ----------------------------------------------------

    def enrolment(self) -> None:
        """Keys, catalogue, cloud, vehicle, enrolment, agent."""
        stage, page = self.stage, self.page
        page.chapter("A vehicle is enrolled")
        page.say(
            "Three parties hold keys: the catalogue's signers (offline), the cloud, and each vehicle."
            " One command makes the first two sets; the vehicle makes its own."
        )
        self._show("fod-keys", "init", stage.keys)
        self._show("fod-keys", "sign-catalogue", stage.keys, DEMO / "catalogue", stage.folder / "catalogue")
        stage.start_cloud()
        line = stage.command_line("fod-cloud", "serve", "--config", stage.cloud_config)
        page.command(f"{line} &", json.dumps(stage.cloud.events()[0]))
        stage.start_vehicle()
        line = stage.command_line("fod-sim", "run", stage.folder / "scenario.toml", "--stdin")
        page.command(f"{line} &", json.dumps(stage.bus))
        page.say(self._bus_in_words())
        stage.write_agent_config()
        ecu = stage.seat_ecu
        added = self._show("fod-cloud", "vehicle", "add", VIN, "--ecu", ecu, "--config", stage.cloud_config)
        claim = added.split()[-1]
        self._show("fod-agent", "enroll", "--config", stage.agent_config(), "--claim", claim)
        stage.start_agent()
        stage.until_status("the agent has reached the cloud", lambda s: bool(s["rights_version"]))
        line = stage.command_line("fod-agent", "run", "--config", stage.agent_config())
        page.command(f"{line} &", stage.agent.log()[0][25:])
        features = stage.status()["features"]
        page.check(
            "enrolled and connected, with no right to anything",
            f"link {stage.status()['link']}, {len(features)} features",
            held=stage.status()["link"] == "up" and not features,
        )

    def refused_without_a_right(self) -> None:
        """The ECU decides by itself, whoever asks."""
        stage, page = self.stage, self.page
        page.chapter("Without a right, the ECU itself refuses")
        page.say("The driver presses the button of the heated seat (level 2).")
        refusal = self._press_seat()
        page.check(
            "the seat module refuses the driver",
            f"{refusal['event']}, {refusal['reason']}",
            held=refusal["reason"] == "NO_TOKEN" and stage.truth()["heat_level"] == 0,
        )
        page.say(
            "The owner is clever: a diagnostic tester of their own installs a well-formed token"
            " (docs/token.md), signed by a key of their own."
        )
        path = stage.folder / "owners-token.cose"
        path.write_bytes(rogue.owners_token(VIN))
        self._refused_token(path, "the ECU refuses the owner's own token", NRC_DENIED)

    def grant(self) -> None:
        """From the operator's command to the ECU's confirmation."""
        stage, page = self.stage, self.page
        page.chapter("A subscription is granted, and the seat is warm")
        page.say("EUR 4.99 a month and 3 cent for each minute of warmth, for the billing account acc-4711.")
        mark = len(stage.agent.log())
        said = self._show(
            "fod-cloud", "grant", VIN, PLAN, "--account", ACCOUNT, "--wait", "--config", stage.cloud_config
        )
        feature = stage.until_state("ACTIVE")
        self.entitlement = feature["entitlement"]
        page.say("What the agent did: verified what the cloud signed, asked the ECU, read its state back.")
        steps = ("new rights", "→", "request to ECU")
        page.log("agent", [line for line in stage.agent.log()[mark:] if any(s in line for s in steps)])
        page.check(
            "granted, pushed, verified, switched on, read back",
            said.splitlines()[-1],
            held=feature["state"] == "ACTIVE" and self.entitlement in said,
        )
        level = stage.truth()["heat_level"]
        page.check("the seat gets warm", f"heat level {level}", held=level == 2)

    # --- 4 to 8: one drive -----------------------------------------------------------

    def drive(self) -> None:
        """Metered use."""
        page = self.page
        page.chapter("The car drives, and use is metered")
        page.say(
            f"The first hill of the UDDS drive cycle, in real time ({HILL_S} s; all that follows"
            " happens during it). The agent counts from the frames on the bus."
        )
        self._begin_drive()
        self._drive_until(CUT_AT_S)
        used = self._closed()
        page.check(
            "active time and distance are metered",
            f"{used[ACTIVE_TIME]} ms, {used[HEATED_DISTANCE]} m in closed windows",
            held=used[ACTIVE_TIME] > 0 and used[HEATED_DISTANCE] > 0,
        )

    def crash_without_network(self) -> None:
        """Killed in mid-drive, and back without a network."""
        stage, page = self.stage, self.page
        page.chapter("The agent is killed in mid-drive, and the network is gone")
        self._before_kill = stage.until_status(
            "what is metered is on disk", lambda s: bool(s["journal"]["stored"] == s["journal"]["records"])
        )
        pid = stage.agent.pid
        tokens_before = self._count("token-accepted")
        killed_at = stage.kill_agent()
        stage.relay.lead_to(None)
        page.command(f"kill -9 {pid}", "")
        page.say("The relay that is the network between vehicle and cloud is closed at the same moment.")
        self.captured = rogue.genuine(stage, "agent", secrets.token_bytes(16))
        page.say(
            "Meanwhile somebody who has copied the device key asks the genuine cloud by another way,"
            " and keeps its signed answer for chapter 7."
        )
        stage.until("the agent was dead for a while", lambda: time.monotonic() - killed_at >= DEAD_S)
        level = stage.truth()["heat_level"]
        page.check("the seat stays warm without the agent", f"heat level {level}", held=level == 2)
        down_ms = round((time.monotonic() - killed_at) * 1000)
        stage.start_agent()
        stage.until_state("ACTIVE")
        line = stage.command_line("fod-agent", "run", "--config", stage.agent_config())
        page.command(f"{line} &", "")
        life = stage.agent.log()
        steps = ("stored rights are", "→", "request to ECU", "AGENT_DOWN")
        page.log("agent", [x for x in life if any(s in x for s in steps)])
        self._show("fod-agent", "status", "--config", stage.agent_config(), most=7)
        requests = [x for x in life if "request to ECU" in x]
        written = [x for x in requests if 'purpose="read back"' not in x and "purpose=reading" not in x]
        page.check(
            "offline the right holds, without a write to the ECU",
            f"{len(requests)} reads, {len(written)} writes; tokens taken by the ECU: "
            f"{self._count('token-accepted') - tokens_before}",
            held=bool(requests) and not written and self._count("token-accepted") == tokens_before,
        )
        before, now = self._closed(self._before_kill), self._closed()
        page.check(
            "nothing that was metered is lost",
            f"{before[ACTIVE_TIME]} ms, {before[HEATED_DISTANCE]} m before;"
            f" {now[ACTIVE_TIME]} ms, {now[HEATED_DISTANCE]} m now",
            held=all(now[meter] >= used for meter, used in before.items()),
        )
        gap = self._declared_down()
        page.check(
            "the dead time is a declared gap, not a bill",
            f"dead for {down_ms} ms, declared {gap} ms",
            held=gap >= down_ms,
        )
        self._drive_until(BACK_AT_S)

    def network_returns(self) -> None:
        """Usage goes up, a receipt comes down."""
        stage, page = self.stage, self.page
        page.chapter("The network returns, and usage is billed")
        waiting = stage.status()["journal"]
        mark = len(stage.cloud.log())
        stage.relay.lead_to(stage.cloud_port)
        page.live(
            f"the relay is open again; the agent has {waiting['stored'] - waiting['receipts_to']} records"
            " that the cloud does not know"
        )
        status = stage.until_status(
            "the cloud's signed receipt",
            lambda s: bool(s["link"] == "up" and s["journal"]["receipts_to"] >= max(waiting["stored"], 1)),
        )
        page.log("cloud", [x for x in stage.cloud.log()[mark:] if "usage taken" in x][:1])
        page.log("agent", [x for x in stage.agent.log() if "signed receipt" in x][-1:])
        page.check(
            "a signed receipt for all of it",
            f"receipts up to {status['journal']['receipts_to']}, waiting: up to {waiting['stored']}",
            held=status["journal"]["receipts_to"] >= waiting["stored"],
        )
        # A moment after a window has closed: until the next, usage and invoice stay as they are.
        seen = status["journal"]["receipts_to"]
        stage.until_status("the next receipt", lambda s: bool(s["journal"]["receipts_to"] > seen))
        records = self._records()
        count = self._stored_before_kill()
        before = {
            meter: sum(int(r["value"]) for r in records[:count] if r["meter_id"] == meter)
            for meter in (ACTIVE_TIME, HEATED_DISTANCE)
        }
        page.check(
            "records from before the kill: none lost, none twice",
            f"cloud {before[ACTIVE_TIME]} ms, {before[HEATED_DISTANCE]} m",
            held=before == self._closed(self._before_kill) and _is_chain(records),
        )
        self._show("fod-cloud", "invoice", VIN, "--config", stage.cloud_config, most=6)
        bills, truth = _bills(records), stage.truth()
        page.say("Beside it, what the simulator itself wrote down as the truth (the cloud never sees it):")
        self._beside_truth(bills, truth)
        page.check(
            "never more is billed than was used",
            f"{bills[ACTIVE_TIME].value} of {truth['heater_on_ms']:.0f} ms",
            held=bills[ACTIVE_TIME].value <= truth["heater_on_ms"]
            and bills[HEATED_DISTANCE].value <= truth["heated_distance_m"],
        )
        page.say(
            "(The window that is still open is not in the cloud yet; the other side is shown at the end.)"
        )

    def attacks(self) -> None:
        """A stolen cloud on the wire."""
        stage, page = self.stage, self.page
        page.chapter("Three attacks from a stolen cloud")
        page.say(
            "The attacker has the cloud's TLS server key and stands on the wire: for TLS, this is the"
            " cloud. What the attacker does not have is a signing key."
        )
        other_config = stage.write_agent_config("other", OTHER_VIN)
        ecu = f"{SEAT_ECU}:{SEAT_HARDWARE}:{OTHER_UID}"
        page.say("For the third attack there is a second vehicle, whose owner has bought the feature:")
        added = self._show(
            "fod-cloud", "vehicle", "add", OTHER_VIN, "--ecu", ecu, "--config", stage.cloud_config, most=1
        )
        self._show("fod-agent", "enroll", "--config", other_config, "--claim", added.split()[-1], most=1)
        self._show(
            "fod-cloud", "grant", OTHER_VIN, OTHER_PLAN, "--account", OTHER_ACCOUNT,
            "--config", stage.cloud_config,
        )  # fmt: skip
        before = self._state()
        tokens_before = self._count("token-accepted")
        with rogue.RogueCloud(stage.keys) as attacker:
            stage.relay.lead_to(attacker.port)
            page.live("the wire now leads to the attacker")
            page.say(
                "(a) A right to heat the seat for ever: well-formed, for this VIN, answering the vehicle's"
                " fresh nonce, and signed by the attacker's own keys."
            )
            forged = rogue.forged(VIN, self.captured.catalogue_targets[0].content)
            self._attack(attacker, "a forged right is refused", "SignatureError", forged)
            page.say("(b) The genuine cloud's answer that was captured in chapter 5, byte for byte.")
            self._attack(
                attacker,
                "a replayed genuine answer is refused",
                "ReplayError",
                lambda _nonce: self.captured,
            )
            page.say(
                "(c) The second vehicle's rights, which the genuine cloud signs at this moment, even for this"
                " vehicle's fresh nonce."
            )
            self._attack(
                attacker,
                "another vehicle's genuine rights are refused",
                "VehicleMismatchError",
                lambda nonce: rogue.genuine(stage, "other", nonce),
            )
            after = self._state()
            stage.relay.lead_to(stage.cloud_port)
        stage.until_status("the genuine cloud is back", lambda s: s["link"] == "up" and not s["last_refusal"])
        page.live("the wire leads to the genuine cloud again, and its answer is taken")
        page.check(
            "rights, features and ECU are as before",
            f"rights version {after[0]}, {after[1]}, {after[2]}",
            held=before == after == self._state() and self._count("token-accepted") == tokens_before,
        )

    def revocation_in_motion(self) -> None:
        """Held while it moves, released at standstill."""
        stage, page = self.stage, self.page
        page.chapter("The subscription is revoked at speed")
        self._drive_until(REVOKE_AT_S)
        self._keep_moving()
        reason = "subscription cancelled"
        self._show(
            "fod-cloud", "revoke", VIN, self.entitlement, "--reason", reason, "--config", stage.cloud_config
        )
        held = stage.until_state("HELD")
        speed_kmh, level = stage.status()["signals"]["Vehicle.Speed"]["value"], stage.truth()["heat_level"]
        page.check(
            "nothing changes under a moving car",
            f"{held['state']} at {speed_kmh:.1f} km/h, heat level {level}",
            held=speed_kmh > 0 and level == 2 and held["state"] == "HELD",
        )
        page.say(f"The agent says why: {held['reason']}")
        self._until_standstill()
        stage.until_state("LOCKED")
        off = stage.event("the ECU switches off", lambda e: e["event"] == "feature" and e["state"] == "OFF")
        token = [e for e in stage.sim.events() if e["event"] == "token-accepted"][-1]
        page.check(
            "released at standstill",
            f"ECU: {off['state']}, {off['reason']}, by token {token['counter']}",
            held=off["reason"] == "NOT_ALLOWED" and not token["allowed"] and stage.truth()["heat_level"] == 0,
        )
        refusal = self._press_seat()
        page.check(
            "the driver's button is refused again",
            f"{refusal['event']}, {refusal['reason']}",
            held=refusal["reason"] == "NOT_ALLOWED",
        )
        page.say("The owner has kept the old, genuine token and installs it again with the tester.")
        path = stage.folder / "old-token.cose"
        path.write_bytes(
            next(t.content for t in self.captured.director_targets if t.path == rogue.TOKEN_PATH)
        )
        self._refused_token(path, "the ECU refuses the withdrawn token", NRC_SEQUENCE)

    # --- 9: the end ------------------------------------------------------------------

    def bill(self) -> None:
        """All of it beside the truth."""
        stage, page = self.stage, self.page
        page.chapter("The bill, beside the truth")
        counted = stage.until("the seat module's last reading is in the cloud", self._last_reading)
        status = stage.until_status(
            "all usage has a receipt",
            lambda s: bool(s["journal"]["receipts_to"] == s["journal"]["stored"] == s["journal"]["records"]),
        )
        self._show("fod-cloud", "invoice", VIN, "--config", stage.cloud_config)
        records = self._records()
        bills, truth = _bills(records), stage.truth()
        page.say("The invoice beside what the simulator itself wrote down as the truth:")
        invoice = self._beside_truth(bills, truth)
        page.check(
            "each record once, in an unbroken chain, with a receipt",
            f"{len(records)} records, receipts up to {status['journal']['receipts_to']}",
            held=_is_chain(records) and len(records) == status["journal"]["receipts_to"],
        )
        for meter, true, unit in (
            (ACTIVE_TIME, truth["heater_on_ms"], "ms"),
            (HEATED_DISTANCE, truth["heated_distance_m"], "m"),
        ):
            bill = bills[meter]
            page.check(
                f"{meter}: billed <= truth <= billed + declared",
                f"{bill.value} <= {true:.1f} <= {bill.value + bill.gap} {unit}",
                held=bill.is_bounded and bill.value <= true <= bill.value + bill.gap,
            )
        listed = stage.done("fod-cloud", "vehicle", "list", "--json", "--config", stage.cloud_config).data
        findings = next(v.get("findings", []) for v in listed["vehicles"] if v["vin"] == VIN)
        unmetered = [text for text in findings if "the ECU counted" in text]
        page.check(
            "the seat module's own signed count is the truth, and explains the bill",
            f"{counted.on_ms} ms in {counted.executions} uses, reading {counted.reading}; "
            f"{len(unmetered)} findings of use that was not metered",
            held=abs(counted.on_ms - truth["heater_on_ms"]) < counted.reading + 10 and not unmetered,
        )
        quantity = sum(int(x["quantity"]) for x in invoice["lines"] if x["meter_id"] == ACTIVE_TIME)
        page.check(
            "the invoice bills exactly the metered time",
            f"{quantity} ms, total {int(invoice['total_minor']) / 100:.2f} {invoice['currency']}",
            held=quantity == bills[ACTIVE_TIME].value,
        )

    # --- the vehicle -------------------------------------------------------------------

    def _press_seat(self) -> dict[str, Any]:
        before = len(self.stage.sim.events())
        self.stage.tell("seat 2")
        return self.stage.event(
            "the seat module refuses the button", lambda e: e["event"] == "heater-refused", after=before
        )

    def _refused_token(self, path: Path, expected: str, nrc: str) -> None:
        """Installs a token by a diagnostic tester and expects a negative response."""
        stage = self.stage
        words = stage.tester("1003", f"31010F0D@{stage.shown(path)}")
        before = len(stage.sim.events())
        result = stage.run(*words)
        self.page.command(stage.command_line(*words), result.text)
        event = stage.event("the ECU refuses", lambda e: e["event"] == "token-refused", after=before)
        answer = result.text.strip().splitlines()[-1].strip().removeprefix("refused: ")
        self.page.check(
            expected, f"{answer} ({event['why']})", held=result.code == EXIT_FAILED and nrc in answer
        )

    def _begin_drive(self) -> None:
        stage = self.stage
        self._drive_from = len(stage.sim.events())
        stage.tell(f"drive {HILL[0]} {HILL[1]}")
        begun = stage.event("the drive begins", lambda e: e["event"] == "drive-begun", after=self._drive_from)
        self._drive_ns = begun["monotonic_ns"]

    def _drive_s(self) -> float:
        """Seconds since the drive began."""
        return (time.monotonic_ns() - self._drive_ns) / 1e9

    def _has_stopped(self) -> bool:
        return any(e["event"] == "drive-ended" for e in self.stage.sim.events()[self._drive_from :])

    def _drive_until(self, second: int) -> None:
        """Lets the car drive on, and shows it."""
        next_line = self._drive_s() + LIVE_EVERY_S

        def look() -> bool:
            nonlocal next_line
            if self._drive_s() >= next_line:
                next_line += LIVE_EVERY_S
                self._live()
            return self._drive_s() >= second or self._has_stopped()

        self.stage.until(f"second {second} of the drive", look, timeout_s=2 * HILL_S)

    def _keep_moving(self) -> None:
        if self._drive_s() < REVOKE_LATEST_S:
            return
        self._until_standstill()
        self.page.say("This machine is slow: the drive was over already. The car drives the hill once more.")
        self._begin_drive()
        self._drive_until(CUT_AT_S)

    def _until_standstill(self) -> None:
        self._drive_until(HILL_S + 1)
        self.stage.until("the car stands", self._has_stopped)
        self.page.live("the car stands")

    def _live(self) -> None:
        status, truth, used = self.stage.status(), self.stage.truth(), self._closed()
        journal = status["journal"]
        self.page.live(
            f"{self._drive_s():4.0f} s  {truth['speed_kmh']:5.1f} km/h  heat level {truth['heat_level']}"
            f"  cloud {status['link']:4}  metered {used[ACTIVE_TIME]:6} ms {used[HEATED_DISTANCE]:4} m"
            f"  journal {journal['stored']:2}, receipts to {journal['receipts_to']}"
        )

    def _bus_in_words(self) -> str:
        bus = self.stage.bus
        if bus["interface"] == "socketcan":
            return f"The vehicle's bus is SocketCAN on {bus['channel']}, which is up on this machine."
        return (
            f"The vehicle's bus is socketcand on {bus['host']}:{bus['port']}: no SocketCAN interface is up"
            " on this machine."
        )

    def _count(self, event: str) -> int:
        return sum(e["event"] == event for e in self.stage.sim.events())

    # --- the agent ---------------------------------------------------------------------

    def _state(self) -> tuple[int, str, str, str]:
        """What attacks must not change."""
        status, feature = self.stage.status(), self.stage.seat_heating()
        return status["rights_version"], feature["feature"], feature["state"], feature["entitlement"]

    def _attack(self, attacker: rogue.RogueCloud, expected: str, error: str, bundle: rogue.Bundle) -> None:
        stage, page = self.stage, self.page
        mark = len(stage.agent.log())
        attempt = attacker.attack(bundle)
        refusal = stage.status()["last_refusal"]
        page.log("agent", [x for x in stage.agent.log()[mark:] if "update refused" in x])
        page.check(
            expected,
            refusal,
            held=attempt.result.error_type == error
            and refusal.startswith(f"{error}: ")
            and attempt.is_unchanged
            and stage.seat_heating()["state"] == "ACTIVE",
        )

    def _closed(self, status: dict[str, Any] | None = None) -> dict[str, int]:
        """Use in closed windows, by meter."""
        found = {ACTIVE_TIME: 0, HEATED_DISTANCE: 0}
        for entry in (status or self.stage.status())["usage"]:
            if entry["entitlement"] == self.entitlement:
                found[entry["meter"]] = int(entry["closed"])
        return found

    def _stored_before_kill(self) -> int:
        return int(self._before_kill["journal"]["stored"])

    def _declared_down(self) -> int:
        """Declared dead time of the last restart in ms, as the agent has logged it."""

        def look() -> str | None:
            down = (x for x in self.stage.agent.log() if "gap_reason=AGENT_DOWN" in x)
            return next((x for x in down if f"meter={ACTIVE_TIME}" in x), None)

        line = self.stage.until("the dead time is declared", look)
        return int(next(w for w in line.split() if w.startswith("gap=")).removeprefix("gap="))

    # --- the cloud ---------------------------------------------------------------------

    def _records(self) -> list[dict[str, Any]]:
        stage = self.stage
        found: list[dict[str, Any]] = stage.done(
            "fod-cloud", "usage", VIN, "--json", "--config", stage.cloud_config
        ).data
        return found

    def _last_reading(self) -> Reading | None:
        """What the seat module signed after its feature went off; None before that."""
        contents = [record["ecu_reading"] for record in self._records() if record.get("ecu_reading")]
        if not contents:
            return None
        reading = parse(base64.b64decode(contents[-1]))
        reading.check_signature(bytes.fromhex(self.stage.seat_key))
        return reading if reading.on_ms + 10 >= self.stage.truth()["heater_on_ms"] else None

    def _beside_truth(self, bills: dict[str, Bill], truth: dict[str, Any]) -> dict[str, Any]:
        """Shows each meter's line of the invoice beside the truth; returns the invoice."""
        stage = self.stage
        invoice: dict[str, Any] = stage.done(
            "fod-cloud", "invoice", VIN, "--json", "--config", stage.cloud_config
        ).data["invoices"][0]
        rows: list[tuple[str, ...]] = []
        for meter, true, unit in (
            (ACTIVE_TIME, truth["heater_on_ms"], "ms"),
            (HEATED_DISTANCE, truth["heated_distance_m"], "m"),
        ):
            lines = [line for line in invoice["lines"] if line["meter_id"] == meter]
            rows.append(
                (
                    meter,
                    f"{sum(int(line['quantity']) for line in lines)} {unit}",
                    f"{sum(int(line['amount_minor']) for line in lines) / 100:.2f} {invoice['currency']}",
                    f"{true:.1f} {unit}",
                    f"{bills[meter].gap} {unit}",
                )
            )
        self.page.table(["meter", "on the invoice", "for", "truth", "declared, not billed"], rows)
        return invoice

    def _show(self, *words: str | Path, most: int = 12) -> str:
        """Runs a command that must succeed, and prints it; returns its standard output."""
        result = self.stage.done(*words)
        self.page.command(self.stage.command_line(*words), result.text.strip(), most=most)
        return result.out


def _bills(records: list[dict[str, Any]]) -> dict[str, Bill]:
    """Sums of what the cloud holds, by meter."""
    bills: dict[str, Bill] = {}
    for meter in (ACTIVE_TIME, HEATED_DISTANCE):
        of_meter = [r for r in records if r["meter_id"] == meter]
        bills[meter] = Bill(
            value=sum(int(r["value"]) for r in of_meter),
            gap=sum(int(r["gap"]) for r in of_meter),
            is_bounded=not any(r["gap_unbounded"] for r in of_meter),
        )
    return bills


def _is_chain(records: list[dict[str, Any]]) -> bool:
    """True if the records are one journal's, from its first on, each once."""
    journals = {r["id"].partition("/")[0] for r in records}
    return len(journals) == 1 and [int(r["seq"]) for r in records] == list(range(1, len(records) + 1))


def main(argv: Sequence[str] | None = None) -> int:
    """Tells the story; exit code 0 only if every step held."""
    parser = argparse.ArgumentParser(
        prog="make run", description="One feature on demand, from the grant to the bill (two minutes)."
    )
    parser.add_argument("--keep", action="store_true", help="leave everything running until Ctrl-C")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, metavar="DIR", help="where to write; wiped first (run/demo)"
    )
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_FAILED))
    page = Page()
    print("OpenFoD: one feature on demand, from the grant to the bill")
    page.say(
        "Real processes, sockets and keys on this machine. The commands are those of .venv/bin. What"
        " they print is real, and shortened."
    )
    try:
        return _tell(Stage(arguments.folder.resolve()), page, keep=arguments.keep)
    except StageError as error:  # before or after the story itself
        return fail(str(error))


def _tell(stage: Stage, page: Page, *, keep: bool) -> int:
    started = time.monotonic()
    with stage:
        try:
            Story(stage, page).tell()
        except (StepFailedError, StageError, KeyboardInterrupt) as error:
            page.summary()
            _say_what_failed(stage, error)
            return EXIT_FAILED
        page.summary()
        took_s = time.monotonic() - started
        print(f"\nEvery step held ({took_s:.0f} s). Logs and files: {stage.shown(stage.folder)}/")
        if keep:
            with contextlib.suppress(KeyboardInterrupt):
                _keep(stage)
    return EXIT_DONE


def _say_what_failed(stage: Stage, error: BaseException) -> None:
    print(f"\nThe story ended early: {str(error) or 'interrupted'}", file=sys.stderr)
    for program in stage.programs():
        print(f"\nlast lines of {stage.shown(stage.folder)}/logs/{program.name}.log:", file=sys.stderr)
        for line in program.log()[-LOG_LINES:]:
            print(f"  {line}", file=sys.stderr)


def _keep(stage: Stage) -> None:
    """Leaves everything running, and gives the vehicle what is typed."""
    cloud, agent = stage.shown(stage.cloud_config), stage.shown(stage.agent_config())
    print(f"""
Everything goes on running. In another terminal, in this folder:
  .venv/bin/fod-agent status --config {agent}
  .venv/bin/fod-cloud grant {VIN} {PLAN} --account {ACCOUNT} --wait --config {cloud}
  .venv/bin/fod-cloud entitlements {VIN} --config {cloud}
  .venv/bin/fod-cloud usage {VIN} --config {cloud}
  .venv/bin/fod-cloud invoice {VIN} --config {cloud}
  .venv/bin/fod-cloud watch {VIN} --config {cloud}
  .venv/bin/{stage.command_line(*stage.tester("22F190", "220F21"))}
Here, the driver and the road:
  seat 3            ask for seat heat, 0 to 3
  drive 20 125      drive from second 20 to second 125 of the cycle; stop
  ignition off      and on
  truth             what really happened
Ctrl-C ends everything.""")
    for line in sys.stdin:
        if line.strip():
            try:
                print(stage.tell(" ".join(line.split())))
            except StageError as error:
                print(error)
    signal.pause()


if __name__ == "__main__":
    sys.exit(main())
