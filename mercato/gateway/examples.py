"""Examples for the documentation, rendered by the code that answers requests.

An example of an answer is a message of the contract, rendered by the `answer` of its route; an example of a problem is
an error, rendered as errors are. So no example can differ from the API.
"""

from __future__ import annotations

import datetime
import types
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from mercato.chassis.contract import Actor, Operation, ServiceError
from mercato.chassis.http import limits as http
from mercato.contracts.roles import STAFF
from mercato.gateway import problems
from mercato.gateway.route import Gathered, Page, Route

TRACE_ID: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
"""The example of W3C Trace Context."""

VALUES: Final[Mapping[str, Any]] = {
    # Keys: the name of a field, or of a message and its field.
    "access_token": "eyJhbGciOiJFZERTQSIsInR5cCI6ImF0K2p3dCJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "actor_id": 1,
    "actor_role": "customer",
    "category": "audio",
    "currency": "USD",
    "description": "Over-ear headphones with noise cancelling and 30 hours of battery.",
    "email": "alice@example.com",
    "expires_in": 900,
    "name": "Headphones",
    "password": "correct horse battery",
    "product_id": 100,
    "reason": "",
    "refresh_token": "q4Wv0TgC2m9yRzJ1oX7sLkHbN5eUdFa8PiQ3wVtYxGc",
    "sku": "HEAD-100",
    "token_type": "Bearer",
    "Forbidden.operation": "POST /products",
    "FeedEntry.data": {"order_id": 1001, "total_minor": 9999},
    "FeedEntry.id": "orders:17",
    "FeedEntry.position": 42,
    "FeedEntry.subject": "order 1001",
    "FeedEntry.type": "order.paid",
    "HistoryEntry.after": "pending",
    "Product.id": 100,
    "User.name": "Alice",
    "line_total_minor": 9999,
    "amount_minor": 9999,
    "at": "2026-01-15T09:30:00Z",
    "attempts": 1,
    "authorized_minor": 9999,
    "by": "service",
    "captured_minor": 9999,
    "method": "sandbox:ok",
    "quantity": 1,
    "refunded_minor": 0,
    "Payment.code": None,
    "Payment.id": 1001,
    "Payment.order_id": 1001,
    "Payment.status": "captured",
    "FeedEntry.traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01",
    "Refund.amount_minor": 1000,
    "Refund.id": "5f2a7c3b9d1e4f60a8b7c6d5",
    "Refund.lines": [],
    "Refund.order_id": 1001,
    "Refund.status": "succeeded",
    "TimelineEntry.detail": "payment 1001: 9999 USD (minor units)",
    "TimelineEntry.outcome": "succeeded",
    "TimelineEntry.part": "money",
    "TimelineEntry.what": "authorize",
    "Level.available": 237,
    "Level.on_hand": 240,
    "Level.reserved": 3,
    "Level.updated_at": "2026-01-15T09:30:00Z",
    "Level.version": 2,
    "price_minor": 9999,
    "total_minor": 9999,
    "unit_price_minor": 9999,
    # Details of errors.
    "actual_currency": "USD",
    "actual_minor": 9999,
    "allowed": ["GET", "HEAD"],
    "current": "pending",
    "currencies": ["EUR", "USD"],
    "expected_currency": "USD",
    "expected_minor": 8999,
    "header": "Host",
    "legal": ["confirmed", "cancelled"],
    "limit_bytes": 1_048_576,
    "operation": "orders.place",
    "order_id": 1,
    "path": "/order",
    "role": "customer",
    "service": "orders",
    "wanted": "completed",
    "BelowReserved.reserved": 3,
    "BelowReserved.wanted": 2,
    "IdempotencyKeyMissing.operation": "POST /products/{id}/stock/adjustments",
    "NothingToRefund.left_minor": 9999,
    "NothingToRefund.wanted_minor": 10999,
    "NotReturnable.left": 1,
    "NotReturnable.wanted": 2,
    "OrderCancelled.reason": "expired",
    "PaymentDeclined.payment_id": 1001,
    "due_currency": "USD",
    "due_minor": 9999,
    "provider_code": "insufficient_funds",
    "FieldError.field": "items[0].quantity",
    "FieldError.message": "must be at least 1",
    "MalformedJson.column": 16,
    "MalformedJson.line": 3,
    "MalformedJson.offset": 42,
    "MalformedJson.reason": "expected ':'",
    "MethodNotAllowed.path": "/users/1",
    "StaleVersion.actual": 4,
    "StaleVersion.expected": 3,
    "Unauthenticated.reason": "The access token has expired; refresh it, or sign in again.",
}

FIRST_MADE_ID: Final = 1001
"""The demo data has lower ids."""

AFTERWARDS: Final[Mapping[str, Mapping[str, Any]]] = {
    # Fields of the answer that the operation has changed and the request does not name.
    "orders.cancel": {"status": "cancelled"},
    "products.archive": {"status": "archived"},
}


