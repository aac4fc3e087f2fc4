"""`Prefer: wait=N` (RFC 7240): the answer comes when the order is settled, or after N seconds.

The order may be refused meanwhile. Then the answer is a problem, with the Location of the order.

The server gives such an answer more time, and interrupts the wait when it is about to stop, or the client has closed
the connection. The answer is then the current state, without Preference-Applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec
import structlog

from mercato.chassis.contract import ServiceError
from mercato.chassis.hosting.host import GATEWAY
from mercato.chassis.http import LONG_RESPONSE
from mercato.gateway import problems
from mercato.gateway.asgi import Send
from mercato.gateway.route import Wait

log = structlog.stdlib.get_logger("mercato.gateway", service=GATEWAY)

Ask = Callable[[Any], Awaitable[Any]]


class WaitingRoute(Protocol):
    """Renders the answers of the route."""

    name: str

    def respond(self, answer: Any, scope: Any) -> tuple[int, list[bytes], bytes]: ...
    def location_lines(self, answer: Any) -> list[bytes]: ...


class Waited(msgspec.Struct, frozen=True):
    """The answer of a route after the wait; `is_met`: whether the client's preference was met."""

    answer: Any
    is_met: bool = True
    refusal: ServiceError | None = None
    """The error with which the order was refused: the client gets it instead of the answer."""


class Waiting:
    """Waits for the result of one route. `ask` calls the operation that waits."""

    def __init__(self, wait: Wait, ask: Ask, route: WaitingRoute) -> None:
        self._wait = wait
        self._ask = ask
        self._route = route

    async def respond(
        self, answer: Any, wait_ms: int, scope: Mapping[str, Any], send: Send, trace_id: str
    ) -> tuple[int, list[bytes], bytes]:
        """Status, headers and body after the wait."""
        waited = await self._outcome(answer, wait_ms, send if LONG_RESPONSE in scope.get("extensions", ()) else None)
        if waited.refusal is None:
            status, lines, body = self._route.respond(waited.answer, scope)
        else:
            shown, details = self._wait.shown(waited.refusal), self._wait.details(answer)
            status, lines, body = problems.render(shown, trace_id, details)
            lines += self._route.location_lines(answer)
        if waited.is_met:
            lines.append(b"preference-applied: wait=%d" % (wait_ms // 1_000))
        return status, lines, body

    async def _outcome(self, answer: Any, wait_ms: int, send: Send | None) -> Waited:
        """The result after the wait. Where waiting fails, it is the route's `answer`, which is still correct.

        `send`: to a server with the extension for long answers; None without it.
        """
        try:
            asking = asyncio.ensure_future(self._ask(self._wait.request(answer, wait_ms)))
        except ServiceError as error:
            return self._ended(answer, error, is_met=False)
        try:
            if send is not None:
                await send({"type": LONG_RESPONSE, "seconds": wait_ms / 1_000, "interrupt": asking.cancel})
            await asyncio.wait((asking,))
        finally:
            asking.cancel()
        is_met = not asking.cancelled()
        try:
            now = asking.result() if is_met else await self._ask(self._wait.request(answer, 0))
        except ServiceError as error:
            return self._ended(answer, error, is_met=is_met)
        return Waited(self._wait.answer(answer, now), is_met)

    def _ended(self, answer: Any, error: ServiceError, *, is_met: bool) -> Waited:
        if isinstance(error, self._wait.refusals):
            return Waited(answer, is_met, error)
        log.warning("wait_failed", route=self._route.name, reason=error.code)
        return Waited(answer, is_met=False)
