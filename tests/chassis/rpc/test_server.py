"""What a server counts: each batch and its requests, also those whose caller no longer waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from mercato.chassis.contract import (
    ANONYMOUS_ACTOR,
    Batch,
    Context,
    Contract,
    Message,
    Place,
    ServiceError,
    Span,
    StaleVersion,
    Unavailable,
    batched,
)
from mercato.chassis.contract.context import KEPT
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.server import CALL_SECONDS, Server


class Number(Message):
    n: int


class Things(Contract, name="things"):
    get = batched(Number, Number, allow=frozenset({ANONYMOUS_ACTOR.role}))


REFUSED, FAILS, HANGS = 1, 2, 3
"""Numbers for which the handler has no answer."""


async def handle(batch: Batch[Number]) -> Sequence[Number | ServiceError]:
    if any(request.n == HANGS for request in batch):
        await asyncio.Event().wait()
    errors = {REFUSED: StaleVersion(expected=1, actual=2), FAILS: Unavailable(service="things")}
    return [errors.get(request.n, request) for request in batch]


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def server(telemetry: Telemetry) -> Server:
    made = Server(Things, SystemClock())
    made.register(Things.get, handle)
    made.report_to(telemetry)
    return made.complete()


async def dispatch(server: Server, *numbers: int) -> Sequence[Number | ServiceError]:
    context = Context(ANONYMOUS_ACTOR, SystemClock().monotonic() + 60, "a" * 32, "")
    return await server.dispatch(Things.get, [Number(n=n) for n in numbers], [context] * len(numbers))


def counted(telemetry: Telemetry) -> tuple[float, float, float]:
    """Batches, requests, and requests that have failed."""
    value, by = telemetry.registry.get_sample_value, {"rpc_method": "things.get"}
    return (
        value(f"{CALL_SECONDS}_count", {**by, "rpc_system_name": "mercato"}) or 0.0,
        value("mercato_requests_total", by) or 0.0,
        value("mercato_requests_failed_total", by) or 0.0,
    )


async def test_a_refusal_is_an_answer_and_a_failure_is_none(server: Server, telemetry: Telemetry):
    await dispatch(server, 7, REFUSED, 8)
    assert counted(telemetry) == (1, 3, 0)
    await dispatch(server, 7, REFUSED, FAILS)
    assert counted(telemetry) == (2, 6, 1)


async def test_requests_that_nothing_waits_for_any_more_have_failed(server: Server, telemetry: Telemetry):
    hanging = asyncio.create_task(dispatch(server, 7, HANGS))
    await asyncio.sleep(0)
    hanging.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await hanging
    assert counted(telemetry) == (1, 2, 2)


async def test_the_span_of_a_batch_links_to_the_recorded_requests_alone(server: Server, telemetry: Telemetry):
    tracing = telemetry.tracing
    tracing.start(1.0)
    spans = [Span("GET /things", "gateway", "server", tracing, places) for places in ((), [Place("1" * 32, KEPT, 0)])]
    deadline = SystemClock().monotonic() + 60
    contexts = [Context(ANONYMOUS_ACTOR, deadline, "a" * 32, "", span) for span in (spans[0], spans[1], None)]
    await server.dispatch(Things.get, [Number(n=n) for n in (7, 8, 9)], contexts)
    [batch] = tracing.recent.trace("1" * 32)
    assert (batch.links, batch.attributes["mercato.batch.size"]) == ((("1" * 32, spans[1].id),), 3)
