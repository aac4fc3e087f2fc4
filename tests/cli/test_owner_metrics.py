"""The metrics of the process that starts a split shop."""

from __future__ import annotations

from mercato.chassis.observability.telemetry import Telemetry
from mercato.cli.owner_metrics import answering
from mercato.testing.waiting import until_true


async def test_what_the_owner_counts_is_added_up_although_no_collector_asks():
    telemetry = Telemetry()
    counter = telemetry.counter("mercato_rounds", "about")

    async with answering(telemetry):
        counter.add(1)
        await until_true(lambda: not counter.pending)
        counter.add(2)

    assert not counter.pending
    assert telemetry.registry.get_sample_value("mercato_rounds_total") == 3
