"""The public operations: those of the contracts that routes of the table use, for clients who send the messages
themselves (gRPC, `mercato/gateway/grpc/`).

An operation has the policy of its route: roles, limits, guards, priority, keys. Forms and requests of the reference
systems are no operations of their own. Where several routes use an operation, it is that with an id in its path: the
others are for the caller's own account, which the operation takes where no id is given.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast, get_type_hints

import msgspec

from mercato.chassis.contract import (
    Contract,
    DeadlineExceeded,
    Forbidden,
    IdempotencyKeyReused,
    Internal,
    Message,
    Operation,
    OutcomeUnknown,
    Overloaded,
    ServiceError,
    Unauthenticated,
    Unavailable,
)
from mercato.chassis.http import Priority
from mercato.contracts.field_numbers import Numbers
from mercato.contracts.protos import ProtoFile, PublicOperation, files
from mercato.contracts.roles import SIGNED_IN
from mercato.gateway.route import Route, Wait
from mercato.gateway.routes import ROUTES

ALWAYS: Final = (
    DeadlineExceeded,
    Forbidden,
    IdempotencyKeyReused,
    Internal,
    OutcomeUnknown,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
"""Errors with details that every operation may be answered with."""


def public_routes(routes: Iterable[Route] = ROUTES) -> Mapping[str, Route]:
    """The route of each public operation, by the full name of the operation."""
    found: dict[str, Route] = {}
    for route in routes:
        if route.system or route.parts or (route.stream is not None and route.stream.is_only):
            continue
        if route.operation.full_name not in found or "{" in route.path:
            found[route.operation.full_name] = route
        if route.guest_operation is not None:
            found[route.guest_operation.full_name] = _of_guests(route, route.guest_operation)
        if route.wait is not None:
            found[route.wait.operation.full_name] = _waiting(route, route.wait)
    return {name: _bare(route) for name, route in sorted(found.items())}


def public_operations(routes: Iterable[Route] = ROUTES) -> list[PublicOperation]:
    return [_public(route) for route in public_routes(routes).values()]


def proto_files(contracts: Mapping[str, type[Contract]], numbers: Numbers) -> tuple[ProtoFile, ...]:
    """The protobuf files of the public operations. `contracts`: the services, by name."""
    return files(contracts, public_operations(), numbers, ALWAYS)


def answer_of(route: Route) -> type[Message]:
    """The message that clients get."""
    if route.seen is None:
        return route.operation.answer
    return cast(type[Message], get_type_hints(route.seen)["return"])


def _bare(route: Route) -> Route:
    """A route without what only HTTP requests have: the names of fields are those of the contract."""
    return msgspec.structs.replace(route, forms=(), wait=None, stream=None, fields={})


def _of_guests(route: Route, operation: Operation[Any, Any]) -> Route:
    """The route for the guests of another route, whose operation is one of its own."""
    return msgspec.structs.replace(
        route, operation=operation, guest_operation=None, summary=_first_sentence(operation.request)
    )


def _waiting(route: Route, wait: Wait) -> Route:
    """The route that waits for the result of another one. It is not counted as work: it only waits."""
    return msgspec.structs.replace(
        route,
        operation=wait.operation,
        summary=_first_sentence(wait.operation.request),
        roles=SIGNED_IN,
        takes_access_token=True,
        is_guest=None,
        idempotency=False,
        wait=None,
        priority=Priority.BROWSE,
        errors=wait.refusals,
    )


def _public(route: Route) -> PublicOperation:
    return PublicOperation(route.operation, answer_of(route), _comment(route.summary), _errors_of(route))


def _errors_of(route: Route) -> tuple[type[ServiceError], ...]:
    """Those with details that have numbers: errors of the gateway itself have none."""
    return tuple(error for error in route.errors if not error.__module__.startswith("mercato.gateway."))


def _comment(summary: str) -> str:
    """A summary without the names of query parameters."""
    return re.sub(r"\?(\w+)=", r"`\1`", re.sub(r" \(\?\w+=\)", "", summary)) + "."


def _first_sentence(message: type[Message]) -> str:
    return inspect.cleandoc(message.__doc__ or "").partition("\n")[0].removesuffix(".")
