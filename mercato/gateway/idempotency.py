"""`Idempotency-Key` in the gateway: the syntax of a key, and when two requests are the same request."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from mercato.gateway.validation import invalid

API_VERSION: Final = "1"

_BARE: Final = re.compile(rb"^[\x21-\x7e]{1,255}\Z")
_QUOTED: Final = re.compile(rb'^"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"\Z')
_ESCAPED: Final = re.compile(rb"\\(.)")
_encode: Final = msgspec.json.Encoder(order="sorted").encode
_decode: Final = msgspec.json.Decoder().decode


def key_of(header: bytes) -> str:
    """The key, written bare or as a structured-field string (RFC 8941). Raises `InvalidRequest`."""
    value = header.strip()
    if value.startswith(b'"'):
        quoted = _QUOTED.match(value)
        value = _ESCAPED.sub(rb"\1", quoted[1]) if quoted else b""
    if not _BARE.match(value):
        raise invalid(("header Idempotency-Key", "is not 1 to 255 printable ASCII characters without spaces"))
    return value.decode("ascii")


def fingerprint(method: str, template: str, parts: Mapping[str, str], query: bytes, body: bytes) -> bytes:
    """32 bytes that are equal for two requests with the same meaning.

    The body counts as JSON, not as bytes: its members are sorted, and white space does not count (the purpose of RFC
    8785; numbers keep the form that the decoder gives them). Headers do not count.
    """
    meaning = (
        method,
        template,
        sorted(parts.items()),
        sorted(parse_qsl(query.decode("latin-1"), keep_blank_values=True)) if query else (),
        API_VERSION,
        _meaning(body) if body else None,
    )
    return hashlib.sha256(_encode(meaning)).digest()


def _meaning(body: bytes) -> Any:
    try:
        return _decode(body)
    except msgspec.DecodeError:
        # A number that no float or integer can hold, in a field that takes decimals. Its text counts.
        return body
