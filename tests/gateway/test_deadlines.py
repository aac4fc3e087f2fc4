"""How long a request has: its operation, and what `Prefer: wait=N` waits for besides."""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable
from typing import Any, Final

from mercato.chassis.contract import Empty, Operation, current
from mercato.chassis.observability.telemetry import Telemetry
from mercato.contracts.orders import Orders
from mercato.contracts.users import EndedSessions, EndedSessionsAfter, PublicKeys
from mercato.gateway.app import Gateway
from mercato.gateway.auth import Authenticator, Verifier
from mercato.gateway.ended_sessions import EndedSessionsLog
from mercato.gateway.route import Route, Wait

NOW_SECONDS: Final = 86_400.75
REQUEST_SECONDS: Final = 7.5


class StoppedClock:
    def monotonic(self) -> float:
        return NOW_SECONDS

    def now(self) -> datetime.datetime:
        return datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


async def seconds_given(prefer: bytes | None) -> list[float]:
    """What each call of a request may take, from the stopped clock on."""
    given: list[float] = []

    def client(_operation: Operation[Any, Any]) -> Any:
        async def call(_request: Any) -> Any:
            given.append(current.get().deadline - NOW_SECONDS)
            return Empty()

        return call

    async def no_keys() -> PublicKeys:
        raise AssertionError("no token is sent")

    async def nothing_ended(_: EndedSessionsAfter) -> EndedSessions:
        raise AssertionError("no token is sent")

    clock, sent = StoppedClock(), list[Any]()
    route = Route(
        method="GET",
        path="/things",
        operation=Orders.list,
        summary="",
        request=lambda request: request,
        answer=lambda _: "an answer",
        output=str,
        roles=frozenset({"anonymous"}),
        wait=Wait(operation=Orders.settled, request=lambda answer, _: answer, answer=lambda _, waited: waited),
    )
    gateway = Gateway(
        [route],
        client=client,
        authenticator=Authenticator(Verifier(no_keys, EndedSessionsLog(nothing_ended, clock), clock), None),
        telemetry=Telemetry(),
        clock=clock,
        fallback=no_page,
        request_seconds=REQUEST_SECONDS,
    )
    headers = [(b"host", b"shop.example"), *([(b"prefer", prefer)] if prefer else [])]
    scope = {"type": "http", "method": "GET", "path": "/things", "query_string": b"", "headers": headers}
    await gateway(scope, no_body, collect(sent))
    assert sent[0]["status"] == 200
    return given


async def no_page(*_: Any) -> None:
    raise AssertionError("it is in the table")


async def no_body() -> Any:
    raise AssertionError("it has no body")


def collect(sent: list[Any]) -> Callable[[Any], Awaitable[None]]:
    async def send(message: Any) -> None:
        sent.append(message)

    return send


async def test_an_operation_has_the_time_of_a_request():
    assert await seconds_given(None) == [REQUEST_SECONDS]


async def test_a_wait_is_added_to_the_time_of_a_request():
    assert await seconds_given(b"wait=3") == [REQUEST_SECONDS, REQUEST_SECONDS + 3]
