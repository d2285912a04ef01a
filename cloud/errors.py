"""The cloud's errors: each carries facts and belongs to one family.

Families: start-up (refuses to serve), request (an operator or vehicle asked
for something that cannot be; nothing was changed), usage (a batch is refused;
nothing of it is stored), export (the feed
stands where it stood).
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

    @property
    def told(self) -> str:
        """What the caller is told; the logs have the whole reason."""
        return str(self)


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


class SignerLimitError(RequestError):
    """The fleet has had its most of this hour: a mistake, or somebody who should not be here."""

    def __init__(self, kind: str, limit: int) -> None:
        super().__init__(
            f"signer limit: {limit} {kind} in this hour, all that signer.{kind}_per_hour allows; "
            "nothing was changed. Find out who asks for them: fod-cloud audit --alarms"
        )


class ForbiddenError(RequestError):
    """The caller's certificate does not give it this role."""


class ClaimError(RequestError):
    """An enrolment claim that is unknown, used, expired or of another VIN."""

    @property
    def told(self) -> str:
        """One answer for all reasons: a guesser learns nothing."""
        return "the claim is unknown, used, expired or of another VIN"


class TransferCodeError(RequestError):
    """A code that does not prove the present owner's consent to a sale."""

    @property
    def told(self) -> str:
        """One answer for all reasons: a guesser learns nothing."""
        return (
            "the code is unknown, used, late or of another vehicle; "
            "ask the present owner for a new one: fod-cloud vehicle transfer begin"
        )


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


class ReadingError(CloudError):
    """A reading that the feature's ECU cannot have signed, or not so; the usage that brought it is taken."""


class ForkError(ChainError):
    """Two histories of one journal: the same seq with another hash.

    Args:
        exact: the two differ first at `seq`; else they may differ before it already.
        stored_in: journal that holds the stored record; empty for the same one.
    """

    def __init__(
        self,
        journal_id: str,
        seq: int,
        *,
        stored: bytes,
        received: bytes,
        exact: bool = True,
        stored_in: str = "",
    ) -> None:
        super().__init__(
            f"record {seq} of journal {journal_id} is stored with hash {stored.hex()}, "
            f"received with {received.hex()}; the stored one stays. Next: an operator reads "
            "'fod-cloud vehicle evidence VIN', and confirms an honest restore with "
            f"'fod-cloud vehicle restart-journal VIN --journal {journal_id}'"
        )
        self.journal_id, self.seq, self.stored, self.received = journal_id, seq, stored, received
        self.exact, self.stored_in = exact, stored_in or journal_id

    @property
    def kind(self) -> str:
        """To the vehicle it is a chain that does not continue."""
        return ChainError.__name__


class MergeError(ChainError):
    """Windows that a record claims to stand for, and that do not fit its place in the journal."""

    @property
    def kind(self) -> str:
        """To the vehicle it is a chain that does not continue."""
        return ChainError.__name__


class EndedJournalError(ChainError):
    """Usage of a journal behind the place where an operator's word has ended it."""

    def __init__(self, journal_id: str, head_seq: int) -> None:
        super().__init__(
            f"journal {journal_id} was ended at record {head_seq} by an operator; nothing behind is taken. "
            "Next: the vehicle takes the signed restart, and goes on in a new journal that names it"
        )


class BeginError(ChainError):
    """A journal whose first record does not name what this cloud knows to stand before it.

    Args:
        follows: the stored journal whose head it names, though no restart allows that; empty if none.
    """

    def __init__(self, journal_id: str, text: str, *, follows: str = "") -> None:
        super().__init__(f"journal {journal_id} {text}")
        self.journal_id, self.follows = journal_id, follows


class ExportError(CloudError):
    """The feed cannot go on without a person; its position stays at what was exported."""


class EventRefusedError(CloudError):
    """A receiver says that what it was sent is wrong in itself; the same again would be refused again."""


class ReceiverBusyError(CloudError):
    """A receiver that cannot be reached or cannot take events now; they are sent again.

    Args:
        after_s: how long it asks to be left alone, None if it does not say.
    """

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s
