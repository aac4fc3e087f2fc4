"""The API as an ASGI application: from bytes to a route of the table, and from its answer to bytes.

What happens to a request, in this order; each step may refuse:

    1. find the route        unknown path 404, unknown method 405 with Allow; OPTIONS gets Allow, also of *
    2. identify the caller   address of an open shop 403, token 401, role 403, rate 429
    3. decode the request    size 413, content type 415, JSON, path, query and headers 400, all wrong fields at once
    4. call the operation    while its class is below its limit, else 503; its errors become problems
    5. answer                one message where the server takes one (`mercato.chassis.http`), else two

A request that finds the queue for step 4 full is refused before step 2 (`mercato.chassis.http.shedding`). `BoundRoute`
decides everything that can be decided before the first request, once for each route.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog

from mercato.chassis.contract import (
    ANONYMOUS_ACTOR,
    Actor,
    Call,
    FieldError,
    Internal,
    InvalidRequest,
    Operation,
    ServiceError,
    current,
)
from mercato.chassis.hosting.host import GATEWAY
from mercato.chassis.http import COMPLETE_RESPONSE, LoadLimits, Priority, Shedder
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.contracts.events import Events
from mercato.contracts.money import DEFAULT_CURRENCY
from mercato.gateway import access_log, cursors, guests, idempotency, problems, representations, totals
from mercato.gateway.asgi import Asgi, Client, Lines, Receive, Scope, Send
from mercato.gateway.auth import Authenticator
from mercato.gateway.cross_origin import CrossOrigin
from mercato.gateway.headers import (
    RequestHeaders,
    check_content_type,
    expected_version,
    preferred_wait_ms,
    prefers_count,
)
from mercato.gateway.other_requests import allowed, answer_other_method, serve_page
from mercato.gateway.rates import PasswordTries, RateLimiter, call_guarded
from mercato.gateway.route import NO_TEXT, Page, Route, RouteRequest, gathering
from mercato.gateway.shared_counts import SharedCounts
from mercato.gateway.spans import CLIENT_GONE, answered, end_request, labels_of, method_label, order_in
from mercato.gateway.streams.limits import StreamLimits
from mercato.gateway.streams.opening import OnlyHead, OpenStream, Streams, accepted, last_event_id
from mercato.gateway.validation import (
    ClientGone,
    all_wrong,
    decode_body,
    decode_query,
    decoder,
    form_of,
    form_of_path,
    invalid,
    numbers_of,
    read_body,
    reworded,
    texts_of,
)
from mercato.gateway.waiting import Waiting

REQUEST_SECONDS: Final = 10.0
ADDRESS_LENGTH: Final = 64
"""The longest client address that contracts take."""

JSON: Final = b"content-type: application/json"
REVALIDATE: Final = b"cache-control: no-cache"

log = structlog.stdlib.get_logger("mercato.gateway", service=GATEWAY)


class Gateway:
    """The table as an ASGI application. `fallback` gets requests for other paths: pages, health, metrics."""

    def __init__(
        self,
        routes: Sequence[Route],
        *,
        client: Callable[[Operation[Any, Any]], Call[Any, Any]],
        authenticator: Authenticator,
        telemetry: Telemetry,
        clock: Clock,
        fallback: Asgi,
        currency: str = DEFAULT_CURRENCY,
        request_seconds: float = REQUEST_SECONDS,
        log_requests: bool = False,
        slow_seconds: float = access_log.SLOW_SECONDS,
        load: LoadLimits | None = None,
        cross_origin: CrossOrigin | None = None,
        counts: SharedCounts | None = None,
        streams: StreamLimits | None = None,
    ) -> None:
        self.bind = functools.partial(BoundRoute, client=client, telemetry=telemetry, currency=currency)
        """Makes a route that answers, under another name."""
        self.table = Table([self.bind(route) for route in routes])
        self.authenticator = authenticator
        self._requests = answered(telemetry)
        self._tracing = telemetry.tracing
        self._exemplars = telemetry.exemplars
        self.monotonic = clock.monotonic
        self._fallback = fallback
        self.seconds = request_seconds
        counts = counts or SharedCounts(clock.monotonic)
        self._rates = RateLimiter(counts, clock)
        self._tries = PasswordTries(counts, clock)
        self.log_requests = log_requests
        self.slow_seconds = slow_seconds
        self.cross_origin = cross_origin
        self.load = Shedder(load or LoadLimits(), monotonic=clock.monotonic, telemetry=telemetry)
        self.stream_limits = streams or StreamLimits()
        self.streams = None
        """None: no route answers with a stream."""
        if any(route.stream for route in routes):
            self.streams = Streams(client(Events.follow), clock, self.stream_limits, telemetry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        headers = RequestHeaders(scope["headers"])
        found, parts = self.table.find(scope["method"], scope["path"])
        route = found if isinstance(found, BoundRoute) else None
        if route is not None and self._tracing.is_on:
            headers.span = self._tracing.request(
                route.name, GATEWAY, headers.trace_id, headers.parent_id, asked=headers.asks_for_trace, started=started
            )
        try:
            headers.check_repeated()
            if route is not None:
                status, lines, body = await self._serve(route, parts, scope, receive, send, headers)
            elif isinstance(found, problems.MethodNotAllowed):
                status, lines, body = answer_other_method(self, found, scope["method"], headers)
            else:
                await serve_page(self, self._fallback, scope, receive, send, headers)
                return
        except ServiceError as error:
            status, lines, body = problems.render(error, headers.trace_id)
        except ClientGone:
            if headers.span is not None:
                headers.span.end(CLIENT_GONE)
            return
        except Exception as error:  # any bug: the client gets an answer and the log the cause
            log.error(
                "request_failed", trace_id=headers.trace_id, route=route.name if route else "none", exc_info=error
            )
            status, lines, body = problems.render(Internal(operation=scope["path"]), headers.trace_id)
        lines.append(b"x-request-id: " + headers.request_id.encode())
        if self.cross_origin is not None:
            lines += self.cross_origin.lines(headers, scope["method"])
        extensions = scope.get("extensions")
        if not isinstance(body, bytes):
            self._note_answered(route, status, started, headers, scope["method"])
            await body.respond(scope, send, status, lines)
            return
        if extensions is not None and COMPLETE_RESPONSE in extensions:
            await send({"type": COMPLETE_RESPONSE, "status": status, "lines": lines, "body": body})
        else:
            await representations.send_in_two(send, status, lines, body)
        self._note_answered(route, status, started, headers, scope["method"])

    def _note_answered(
        self, route: BoundRoute | None, status: int, started: float, headers: RequestHeaders, method: str
    ) -> None:
        """Ends the span of a request, counts and logs it: when its answer was sent, or the head of a stream is."""
        seconds = time.perf_counter() - started
        if headers.span is not None and route is not None:
            end_request(headers.span, self._tracing, self._exemplars, route.route, status, headers, seconds)
        self.note(route, status, seconds, headers, method)

    def check_source(self, headers: RequestHeaders, method: str) -> None:
        """Raises a `ServiceError` for a request that may not come from where it does."""
        self.authenticator.check_source(headers, method)

    def deadline(self) -> float:
        """That of a request which arrives now."""
        return self.monotonic() + self.seconds

    async def _serve(
        self,
        route: BoundRoute,
        parts: Mapping[str, str],
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: RequestHeaders,
    ) -> tuple[int, Lines, bytes | OpenStream | OnlyHead]:
        if (load := self.load).waiting and load.in_work >= load.capacity[route.priority]:
            await load.check(route.priority, route.name)
        if route.can_stream:
            route = accepted(route, route.as_stream, headers.accept)
        client: Client = scope.get("client")
        self.authenticator.check_source(headers, scope["method"])
        access_token, query = None, scope["query_string"]
        if route.takes_access_token:
            access_token, query = guests.access_token(headers.authorization, query)
        actor, session_id = await self.admit(route, headers, access_token, client)
        is_valid = self.authenticator.validity(headers.authorization, actor) if route.stream is not None else None
        route, request = await route.read(actor, parts, scope, query, receive, headers)
        request.access_token = access_token
        if route.are_counted and headers.prefer is not None:
            request.counts = prefers_count(headers.prefer)
        if session_id:
            request.session_id = session_id
        if is_valid is not None:
            request.last_event_id = last_event_id(headers)
        if route.knows_address:
            request.address = address_of(client)[:ADDRESS_LENGTH]
        asked = route.request(request)
        answer = await self.perform(route, request, asked, headers, client, self.seconds)
        if self.streams is not None and route.stream is not None and is_valid is not None:
            again = lambda: self._call(route, request, asked, client, self.monotonic(), self.deadline())  # noqa: E731
            return await self.streams.begin(route.stream, request, answer, again, scope, is_valid)
        if request.wait_ms is None:
            shown = route.respond(answer, scope, request.query, counts=request.counts)
            return representations.negotiated(*shown, headers) if route.is_public else shown
        context = current.get()
        current.set(headers.context(context.actor, context.deadline + request.wait_ms / 1_000))
        assert route.waiting is not None
        return await route.waiting.respond(answer, request.wait_ms, scope, send, headers.trace_id)

    async def admit(
        self, route: BoundRoute, headers: RequestHeaders, access_token: str | None, client: Client
    ) -> tuple[Actor, str]:
        """The actor of a request that may use the route, and its session if the route needs it.

        Raises a `ServiceError` for a request that is refused before its content is read.
        """
        authenticator, authorization = self.authenticator, headers.authorization
        if authorization is None or route.ignores_token:
            actor = authenticator.anonymous_actor if access_token is None else ANONYMOUS_ACTOR
        elif (known := authenticator.remembered(authorization)) is not None:
            actor = known
        else:
            ends, takes_ended = self.deadline(), route.takes_ended_session
            actor = await authenticator.verified(authorization, headers, ends, takes_ended=takes_ended)
        headers.actor_id = actor.id
        if actor.role not in route.roles and access_token is None and route.is_guest is None:
            raise problems.not_allowed(actor.role, route.name)
        if route.is_limited:
            self._rates.check(route.rates, route.limits, actor, address_of(client))
        # Before the next await: another request may evict the token from the cache.
        return actor, authenticator.session_id(authorization) if route.knows_session and authorization else ""

    async def perform(
        self,
        route: BoundRoute,
        request: RouteRequest,
        asked: Any,
        headers: RequestHeaders,
        client: Client,
        within: float,
    ) -> Any:
        """What the caller sees of the answer to `asked`, the request of the operation, within so many seconds.

        Raises a `ServiceError`.
        """
        entered_at = self.monotonic()
        if route.order_asked is not None:
            headers.concern(route.order_asked(asked))
        actor = request.actor
        if not actor.id and (request.access_token is not None or route.is_guest is not None):
            actor = guests.checked(route, request, asked, address_of(client), self._rates)
        current.set(headers.context(actor, deadline := entered_at + within))
        try:
            answer = await self._call(route, request, asked, client, entered_at, deadline)
        except InvalidRequest as error:
            raise reworded(error, route.route.fields) from None
        if not headers.order_id and route.order_answered is not None:
            headers.concern(route.order_answered(answer))
        return answer if route.seen is None else route.seen(answer, request.actor)

    async def _call(
        self, route: BoundRoute, request: RouteRequest, asked: Any, client: Client, entered_at: float, deadline: float
    ) -> Any:
        """The answer of a route's operation, counted as a request in work. Raises its errors, and `Overloaded`."""
        load = self.load
        priority = Priority.REPORT if request.counts else route.priority
        if load.in_work < load.capacity[priority]:
            load.in_work += 1
            if load.in_work > load.peak:
                load.peak = load.in_work
        else:
            entered_at = await load.queue(priority, route.name, deadline)
        try:
            if route.is_guarded:
                return await call_guarded(route, request, asked, address_of(client), self._rates, self._tries)
            return await (route.call if request.access_token is None else route.guest_call)(asked)
        finally:
            load.in_work -= 1
            slow_seconds = load.slow_seconds[priority]
            if slow_seconds is not None and not route.is_guarded:
                load.measured += 1
                load.slow += self.monotonic() - entered_at > slow_seconds
            if load.waiting or load.measured >= load.window_requests:
                load.end_window()

    def note(self, route: BoundRoute | None, status: int, seconds: float, headers: RequestHeaders, method: str) -> None:
        if route is not None:
            (route.observe.get(status) or route.observe_status(status))(seconds)
        else:
            self._requests.labels(method_label(method), "", str(status)).observe(seconds)
        is_slow = seconds >= self.slow_seconds
        # An overloaded process answers 503 to many: its metrics count them.
        if self.log_requests or (status >= 500 and status != 503) or is_slow:
            access_log.note(method, route.route.path if route else "none", status, seconds, headers, is_slow=is_slow)


