"""Which pipelined requests of all connections are in work."""

from __future__ import annotations

from collections import deque
from typing import Protocol


class Waiting(Protocol):
    """A connection with requests that came behind another."""

    waits_for_turn: bool

    def take_turn(self) -> None: ...


class PipelinedTurns:
    """Which requests that came behind another of their connection are in work: `at_once` of all connections.

    A client that sends its next request after an answer waits for its own requests alone. One that sends many at once
    would fill the application with them; so they take turns, one request of each connection after the other.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: deque[Waiting] = deque()

    def ask(self, connection: Waiting) -> None:
        """`connection.take_turn` is called, now or later, unless it has ended by then; `end` follows a turn."""
        if self._free > 0:
            self._free -= 1
            connection.take_turn()
        else:
            self._waiting.append(connection)

    def end(self) -> None:
        """A turn is over, and the next one begins."""
        while self._waiting:
            connection = self._waiting.popleft()
            if connection.waits_for_turn:
                connection.take_turn()
                return
        self._free += 1
