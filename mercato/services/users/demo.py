"""The accounts of the demo: Alice and Bob, two customers."""

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
    """Inserts the demo's accounts into an empty database. Gives False, and does nothing, where an account exists."""
    async with database.read() as tx:
        if not await store.is_empty(tx):
            return False  # before the work of a hash
    password_hash = await passwords.hash(DEMO_PASSWORD)
    async with database.transaction() as tx:
        # Checked again under the lock: another process may have done the same, or a customer may have registered.
        await store.lock_users(tx)
        if not await store.is_empty(tx):
            return False
        await store.add_demo_users(tx, IDS, EMAILS, NAMES, password_hash)
    return True
