"""Which pipelined requests of all connections are in work."""

from __future__ import annotations

from collections import deque
from typing import Protocol


class WaitingConnection(Protocol):
    """A connection with pipelined requests."""

    waits_for_turn: bool

    def take_turn(self) -> None: ...


class PipelinedTurns:
    """Bounds the pipelined requests in work to `at_once` for all connections together.

    A client that sends each request after the answer to the last one waits for its own requests alone. One that
    pipelines many would fill the application with them; so connections take turns, one request each (round robin).
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: deque[WaitingConnection] = deque()

    def ask(self, connection: WaitingConnection) -> None:
        """Calls `connection.take_turn`, now or later, unless it has ended by then. The caller calls `end` after it."""
        if self._free > 0:
            self._free -= 1
            connection.take_turn()
        else:
            self._waiting.append(connection)

    def end(self) -> None:
        """Ends a turn; the next connection takes its turn."""
        while self._waiting:
            connection = self._waiting.popleft()
            if connection.waits_for_turn:
                connection.take_turn()
                return
        self._free += 1
