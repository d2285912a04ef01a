"""What the verifier uses of python-tuf's internals is still there, and still means the same."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime
from importlib.metadata import version

import pytest
import tuf
from support.trust_repo import Cloud
from tuf.api.exceptions import EqualVersionNumberError, ExpiredMetadataError, RepositoryError
from tuf.api.serialization import DeserializationError, SerializationError
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType


def test_the_pinned_version_is_installed() -> None:
    assert version("tuf") == tuf.__version__ == "7.0.1"


def test_the_methods_take_what_the_verifier_gives() -> None:
    parameters = {
        name: list(inspect.signature(getattr(TrustedMetadataSet, name)).parameters)
        for name in ("__init__", "update_root", "update_timestamp", "update_snapshot", "update_targets")
    }
    assert parameters == {
        "__init__": ["self", "root_data", "envelope_type"],
        "update_root": ["self", "data"],
        "update_timestamp": ["self", "data"],
        "update_snapshot": ["self", "data", "trusted"],
        "update_targets": ["self", "data"],
    }


def test_reference_time_decides_what_has_expired() -> None:
    cloud = Cloud()
    for year, expired in ((1970, False), (2099, True)):
        trusted = TrustedMetadataSet(cloud.catalogue.roots[0], EnvelopeType.METADATA)
        assert isinstance(trusted.reference_time, datetime)
        trusted.reference_time = datetime(year, 1, 2, tzinfo=UTC)
        if expired:
            with pytest.raises(ExpiredMetadataError):
                trusted.update_timestamp(cloud.catalogue_timestamp)
        else:
            trusted.update_timestamp(cloud.catalogue_timestamp)


def test_an_expired_timestamp_stays_as_what_a_newer_one_is_held_against() -> None:
    cloud = Cloud()
    trusted = TrustedMetadataSet(cloud.catalogue.roots[0], EnvelopeType.METADATA)
    trusted.reference_time = trusted_time = cloud_time(cloud, days=2)
    with pytest.raises(ExpiredMetadataError):
        trusted.update_timestamp(cloud.catalogue_timestamp)
    assert trusted.timestamp.version == 1
    assert trusted.reference_time == trusted_time
    with pytest.raises(EqualVersionNumberError):
        trusted.update_timestamp(cloud.catalogue_timestamp)


def test_every_error_of_form_is_a_repository_error() -> None:
    assert issubclass(DeserializationError, RepositoryError)
    assert issubclass(SerializationError, RepositoryError)


def cloud_time(cloud: Cloud, days: int) -> datetime:
    return datetime.fromtimestamp(cloud.catalogue.now_ms // 1000 + days * 86_400, UTC)
