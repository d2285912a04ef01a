"""The model of the disk keeps what the real database keeps, through a whole life with the real verifier."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.lifetime.disk import Disk, State
from support.lifetime.life import Life
from support.lifetime.verified import VerifiedWorld

from agent import events as ev
from agent.adapters.store import Store
from agent.model import Verdict
from agent.trust.grant_log import verify_chain
from agent.trust.verifier import Floors, floors_after


class _BothDisks(Disk):
    """Gives each commit to the real store as well."""

    store: Store
    floors = Floors()

    def write_usage(self, command: ev.StoreUsage, boot: int) -> str:
        self.store.store_usage(command)
        return super().write_usage(command, boot)

    def write_trust(self, command: ev.StoreTrust) -> None:
        self.floors = floors_after(command.verdict, self.floors)
        self.store.store_trust(command, self.floors, self.floors.director_epoch)
        super().write_trust(command)

    def write_receipt(self, through_seq: int) -> None:
        self.store.store_receipt(through_seq, b"receipt", b"signature")
        super().write_receipt(through_seq)


class _BothWorld(VerifiedWorld):
    """Compares both at every start. Power stays on: what a cut loses, the real file would keep here."""

    disk_class = _BothDisks
    disk: _BothDisks
    path: Path
    compared = 0

    def cut_power(self) -> None:
        self.kill()

    def _stored_verdict(self, state: State) -> Verdict | None:
        if hasattr(self.disk, "store"):
            self.disk.store.close()
        self.disk.store = Store(self.path, boot_id=str(self._boot), journal_id=state.journal_id)
        real = self.disk.store.load()
        own = state.own
        assert real.head == self.disk.head
        assert real.acked_seq == state.acked_seq
        assert real.windows == state.windows
        assert dict(real.used) == dict(state.used)
        assert (real.mark_ms, real.contact_ms) == (state.mark_ms, state.contact_ms)
        assert real.owner_epoch == state.owner_epoch
        assert real.log_head == verify_chain(list(state.log))
        assert real.same_boot == (state.boot == self._boot)
        assert real.former == frozenset(
            w.entitlement_id for w in state.windows if own is not None and w.entitlement_id not in own
        )
        self.compared += 1
        return super()._stored_verdict(state)

    def new_journal(self) -> None:
        raise AssertionError("this life has no copies of its disk")


class _NoCopies(Life):
    """A life whose disk nobody copies."""

    def _while_parked(self) -> None:
        for _ in range(self.random.randint(0, 2)):
            self._rights()


@pytest.mark.parametrize("seed", [1, 2, 4, 6])
def test_the_model_disk_starts_an_agent_as_the_real_store_does(seed: int, tmp_path: Path) -> None:
    world = _BothWorld(seed)
    world.path = tmp_path / "journal.db"
    _NoCopies(seed, world).run()
    world.disk.store.close()
    assert world.violations == []
    assert world.compared > 6
    assert world.disk.state.count > 2
