"""Retries: a request whose instance was ending is sent to another one.

Only requests that the contract calls repeatable are sent again, if their service was unavailable: `ATTEMPTS` at most,
after a jittered pause that doubles, before the caller's deadline, and within a budget: by default one request in ten.
Without the budget, callers of a service that is down or too slow would send it three times the load.

An attempt of a repeatable request gets its share of that time: a third for the first one, half of the rest for the
second. An instance that dies without closing its connections, or hangs, costs its caller only that share; over NATS
a caller cannot detect it otherwise.

This is the only place that repeats a call between processes: a retry at two layers multiplies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from mercato.chassis.contract import Context, Operation, Unavailable
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry

from .batching import Outcome
from .limits import CallLimits
from .transports import Transport

ATTEMPTS: Final = 3
FIRST_PAUSE_SECONDS: Final = 0.05
BUDGET_ADVANCE: Final = 10.0
"""Requests that a process may repeat before it has earned any. The first attempts earn nothing until they have made up
for this: of N requests, once N is a hundred, at most N / 10 are repeated."""
BUDGET_LARGEST: Final = 100.0
"""Requests that may be repeated at once after a long time without any."""


class Budget:
    """How many requests may be repeated: each first attempt earns a `share` of one. `on_change` gets each change."""

    def __init__(self, share: float, on_change: Callable[[float], None] = lambda _: None) -> None:
        assert 0 <= share <= 1
        self.left = BUDGET_ADVANCE if share else 0.0
        self._unearned = self.left
        self._share = share
        self._on_change = on_change
        on_change(self.left)

    def earn(self, requests: int) -> None:
        earned = requests * self._share
        already_given = min(earned, self._unearned)
        self._unearned -= already_given
        if gained := min(earned - already_given, BUDGET_LARGEST - self.left):
            self.left += gained
            self._on_change(gained)

    def spend(self, requests: int) -> bool:
        """Whether so many may be repeated now: all of them, or none."""
        if requests > self.left:
            return False
        self.left -= requests
        self._on_change(-requests)
        return True


class RetryingTransport:
    """Sends by `transport`, and repeats failed requests if possible. `chance` gives 0.0 up to 1.0, without 1.0.

    Each called service has its own budget. `share` is the part of the requests that may be sent again.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        telemetry: Telemetry,
        chance: Callable[[], float],
        *,
        share: float = CallLimits().retry_share,
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._chance = chance
        self._share = share
        self.budgets: dict[str, Budget] = {}
        """By the name of the service that is called."""
        about = "Requests that were sent again, to another instance or later, by service."
        self._retried = telemetry.counter("mercato_rpc_retried", about, ["service"])
        about = "Requests that failed and were not sent again because the budget was spent, by service."
        self._refused = telemetry.counter("mercato_rpc_retries_refused", about, ["service"])
        about = "Requests that may be sent again now, by service."
        self._left = telemetry.gauge("mercato_rpc_retry_budget", about, ["service"], workers="livesum")

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        budget = self.budgets.get(operation.service)
        if budget is None:
            left = self._left.labels(operation.service)
            budget = self.budgets[operation.service] = Budget(self._share, left.inc)
        budget.earn(len(requests))
        outcomes = await self._attempt(operation, requests, contexts, ATTEMPTS)
        pause = FIRST_PAUSE_SECONDS
        for left in range(ATTEMPTS - 1, 0, -1):
            failed = [i for i, outcome in enumerate(outcomes) if _is_unavailable(operation, outcome)]
            pause_s = pause * (0.5 + self._chance() / 2)
            now = self._clock.monotonic()
            again = [i for i in failed if operation.repeatable(requests[i]) and contexts[i].deadline > now + pause_s]
            if not again:
                break
            if not budget.spend(len(again)):
                self._refused.labels(operation.service).inc(len(again))
                break
            self._retried.labels(operation.service).inc(len(again))
            await asyncio.sleep(pause_s)
            repeated = await self._attempt(operation, [requests[i] for i in again], [contexts[i] for i in again], left)
            outcomes = list(outcomes)
            for i, outcome in zip(again, repeated, strict=True):
                outcomes[i] = outcome
            pause *= 2
        return outcomes

    async def _attempt(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context], left: int
    ) -> Sequence[Outcome]:
        """As `send`, but if the service is unavailable for the whole batch, that is the outcome of each request.

        Also if it does not answer within this attempt's share of the time, while further attempts are `left`.
        """
        seconds = None
        if left > 1 and all(map(operation.repeatable, requests)):
            seconds = (max(context.deadline for context in contexts) - self._clock.monotonic()) / left
        try:
            async with asyncio.timeout(seconds):
                return await self._transport.send(operation, requests, contexts)
        except TimeoutError:
            return [Unavailable(service=operation.service) for _ in requests]
        except Unavailable as error:
            if error.service != operation.service:
                raise
            return [error.copy() for _ in requests]


def _is_unavailable(operation: Operation[Any, Any], outcome: Outcome) -> bool:
    return isinstance(outcome, Unavailable) and outcome.service == operation.service
