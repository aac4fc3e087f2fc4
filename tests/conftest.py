"""Fixtures for everybody: one PostgreSQL a run, and rigs of services on it."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio

from mercato.chassis.testing import Cluster, Rig


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster() -> AsyncGenerator[Cluster]:
    started = await Cluster.start()
    yield started
    await started.stop()


@pytest_asyncio.fixture(params=["local", "wire"])
async def rig(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Rig]:
    made = Rig(cluster, request.param)
    yield made
    await made.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"cluster", "rig"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.postgres)
