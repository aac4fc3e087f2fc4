"""Accounts, sessions, profiles."""

from __future__ import annotations

import datetime
import unicodedata
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from mercato.chassis.contract import MAX_ID, Empty, Open, StaleVersion
from mercato.contracts import users as contract
from mercato.contracts.roles import ALL_ROLES, SIGNED_IN, STAFF_ONLY, Role
from mercato.contracts.users import Session, SessionPage, Tokens, User, UserPage, Users
from mercato.gateway.fields import Email, NewPassword, UserName
from mercato.gateway.problems import SignInFirst
from mercato.gateway.route import Input, Limits, Output, Page, Route, RouteRequest

CREDENTIALS: Final = Limits(body_bytes=16_384, per_second=20, burst=40)
"""Attackers guess passwords, and each attempt costs a hash."""
LINK: Final = "bG9vayBhdCB0aGUgbGV0dGVyIHRoYXQgeW91IGhhdmUgZ290LCBpdCBpcyB0aGVyZQ"
REGISTRATIONS: Final = msgspec.structs.replace(CREDENTIALS, done_per_hour=60)


class RegisterIn(Input):
    email: Email
    name: UserName
    password: NewPassword


class LoginIn(Input):
    email: contract.Email
    password: contract.Password


class RefreshIn(Input):
    refresh_token: Annotated[str, Meta(max_length=256)]


class ProfileIn(Input):
    email: Email | None = None
    name: UserName | None = None
    current_password: contract.Password | None = None
    """To change your own e-mail address."""


class PasswordIn(Input):
    current_password: contract.Password
    new_password: NewPassword
    refresh_token: contract.RefreshToken | None = None
    """The refresh token of the session to keep; without it every session ends."""


class ForgotIn(Input):
    email: Email


class ResetIn(Input):
    token: contract.LinkToken
    new_password: NewPassword


class LinkIn(Input):
    token: contract.LinkToken


class RoleIn(Input):
    role: Role


class UsersQuery(Input):
    id: Annotated[int, Meta(ge=1, le=MAX_ID, description="Only this one.")] | None = None
    email: Annotated[contract.Email | None, Meta(description="Only the one with this address.")] = None
    role: Role | None = None
    limit: Annotated[int, Meta(ge=1, le=contract.PAGE_LIMIT, description="How many at most.")] = 50
    after: Annotated[int, Meta(ge=0, le=MAX_ID, description="Only ids above this one.")] = 0


class SessionsQuery(Input):
    limit: Annotated[int, Meta(ge=1, le=contract.PAGE_LIMIT, description="How many at most.")] = 50
    after: Annotated[contract.SessionId, Meta(description="Only sessions that are older than this one.")] | None = None


class SessionOut(Output):
    id: contract.SessionId
    created_at: datetime.datetime
    last_used_at: datetime.datetime
    expires_at: datetime.datetime
    is_current: bool


class UserOut(Output):
    id: int
    email: str
    name: str
    role: Open[Role]
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int
    email_proven: bool


class TokensOut(Output):
    access_token: str
    refresh_token: str
    token_type: Literal["Bearer"]
    expires_in: int
    user: UserOut


def user_out(user: User) -> UserOut:
    return UserOut(
        id=user.id,
        email=user.email,
        name=user.name,
        role=user.role,
        created_at=user.created_at,
        updated_at=user.updated_at,
        version=user.version,
        email_proven=user.email_proven,
    )


def tokens_out(tokens: Tokens) -> TokensOut:
    return TokensOut(
        access_token=tokens.access_token,
        refresh_token=tokens.refresh_token,
        token_type="Bearer",  # noqa: S106  # RFC 6750
        expires_in=tokens.expires_in,
        user=user_out(tokens.user),
    )


def _page(page: UserPage) -> Page:
    following = None if page.next_after is None else {"after": str(page.next_after)}
    return Page([user_out(user) for user in page.users], following)


