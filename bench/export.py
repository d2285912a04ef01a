"""The usage feed: events a second into a file, and over HTTP to a receiver on loopback."""

from __future__ import annotations

import hashlib
import random
import statistics
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import sqlalchemy as sa

from cloud.export import consumer
from cloud.export.targets import FileTarget, HttpTarget
from cloud.store import EntitlementRow, Store, Transaction, UsageRow
from openfod.usage.v1 import usage_pb2

RECORDS = 20_000
BATCH = 500
ROUNDS = 3
VIN, SOURCE, JOURNAL, RIGHT = "WFDSEAT10N0000001", "veh-0123456789abcdef", "0" * 16, "ent-0123456789abcdef"
START_MS = 1_774_958_400_000


def main() -> None:
    """Prints medians over rounds; the first reading also numbers the records."""
    with tempfile.TemporaryDirectory(prefix="openfod-") as name:
        folder = Path(name)
        store = Store(sa.make_url(f"sqlite:///{folder / 'cloud.db'}"))
        store.run_here(_fill)
        begun = time.perf_counter()
        while store.run_here(lambda tx: tx.number_usage(consumer.NUMBER_AT_ONCE)):
            pass
        print(f"numbering: {RECORDS / (time.perf_counter() - begun):,.0f} records/s")
        rates = []
        for number in range(ROUNDS):
            target = FileTarget(folder / f"usage-{number}.jsonl")
            rates.append(_run(store, f"file-{number}", target, f"file:{target.path}"))
            target.close()
        size = (folder / "usage-0.jsonl").stat().st_size / RECORDS
        print(f"file, batches of {BATCH}: {statistics.median(rates):,.0f} events/s, {size:.0f} bytes each")
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Receiver)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        rates = []
        for number in range(ROUNDS):
            http = HttpTarget(f"http://127.0.0.1:{server.server_address[1]}/api/v1/events")
            rates.append(_run(store, f"http-{number}", http, http.url))
            http.close()
        server.shutdown()
        server.server_close()
        thread.join()
        store.close()
        print(f"HTTP on loopback, batches of {BATCH}: {statistics.median(rates):,.0f} events/s")


class _Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Reads a batch and takes it."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Says nothing."""


def _run(store: Store, name: str, target: FileTarget | HttpTarget, to: str) -> float:
    row = consumer.begin(store, name, to, None, START_MS)
    working = consumer.Consumer(store, row, target, batch=BATCH, random=random.SystemRandom().random)
    begun = time.perf_counter()
    while working.step():
        pass
    assert working.position == RECORDS
    return RECORDS / (time.perf_counter() - begun)


def _fill(tx: Transaction) -> None:
    tx.add_vehicle(VIN, SOURCE, [], START_MS)
    tx.add_entitlement(
        EntitlementRow(RIGHT, VIN, "seat-heating", "acc-4711", 1, b"", START_MS, 0, "", 1, START_MS)
    )
    rows, previous = [], bytes(32)
    for seq in range(1, RECORDS + 1):
        content = usage_pb2.UsageRecord(
            id=f"{JOURNAL}/{seq}",
            source=SOURCE,
            subject="acc-4711",
            feature_id="seat-heating",
            meter_id="active-time",
            value=60_000,
            unit=usage_pb2.UNIT_MILLISECOND,
            dimensions=[usage_pb2.Dimension(name="motion", value="driving")],
            entitlement_id=RIGHT,
            window_start_ms=START_MS,
            window_end_ms=START_MS + 60_000,
            seq=seq,
            prev_hash=previous,
            clock_trust=usage_pb2.CLOCK_TRUST_SIGNED,
            trace_id=f"{seq:032x}",
        ).SerializeToString(deterministic=True)
        previous = hashlib.sha256(content).digest()
        rows.append(UsageRow(JOURNAL, seq, content, previous))
    tx.add_usage(SOURCE, rows, [1] * RECORDS, START_MS)