def address_of(client: Client) -> str:
    return client[0] if client else ""


class Table:
    """Finds the route of a method and path: a path without a parameter by one look-up, a path with one by its shape.

    The shape of a path is the path without its parameter: that of `/orders/12/history` is `/orders//history`. A path
    has at most one parameter, and in paths of one length it is at few positions; each of them costs one look-up.
    """

    def __init__(self, routes: Sequence[BoundRoute]) -> None:
        self._fixed: dict[str, dict[str, BoundRoute]] = {}
        self._shaped: dict[str, tuple[str, dict[str, BoundRoute]]] = {}
        self._places: dict[int, list[int]] = {}
        self._all_methods = allowed(route.route.method for route in routes)
        for route in routes:
            path, method = route.route.path, route.route.method
            methods = self._fixed.setdefault(path, {}) if "{" not in path else self._add_shape(path)
            assert method not in methods, f"two routes for {route.name}"
            methods[method] = route

    def _add_shape(self, path: str) -> dict[str, BoundRoute]:
        segments = path.split("/")
        places = [i for i, segment in enumerate(segments) if "{" in segment]
        assert len(places) == 1, f"{path} has more than one parameter"
        place = places[0]
        name, segments[place] = segments[place].strip("{}"), ""
        known = self._places.setdefault(len(segments), [])
        if place not in known:
            known.append(place)
        return self._shaped.setdefault("/".join(segments), (name, {}))[1]

    def find(self, method: str, path: str) -> tuple[BoundRoute | problems.MethodNotAllowed | None, Mapping[str, str]]:
        """The route and the path's parameters; an error where the path takes other methods; None for unknown paths.

        `*` is the server itself, which takes only OPTIONS, and answers with all methods of the API.
        """
        methods, parts = self._fixed.get(path), NOTHING
        if methods is None:
            methods, parts = self._find_shaped(path)
            if methods is None:
                is_server = path == "*"
                return problems.MethodNotAllowed(path=path, allowed=self._all_methods) if is_server else None, NOTHING
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            return problems.MethodNotAllowed(path=path, allowed=allowed(methods)), NOTHING
        return route, parts

    def _find_shaped(self, path: str) -> tuple[dict[str, BoundRoute] | None, Mapping[str, str]]:
        segments = path.split("/")
        for place in self._places.get(len(segments), ()):
            value, segments[place] = segments[place], ""
            found = self._shaped.get("/".join(segments))
            if found is not None and value:
                return found[1], {found[0]: value}
            segments[place] = value
        return None, NOTHING


