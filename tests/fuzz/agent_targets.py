"""What the agent parses: the cloud's messages, the bus, its files, its local interface."""

from __future__ import annotations

import functools
import hashlib
import json
import socket
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from fuzz.registry import chosen, cut, joined, register, scratch, target
from google.protobuf.message import DecodeError
from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner
from support import edge_ecu, trust_repo
from support.signals_data import DEMO_SIGNALS, SIMULATED_DBC, SMALL_DBC, simulated_database
from tuf.api.metadata import TargetFile
from vectors import make_token_vectors as signer

from agent.adapters import local_api
from agent.adapters.bus import BusLostError
from agent.adapters.floors_file import FloorsFile
from agent.adapters.link import server_roots
from agent.adapters.slcan_lines import LineDecoder, Selection
from agent.adapters.socketcand import SocketcandBus
from agent.config import AgentConfig
from agent.errors import (
    ConditionError,
    DatabaseError,
    FloorsError,
    NoValidAnchorError,
    TrustError,
    VehicleError,
)
from agent.features.conditions import Condition
from agent.model import ConditionSpec, TlsAnchor, TrustBytes
from agent.signals import database, kuksa, mapping, table
from agent.signals.compiler import compile_table
from agent.signals.decoder import decoder, taker
from agent.trust import binding
from agent.trust.anchors import parse_tls_anchors
from agent.trust.catalogue import parse_feature
from agent.trust.token import parse_announcement, parse_token, verify_token
from agent.trust.verifier import Floors, verify_bundle, verify_update
from agent.wire import entitlements_from_bytes, trust_bytes_to_proto, trust_update_from_proto
from common.config import ConfigError, parse
from openfod.vehicle.v1 import vehicle_service_pb2

DEMO = Path(__file__).parents[2] / "deploy/demo"
VIN = trust_repo.VIN


# --- trust ---------------------------------------------------------------------


class World:
    """A cloud that has granted two rights, and a vehicle with nothing but its roots."""

    def __init__(self) -> None:
        self.cloud = trust_repo.Cloud()
        self.vehicle = trust_repo.Vehicle(self.cloud)
        self.cloud.director.add_root()
        self.cloud.catalogue.add_root()
        self.cloud.grant()
        self.cloud.grant(trust_repo.LOGBOOK)

    def answer(self, *, offline: bool = False) -> TrustBytes:
        """The whole update."""
        return self.cloud.answer(None if offline else self.vehicle.nonce, offline=offline)

    def verify(self, update: TrustBytes) -> bool:
        """Takes an update as the vehicle does; its state stays."""
        verify_update(
            self.vehicle.stored, update, vin=VIN, nonce=self.vehicle.nonce, now_ms=0, floors=Floors()
        )
        return True


@functools.cache
def world() -> World:
    """One for all inputs."""
    return World()


def update_bytes(*, offline: bool = False) -> list[bytes]:
    """A serialised TrustUpdate."""
    return [trust_bytes_to_proto(world().answer(offline=offline)).SerializeToString(deterministic=True)]


def read_update(content: bytes) -> TrustBytes:
    """As the link reads it: gRPC ends a stream whose bytes are no message."""
    return trust_update_from_proto(vehicle_service_pb2.TrustUpdate.FromString(content))


register(
    "trust-update",
    lambda content: world().verify(read_update(content)),
    (TrustError, DecodeError),
    update_bytes,
    max_bytes=65_536,
)
register(
    "trust-bundle",
    lambda content: verify_bundle(
        world().vehicle.stored, read_update(content), vin=VIN, now_ms=0, floors=Floors()
    ),
    (TrustError, DecodeError),
    lambda: update_bytes(offline=True),
    max_bytes=65_536,
)

ROLES = [
    (name, role)
    for name in ("director", "catalogue")
    for role in ("root", "targets", "snapshot", "timestamp")
]


