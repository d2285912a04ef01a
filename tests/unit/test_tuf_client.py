"""The plain TUF client over the agent's trust code: the areas of the public conformance suite."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from support.tuf_server import EXPIRES, PAST, Client, Repository, Server
from tools.tuf_client import AbsentError, fetch, main
from tuf.api.metadata import Role, Root, Snapshot, Targets, Timestamp

from agent.errors import LimitError, TransportError

PROGRAM = Path(__file__).parents[1] / "tools/tuf_client.py"
ONLINE = (Timestamp.type, Snapshot.type)


@pytest.fixture(params=[True, False], ids=["consistent", "plain"])
def repository(request: pytest.FixtureRequest) -> Repository:
    return Repository(consistent=request.param)


@pytest.fixture
def client(repository: Repository, tmp_path: Path) -> Iterator[Client]:
    server = Server(repository)
    yield Client(repository, server.url, tmp_path)
    server.close()


def refused(client: Client) -> None:
    """Assert that a refresh fails and that every trusted file stays as it is."""
    before = {path.name: path.read_bytes() for path in client.metadata.iterdir()}
    assert client.refresh() == 1
    assert {path.name: path.read_bytes() for path in client.metadata.iterdir()} == before


# --- init and refresh --------------------------------------------------------


def test_init_requests_nothing_and_keeps_the_root(client: Client) -> None:
    assert client.repository.requests == []
    assert (client.metadata / "root.json").read_bytes() == client.first.read_bytes()


def test_a_refresh_asks_in_order_and_keeps_every_byte(client: Client) -> None:
    assert client.refresh() == 0
    one = "1." if client.repository.root.consistent_snapshot else ""
    assert client.repository.requests == [
        f"/m/{file}"
        for file in ("2.root.json", "timestamp.json", f"{one}snapshot.json", f"{one}targets.json")
    ]
    for path, content in client.repository.files.items():
        assert (client.metadata / path.split("/")[-1].removeprefix("1.")).read_bytes() == content


def test_a_second_refresh_fetches_only_what_may_be_new(client: Client) -> None:
    assert client.refresh() == 0
    client.repository.requests.clear()
    assert client.refresh() == 0
    assert client.repository.requests == ["/m/2.root.json", "/m/timestamp.json"]


def test_a_root_that_is_unsigned_or_no_root_is_not_taken_at_init(client: Client, tmp_path: Path) -> None:
    for content in (client.repository.sign(client.repository.root, []), b"{}", b"\xff"):
        (tmp_path / "bad.json").write_bytes(content)
        assert main(["--metadata-dir", str(tmp_path / "new"), "init", str(tmp_path / "bad.json")]) == 1
        assert not (tmp_path / "new").exists()


def test_without_a_trusted_root_nothing_is_requested(client: Client) -> None:
    (client.metadata / "root.json").write_bytes(b"{}")
    refused(client)
    assert client.repository.requests == []


# --- roots, thresholds and keys ----------------------------------------------


def test_ten_roots_are_followed_at_once(client: Client) -> None:
    for _ in range(10):
        client.repository.rotate(Root.type)
    assert client.refresh() == 0
    assert client.versions()["root"] == 11


@pytest.mark.parametrize("lacking", ["old", "new"])
def test_a_root_without_the_old_or_the_new_keys_is_refused(client: Client, lacking: str) -> None:
    assert client.refresh() == 0
    repository = client.repository
    old, new = repository.keys[Root.type], [CryptoSigner.generate_ed25519()]
    repository.root.revoke_key(old[0].public_key.keyid, Root.type)
    repository.root.add_key(new[0].public_key, Root.type)
    repository.next_root(new if lacking == "old" else old)
    refused(client)


@pytest.mark.parametrize("version", [1, 3])
def test_a_root_of_another_version_than_the_next_is_refused(client: Client, version: int) -> None:
    assert client.refresh() == 0
    client.repository.root.version = version
    signed = client.repository.sign(client.repository.root, client.repository.keys[Root.type])
    client.repository.files["/m/2.root.json"] = signed
    refused(client)


def test_a_threshold_that_is_raised_counts_at_once(client: Client) -> None:
    assert client.refresh() == 0
    repository = client.repository
    second = CryptoSigner.generate_ed25519()
    repository.root.add_key(second.public_key, Snapshot.type)
    repository.root.roles[Snapshot.type].threshold = 2
    repository.next_root()
    repository.publish(bump=Targets.type)
    assert client.refresh() == 1
    assert client.versions() == {"root": 2, "timestamp": 2, "snapshot": 1, "targets": 1}
    repository.keys[Snapshot.type].append(second)
    repository.publish()
    assert client.refresh() == 0
    assert client.versions()["snapshot"] == 2


@pytest.mark.parametrize(
    "spelled", [str.lower, str.upper, "{}\n".format], ids=["alike", "capitals", "line-break"]
)
def test_one_key_under_two_ids_counts_once(client: Client, spelled: Callable[[str], str]) -> None:
    repository = client.repository
    key = repository.keys[Snapshot.type][0].public_key
    twin = type(key)("0" * 64, key.keytype, key.scheme, {"public": spelled(key.keyval["public"])})
    repository.root.keys[twin.keyid] = twin
    repository.root.roles[Snapshot.type] = Role([key.keyid, twin.keyid], 2)
    repository.next_root()
    private = repository.keys[Snapshot.type][0]._private_key
    repository.keys[Snapshot.type].append(CryptoSigner(private, twin))
    repository.publish()
    assert client.refresh() == 1
    assert "snapshot" not in client.versions()
    assert client.versions()["root"] == 2


def test_key_ids_that_nobody_knows_are_ignored(client: Client) -> None:
    client.repository.root.roles[Snapshot.type].keyids.append("f" * 64)
    client.repository.next_root()
    assert client.refresh() == 0


def test_a_key_id_need_not_be_a_hash(client: Client) -> None:
    repository = client.repository
    signer = CryptoSigner.generate_ecdsa()
    key = signer.public_key
    named = type(key)("any-name", key.keytype, key.scheme, key.keyval)
    repository.root.add_key(named, Snapshot.type)
    repository.keys[Snapshot.type] = [CryptoSigner(signer._private_key, named)]
    repository.next_root()
    repository.publish()
    assert client.refresh() == 0


def test_unknown_fields_are_under_the_signature_and_kept(client: Client) -> None:
    client.repository.root.unrecognized_fields["note"] = {"a": [1, 2]}
    client.repository.next_root()
    assert client.refresh() == 0
    assert client.versions()["root"] == 2


# --- rollback and fast-forward ------------------------------------------------


@pytest.mark.parametrize("role", [Timestamp.type, Snapshot.type, Targets.type])
def test_an_older_version_of_each_role_is_refused(client: Client, role: str) -> None:
    repository = client.repository
    repository.publish(bump=Targets.type)
    assert client.refresh() == 0
    repository.timestamp.version += {Timestamp.type: -1}.get(role, 1)
    if role == Snapshot.type:
        repository.snapshot.version = 1
    if role == Targets.type:
        repository.snapshot.version += 1
        repository.targets[Targets.type].version = 1
    repository.publish()
    before = client.versions()
    assert client.refresh() == 1
    assert client.versions() == before | ({"timestamp": 3} if role == Targets.type else {})


def test_a_timestamp_of_the_same_version_changes_nothing(client: Client) -> None:
    assert client.refresh() == 0
    kept = (client.metadata / "timestamp.json").read_bytes()
    client.repository.timestamp.snapshot_meta.version = 100
    client.repository.publish_timestamp()
    assert client.refresh() == 0
    assert (client.metadata / "timestamp.json").read_bytes() == kept


def test_a_snapshot_that_drops_a_role_is_refused(client: Client) -> None:
    client.repository.delegate(Targets.type, "a", ["*"])
    client.repository.publish(bump=Targets.type)
    assert client.refresh() == 0
    del client.repository.snapshot.meta["a.json"]
    client.repository.snapshot.version += 1
    client.repository.timestamp.version += 1
    client.repository.publish_snapshot()
    assert client.refresh() == 1
    assert client.versions()["snapshot"] == 2


@pytest.mark.parametrize("rotated", [ONLINE, ONLINE[:1], ONLINE[1:]], ids="+".join)
@pytest.mark.parametrize("halfway", [False, True])
def test_a_fast_forward_is_undone_by_rotated_keys(
    client: Client, rotated: tuple[str, ...], halfway: bool
) -> None:
    repository = client.repository
    repository.timestamp.version = repository.snapshot.version = 2**30
    repository.targets[Targets.type].version = 2**30
    repository.publish()
    assert client.refresh() == 0
    for role in rotated:
        repository.rotate(role)
    if halfway:  # the new root is kept, the rest does not come
        del repository.files["/m/timestamp.json"]
        assert client.refresh() == 1
    repository.timestamp.version = repository.snapshot.version = 1
    repository.targets[Targets.type].version = 1
    repository.publish()
    assert client.refresh() == 0
    assert client.versions() == {"root": 1 + len(rotated), "timestamp": 1, "snapshot": 1, "targets": 1}


def test_without_a_rotation_a_fast_forward_stands(client: Client) -> None:
    repository = client.repository
    repository.timestamp.version = 2**30
    repository.publish_timestamp()
    assert client.refresh() == 0
    repository.next_root()
    repository.timestamp.version = 2
    repository.publish_timestamp()
    assert client.refresh() == 1
    assert client.versions()["timestamp"] == 2**30


# --- expiry ------------------------------------------------------------------


@pytest.mark.parametrize("role", [Root.type, Timestamp.type, Snapshot.type, Targets.type])
def test_the_expired_role_is_refused_and_what_stands_before_it_is_kept(client: Client, role: str) -> None:
    repository = client.repository
    assert client.refresh() == 0
    online = {Timestamp.type: repository.timestamp, Snapshot.type: repository.snapshot}
    (online | {Root.type: repository.root, Targets.type: repository.targets[Targets.type]})[
        role
    ].expires = PAST
    repository.next_root()
    repository.publish(bump=Targets.type)
    assert client.refresh() == 1
    taken = {Root.type: 1, Timestamp.type: 1, Snapshot.type: 2, Targets.type: 3}[role]
    roles = (Root.type, Timestamp.type, Snapshot.type, Targets.type)
    assert client.versions() == {name: 2 if place < taken else 1 for place, name in enumerate(roles)}


def test_only_the_last_root_must_not_have_expired(client: Client) -> None:
    client.repository.root.expires = PAST
    client.repository.next_root()
    client.repository.root.expires = EXPIRES
    client.repository.next_root()
    assert client.refresh() == 0
    assert client.versions()["root"] == 3


def test_stored_metadata_that_expired_still_holds_back_older_versions(client: Client) -> None:
    repository = client.repository
    repository.timestamp.expires = EXPIRES - timedelta(days=29)
    repository.publish(bump=Targets.type)
    assert client.refresh() == 0
    stored = repository.timestamp.version
    repository.timestamp.expires = PAST
    expired = repository.sign(repository.timestamp, repository.keys[Timestamp.type])
    (client.metadata / "timestamp.json").write_bytes(expired)
    repository.timestamp.expires = EXPIRES
    repository.timestamp.version = stored - 1
    repository.publish_timestamp()
    refused(client)
    repository.timestamp.version = stored + 1
    repository.publish_timestamp()
    assert client.refresh() == 0


# --- mix-and-match, hashes and lengths ---------------------------------------


@pytest.mark.parametrize("role", [Snapshot.type, Targets.type])
@pytest.mark.parametrize("hashes", [False, True])
def test_a_file_of_another_version_or_hash_is_refused(client: Client, role: str, hashes: bool) -> None:
    repository = client.repository
    assert client.refresh() == 0
    signed = {Snapshot.type: repository.snapshot, Targets.type: repository.targets[Targets.type]}[role]
    signed.unrecognized_fields["note"] = "listed"
    repository.hashes = hashes
    repository.publish(bump=Targets.type)
    number = "2." if repository.root.consistent_snapshot else ""
    if hashes:
        signed.unrecognized_fields["note"] = "served"  # as long, so that no limit stops it before
    else:
        signed.version += 1
    repository.files[f"/m/{number}{role}.json"] = repository.sign(signed, repository.keys[role])
    assert client.refresh() == 1
    assert client.versions()[role] == 1
    assert client.versions()["timestamp"] == 2


def test_a_refresh_that_fails_halfway_keeps_what_it_verified_and_goes_on(client: Client) -> None:
    repository = client.repository
    assert client.refresh() == 0
    repository.next_root()
    repository.publish(bump=Targets.type)
    path = next(path for path in repository.files if "2.targets" in path or path == "/m/targets.json")
    withheld = repository.files.pop(path)
    assert client.refresh() == 1
    assert client.versions() == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 1}
    repository.files[path] = withheld
    assert client.refresh() == 0
    assert client.versions()["targets"] == 2


# --- targets and delegations -------------------------------------------------


def test_targets_are_downloaded_and_not_fetched_again(client: Client) -> None:
    repository = client.repository
    repository.add_target("dir/a b.txt", b"one")
    repository.add_target("c", b"two")
    repository.publish(bump=Targets.type)
    assert client.download("dir/a b.txt", "c") == 0
    assert (client.targets / "dir%2Fa%20b.txt").read_bytes() == b"one"
    assert (client.targets / "c").read_bytes() == b"two"
    repository.requests.clear()
    assert client.download("dir/a b.txt", "c") == 0
    assert not [path for path in repository.requests if path.startswith("/t/")]
    repository.add_target("c", b"newer")
    repository.publish(bump=Targets.type)
    assert client.download("c") == 0
    assert (client.targets / "c").read_bytes() == b"newer"


@pytest.mark.parametrize("served", [b"onf", b"on", b"one and more"])
def test_a_target_of_other_hash_or_length_is_refused(client: Client, served: bytes) -> None:
    repository = client.repository
    repository.add_target("a", b"one")
    repository.publish(bump=Targets.type)
    path = next(path for path in repository.files if path.startswith("/t/"))
    repository.files[path] = served
    assert client.download("a") == 1
    assert not (client.targets / "a").exists()


def test_a_target_that_nobody_lists_fails_after_a_full_refresh(client: Client) -> None:
    assert client.download("nothing") == 1
    assert client.versions() == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}


def visited(repository: Repository) -> list[str]:
    """Return the delegated roles that were asked for, in order."""
    asked = [path for path in repository.requests if path.startswith("/m/")]
    names = [path.removeprefix("/m/").removesuffix(".json").split(".")[-1] for path in asked]
    return [name for name in names if name not in {"root", "timestamp", "snapshot", "targets"}]


@pytest.mark.parametrize(
    ("edges", "order"),
    [
        ([("targets", "A", "*", False), ("targets", "B", "*", False), ("A", "C", "*", False)], "ACB"),
        ([("targets", "A", "*", False), ("targets", "B", "*", False), ("A", "C", "*", True)], "AC"),
        ([("targets", "A", "*.py", False), ("targets", "B", "*", False)], "B"),
        ([("targets", "A", "*", False), ("A", "B", "*", False), ("B", "A", "*", False)], "AB"),
        ([("targets", "A", "*", True), ("targets", "B", "*", False), ("A", "C", "*", False)], "AC"),
        ([*(("targets", role, "*", False) for role in "ABC"), ("A", "B", "*", False)], "ABC"),
    ],
    ids=["preorder", "terminating-below", "path-mismatch", "cycle", "terminating-on-top", "twice"],
)
def test_delegations_are_searched_in_preorder(
    client: Client, edges: list[tuple[str, str, str, bool]], order: str
) -> None:
    for delegator, role, path, terminating in edges:
        client.repository.delegate(delegator, role, [path], terminating=terminating)
    client.repository.publish(bump=Targets.type)
    assert client.download("missing") == 1
    assert "".join(visited(client.repository)) == order


def test_a_delegated_role_gives_what_it_lists(client: Client) -> None:
    repository = client.repository
    repository.delegate(Targets.type, "A", ["a/*"])
    repository.add_target("a/file", b"by A", role="A")
    repository.add_target("b/file", b"not delegated", role="A")
    repository.publish(bump=Targets.type)
    assert client.download("a/file") == 0
    assert client.download("b/file") == 1
    assert [path.name for path in client.targets.iterdir()] == ["a%2Ffile"]


def test_a_delegated_role_below_its_threshold_is_refused(client: Client) -> None:
    repository = client.repository
    repository.keys["A"] = [CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519()]
    repository.delegate(Targets.type, "A", ["*"], threshold=2)
    repository.add_target("file", b"by A", role="A")
    signers = repository.keys["A"]
    repository.keys["A"] = signers[:1]
    repository.publish(bump=Targets.type)
    assert client.download("file") == 1
    assert "A" not in client.versions()
    repository.keys["A"] = signers
    repository.publish()
    assert client.download("file") == 0


def test_an_expired_delegated_role_is_refused(client: Client) -> None:
    repository = client.repository
    repository.delegate(Targets.type, "A", ["*"])
    repository.add_target("file", b"by A", role="A")
    repository.targets["A"].expires = PAST
    repository.publish(bump=Targets.type)
    assert client.download("file") == 1
    assert "A" not in client.versions()


def test_paths_are_delegated_by_hash_prefixes_and_in_bins(client: Client) -> None:
    repository = client.repository
    prefix = sha256(b"file").hexdigest()[:2]
    repository.delegate(Targets.type, "A", None, path_hash_prefixes=["ff" if prefix == "00" else "00"])
    repository.delegate(Targets.type, "B", None, path_hash_prefixes=[prefix])
    repository.add_target("file", b"by B", role="B")
    repository.publish(bump=Targets.type)
    assert client.download("file") == 0
    assert visited(repository) == ["B"]
    bins = repository.delegate_bins(3, "bin")
    name = bins.get_role_for_target("binned")
    repository.add_target("binned", b"in its bin", role=name)
    repository.publish(bump=Targets.type)
    repository.requests.clear()
    assert client.download("binned") == 0
    assert visited(repository) == [name]


def test_a_search_ends_after_a_limit_of_roles(client: Client) -> None:
    repository = client.repository
    for number in range(40):
        repository.delegate(Targets.type, f"r{number}", ["*"])
    repository.add_target("late", b"beyond the limit", role="r39")
    repository.publish(bump=Targets.type)
    assert client.download("late") == 1
    assert visited(repository) == [f"r{number}" for number in range(32)]


@pytest.mark.parametrize("role", ["?", "#", "/delegated", "../delegated", "a%2Fb", "ä"])
def test_role_names_of_any_spelling_stay_in_the_folder(client: Client, role: str, tmp_path: Path) -> None:
    client.repository.delegate(Targets.type, role, ["*"])
    client.repository.publish(bump=Targets.type)
    assert client.download("missing") == 1
    assert len(client.versions()) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first_root.json", "metadata"]


# --- endless, slow and broken transport --------------------------------------


class Raw:
    """Answers one connection with given bytes, then with silence or its end."""

    def __init__(self, *chunks: bytes, hold: bool) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._chunks, self._hold, self._done = chunks, hold, threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/x"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as connection:
            connection.recv(65_536)
            try:
                for chunk in self._chunks:
                    connection.sendall(chunk)
                if self._hold:
                    self._done.wait(10)
            except OSError:
                pass  # the client has gone, as it should

    def close(self) -> None:
        self._done.set()
        self._thread.join(5)


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("chunks", "hold", "error"),
    [
        ((OK, b"Content-Length: 9\r\n\r\n", b"abc"), False, TransportError),
        ((OK, b"Content-Length: 9\r\n\r\n", b"abc"), True, TransportError),
        ((OK, b"\r\n", b"x" * 100), True, LimitError),
        ((OK, b"Transfer-Encoding: chunked\r\n\r\n", b"3\r\nabc\r\n", b"zz"), False, TransportError),
        ((b"nonsense\r\n\r\n",), False, TransportError),
        ((OK,), True, TransportError),
        ((b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n",), False, TransportError),
        ((b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",), False, TransportError),
        ((b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n",), False, AbsentError),
    ],
    ids=["short", "slow", "endless", "broken-chunk", "no-http", "slow-header", "redirect", "fault", "absent"],
)
def test_a_bad_answer_ends_typed_and_in_time(
    chunks: tuple[bytes, ...], hold: bool, error: type[Exception]
) -> None:
    server = Raw(*chunks, hold=hold)
    try:
        with pytest.raises(error) as caught:
            fetch(server.url, limit=50, deadline_s=0.3, silence_s=0.2)
        assert type(caught.value) is error
    finally:
        server.close()


def test_a_header_that_drips_for_ever_ends_with_the_deadline() -> None:
    server = Raw(OK, *(b"X: y\r\n",) * 50, hold=True)
    try:
        with pytest.raises(TransportError, match=r"in time|timed out"):
            fetch(server.url, limit=50, deadline_s=0.2, silence_s=30)
    finally:
        server.close()


def test_only_http_is_spoken() -> None:
    with pytest.raises(TransportError, match="http or https"):
        fetch("file:///etc/passwd", limit=50)


# --- as a process ------------------------------------------------------------


@pytest.mark.parametrize("start", [[], [sys.executable]], ids=["by-path", "by-python"])
def test_the_program_runs_from_any_folder(client: Client, tmp_path: Path, start: list[str]) -> None:
    client.repository.add_target("file", b"content")
    client.repository.publish(bump=Targets.type)
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    codes = [
        subprocess.run(
            [*start, str(PROGRAM), *arguments], check=False, cwd=tmp_path, env=environment, timeout=30
        ).returncode
        for arguments in (client.arguments(), client.arguments("file"), client.arguments("other"))
    ]
    assert codes == [0, 0, 1]
    assert (client.targets / "file").read_bytes() == b"content"
