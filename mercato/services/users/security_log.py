"""The security log: written in the transaction of each change (`log_store.add`), read by staff, kept for 90 days.

The owner of an account reads the entries about it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mercato.chassis.contract import MAX_ID, Actor, current
from mercato.chassis.postgres.database import Database
from mercato.contracts.roles import is_staff_account
from mercato.contracts.users import ListOwnSecurityLog, ListSecurityLog, SecurityEntry, SecurityLogPage, Users

from . import count_store, log_store, rules, store
from .log_store import EntryRow, NewEntry


class SecurityLog:
    """Reads the log, and writes entries that belong to no other change."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, entry: NewEntry) -> None:
        """Writes an entry about a refusal, in a transaction of its own."""
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
            # Checked last, as in the list of accounts.
            if is_staff_account(actor):
                rules.check_staff(await store.users(tx, [actor.id]), actor, Users.security_log)
        return _page(rows, request.limit, await self._total(request.account_id) if request.count else None)

    async def list_own(self, request: ListOwnSecurityLog) -> SecurityLogPage:
        """Raises UserNotFound, Forbidden."""
        actor = current.get().actor
        rules.check_oneself(actor, request.user_id, Users.own_security_log)
        async with self._database.read() as tx:
            rows = await log_store.page_of_account(tx, request.user_id, request.before or MAX_ID, request.limit + 1)
        page = _page(rows, request.limit, await self._total(request.user_id) if request.count else None)
        return msgspec.structs.replace(page, entries=tuple(_shown(entry, actor) for entry in page.entries))

    async def _total(self, account_id: int | None) -> int | None:
        return await self._database.count(lambda tx: count_store.security_log(tx, account_id))


def _page(rows: Sequence[EntryRow], limit: int, total: int | None) -> SecurityLogPage:
    """`rows`: one more than `limit`, if there is one more."""
    entries = tuple(_entry(row) for row in rows[:limit])
    following = entries[-1].id if len(rows) > len(entries) else None
    return SecurityLogPage(entries=entries, next_before=following, total=total)


def _shown(entry: SecurityEntry, actor: Actor) -> SecurityEntry:
    """For the account that it is about: without the account and address of a member of staff."""
    if entry.actor_id in (0, actor.id):
        return entry
    return msgspec.structs.replace(entry, actor_id=0, address="")


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
