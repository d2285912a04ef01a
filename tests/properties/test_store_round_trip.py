"""What a store is given is what it gives back, for all values."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from support.edge_store import open_store, record

from agent.events import StoreTrust, StoreUsage
from agent.metering.meter import OpenWindow
from agent.model import MeterKind, RepositoryBytes, Rights, TrustBytes, Verdict, Versions
from agent.trust.verifier import Floors

text = st.text(st.characters(codec="utf-8"), max_size=20)
number = st.integers(0, 2**63 - 1)
signed = st.integers(-(2**63), 2**63 - 1)
versions = st.builds(Versions, number, number, number, number)
windows = st.builds(
    OpenWindow,
    *(text,) * 5,
    kind=st.sampled_from(MeterKind),
    start_ms=signed,
    mark_ns=signed,
    mark_ms=signed,
    odometer=st.none() | text,
    odometer_m=st.none() | signed,
    totals=st.lists(
        st.tuples(st.lists(st.tuples(text, text), max_size=3).map(tuple), number, number, text), max_size=3
    ).map(tuple),
)
used = st.dictionaries(st.tuples(text, text), number, max_size=5)
floors = st.builds(
    Floors,
    versions,
    versions,
    number,
    st.dictionaries(st.tuples(text, text), number, max_size=4),
    st.dictionaries(text, number, max_size=4),
    text,
    text,
)
blob = st.binary(max_size=50)
repository = st.builds(RepositoryBytes, st.lists(blob, max_size=4).map(tuple), blob, blob, blob)
files = st.dictionaries(text, blob, max_size=4)
trust = st.builds(TrustBytes, repository, repository, files, files)


@settings(max_examples=40, deadline=None)
@given(st.lists(windows, max_size=4), used, floors, trust, number, number)
def test_everything_stored_is_loaded_again(
    open_windows: list[OpenWindow],
    amounts: dict[tuple[str, str], int],
    lowest: Floors,
    state: TrustBytes,
    mark_ms: int,
    signed_ms: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "agent.db"
        store = open_store(path)
        verdict = Verdict(state, Versions(), Versions(), Rights(1), signed_ms)
        store.store_trust(StoreTrust(1, verdict, mark_ms=mark_ms, signed_ms=signed_ms), lowest)
        store.store_usage(StoreUsage(2, (record(1),), tuple(open_windows), amounts, mark_ms))
        store.store_receipt(1, b"r", b"s")
        for _ in range(2):
            stored = store.load()
            assert stored.windows == tuple(open_windows)
            assert stored.used == amounts
            assert stored.floors == lowest
            assert stored.trust == state
            assert (stored.mark_ms, stored.contact_ms, stored.as_of_ms) == (mark_ms, mark_ms, signed_ms)
            assert (stored.head.seq, stored.head.hash, stored.acked_seq) == (1, record(1).hash, 1)
            store.close()
            store = open_store(path)
        store.close()
