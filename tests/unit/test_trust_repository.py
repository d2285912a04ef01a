"""The TUF client workflow: what its callers could ask wrongly still ends in one of our errors."""

from __future__ import annotations

from datetime import UTC, datetime
from unittest import mock

import pytest
from support.trust_repo import NOW_MS, Repository
from tuf.api.metadata import Metadata, MetaFile, Snapshot

from agent.errors import DisagreementError, MalformedError, RollbackError
from agent.trust import repository


def test_a_role_that_its_delegator_does_not_know_is_refused() -> None:
    source = Repository(NOW_MS, targets_keys=1, extra={})
    source.publish()
    now = datetime.fromtimestamp(NOW_MS // 1000, UTC)
    root = repository.load_root("image", source.roots[0])
    snapshot = Snapshot(1, None, now, {"nobody.json": MetaFile(1)})
    with pytest.raises(MalformedError, match="ValueError"):
        repository.next_targets("image", root, snapshot, source.targets_bytes, role="nobody", reference=now)


def test_a_role_that_the_snapshot_does_not_list_is_refused() -> None:
    source = Repository(NOW_MS, targets_keys=1, extra={})
    source.publish()
    now = datetime.fromtimestamp(NOW_MS // 1000, UTC)
    root = repository.load_root("image", source.roots[0])
    snapshot = Snapshot(1, None, now, {"others.json": MetaFile(1)})
    with pytest.raises(MalformedError, match=r"missing info for 'targets\.json'"):
        repository.next_targets("image", root, snapshot, source.targets_bytes, reference=now)


@pytest.mark.parametrize("again", [0, 1])
def test_a_root_that_is_older_than_the_trusted_one_is_a_rollback(again: int) -> None:
    source = Repository(NOW_MS, targets_keys=1, extra={})
    for _ in range(2):
        source.add_root()
    with pytest.raises(RollbackError) as caught:
        repository.next_root("image", repository.load_root("image", source.roots[2]), source.roots[again])
    assert (caught.value.trusted, caught.value.received) == (3, 1 + again)


def test_the_trusted_root_again_and_a_gap_are_files_of_different_sets() -> None:
    source = Repository(NOW_MS, targets_keys=1, extra={})
    for _ in range(2):
        source.add_root()
    first = repository.load_root("image", source.roots[0])
    for other in (source.roots[0], source.roots[2]):
        with pytest.raises(DisagreementError):
            repository.next_root("image", first, other)


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, AttributeError, OverflowError])
def test_whatever_python_tuf_raises_for_bad_content_is_malformed(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(Metadata, "from_bytes", mock.Mock(side_effect=error("odd")))
    with pytest.raises(MalformedError, match=f"{error.__name__}: .*odd"):
        repository.load_root("image", b"{}")
