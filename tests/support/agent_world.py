"""The real agent without its network: real store, verifier, engine and loop, and clocks that are set.

The cloud is the one in memory (`support.trust_repo`); what the agent sends it
is kept in a list. Everything else is what `fod-agent run` puts together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.edge_cloud import authority, issue
from support.trust_repo import NOW_MS, VIN, Cloud

from agent import config as agent_config
from agent import events as ev
from agent.adapters import identity
from agent.adapters.clock import SystemClock
from agent.app import App
from agent.model import TrustBytes
from agent.wire import trust_bytes_to_proto
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

SOURCE = "veh-0123456789abcdef"
MAX_ROUNDS = 50

AGENT = """
[vehicle]
vin = "{vin}"
[cloud]
endpoint = "127.0.0.1:{port}"
enrolment_endpoint = "127.0.0.1:{port}"
root_ca = "ca.crt"
[trust]
director_root = "director.json"
catalogue_root = "catalogue.json"
receipt_key = "receipt.pub"
[state]
directory = "state"
floors_directory = "floors"
[[buses]]
name = "body"
interface = "virtual"
channel = "agent-world"
"""


class Machine(SystemClock):
    """Clocks that stand until they are moved.

    Attributes:
        true_ms: the true time; nobody but the test knows it.
        wall_ms: what the machine's wall clock says; None: the truth.
    """

    def __init__(self, true_ms: int = NOW_MS) -> None:
        self.true_ms = true_ms
        self.wall_ms: int | None = None
        self.boots = 1
        self._started_ms = true_ms - 1000

    def monotonic_ns(self) -> int:
        return (self.true_ms - self._started_ms) * 1_000_000

    def wall_ns(self) -> int:
        return (self.true_ms if self.wall_ms is None else self.wall_ms) * 1_000_000

    def boot_id(self) -> str:
        return f"boot-{self.boots}"

    def stand(self, duration_ms: int) -> None:
        """The vehicle stands, switched off, and boots again."""
        self.true_ms += duration_ms
        self._started_ms = self.true_ms - 1000
        self.boots += 1


class _Wire:
    """What the agent takes for its link: keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[pb.ConnectRequest] = []

    def send(self, request: pb.ConnectRequest) -> None:
        self.sent.append(request)

    def recheck(self) -> None:
        """Nothing to look at: there is no TLS."""

    def stop(self) -> None:
        """Nothing to end."""


class Life:
    """One run of the agent, from boot to end."""

    def __init__(self, app: App, cloud: Cloud, machine: Machine) -> None:
        self.app, self.cloud, self.machine = app, cloud, machine
        self.wire = _Wire()
        app._link = self.wire  # type: ignore[assignment]
        self.tell(app._booted)

    def tell(self, event: ev.Event) -> None:
        """Gives the agent an event, and waits until all that follows is done."""
        self.app._step(event)
        self.settle()

    def settle(self) -> None:
        """Waits for disk and verification, and takes what they post."""
        for _ in range(MAX_ROUNDS):
            for pool in (self.app._worker, self.app._writer, self.app._worker):
                pool.submit(int).result()
            try:
                item = self.app._queue.get_nowait()
            except Empty:
                return
            self.app._take_item(item)
        raise AssertionError("the agent does not come to rest")

    def greet(self) -> pb.Hello:
        """Opens a stream; returns what the agent says first."""
        self.wire.sent.clear()
        self.tell(ev.LinkUp())
        return next(request.hello for request in self.wire.sent if request.HasField("hello"))

    def contact(self, answer: Callable[[bytes], TrustBytes] | None = None) -> pb.UpdateResult:
        """One contact with the cloud; returns how the agent ended its answer."""
        nonce = self.greet().nonce
        self.tell(ev.UpdateArrived((answer or self.cloud.answer)(nonce)))
        results = [r.update_result for r in self.wire.sent if r.HasField("update_result")]
        self.tell(ev.LinkDown("the test is over"))
        return results[-1]

    def bring(self, content: bytes) -> dict[str, object]:
        """Hands the agent a file of rights; raises what it is refused for."""
        answer: Future[dict[str, object]] = Future()
        self.app._verify_bundle(content, answer)
        self.settle()
        return answer.result(timeout=0)

    @property
    def live(self) -> frozenset[str]:
        """Features whose rights are live now."""
        self.tell(ev.Ticked())
        return self.app._engine._live

    @property
    def status(self) -> dict[str, Any]:
        """As `fod-agent status` gets it."""
        return self.app._status()

    @property
    def time(self) -> tuple[int, str]:
        """Trusted time and its source."""
        now = self.app._engine.trusted_time(self.machine.monotonic_ns())
        return now.unix_ms, now.source


class AgentWorld:
    """A vehicle's disk, its machine, and its cloud."""

    def __init__(self, folder: Path, cloud: Cloud | None = None, *, port: int = 1) -> None:
        self.folder, self.cloud, self.machine = folder, cloud or Cloud(), Machine()
        provisioned = self.cloud.provisioned()
        (folder / "director.json").write_bytes(provisioned.director.roots[0])
        (folder / "catalogue.json").write_bytes(provisioned.catalogue.roots[0])
        (folder / "ca.crt").write_bytes(authority().pem)
        key = Ed25519PrivateKey.generate().public_key()
        (folder / "receipt.pub").write_bytes(
            key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
        self.path = folder / "agent.toml"
        self.path.write_text(AGENT.format(vin=VIN, port=port))
        self.config = agent_config.load(self.path)
        device_key = identity.make_key(self.state)
        identity.save(self.state, issue("vehicle", authority(), device_key).der, SOURCE)

    @property
    def state(self) -> Path:
        """Folder of identity and database."""
        return self.folder / "state"

    @property
    def floors(self) -> Path:
        """The second copy of the floors."""
        return self.folder / "floors" / "floors.json"

    @contextmanager
    def boot(self) -> Iterator[Life]:
        """Runs the agent until the with-block ends."""
        app = App(self.config, self.machine)
        try:
            yield Life(app, self.cloud, self.machine)
        finally:
            app._worker.shutdown()
            app._writer.shutdown()
            app._store.close()

    def supplied(self, **fields: Any) -> None:
        """One contact, after which the vehicle holds the right to heat its seat."""
        self.cloud.grant(**fields)
        with self.boot() as life:
            assert life.contact().error_type == ""

    def image(self, name: str) -> Path:
        """Copies the folder with the database, as an attacker would the disk."""
        return Path(shutil.copytree(self.state, self.folder / name))

    def restore(self, image: Path) -> None:
        """Puts such a copy in its place."""
        shutil.rmtree(self.state)
        shutil.copytree(image, self.state)


def bundle(cloud: Cloud) -> bytes:
    """The cloud's present rights as a file."""
    return trust_bytes_to_proto(cloud.answer(None, offline=True)).SerializeToString()
