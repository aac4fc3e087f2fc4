"""Shops whose services are called directly: what the edge does with a request does not depend on how they are reached.

What every request of the API answers, both ways, is asked in `tests/reference`; what every operation does, in
`tests/services`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest_asyncio

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
