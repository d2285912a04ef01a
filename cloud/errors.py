"""The cloud's errors: each carries facts and belongs to one family.

Families: start-up (refuses to serve), request (an operator or vehicle asked
for something that cannot be; nothing was changed), usage (a batch is refused;
nothing of it is stored).
"""

from __future__ import annotations


class CloudError(Exception):
    """Base of all errors that the cloud raises on purpose."""

    @property
    def kind(self) -> str:
        """Name of the error's type, as told to clients and in logs."""
        return type(self).__name__


class StartError(CloudError):
    """Keys, certificates, catalogue or database that the cloud cannot serve with."""


class RequestError(CloudError):
    """A request that is refused; nothing was changed."""


class InvalidRequestError(RequestError):
    """A field of a request does not have the form that the contract gives it."""

    def __init__(self, field: str, *, expected: str, found: object) -> None:
        super().__init__(f"{field}: expected {expected}, found {found!r}")
        self.field, self.expected, self.found = field, expected, found


class NotFoundError(RequestError):
    """What a request names does not exist."""


class ExistsError(RequestError):
    """What a request would make exists already, or its id was used for another content."""


class NotPossibleError(RequestError):
    """The state of a vehicle, plan or right does not allow the request."""


class ForbiddenError(RequestError):
    """The caller's certificate does not give it this role."""


class ClaimError(RequestError):
    """An enrolment claim that is unknown, used, expired or of another VIN."""


class UsageError(CloudError):
    """A usage batch that is refused; nothing of it is stored."""


class MalformedUsageError(UsageError):
    """A batch or record that does not have the form of the contract."""


class UsageSignatureError(UsageError):
    """A batch that the device key of this stream did not sign."""


class ForeignUsageError(UsageError):
    """Records of another vehicle."""


class TooManyJournalsError(UsageError):
    """A vehicle that begins one journal after another."""


class ChainError(UsageError):
    """Records that do not continue the stored journal: a hole, a fork or a change."""
