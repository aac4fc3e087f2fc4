"""Answers for caches: entity tags, 304, and compression.

For reads that are the same for all callers, and for the pages. Private answers do not need it: no cache stores them.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from typing import Final

from mercato.gateway.asgi import Send
from mercato.gateway.headers import RequestHeaders

SMALLEST_BYTES: Final = 1_024
"""A smaller body fits in one packet with its headers, compressed or not."""
LEVEL: Final = 1
"""The level of gzip, for answers that are compressed anew each time."""
VARY: Final = b"vary: Accept-Encoding"
GZIP: Final = b"content-encoding: gzip"
_REFUSED: Final = re.compile(r"\s*q\s*=\s*0(?:\.0*)?\s*\Z")


def tag_of(body: bytes) -> str:
    """The entity tag of a body: weak, because the compressed body has the same."""
    return f'W/"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'


def is_known(if_none_match: bytes | None, tag: str) -> bool:
    """Whether the client has the answer with this tag. Tags are compared weakly (RFC 9110 13.1.2)."""
    if if_none_match is None:
        return False
    given = (one.strip().removeprefix("W/") for one in if_none_match.decode("latin-1").split(","))
    return any(one in ("*", tag.removeprefix("W/")) for one in given)


def takes_gzip(accept_encoding: bytes | None) -> bool:
    """Whether Accept-Encoding lists gzip, or any coding, and not with a weight of 0 (RFC 9110 12.5.3)."""
    weights: dict[str, bool] = {}
    for one in (accept_encoding or b"").decode("latin-1").lower().split(","):
        coding, _, weight = one.partition(";")
        weights[coding.strip()] = _REFUSED.match(weight) is None
    return weights.get("gzip", weights.get("*", False))


def negotiated(status: int, lines: list[bytes], body: bytes, headers: RequestHeaders) -> tuple[int, list[bytes], bytes]:
    """An answer with status 200 for its client: 304 where the client has it, compressed where that saves a packet.

    An answer with an entity tag of its own keeps it, and is not compressed: such a tag names exactly these bytes.
    """
    own = next((line for line in lines if line.startswith(b"etag: ")), None)
    tag = own[len(b"etag: ") :].decode() if own is not None else tag_of(body)
    if own is None:
        lines += (b"etag: " + tag.encode(), VARY)
    if is_known(headers.if_none_match, tag):
        return 304, [line for line in lines if not line.startswith(b"content-")], b""
    if own is None and len(body) >= SMALLEST_BYTES and takes_gzip(headers.accept_encoding):
        lines.append(GZIP)
        body = gzip.compress(body, LEVEL, mtime=0)
    return status, lines, body


async def send_in_two(send: Send, status: int, lines: list[bytes], body: bytes) -> None:
    """The answer in the messages of plain ASGI, for a server without the extension."""
    if status not in (204, 304):
        lines.append(b"content-length: %d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": fields(lines)})
    await send({"type": "http.response.body", "body": body})


def fields(lines: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Header lines in the form of ASGI."""
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