def signed_parts() -> Iterable[bytes]:
    """The signed part of each metadata file, behind its number."""
    update = world().answer()
    for number, (name, role) in enumerate(ROLES):
        repository = getattr(update, name)
        content = repository.roots[0] if role == "root" else getattr(repository, role)
        yield bytes([number]) + json.dumps(json.loads(content)["signed"]).encode()


@target("trust-signed", signed_parts)
def trust_signed(content: bytes) -> bool:
    """Anything that the genuine keys of a role have signed: what lies behind the signatures."""
    number, part = chosen(content, len(ROLES))
    name, role = ROLES[number]
    here = world()
    repository = getattr(here.cloud, name)
    signed = resigned(part, repository.keys[role])
    snapshot, timestamp = repository.snapshot_bytes, here.cloud.catalogue_timestamp
    if role == "snapshot":  # the timestamp holds its hash
        repository.snapshot_bytes = signed
        here.cloud.catalogue_timestamp = here.cloud.catalogue.stamp()
    try:
        update = here.answer()
    finally:
        repository.snapshot_bytes, here.cloud.catalogue_timestamp = snapshot, timestamp
    parts: dict[str, Any] = {"roots": (signed,)} if role == "root" else {role: signed}
    changes: dict[str, Any] = {name: replace(getattr(update, name), **parts)}
    try:
        return here.verify(replace(update, **changes))
    except TrustError:
        return False


def resigned(part: bytes, keys: Iterable[CryptoSigner]) -> bytes:
    """Signs a JSON object; what has no canonical form stays as it is, with signatures that do not hold."""
    try:
        message = str(encode_canonical(json.loads(part))).encode()
    except (ValueError, RecursionError, FormatError):
        message = b""
    signatures = json.dumps([key.sign(message).to_dict() for key in keys]).encode()
    return b'{"signed":' + part + b',"signatures":' + signatures + b"}"


def target_files() -> Iterable[bytes]:
    """Each file that the director signs, behind its number."""
    return [bytes([n]) + world().cloud.files[path] for n, path in enumerate(sorted(world().cloud.files))]


@target("trust-target", target_files)
def trust_target(content: bytes) -> bool:
    """Any bytes as a file that the director has signed: entitlements and tokens."""
    cloud = world().cloud
    paths = sorted(cloud.files)
    number, file = chosen(content, len(paths))
    path = paths[number]
    files, listed = cloud.files, cloud.director.targets
    version = cloud.director.version
    info = TargetFile.from_data(path, file, ["sha256"])
    info.unrecognized_fields = listed[path].unrecognized_fields
    try:
        cloud.files, cloud.director.targets = {**files, path: file}, {**listed, path: info}
        cloud.director.publish(version)
        return world().verify(world().answer())
    except TrustError:
        return False
    finally:
        cloud.files, cloud.director.targets = files, listed
        cloud.director.publish(version)


def timestamps() -> list[bytes]:
    """Director timestamps, of the stream and of a file."""
    return [world().answer().director.timestamp, world().answer(offline=True).director.timestamp]


@target("metadata", timestamps)
def metadata(content: bytes) -> bool:
    """What is read of metadata before any signature."""
    try:
        read = binding.read_metadata(content, "director timestamp", limit=16_384)
        binding.check_vehicle(read, VIN)
        binding.signed_time_ms(read)
    except TrustError:
        return False
    checks: list[Callable[[], None]] = [
        lambda: binding.check_live(read, world().vehicle.nonce),
        lambda: binding.check_offline(read),
    ]
    return any(_holds(check) for check in checks)


def _holds(check: Callable[[], None]) -> bool:
    try:
        check()
    except TrustError:
        return False
    return True


register(
    "entitlements",
    lambda content: entitlements_from_bytes(content, VIN),
    TrustError,
    lambda: [world().cloud.files["entitlements.pb"]],
)
register(
    "feature-file",
    parse_feature,
    TrustError,
    lambda: [path.read_bytes() for path in sorted((DEMO / "catalogue/features").rglob("*.toml"))],
)
register(
    "tls-anchors",
    parse_tls_anchors,
    TrustError,
    lambda: [b'{"servers": [{"certificate": "MIIB", "not_before_ms": 0, "not_after_ms": 253402300799000}]}'],
)


