"""The agent's errors: every one carries facts, and belongs to one family.

Families: Config (refuses to start), Trust (bad content: refused, state kept),
Transport (retried), Vehicle (an ECU or a bus said no; carries the NRC).
"""

from __future__ import annotations


class AgentError(Exception):
    """Base of all errors that the agent raises on purpose."""

    @property
    def kind(self) -> str:
        """Name of the error's type, as reported to the cloud and in logs."""
        return type(self).__name__


class TrustError(AgentError):
    """Content that is not to be trusted; the trusted state is unchanged."""


class MalformedError(TrustError):
    """Bytes that do not have the form that the contract gives them."""


class LimitError(TrustError):
    """A size, count or depth beyond its named limit."""

    def __init__(self, what: str, *, limit: int, found: int) -> None:
        super().__init__(f"{what}: {found} is more than the limit of {limit}; refused unread")
        self.what, self.limit, self.found = what, limit, found


class SignatureError(TrustError):
    """Too few valid signatures of the keys that the role trusts."""


class RollbackError(TrustError):
    """A version older than the trusted one."""

    def __init__(self, what: str, *, trusted: int, received: int) -> None:
        super().__init__(
            f"{what} version {received} is older than trusted version {trusted}; keeping {trusted}"
        )
        self.what, self.trusted, self.received = what, trusted, received


class ReplayError(TrustError):
    """A signed time that does not answer the nonce that is waiting."""


class ExpiredError(TrustError):
    """Metadata past its expiry at the trusted time: a freeze attack, or a stale source."""


class VehicleMismatchError(TrustError):
    """Genuine content of another vehicle."""

    def __init__(self, what: str, *, expected: str, found: str) -> None:
        super().__init__(f"{what} is signed for vehicle {found}, this is {expected}; nothing of it is used")
        self.what, self.expected, self.found = what, expected, found


class DisagreementError(TrustError):
    """Catalogue and director do not say the same."""


class TransportError(AgentError):
    """The way to the cloud failed; retried with backoff."""


class NoValidAnchorError(TransportError):
    """No certificate by which the cloud could be known is valid at the trusted time."""


class NotRunningError(TransportError):
    """No agent answers at the local socket."""


class FloorsError(AgentError):
    """The second copy of the floors cannot be used; the database's floors count."""


class VehicleError(AgentError):
    """An ECU or a bus did not do what it was asked."""


class NegativeResponseError(VehicleError):
    """An ECU answered with a negative response code (ISO 14229-1:2020, annex A)."""

    def __init__(self, ecu: str, *, service: int, nrc: int, name: str) -> None:
        super().__init__(f"{ecu} refused service 0x{service:02X} with NRC 0x{nrc:02X} ({name})")
        self.ecu, self.service, self.nrc, self.name = ecu, service, nrc, name


class EcuSilentError(VehicleError):
    """An ECU did not answer within its time."""


class EcuBusyError(VehicleError):
    """Another tester speaks to the ECUs; ours would spoil its session."""


class UnexpectedResponseError(VehicleError):
    """An ECU's answer does not have the form that was asked for."""


class GuardRefusal(VehicleError):
    """The guard kept a request or a frame from the bus."""


class DatabaseError(AgentError):
    """A signal database or mapping that cannot be used."""


class ConditionError(AgentError):
    """A condition of the catalogue that cannot be compiled."""


class JournalError(AgentError):
    """The usage journal cannot be read or written."""


class RestartError(JournalError):
    """A restart of the journal that does not fit the records that are here; nothing is changed."""


class StatementError(AgentError):
    """An export of usage that is not as it was written."""


class GrantLogError(AgentError):
    """The owner's log is not as it was written."""


class IllegalTransitionError(AgentError):
    """An event that a feature's state does not list; the state is unchanged."""

    def __init__(self, feature_id: str, *, state: str, event: str) -> None:
        super().__init__(f"feature {feature_id}: {event} is not listed in state {state}")
        self.feature_id, self.state, self.event = feature_id, state, event
