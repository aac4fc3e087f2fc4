"""Payment methods that payments accepts. Orders asks before it writes anything, and caches the answers for a minute.

While payments is unavailable, the cached answer of the minute before counts: an order with a known method is placed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from mercato.chassis.contract import Kind, ServiceError, as_service
from mercato.chassis.observability.clock import Clock
from mercato.contracts.payments import CheckMethod, Payments

REMEMBERED: Final = 10_000
"""Accepted methods that are cached; with one more, a new minute begins. Those of the last minute fit at 160 a second.
A shop that has more asks for more of them: that costs a call for each batch of orders."""
REMEMBERED_SECONDS: Final = 60.0

NO_ANSWER: Final = frozenset({Kind.UNAVAILABLE, Kind.DEADLINE})

Checked = Mapping[str | None, str | ServiceError]
"""By method that was asked for (None: the default one), the method itself or its refusal."""


class PaymentMethods:
    """The methods that payments accepts."""

    def __init__(self, payments: Payments, clock: Clock) -> None:
        self._payments = payments
        self._clock = clock
        self._known: dict[str | None, str] = {}
        self._before: dict[str | None, str] = {}
        """The methods that were cached in the minute before."""
        self._known_until = 0.0

    async def check(self, methods: Iterable[str | None]) -> Checked:
        """Asks payments once for those that are not cached. A refusal is `InvalidRequest`, or a failed call."""
        if self._clock.monotonic() >= self._known_until or len(self._known) > REMEMBERED:
            self._before, self._known = self._known, {}
            self._known_until = self._clock.monotonic() + REMEMBERED_SECONDS
        known, wanted = self._known, set(methods)
        if not (unknown := list(wanted - known.keys())):
            return known
        answers = await self._payments.check_method.many([CheckMethod(method=method) for method in unknown])
        found: dict[str | None, str | ServiceError] = {}
        for method, answer in zip(unknown, answers, strict=True):
            if not isinstance(answer, ServiceError):
                found[method] = known[method] = answer.method
            elif answer.kind in NO_ANSWER and method in self._before:
                found[method] = known[method] = self._before[method]
            else:
                found[method] = answer
        return {**{method: known[method] for method in wanted if method in known}, **found}

    async def check_one(self, method: str | None) -> str:
        """The method itself, or the default one. Raises the refusal."""
        with as_service():
            checked = (await self.check((method,)))[method]
        if isinstance(checked, ServiceError):
            raise checked
        return checked
