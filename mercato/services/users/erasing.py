"""Erasing an account: personal data is deleted, its id stays in orders and payments.

One transaction ends the sessions, so that every process refuses their access tokens, and deletes the account with its
credentials, letters and sessions. Only the id is kept, so that a repeated request gets the same answer.
"""

from __future__ import annotations

import uuid

from mercato.chassis.contract import SERVICE_ROLE, Empty, current
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, Tx
from mercato.contracts.roles import STAFF
from mercato.contracts.users import (
    EraseAccount,
    LastStaffMember,
    SessionEnded,
    UserNotFound,
    Users,
    WrongCredentials,
)

from . import erasure_store, letter_store, log_store, rules, store
from .log_store import NewEntry
from .passwords import Passwords
from .security_log import SecurityLog

faults.declare("users.erase.before_commit", "users.erase.after_commit")


class Erasing:
    """Implements `erase`. It opens its own transactions."""

    def __init__(self, database: Database, passwords: Passwords, log: SecurityLog) -> None:
        self._log = log
        self._database = database
        self._passwords = passwords

    async def erase(self, request: EraseAccount) -> Empty:
        """For its owner, or a service. May be repeated.

        Raises UserNotFound, Forbidden, SessionEnded, WrongCredentials, LastStaffMember, TooManyHashes.
        """
        actor, checked = current.get().actor, None
        if actor.role != SERVICE_ROLE:
            rules.check_oneself(actor, request.id, Users.erase)
            checked = await self._check_password(request)
            if checked is None:
                return Empty()  # it is erased already
        async with self._database.transaction() as tx:
            await self._erase(tx, request, checked)
            await faults.point("users.erase.before_commit")
        await faults.point("users.erase.after_commit")
        return Empty()

    async def _check_password(self, request: EraseAccount) -> store.CredentialsRow | None:
        """The credentials of the owner, whose session must be live; None where the account is erased."""
        session_id = None if request.session_id is None else uuid.UUID(request.session_id)
        async with self._database.read() as tx:
            is_live = session_id is not None and await erasure_store.is_live(tx, request.id, session_id)
            credentials = await store.credentials_by_user(tx, request.id)
            if await erasure_store.is_erased(tx, request.id):  # last: it may be erased between these statements
                return None
        if not is_live:
            raise SessionEnded
        if credentials is None:
            raise UserNotFound(user_id=request.id)
        password = rules.stored_password(request.password or "")
        if not await self._passwords.matches(credentials.password_hash, password):
            entry = NewEntry("wrong_password", request.id, current.get().actor, request.address, Users.erase.name)
            await self._log.add(entry)
            raise WrongCredentials
        return credentials

    async def _erase(self, tx: Tx, request: EraseAccount, checked: store.CredentialsRow | None) -> None:
        user_id = request.id
        # Letters are locked first, as in the use of a link. The account's lock prevents inserts that refer to it.
        await letter_store.lock_letters_of(tx, user_id)
        locked = await erasure_store.lock_to_erase(tx, user_id)
        if user_id not in {account.id for account in locked}:
            if await erasure_store.is_erased(tx, user_id):
                return  # another request has erased it while this one waited
            raise UserNotFound(user_id=user_id)
        if [account.id for account in locked if account.role == STAFF] == [user_id]:
            raise LastStaffMember(user_id=user_id)
        if checked and not await store.lock_credentials(tx, user_id, checked.version):
            raise WrongCredentials  # the password was changed after it was checked
        await erasure_store.note_erased(tx, user_id)
        await log_store.add(tx, [NewEntry("erased", user_id, current.get().actor, request.address)])
        # The log of ended sessions does not refer to the deleted rows.
        await store.end_sessions(tx, await store.lock_sessions_of(tx, user_id), "erased")
        email = await erasure_store.delete_account(tx, user_id)
        await letter_store.delete_letters_to(tx, email)
