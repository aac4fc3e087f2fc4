"""The users service on a fresh database, and the people who call it."""

from __future__ import annotations

import pytest_asyncio

from mercato.contracts.users import Users
from mercato.testing.builds import build_users
from mercato.testing.harness import ServiceHarness


@pytest_asyncio.fixture
async def users(harness: ServiceHarness) -> Users:
    """The client of a users service without any account."""
    return (await harness.open({"users": build_users})).client(Users)
