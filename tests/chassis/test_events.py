"""Writing events: in the transaction of the change, in the order given."""

from __future__ import annotations

import datetime
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio

from chassis.event_world import SOURCE, Told, database
from mercato.chassis import outbox
from mercato.chassis.db import Database
from mercato.chassis.events import Event, Outgoing, emit
from mercato.chassis.testing import Cluster


@pytest_asyncio.fixture
async def publisher(cluster: Cluster) -> AsyncGenerator[Database]:
    async with database(cluster, SOURCE) as made:
        yield made


async def written(publisher: Database) -> list[Event]:
    async with publisher.read() as tx:
        return await outbox.fresh(tx, SOURCE)


def changed(subject_id: int, version: int) -> Outgoing:
    return Outgoing("thing.changed", "thing", subject_id, version, Told(n=version))


async def test_events_are_written_as_they_are_and_in_the_order_given(publisher: Database):
    async with publisher.transaction() as tx:
        await emit(tx, [changed(9, 1), changed(3, 1), changed(9, 2)])
    first, second, third = await written(publisher)
    assert (first.id, first.subject_id, first.version) == (1, 9, 1)
    assert (second.id, second.subject_id, third.id, third.version) == (2, 3, 3, 2)
    assert (first.source, first.type, first.subject, first.data) == (SOURCE, "thing.changed", "thing", '{"n":1}')
    assert first.at.tzinfo is not None
    assert abs(first.at - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=5)


async def test_the_order_holds_for_as_many_as_a_batch_can_have(publisher: Database):
    async with publisher.transaction() as tx:
        await emit(tx, [changed(n % 7, n) for n in range(1, 501)])
    assert [event.version for event in await written(publisher)] == list(range(1, 501))


async def test_no_events_are_no_statement(publisher: Database):
    async with publisher.read() as tx:
        await emit(tx, [])  # in a read, an INSERT would be refused
    assert await written(publisher) == []


async def test_what_is_rolled_back_was_never_written(publisher: Database):
    async def change() -> None:
        async with publisher.transaction() as tx:
            await emit(tx, [changed(1, 1)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await change()
    assert await written(publisher) == []
