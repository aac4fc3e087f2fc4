"""Users: accounts and their authentication."""

from __future__ import annotations

import datetime
from typing import Annotated, Final, Literal

from msgspec import Meta

from mercato.chassis.contract import (
    MAX_ID,
    Contract,
    Empty,
    Kind,
    Message,
    Open,
    Retry,
    ServiceError,
    batched,
    filled,
    single,
    worded,
)

from .roles import ALL_ROLES, SERVICES_ONLY, SIGNED_IN, STAFF_ONLY, Role

UserId = Annotated[int, Meta(ge=1, le=MAX_ID)]
OwnUserId = Annotated[UserId, Meta(extra=filled("account"))]
"""The account of the caller."""
Email = Annotated[str, Meta(min_length=3, max_length=254, examples=["alice@example.com"])]
Name = Annotated[str, Meta(min_length=1, max_length=200, examples=["Alice"])]
Username = Annotated[str, Meta(min_length=1, max_length=254, examples=["Alice"])]
"""The name of an account, or its e-mail address."""
MIN_PASSWORD: Final = 10
"""The minimum length of a new password."""
Password = Annotated[str, Meta(max_length=256)]
"""At most 256 characters, so that a client cannot make the service hash long texts. The service checks its quality."""
LinkToken = Annotated[str, Meta(max_length=256)]
"""The part after # of the link in a letter."""
RefreshToken = Annotated[str, Meta(max_length=256)]
Version = Annotated[int, Meta(ge=1, le=MAX_ID)]
SessionId = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{32}\Z",
        extra=worded("must be 32 hexadecimal digits, in small letters"),
        examples=["4d1b0f0c6f0e4cf2a7a6f6e1f9f0a3b7"],
    ),
]
"""128 random bits, the `sid` of access tokens."""

ClientAddress = Annotated[str, Meta(max_length=64, extra=filled("address"))]
"""The address of the client's connection, for the security log; empty where the caller does not know it."""

SecurityKind = Literal[
    "signed_in",
    "sign_in_failed",
    "wrong_password",
    "token_reused",
    "sessions_ended",
    "role_changed",
    "email_changed",
    "password_changed",
    "erased",
    "price_changed",
    "refunded",
]

PAGE_LIMIT: Final = 200
ENDED_LIMIT: Final = 1_000


class User(Message):
    id: UserId
    email: str
    name: str
    role: Open[Role]
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int
    email_proven: bool = False
    """Whether the owner has opened a link that was mailed to the address."""


class Register(Message):
    email: Email
    name: Name
    password: Password
    role: Annotated[Role, Meta(extra=filled("default"))] = "customer"
    """Only staff and services may open an account that is not a customer's."""


class SignIn(Message):
    email: Email
    password: Password
    address: ClientAddress = ""


class RegisterWithoutPassword(Message):
    """Opens a customer's account without a password, and mails its owner a link to set one."""

    email: Email
    name: Name


class SignInNamed(Message):
    """Signs in by a name: with an `@`, the e-mail address; else the name of an account."""

    username: Username
    password: Password
    address: ClientAddress = ""


class Tokens(Message):
    """A session's tokens. The access token is a JWT; the refresh token can be used once."""

    access_token: str
    refresh_token: str
    token_type: str
    expires_in: int
    """Seconds until the access token expires."""
    user: User


class Refresh(Message):
    refresh_token: RefreshToken
    address: ClientAddress = ""


class SignOut(Message):
    refresh_token: RefreshToken


class GetUser(Message):
    id: Annotated[UserId, Meta(extra=filled("own_account"))]


class ListUsers(Message):
    """Users by ascending id, those after `after`."""

    after: Annotated[int, Meta(ge=0, le=MAX_ID)] = 0
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 50
    role: Role | None = None
    id: UserId | None = None
    """Only this account."""
    email: Email | None = None
    """Only the account with this address, compared without case."""
    count: bool = False
    """Whether the page must have its `total`."""


class UserPage(Message):
    users: tuple[User, ...]
    next_after: int | None = None
    """The `after` of the next page; None on the last."""
    total: int | None = None
    """All entries that the filters match, on all pages; None where it is not requested, or takes too long to count."""


class UpdateProfile(Message):
    """Changes the fields that are given. With `version`, only if the account still has it.

    Another e-mail address for one's own account needs the `current_password`; staff change other accounts without.
    """

    id: Annotated[UserId, Meta(extra=filled("own_account"))]
    version: Version | None = None
    email: Email | None = None
    name: Name | None = None
    current_password: Password | None = None
    address: ClientAddress = ""


