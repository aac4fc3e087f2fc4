"""Guests in the gateway: anonymous callers who place an order, or send the access token of one.

The token comes as `?access_token=...` or `Authorization: Guest ...`. The orders service checks it: a wrong token gets
the answer of an unknown order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor
from mercato.gateway import problems
from mercato.gateway.rates import RateLimiter
from mercato.gateway.route import Limits, RouteRequest
from mercato.gateway.validation import invalid

PARAMETER: Final = b"access_token="
SCHEME: Final = b"guest"
ORDERS: Final = Limits(per_second=1, burst=30)
"""How often guests of one address may order: each order holds stock."""
KEY_LENGTH: Final = 22
"""The minimum length of a guest's Idempotency-Key, 128 bits in base64: a caller who sends the key and the request of
another guest gets that order, with its access token."""
TOKEN_LENGTH: Final = 64


def is_guest_scheme(authorization: bytes) -> bool:
    return authorization[:6].lower() == b"guest "


def access_token(authorization: bytes | None, query: bytes) -> tuple[str | None, bytes]:
    """The access token of a request, or None; and its query string without it. Raises `InvalidRequest`."""
    token = None
    if PARAMETER in query:
        parts = query.split(b"&")
        given = [part for part in parts if part.startswith(PARAMETER)]
        if len(given) > 1:
            raise invalid(("?access_token", "is given more than once"))
        if given:
            token = given[0].removeprefix(PARAMETER)
            query = b"&".join(part for part in parts if not part.startswith(PARAMETER))
    if token is None and authorization is not None and is_guest_scheme(authorization):
        token = authorization[6:].strip()
    if token is None:
        return None, query
    # A token that is too long becomes an empty one, which is wrong as well.
    return token.decode("latin-1") if len(token) <= TOKEN_LENGTH else "", query


def check_key(key: str | None) -> None:
    """Raises `InvalidRequest` for an Idempotency-Key that another caller could guess."""
    if key is not None and len(key) < KEY_LENGTH:
        message = f"has fewer than {KEY_LENGTH} characters, the least for a caller without an account; use a fresh UUID"
        raise invalid(("header Idempotency-Key", message))


class GuestRoute(Protocol):
    """A route that guests may use."""

    name: str
    rates: str
    roles: frozenset[str]
    is_guest: Callable[[Any], bool] | None


def checked(route: GuestRoute, request: RouteRequest, asked: Any, address: str, rates: RateLimiter) -> Actor:
    """The actor of a call without an account: a guest, or an anonymous caller whom the route allows."""
    if request.access_token is None:
        assert route.is_guest is not None
        if not route.is_guest(asked):
            if request.actor.role not in route.roles:
                raise problems.not_allowed(request.actor.role, route.name)
            return request.actor
        rates.check(f"{route.rates} of guests", ORDERS, ANONYMOUS_ACTOR, address)
    check_key(request.idempotency_key)
    return ANONYMOUS_ACTOR
