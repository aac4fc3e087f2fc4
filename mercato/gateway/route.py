"""The declaration of a route. The routes are in `routes/`, one file a service; `app.py` answers requests from them."""

from __future__ import annotations

import types
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, dataclass_transform
from urllib.parse import urlencode

import msgspec

from mercato.chassis.contract import Actor, Call, Message, Operation, ServiceError
from mercato.chassis.http import Priority

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]

MAX_BODY_BYTES: Final = 1_048_576

PART_LIMIT: Final = 1_000
"""The entries of a part in one answer; the last page may exceed it."""

NO_TEXT: Final[Mapping[str, str]] = types.MappingProxyType({})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A JSON body or the query parameters. Unknown fields are refused: a misspelt filter must not be ignored."""

    @classmethod
    def wrong_members(cls, given: Collection[str]) -> Iterable[tuple[str, str]]:
        """Errors in the combination of members that are given, and not null: pairs of field and message."""
        return ()


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Output(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A JSON answer."""


class RouteRequest(msgspec.Struct, gc=False):
    """A request as a route gets it: its actor and its parts, checked and typed."""

    actor: Actor
    path: Mapping[str, int]
    """The numbers in the path, by name."""
    query: Any
    """The route's `query` model, or None."""
    body: Any
    """The route's `body` model, or None."""
    if_match: int | None
    """The version in If-Match; None where there is none, or `*`."""
    idempotency_key: str | None
    fingerprint: bytes
    wait_ms: int | None
    """How long the client waits (`Prefer: wait=N`); None without that preference."""
    currency: str
    """The currency of the shop, for amounts without one."""
    text: Mapping[str, str] = NO_TEXT
    """The texts in the path, by name."""
    session_id: str = ""
    """The session of the caller's access token, for a route with `knows_session`; empty without a token."""
    address: str = ""
    """The address of the client's connection, for a route with `knows_address`."""
    access_token: str | None = None
    """The access token of a guest's order, for the routes that take one."""
    counts: bool = False
    """Whether the client asks how many entries a collection has (`Prefer: count=exact`)."""
    last_event_id: int | None = None
    """The position after which a stream goes on; None: its header is not sent."""


class Limits(msgspec.Struct, frozen=True):
    """`body_bytes`: the largest body. `per_second`, `burst`: the rate of one caller; None: no limit."""

    body_bytes: int = MAX_BODY_BYTES
    per_second: int | None = None
    burst: int = 1
    done_per_hour: int | None = None
    """How often anonymous callers from one address may succeed; None: no limit."""


class Page(msgspec.Struct, frozen=True):
    """A page of a collection. `next_query` has the query parameters that change for the next page; None on the last."""

    items: list[Any]
    next_query: Mapping[str, str] | None = None


class Wait(msgspec.Struct, frozen=True):
    """What `Prefer: wait=N` (RFC 7240) waits for, once the route's own operation has answered.

    `request` makes the request of `operation` from that answer and the milliseconds to wait; `answer` makes the route's
    answer from both answers. Where waiting fails, the client gets the route's own answer, which is still correct.
    """

    operation: Operation[Any, Any]
    request: Callable[[Any, int], Any]
    answer: Callable[[Any, Any], Any]
    refusals: tuple[type[ServiceError], ...] = ()
    """Errors of `operation` that are answered as problems: the order was refused. They have its Location."""
    details: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    """Further details of such a problem, from the route's own answer."""
    shown: Callable[[ServiceError], ServiceError] = lambda error: error
    """The error that callers get for such an error."""


class Part(msgspec.Struct, frozen=True):
    """A part of a route's answer: the entries of a collection that another operation gives, page by page.

    `first` makes the query of the first page from the answer of the route's own operation; `Page.next_query` changes it
    for the next pages. `request` makes the operation's request from both.
    """

    name: str
    path: str
    """The path of the route that lists the collection by the same query: it gives the entries beyond the limit."""
    operation: Operation[Any, Any]
    first: Callable[[Any], Mapping[str, str]]
    request: Callable[[Any, Mapping[str, str]], Any]
    page: Callable[[Any], Page]


