"""The bounds of streams, and the places of clients within them."""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

from mercato.chassis.contract import Actor
from mercato.chassis.http import network_of
from mercato.gateway.problems import StreamsFull, TooManyStreams

KIBIBYTE: Final = 1_024


class StreamLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of the streams of one process."""

    streams: int = 2_000
    """Of all clients. Each has a connection, a task and what waits for it: some 20 kB (`make bench-streams`)."""
    of_one: int = 100
    """Of one account; without an account, of one IPv4 address or IPv6 network. A person has a few pages open; the
    servers of a shop that follow orders use one account."""
    buffer_bytes: int = 1_024 * KIBIBYTE
    """What waits for one client at most, besides what the connection buffers. It has room for three full pages of the
    feed, so that a client that keeps up never reads by itself."""
    buffered_bytes: int = 64 * 1_024 * KIBIBYTE
    """What waits for all clients at most; streams with equal filters share it, and count it each."""
    recent_entries: int = 4_000
    """How many of the last entries are remembered, so that a stream that has caught up can go on from there: the
    feed of a second with 500 orders."""
    reads_at_once: int = 2
    """Streams that read from the feed at once, of those that are behind: a third of the database connections of the
    events service, whose reads must not wait for them."""
    heartbeat_seconds: float = 15.0
    """After so long without anything else, a stream sends a comment and its position. Proxies close connections that
    are silent for a minute, some for half of one (HTML Standard 9.2.7: every 15 seconds or so)."""
    longest_seconds: float = 3_600.0
    """After about so long a stream ends, and its client begins another one: connections spread over new processes."""
    retry_ms: tuple[int, int] = (1_000, 3_000)
    """How long a client waits before it comes back: at random, so that those of a process do not come all at once."""

    @classmethod
    def up_to(cls, streams: int, of_one: int) -> StreamLimits:
        """The defaults with other counts."""
        return cls(streams=streams, of_one=min(streams, of_one))


class Places:
    """How many streams are open, in all and of each client."""

    def __init__(self, limits: StreamLimits) -> None:
        self._limits = limits
        self._of_client: Counter[str] = Counter()
        self.taken = 0

    def take(self, actor: Actor, address: str) -> str:
        """Gives the client's key, for `leave`. Raises `TooManyStreams` or `StreamsFull`."""
        key = f"account {actor.id}" if actor.id else network_of(address)
        if self._of_client[key] >= self._limits.of_one:
            raise TooManyStreams(limit=self._limits.of_one, of="account" if actor.id else "address")
        if self.taken >= self._limits.streams:
            raise StreamsFull(limit=self._limits.streams)
        self._of_client[key] += 1
        self.taken += 1
        return key

    def leave(self, key: str) -> None:
        self.taken -= 1
        self._of_client[key] -= 1
        if not self._of_client[key]:
            del self._of_client[key]