class ChangePassword(Message):
    """Changes the password, and ends the account's sessions except that of `refresh_token`."""

    id: OwnUserId
    current_password: Password
    new_password: Password
    refresh_token: RefreshToken | None = None
    address: ClientAddress = ""


class SetPassword(Message):
    """Sets the password for an owner who has lost it; every session ends."""

    id: UserId
    new_password: Password


class ForgotPassword(Message):
    """Mails a link that sets a new password to the address, if an account has it."""

    email: Email


class ResetPassword(Message):
    """Sets the password by the link of a letter, once; every session ends. It also proves the address."""

    token: LinkToken
    new_password: Password
    address: ClientAddress = ""


class ProveEmail(Message):
    """Proves the address by the token of the link in a letter."""

    token: LinkToken


class SendProof(Message):
    """Mails another link that proves the account's address."""

    id: OwnUserId


class SetRole(Message):
    id: UserId
    role: Role
    version: Version | None = None
    address: ClientAddress = ""


class PublicKeys(Message):
    """A JSON Web Key Set (RFC 7517) with the public keys of access tokens, and their issuer and audience."""

    keys: tuple[dict[str, str], ...]
    issuer: str
    audience: str


class EndedSessionsAfter(Message):
    """Requests entries of the log of ended sessions."""

    after: Annotated[int, Meta(ge=0, le=MAX_ID)] = 0
    """The position up to which the caller has read; 0: none."""
    session_id: SessionId | None = None
    """The session of the entry at this position."""
    limit: Annotated[int, Meta(ge=1, le=ENDED_LIMIT)] = ENDED_LIMIT


class EndedSessions(Message):
    """Entries in the order of commits. Those whose access tokens have all expired may be missing.

    Where the log lacks the entry that the caller has read (its database was restored), it begins with the oldest entry.
    """

    session_ids: tuple[SessionId, ...]
    position: int
    """The position of the last of these entries; may be lower than the one in the request."""
    session_id: SessionId | None = None
    """The session of the entry at this position."""
    is_full: bool = False
    """Whether there may be more entries."""


class ListSessions(Message):
    """Lists one's own sessions that have not ended, the newest first."""

    user_id: OwnUserId
    current: Annotated[SessionId | None, Meta(extra=filled("session"))] = None
    """The session of the caller."""
    after: SessionId | None = None
    """Only sessions that are older than this one, which must be of the same user."""
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 50
    count: bool = False
    """Whether the page must have its `total`."""


class Session(Message):
    id: SessionId
    created_at: datetime.datetime
    last_used_at: datetime.datetime
    """When its tokens were last issued."""
    expires_at: datetime.datetime
    is_current: bool


class SessionPage(Message):
    sessions: tuple[Session, ...]
    next_after: SessionId | None = None
    """The `after` of the next page; None on the last."""
    total: int | None = None
    """All entries that the filters match, on all pages; None where it is not requested, or takes too long to count."""


class EndSession(Message):
    """Ends one of one's own sessions."""

    user_id: OwnUserId
    id: SessionId
    address: ClientAddress = ""


class EndOtherSessions(Message):
    """Ends all of one's own sessions but `id`."""

    user_id: OwnUserId
    id: Annotated[SessionId, Meta(extra=filled("session"))]
    address: ClientAddress = ""


class EraseAccount(Message):
    """Erases an account except for its id, which leads to no person in orders, payments and logs.

    Its owner sends the password and the current session; services send neither. A repeated request gets the same
    answer.
    """

    id: OwnUserId
    password: Password | None = None
    session_id: Annotated[SessionId | None, Meta(extra=filled("session"))] = None
    address: ClientAddress = ""


class ListSecurityLog(Message):
    """Entries of the security log by descending id, those before `before`."""

    account_id: UserId | None = None
    """Only entries about this account, or of its actions; it may be erased."""
    before: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 50
    count: bool = False
    """Whether the page must have its `total`."""


class ListOwnSecurityLog(Message):
    """Entries about one's own account, or of its actions, by descending id, those before `before`.

    An entry of another account's action has neither that account nor its address.
    """

    user_id: OwnUserId
    before: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 50
    count: bool = False
    """Whether the page must have its `total`."""


class SecurityEntry(Message):
    """It has only ids: no e-mail address, password or token. Kept for 90 days."""

    id: int
    at: datetime.datetime
    kind: Open[SecurityKind]
    account_id: int
    """The account that it is about; of a refund, the owner of the order. 0: no account, or an unknown one."""
    actor_role: str
    actor_id: int
    """The account that did it; 0 for callers without an account."""
    address: str
    """The address of the client; empty where it is not known, as of prices and refunds."""
    subject: str
    """What else it is about, such as `product 100`; may be empty."""
    detail: str
    """What was changed: `99.99 USD to 89.99 USD`; of a refund its id, and the refunded total before and after it."""