@target("tls-certificate", lambda: [certificate()])
def tls_certificate(content: bytes) -> bool:
    """What the director signed as a server's certificate."""
    try:
        return bool(server_roots([TlsAnchor(content, 0, 2)], b"", 1))
    except NoValidAnchorError:
        return False


def certificate() -> bytes:
    """A certificate that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloud.example")])
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(begin).not_valid_after(begin + timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


@target("agent-token", lambda: [signer.GOOD, *tokens()])
def agent_token(content: bytes) -> bool:
    """Read as the agent reads it, and verified as its ECU does."""
    try:
        claims = parse_token(content)
    except TrustError:
        return False
    try:
        verified = verify_token(content, signer.KEY_1.public, signer.VIN, signer.UID)
    except TrustError:
        return False
    assert verified == claims
    return True


def tokens() -> list[bytes]:
    """Every token that the golden vectors accept."""
    vectors = json.loads((Path(signer.__file__).parent / "token.json").read_text())
    kid = signer.KEY_1.kid.hex()
    return [t for v in vectors["accepted"] if kid in (t := bytes.fromhex(v["token"])).hex()]


register(
    "token-announcement",
    parse_announcement,
    TrustError,
    lambda: [signer.announcement(1, signer.KEY_1)],
)


@target("floors-file", lambda: [floors_file()])
def floors(content: bytes) -> bool:
    """The second copy of the floors, in a folder that others may reach."""
    file = FloorsFile(scratch(), VIN)
    file.path.write_bytes(content)
    try:
        return file.read() is not None
    except FloorsError:
        return False


def floors_file() -> bytes:
    """A floors file as it is written."""
    file = FloorsFile(scratch(), VIN)
    file.write(
        Floors(time_ms=1, token_counters={("seat-module", "seat-heating"): 7}, releases={"seat-heating": 1})
    )
    return file.path.read_bytes()


# --- the bus ---------------------------------------------------------------------

ANSWERS = (
    [(0, bytes.fromhex("04 62 F0 01 01"))],
    [(0, bytes.fromhex("10 0A 62 F0 01 01 02 03")), (0, bytes.fromhex("21 04 05 06 07"))],
    [(0, bytes.fromhex("03 7F 22 78")), (0, bytes.fromhex("04 62 F0 01 01"))],
)


@target("uds", lambda: [joined(*pieces) for pieces in ANSWERS], max_bytes=2_048)
def uds(content: bytes) -> bool:
    """Frames that answer a read, come from elsewhere, or come late."""
    bench = edge_ecu.Bench()
    bench.start(edge_ecu.READ)
    for number, data in cut(content):
        can_id = edge_ecu.SEAT.response_id if number < 12 else edge_ecu.SEAT.request_id
        bench.hear(data, can_id)
        bench.pass_s((0, 0, 0, 1)[number % 4])
    bench.pass_s(20)
    bench.pass_s(20)
    assert len(bench.outcomes) == 1
    error = bench.outcomes[0].error
    assert error is None or isinstance(error, VehicleError)
    return error is None


FRAMES = b"< frame 123 1.500000 0102 >< frame 18DAF110 2.000000 03 04 >\n< error 4 3.0 >< frame 001 4.0  >"
HANDSHAKE = b"< hi >< ok >< ok >"


class _Stream(socket.socket):
    """A local stream that takes TCP's options for done."""

    def setsockopt(self, *_: Any) -> None:
        return


