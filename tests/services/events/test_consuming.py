"""From a service's outbox into the feed, through the consumers of whole hosts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from chassis.messaging.harness import MIGRATIONS, Changed
from mercato import topology
from mercato.chassis.contract import Context, Operation, Unavailable
from mercato.chassis.hosting.host import CallerTransport, Host, TransportName
from mercato.chassis.hosting.service import Build
from mercato.chassis.messaging.events import Outgoing
from mercato.chassis.observability.clock import Clock, SystemClock
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.transports.loopback import LoopbackTransport
from mercato.services.events.app import build
from mercato.testing.cluster import Cluster
from mercato.testing.databases import fresh_dsn
from mercato.testing.harness import TEST_SECRET
from mercato.testing.waiting import until
from services.events.harness import FeedHarness, build_publisher, publish

BUILDS = {"orders": build_publisher, "events": build}
SUBJECTS = 5
VERSIONS = 20


@pytest_asyncio.fixture
async def dsns(cluster: Cluster) -> AsyncGenerator[Mapping[str, str]]:
    async with (
        fresh_dsn(cluster, "messaging", MIGRATIONS) as orders,
        fresh_dsn(cluster, "events", topology.migrations("events")) as events,
    ):
        yield {"orders": orders, "events": events}


@contextlib.asynccontextmanager
async def hosted(
    dsns: Mapping[str, str],
    builds: Mapping[str, Build] = BUILDS,
    *,
    transport: TransportName | CallerTransport = "local",
) -> AsyncGenerator[Host]:
    host = Host(builds, dsns, secrets=dict.fromkeys(builds, TEST_SECRET), transport=transport)
    await host.open()
    try:
        yield host
    finally:
        await host.close()


def feed_of(cluster: Cluster, host: Host) -> FeedHarness:
    made = FeedHarness(cluster, "local")
    made.host = host
    return made


async def has_entries(feed: FeedHarness, count: int) -> bool:
    return len(await feed.entries()) >= count


async def test_two_hosts_on_the_same_databases_write_each_event_once_and_in_order(
    cluster: Cluster, dsns: Mapping[str, str]
):
    async with hosted(dsns) as one, hosted(dsns) as other:
        feed = feed_of(cluster, one)

        async def change(host: Host, subject_id: int) -> None:
            for version in range(1, VERSIONS + 1):
                await publish(host.services["orders"].database, subject_id, version)

        async with asyncio.TaskGroup() as changes:
            for subject_id in range(SUBJECTS):
                changes.create_task(change((one, other)[subject_id % 2], subject_id))
        await until(lambda: has_entries(feed, SUBJECTS * VERSIONS), "everything is in the feed")
        entries = await feed.entries()
    assert len(entries) == SUBJECTS * VERSIONS
    for subject_id in range(SUBJECTS):
        of_subject = [entry.version for entry in entries if entry.subject == f"thing {subject_id}"]
        assert of_subject == list(range(1, VERSIONS + 1))


async def test_events_emitted_before_a_host_ended_are_delivered_by_the_next(cluster: Cluster, dsns: Mapping[str, str]):
    async with hosted(dsns) as host:
        await publish(host.services["orders"].database, 1, 1)
    async with hosted(dsns) as host:
        feed = feed_of(cluster, host)
        await publish(host.services["orders"].database, 1, 2)
        await until(lambda: has_entries(feed, 2), "everything is in the feed")
        assert [entry.version for entry in await feed.entries()] == [1, 2]


async def test_events_wait_where_no_consumer_runs(cluster: Cluster, dsns: Mapping[str, str]):
    async with hosted(dsns, {"orders": build_publisher}) as alone:
        await publish(alone.services["orders"].database, 1, 1)
    async with hosted(dsns) as whole:
        feed = feed_of(cluster, whole)
        await until(lambda: has_entries(feed, 1), "it is in the feed")


class Network:
    """Carries calls between hosts, in bytes; a service that no host serves is unavailable."""

    def __init__(self, clock: Clock) -> None:
        self.servers: dict[str, Server] = {}
        self._wire = LoopbackTransport(self.servers, clock)

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        if operation.service not in self.servers:
            raise Unavailable(service=operation.service)
        return await self._wire.send(operation, requests, contexts)


async def test_a_consumer_in_another_process_needs_nothing_but_a_client(cluster: Cluster, dsns: Mapping[str, str]):
    """The host of the feed has no database of the source."""
    network = Network(SystemClock())
    only_feed = {"events": dsns["events"]}
    async with (
        hosted(dsns, {"orders": build_publisher}) as source,
        hosted(only_feed, {"events": build}, transport=lambda _: network) as consuming,
    ):
        network.servers.update(consuming.servers)
        feed = feed_of(cluster, consuming)
        await publish(source.services["orders"].database, 1, 1)
        network.servers.update(source.servers)
        for version in range(2, 6):
            await publish(source.services["orders"].database, 1, version)
        await until(lambda: has_entries(feed, 5), "everything is in the feed")
        assert [entry.version for entry in await feed.entries()] == [1, 2, 3, 4, 5]


async def test_nothing_that_events_write_commits_asynchronously(cluster: Cluster, dsns: Mapping[str, str]):
    """A reader may have seen a position that a crash of the server would then give to another event."""
    checked = {"orders": ("outbox", "outbox_readers"), "events": ("feed", "feed_types", "cursors", "parked")}
    async with hosted(dsns) as host:
        for service, tables in checked.items():
            # Each in a transaction of its own: the consumers run, and lock the same tables in another order.
            for statement in (REFUSE_ASYNCHRONOUS, *(DURABLE.format(table=table) for table in tables)):
                async with host.services[service].database.transaction() as tx:
                    await tx.execute(statement)
        database = host.services["orders"].database
        with pytest.raises(asyncpg.RaiseError):  # noqa: PT012
            async with database.transaction() as tx:
                await tx.execute("SET LOCAL synchronous_commit = off")
                tx.emit([Outgoing("thing.changed", "thing", 1, 1, Changed(n=1))])
        feed = feed_of(cluster, host)
        await publish(database, 1, 1)
        await until(lambda: has_entries(feed, 1), "it is in the feed")


DURABLE = """
    CREATE TRIGGER durable BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_asynchronous()
"""
REFUSE_ASYNCHRONOUS = """
    CREATE FUNCTION refuse_asynchronous() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF current_setting('synchronous_commit') = 'off' THEN
            RAISE EXCEPTION 'a transaction that writes % commits asynchronously', TG_TABLE_NAME;
        END IF;
        RETURN NEW;
    END $$
"""
