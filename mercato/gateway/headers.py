"""The request headers that the API reads, and what their values mean."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Final

from mercato.chassis.contract import Actor, Context, Span
from mercato.chassis.contract.context import SAMPLED
from mercato.gateway import problems
from mercato.gateway.validation import invalid

_TRACEPARENT: Final = re.compile(rb"^(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
_REQUEST_ID: Final = re.compile(rb"^[\x21-\x7e]{1,128}\Z")
_NO_TRACE_ID: Final = b"0" * 32


class RequestHeaders:
    """The headers of one request, read in one pass. A list that comes in several lines is joined."""

    accept: bytes | None = None
    accept_encoding: bytes | None = None
    authorization: bytes | None = None
    content_length: bytes | None = None
    content_type: bytes | None = None
    forwarded: bytes | None = None
    """A header that proxies add: X-Forwarded-For, X-Real-IP, Forwarded or Via."""
    fetch_dest: bytes | None = None
    fetch_mode: bytes | None = None
    fetch_site: bytes | None = None
    """Where the calling page comes from (Fetch Metadata): `same-origin`, `same-site`, `cross-site`, `none`."""
    host: bytes | None = None
    idempotency_key: bytes | None = None
    if_match: bytes | None = None
    if_none_match: bytes | None = None
    last_event_id: bytes | None = None
    origin: bytes | None = None
    prefer: bytes | None = None
    x_request_id: bytes | None = None
    traceparent: bytes | None = None
    requested_method: bytes | None = None
    """Of a preflight: the method that a page of another origin would use."""
    repeated: bytes | None = None
    """The name of a header that came more than once, and may come only once."""
    transfer_encoding: bytes | None = None

    trace_id: str
    """Of `traceparent` (W3C Trace Context), else a new one: 32 hexadecimal digits."""
    request_id: str
    """Of `X-Request-Id`, else a new one."""
    parent_id: int = 0
    """The span of the client that `traceparent` names; 0: none."""
    asks_for_trace: bool = False
    """Whether the client records its trace."""
    actor_id: int = 0
    """The actor of the request, once known: for the log. 0: no account."""
    span: Span | None = None
    """The span of the request; None: it is not traced."""
    order_id: int = 0
    """The order that the request is about, once known: for the log. 0: none."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        for name, value in headers:
            field = _FIELDS.get(name)
            if field is not None:
                if field in self.__dict__:
                    self._add_again(name, field, value)
                else:
                    setattr(self, field, value)
        new_id = random.randbytes(24).hex()
        self.trace_id, self.request_id = new_id[:32], new_id[32:]
        if self.traceparent is not None:
            given = _TRACEPARENT.match(self.traceparent)
            if given and given[1] != _NO_TRACE_ID:
                self.trace_id = given[1].decode()
                self.parent_id, self.asks_for_trace = int(given[2], 16), int(given[3], 16) & SAMPLED > 0
        if self.x_request_id is not None and _REQUEST_ID.match(self.x_request_id):
            self.request_id = self.x_request_id.decode()

    def context(self, actor: Actor, deadline: float) -> Context:
        """The context of calls for this request."""
        return Context(actor, deadline, self.trace_id, self.request_id, self.span)

    def concern(self, order_id: int | None) -> None:
        """Notes which order the request is about, and with it its trace."""
        self.order_id = order_id or 0
        if self.order_id and self.span is not None and self.span.places:
            self.span.concern(self.order_id, {place.trace_id for place in self.span.places})

    def _add_again(self, name: bytes, field: str, value: bytes) -> None:
        if field in _LISTS:
            setattr(self, field, getattr(self, field) + b", " + value)
        elif field in _REPLACED:
            setattr(self, field, b"")
        else:
            self.repeated = name

    def check_repeated(self) -> None:
        """Raises `InvalidRequest` for a header with several values: a proxy may choose another one than the gateway."""
        if self.repeated is not None:
            name = self.repeated.decode("ascii").title()
            raise invalid((f"header {name}", "was sent more than once; send it once"))


_FIELDS: Final = {
    b"accept": "accept",
    b"accept-encoding": "accept_encoding",
    b"access-control-request-method": "requested_method",
    b"authorization": "authorization",
    b"content-length": "content_length",
    b"content-type": "content_type",
    b"forwarded": "forwarded",
    b"x-forwarded-for": "forwarded",
    b"x-real-ip": "forwarded",
    b"via": "forwarded",
    b"host": "host",
    b"sec-fetch-dest": "fetch_dest",
    b"sec-fetch-mode": "fetch_mode",
    b"sec-fetch-site": "fetch_site",
    b"idempotency-key": "idempotency_key",
    b"if-match": "if_match",
    b"if-none-match": "if_none_match",
    b"last-event-id": "last_event_id",
    b"origin": "origin",
    b"prefer": "prefer",
    b"x-request-id": "x_request_id",
    b"traceparent": "traceparent",
    b"transfer-encoding": "transfer_encoding",
}
_LISTS: Final = frozenset({"accept", "accept_encoding", "forwarded", "if_none_match", "prefer"})
_REPLACED: Final = frozenset({"traceparent", "x_request_id"})
"""Of two values, neither counts: a new one replaces them (W3C Trace Context 3.2.2.5)."""


def check_content_type(value: bytes | None) -> None:
    """Raises `UnsupportedMediaType` where Content-Type does not say JSON."""
    if value == b"application/json":
        return
    kind, _, parameters = (value or b"").lower().partition(b";")
    charset = parameters.strip().removeprefix(b"charset=").strip(b'"')
    if kind.strip() != b"application/json" or charset not in (b"", b"utf-8"):
        raise problems.UnsupportedMediaType


_ETAG: Final = re.compile(rb'^(?:W/)?"([1-9]\d{0,8})(?:-in-stock)?"\Z')


def expected_version(if_match: bytes) -> int | None:
    """The version that If-Match names; None for `*`. Raises `InvalidRequest`."""
    if if_match == b"*":
        return None
    if not (match := _ETAG.match(if_match)):
        raise invalid(("header If-Match", 'is not one ETag such as "3"'))
    return int(match[1])


WAIT_LIMIT_SECONDS: Final = 60
_PREFERENCE: Final = re.compile(rb'(?:[^",]|"(?:[^"\\]|\\.)*"?)+')
"""One preference with its parameters: up to a comma that is not in quotes."""
_NAME_AND_VALUE: Final = re.compile(rb'(?:[^";]|"(?:[^"\\]|\\.)*"?)+')


def preferred_wait_ms(prefer: bytes) -> int | None:
    """The milliseconds of `wait` (RFC 7240), at most a minute. None where only other preferences are named.

    Raises `InvalidRequest` for a wait that is not a number of seconds.
    """
    seconds = _preference(prefer, b"wait")
    if seconds is None:
        return None
    if not seconds.isdigit():
        raise invalid(("header Prefer", "wait is not a whole number of seconds, as in wait=5"))
    return min(int(seconds[:6]), WAIT_LIMIT_SECONDS) * 1_000


def prefers_count(prefer: bytes) -> bool:
    """Whether `count=exact` is among the preferences. Other counts are ignored, as unknown preferences (RFC 7240)."""
    return _preference(prefer, b"count") == b"exact"


def _preference(prefer: bytes, wanted: bytes) -> bytes | None:
    """The value of a preference. Of a repeated one the first counts; parameters of other preferences do not count."""
    for preference in _PREFERENCE.findall(prefer):
        named = _NAME_AND_VALUE.match(preference)
        name, _, value = (named[0] if named else b"").partition(b"=")
        if name.strip().lower() == wanted:
            return value.strip().strip(b'"')
    return None