@target("socketcand", lambda: [HANDSHAKE + FRAMES, HANDSHAKE])
def socketcand(content: bytes) -> bool:
    """What a server says before, in and after the handshake."""
    ours, theirs = socket.socketpair()
    near = _Stream(fileno=ours.detach())
    with near, theirs:
        theirs.sendall(content)
        theirs.shutdown(socket.SHUT_WR)
        try:
            with mock.patch("socket.create_connection", return_value=near):
                bus = SocketcandBus("can0", "127.0.0.1", 1)
        except (OSError, BusLostError):
            return False
        end = _read_all(bus)
        bus.close()
    return not bus.malformed and "closed the connection" in end


def _read_all(bus: SocketcandBus) -> str:
    while True:
        try:
            bus.read(0)
        except BusLostError as error:  # the stream's end, its length, or too much that is no frame
            return str(error)


SLCAN_LINES = (
    b"z\rt1232AABB\rT18DAF1103010203\rF00\rt7E80\rr1238\r\rsa000000\r",
    b"t1232AABBEA5F\rt12301234\rT000001231AA0001\r",
    b"d1239" + b"00" * 12 + b"\rB18DAF110F" + b"AA" * 64 + b"\r",
)


@target("slcan-lines", lambda: [bytes([n]) + lines for n in (1, 7, 60) for lines in SLCAN_LINES])
def slcan_lines(content: bytes) -> bool:
    """What an adapter sends, in pieces of a size, or whole: the frames are the same."""
    size = max(1, content[0]) if content else 1
    lines = content[1:]
    whole, decoder = LineDecoder(), LineDecoder()
    decoder.selection = whole.selection = Selection(None, frozenset({0x7E8}))
    expected = whole.decode(lines, 0, 1000)
    frames = [
        frame
        for at in range(0, len(lines), size)
        for frame in decoder.decode(lines[at : at + size], at, at + size)
    ]
    assert [f[:2] for f in frames] == [f[:2] for f in expected]
    assert all(0 <= f.at_ns <= 1000 and len(f.data) <= 64 for f in expected)
    assert [f.at_ns for f in frames] == sorted(f.at_ns for f in frames)
    return decoder.dropped == 0


# --- files and the local interface --------------------------------------------------


register(
    "agent-config",
    lambda content: parse(content, DEMO / "agent.toml", AgentConfig),
    ConfigError,
    lambda: [agent_config()],
)


def agent_config() -> bytes:
    """The demo's agent.toml, without the files that the demo makes."""
    lines = (DEMO / "agent.toml").read_text().splitlines()
    here = str(SIMULATED_DBC)
    keys = ("root_ca", "director_root", "catalogue_root", "receipt_key")
    return "\n".join(
        f'{line.split("=")[0]}= "{here}"' if line.startswith(keys) else line for line in lines
    ).encode()


@target("signal-mapping", lambda: [DEMO_SIGNALS.read_bytes()])
def signal_mapping(content: bytes) -> bool:
    """Which signal is which, in our own form."""
    return _maps(content, mapping.read, "signals.toml")


KUKSA = b"""{"Vehicle": {"type": "branch", "children": {
  "Speed": {"type": "sensor", "datatype": "float", "unit": "km/h", "min": 0, "max": 300,
    "dbc2vss": {"signal": "VehicleSpeed", "interval_ms": 100, "on_change": true}},
  "Gear": {"type": "sensor", "datatype": "int8", "dbc2vss": {"signal": "Gear",
    "transform": {"mapping": [{"from": "P", "to": 0}, {"from": "D", "to": 1}]}}},
  "Heat": {"type": "actuator", "datatype": "uint8", "unit": "percent",
    "dbc2vss": {"signal": "BatteryVoltage", "transform": {"math": "floor(min(x*7+1, 100)^1)"}}}}},
 "openfod": {"messages": [{"name": "PT_SPEED", "check": "openfod-j1850"}]}}
"""


@target("kuksa-mapping", lambda: [KUKSA])
def kuksa_mapping(content: bytes) -> bool:
    """Which signal is which, in Kuksa's form."""
    return _maps(content, kuksa.read, "vss_dbc.json")


