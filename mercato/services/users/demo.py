"""The demo's people: Alice and Bob, two customers."""

from __future__ import annotations

from typing import Final

from mercato.chassis.postgres.database import Database

from . import store
from .passwords import Passwords

DEMO_PASSWORD: Final = "demo-password"  # noqa: S105  # no secret: every demo has it, and says so
IDS: Final = [1, 2]
EMAILS: Final = ["alice@example.com", "bob@example.com"]
NAMES: Final = ["Alice", "Bob"]


async def seed_demo(database: Database, passwords: Passwords) -> bool:
    """Puts the demo's people into an empty database. False, and nothing done, where there is anybody already."""
    async with database.read() as tx:
        if not await store.is_empty(tx):
            return False  # before the work of a hash
    password_hash = await passwords.hash(DEMO_PASSWORD)
    async with database.transaction() as tx:
        # Another process may be here at the same time, and somebody may register: under the lock it is empty or not.
        await store.lock_users(tx)
        if not await store.is_empty(tx):
            return False
        await store.add_demo_users(tx, IDS, EMAILS, NAMES, password_hash)
    return True
