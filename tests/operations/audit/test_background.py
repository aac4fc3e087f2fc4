"""The audit that a running shop makes of itself: one process does it, all show what was found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

import pytest
import pytest_asyncio

from mercato.chassis.observability.telemetry import Telemetry
from mercato.operations.audit.background import Background
from mercato.operations.copying import SCRATCH, ensured
from mercato.testing.cluster import Cluster
from mercato.testing.tables import connected
from mercato.testing.waiting import until_true
from operations.audit.sample_shop import build

HOUR = 3600.0


@pytest_asyncio.fixture
async def dsns(cluster: Cluster) -> AsyncGenerator[Mapping[str, str]]:
    made = await build(cluster)
    await execute(await ensured(cluster.server.admin_dsn, SCRATCH), "DROP TABLE IF EXISTS audits")
    yield made
    for dsn in made.values():
        await cluster.release_database(dsn)


async def execute(dsn: str, statement: str) -> None:
    async with connected(dsn) as connection:
        await connection.execute(statement)


def process(cluster: Cluster, dsns: Mapping[str, str], every_seconds: float = HOUR) -> tuple[Background, Telemetry]:
    telemetry = Telemetry()
    return Background(cluster.server.admin_dsn, dsns, telemetry, every_seconds=every_seconds), telemetry


async def test_one_of_all_processes_audits_and_all_show_it(cluster: Cluster, dsns: Mapping[str, str]):
    await execute(dsns["inventory"], "UPDATE levels SET on_hand = on_hand + 1")
    processes = [process(cluster, dsns) for _ in range(3)]

    turns = await asyncio.gather(*(background.turn() for background, _ in processes))
    again = [await background.turn() for background, _ in processes]

    assert sorted(turns) == [False, False, True]
    assert again == [False, False, False]
    for background, telemetry in processes:
        assert background.details()["audit"]["violations"] == {"S2": 2}
        text = telemetry.exposition()[0].decode()
        assert 'mercato_audit_violations{invariant="S2"} 2.0' in text
        assert 'mercato_audit_violations{invariant="M1"} 0.0' in text
        assert "mercato_audit_timestamp_seconds 1." in text


async def test_what_was_mended_is_gone_after_the_next_audit(cluster: Cluster, dsns: Mapping[str, str]):
    background, _ = process(cluster, dsns, every_seconds=0.001)
    assert background.details() == {}
    await execute(dsns["inventory"], "UPDATE levels SET on_hand = on_hand + 1")
    await background.turn()
    await execute(dsns["inventory"], "UPDATE levels SET on_hand = on_hand - 1")

    assert await background.turn()

    assert background.details()["audit"]["violations"] == {}


async def test_a_turn_moves_sequences_past_ids_that_others_know(cluster: Cluster, dsns: Mapping[str, str]):
    """As after users alone was restored under the shop: a new account would get the orders of another."""
    background, _ = process(cluster, dsns)
    await execute(dsns["orders"], "UPDATE orders SET user_id = 5000")

    await background.turn()

    async with connected(dsns["users"]) as connection:
        assert await connection.fetchval("SELECT nextval('users_id_seq')") > 5000


async def test_it_continues_after_a_turn_that_failed_and_ends_on_request(cluster: Cluster, dsns: Mapping[str, str]):
    background, _ = process(cluster, dsns, every_seconds=0.1)
    async with background.running():
        await execute(dsns["orders"], "ALTER TABLE sagas RENAME TO epics")
        await until_true(lambda: bool(background.details()))
        assert "the database of orders is of another version" in background.details()["audit"]["failure"]
        await execute(dsns["orders"], "ALTER TABLE epics RENAME TO sagas")
        await until_true(lambda: "failure" not in background.details()["audit"])

    assert background.details()["audit"]["violations"] == {}
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_a_turn_from_before_the_clock_was_set_back_delays_no_process(cluster: Cluster, dsns: Mapping[str, str]):
    background, _ = process(cluster, dsns)
    assert await background.turn()
    ahead = "UPDATE audits SET leased_until = leased_until + interval '1 day', at = at + interval '1 day'"
    await execute(await ensured(cluster.server.admin_dsn, SCRATCH), ahead)
    await execute(dsns["inventory"], "UPDATE levels SET on_hand = on_hand + 1")

    assert await background.turn()

    assert background.details()["audit"]["violations"] == {"S2": 2}


@pytest.mark.parametrize("loss", ["DROP TABLE audits", "DROP DATABASE"])
async def test_it_goes_on_after_its_database_was_lost_or_made_anew(
    cluster: Cluster, dsns: Mapping[str, str], loss: str
):
    background, _ = process(cluster, dsns, every_seconds=0.001)
    assert await background.turn()
    if loss == "DROP DATABASE":
        await execute(cluster.server.admin_dsn, f"DROP DATABASE {SCRATCH} WITH (FORCE)")
    else:
        await execute(await ensured(cluster.server.admin_dsn, SCRATCH), loss)

    with pytest.raises(Exception, match=r"audits|is not available right now"):
        await background.turn()

    details = background.details()["audit"]
    assert details["failure"]
    assert details["violations"] == {}
    assert await background.turn()
    assert "failure" not in background.details()["audit"]


async def test_with_no_seconds_it_never_audits(cluster: Cluster, dsns: Mapping[str, str]):
    background, telemetry = process(cluster, dsns, every_seconds=0)
    async with background.running():
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
    assert b"mercato_audit" not in telemetry.exposition()[0], "an alert would take it for late"
