"""Problems (RFC 9457): the answers to refused requests. The only place that knows status codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from mercato.chassis.contract import FieldError, Forbidden, InvalidRequest, Kind, ServiceError
from mercato.gateway.money import money

MEDIA_TYPE: Final = "application/problem+json"
CONTENT_TYPE: Final = f"content-type: {MEDIA_TYPE}".encode()
NO_STORE: Final = b"cache-control: no-store"

STATUS_OF_KIND: Final[Mapping[Kind, int]] = {
    Kind.NOT_FOUND: 404,
    Kind.INVALID: 400,
    Kind.CONFLICT: 409,
    Kind.REFUSED: 402,
    Kind.UNAUTHENTICATED: 401,
    Kind.FORBIDDEN: 403,
    Kind.TOO_MANY: 429,
    Kind.UNAVAILABLE: 503,
    Kind.DEADLINE: 504,
    Kind.INTERNAL: 500,
}

STATUS_OF_CODE: Final[Mapping[str, int]] = {
    # Where HTTP, or a draft that clients know, has a more exact status than that of the kind.
    "stale_version": 412,
    "events.cursor_ahead": 410,
    "events.cursor_too_old": 410,
    "idempotency_key_reused": 422,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "body_too_large": 413,
    "unsupported_media_type": 415,
}

TITLES: Final[Mapping[int, str]] = {
    400: "The request is not valid",
    401: "Sign in first",
    402: "Payment refused",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    406: "Not in a form that you accept",
    409: "This conflicts with the current state",
    410: "Not available any more",
    412: "It has changed since",
    413: "The body is too large",
    415: "Send JSON",
    422: "The key belongs to another request",
    429: "Too many requests",
    500: "Internal error",
    503: "Not available right now",
    504: "Not answered in time",
}


REPLAYED: Final = "replayed"
"""The field of an error that is the answer of an earlier request with the same key. It becomes a header, no detail."""
NO_DETAILS: Final[Mapping[str, Any]] = {}


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of a refusal. `details` are the typed details of the error, such as the legal moves of an order."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    trace_id: str
    errors: tuple[FieldError, ...] = ()
    details: dict[str, Any] = {}


class RouteNotFound(ServiceError, code="route_not_found", kind=Kind.NOT_FOUND):
    sentence = "There is nothing at {path}; the API is described at /docs."
    path: str


class MethodNotAllowed(ServiceError, code="method_not_allowed", kind=Kind.INVALID):
    sentence = "{path} takes {allowed}."
    path: str
    allowed: tuple[str, ...]


class SignInFirst(ServiceError, code="sign_in_first", kind=Kind.UNAUTHENTICATED):
    sentence = "This needs a caller who is signed in: POST /login, then send Authorization: Bearer ACCESS_TOKEN."


class SessionsNotKnown(ServiceError, code="sessions_not_known", kind=Kind.UNAVAILABLE):
    """Only for staff: a session that ended because its owner is no longer staff must not be used meanwhile."""

    sentence = "Which sessions have ended is not known at the moment, and staff are refused until it is; try again."
    retry_after_s: int | None = 2


class UnsupportedMediaType(ServiceError, code="unsupported_media_type", kind=Kind.INVALID):
    sentence = "The body must be JSON, sent with Content-Type: application/json."


class NotAcceptable(ServiceError, code="not_acceptable", kind=Kind.INVALID):
    sentence = "{path} answers with {offered} alone, which the header Accept excludes."
    path: str
    offered: str


class TooManyStreams(ServiceError, code="too_many_streams", kind=Kind.TOO_MANY):
    """Each process has this limit for itself."""

    sentence = "This {of} has {limit} streams of events open, which is the most; close one first."
    limit: int
    of: str
    retry_after_s: int | None = 5


class StreamsFull(ServiceError, code="streams_full", kind=Kind.UNAVAILABLE):
    sentence = "All {limit} streams of events of this process are taken; try again, or request pages of GET /events."
    limit: int
    retry_after_s: int | None = 5


class BodyTooLarge(ServiceError, code="body_too_large", kind=Kind.INVALID):
    sentence = "The body may have at most {limit_bytes} bytes."
    limit_bytes: int


class MalformedJson(ServiceError, code="malformed_json", kind=Kind.INVALID):
    sentence = "The body is not JSON: {reason} at line {line}, column {column} (byte {offset})."
    reason: str
    line: int
    column: int
    offset: int


class IdempotencyKeyMissing(ServiceError, code="idempotency_key_missing", kind=Kind.INVALID):
    """Without a key, a request that is sent again because no answer came would be done twice."""

    sentence = "{operation} needs the header Idempotency-Key."
    operation: str


class HostNotAllowed(ServiceError, code="host_not_allowed", kind=Kind.FORBIDDEN):
    """A shop without tokens answers only to names of its own machine, so that no web page can call it."""

    sentence = "This shop runs without tokens and answers only requests to its own address; {header} names another."
    header: str


class TooManyRequests(ServiceError, code="too_many_requests", kind=Kind.TOO_MANY):
    sentence = "Too many requests; try again in {retry_after_s} s."

    def __init__(self, retry_after_s: int) -> None:
        Exception.__init__(self, f"Too many requests; try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


def not_allowed(role: str, operation: str) -> ServiceError:
    """The error for a caller whose role may not do it."""
    return SignInFirst() if role == "anonymous" else Forbidden(operation=operation, role=role)


def _shown(details: Mapping[str, Any]) -> dict[str, Any]:
    """Details for clients: amounts of minor units become money.

    The currency of `total_minor` is in `total_currency`, or in `currency` where all have the same.
    """
    shown: dict[str, Any] = {}
    for name, value in details.items():
        if name == REPLAYED:
            continue
        subject, _, unit = name.rpartition("_")
        currency = details.get(f"{subject}_currency", details.get("currency"))
        if unit == "minor" and currency is not None:
            shown[subject] = money(value, currency)
        elif unit != "currency" or f"{subject}_minor" not in details:
            shown[name] = value
    return shown


_encode: Final = msgspec.json.Encoder().encode


def status_of(error: ServiceError) -> int:
    return STATUS_OF_CODE.get(error.code) or STATUS_OF_KIND[error.kind]


def render(error: ServiceError, trace_id: str, more: Mapping[str, Any] = NO_DETAILS) -> tuple[int, list[bytes], bytes]:
    """Status, headers (`name: value`) and body of an error, and `more` details. The server adds Content-Length."""
    status = status_of(error)
    invalid = isinstance(error, InvalidRequest)
    problem = Problem(
        type=f"/docs/problems#{error.code}",
        title=TITLES[status],
        status=status,
        code=error.code,
        detail=str(error),
        trace_id=trace_id,
        errors=error.errors if invalid else (),
        details={} if invalid else {**_shown(error.details), **more},
    )
    lines = [CONTENT_TYPE, NO_STORE]
    if REPLAYED in error.fields and getattr(error, REPLAYED):
        lines.append(b"idempotent-replayed: true")
    if error.retry_after_s is not None:
        lines.append(b"retry-after: %d" % error.retry_after_s)
    if status == 401:
        lines.append(b'www-authenticate: Bearer realm="mercato"')
    if isinstance(error, MethodNotAllowed):
        lines.append(b"allow: " + ", ".join(error.allowed).encode())
    return status, lines, _encode(problem)