def _sessions(page: SessionPage) -> Page:
    following = None if page.next_after is None else {"after": page.next_after}
    return Page([_session_out(session) for session in page.sessions], following)


def _session_out(session: Session) -> SessionOut:
    return SessionOut(
        id=session.id,
        created_at=session.created_at,
        last_used_at=session.last_used_at,
        expires_at=session.expires_at,
        is_current=session.is_current,
    )


def nothing(_: Empty) -> None:
    return None


def me(request: RouteRequest) -> int:
    if not request.actor.id:
        raise SignInFirst
    return request.actor.id


def _register(request: RouteRequest) -> contract.Register:
    body: RegisterIn = request.body
    return contract.Register(email=body.email, name=body.name, password=body.password)


def _sign_in(request: RouteRequest) -> contract.SignIn:
    body: LoginIn = request.body
    return contract.SignIn(email=body.email, password=body.password, address=request.address)


def _signing_in(request: RouteRequest) -> str:
    body: LoginIn = request.body
    return account_of(body.email)


def account_of(email: str) -> str:
    """The key of the account with an e-mail address, for `Route.tries`."""
    return f"e-mail {folded(email)}"


def folded(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip()).casefold()


def own(request: RouteRequest) -> str | None:
    return f"id {request.actor.id}" if request.actor.id else None


def _own_address(request: RouteRequest) -> str | None:
    body: ProfileIn = request.body
    return own(request) if body.current_password is not None else None


def _list(request: RouteRequest) -> contract.ListUsers:
    query: UsersQuery = request.query
    return contract.ListUsers(after=query.after, limit=query.limit, role=query.role, id=query.id, email=query.email)


def _profile(user_id: int, request: RouteRequest) -> contract.UpdateProfile:
    body: ProfileIn = request.body
    return contract.UpdateProfile(
        id=user_id,
        version=request.if_match,
        email=body.email,
        name=body.name,
        current_password=body.current_password,
        address=request.address,
    )


def _list_sessions(request: RouteRequest) -> contract.ListSessions:
    query: SessionsQuery = request.query
    current = request.session_id or None
    return contract.ListSessions(user_id=me(request), current=current, after=query.after, limit=query.limit)


def _password(request: RouteRequest) -> contract.ChangePassword:
    body: PasswordIn = request.body
    return contract.ChangePassword(
        id=me(request),
        current_password=body.current_password,
        new_password=body.new_password,
        refresh_token=body.refresh_token,
        address=request.address,
    )


def version_of(user: User) -> int:
    return user.version


