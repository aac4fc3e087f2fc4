"""The orders service on fresh databases."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio

from mercato.testing.cluster import Cluster
from mercato.testing.transports import TRANSPORTS
from services.orders.harness import OrdersHarness


@pytest.fixture
def harness_class() -> type[OrdersHarness]:
    return OrdersHarness


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=TRANSPORTS)
async def shared_harness(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[OrdersHarness]:
    """One for many tests, each with products and orders of its own: opening one takes longer than a test.

    Tests that use it run in the session's event loop: `pytestmark = pytest.mark.asyncio(loop_scope="session")`.
    """
    unopened = OrdersHarness(cluster, request.param)
    async with unopened.running(orders_lease_seconds=1.0, orders_sweep_seconds=0.1) as made:
        yield made
