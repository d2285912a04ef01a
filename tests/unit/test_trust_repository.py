"""The TUF client workflow: what its callers could ask wrongly still ends in one of our errors."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from support.trust_repo import NOW_MS, Repository
from tuf.api.metadata import MetaFile, Snapshot

from agent.errors import MalformedError
from agent.trust import repository


def test_a_role_that_its_delegator_does_not_know_is_refused() -> None:
    source = Repository(NOW_MS, targets_keys=1, extra={})
    source.publish()
    now = datetime.fromtimestamp(NOW_MS // 1000, UTC)
    root = repository.load_root("image", source.roots[0])
    snapshot = Snapshot(1, None, now, {"nobody.json": MetaFile(1)})
    with pytest.raises(MalformedError, match="ValueError"):
        repository.next_targets("image", root, snapshot, source.targets_bytes, role="nobody", reference=now)
