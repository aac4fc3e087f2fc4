"""The users service on a fresh database, and the people who call it."""

from __future__ import annotations

import functools

import pytest_asyncio

from mercato.chassis.hosting.service import Env, Service
from mercato.contracts.users import Users
from mercato.services.users.app import build
from mercato.services.users.passwords import Argon2Hasher
from mercato.testing.harness import ServiceHarness

QUICK = Argon2Hasher(memory_kib=64, iterations=1)


@functools.wraps(build)
def build_quick(env: Env) -> Service:
    """With hashes that take no time: on a busy machine, who would wait long for one is refused."""
    return build(env, QUICK)


@pytest_asyncio.fixture
async def users(harness: ServiceHarness) -> Users:
    """The client of a users service without any account."""
    return (await harness.open({"users": build_quick})).client(Users)