def _maps(
    content: bytes, read: Callable[[bytes, Path, database.SignalDatabase], mapping.SignalMapping], name: str
) -> bool:
    try:
        found = compile_table(simulated(), read(content, Path(name), simulated()))
    except DatabaseError:
        return False
    for row in found.messages:
        decoder(row)(bytes(row.length))
    return True


@functools.cache
def stored_table() -> bytes:
    """The simulated vehicle's table as it is kept."""
    found = mapping.read(DEMO_SIGNALS.read_bytes(), DEMO_SIGNALS, simulated())
    return table.to_bytes(compile_table(simulated(), found), "key")


@target("signal-table", lambda: [stored_table()])
def signal_table(content: bytes) -> bool:
    """The stored table of a bus; its hash is made right, so that what is behind it is reached."""
    body = content.partition(b"\n")[2]
    head = f"openfod-signals key {hashlib.sha256(body).hexdigest()}\n"
    try:
        found = table.from_bytes(head.encode() + body, "key")
    except DatabaseError:
        return False
    for row in found.messages:
        decoder(row)(bytes(row.length))
        taker(row)
    return True


@functools.cache
def simulated() -> database.SignalDatabase:
    """The simulated vehicle's database."""
    return simulated_database()


KCD = b"""<?xml version="1.0" encoding="UTF-8"?>
<NetworkDefinition xmlns="http://kayak.2codeornot2code.org/1.0">
  <Document/>
  <Bus name="body"><Message id="0x100" length="8" name="SPEEDS">
    <Signal name="SPEED" offset="0" length="16"><Value slope="0.01" unit="km/h"/></Signal>
  </Message></Bus>
</NetworkDefinition>
"""
SYM = b"""FormatVersion=6.0 // Do not edit this line!
Title="small"

{SENDRECEIVE}

[SPEEDS]
ID=100h
Len=8
Var=SPEED unsigned 0,16 /u:"km/h" /f:0.01
"""


def load_database(suffix: str) -> Callable[[bytes], object]:
    """A loader of a file of this kind."""

    def load(content: bytes) -> object:
        return database.read(content, Path(f"signals.{suffix}"))

    return load


register("dbc", load_database("dbc"), DatabaseError, lambda: [SMALL_DBC.encode(), SIMULATED_DBC.read_bytes()])
register("kcd", load_database("kcd"), DatabaseError, lambda: [KCD])
register("sym", load_database("sym"), DatabaseError, lambda: [SYM])

INPUTS = ("Vehicle.Speed", "Vehicle.State")
CONDITIONS = (
    "Vehicle.Speed < 5.0 && Vehicle.State == 'ON'",
    "Vehicle.State in ['ON', 'START'] || !(int(Vehicle.Speed) % 2 == 1)",
    "size(Vehicle.State) > 1 ? Vehicle.State.startsWith('O') : Vehicle.Speed * 2.0 - 1.0 >= 0.5",
)


@target("condition", lambda: [text.encode() for text in CONDITIONS], max_bytes=2_048)
def condition(content: bytes) -> bool:
    """A condition of the catalogue, compiled and evaluated."""
    try:
        compiled = Condition.compile(ConditionSpec(content.decode("utf-8", errors="replace"), INPUTS))
    except ConditionError:
        return False
    for speed in (0, 3.5, -1e308, 2**62):
        answer = compiled.evaluate({"Vehicle.Speed": speed, "Vehicle.State": "ON"})
        assert answer in (True, False, None)
        assert compiled.evaluate({"Vehicle.Speed": speed}) is None
    return True


REQUEST = b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@target("local-api", lambda: [REQUEST])
def local_request(content: bytes) -> bool:
    """A request to the local interface."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(content)
        theirs.shutdown(socket.SHUT_WR)
        server = SimpleNamespace(status=lambda: {"features": []})
        local_api._Handler(ours, "", cast("Any", server))
        try:
            answer = theirs.recv(65_536, socket.MSG_DONTWAIT)
        except BlockingIOError:  # nothing that deserves an answer
            return False
        return answer.startswith(b"HTTP/1.0 200 ")
