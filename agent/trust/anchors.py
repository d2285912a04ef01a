"""Reads `tls.json`: how the agent knows the cloud's servers, and for how long.

The director signs it, so that neither the certificates' own dates nor the
vehicle's clock decide. Checks the form alone; whether the bytes of a
certificate are X.509 is for TLS to judge. Does no I/O. Raises only TrustError.
"""

from __future__ import annotations

import base64

from agent.errors import MalformedError
from agent.model import TlsAnchor
from agent.trust import binding
from agent.wire import MAX_UNIX_S, bounded, shown

MAX_TLS_BYTES = 16_384
MAX_TLS_SERVERS = 8

_WHAT = "tls.json"
_KEYS = {"certificate", "not_before_ms", "not_after_ms"}


def parse_tls_anchors(content: bytes) -> tuple[TlsAnchor, ...]:
    """Read the verified bytes of `tls.json`.

    Args:
        content: at most 16,384 bytes of JSON.

    Raises:
        LimitError: more bytes, more than 8 servers, or nested too deeply.
        MalformedError: not of the form, or a date out of its range.
    """
    bounded(f"{_WHAT}, bytes", limit=MAX_TLS_BYTES, found=len(content))
    document = binding.read_json(content, _WHAT)
    servers = document.get("servers") if isinstance(document, dict) and len(document) == 1 else None
    if not isinstance(servers, list) or not servers:
        raise MalformedError(f"{_WHAT}: expected an object with a list named servers alone")
    bounded(f"{_WHAT}, servers", limit=MAX_TLS_SERVERS, found=len(servers))
    return tuple(_anchor(f"{_WHAT} servers[{i}]", server) for i, server in enumerate(servers))


def _anchor(at: str, server: object) -> TlsAnchor:
    if not isinstance(server, dict) or set(server) != _KEYS:
        raise MalformedError(f"{at}: expected the keys {', '.join(sorted(_KEYS))}, found {shown(server)}")
    begin, end, text = server["not_before_ms"], server["not_after_ms"], server["certificate"]
    if not (binding.is_integer(begin) and binding.is_integer(end) and 0 <= begin < end <= MAX_UNIX_S * 1000):
        raise MalformedError(
            f"{at}: expected not_before_ms before not_after_ms, Unix milliseconds,"
            f" found {shown(begin)} and {shown(end)}"
        )
    try:
        certificate = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except ValueError as error:
        raise MalformedError(f"{at}.certificate: not base64: {error}") from error
    if not certificate:
        raise MalformedError(f"{at}.certificate: expected base64 of a certificate, found {shown(text)}")
    return TlsAnchor(certificate, begin, end)
