"""Balancing: which instance of a service gets the next batch.

The parts
    A `Balancer` belongs to one service in one calling process. `pick` gives a `Pick`: an instance for one batch. The
    caller reports the result exactly once.

An instance is in one of these states
    available   Of two such instances chosen at random, the one with fewer requests in flight gets the batch.
    paused      It gets no batch until its pause is over: after a transport error, or because it drains.
    probing     Its pause is over, and it got one batch, the probe. It gets no other until the probe is reported.

Guaranteed
    - Only transport errors eject. Errors that a service answers never empty the list.
    - The first pause is at most a second; each failed probe doubles it, up to a cap of seconds.
    - While an instance is available, each other has at most one probe at a time; a probe without a report is replaced
      after `probe_seconds`. While none is available, batches go to instances that were paused longer ago than a first
      pause, before their pause is over: otherwise they would fail at once.
    - A report from before the latest change of state changes nothing: a process that dies with a hundred batches in
      flight is ejected once.

It has no timer and no task: states change when a batch is picked or reported. It belongs to one event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

import structlog

from mercato.chassis.observability.clock import Clock

from .discovery import Instance

log = structlog.stdlib.get_logger("mercato.balancing")

FIRST_PAUSE_SECONDS: Final = 0.25
"""Enough for a broken connection; a process that restarts takes a few such pauses."""

LONGEST_PAUSE_SECONDS: Final = 5.0
"""An instance that is available again gets calls after this time at the latest."""

JITTER_SHARE: Final = 0.25
"""The part of a pause that may be cut at random, so that many callers do not all probe at one moment."""

PROBE_SECONDS: Final = 2.0
"""A probe may be a call that waits for long; after this time another batch may probe."""

LONGEST_DRAIN_SECONDS: Final = 30.0
"""An instance that announces a longer drain is probed nevertheless."""


class Pick:
    """One batch at one instance. Each pick gets one report; later ones are ignored."""

    __slots__ = ("_balancer", "_generation", "_member", "_open", "_requests", "instance", "is_probe")

    def __init__(self, balancer: Balancer, member: _Member, requests: int, *, is_probe: bool) -> None:
        self.instance = member.instance
        self.is_probe = is_probe
        self._balancer = balancer
        self._member = member
        self._generation = member.generation
        self._requests = requests
        self._open = True
        member.in_flight += requests

    def answered(self) -> None:
        """The instance answered, with whatever outcome."""
        if self._counts() and self.is_probe:
            self._balancer._restore(self._member)  # pyright: ignore[reportPrivateUsage]  # its own pick

    def failed(self) -> None:
        """A transport error: no connection, a reset, an incomplete answer."""
        if self._counts():
            self._balancer._eject(self._member)  # pyright: ignore[reportPrivateUsage]

    def drains(self, seconds: float) -> None:
        """The instance accepts no more calls, and will have ended in so many seconds."""
        if self._counts():
            self._balancer._retire(self._member, seconds)  # pyright: ignore[reportPrivateUsage]

    def given_up(self) -> None:
        """The caller did not wait for the result, which says nothing about the instance. Ignored after a report."""
        if self._counts() and self.is_probe:
            self._member.paused_until = 0.0  # the next batch probes

    def _counts(self) -> bool:
        """Ends the pick; True if its report is the first one, and of the current generation."""
        if not self._open:
            return False
        self._open = False
        self._member.in_flight -= self._requests
        return self._generation == self._member.generation


class _Member:
    """An instance and its state. `paused_until` is None while it is available."""

    __slots__ = ("generation", "in_flight", "instance", "pause_seconds", "paused_until", "retry_from")

    def __init__(self, instance: Instance, pause_seconds: float) -> None:
        self.instance = instance
        self.in_flight = 0
        self.paused_until: float | None = None
        self.pause_seconds = pause_seconds
        self.retry_from = 0.0
        # A new generation begins with each change of state and with each probe; reports of older ones are ignored.
        self.generation = 0


class Balancer:
    """See the top of this file. `chance` gives 0.0 up to 1.0, without 1.0. Times are of `clock`, in seconds."""

    def __init__(
        self,
        *,
        clock: Clock,
        chance: Callable[[], float],
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        longest_pause_seconds: float = LONGEST_PAUSE_SECONDS,
        probe_seconds: float = PROBE_SECONDS,
    ) -> None:
        assert 0 < first_pause_seconds <= min(1.0, longest_pause_seconds)
        assert probe_seconds > 0
        self._clock = clock
        self._chance = chance
        self._first_pause_seconds = first_pause_seconds
        self._longest_pause_seconds = longest_pause_seconds
        self._probe_seconds = probe_seconds
        self._members: dict[Instance, _Member] = {}

    def update(self, instances: Sequence[Instance]) -> None:
        """Sets the current instances. Those that were known before keep their state."""
        known = self._members
        self._members = {i: known.get(i) or _Member(i, self._first_pause_seconds) for i in instances}

    def pick(self, requests: int, tried: Collection[Instance] = ()) -> Pick | None:
        """An instance for a batch of so many requests, none of those `tried`; None if no other accepts calls now."""
        members = [member for instance, member in self._members.items() if instance not in tried]
        now = self._clock.monotonic()
        for member in members:
            if member.paused_until is not None and member.paused_until <= now:
                member.generation += 1
                member.paused_until = now + self._probe_seconds
                return Pick(self, member, requests, is_probe=True)
        available = [member for member in members if member.paused_until is None]
        if available:
            return Pick(self, self._less_busy(available), requests, is_probe=False)
        # No instance is available. One that was paused a while ago may be available again long before its next probe.
        retryable = [member for member in members if member.retry_from <= now]
        return Pick(self, self._less_busy(retryable), requests, is_probe=True) if retryable else None

    def _less_busy(self, available: list[_Member]) -> _Member:
        """The power of two choices: close to the least busy one, without all callers choosing the same."""
        first = available.pop(int(self._chance() * len(available)))
        if not available:
            return first
        second = available[int(self._chance() * len(available))]
        return second if second.in_flight < first.in_flight else first

    def _restore(self, member: _Member) -> None:
        self._pause(member, None, self._first_pause_seconds)
        log.info("instance_restored", service=member.instance.service, address=member.instance.address)

    def _eject(self, member: _Member) -> None:
        pause = member.pause_seconds * (1.0 - JITTER_SHARE * self._chance())
        self._pause(member, pause, min(member.pause_seconds * 2, self._longest_pause_seconds))
        log.warning("instance_ejected", service=member.instance.service, address=member.instance.address)

    def _retire(self, member: _Member, seconds: float) -> None:
        self._pause(member, min(max(seconds, 0.0), LONGEST_DRAIN_SECONDS), self._first_pause_seconds)
        log.info("instance_drains", service=member.instance.service, address=member.instance.address)

    def _pause(self, member: _Member, seconds: float | None, next_pause_seconds: float) -> None:
        now = self._clock.monotonic()
        member.generation += 1
        member.paused_until = None if seconds is None else now + seconds
        member.retry_from = now + self._first_pause_seconds
        member.pause_seconds = next_pause_seconds
