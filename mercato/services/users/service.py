"""The operations of the users service, in the order of the contract, and the clean-up of old sessions.

Hashing and signing happen outside of transactions: a hash takes longer than everything else here together. Credentials
that were read before a hash are therefore checked again after it, by their version.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import structlog

from mercato.chassis.contract import (
    SERVICE_ROLE,
    Actor,
    Batch,
    Empty,
    FieldError,
    Forbidden,
    InvalidRequest,
    Operation,
    StaleVersion,
    current,
)
from mercato.chassis.mail import addresses
from mercato.chassis.observability import faults
from mercato.chassis.observability.clock import Randomness
from mercato.chassis.postgres.database import Database, Tx, UniqueViolation
from mercato.contracts.roles import CUSTOMER, STAFF, is_staff_account, may_see
from mercato.contracts.users import (
    ChangePassword,
    EmailTaken,
    EndedSessions,
    EndedSessionsAfter,
    EndOtherSessions,
    EndSession,
    GetUser,
    LastStaffMember,
    ListSessions,
    ListUsers,
    PublicKeys,
    Refresh,
    Register,
    RegisterWithoutPassword,
    Session,
    SessionEnded,
    SessionNotFound,
    SessionPage,
    SetRole,
    SignIn,
    SignInNamed,
    SignOut,
    Tokens,
    TooManyHashes,
    UpdateProfile,
    User,
    UserNotFound,
    UserPage,
    Users,
    WrongCredentials,
)

from . import count_store, log_store, name_store, rules, store
from .letters import Letters
from .log_store import NewEntry
from .passwords import Passwords
from .security_log import SecurityLog
from .tokens import (
    ACCESS_TOKEN_LIFE,
    TOKEN_TYPE,
    AccessTokens,
    new_refresh_token,
    new_session_id,
    next_refresh_token,
    refresh_token_hash,
)

log = structlog.stdlib.get_logger("mercato.users")

faults.declare(
    "users.register.after_commit",
    "users.refresh.before_commit",
    "users.refresh.after_commit",
    "users.change_password.before_commit",
    "users.set_role.before_commit",
)


class UsersService:
    """Implements the operations. Each opens its own transactions."""

    def __init__(
        self,
        database: Database,
        passwords: Passwords,
        tokens: AccessTokens,
        letters: Letters,
        log: SecurityLog,
        refresh_key: bytes,
        randomness: Randomness,
    ) -> None:
        self._log = log
        self._database = database
        self._letters = letters
        self._passwords = passwords
        self._tokens = tokens
        self._refresh_key = refresh_key
        self._randomness = randomness

    async def register(self, request: Register) -> User:
        """Opens an account. Raises InvalidRequest, EmailTaken, TooManyHashes, Forbidden."""
        actor = current.get().actor
        by_staff = request.role != CUSTOMER
        if by_staff and actor.role not in (STAFF, SERVICE_ROLE):
            raise Forbidden(operation=Users.register.full_name, role=actor.role)
        email, name = addresses.canonical(request.email), rules.stored_name(request.name)
        password = rules.stored_password(request.password)
        _refuse(rules.account_errors(email=email, name=name, password=password))
        password_hash = await self._passwords.hash(password)
        try:
            async with self._database.transaction() as tx:
                if by_staff and is_staff_account(actor):
                    rules.check_staff(await store.lock_accounts(tx, [actor.id]), actor, Users.register)
                added = await store.add_user(tx, email, name, request.role)
                await store.add_credentials(tx, added.id, password_hash)
                await self._letters.add(tx, "proof", added.email, added.id)
        except UniqueViolation as violation:
            raise _email_taken(violation) from violation
        await faults.point("users.register.after_commit")
        return _user(added)

    async def sign_in(self, request: SignIn) -> Tokens:
        """Starts a session. Raises WrongCredentials, after the same work for any cause, and TooManyHashes."""
        spellings = addresses.spellings(request.email)
        credentials = None
        if spellings:  # PostgreSQL refuses a text that cannot be stored in a query too
            async with self._database.read() as tx:
                credentials = await store.credentials_by_email(tx, spellings)
        return await self._signed_in(credentials, request.password, request.address)

    async def refresh(self, request: Refresh) -> Tokens:
        """Exchanges a refresh token for new tokens, with the current role of the user. Raises SessionEnded.

        A token that comes a second time within `rules.REPEATED_WITHIN` counts as a repeated request, and gets the same
        refresh token as the first time, used or not. Later it counts as stolen, by this caller or the one before: the
        session ends.
        """
        used = refresh_token_hash(request.refresh_token)
        refresh_token = next_refresh_token(self._refresh_key, request.refresh_token)
        async with self._database.transaction() as tx:
            session = await store.lock_session(tx, used)
            successor = refresh_token_hash(refresh_token)
            user = await self._rotate(tx, session, used, successor, request.address) if session else None
            await faults.point("users.refresh.before_commit")
        await faults.point("users.refresh.after_commit")
        # After the commit: raising inside would roll back the end of the session.
        if session is None or user is None:
            raise SessionEnded
        return self._issued(user, session, refresh_token)

    async def sign_out(self, request: SignOut) -> Empty:
        """Ends the session of a refresh token, used or not, if there is one."""
        async with self._database.transaction() as tx:
            session = await store.lock_session(tx, refresh_token_hash(request.refresh_token))
            if session:
                await store.end_sessions(tx, [session.id], "signed_out")
        return Empty()

    async def get(self, batch: Batch[GetUser]) -> Sequence[User | UserNotFound]:
        """A customer gets UserNotFound for the id of another account.

        The statement that reads the accounts also reads those of the calling staff, and with them their current roles.
        """
        requests = list(zip(batch, batch.actors, strict=True))
        wanted = {r.id for r, actor in requests if may_see(actor, r.id)}
        wanted |= {actor.id for r, actor in requests if is_staff_account(actor) and actor.id != r.id}
        async with self._database.read() as tx:
            found = {row.id: _user(row) for row in await store.users(tx, list(wanted))}
        return [
            (found.get(r.id) if _is_visible(r.id, actor, found.get(actor.id)) else None) or UserNotFound(user_id=r.id)
            for r, actor in requests
        ]

    async def list(self, request: ListUsers) -> UserPage:
        one_more, actor = request.limit + 1, current.get().actor  # one more shows whether there is another page
        is_one = request.id is not None or request.email is not None
        async with self._database.read() as tx:
            if is_one:
                found = await self._one(tx, request)
                rows = [found] if found and request.role in (None, found.role) else []
            elif request.role is None:
                rows = await store.page(tx, request.after, one_more)
            else:
                rows = await store.page_of_role(tx, request.role, request.after, one_more)
            # Checked last: an actor that is staff now may see the page, also where it was not while the page was read.
            if is_staff_account(actor):
                rules.check_staff(await store.users(tx, [actor.id]), actor, Users.list)
        shown = tuple(_user(row) for row in rows[: request.limit])
        total = None
        if request.count:
            total = len(rows) if is_one else await self._database.count(lambda tx: count_store.users(tx, request.role))
        return UserPage(users=shown, next_after=shown[-1].id if len(rows) > len(shown) else None, total=total)

    async def update_profile(self, request: UpdateProfile) -> User:
        """Raises UserNotFound, InvalidRequest, WrongCredentials, TooManyHashes, EmailTaken, StaleVersion."""
        actor = current.get().actor
        if not may_see(actor, request.id):
            raise UserNotFound(user_id=request.id)
        email = None if request.email is None else addresses.canonical(request.email)
        name = None if request.name is None else rules.stored_name(request.name)
        _refuse(rules.account_errors(email=email, name=name))
        checked = None
        if email is not None and actor.id == request.id:
            checked = await self._check_password_for(request, email)
        try:
            async with self._database.transaction() as tx:
                if is_staff_account(actor) and actor.id != request.id:
                    locked = await store.lock_accounts(tx, [actor.id, request.id])
                    if rules.role_of(locked, actor.id) != STAFF:
                        raise UserNotFound(user_id=request.id)
                if email is None and name is None:
                    return await self._expected(tx, request.id, request.version)
                changed = await store.change_profile(tx, request.id, email, name, request.version)
                if changed is None:
                    return await self._expected(tx, request.id, request.version)
                if checked and not await store.lock_credentials(tx, checked.user_id, checked.version):
                    raise WrongCredentials  # the password was changed after it was checked
                if checked or (email is not None and actor.id != request.id):
                    await log_store.add(tx, [NewEntry("email_changed", request.id, actor, request.address)])
                if email is not None and not changed.email_proven:
                    await self._letters.add(tx, "proof", changed.email, changed.id)
                return _user(changed)
        except UniqueViolation as violation:
            raise _email_taken(violation) from violation

    async def change_password(self, request: ChangePassword) -> Empty:
        """For one's own account. Raises UserNotFound, Forbidden, InvalidRequest, WrongCredentials, TooManyHashes."""
        rules.check_oneself(current.get().actor, request.id, Users.change_password)
        async with self._database.read() as tx:
            credentials = await store.credentials_by_user(tx, request.id)
        if credentials is None:
            raise UserNotFound(user_id=request.id)
        password = rules.stored_password(request.new_password)
        if problem := rules.password_problem(password, credentials.email):
            raise InvalidRequest(errors=(FieldError(field="new_password", message=problem),))
        checked = rules.stored_password(request.current_password)
        if not await self._passwords.matches(credentials.password_hash, checked):
            await self._log.add(_wrong_password(request, Users.change_password))
            raise WrongCredentials
        await self._replace_password(credentials, await self._passwords.hash(password), request)
        return Empty()

    async def set_role(self, request: SetRole) -> User:
        """Changes the role of an account. Where the role differs, all its sessions end.

        Raises UserNotFound, Forbidden, StaleVersion, LastStaffMember.
        """
        actor = current.get().actor
        lock = store.lock_accounts if request.role == STAFF else store.lock_accounts_and_staff
        async with self._database.transaction() as tx:
            locked = await lock(tx, [actor.id, request.id])
            if is_staff_account(actor):
                rules.check_staff(locked, actor, Users.set_role)
            changed = await store.change_role(tx, request.id, request.role, request.version)
            # An actor without an account (the caller of an open shop, a command) can make an account staff again.
            if changed and request.role != STAFF and _staff_of(locked) == [request.id] and actor.id:
                raise LastStaffMember(user_id=request.id)
            if changed and rules.role_of(locked, request.id) != request.role:
                moved = f"{rules.role_of(locked, request.id)} to {request.role}"
                await log_store.add(tx, [NewEntry("role_changed", request.id, actor, request.address, moved)])
                await store.end_sessions(tx, await store.lock_sessions_of(tx, request.id), "role_changed")
                await faults.point("users.set_role.before_commit")
            return _user(changed) if changed else await self._expected(tx, request.id, request.version)

    async def keys(self, _request: Empty) -> PublicKeys:
        return self._tokens.public_keys()

    async def ended_sessions(self, request: EndedSessionsAfter) -> EndedSessions:
        after = request.after
        async with self._database.read() as tx:
            rows = await store.ended_sessions(tx, after, request.limit)
            if rules.is_replaced(after, request.session_id, rows[0].last, _entry_at(rows, after)):
                after = 0
                rows = await store.ended_sessions(tx, after, request.limit)
        entries = [(row.position, row.sid.hex) for row in rows if row.position is not None and row.sid is not None]
        later = [entry for entry in entries if entry[0] > after][: request.limit]
        position, session_id = later[-1] if later else (after, request.session_id if after else None)
        return EndedSessions(
            session_ids=tuple(sid for _, sid in later),
            position=position,
            session_id=session_id,
            is_full=len(entries) > request.limit,
        )

    async def sessions(self, request: ListSessions) -> SessionPage:
        """For one's own account. Raises UserNotFound, Forbidden."""
        rules.check_oneself(current.get().actor, request.user_id, Users.sessions)
        after = None if request.after is None else uuid.UUID(request.after)
        async with self._database.read() as tx:
            rows = await store.sessions_of(tx, request.user_id, after, request.limit + 1)
        shown = tuple(
            Session(
                id=row.sid.hex,
                created_at=row.created_at,
                last_used_at=row.last_used_at,
                expires_at=row.expires_at,
                is_current=row.sid.hex == request.current,
            )
            for row in rows[: request.limit]
        )
        total = None
        if request.count:
            total = await self._database.count(lambda tx: count_store.sessions_of(tx, request.user_id))
        return SessionPage(sessions=shown, next_after=shown[-1].id if len(rows) > len(shown) else None, total=total)

    async def end_session(self, request: EndSession) -> Empty:
        """For one's own account. Raises UserNotFound, Forbidden, SessionNotFound."""
        rules.check_oneself(current.get().actor, request.user_id, Users.end_session)
        async with self._database.transaction() as tx:
            ending = await store.lock_session_of(tx, request.user_id, uuid.UUID(request.id))
            if not ending:
                raise SessionNotFound(session_id=request.id)
            await log_store.add(tx, [_sessions_ended(request, 1)])
            await store.end_sessions(tx, ending, "ended_by_user")
        return Empty()

    async def end_other_sessions(self, request: EndOtherSessions) -> Empty:
        """For one's own account. Raises UserNotFound, Forbidden."""
        rules.check_oneself(current.get().actor, request.user_id, Users.end_other_sessions)
        async with self._database.transaction() as tx:
            ending = await store.lock_other_sessions_of(tx, request.user_id, uuid.UUID(request.id))
            if ending:
                await log_store.add(tx, [_sessions_ended(request, len(ending))])
            await store.end_sessions(tx, ending, "ended_by_user")
        return Empty()

    async def register_without_password(self, request: RegisterWithoutPassword) -> User:
        """Opens an account without a password; its owner can sign in after setting one by the link of a letter.

        Raises InvalidRequest, EmailTaken.
        """
        email, name = addresses.canonical(request.email), rules.stored_name(request.name)
        _refuse(rules.account_errors(email=email, name=name))
        try:
            async with self._database.transaction() as tx:
                added = await store.add_user(tx, email, name, CUSTOMER)
                await self._letters.add(tx, "reset", added.email, added.id)
        except UniqueViolation as violation:
            raise _email_taken(violation) from violation
        return _user(added)

    async def sign_in_named(self, request: SignInNamed) -> Tokens:
        """`sign_in` by an e-mail address or a name. Of accounts with the same name, the oldest with a password."""
        if "@" in request.username:
            by_email = SignIn(email=request.username, password=request.password, address=request.address)
            return await self.sign_in(by_email)
        name = rules.stored_name(request.username)
        credentials = None
        if rules.name_problem(name) is None:  # PostgreSQL refuses a text that cannot be stored in a query too
            async with self._database.read() as tx:
                credentials = await name_store.credentials_by_name(tx, name)
        return await self._signed_in(credentials, request.password, request.address)

    # ----------------------------------------------------------------------------------------------------------- steps

    async def _signed_in(self, credentials: store.CredentialsRow | None, password: str, address: str) -> Tokens:
        """Raises WrongCredentials, after the same work without credentials, and TooManyHashes."""
        password = rules.stored_password(password)
        matches = await self._passwords.matches(credentials.password_hash if credentials else None, password)
        if credentials is None or not matches:
            account_id = credentials.user_id if credentials else 0
            await self._log.add(NewEntry("sign_in_failed", account_id, current.get().actor, address))
            raise WrongCredentials
        return await self._start_session(credentials, await self._better_hash(credentials, password), address)

    async def _one(self, tx: Tx, request: ListUsers) -> store.UserRow | None:
        """The account with the requested id and address."""
        if request.email is not None:
            by_email = await store.user_by_email(tx, addresses.spellings(request.email))
            if by_email is None or request.id in (None, by_email.id):
                return by_email
            return None
        assert request.id is not None
        return await store.user(tx, request.id)

    async def _check_password_for(self, request: UpdateProfile, email: str) -> store.CredentialsRow | None:
        """The credentials with which an owner changes the e-mail address; None where the address is the same.

        The password is needed so that a person with a signed-in device cannot take over the account: the e-mail
        address resets its password.
        """
        async with self._database.read() as tx:
            credentials = await store.credentials_by_user(tx, request.id)
        if credentials is None:
            raise UserNotFound(user_id=request.id)
        if credentials.email == email:
            return None
        if request.current_password is None:
            needed = FieldError(field="current_password", message="is needed to change the e-mail address")
            raise InvalidRequest(errors=(needed,))
        password = rules.stored_password(request.current_password)
        if not await self._passwords.matches(credentials.password_hash, password):
            await self._log.add(_wrong_password(request, Users.update_profile))
            raise WrongCredentials
        return credentials

    async def _better_hash(self, credentials: store.CredentialsRow, password: str) -> str | None:
        """A hash with the current parameters, where the stored one has others."""
        if not self._passwords.outdated(credentials.password_hash):
            return None
        try:
            return await self._passwords.hash(password)
        except TooManyHashes:
            return None  # the old hash stays valid; the next sign-in tries again

    async def _start_session(self, checked: store.CredentialsRow, better_hash: str | None, address: str) -> Tokens:
        refresh_token, sid = new_refresh_token(self._randomness), new_session_id(self._randomness)
        async with self._database.transaction() as tx:
            if better_hash:
                await store.rehash(tx, checked.user_id, checked.version, better_hash)
            session = await store.start_session(tx, checked.user_id, checked.version, sid, rules.SESSION_LENGTH)
            if session is None:
                raise WrongCredentials  # the password was changed after it was checked
            await store.add_refresh_token(tx, session.id, refresh_token_hash(refresh_token))
            user = await self._expected(tx, session.user_id, None)
            await log_store.add(tx, [NewEntry("signed_in", user.id, Actor(user.role, user.id), address)])
        return self._issued(user, session, refresh_token)

    async def _rotate(self, tx: Tx, session: store.SessionRow, used: bytes, fresh: bytes, address: str) -> User | None:
        """Replaces the token, and gives the session's user. Ends the session, and gives None, for a reused token."""
        if await store.use_refresh_token(tx, used):
            await store.add_refresh_token(tx, session.id, fresh)
        elif not await store.is_repeated(tx, used, fresh, rules.REPEATED_WITHIN):
            await log_store.add(tx, [NewEntry("token_reused", session.user_id, current.get().actor, address)])
            await store.end_sessions(tx, [session.id], "token_reused")
            log.warning("refresh_token_reused", user_id=session.user_id, session_id=session.sid.hex)
            return None
        return await self._expected(tx, session.user_id, None)

    async def _replace_password(self, checked: store.CredentialsRow, new_hash: str, request: ChangePassword) -> None:
        kept = refresh_token_hash(request.refresh_token) if request.refresh_token else b""
        async with self._database.transaction() as tx:
            if not await store.change_password(tx, checked.user_id, checked.version, new_hash):
                raise WrongCredentials  # the password was changed after it was checked
            entry = NewEntry("password_changed", request.id, current.get().actor, request.address)
            await log_store.add(tx, [entry])
            ending = await store.lock_sessions_of(tx, checked.user_id, except_with=kept)
            await store.end_sessions(tx, ending, "password_changed")
            await faults.point("users.change_password.before_commit")

    async def _expected(self, tx: Tx, user_id: int, version: int | None) -> User:
        """The user at the version that the caller has seen. Raises UserNotFound, StaleVersion."""
        row = await store.user(tx, user_id)
        if row is None:
            raise UserNotFound(user_id=user_id)
        if version is not None and version != row.version:
            raise StaleVersion(expected=version, actual=row.version)
        return _user(row)

    def _issued(self, user: User, session: store.SessionRow, refresh_token: str) -> Tokens:
        return Tokens(
            access_token=self._tokens.sign(user, session.sid),
            refresh_token=refresh_token,
            token_type=TOKEN_TYPE,
            expires_in=int(ACCESS_TOKEN_LIFE.total_seconds()),
            user=user,
        )


