"""The circuit breaker under callers that come, go and report in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from chassis.rpc.breakers import LONGEST, OPEN, PROBE, WINDOW, ManualClock, breaker_with
from mercato.chassis.contract import (
    Unavailable,
)
from mercato.chassis.rpc.circuit_breaker import BUCKETS, Permit, State


class BreakerWalk(RuleBasedStateMachine):
    """Callers come, go and report in any order, at any time, also long after their calls have ended."""

    permits: Bundle[Permit] = Bundle("permits")

    @initialize(jitter=st.floats(0.0, 1.0))
    def start(self, jitter: float) -> None:
        self.clock = ManualClock()
        self.changes: list[State] = []
        self.breaker = breaker_with(self.clock, jitter=lambda: jitter, on_change=self.changes.append)
        self.probe: Permit | None = None
        self.probe_since = 0.0
        self.refused_since: float | None = None
        self.probe_succeeded = False

    @rule(target=permits)
    def call(self) -> Any:
        before = self.breaker.state
        try:
            permit = self.breaker.admit()
        except Unavailable as refused:
            return self._refused(before, refused)
        self.refused_since = None
        if before is State.CLOSED:
            return permit
        assert self.breaker.state is State.HALF_OPEN
        # Never more than one probe: the former has reported, was given up, or its lease is over.
        assert self.probe is None or self.clock.seconds >= self.probe_since + PROBE
        self.probe, self.probe_since = permit, self.clock.seconds
        return permit

    def _refused(self, before: State, refused: Unavailable) -> Any:
        assert before is not State.CLOSED
        assert refused.retry_after_s is not None
        assert 1 <= refused.retry_after_s <= LONGEST
        # A caller that keeps trying becomes the probe in bounded time.
        self.refused_since = self.clock.seconds if self.refused_since is None else self.refused_since
        assert self.clock.seconds - self.refused_since <= max(LONGEST, PROBE)
        return multiple()

    @rule(permit=consumes(permits))
    def succeed(self, permit: Permit) -> None:
        self._report(permit, permit.succeeded, succeeded=True)

    @rule(permit=consumes(permits))
    def fail(self, permit: Permit) -> None:
        self._report(permit, permit.failed)

    @rule(permit=consumes(permits))
    def give_up(self, permit: Permit) -> None:
        self._report(permit, permit.cancelled)

    @rule(permit=permits)
    def fail_and_report_again_later(self, permit: Permit) -> None:
        self._report(permit, permit.failed)

    @rule(permit=permits)
    def is_slow(self, permit: Permit) -> None:
        self._report(permit, permit.slow)

    def _report(self, permit: Permit, report: Callable[[], None], *, succeeded: bool = False) -> None:
        before, changes, is_probe = self.breaker.state, len(self.changes), permit is self.probe
        report()
        changed = self.changes[changes:]
        if before is State.CLOSED:
            assert changed in ([], [State.OPEN])
            assert not (succeeded and changed)
        elif not is_probe:
            assert changed == [], "a late report changed something"
        elif changed:
            # It closes only after a success, and opens only after a failure.
            assert changed == [State.CLOSED if succeeded else State.OPEN]
        if is_probe:
            assert not succeeded or self.breaker.state is State.CLOSED
            self.probe = None
        if changed:
            self.refused_since = None

    @rule(seconds=st.sampled_from([0.1, 1.0, OPEN, WINDOW, PROBE, LONGEST]) | st.floats(0.0, 100.0))
    def wait(self, seconds: float) -> None:
        self.clock.seconds += seconds
        # Who was refused before and did not try meanwhile has not been kept waiting by the breaker.
        self.refused_since = None

    @precondition(lambda self: self.breaker.state is not State.CLOSED)
    @rule(target=permits)
    def insist(self) -> Any:
        """Tries every second: is let through before the longest time that anything can keep it out is over."""
        for _ in range(int(max(LONGEST, PROBE)) + 1):
            permit = self.call()
            if isinstance(permit, Permit):
                return permit
            self.clock.seconds += 1.0
        raise AssertionError("no caller was let through")

    @invariant()
    def it_remembers_no_calls(self) -> None:
        window = self.breaker._window
        assert [len(counts) for counts in (window._calls, window._failures, window._slow)] == [BUCKETS] * 3
        assert all(0 <= slow <= calls for slow, calls in zip(window._slow, window._calls, strict=True))


BreakerWalk.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
test_random_walks = BreakerWalk.TestCase
