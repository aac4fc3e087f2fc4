"""The security log: written in the transaction of each change (`log_store.add`), read by staff, kept for 90 days."""

from __future__ import annotations

from mercato.chassis.contract import MAX_ID, current
from mercato.chassis.postgres.database import Database
from mercato.contracts.roles import is_staff_account
from mercato.contracts.users import ListSecurityLog, SecurityEntry, SecurityLogPage, Users

from . import log_store, rules, store
from .log_store import EntryRow, NewEntry


class SecurityLog:
    """What staff may read of it, and entries without another change."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, entry: NewEntry) -> None:
        """An entry about what was refused, in a transaction of its own."""
        async with self._database.transaction() as tx:
            await log_store.add(tx, [entry])

    async def list(self, request: ListSecurityLog) -> SecurityLogPage:
        """Raises Forbidden."""
        one_more, before, actor = request.limit + 1, request.before or MAX_ID, current.get().actor
        async with self._database.read() as tx:
            if request.account_id is None:
                rows = await log_store.page(tx, before, one_more)
            else:
                rows = await log_store.page_of_account(tx, request.account_id, before, one_more)
            # Last, as where accounts are listed.
            if is_staff_account(actor):
                rules.check_staff(await store.users(tx, [actor.id]), actor, Users.security_log)
        entries = tuple(_entry(row) for row in rows[: request.limit])
        return SecurityLogPage(entries=entries, next_before=entries[-1].id if len(rows) > len(entries) else None)


def _entry(row: EntryRow) -> SecurityEntry:
    return SecurityEntry(
        id=row.id,
        at=row.at,
        kind=row.kind,
        account_id=row.account_id,
        actor_role=row.actor_role,
        actor_id=row.actor_id,
        address=row.address,
        subject=row.subject,
        detail=row.detail,
    )