def _is_visible(user_id: int, actor: Actor, account: User | None) -> bool:
    """Whether an actor may see an account. `account`: that of the actor, where it was read."""
    if actor.id == user_id or not is_staff_account(actor):
        return may_see(actor, user_id)
    return account is not None and account.role == STAFF


def _wrong_password(request: ChangePassword | UpdateProfile, operation: Operation[Any, Any]) -> NewEntry:
    return NewEntry("wrong_password", request.id, current.get().actor, request.address, operation.name)


def _sessions_ended(request: EndSession | EndOtherSessions, count: int) -> NewEntry:
    return NewEntry("sessions_ended", request.user_id, current.get().actor, request.address, str(count))


def _user(row: store.UserRow) -> User:
    return User(
        id=row.id,
        email=row.email,
        name=row.name,
        role=row.role,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version=row.version,
        email_proven=row.email_proven,
    )


def _refuse(errors: tuple[FieldError, ...]) -> None:
    if errors:
        raise InvalidRequest(errors=errors)


def _email_taken(violation: UniqueViolation) -> Exception:
    return EmailTaken() if violation.constraint == store.EMAIL_KEY else violation


def _entry_at(rows: Sequence[store.EndedRow], position: int) -> str | None:
    """The session of the entry at a position, where it is in `rows`: it is the first then."""
    first = rows[0]
    return first.sid.hex if first.sid is not None and first.position == position else None


def _staff_of(accounts: Sequence[store.RoleRow]) -> Sequence[int]:
    return [account.id for account in accounts if account.role == STAFF]
