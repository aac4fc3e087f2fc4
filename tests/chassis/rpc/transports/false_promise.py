"""A mistake for transports to find: an operation that says it may be repeated, and counts how often it is."""

from __future__ import annotations

from collections.abc import Sequence

from mercato.chassis.contract import Batch, ServiceError

from .conformance import CUSTOMER, Ask, Said, Stage, Things, said

COUNT = 3


async def counting(stage: Stage) -> int:
    """How often a keyed operation that forgot its keys was done, for `COUNT` requests."""
    done: list[Ask] = []

    async def forgetful(batch: Batch[Ask]) -> Sequence[Said | ServiceError]:
        done.extend(batch)
        return [said(request, context) for request, context in zip(batch, batch.contexts, strict=True)]

    stage.server.register(Things.put, forgetful)
    with stage.acting(CUSTOMER):
        await stage.things.put.many([Ask(number=n, idempotency_key=f"key {n}") for n in range(COUNT)])
    return len(done)
