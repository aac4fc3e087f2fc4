"""`Streams`: opens a stream for a request, and looks after the open ones."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol, TypeVar

import msgspec

from mercato.chassis.contract import MAX_ID
from mercato.chassis.http import STREAM_RESPONSE
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.contracts.events import EventPage, FollowEvents
from mercato.contracts.roles import STAFF
from mercato.gateway import problems, representations
from mercato.gateway.asgi import Send
from mercato.gateway.headers import RequestHeaders
from mercato.gateway.route import Route, RouteRequest, Streamed
from mercato.gateway.validation import invalid

from .entries import Interest, message
from .feed import SharedFeed
from .limits import Places, StreamLimits
from .stream import CATCH_UP_LIMIT, Stream, position_message

MEDIA_TYPE: Final = "text/event-stream"
HEAD: Final = (
    f"content-type: {MEDIA_TYPE}".encode(),
    problems.NO_STORE,
    b"x-accel-buffering: no",  # nginx would collect the events of a whole buffer
)
LOOK_EVERY_SECONDS: Final = 1.0
"""How often the open streams are looked at: as often as ended sessions are read."""

_encode: Final = msgspec.json.Encoder().encode


class OpenStream:
    """A stream with its place. The body of an answer: `respond` sends it."""

    __slots__ = ("_end_at", "_is_valid", "_streams", "beat_at", "key", "kind", "stream")

    def __init__(
        self, streams: Streams, stream: Stream, kind: str, key: str, is_valid: Callable[[], bool], end_at: float
    ) -> None:
        self.stream = stream
        self.kind = kind
        self.key = key
        self.beat_at = 0.0
        self._streams = streams
        self._is_valid = is_valid
        self._end_at = end_at

    async def respond(self, scope: Mapping[str, Any], send: Send, status: int, lines: list[bytes]) -> None:
        """Sends head and messages, until the end."""
        self._streams.opened(self)
        try:
            if STREAM_RESPONSE in scope.get("extensions", ()):
                interrupt = lambda: self.stream.end("stopped")  # noqa: E731
                await send({"type": STREAM_RESPONSE, "status": status, "lines": lines, "interrupt": interrupt})
            else:
                await send({"type": "http.response.start", "status": status, "headers": representations.fields(lines)})
            await self.stream.run(send)
        finally:
            self._streams.closed(self)

    def look(self, now: float, heartbeat_seconds: float) -> None:
        """Ends it where its time is over or its token is not valid any more; sends a heartbeat when it is due."""
        if not self._is_valid():
            self.stream.end("token_ended")
        elif now >= self._end_at:
            self.stream.end("lasted_long")
        elif self.stream.was_sent():
            self.beat_at = now + heartbeat_seconds
        elif now >= self.beat_at:
            self.stream.beat()


class OnlyHead:
    """The answer to HEAD: no stream is opened."""

    async def respond(self, scope: Mapping[str, Any], send: Send, status: int, lines: list[bytes]) -> None:
        """Sends the head."""
        await send({"type": "http.response.start", "status": status, "headers": representations.fields(lines)})
        await send({"type": "http.response.body", "body": b""})


class Streams:
    """The streams of one process. `follow` calls the operation of the events service."""

    def __init__(
        self,
        follow: Callable[[FollowEvents], Awaitable[EventPage]],
        clock: Clock,
        limits: StreamLimits,
        telemetry: Telemetry,
    ) -> None:
        self.feed = SharedFeed(follow, clock, limits)
        self._clock = clock
        self._limits = limits
        self._places = Places(limits)
        self.open: set[OpenStream] = set()
        self._looking: asyncio.Task[None] | None = None
        about = "Streams of events that are open: of the feed, or of one order."
        self._opened = telemetry.gauge("mercato_streams_open", about, ["kind"], workers="livesum")
        about = "Streams of events that have ended, by why."
        self._ended = telemetry.counter("mercato_streams_ended", about, ["kind", "reason"])
        about = "How often a stream had to read from the feed, because its client took less than there was."
        self._behind = telemetry.counter("mercato_streams_behind", about, ["kind"])

    async def begin(
        self,
        streamed: Streamed,
        request: RouteRequest,
        answer: Any,
        again: Callable[[], Awaitable[Any]],
        scope: Mapping[str, Any],
        is_valid: Callable[[], bool],
    ) -> tuple[int, list[bytes], Any]:
        """The answer of a route to a caller who may see what `answer` shows. `again` calls its operation once more.

        Raises `TooManyStreams`, `StreamsFull`, `CursorTooOld` and `CursorAhead`, and the errors of the calls.
        """
        client = scope.get("client")
        key = self._places.take(request.actor, client[0] if client else "")
        try:
            stream = await self._stream(streamed, request, answer, again)
        except BaseException:
            self._places.leave(key)
            raise
        if scope["method"] == "HEAD":
            self._places.leave(key)
            stream.discard()
            return 200, [*HEAD], OnlyHead()
        lasts = self._limits.longest_seconds * random.uniform(0.9, 1.0)
        return 200, [*HEAD], OpenStream(self, stream, streamed.kind, key, is_valid, self._clock.monotonic() + lasts)

    async def _stream(
        self, streamed: Streamed, request: RouteRequest, answer: Any, again: Callable[[], Awaitable[Any]]
    ) -> Stream:
        interest = _interest(streamed, request)
        after = position_of(request)
        first, is_at_end = b"retry: %d\n" % random.randint(*self._limits.retry_ms), False
        if after is None:
            # The snapshot is read after the end: what happens in between is in both, and nothing is in neither.
            after, is_at_end = await self.feed.end(), True
            if streamed.snapshot is not None:
                body = _encode(streamed.snapshot(await again()))
                first += message(after, streamed.kind, body)
            else:
                first += position_message(after, b"the end of the feed")
        else:
            page = answer if isinstance(answer, EventPage) else None
            if page is None:
                page = await self.feed.read(interest.request(after, CATCH_UP_LIMIT))
            messages, is_end = interest.messages_of(page.entries)
            first += b"".join([body for _, body in messages]) or position_message(page.next_after, b"nothing new")
            after, is_at_end = page.next_after, not page.is_full
            if is_end:
                stream = Stream(self.feed, self._limits, interest, after, first, at_end=is_at_end)
                stream.end("claimed")
                return stream
        return Stream(self.feed, self._limits, interest, after, first, at_end=is_at_end)

    def opened(self, opened: OpenStream) -> None:
        opened.beat_at = self._clock.monotonic() + self._limits.heartbeat_seconds
        self.open.add(opened)
        self._opened.labels(opened.kind).inc()
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), context=contextvars.Context(), name="look after streams")

    def closed(self, closed: OpenStream) -> None:
        self.open.discard(closed)
        self._places.leave(closed.key)
        self._opened.labels(closed.kind).dec()
        self._ended.labels(closed.kind, closed.stream.ended).inc()
        if closed.stream.fell_behind:
            self._behind.labels(closed.kind).inc(closed.stream.fell_behind)
        if not self.open and self._looking is not None:
            self._looking.cancel()
            self._looking = None

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_SECONDS)
            now = self._clock.monotonic()
            for opened in list(self.open):
                opened.look(now, self._limits.heartbeat_seconds)


def _interest(streamed: Streamed, request: RouteRequest) -> Interest:
    query, is_buyers = request.query, request.actor.role != STAFF
    return Interest(
        types=frozenset(query.types.split(",")) if query.types else frozenset(),
        subject=streamed.subject(request) if streamed.subject else query.subject,
        is_buyers=is_buyers,
        until_claimed=request.access_token is not None,
    )


def position_of(request: RouteRequest) -> int | None:
    """The position after which a client goes on: that of Last-Event-ID, which is newer than the one in its address."""
    return request.last_event_id if request.last_event_id is not None else request.query.after


# ------------------------------------------------------------------------------------------------------- the request


def last_event_id(headers: RequestHeaders) -> int | None:
    """The position in Last-Event-ID; None where there is none. Raises `InvalidRequest`."""
    given = headers.last_event_id
    if not given:  # a browser that has seen no id may send an empty one
        return None
    if not given.isdigit() or len(given) > 16 or int(given) > MAX_ID:
        raise invalid(("header Last-Event-ID", "is not the id of an event of a stream, which is a number"))
    return int(given)


class AcceptingRoute(Protocol):
    """A route with a stream."""

    @property
    def route(self) -> Route: ...


A = TypeVar("A", bound=AcceptingRoute)


def accepted(route: A, as_stream: A | None, accept: bytes | None) -> A:
    """The form of a route for a client that sends this Accept. `as_stream`: None where it only has that form.

    A stream is chosen by its name, unless JSON weighs more. Where there is no other form, a range will do (RFC 9110
    12.5.1). Raises `NotAcceptable`.
    """
    weights = _weights(accept)
    if as_stream is not None:
        wanted = weights.get(MEDIA_TYPE, 0.0)
        return as_stream if wanted > 0 and wanted >= weights.get("application/json", 0.0) else route
    if accept is not None and not next((weights[n] for n in (MEDIA_TYPE, "text/*", "*/*") if n in weights), 0.0):
        raise problems.NotAcceptable(path=route.route.path, offered=MEDIA_TYPE)
    return route


def _weights(accept: bytes | None) -> dict[str, float]:
    """The weight of each media type and range; what is not a number counts as 1."""
    weights: dict[str, float] = {}
    for one in (accept or b"").decode("latin-1").lower().split(","):
        name, *parameters = (part.strip() for part in one.split(";"))
        weight = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = 1.0
    return weights
