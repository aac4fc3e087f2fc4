"""CORS: the pages of other origins that a browser lets call the API, and the headers that it lets them read.

A page sends its token in Authorization, and no cookie is needed, so credentials are not allowed. Written for the table
instead of Starlette's CORSMiddleware, which wraps each request in a second `send` and takes only the messages of plain
ASGI. This costs nothing in a shop without such origins, and the look-up of one header in a shop with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from mercato.gateway.headers import RequestHeaders

ORIGIN: Final = re.compile(
    r"(?P<scheme>https?)://(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\])(?::(?P<port>\d+))?\Z"
)
DEFAULT_PORTS: Final = {"http": "80", "https": "443"}

VARY: Final = b"vary: Origin"
EXPOSED: Final = (
    b"access-control-expose-headers: Allow, ETag, Idempotent-Replayed, Link, Location, Preference-Applied, "
    b"Retry-After, Total-Count, WWW-Authenticate, X-Request-Id"
)
PREFLIGHT: Final = (
    b"access-control-allow-methods: GET, HEAD, POST, PUT, PATCH, DELETE",
    b"access-control-allow-headers: Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, "
    b"Last-Event-ID, Prefer, traceparent, X-Request-Id",
    b"access-control-max-age: 600",
)


def origins_of(text: str) -> tuple[str, ...]:
    """The origins of a setting, with commas or spaces between. Raises `ValueError` with a sentence for users."""
    origins = tuple(dict.fromkeys(text.replace(",", " ").split()))
    for origin in origins:
        found = ORIGIN.match(origin)
        if not found or found["port"] == DEFAULT_PORTS[found["scheme"]]:
            raise ValueError(
                f"{origin!r} is not an origin as browsers send it: scheme and host in small letters, the port where it "
                "is not the scheme's own, and nothing behind it, as in https://shop.example or http://localhost:3000"
            )
    return origins


class CrossOrigin:
    """The header fields for pages of `origins`. An origin is matched exactly: scheme, host and port."""

    def __init__(self, origins: Sequence[str]) -> None:
        allowed = {origin.encode(): b"access-control-allow-origin: " + origin.encode() for origin in origins}
        self._answers: Mapping[bytes, tuple[bytes, ...]] = {o: (line, EXPOSED, VARY) for o, line in allowed.items()}
        self._preflights = {origin: (line, *PREFLIGHT, VARY) for origin, line in allowed.items()}

    def lines(self, headers: RequestHeaders, method: str) -> Sequence[bytes]:
        """The CORS headers of an answer. Vary is in all, also without Origin: caches must distinguish the answers."""
        answer = self._answers.get(headers.origin or b"")
        if answer is None:
            return (VARY,)
        if method == "OPTIONS" and headers.requested_method is not None:
            return self._preflights[headers.origin or b""]
        return answer

    def lines_of_refusal(self, headers: Iterable[tuple[bytes, bytes]]) -> Sequence[bytes]:
        """As `lines`, for refusals of the server below the API, with those headers of the request that were read."""
        origins = [value for name, value in headers if name == b"origin"]
        return self._answers.get(origins[0], (VARY,)) if len(origins) == 1 else (VARY,)