class Gathered(msgspec.Struct, frozen=True):
    """The answer of a route with parts: that of its own operation, and at most `PART_LIMIT` entries of each part.

    `next`: for each part that has more, by name, the path and query of the next entries.
    """

    answer: Any
    parts: Mapping[str, list[Any]]
    next: Mapping[str, str]


def gathering(
    parts: Sequence[Part],
    call: Callable[[Any], Awaitable[Any]],
    client: Callable[[Operation[Any, Any]], Call[Any, Any]],
) -> Callable[[Any], Awaitable[Gathered]]:
    """The call of a route with parts: of its own operation, then of each part page by page."""
    calls = [(part, client(part.operation)) for part in parts]

    async def gather(asked: Any) -> Gathered:
        answer = await call(asked)
        found: dict[str, list[Any]] = {}
        following: dict[str, str] = {}
        for part, ask in calls:
            entries: list[Any] = []
            query, is_last = part.first(answer), False
            while not is_last and len(entries) < PART_LIMIT:
                page = part.page(await ask(part.request(answer, query)))
                entries += page.items
                query, is_last = {**query, **(page.next_query or {})}, page.next_query is None
            found[part.name] = entries
            if not is_last:
                following[part.name] = f"{part.path}?{urlencode(query)}"
        return Gathered(answer, found, following)

    return gather