def bodies(route: Route) -> dict[str, Any]:
    """Bodies that the route takes, by what they show; at least one. The route must have a body."""
    assert route.body is not None
    if route.examples:
        return {name: dict(body) for name, body in route.examples.items()}
    return {"all that is required": _value(route.body)}


def message(route: Route) -> Any:
    """An answer of the route's operation, as a message of the contract."""
    return _message(route.operation, {"version": 2} if route.if_match else {})


def _message(operation: Operation[Any, Any], known: Mapping[str, Any]) -> Any:
    return msgspec.convert(_value(operation.answer, known=known), operation.answer, strict=False)


def answer(route: Route) -> Any:
    """The JSON that the route answers with, to the first of its examples; None where it answers without a body."""
    answered = message(route)
    if route.seen is not None:
        answered = route.seen(answered, Actor(STAFF))
    if route.parts:
        pages = [(part, part.page(_message(part.operation, {}))) for part in route.parts]
        answered = Gathered(answered, {part.name: page.items for part, page in pages}, {})
    shown = route.answer(answered)
    if shown is None:
        return None
    json = msgspec.to_builtins(shown.items if isinstance(shown, Page) else shown)
    if not isinstance(json, dict):
        return json
    sent: Mapping[str, Any] = next(iter(bodies(route).values())) if route.body else {}
    changed = AFTERWARDS.get(route.operation.full_name, {})
    return _with_values(route, cast(dict[str, Any], json), {**sent, **changed})


def number(route: Route, name: str) -> int:
    """An id for the path of the route; the demo shop has it after its first order."""
    found = getattr(message(route), name, 1)
    return found if isinstance(found, int) else FIRST_MADE_ID  # the id of a refund is a text


def error(kind: type[ServiceError]) -> ServiceError:
    """An error of this class as a client may get it."""
    if kind is problems.TooManyRequests:
        return problems.TooManyRequests(1)
    hints = get_type_hints(kind, include_extras=True)
    details = {name: msgspec.convert(_value(hints[name], name, kind.__name__), hints[name]) for name in kind.fields}
    return kind(**details)


def problem(shown: ServiceError) -> dict[str, Any]:
    """The body of an error's answer."""
    _, _, body = problems.render(shown, TRACE_ID)
    return msgspec.json.decode(body)


def server_refusals() -> list[http.Refusal]:
    """The refusals of the server before the API sees a request: too large, too late, too many, or not HTTP."""
    of_limits: list[http.Refusal] = list(msgspec.structs.asdict(http.LimitRefusals.of(http.HttpLimits())).values())
    crowded = [http.TOO_MANY_CONNECTIONS, http.TOO_MANY_CONNECTIONS_OF_ONE, http.TOO_MANY_PIPELINED]
    return [*of_limits, http.MALFORMED, http.VERSION_NOT_SUPPORTED, http.INTERNAL_ERROR, *crowded]


def _with_values(route: Route, json: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The answer with values of the request: a request that sets a name is answered with that name."""
    for name in sorted(json.keys() & values.keys()):
        changed = {**json, name: values[name]}
        try:
            msgspec.convert(changed, route.output)
        except msgspec.ValidationError:
            continue  # the same name with another type: a request names items by id, the answer has them in full
        json = changed
    return json


# ---------------------------------------------------------------------------------------------------------- values


def _value(kind: Any, name: str = "", owner: str = "", known: Mapping[str, Any] | None = None) -> Any:
    """A value of a type in JSON. `name` and `owner`: the field, and the message of which it is one."""
    for table, key in ((known or {}, name), (VALUES, f"{owner}.{name}"), (VALUES, name)):
        if key in table:
            return table[key]
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _annotated(parts[0], parts[1:], name, owner)
    if origin in (Union, types.UnionType):
        return None if type(None) in parts else _value(parts[0], name, owner)
    if origin is Literal:
        return parts[0]
    if origin in (tuple, list):
        return [_value(parts[0], name, owner, known)]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        # Other fields keep their defaults.
        fields = [field for field in msgspec.structs.fields(kind) if field.required]
        return {field.encode_name: _value(field.type, field.name, kind.__name__, known) for field in fields}
    return _SIMPLE[origin or kind]


def _annotated(kind: Any, metas: tuple[msgspec.Meta, ...], name: str, owner: str) -> Any:
    for meta in metas:
        if meta.examples:
            return meta.examples[0]
        if meta.ge is not None:
            return meta.ge
    return _value(kind, name, owner)


_SIMPLE: Final[Mapping[Any, Any]] = {
    bool: False,
    bytes: "",
    datetime.datetime: "2026-01-15T09:30:00Z",
    Decimal: "99.99",
    dict: {},
    float: 1.0,
    int: 1,
    str: "text",
}