class SecurityLogPage(Message):
    entries: tuple[SecurityEntry, ...]
    next_before: int | None = None
    """The `before` of the next page; None on the last."""
    total: int | None = None
    """All entries that the filters match, on all pages; None where it is not requested, or takes too long to count."""


class UserNotFound(ServiceError, code="users.not_found", kind=Kind.NOT_FOUND):
    sentence = "There is no user {user_id}."
    user_id: int


class EmailTaken(ServiceError, code="users.email_taken", kind=Kind.CONFLICT):
    sentence = "There is an account with this e-mail address already."


class WrongCredentials(ServiceError, code="users.wrong_credentials", kind=Kind.UNAUTHENTICATED):
    """The same answer for an unknown e-mail and a wrong password."""

    sentence = "E-mail or password is wrong."


class SessionEnded(ServiceError, code="users.session_ended", kind=Kind.UNAUTHENTICATED):
    sentence = "This session has ended; sign in again."


class LinkNotValid(ServiceError, code="users.link_not_valid", kind=Kind.CONFLICT):
    """It was used, has expired, or the account has another address by now; or this shop did not issue it."""

    sentence = "This link is not valid any more; ask for a new one."


class SessionNotFound(ServiceError, code="users.session_not_found", kind=Kind.NOT_FOUND):
    """The same answer for a session that has ended and for one of another account."""

    sentence = "This account has no session {session_id}, or it has ended."
    session_id: str


class LastStaffMember(ServiceError, code="users.last_staff_member", kind=Kind.CONFLICT):
    """Without staff, no account could be made staff."""

    sentence = "User {user_id} is the last member of staff; make another account staff first."
    user_id: int


class TooManyHashes(ServiceError, code="users.too_many_sign_ins", kind=Kind.TOO_MANY):
    """The bounded queue of password hashes is full."""

    sentence = "Too many people are signing in right now; try again in a moment."
    retry_after_s: int | None = 2


class Users(Contract, name="users"):
    """Accounts, credentials, sessions, roles. Customers see and change only themselves."""

    register = single(Register, User, allow=ALL_ROLES, waits=True)
    sign_in = single(SignIn, Tokens, allow=ALL_ROLES, waits=True)
    refresh = single(Refresh, Tokens, allow=ALL_ROLES)
    sign_out = single(SignOut, Empty, allow=ALL_ROLES, retry=Retry.SAFE)
    get = batched(GetUser, User, allow=SIGNED_IN, retry=Retry.SAFE)
    list = single(ListUsers, UserPage, allow=STAFF_ONLY, retry=Retry.SAFE)
    update_profile = single(UpdateProfile, User, allow=SIGNED_IN)
    change_password = single(ChangePassword, Empty, allow=SIGNED_IN, waits=True)
    set_role = single(SetRole, User, allow=STAFF_ONLY)
    forgot_password = single(ForgotPassword, Empty, allow=ALL_ROLES)
    reset_password = single(ResetPassword, Empty, allow=ALL_ROLES, retry=Retry.SAFE, waits=True)
    prove_email = single(ProveEmail, Empty, allow=ALL_ROLES, retry=Retry.SAFE)
    set_password = single(SetPassword, Empty, allow=SERVICES_ONLY, waits=True)
    send_proof = single(SendProof, Empty, allow=SIGNED_IN)
    keys = single(Empty, PublicKeys, allow=ALL_ROLES, retry=Retry.SAFE)
    ended_sessions = single(EndedSessionsAfter, EndedSessions, allow=ALL_ROLES, retry=Retry.SAFE)
    """For processes that verify access tokens."""
    sessions = single(ListSessions, SessionPage, allow=SIGNED_IN, retry=Retry.SAFE)
    end_session = single(EndSession, Empty, allow=SIGNED_IN)
    end_other_sessions = single(EndOtherSessions, Empty, allow=SIGNED_IN)
    register_without_password = single(RegisterWithoutPassword, User, allow=ALL_ROLES)
    sign_in_named = single(SignInNamed, Tokens, allow=ALL_ROLES)
    security_log = single(ListSecurityLog, SecurityLogPage, allow=STAFF_ONLY, retry=Retry.SAFE)
    erase = single(EraseAccount, Empty, allow=SIGNED_IN, waits=True)
    own_security_log = single(ListOwnSecurityLog, SecurityLogPage, allow=SIGNED_IN, retry=Retry.SAFE)