class Streamed(msgspec.Struct, frozen=True, kw_only=True):
    """How a route answers as a stream of events (`streams/`), to a client that accepts `text/event-stream`.

    `operation` and `request` are called first, as those of a route. The stream begins after the position that
    `Last-Event-ID` has, or else the query's `after`, and has what the query's `types` name. Without a position it
    begins at the end of the feed.
    """

    kind: Literal["feed", "order"]
    operation: Operation[Any, Any]
    request: Callable[[RouteRequest], Any]
    query: type[Input]
    subject: Callable[[RouteRequest], str] | None = None
    """What the events of the stream are about; None: what the query's `subject` says, if anything."""
    snapshot: Callable[[Any], Any] | None = None
    """The JSON with which a stream without a position begins, from the answer of `operation`. Its event is `kind`."""
    is_only: bool = False
    """Whether the route has no other answer."""

    def of(self, route: Route) -> Route:
        """The route with the stream as its only answer."""
        return msgspec.structs.replace(
            route,
            operation=self.operation,
            request=self.request,
            query=self.query,
            stream=msgspec.structs.replace(self, is_only=True),
        )


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """Another form of a request that a route takes, from the documents of a reference system (A to E).

    It is tried only where the request is not in the route's own form. Its defaults are the values of its route.
    """

    system: str
    method: Method
    path: str
    """`method` and `path` are those of the route."""
    summary: str
    is_body: Callable[[Mapping[str, Any]], bool] | None = None
    """Recognises its body by the members of the JSON object; None: the form is recognised by `text`."""
    text: Mapping[str, Any] = {}
    """The types of those path parameters that are texts in this form, and numbers in the route's own."""
    body: type[Input] | None = None
    examples: Mapping[str, Mapping[str, Any]] = {}
    operation: Operation[Any, Any] | None = None
    request: Callable[[RouteRequest], Any]
    answer: Callable[[Any], Any] | None = None
    output: Any = None
    fields: Mapping[str, str] = {}
    tries: Callable[[RouteRequest], str | None] | None = None
    errors: tuple[type[ServiceError], ...] = ()

    def of(self, route: Route) -> Route:
        """The route for this form."""
        return msgspec.structs.replace(
            route,
            text=self.text or route.text,
            body=self.body,
            examples=self.examples,
            operation=self.operation or route.operation,
            request=self.request,
            answer=self.answer or route.answer,
            output=self.output or route.output,
            fields={**route.fields, **self.fields},
            tries=self.tries or route.tries,
            errors=(*route.errors, *self.errors),
            forms=(),
        )


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One route: everything that the API promises about a method and a path.

    `request` makes the operation's request; `answer` makes the JSON answer from that of the operation: an
    `Output`, a `Page` for a collection, or None for no body. Both are pure.
    """

    method: Method
    path: str
    operation: Operation[Any, Any]
    summary: str
    text: Mapping[str, Any] = {}
    """The types of those path parameters that are texts; the others are ids, which are numbers."""
    knows_session: bool = False
    """Whether `request` is given the session of the caller's access token."""
    knows_address: bool = False
    """Whether `request` is given the address of the client, for the security log."""
    request: Callable[[RouteRequest], Any]
    answer: Callable[[Any], Any]
    output: Any
    """The type of the JSON answer, for the documentation: what `answer` gives, `list[X]` for a page of X, or None."""
    roles: frozenset[str]
    """The roles that may call it. Required: a route without roles fails at the start, instead of being public."""
    ignores_token: bool = False
    """For the routes that issue tokens: an expired token must not prevent its owner from getting a new one, and
    accounts of an attacker must not multiply how often a password may be guessed."""
    status: int = 200
    query: type[Input] | None = None
    body: type[Input] | None = None
    body_optional: bool = False
    """An empty body is the same as `{}`."""
    examples: Mapping[str, Mapping[str, Any]] = {}
    """Bodies for the documentation, by what they show."""
    idempotency: bool = False
    """Whether `Idempotency-Key` is honoured. Where it is not, sending it is refused rather than ignored."""
    idempotency_required: bool = False
    """Whether a request without `Idempotency-Key` is refused, because doing it twice would do harm."""
    wait: Wait | None = None
    """How `Prefer: wait=N` is honoured; None: it is ignored."""
    parts: tuple[Part, ...] = ()
    """Further parts of the answer. `answer` gets a `Gathered` then."""
    takes_ended_session: bool = False
    """Whether an access token of an ended session is accepted: the operation checks the session by itself."""
    seen: Callable[[Any, Actor], Message] | None = None
    """What a caller sees of the operation's answer: a message of the contract, which `answer` and `etag` take then."""
    is_public: bool = False
    """Whether the answer is the same for all callers: caches may store it, and revalidate. No cache stores others."""
    etag: Callable[[Any], int | str | None] | None = None
    """The version of the answer, for its ETag; None where it has no version yet."""
    if_match: bool = False
    """Whether `If-Match` is honoured."""
    fields: Mapping[str, str] = {}
    """From the operation's name of a field to the API's, where they differ."""
    location: Callable[[Any], str] | None = None
    replayed: Callable[[Any], bool] | None = None
    """Whether the answer is the stored one of an earlier request with the same key."""
    limits: Limits = Limits()
    priority: Priority = Priority.BROWSE
    """Which requests enter first under overload. `PRIORITIES` in `routes/` sets it."""
    tries: Callable[[RouteRequest], str | None] | None = None
    """The key of the account for which a request has a password; None for a request without one. After wrong passwords
    (errors of kind UNAUTHENTICATED), further attempts from the same address wait."""
    errors: tuple[type[ServiceError], ...] = ()
    """The operation's own errors, for the documentation."""
    is_guest: Callable[[Any], bool] | None = None
    """For a route that guests may use: whether the operation's request is a guest's. Then its actor is anonymous."""
    takes_access_token: bool = False
    """Whether a guest who sends the access token of an order may use the route for that order."""
    guest_operation: Operation[Any, Any] | None = None
    """The operation for requests with an access token, where it is not `operation`. `request` makes its request too."""
    system: str = ""
    """The reference system that has this request; empty for a route of the API's own."""
    forms: tuple[Form, ...] = ()
    stream: Streamed | None = None
    """Its answer as a stream of events; None: it has none."""

    @property
    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Everything that the route may call, in whichever way it answers."""
        others = (self.guest_operation, *(form.operation for form in self.forms))
        more = (self.wait, self.stream, *self.parts)
        return [
            self.operation,
            *(operation for operation in others if operation is not None),
            *(each.operation for each in more if each is not None),
        ]
