"""`Prefer: wait=N` (RFC 7240): the answer comes when what was begun has ended, or after N seconds.

What was begun may be refused meanwhile. Then the answer is a problem, with the Location of what was begun.

The server gives such an answer more time, and interrupts it when there is no use in waiting on: it is about to stop, or
the client has left. The answer is then as things are at that moment, without Preference-Applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec
import structlog

from mercato.chassis.contract import ServiceError
from mercato.chassis.http import LONG_RESPONSE
from mercato.gateway import problems
from mercato.gateway.route import Wait

log = structlog.stdlib.get_logger("mercato.gateway")

Ask = Callable[[Any], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class WaitingRoute(Protocol):
    """How the route answers."""

    name: str

    def respond(self, answer: Any, scope: Any) -> tuple[int, list[bytes], bytes]: ...
    def add_place(self, answer: Any, lines: list[bytes]) -> None: ...


class Waited(msgspec.Struct, frozen=True):
    """The answer of a route after the wait; `is_met`: whether the client's preference was met."""

    answer: Any
    is_met: bool = True
    refusal: ServiceError | None = None
    """How what was begun has been refused, which the client hears instead of the answer."""


class Waiting:
    """What one route waits for, by the client of its operation."""

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
            status, lines, body = problems.render(self._wait.told(waited.refusal), trace_id, self._wait.details(answer))
            self._route.add_place(answer, lines)
        if waited.is_met:
            lines.append(b"preference-applied: wait=%d" % (wait_ms // 1_000))
        return status, lines, body

    async def _outcome(self, answer: Any, wait_ms: int, send: Send | None) -> Waited:
        """What the route's `answer` has come to. Where waiting fails, it is as it was: that is true.

        `send`: to a server that knows long answers.
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
