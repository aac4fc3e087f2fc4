"""The operations with links of letters: proving an address, and setting a forgotten password."""

from __future__ import annotations

from mercato.chassis.contract import Empty, FieldError, InvalidRequest, current
from mercato.chassis.mail import addresses
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, Tx
from mercato.contracts.roles import may_see
from mercato.contracts.users import (
    ForgotPassword,
    LinkNotValid,
    ProveEmail,
    ResetPassword,
    SendProof,
    SetPassword,
    UserNotFound,
)

from . import letter_store, log_store, rules, store
from .letters import KINDS, Letters
from .log_store import NewEntry
from .passwords import Passwords

faults.declare("users.reset_password.before_commit", "users.reset_password.after_commit")


class Proving:
    """Implements these operations. Each opens its own transactions."""

    def __init__(self, database: Database, passwords: Passwords, letters: Letters) -> None:
        self._database = database
        self._passwords = passwords
        self._letters = letters

    async def forgot_password(self, request: ForgotPassword) -> Empty:
        """The answer, and the work before it, is the same without an account. Raises InvalidRequest."""
        email = addresses.canonical(request.email)
        async with self._database.transaction() as tx:
            found = await store.user_by_email(tx, addresses.spellings(request.email))
            if found is None and (problem := addresses.problem(email)):
                raise InvalidRequest(errors=(FieldError(field="email", message=problem),))
            await self._letters.add(tx, "reset", found.email if found else email, found.id if found else None)
        return Empty()

    async def reset_password(self, request: ResetPassword) -> Empty:
        """May be repeated with the same password. Raises LinkNotValid, InvalidRequest, TooManyHashes."""
        letter_id = self._letters.letter_of(request.token, "reset")
        if letter_id is None:
            raise LinkNotValid
        async with self._database.transaction() as tx:
            link = await letter_store.link(tx, letter_id, "reset", KINDS["reset"].life)
        if link is None:
            raise LinkNotValid
        password = _new_password(request, link.email)
        if link.used_at is not None:
            # The answer to the first request may have been lost.
            if await self._passwords.matches(link.password_hash, password):
                return Empty()
            raise LinkNotValid
        password_hash = await self._passwords.hash(password)
        async with self._database.transaction() as tx:
            link = await letter_store.link(tx, letter_id, "reset", KINDS["reset"].life)
            if link is None or link.used_at is not None:
                raise LinkNotValid
            await letter_store.prove_email(tx, link.user_id)
            entry = NewEntry("password_changed", link.user_id, current.get().actor, request.address, "by letter")
            await self._replace(tx, password_hash, entry)
            await faults.point("users.reset_password.before_commit")
        await faults.point("users.reset_password.after_commit")
        return Empty()

    async def set_password(self, request: SetPassword) -> Empty:
        """For operators of the shop. Raises UserNotFound, InvalidRequest, TooManyHashes."""
        async with self._database.read() as tx:
            user = await store.user(tx, request.id)
        if user is None:
            raise UserNotFound(user_id=request.id)
        password_hash = await self._passwords.hash(_new_password(request, user.email))
        async with self._database.transaction() as tx:
            if not await store.lock_accounts(tx, [user.id]):
                raise UserNotFound(user_id=user.id)  # it was erased during the hash
            entry = NewEntry("password_changed", user.id, current.get().actor, detail="set")
            await self._replace(tx, password_hash, entry)
        return Empty()

    async def _replace(self, tx: Tx, password_hash: str, entry: NewEntry) -> None:
        """Sets the password of the account that `entry` is about. Its links become invalid, and its sessions end."""
        await letter_store.set_password(tx, entry.account_id, password_hash)
        await letter_store.use_links(tx, entry.account_id, "reset")
        await log_store.add(tx, [entry])
        await store.end_sessions(tx, await store.lock_sessions_of(tx, entry.account_id), "password_changed")

    async def prove_email(self, request: ProveEmail) -> Empty:
        """May be repeated. Raises LinkNotValid."""
        letter_id = self._letters.letter_of(request.token, "proof")
        if letter_id is None:
            raise LinkNotValid
        async with self._database.transaction() as tx:
            link = await letter_store.link(tx, letter_id, "proof", KINDS["proof"].life)
            if link is None:
                raise LinkNotValid
            await letter_store.prove_email(tx, link.user_id)
            await letter_store.use_links(tx, link.user_id, "proof")
        return Empty()

    async def send_proof(self, request: SendProof) -> Empty:
        """For one's own account, or staff for any; does nothing where the address is proven. Raises UserNotFound."""
        if not may_see(current.get().actor, request.id):
            raise UserNotFound(user_id=request.id)
        async with self._database.transaction() as tx:
            row = await store.user(tx, request.id)
            if row is None:
                raise UserNotFound(user_id=request.id)
            if not row.email_proven:
                await self._letters.add(tx, "proof", row.email, row.id)
        return Empty()


def _new_password(request: ResetPassword | SetPassword, email: str) -> str:
    """The new password in its stored form, for the account with this address. Raises InvalidRequest."""
    password = rules.stored_password(request.new_password)
    if problem := rules.password_problem(password, email):
        raise InvalidRequest(errors=(FieldError(field="new_password", message=problem),))
    return password
