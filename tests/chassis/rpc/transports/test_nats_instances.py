"""How services on NATS are found, inspected and measured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from mercato.chassis.contract import Context, Operation, OutcomeUnknown, Unavailable
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.transports.nats import FoundInstance, NatsServerLimits, instances
from mercato.testing.waiting import until, until_true

from .conformance import SECRET, Ask, Said, Things
from .test_nats import LANES, Instance, StepClock, ask, broker as broker, kinds, running, send, taken


async def ask_micro(one: Instance, subject: str) -> Any:
    assert one.caller._client is not None
    return json.loads((await one.caller._client.request(subject, b"", timeout=30)).data)


@pytest.mark.parametrize("whom", ["", ".things", ".things.one"])
async def test_an_instance_is_found_inspected_and_measured(whom: str):
    async with running() as (one, _):
        await send(one, Ask())
        metadata = {"service": "things", "pid": "4711"}
        identity = {"name": "things", "id": "one", "version": "1.2.3", "metadata": metadata}
        ping = await ask_micro(one, f"$SRV.PING{whom}")
        assert ping == {"type": "io.nats.micro.v1.ping_response", **identity}
        info = await ask_micro(one, f"$SRV.INFO{whom}")
        change = next(e for e in info["endpoints"] if e["name"] == "change")
        assert (info["type"], change["subject"]) == ("io.nats.micro.v1.info_response", "mercato.things.change")
        stats = await ask_micro(one, f"$SRV.STATS{whom}")
        counted = {e["name"]: (e["num_requests"], e["num_errors"]) for e in stats["endpoints"]}
        assert (stats["type"], counted["change"]) == ("io.nats.micro.v1.stats_response", (1, 0))


async def test_an_instance_that_has_ended_is_not_found():
    async with running("one") as (one, _), running("two") as (two, _):
        await one.server.close()
        assert (await ask_micro(two, "$SRV.PING.things"))["id"] == "two"


async def test_a_refused_batch_counts_as_a_request_and_as_an_error():
    async with running() as (one, _):
        await send(one, Ask())
        await ask(one, {}, b"")
        stats = await ask_micro(one, "$SRV.STATS.things")
    change = next(e for e in stats["endpoints"] if e["name"] == "change")
    assert (change["num_requests"], change["num_errors"], change["last_error"]) == (2, 1, "untrusted")


async def test_the_processing_time_is_without_the_wait_for_a_slot():
    clock = StepClock()
    async with running(limits=NatsServerLimits(running=1, waiting=1), server_clock=clock) as (one, service):
        calls = [asyncio.create_task(send(one, Ask(number=n, do="hang"))) for n in range(LANES)]
        await until_true(lambda: len(service.batches) == LANES)
        calls.append(asyncio.create_task(send(one, Ask(number=99))))
        await until_true(lambda: taken(one) == LANES + 1)
        clock.time += 3.0
        service.release.set()
        assert [kinds(await call) for call in calls] == [[Said]] * (LANES + 1)
        stats = await ask_micro(one, "$SRV.STATS.things")
    change = next(e for e in stats["endpoints"] if e["name"] == "change")
    assert change["processing_time"] == LANES * 3_000_000_000
    assert change["average_processing_time"] == LANES * 1_000_000_000 * 3 // (LANES + 1)


async def found_by(one: Instance) -> Sequence[FoundInstance]:
    """What `instances` gives once it is complete: on a busy machine answers may take longer than it waits."""
    found: list[FoundInstance] = []

    async def complete() -> bool:
        found[:] = await instances(one.caller, seconds=0.5)
        return bool(found) and all(e.num_requests is not None and e.metadata for i in found for e in i.endpoints)

    await until(complete)
    return found


async def test_all_instances_are_listed_with_what_they_have_done():
    async with running("one") as (one, first), running("two") as (_, second):
        for _ in range(10):
            await send(one, Ask())
        found = await found_by(one)
    assert [(i.name, i.id, i.version) for i in found] == [("things", "one", "1.2.3"), ("things", "two", "1.2.3")]
    assert [dict(i.metadata) for i in found] == [{"service": "things", "pid": "4711"}] * 2
    for instance, service in zip(found, (first, second), strict=True):
        change = next(endpoint for endpoint in instance.endpoints if endpoint.name == "change")
        assert (change.subject, change.metadata["batch"]) == ("mercato.things.change", "16")
        assert (change.num_requests, change.num_errors) == (len(service.batches), 0)
        assert ((change.average_processing_time_s or 0.0) > 0) == bool(service.batches)


class BrokenServer(Server):
    async def dispatch(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        raise RuntimeError(SECRET)


async def test_a_bug_of_the_transport_is_answered_at_once():
    one = Instance({"things": BrokenServer(Things, SystemClock())}, SystemClock())
    await one.open()
    try:
        assert kinds(await send(one, Ask())) == [OutcomeUnknown]
        assert kinds(await send(one, Ask(), operation=Things.read)) == [Unavailable]
        (found,) = await found_by(one)
        counted = {endpoint.name: (endpoint.num_requests, endpoint.num_errors) for endpoint in found.endpoints}
        assert (counted["change"], counted["read"], counted["put"]) == ((1, 1), (1, 1), (0, 0))
    finally:
        await one.close()
