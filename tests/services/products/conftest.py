"""The products service on a fresh database."""

from __future__ import annotations

import pytest
import pytest_asyncio

from mercato.chassis.contract import Actor
from mercato.chassis.postgres.database import Database
from mercato.contracts.products import Products
from mercato.services.products.app import build
from mercato.testing.actors import STAFF
from mercato.testing.harness import ServiceHarness


@pytest.fixture
def staff() -> Actor:
    return STAFF


@pytest_asyncio.fixture
async def products(harness: ServiceHarness) -> Products:
    return (await harness.open({"products": build})).client(Products)


@pytest.fixture
def database(harness: ServiceHarness, products: Products) -> Database:
    return harness.host.services["products"].database
