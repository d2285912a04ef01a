"""The floors of a vehicle: the higher of two copies, and their form in JSON.

Does no I/O. `read_floors` raises ValueError, TypeError or KeyError for what
has not the form: who holds the bytes knows what to call them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from agent.model import Versions
from agent.trust.verifier import Floors

_Key = TypeVar("_Key")


def highest(first: Floors, second: Floors) -> Floors:
    """Return the higher of two copies, value by value.

    Versions and times of two epochs cannot be compared: the epoch under the
    newer root counts, because only a threshold of root keys begins one
    (Uptane 2.1.0 section 5.4.4.3, step 4). Token counters and the owner epoch
    belong to it as well: the ECU's own counter stands in any case.
    """
    older, newer = (second, first) if first.director.root >= second.director.root else (first, second)
    if _comparable(first.director_epoch, second.director_epoch):
        time_ms = max(first.time_ms, second.time_ms)
        releases = _highest_of(first.releases, second.releases)
        counters = _highest_of(first.token_counters, second.token_counters)
        owner_epoch = max(first.owner_epoch, second.owner_epoch)
    else:
        time_ms, releases = newer.time_ms, {**older.releases, **newer.releases}
        counters, owner_epoch = dict(newer.token_counters), newer.owner_epoch
    director, director_epoch = _higher(
        (first.director, first.director_epoch), (second.director, second.director_epoch)
    )
    catalogue, catalogue_epoch = _higher(
        (first.catalogue, first.catalogue_epoch), (second.catalogue, second.catalogue_epoch)
    )
    return Floors(
        director=director,
        catalogue=catalogue,
        time_ms=time_ms,
        token_counters=counters,
        releases=releases,
        director_epoch=director_epoch,
        catalogue_epoch=catalogue_epoch,
        owner_epoch=owner_epoch,
    )


def floors_to_json(floors: Floors) -> dict[str, object]:
    """Return the floors as JSON takes them."""
    return {
        "director": _versions(floors.director),
        "catalogue": _versions(floors.catalogue),
        "time_ms": floors.time_ms,
        "tokens": [[e, f, c] for (e, f), c in floors.token_counters.items()],
        "releases": dict(floors.releases),
        "director_epoch": floors.director_epoch,
        "catalogue_epoch": floors.catalogue_epoch,
        "owner_epoch": floors.owner_epoch,
    }


def read_floors(content: object) -> Floors:
    """Return the floors that `floors_to_json` wrote.

    Raises:
        ValueError, TypeError, KeyError: it did not write this.
    """
    if not isinstance(content, dict):
        raise TypeError("floors are not a table")
    return Floors(
        director=Versions(*map(_count, content["director"])),
        catalogue=Versions(*map(_count, content["catalogue"])),
        time_ms=_count(content["time_ms"]),
        token_counters={(str(e), str(f)): _count(c) for e, f, c in content["tokens"]},
        releases={str(f): _count(r) for f, r in dict(content["releases"]).items()},
        director_epoch=str(content["director_epoch"]),
        catalogue_epoch=str(content["catalogue_epoch"]),
        owner_epoch=_count(content["owner_epoch"]),
    )


def _comparable(first_epoch: str, second_epoch: str) -> bool:
    return not first_epoch or not second_epoch or first_epoch == second_epoch


def _higher(first: tuple[Versions, str], second: tuple[Versions, str]) -> tuple[Versions, str]:
    (a, a_epoch), (b, b_epoch) = first, second
    if not _comparable(a_epoch, b_epoch):
        return second if b.root > a.root else first
    versions = Versions(
        root=max(a.root, b.root),
        timestamp=max(a.timestamp, b.timestamp),
        snapshot=max(a.snapshot, b.snapshot),
        targets=max(a.targets, b.targets),
    )
    return versions, a_epoch or b_epoch


def _highest_of(first: Mapping[_Key, int], second: Mapping[_Key, int]) -> dict[_Key, int]:
    return {key: max(first.get(key, 0), second.get(key, 0)) for key in (*first, *second)}


def _versions(versions: Versions) -> list[int]:
    return [versions.root, versions.timestamp, versions.snapshot, versions.targets]


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"expected a whole number from 0, found {value!r}")
    return value
