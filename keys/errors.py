"""The errors of the key ceremony: each says what was found and what was left as it was."""

from __future__ import annotations


class KeysError(Exception):
    """Base of all errors that the ceremony raises on purpose."""


class KeyMaterialError(KeysError):
    """A key, certificate or root that is missing, unreadable or does not fit."""


class WouldOverwriteError(KeysError):
    """A folder with content stands where new keys should go; nothing was written."""


class ThresholdError(KeysError):
    """Fewer signatures than a role needs; nothing was put in place."""


class RequestError(KeysError):
    """What was asked for does not exist or does not go together; nothing was written."""


class CatalogueError(KeysError):
    """A catalogue that is not signed; `problems` holds one line for each reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
