"""The connections of one server: their shared state, and which one is closed so that a new one can be admitted."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, cast

from uvicorn.server import ServerState

from .limits import HttpLimits, LimitRefusals, ignore_refusal, no_more_headers
from .shedding import EarlyRefusals
from .turns import PipelinedTurns

if TYPE_CHECKING:
    from .protocol import BoundedProtocol

RefusalHeaders = Callable[[Iterable[tuple[bytes, bytes]]], Sequence[bytes]]
"""Gives header fields (`name: value`) for the refusal of a request, from those of its headers that have been read."""

IDLE_EVICTED: Final = "idle_closed_for_room"
"""The code for `on_refused` when an idle connection is closed so that a new one can be admitted."""


class ConnectionTable(ServerState):
    """What the connections of one server share: uvicorn's own state, the limits, and the rejected connections."""

    def __init__(
        self,
        limits: HttpLimits,
        on_refused: Callable[[str], None] = ignore_refusal,
        early: EarlyRefusals | None = None,
        refusal_headers: RefusalHeaders = no_more_headers,
    ) -> None:
        super().__init__()
        self.refusal_headers = refusal_headers
        self.early = early
        self.limits = limits
        self.refusals = LimitRefusals.of(limits)
        self.on_refused = on_refused
        self.response_seconds = limits.request_seconds + limits.response_grace_seconds
        self.rejected: set[BoundedProtocol] = set()
        self.by_network: Counter[str] = Counter()
        """How many admitted connections each network has, without streams; networks without any are left out."""
        self.streams: set[BoundedProtocol] = set()
        """The admitted connections whose answer is a stream."""
        self.silent: dict[BoundedProtocol, None] = {}
        """Connections that have sent nothing yet, the oldest first."""
        self.idle: deque[tuple[float, BoundedProtocol]] = deque()
        """The other connections that were idle at the last sweep, and since when; the longest first."""
        self.turns = PipelinedTurns(limits.pipelined_at_once)
        self.draining = False

    @property
    def admitted(self) -> set[BoundedProtocol]:
        """The open connections, without the rejected ones."""
        return cast("set[BoundedProtocol]", self.connections)

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return len(self.connections) - len(self.streams)

    def note_idle(self) -> None:
        """Lists the idle connections; called by each sweep. The list stays empty while half of the places are free."""
        if 2 * self.taken < self.limits.connections:
            self.idle.clear()
            return
        idle = [connection for connection in self.admitted if connection.is_idle and connection not in self.silent]
        idle.sort(key=lambda connection: connection.idle_since)
        self.idle = deque((connection.idle_since, connection) for connection in idle)

    def ensure_place(self) -> bool:
        """Whether a connection may be admitted. If all places are taken, closes one that waits, to free a place.

        Connections that have sent nothing come first, the oldest of them first, then the one that is idle for longest.
        """
        if self.taken < self.limits.connections:
            return True
        waiting = next(iter(self.silent), None) or self._longest_idle()
        if waiting is None:
            return False
        self.on_refused(IDLE_EVICTED)
        waiting.evict()
        return True

    def _longest_idle(self) -> BoundedProtocol | None:
        while self.idle:
            since, connection = self.idle.popleft()
            if connection.is_idle and connection.idle_since == since and connection in self.connections:
                return connection
        return None
