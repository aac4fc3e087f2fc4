"""The users service on a fresh database, and the people who call it."""

from __future__ import annotations

import pytest_asyncio

from mercato.contracts.users import Users
from mercato.services.users.app import build
from mercato.testing.harness import ServiceHarness


@pytest_asyncio.fixture
async def users(harness: ServiceHarness) -> Users:
    """The client of a users service without anybody in it."""
    return (await harness.open({"users": build})).client(Users)
