"""The limits of the HTTP server, and the answer to a client that exceeds one."""

import random
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that one server sets its clients."""

    header_bytes: int = 16_384  # request line and headers together; also chunked trailers
    body_bytes: int = 1_048_576
    request_seconds: float = 10.0  # from a request's first byte to its last
    response_grace_seconds: float = 5.0  # an answer may take request_seconds and this, until the client has read it
    connections: int = 1_024
    connections_of_one: int = 512  # of one IPv4 address or IPv6 network: no client can take all the connections
    first_byte_seconds: float = 5.0  # a connection that has sent nothing by then is closed
    keep_alive_seconds: float = 30.0  # and one that sends nothing after its last answer
    pipelined_at_once: int = 8  # requests in work, of all connections, that their clients sent behind another
    answers_half_closed: bool = True  # False: a client that ends its half of the connection does not wait any more
    stalled_seconds: float = 30.0  # a stream whose client takes nothing for so long is closed
    drain_seconds: float = 3.0


class Refusal(msgspec.Struct, frozen=True):
    """Why a request was refused by the server itself, before or instead of the application."""

    status: int
    title: str
    code: str
    detail: str
    retry_after_seconds: int | None = None

    def answer(self, default_headers: Iterable[tuple[bytes, bytes]], more: Iterable[bytes] = ()) -> bytes:
        """The whole HTTP response: an RFC 9457 problem with `Connection: close`.

        `more`: further header fields, as `name: value`.
        """
        problem = {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            # The request is refused before its traceparent is read; a new id distinguishes reports of two clients.
            "trace_id": f"{random.getrandbits(128):032x}",
        }
        body = msgspec.json.encode(problem)
        lines = [f"HTTP/1.1 {self.status} {self.title}".encode()]
        lines += [name + b": " + value for name, value in default_headers]
        lines += more
        lines += [b"content-type: application/problem+json", b"content-length: %d" % len(body), b"connection: close"]
        lines.append(b"cache-control: no-store")
        if self.retry_after_seconds is not None:
            lines.append(b"retry-after: %d" % self.retry_after_seconds)
        return b"\r\n".join([*lines, b"", body])


MALFORMED: Final = Refusal(400, "Bad Request", "malformed_request", "The request is not valid HTTP/1.1.")
VERSION_NOT_SUPPORTED: Final = Refusal(
    505, "HTTP Version Not Supported", "http_version_not_supported", "The request is not in HTTP/1.1 or HTTP/1.0."
)
INTERNAL_ERROR: Final = Refusal(500, "Internal Server Error", "internal_error", "The request failed unexpectedly.")
TOO_MANY_CONNECTIONS: Final = Refusal(
    503, "Service Unavailable", "too_many_connections", "Too many connections are open.", retry_after_seconds=1
)
TOO_MANY_CONNECTIONS_OF_ONE: Final = Refusal(
    503,
    "Service Unavailable",
    "too_many_connections_of_one",
    "Too many connections are open from this address.",
    retry_after_seconds=1,
)
TOO_MANY_PIPELINED: Final = Refusal(
    503, "Service Unavailable", "too_many_pipelined", "Too many requests wait for earlier answers on this connection."
)


class LimitRefusals(msgspec.Struct, frozen=True):
    """The refusals whose detail names a limit."""

    uri_too_long: Refusal
    headers_too_large: Refusal
    body_too_large: Refusal
    request_timeout: Refusal

    @classmethod
    def of(cls, limits: HttpLimits) -> "LimitRefusals":
        """Words the refusals for these limits."""
        header = f"The request line and headers together may be at most {limits.header_bytes} bytes."
        body = f"The request body may be at most {limits.body_bytes} bytes."
        late = f"The request was not received completely within {limits.request_seconds:g} seconds."
        return cls(
            uri_too_long=Refusal(414, "URI Too Long", "uri_too_long", header),
            headers_too_large=Refusal(431, "Request Header Fields Too Large", "request_header_too_large", header),
            body_too_large=Refusal(413, "Content Too Large", "body_too_large", body),
            request_timeout=Refusal(408, "Request Timeout", "request_timeout", late),
        )


class RequestRefused(Exception):
    """Raised inside a parser callback; the exception stops the parser in the middle of a read."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


def ignore_refusal(code: str) -> None:
    """The default for `on_refused`."""


def no_more_headers(headers: Iterable[tuple[bytes, bytes]]) -> Sequence[bytes]:
    """The default for `refusal_headers`."""
    return ()
