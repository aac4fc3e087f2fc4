"""Shops whose services are called directly: what the edge does with a request does not depend on how they are reached.

What every request of the API answers, both ways, is asked in `tests/reference`; what every operation does, in
`tests/services`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Generator

import pytest
import pytest_asyncio

from gateway.harness import Lines
from mercato.testing.cluster import Cluster
from mercato.testing.shop import Shop


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def open_shop(cluster: Cluster) -> AsyncGenerator[Shop]:
    """See `tests/conftest.py`."""
    shop = await Shop.start(cluster, "local")
    yield shop
    await shop.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def guarded_shop(cluster: Cluster) -> AsyncGenerator[Shop]:
    """See `tests/conftest.py`."""
    shop = await Shop.start(cluster, "local", is_open=False)
    yield shop
    await shop.close()


@pytest.fixture
def lines() -> Generator[Lines]:
    root = logging.getLogger()
    handlers = root.handlers[:]
    for handler in handlers:
        root.removeHandler(handler)
    try:
        yield Lines()
    finally:
        root.handlers[:] = handlers
