"""Retries: a request that met an instance in its last moment is sent to another one.

Only what may come again is sent again: requests that the contract calls repeatable, to which the answer was that their
service is unavailable. At most `ATTEMPTS` in all, after a pause that chance shortens and that doubles, within the
time that the caller still waits, and inside a budget: by default one request in ten. Without the budget, callers of a
service that is down or too slow would send it three times the load.

An attempt of what may come again gets its share of that time: a third for the first one, half of the rest for the
second. An instance that has died in silence, or stands still, costs its caller that much and not all; over NATS nothing
else tells of it.

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
"""Requests that a process may repeat before it has sent any others. The first ones that it sends earn nothing until
this is paid back: of N requests at least, and of a hundred, no more than N / 10 are repeated."""
BUDGET_LARGEST: Final = 100.0
"""Requests that may be repeated at once after a long time without any."""


class Budget:
    """How many requests may be repeated: each first attempt earns a `share` of one. `on_change` hears by how much."""

    def __init__(self, share: float, on_change: Callable[[float], None] = lambda _: None) -> None:
        assert 0 <= share <= 1
        self.left = BUDGET_ADVANCE if share else 0.0
        self._owed = self.left
        self._share = share
        self._on_change = on_change
        on_change(self.left)

    def earn(self, requests: int) -> None:
        earned = requests * self._share
        paid_back = min(earned, self._owed)
        self._owed -= paid_back
        if gained := min(earned - paid_back, BUDGET_LARGEST - self.left):
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
    """Sends by `transport`, and sends again what failed and may be repeated. `chance` gives 0.0 up to 1.0, without 1.0.

    A budget for each service that is called; outcomes are in the order of the requests, as those of any transport.
    `share` is the part of the requests that may be sent again.
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
        """As `send`; that the service is unavailable for the whole batch becomes the outcome of each request.

        So does silence, while further attempts are `left`.
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