NOTHING: Final[Mapping[str, Any]] = {}


class BoundRoute:
    """A route with its client, its metrics, its decoder, and everything else that is known before a request."""

    def __init__(
        self,
        route: Route,
        client: Callable[[Operation[Any, Any]], Call[Any, Any]],
        telemetry: Telemetry,
        currency: str,
        name: str = "",
    ) -> None:
        self.route = route
        self.rates = f"{route.method} {route.path}"
        """Under which its callers are counted, however they call."""
        self._currency = currency
        self.call: Callable[[Any], Awaitable[Any]] = client(route.operation)
        self.guest_call = client(route.guest_operation) if route.guest_operation else self.call
        if route.parts:
            self.call = gathering(route.parts, self.call, client)
        self.name = name or self.rates
        self.order_asked = order_in(route.operation.service, route.operation.request)
        self.order_answered = order_in(route.operation.service, route.operation.answer)
        self.waiting = Waiting(route.wait, client(route.wait.operation), self) if route.wait else None
        self.roles = route.roles
        self.priority = route.priority
        self.ignores_token = route.ignores_token
        self.takes_ended_session = route.takes_ended_session
        self.limits = route.limits
        self.is_limited = route.limits.per_second is not None
        self.tries = route.tries
        self.is_guarded = route.tries is not None or route.limits.done_per_hour is not None
        self.request = totals.asking(route)
        self.are_counted = totals.are_counted(route)
        self.knows_session = route.knows_session
        self.knows_address = route.knows_address
        self.seen = route.seen
        self.is_public = route.is_public
        self._text = route.text
        self.is_guest = route.is_guest
        self.takes_access_token = route.takes_access_token
        self._requests = answered(telemetry)
        self.observe: dict[int, Callable[[float], None]] = {}
        """Takes the seconds of a request, by the status of its answer; `observe_status` makes one that is missing."""
        self._decoder = decoder(route.body) if route.body else None
        self._body_optional = route.body_optional
        self._body_bytes = route.limits.body_bytes
        self._query = route.query
        self._is_paged = cursors.is_paged(route)
        self._encode = msgspec.json.Encoder().encode
        self._status = route.status
        self._show = route.answer
        self._head = (JSON, *((REVALIDATE, *totals.vary(route)) if route.is_public else (problems.NO_STORE,)))
        self.stream = route.stream if route.stream and route.stream.is_only else None
        self.can_stream = route.stream is not None
        other = None if self.stream or route.stream is None else route.stream.of(route)
        self.as_stream = None if other is None else BoundRoute(other, client, telemetry, currency)
        self._plain = not (route.etag or route.location or route.replayed)
        self._forms = [(form, BoundRoute(form.of(route), client, telemetry, currency)) for form in route.forms]

    def observe_status(self, status: int) -> Callable[[float], None]:
        observe = self.observe[status] = self._requests.labels(**labels_of(self.route, status)).add
        return observe

    # ------------------------------------------------------------------------------------------- decode the request

    async def read(
        self,
        actor: Actor,
        parts: Mapping[str, str],
        scope: Scope,
        query_string: bytes,
        receive: Receive,
        headers: RequestHeaders,
    ) -> tuple[BoundRoute, RouteRequest]:
        """The request, checked and typed, and the route for it: this one, or that of a form in which the request is.

        Raises a `ServiceError`, or `ClientGone`.
        """
        body = raw = None
        if self._decoder is not None:
            raw = await read_body(receive, self._body_bytes)
            if raw or not self._body_optional:
                check_content_type(headers.content_type)
            try:
                body = decode_body(self._decoder, raw or (b"{}" if self._body_optional else b""))
            except InvalidRequest as error:
                form = form_of(self._forms, raw)
                if form is None:
                    raise self._all_wrong(error.errors, parts, scope, query_string, headers) from None
                return form, form.typed(actor, parts, scope, query_string, headers, raw, form.decode(raw))
        elif headers.content_length not in (None, b"0") or headers.transfer_encoding is not None:
            try:
                await self._check_no_body(receive)
            except InvalidRequest as error:
                raise self._all_wrong(error.errors, parts, scope, query_string, headers) from None
        if self._decoder is None and self._forms and (form := form_of_path(self._forms, parts)) is not None:
            return form, form.typed(actor, parts, scope, query_string, headers, None, None)
        return self, self.typed(actor, parts, scope, query_string, headers, raw, body)

    async def _check_no_body(self, receive: Receive) -> None:
        """Raises `InvalidRequest` for a body that is not empty, of a route that takes none."""
        if (await read_body(receive, self._body_bytes)).strip() not in (b"", b"{}"):
            raise invalid(("body", f"{self.name} takes none; leave it out"))

    def decode(self, raw: bytes) -> Any:
        assert self._decoder is not None
        return decode_body(self._decoder, raw)

    def typed(
        self,
        actor: Actor,
        parts: Mapping[str, str],
        scope: Scope,
        query_string: bytes,
        headers: RequestHeaders,
        raw: bytes | None,
        body: Any,
    ) -> RouteRequest:
        """The request with its decoded body and everything beside it."""
        try:
            text = texts_of(parts, self._text) if self._text else NO_TEXT
            path = numbers_of(parts, scope["path"]) if parts and not text else NOTHING
            query = self._asked(scope["path"], query_string)
            key, fingerprint = self._key(headers), b""
            if key is not None:
                method, pattern = self.route.method, self.route.path
                fingerprint = idempotency.fingerprint(method, pattern, parts, query_string, raw or b"")
            elif self.route.idempotency_required:
                raise problems.IdempotencyKeyMissing(operation=self.name)
            version, wait_ms = self._version(headers), self._wait_ms(headers)
        except InvalidRequest:
            raise self._all_wrong((), parts, scope, query_string, headers) from None
        return RouteRequest(actor, path, query, body, version, key, fingerprint, wait_ms, self._currency, text)

    def _asked(self, path: str, query_string: bytes) -> Any:
        if self._query is not None:
            asked = cursors.opened(path, query_string) if self._is_paged else query_string
            return decode_query(self._query, asked)
        if query_string:
            raise invalid(("?", "this takes no query parameters"))
        return None

    def _key(self, headers: RequestHeaders) -> str | None:
        if headers.idempotency_key is None:
            return None
        if not self.route.idempotency:
            raise invalid(("header Idempotency-Key", f"{self.name} does not take one"))
        return idempotency.key_of(headers.idempotency_key)

    def _version(self, headers: RequestHeaders) -> int | None:
        if headers.if_match is None:
            return None
        if not self.route.if_match:
            raise invalid(("header If-Match", f"{self.name} does not take one"))
        return expected_version(headers.if_match)

    def _wait_ms(self, headers: RequestHeaders) -> int | None:
        return preferred_wait_ms(headers.prefer) if headers.prefer is not None and self.route.wait is not None else None

    def _all_wrong(
        self,
        of_body: Sequence[FieldError],
        parts: Mapping[str, str],
        scope: Scope,
        query_string: bytes,
        headers: RequestHeaders,
    ) -> InvalidRequest:
        """One error that names all that is wrong with the body and with everything beside it."""
        return all_wrong(
            of_body,
            lambda: texts_of(parts, self._text) if self._text else numbers_of(parts, scope["path"]),
            lambda: self._asked(scope["path"], query_string),
            lambda: self._key(headers),
            lambda: self._version(headers),
            lambda: self._wait_ms(headers),
        )

    def respond(
        self, answer: Any, scope: Scope, query: Any = None, *, counts: bool = False
    ) -> tuple[int, Lines, bytes]:
        """Status, headers and body of the operation's answer."""
        shown = self._show(answer)
        if shown is None:
            return 204, [problems.NO_STORE], b""
        lines = [*self._head]
        if isinstance(shown, Page):
            lines += totals.lines(answer, shown) if counts else ()
            shown = cursors.sliced(shown, query)
            if shown.next_query is not None:
                lines.append(cursors.link(scope, shown.next_query))
            return self._status, lines, self._encode(shown.items)
        if not self._plain:
            if self.route.etag is not None and (tag := self.route.etag(answer)) is not None:
                lines.append(f'etag: "{tag}"'.encode())
            lines += self.location_lines(answer)
        return self._status, lines, self._encode(shown)

    def location_lines(self, answer: Any) -> Lines:
        """The path of the resource, and whether an earlier request created it; also for a refused order."""
        route = self.route
        lines: Lines = []
        if route.location is not None:
            lines.append(b"location: " + route.location(answer).encode())
        if route.replayed is not None and route.replayed(answer):
            lines.append(b"idempotent-replayed: true")
        return lines
