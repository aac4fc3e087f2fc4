"""A method of the API: its route, its codecs, and what the gateway fills its request with."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from mercato.chassis.contract import Actor, Filling, InvalidRequest
from mercato.contracts.field_numbers import hints_of
from mercato.contracts.orders import NO_USER
from mercato.contracts.protos import ProtoMethod, filling
from mercato.gateway import idempotency
from mercato.gateway.app import ADDRESS_LENGTH, BoundRoute
from mercato.gateway.grpc.codecs import Codec, Codecs, Values
from mercato.gateway.problems import BodyTooLarge, IdempotencyKeyMissing, SignInFirst
from mercato.gateway.route import Route, RouteRequest
from mercato.gateway.validation import invalid

KEY: Final = "idempotency_key"
_HEAD: Final = re.compile(r"[^.\[]+")
ACCESS_TOKEN: Final = "access_token"  # noqa: S105  # the name of the field
RENAMED: Final[Mapping[str, tuple[str, ...]]] = {
    "header Idempotency-Key": (KEY,),
    "amount": ("amount_minor", "expected_total_minor"),
    "currency": ("expected_currency",),
    "items": ("lines",),
    "payment_method": ("method",),
    "price": ("price_minor",),
}
"""What fields are called in messages where an error has their name over HTTP: the first that the message has."""


class Method:
    """One method. `name`: `mercato.orders.v1.OrdersService/Place`."""

    def __init__(self, name: str, proto: ProtoMethod, route: Route, bound: BoundRoute, codecs: Codecs) -> None:
        self.name = name
        self.route = route
        self.bound = bound
        self.request: Codec = codecs.named(proto.request)
        self.answer: Codec = codecs.named(proto.answer)
        hints = hints_of(route.operation.request)
        self._fillers = [(f, FILLERS[by]) for f, hint in hints.items() if (by := filling(hint)) in FILLERS]
        self._takes_key = KEY in hints
        self.is_waiting = "wait_ms" in hints
        """Whether the call only waits, for as long as its request says, and is not counted as work."""

    def parsed(self, raw: bytes) -> Any:
        """The message of protobuf. Raises `BodyTooLarge`, `InvalidRequest`."""
        limit = self.route.limits.body_bytes
        if len(raw) > limit:
            raise BodyTooLarge(limit_bytes=limit)
        return self.request.parse(raw)

    def access_token(self, values: Values) -> str | None:
        """That of a guest's order, where the method is for guests too."""
        return values.get(ACCESS_TOKEN) if self.route.takes_access_token else None

    def key(self, values: Values) -> str | None:
        """The idempotency key. Raises `InvalidRequest`, `IdempotencyKeyMissing`."""
        given = values.get(KEY) if self._takes_key else None
        if given is None or (given == "" and self.route.idempotency_required):
            if self.route.idempotency_required:
                raise IdempotencyKeyMissing(operation=self.name)
            return None
        values[KEY] = idempotency.key_of(given.encode())
        return values[KEY]

    def fingerprint(self, message: Any) -> bytes:
        """Equal for two messages with the same fields; of another one than that of the HTTP API."""
        return hashlib.sha256(self.name.encode() + b"\0" + message.SerializeToString(deterministic=True)).digest()

    def reworded(self, error: InvalidRequest) -> InvalidRequest:
        """The error with the names that the fields have in the message."""
        return invalid(*((self._renamed(wrong.field), wrong.message) for wrong in error.errors))

    def _renamed(self, field: str) -> str:
        found = _HEAD.match(field)
        head = found[0] if found else ""
        if head in self.request.fields:
            return field
        return next((name for name in RENAMED.get(head, ()) if name in self.request.fields), head) + field[len(head) :]

    def without_wait(self, asked: Any) -> Any:
        """The request of an operation that waits, to be answered at once."""
        return msgspec.structs.replace(asked, wait_ms=0)

    def asked(self, values: Values, request: RouteRequest) -> Any:
        """The request of the operation. Raises a `ServiceError`."""
        for field, fill in self._fillers:
            fill(field, values, request)
        return self.request.typed(values)


# -------------------------------------------------------------------------------------------------- what is filled


def _account_of(actor: Actor) -> int:
    if not actor.id:
        raise SignInFirst
    return actor.id


def _account(field: str, values: Values, request: RouteRequest) -> None:
    values[field] = _account_of(request.actor)


def _own_account(field: str, values: Values, request: RouteRequest) -> None:
    if field not in values:
        values[field] = _account_of(request.actor)


def _buyer(field: str, values: Values, request: RouteRequest) -> None:
    values.setdefault(field, request.actor.id or NO_USER)


def _guest(field: str, values: Values, request: RouteRequest) -> None:
    values[field] = values.get("user_id") == NO_USER and not request.actor.id


def _session(field: str, values: Values, request: RouteRequest) -> None:
    if request.session_id:
        values[field] = request.session_id


def _address(field: str, values: Values, request: RouteRequest) -> None:
    values[field] = request.address[:ADDRESS_LENGTH]


def _fingerprint(field: str, values: Values, request: RouteRequest) -> None:
    values[field] = request.fingerprint


FILLERS: Final[Mapping[Filling | None, Callable[[str, Values, RouteRequest], None]]] = {
    "account": _account,
    "own_account": _own_account,
    "buyer": _buyer,
    "guest": _guest,
    "session": _session,
    "address": _address,
    "fingerprint": _fingerprint,
}