def location_of(user: User) -> str:
    return f"/users/{user.id}"


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="POST",
        path="/register",
        ignores_token=True,
        operation=Users.register,
        summary="Open an account",
        roles=ALL_ROLES,
        body=RegisterIn,
        examples={"a customer": {"email": "carol@example.com", "name": "Carol", "password": "correct horse battery"}},
        request=_register,
        answer=user_out,
        output=UserOut,
        status=201,
        location=location_of,
        limits=REGISTRATIONS,
        errors=(contract.EmailTaken, contract.TooManyHashes),
    ),
    Route(
        method="POST",
        path="/login",
        ignores_token=True,
        operation=Users.sign_in,
        knows_address=True,
        summary="Sign in: an access token for 15 minutes and a refresh token for one use",
        roles=ALL_ROLES,
        body=LoginIn,
        examples={"Alice of the demo data": {"email": "alice@example.com", "password": "demo-password"}},
        request=_sign_in,
        tries=_signing_in,
        answer=tokens_out,
        output=TokensOut,
        limits=CREDENTIALS,
        errors=(contract.WrongCredentials, contract.TooManyHashes),
    ),
    Route(
        method="POST",
        path="/token/refresh",
        ignores_token=True,
        operation=Users.refresh,
        knows_address=True,
        summary="New tokens for a refresh token; it may be sent again for 30 seconds, and later ends the session",
        roles=ALL_ROLES,
        body=RefreshIn,
        examples={"the token of the last answer": {"refresh_token": "q4Wv0TgC2m9yRzJ1oX7sLkHbN5eUdFa8PiQ3wVtYxGc"}},
        request=lambda request: contract.Refresh(refresh_token=request.body.refresh_token, address=request.address),
        answer=tokens_out,
        output=TokensOut,
        limits=CREDENTIALS,
        errors=(contract.SessionEnded,),
    ),
    Route(
        method="POST",
        path="/logout",
        ignores_token=True,
        operation=Users.sign_out,
        summary="End the session of a refresh token",
        roles=ALL_ROLES,
        body=RefreshIn,
        examples={"the token of the last answer": {"refresh_token": "q4Wv0TgC2m9yRzJ1oX7sLkHbN5eUdFa8PiQ3wVtYxGc"}},
        request=lambda request: contract.SignOut(refresh_token=request.body.refresh_token),
        answer=nothing,
        output=None,
        status=204,
        limits=CREDENTIALS,
    ),
    Route(
        method="POST",
        path="/password/forgot",
        ignores_token=True,
        operation=Users.forgot_password,
        summary="Request a letter with a link that sets a new password; the answer is the same without an account",
        roles=ALL_ROLES,
        body=ForgotIn,
        examples={"Alice of the demo data": {"email": "alice@example.com"}},
        request=lambda request: contract.ForgotPassword(email=request.body.email),
        answer=nothing,
        output=None,
        status=204,
        limits=CREDENTIALS,
    ),
    Route(
        method="POST",
        path="/password/reset",
        ignores_token=True,
        operation=Users.reset_password,
        knows_address=True,
        summary="Choose a new password by the link of a letter; every session ends",
        roles=ALL_ROLES,
        body=ResetIn,
        examples={"what follows behind the # of the link": {"token": LINK, "new_password": "correct horse battery"}},
        request=lambda request: contract.ResetPassword(
            token=request.body.token, new_password=request.body.new_password, address=request.address
        ),
        answer=nothing,
        output=None,
        status=204,
        limits=CREDENTIALS,
        errors=(contract.LinkNotValid, contract.TooManyHashes),
    ),
    Route(
        method="POST",
        path="/email/proof",
        ignores_token=True,
        operation=Users.prove_email,
        summary="Prove an e-mail address by the link of a letter",
        roles=ALL_ROLES,
        body=LinkIn,
        examples={"what follows behind the # of the link": {"token": LINK}},
        request=lambda request: contract.ProveEmail(token=request.body.token),
        answer=nothing,
        output=None,
        status=204,
        limits=CREDENTIALS,
        errors=(contract.LinkNotValid,),
    ),
    Route(
        method="POST",
        path="/users/me/proof",
        operation=Users.send_proof,
        summary="Request another letter with a link that proves your address",
        roles=SIGNED_IN,
        request=lambda request: contract.SendProof(id=me(request)),
        answer=nothing,
        output=None,
        status=204,
        limits=CREDENTIALS,
        errors=(SignInFirst,),
    ),
    Route(
        method="GET",
        path="/users",
        operation=Users.list,
        summary="All users by id, or the one with ?id= or ?email=",
        roles=STAFF_ONLY,
        query=UsersQuery,
        request=_list,
        answer=_page,
        output=list[UserOut],
    ),
    Route(
        method="GET",
        path="/users/me",
        operation=Users.get,
        summary="Your own account",
        roles=SIGNED_IN,
        request=lambda request: contract.GetUser(id=me(request)),
        answer=user_out,
        output=UserOut,
        etag=version_of,
        errors=(SignInFirst,),
    ),
    Route(
        method="PATCH",
        path="/users/me",
        operation=Users.update_profile,
        knows_address=True,
        summary="Change your own profile",
        roles=SIGNED_IN,
        body=ProfileIn,
        examples={
            "a new name": {"name": "Alice Liddell"},
            "another e-mail address": {"email": "alice.liddell@example.com", "current_password": "demo-password"},
        },
        request=lambda request: _profile(me(request), request),
        tries=_own_address,
        answer=user_out,
        output=UserOut,
        etag=version_of,
        if_match=True,
        limits=CREDENTIALS,
        errors=(SignInFirst, contract.WrongCredentials, contract.TooManyHashes, contract.EmailTaken, StaleVersion),
    ),
    Route(
        method="POST",
        path="/users/me/password",
        operation=Users.change_password,
        knows_address=True,
        summary="Change your own password; every session ends but the one whose refresh token is given",
        roles=SIGNED_IN,
        body=PasswordIn,
        examples={
            "a better one": {"current_password": "demo-password", "new_password": "correct horse battery staple"}
        },
        request=_password,
        tries=own,
        answer=nothing,
        output=None,
        status=204,
        limits=CREDENTIALS,
        errors=(SignInFirst, contract.WrongCredentials, contract.TooManyHashes),
    ),
    Route(
        method="GET",
        path="/users/me/sessions",
        operation=Users.sessions,
        summary="Your own sessions that have not ended, the newest first",
        roles=SIGNED_IN,
        knows_session=True,
        query=SessionsQuery,
        request=_list_sessions,
        answer=_sessions,
        output=list[SessionOut],
        errors=(SignInFirst,),
    ),
    Route(
        method="DELETE",
        path="/users/me/sessions",
        operation=Users.end_other_sessions,
        knows_address=True,
        summary="End all your sessions but this one",
        roles=SIGNED_IN,
        knows_session=True,
        request=lambda request: contract.EndOtherSessions(
            user_id=me(request), id=request.session_id, address=request.address
        ),
        answer=nothing,
        output=None,
        status=204,
        errors=(SignInFirst,),
    ),
    Route(
        method="DELETE",
        path="/users/me/sessions/{id}",
        operation=Users.end_session,
        knows_address=True,
        summary="End one of your sessions",
        roles=SIGNED_IN,
        text={"id": contract.SessionId},
        request=lambda request: contract.EndSession(
            user_id=me(request), id=request.text["id"], address=request.address
        ),
        answer=nothing,
        output=None,
        status=204,
        errors=(SignInFirst, contract.SessionNotFound),
    ),
    Route(
        method="GET",
        path="/users/{id}",
        operation=Users.get,
        summary="One user: yourself, or any for staff",
        roles=SIGNED_IN,
        request=lambda request: contract.GetUser(id=request.path["id"]),
        answer=user_out,
        output=UserOut,
        etag=version_of,
        errors=(contract.UserNotFound,),
    ),
    Route(
        method="PATCH",
        path="/users/{id}",
        operation=Users.update_profile,
        knows_address=True,
        summary="Change a profile: your own, or any for staff",
        roles=SIGNED_IN,
        body=ProfileIn,
        examples={"another e-mail address": {"email": "alice.liddell@example.com"}},
        request=lambda request: _profile(request.path["id"], request),
        tries=_own_address,
        answer=user_out,
        output=UserOut,
        etag=version_of,
        if_match=True,
        limits=CREDENTIALS,
        errors=(
            contract.UserNotFound,
            contract.WrongCredentials,
            contract.TooManyHashes,
            contract.EmailTaken,
            StaleVersion,
        ),
    ),
    Route(
        method="PUT",
        path="/users/{id}/role",
        operation=Users.set_role,
        knows_address=True,
        summary="Make an account staff or customer; where that changes its role, its sessions end",
        roles=STAFF_ONLY,
        body=RoleIn,
        examples={"a new colleague": {"role": "staff"}},
        request=lambda request: contract.SetRole(
            id=request.path["id"], role=request.body.role, version=request.if_match, address=request.address
        ),
        answer=user_out,
        output=UserOut,
        etag=version_of,
        if_match=True,
        errors=(contract.UserNotFound, contract.LastStaffMember, StaleVersion),
    ),
)
