"""What the connections of one server share, and which of them gives its place to a new one."""

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
"""Makes header fields, `name: value`, for the refusal of a request of which these headers have been read."""

CLOSED_FOR_ROOM: Final = "idle_closed_for_room"
"""What `on_refused` is called with for an idle connection that gave its place to a new one."""


class ConnectionBook(ServerState):
    """What the connections of one server share: uvicorn's own state, the limits, and who was turned away."""

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
        self.turned_away: set[BoundedProtocol] = set()
        self.by_network: Counter[str] = Counter()
        """How many admitted connections each network has that has any."""
        self.silent: dict[BoundedProtocol, None] = {}
        """Those that have sent nothing yet, the oldest first."""
        self.idle: deque[tuple[float, BoundedProtocol]] = deque()
        """Of the others, what was idle at the last sweep, and since when; the longest first."""
        self.turns = PipelinedTurns(limits.pipelined_at_once)
        self.draining = False

    @property
    def admitted(self) -> set[BoundedProtocol]:
        """The open connections, without those that were turned away at the door."""
        return cast("set[BoundedProtocol]", self.connections)

    def note_idle(self) -> None:
        """Called by each sweep; nothing is noted while half of the places are free."""
        if 2 * len(self.connections) < self.limits.connections:
            self.idle.clear()
            return
        idle = [connection for connection in self.admitted if connection.is_idle and connection not in self.silent]
        idle.sort(key=lambda connection: connection.idle_since)
        self.idle = deque((connection.idle_since, connection) for connection in idle)

    def has_room(self) -> bool:
        """Whether a connection may be admitted; one that only waits is closed where that makes the room.

        First those that have sent nothing, in the order in which they came, then the longest idle one.
        """
        if len(self.connections) < self.limits.connections:
            return True
        waiting = next(iter(self.silent), None) or self._longest_idle()
        if waiting is None:
            return False
        self.on_refused(CLOSED_FOR_ROOM)
        waiting.leave()
        return True

    def _longest_idle(self) -> BoundedProtocol | None:
        while self.idle:
            since, connection = self.idle.popleft()
            if connection.is_idle and connection.idle_since == since and connection in self.connections:
                return connection
        return None
