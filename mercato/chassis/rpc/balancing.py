"""Balancing: which instance of a service gets the next batch.

The parts
    A `Balancer` belongs to one service in one calling process. `pick` gives a `Pick`: an instance for one batch. The
    caller reports exactly once what came of it.

An instance is in one of these states
    available   It is one of two that chance names, and the one with fewer requests in flight gets the batch.
    paused      It gets no batch until its pause is over: after a transport error, or because it said that it drains.
    probing     Its pause is over, and one batch, the probe, was sent to it. Others go elsewhere until that is reported.

Guaranteed
    - Only transport errors eject. An answer is an answer, whatever it says: errors of the service never empty the list.
    - The first pause is at most a second; each failed probe doubles it, up to a cap of seconds.
    - While an instance is available, at most one probe at a time for each other; one without a report gives way after
      `probe_seconds`. While none is available, batches go out of turn to those that were paused longer ago than a first
      pause: to fail would be worse.
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
"""Enough for a connection that broke by accident; a process that starts again takes a few of them."""

LONGEST_PAUSE_SECONDS: Final = 5.0
"""An instance that is back gets calls after this long at the latest."""

JITTER_SHARE: Final = 0.25
"""The part of a pause that chance may take away, so that many callers do not all probe at one moment."""

PROBE_SECONDS: Final = 2.0
"""A probe may be a call that waits for long; the others do not wait with it."""

LONGEST_DRAIN_SECONDS: Final = 30.0
"""An instance that says that it drains for longer is probed all the same."""


class Pick:
    """One batch at one instance. The first report counts; each pick gets one."""

    __slots__ = ("_balancer", "_era", "_member", "_open", "_requests", "instance", "is_probe")

    def __init__(self, balancer: Balancer, member: _Member, requests: int, *, is_probe: bool) -> None:
        self.instance = member.instance
        self.is_probe = is_probe
        self._balancer = balancer
        self._member = member
        self._era = member.era
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
        """The instance takes no calls any more, and will have ended in so many seconds."""
        if self._counts():
            self._balancer._retire(self._member, seconds)  # pyright: ignore[reportPrivateUsage]

    def given_up(self) -> None:
        """The caller did not wait for the end, and nothing is known about the instance. Does nothing after a report."""
        if self._counts() and self.is_probe:
            self._member.paused_until = 0.0  # the next batch probes

    def _counts(self) -> bool:
        """Ends the pick; True where its report is the first, and not a late one."""
        if not self._open:
            return False
        self._open = False
        self._member.in_flight -= self._requests
        return self._era == self._member.era


class _Member:
    """An instance and what is known about it. `paused_until` is None while it is available."""

    __slots__ = ("era", "in_flight", "instance", "pause_seconds", "paused_until", "rested_at")

    def __init__(self, instance: Instance, pause_seconds: float) -> None:
        self.instance = instance
        self.in_flight = 0
        self.paused_until: float | None = None
        self.pause_seconds = pause_seconds
        self.rested_at = 0.0
        # A new era begins with each change of state and with each probe: reports of older ones are late.
        self.era = 0


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
        """The instances that there are now. What is known about those that stay is kept."""
        known = self._members
        self._members = {i: known.get(i) or _Member(i, self._first_pause_seconds) for i in instances}

    def pick(self, requests: int, tried: Collection[Instance] = ()) -> Pick | None:
        """An instance for a batch of so many requests, none of those `tried`; None where no other takes calls now."""
        members = [member for instance, member in self._members.items() if instance not in tried]
        now = self._clock.monotonic()
        for member in members:
            if member.paused_until is not None and member.paused_until <= now:
                member.era += 1
                member.paused_until = now + self._probe_seconds
                return Pick(self, member, requests, is_probe=True)
        available = [member for member in members if member.paused_until is None]
        if available:
            return Pick(self, self._less_busy(available), requests, is_probe=False)
        # The last that was available has gone. One that was paused a while ago may be back: its next probe may be far.
        rested = [member for member in members if member.rested_at <= now]
        return Pick(self, self._less_busy(rested), requests, is_probe=True) if rested else None

    def _less_busy(self, available: list[_Member]) -> _Member:
        """The power of two choices: near the best of all, without all callers choosing the same one."""
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
        member.era += 1
        member.paused_until = None if seconds is None else now + seconds
        member.rested_at = now + self._first_pause_seconds
        member.pause_seconds = next_pause_seconds
