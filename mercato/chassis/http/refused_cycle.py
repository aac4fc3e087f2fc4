"""A request that is refused without the application: its body is dropped, then its answer waits to be sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from .cycle import whole_answer
from .shedding import EarlyRefusals, Rendered


class RefusedCycle:
    """Replaces a request's cycle; the connection treats it as one whose application has not answered yet.

    It has only the attributes that `BoundedProtocol` and uvicorn's part of it read and set: uvicorn's own cycle also
    needs a scope and an event.
    """

    __slots__ = (
        "_early",
        "_is_head",
        "_is_held",
        "_render",
        "_transport",
        "chunked_encoding",
        "default_headers",
        "disconnected",
        "keep_alive",
        "more_body",
        "on_response",
        "response_complete",
        "response_started",
        "send_500_response",
        "waiting_for_100_continue",
    )

    def __init__(
        self,
        early: EarlyRefusals,
        render: Callable[[], Rendered],
        default_headers: Sequence[tuple[bytes, bytes]],
        *,
        keep_alive: bool,
        is_head: bool,
    ) -> None:
        self.keep_alive = keep_alive
        self.default_headers = default_headers
        self.more_body = True
        self.disconnected = self.response_started = self.response_complete = False
        self.waiting_for_100_continue = self.chunked_encoding = False
        self._early = early
        self._render = render
        self._is_head = is_head
        self._is_held = False

    def attach(
        self,
        transport: asyncio.Transport,
        on_response: Callable[[], None],
        send_500_response: Callable[[], Awaitable[None]],
    ) -> None:
        """Sets the transport of the answer and what is called after it. Every cycle has a `send_500_response`."""
        self._transport = transport
        self.on_response = on_response
        self.send_500_response = send_500_response

    @property
    def body(self) -> bytes:
        """Empty: the body is dropped."""
        return b""

    @body.setter
    def body(self, _received: bytes) -> None:
        pass

    @property
    def message_event(self) -> RefusedCycle:
        return self

    def set(self) -> None:
        """Called in place of `message_event.set`: a part of the request has arrived, or the connection is lost."""
        if not (self.more_body or self._is_held):
            self._is_held = True
            self._early.load.hold(self._answer)

    def _answer(self) -> bool:
        if self.disconnected or self._transport.is_closing():
            return False
        status, lines, body = self._render()
        self.response_started = self.response_complete = True
        self._transport.write(
            whole_answer(
                status,
                lines,
                body,
                default_headers=self.default_headers,
                keep_alive=self.keep_alive,
                is_head=self._is_head,
            )
        )
        if not self.keep_alive:
            self._transport.close()
        self.on_response()
        return True
