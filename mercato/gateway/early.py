"""Requests that the HTTP server refuses by itself while there are too many, without the application.

The class of its route decides whether a request is refused. The answer is rendered once for each route, without its
trace id and its request id. A refusal then costs neither a scope nor a task.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Final

from mercato.chassis.contract import Overloaded
from mercato.chassis.http import Rendered
from mercato.gateway import problems
from mercato.gateway.app import BoundRoute, Gateway
from mercato.gateway.headers import RequestHeaders

_TRACE_ID: Final = "f" * 32
"""A placeholder for the trace id of a request; no route has it in its name."""

Template = tuple[int, Sequence[bytes], bytes, bytes]
"""Status, header lines, and the parts of the body before and after the trace id."""


class EarlyRefusals:
    """As `mercato.chassis.http.EarlyRefusals`. It answers what the gateway would answer."""

    def __init__(self, gateway: Gateway) -> None:
        self.load = gateway.load
        self._find = gateway.table.find
        self._note = gateway.note
        self._cross_origin = gateway.cross_origin
        self._templates: dict[tuple[str, int], Template] = {}

    def refuse(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], seconds: Callable[[], float]
    ) -> Callable[[], Rendered] | None:
        """None: the request is for the application. Else a function that renders its refusal when it is sent."""
        route, _ = self._find(method, path)
        if not isinstance(route, BoundRoute) or not self.load.is_full(route.priority):
            return None
        retry_after_s = self.load.count_refusal(route.priority, "queue_full")
        return functools.partial(self._render, route, retry_after_s, method, headers, seconds)

    def _render(
        self,
        route: BoundRoute,
        retry_after_s: int,
        method: str,
        headers: Sequence[tuple[bytes, bytes]],
        seconds: Callable[[], float],
    ) -> Rendered:
        read = RequestHeaders(headers)
        status, lines, before, after = self._template(route.name, retry_after_s)
        self._note(route, status, seconds(), read, method)
        lines = [*lines, b"x-request-id: " + read.request_id.encode()]
        if self._cross_origin is not None:
            lines += self._cross_origin.lines(read, method)
        return status, lines, before + read.trace_id.encode() + after

    def _template(self, name: str, retry_after_s: int) -> Template:
        known = self._templates.get((name, retry_after_s))
        if known is None:
            error = Overloaded(operation=name, retry_after_s=retry_after_s)
            status, lines, body = problems.render(error, _TRACE_ID)
            before, _, after = body.partition(_TRACE_ID.encode())
            known = self._templates[name, retry_after_s] = (status, lines, before, after)
        return known
