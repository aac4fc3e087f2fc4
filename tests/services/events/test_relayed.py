"""From a service's outbox into the feed, through the relays of whole hosts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

import pytest_asyncio

from chassis import event_world
from chassis.event_world import until
from mercato.chassis.service import Host
from mercato.chassis.testing import TEST_SECRET, Cluster, Rig, migrations_folder
from mercato.services.events.app import build
from services.events.world import Feed, build_publisher, publish

BUILDS = {"publisher": build_publisher, "events": build}
SUBJECTS = 5
VERSIONS = 20


@pytest_asyncio.fixture
async def dsns(cluster: Cluster) -> AsyncGenerator[Mapping[str, str]]:
    folders: Mapping[str, Path] = {"publisher": event_world.MIGRATIONS, "events": migrations_folder(build)}
    made = {name: await cluster.fresh_database(name, folder) for name, folder in folders.items()}
    yield made
    for dsn in made.values():
        await cluster.release_database(dsn)


@contextlib.asynccontextmanager
async def hosted(dsns: Mapping[str, str]) -> AsyncGenerator[Host]:
    host = Host(BUILDS, dsns, secret=TEST_SECRET)
    await host.open()
    try:
        yield host
    finally:
        await host.close()


def feed_of(cluster: Cluster, host: Host) -> Feed:
    rig = Rig(cluster, "local")
    rig.host = host
    return Feed(rig)


async def has_entries(feed: Feed, count: int) -> bool:
    return len(await feed.entries()) >= count


async def test_two_hosts_on_the_same_databases_write_each_event_once_and_in_order(
    cluster: Cluster, dsns: Mapping[str, str]
):
    async with hosted(dsns) as one, hosted(dsns) as other:
        feed = feed_of(cluster, one)

        async def change(host: Host, subject_id: int) -> None:
            for version in range(1, VERSIONS + 1):
                await publish(host.services["publisher"].database, subject_id, version)

        async with asyncio.TaskGroup() as changes:
            for subject_id in range(SUBJECTS):
                changes.create_task(change((one, other)[subject_id % 2], subject_id))
        await until(lambda: has_entries(feed, SUBJECTS * VERSIONS), "everything is in the feed")
        entries = await feed.entries()
    assert len(entries) == SUBJECTS * VERSIONS
    for subject_id in range(SUBJECTS):
        of_subject = [entry.version for entry in entries if entry.subject == f"thing {subject_id}"]
        assert of_subject == list(range(1, VERSIONS + 1))


async def test_what_was_emitted_before_a_host_ended_is_told_by_the_next(cluster: Cluster, dsns: Mapping[str, str]):
    async with hosted(dsns) as host:
        await publish(host.services["publisher"].database, 1, 1)
    async with hosted(dsns) as host:
        feed = feed_of(cluster, host)
        await publish(host.services["publisher"].database, 1, 2)
        await until(lambda: has_entries(feed, 2), "everything is in the feed")
        assert [entry.version for entry in await feed.entries()] == [1, 2]


async def test_where_nobody_listens_events_wait(cluster: Cluster, dsns: Mapping[str, str]):
    host = Host({"publisher": build_publisher}, dsns, secret=TEST_SECRET)
    await host.open()
    try:
        await publish(host.services["publisher"].database, 1, 1)
    finally:
        await host.close()
    async with hosted(dsns) as whole:
        feed = feed_of(cluster, whole)
        await until(lambda: has_entries(feed, 1), "it is in the feed")
