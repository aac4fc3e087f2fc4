"""Signing in, refreshing, signing out, and what a change of password does to sessions."""

from __future__ import annotations

import asyncio
import datetime
import functools
import io
import json
import re
import threading
import uuid
from base64 import urlsafe_b64decode
from hashlib import sha256
from typing import Any

import pytest
import pytest_asyncio
from joserfc import jws
from joserfc.jwk import OKPKey

from mercato.chassis.contract import Actor, Empty, Forbidden, InvalidRequest
from mercato.chassis.hosting.service import Build, Env, Service
from mercato.chassis.observability import faults
from mercato.chassis.observability.telemetry import configure_logging
from mercato.contracts.roles import Role
from mercato.contracts.users import (
    ChangePassword,
    EndedSessions,
    EndedSessionsAfter,
    EndOtherSessions,
    EndSession,
    ListSessions,
    Refresh,
    Register,
    SessionEnded,
    SessionNotFound,
    SessionPage,
    SetRole,
    SignIn,
    SignOut,
    Tokens,
    User,
    UserNotFound,
    Users,
    WrongCredentials,
)
from mercato.services.users import store
from mercato.services.users.app import build
from mercato.services.users.passwords import Argon2Hasher, Hasher
from mercato.testing.harness import ServiceHarness
from mercato.testing.tables import connect
from mercato.testing.waiting import BOUND_SECONDS, without_waiting

ANONYMOUS = Actor("anonymous")
STAFF = Actor("staff")
"""Without an account, such as the operator: its role is in no database."""
EMAIL = "alice@example.com"
PASSWORD = "correct horse"
NEW_PASSWORD = "battery staple"


@pytest_asyncio.fixture
async def alice(harness: ServiceHarness, users: Users) -> User:
    with harness.acting(ANONYMOUS):
        return await users.register(Register(email=EMAIL, name="Alice", password=PASSWORD))


async def sign_in(harness: ServiceHarness, users: Users, password: str = PASSWORD, email: str = EMAIL) -> Tokens:
    with harness.acting(ANONYMOUS):
        return await users.sign_in(SignIn(email=email, password=password))


async def refresh(harness: ServiceHarness, users: Users, tokens: Tokens) -> Tokens:
    with harness.acting(ANONYMOUS):
        return await users.refresh(Refresh(refresh_token=tokens.refresh_token))


async def sign_out(harness: ServiceHarness, users: Users, refresh_token: str) -> Empty:
    with harness.acting(ANONYMOUS):
        return await users.sign_out(SignOut(refresh_token=refresh_token))


async def change_password(harness: ServiceHarness, users: Users, actor: Actor, user_id: int, **details: Any) -> Empty:
    request: dict[str, Any] = {"id": user_id, "current_password": PASSWORD, "new_password": NEW_PASSWORD, **details}
    with harness.acting(actor):
        return await users.change_password(ChangePassword(**request))


async def look(harness: ServiceHarness, kind: type[Any], sql: str) -> list[Any]:
    async with harness.host.services["users"].database.read() as tx:
        return await tx.fetch_values(kind, sql)


async def make_it_so(harness: ServiceHarness, sql: str) -> None:
    async with harness.host.services["users"].database.transaction() as tx:
        await tx.execute(sql)


def part(token: str, place: int) -> dict[str, Any]:
    """Header (0) or claims (1) of a JWT, read by hand."""
    encoded = token.split(".")[place]
    return json.loads(urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))


def session_id(tokens: Tokens) -> str:
    return part(tokens.access_token, 1)["sid"]


# ---------------------------------------------------------------------------------------------------------- signing in


async def test_signing_in_gives_tokens(harness: ServiceHarness, users: Users, alice: User):
    tokens = await sign_in(harness, users, email=" ALICE@example.com ")

    assert (tokens.user, tokens.token_type, tokens.expires_in) == (alice, "Bearer", 900)


async def test_an_unknown_address_and_a_wrong_password_get_the_same_answer(
    harness: ServiceHarness, users: Users, alice: User
):
    answers: list[str] = []
    for email, password in [
        (EMAIL, "wrong password"),
        (EMAIL, ""),
        (EMAIL, "wrong\x00password"),
        ("unknown@example.com", PASSWORD),
        ("no address", PASSWORD),
        ("al\x00ice@example.com", PASSWORD),
    ]:
        with pytest.raises(WrongCredentials) as refused:
            await sign_in(harness, users, password, email)
        answers.append(f"{refused.value} {refused.value.details}")

    assert len(set(answers)) == 1
    assert await look(harness, int, "SELECT id FROM sessions") == []


class CountingHasher(Argon2Hasher):
    """Counts the work that is done."""

    def __init__(self, **parameters: int) -> None:
        super().__init__(**parameters)
        self.checked: list[str] = []

    def matches(self, password_hash: str, password: str) -> bool:
        self.checked.append(password_hash[: password_hash.rindex("$", 0, 40)])
        return super().matches(password_hash, password)


def build_with(hasher: Hasher, threads: int | None = None) -> Build:
    @functools.wraps(build)
    def built(env: Env) -> Service:
        return build(env, hasher, threads)

    return built


async def test_an_unknown_address_costs_the_same_work_as_a_wrong_password(harness: ServiceHarness):
    hasher = CountingHasher()
    users = (await harness.open({"users": build_with(hasher)})).client(Users)
    with harness.acting(ANONYMOUS):
        await users.register(Register(email=EMAIL, name="Alice", password=PASSWORD))
    for email in (EMAIL, "unknown@example.com", "no address"):
        with pytest.raises(WrongCredentials):
            await sign_in(harness, users, "wrong password", email)

    assert len(hasher.checked) == 3
    assert len(set(hasher.checked)) == 1, "the same parameters each time"


async def test_signing_in_renews_a_hash_of_former_parameters(harness: ServiceHarness):
    users = (await harness.open({"users": build})).client(Users)
    with harness.acting(ANONYMOUS):
        await users.register(Register(email=EMAIL, name="Alice", password=PASSWORD))
    weak = Argon2Hasher(memory_kib=1_024, iterations=1).hash(PASSWORD, b"0123456789abcdef")
    await make_it_so(harness, f"UPDATE credentials SET password_hash = '{weak}'")

    await sign_in(harness, users)
    (renewed,) = await look(harness, str, "SELECT password_hash FROM credentials")
    assert renewed.startswith("$argon2id$v=19$m=19456,t=2,p=1$")

    await sign_in(harness, users)
    assert await look(harness, str, "SELECT password_hash FROM credentials") == [renewed]


async def test_a_failed_sign_in_renews_nothing(harness: ServiceHarness, users: Users, alice: User):
    weak = Argon2Hasher(memory_kib=1_024, iterations=1).hash(PASSWORD, b"0123456789abcdef")
    await make_it_so(harness, f"UPDATE credentials SET password_hash = '{weak}'")
    with pytest.raises(WrongCredentials):
        await sign_in(harness, users, "wrong password")

    assert await look(harness, str, "SELECT password_hash FROM credentials") == [weak]


# ------------------------------------------------------------------------------------------------------- access tokens


async def test_an_access_token_says_who_until_when_and_is_signed_by_the_public_key(
    harness: ServiceHarness, users: Users, alice: User
):
    before = int(harness.host.clock.now().timestamp())
    tokens = await sign_in(harness, users)
    with harness.acting(ANONYMOUS):
        public = await users.keys(Empty())

    (key,) = public.keys
    assert (key["kty"], key["crv"], key["use"], key["alg"]) == ("OKP", "Ed25519", "sig", "EdDSA")
    assert "d" not in key
    assert part(tokens.access_token, 0) == {"alg": "EdDSA", "typ": "at+jwt", "kid": key["kid"]}
    # "Ed25519" is the other name of the same signature.
    header, claims, signature = tokens.access_token.split(".")
    ours = OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "x": key["x"]})
    assert ours.thumbprint() == key["kid"]
    algorithm = jws.JWSRegistry.algorithms["Ed25519"]
    assert algorithm.verify(f"{header}.{claims}".encode(), urlsafe_b64decode(signature + "=="), ours)

    said = part(tokens.access_token, 1)
    (started,) = await look(harness, uuid.UUID, "SELECT sid FROM sessions")
    assert (said["iss"], said["aud"]) == (public.issuer, public.audience) == ("mercato", "mercato")
    assert (said["sub"], said["role"], said["sid"]) == (str(alice.id), "customer", started.hex)
    assert before <= said["iat"] <= int(harness.host.clock.now().timestamp())
    assert said["exp"] - said["iat"] == 900
    assert said.keys() == {"iss", "aud", "sub", "role", "sid", "iat", "exp", "jti"}


async def test_no_two_tokens_are_the_same(harness: ServiceHarness, users: Users, alice: User):
    tokens = [await sign_in(harness, users), await sign_in(harness, users)]

    assert len({t.access_token for t in tokens}) == len({t.refresh_token for t in tokens}) == 2
    assert len({part(t.access_token, 1)["jti"] for t in tokens}) == 2


async def test_the_ids_of_sessions_are_random_and_those_of_the_database_are_not_shown(
    harness: ServiceHarness, users: Users, alice: User
):
    seen = {session_id(await sign_in(harness, users)) for _ in range(4)}

    assert len(seen) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", sid) for sid in seen)
    # A UUID of version 4 has the same bits in these places each time: eight ids that are random in all bits do not.
    seen |= {session_id(await sign_in(harness, users)) for _ in range(4)}
    assert {(sid[12], sid[16] in "89ab") for sid in seen} != {("4", True)}


async def test_sessions_of_the_version_before_get_random_ids(harness: ServiceHarness, users: Users, alice: User):
    """It runs on while the databases are migrated, and inserts without an id of this kind."""
    for _ in range(2):
        await make_it_so(
            harness,
            f"INSERT INTO sessions (user_id, expires_at) VALUES ({alice.id}, now() + interval '1 day')",
        )

    first, second = await look(harness, uuid.UUID, "SELECT sid FROM sessions")
    assert first != second


async def test_of_a_refresh_token_only_the_hash_is_stored(harness: ServiceHarness, users: Users, alice: User):
    tokens = await sign_in(harness, users)

    assert await look(harness, bytes, "SELECT hash FROM refresh_tokens") == [
        sha256(tokens.refresh_token.encode()).digest()
    ]


async def test_nothing_secret_is_logged(harness: ServiceHarness, users: Users, alice: User):
    stream = io.BytesIO()
    configure_logging("debug", stream)
    tokens = await sign_in(harness, users)
    with pytest.raises(WrongCredentials):
        await sign_in(harness, users, "wrong password")
    fresh = await refresh(harness, users, tokens)
    await let_pass(harness, 31)
    with pytest.raises(SessionEnded):
        await refresh(harness, users, tokens)
    await change_password(harness, users, Actor("customer", alice.id), alice.id)

    logged = stream.getvalue().decode()
    assert "refresh_token_reused" in logged, "the log was read"
    secrets = [PASSWORD, NEW_PASSWORD, "wrong password", tokens.refresh_token, fresh.refresh_token, fresh.access_token]
    assert [secret for secret in secrets if secret in logged] == []


# ---------------------------------------------------------------------------------------------------------- refreshing


async def test_a_refresh_gives_new_tokens_of_the_same_session(harness: ServiceHarness, users: Users, alice: User):
    first = await sign_in(harness, users)
    second = await refresh(harness, users, first)
    third = await refresh(harness, users, second)

    assert len({first.refresh_token, second.refresh_token, third.refresh_token}) == 3
    assert part(third.access_token, 1)["sid"] == part(first.access_token, 1)["sid"]
    assert third.user == alice


async def let_pass(harness: ServiceHarness, seconds: int) -> None:
    """As if all refresh tokens had been used so much earlier."""
    await make_it_so(harness, f"UPDATE refresh_tokens SET used_at = used_at - make_interval(secs => {seconds})")


async def test_a_refresh_token_that_comes_again_later_ends_the_session(
    harness: ServiceHarness, users: Users, alice: User
):
    first, elsewhere = await sign_in(harness, users), await sign_in(harness, users)
    second = await refresh(harness, users, first)
    await let_pass(harness, 31)
    for tokens in (first, second):
        with pytest.raises(SessionEnded):
            await refresh(harness, users, tokens)

    assert await look(harness, str, "SELECT end_reason FROM sessions WHERE ended_at IS NOT NULL") == ["token_reused"]
    assert await look(harness, str, "SELECT kind FROM security_log ORDER BY id DESC LIMIT 1") == ["token_reused"]
    await refresh(harness, users, elsewhere)


async def test_a_refresh_that_is_repeated_soon_gets_the_same_refresh_token(
    harness: ServiceHarness, users: Users, alice: User
):
    tokens = await sign_in(harness, users)
    first = await refresh(harness, users, tokens)
    await let_pass(harness, 20)
    again = await refresh(harness, users, tokens)

    assert again.refresh_token == first.refresh_token
    assert again.access_token != first.access_token, "made anew"
    assert part(again.access_token, 1)["sid"] == part(first.access_token, 1)["sid"]
    await refresh(harness, users, again)


async def test_a_retry_after_the_successor_was_used_gets_it_and_ends_nothing(
    harness: ServiceHarness, users: Users, alice: User
):
    tokens = await sign_in(harness, users)
    second = await refresh(harness, users, tokens)
    third = await refresh(harness, users, second)

    assert (await refresh(harness, users, tokens)).refresh_token == second.refresh_token
    assert (await refresh(harness, users, second)).refresh_token == third.refresh_token
    assert await look(harness, str, "SELECT end_reason FROM sessions WHERE ended_at IS NOT NULL") == []
    await let_pass(harness, 31)
    await refresh(harness, users, third)
    with pytest.raises(SessionEnded):
        await refresh(harness, users, second)


async def test_a_repeated_refresh_does_not_bring_an_ended_session_back(
    harness: ServiceHarness, users: Users, alice: User
):
    tokens = await sign_in(harness, users)
    fresh = await refresh(harness, users, tokens)
    await sign_out(harness, users, fresh.refresh_token)

    with pytest.raises(SessionEnded):
        await refresh(harness, users, tokens)


async def test_of_simultaneous_refreshes_with_a_token_all_get_the_same_successor(
    harness: ServiceHarness, users: Users, alice: User
):
    tokens = await sign_in(harness, users)
    outcomes = await asyncio.gather(*(refresh(harness, users, tokens) for _ in range(5)))

    assert len({outcome.refresh_token for outcome in outcomes}) == 1
    assert len({outcome.access_token for outcome in outcomes}) == 5
    assert await look(harness, int, "SELECT count(*) FROM refresh_tokens") == [2]
    await refresh(harness, users, outcomes[4])


async def test_a_token_that_the_version_before_has_replaced_ends_the_session_when_it_comes_again(
    harness: ServiceHarness, users: Users, alice: User
):
    """Its successor was random: the one that would be given out now is not one of the session."""
    tokens = await sign_in(harness, users)
    await refresh(harness, users, tokens)
    await make_it_so(harness, "UPDATE refresh_tokens SET hash = sha256(hash) WHERE used_at IS NULL")

    with pytest.raises(SessionEnded):
        await refresh(harness, users, tokens)


async def test_of_a_successor_only_the_hash_is_stored(harness: ServiceHarness, users: Users, alice: User):
    fresh = await refresh(harness, users, await sign_in(harness, users))

    assert await look(harness, bytes, "SELECT hash FROM refresh_tokens WHERE used_at IS NULL") == [
        sha256(fresh.refresh_token.encode()).digest()
    ]


@pytest.mark.parametrize("token", ["", "unknown", "\x00", "x" * 256])
async def test_an_unknown_refresh_token_is_refused(harness: ServiceHarness, users: Users, alice: User, token: str):
    with harness.acting(ANONYMOUS), pytest.raises(SessionEnded):
        await users.refresh(Refresh(refresh_token=token))


async def test_a_session_ends_thirty_days_after_signing_in_by_the_database_clock(
    harness: ServiceHarness, users: Users, alice: User
):
    tokens = await refresh(harness, users, await sign_in(harness, users))
    (length,) = await look(harness, datetime.timedelta, "SELECT expires_at - created_at FROM sessions")
    assert length == datetime.timedelta(days=30)

    await make_it_so(harness, "UPDATE sessions SET expires_at = now()")
    with pytest.raises(SessionEnded):
        await refresh(harness, users, tokens)


async def crash(_: str) -> None:
    raise RuntimeError("the power fails")


async def test_a_refresh_that_dies_before_its_commit_did_not_happen(harness: ServiceHarness, users: Users, alice: User):
    tokens = await sign_in(harness, users)
    remove = faults.inject("users.refresh.before_commit", crash)
    with pytest.raises(Exception, match="failed"):
        await refresh(harness, users, tokens)
    remove()

    assert (await refresh(harness, users, tokens)).user == alice


async def test_a_refresh_whose_answer_was_lost_is_repeated(harness: ServiceHarness, users: Users, alice: User):
    tokens = await sign_in(harness, users)
    remove = faults.inject("users.refresh.after_commit", crash)
    with pytest.raises(Exception, match="failed"):
        await refresh(harness, users, tokens)
    remove()

    fresh = await refresh(harness, users, tokens)
    assert fresh.user == alice
    await refresh(harness, users, fresh)


# --------------------------------------------------------------------------------------------------------- signing out


async def test_signing_out_ends_the_session_and_may_be_repeated(harness: ServiceHarness, users: Users, alice: User):
    tokens, elsewhere = await sign_in(harness, users), await sign_in(harness, users)
    for _ in range(2):
        assert await sign_out(harness, users, tokens.refresh_token) == Empty()

    with pytest.raises(SessionEnded):
        await refresh(harness, users, tokens)
    assert await look(harness, str, "SELECT end_reason FROM sessions WHERE ended_at IS NOT NULL") == ["signed_out"]
    await refresh(harness, users, elsewhere)


async def test_signing_out_with_a_used_token_ends_the_session_too(harness: ServiceHarness, users: Users, alice: User):
    first = await sign_in(harness, users)
    second = await refresh(harness, users, first)
    await sign_out(harness, users, first.refresh_token)

    with pytest.raises(SessionEnded):
        await refresh(harness, users, second)


async def test_signing_out_of_no_session_is_fine(harness: ServiceHarness, users: Users):
    assert await sign_out(harness, users, "unknown\x00") == Empty()


# ----------------------------------------------------------------------------------------------- changing the password


async def test_a_new_password_replaces_the_old_one_and_ends_the_sessions(
    harness: ServiceHarness, users: Users, alice: User
):
    tokens = await sign_in(harness, users)
    await change_password(harness, users, Actor("customer", alice.id), alice.id)

    with pytest.raises(SessionEnded):
        await refresh(harness, users, tokens)
    with pytest.raises(WrongCredentials):
        await sign_in(harness, users)
    assert (await sign_in(harness, users, NEW_PASSWORD)).user == alice


async def test_the_session_that_changes_the_password_goes_on_when_it_shows_its_token(
    harness: ServiceHarness, users: Users, alice: User
):
    own, other = await sign_in(harness, users), await sign_in(harness, users)
    await change_password(harness, users, Actor("customer", alice.id), alice.id, refresh_token=own.refresh_token)

    await refresh(harness, users, own)
    with pytest.raises(SessionEnded):
        await refresh(harness, users, other)


async def test_a_used_token_keeps_no_session_alive(harness: ServiceHarness, users: Users, alice: User):
    stolen = await sign_in(harness, users)
    current = await refresh(harness, users, stolen)
    await change_password(harness, users, Actor("customer", alice.id), alice.id, refresh_token=stolen.refresh_token)

    with pytest.raises(SessionEnded):
        await refresh(harness, users, current)


async def test_the_sessions_of_others_go_on(harness: ServiceHarness, users: Users, alice: User):
    with harness.acting(ANONYMOUS):
        await users.register(Register(email="bob@example.com", name="Bob", password=PASSWORD))
    bobs = await sign_in(harness, users, email="bob@example.com")
    await change_password(harness, users, Actor("customer", alice.id), alice.id)

    await refresh(harness, users, bobs)


async def test_the_current_password_is_asked_for(harness: ServiceHarness, users: Users, alice: User):
    tokens = await sign_in(harness, users)
    with pytest.raises(WrongCredentials):
        await change_password(harness, users, Actor("customer", alice.id), alice.id, current_password="wrong password")

    await refresh(harness, users, tokens)
    await sign_in(harness, users)


@pytest.mark.parametrize("weak", ["short", EMAIL, "with\x00a zero"])
async def test_a_weak_new_password_is_refused(harness: ServiceHarness, users: Users, alice: User, weak: str):
    with pytest.raises(InvalidRequest) as refused:
        await change_password(harness, users, Actor("customer", alice.id), alice.id, new_password=weak)

    assert [error.field for error in refused.value.errors] == ["new_password"]


async def test_an_account_cannot_change_the_password_of_another(harness: ServiceHarness, users: Users, alice: User):
    with pytest.raises(UserNotFound):
        await change_password(harness, users, Actor("customer", alice.id + 1), alice.id)
    with pytest.raises(UserNotFound):
        await change_password(harness, users, Actor("customer", 4711), 4711)
    with pytest.raises(Forbidden):
        await change_password(harness, users, STAFF, alice.id)


async def test_of_two_changes_with_the_same_current_password_one_succeeds(
    harness: ServiceHarness, users: Users, alice: User
):
    actor, wanted = Actor("customer", alice.id), ("battery staple", "staple battery")
    outcomes = await asyncio.gather(
        *(change_password(harness, users, actor, alice.id, new_password=password) for password in wanted),
        return_exceptions=True,
    )

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Empty", "WrongCredentials"]
    winner = wanted[0] if isinstance(outcomes[0], Empty) else wanted[1]
    assert (await sign_in(harness, users, winner)).user == alice


async def test_a_change_that_dies_before_its_commit_changed_nothing(harness: ServiceHarness, users: Users, alice: User):
    tokens = await sign_in(harness, users)
    remove = faults.inject("users.change_password.before_commit", crash)
    with pytest.raises(Exception, match="failed"):
        await change_password(harness, users, Actor("customer", alice.id), alice.id)
    remove()

    await refresh(harness, users, tokens)
    await sign_in(harness, users)


class PausingHasher(Argon2Hasher):
    """Stands still after the first check, with the right answer in its hands."""

    def __init__(self) -> None:
        super().__init__()
        self.matched = threading.Event()
        self.go_on = threading.Event()

    def matches(self, password_hash: str, password: str) -> bool:
        matched = super().matches(password_hash, password)
        if not self.matched.is_set():
            self.matched.set()
            assert self.go_on.wait(BOUND_SECONDS)
        return matched


async def test_a_sign_in_with_the_old_password_does_not_outlive_the_change(harness: ServiceHarness):
    """Its password was right when it was checked, and was changed before its session began."""
    hasher = PausingHasher()
    users = (await harness.open({"users": build_with(hasher, threads=2)})).client(Users)
    with harness.acting(ANONYMOUS):
        alice = await users.register(Register(email=EMAIL, name="Alice", password=PASSWORD))
    signing_in = asyncio.create_task(sign_in(harness, users))
    await asyncio.to_thread(hasher.matched.wait, BOUND_SECONDS)
    await change_password(harness, users, Actor("customer", alice.id), alice.id)
    hasher.go_on.set()

    with pytest.raises(WrongCredentials):
        await signing_in
    assert await look(harness, int, "SELECT id FROM sessions") == []


# --------------------------------------------------------------------------------------------------- changing the role


async def set_role(harness: ServiceHarness, users: Users, user: User, role: Role) -> User:
    with harness.acting(STAFF):
        return await users.set_role(SetRole(id=user.id, role=role))


async def test_another_role_ends_the_sessions_and_the_next_one_has_it(
    harness: ServiceHarness, users: Users, alice: User
):
    tokens = await sign_in(harness, users)
    await set_role(harness, users, alice, "staff")

    with pytest.raises(SessionEnded):
        await refresh(harness, users, tokens)
    fresh = await sign_in(harness, users)
    assert [part(t.access_token, 1)["role"] for t in (tokens, fresh)] == ["customer", "staff"]
    assert await look(harness, str, "SELECT end_reason FROM sessions WHERE ended_at IS NOT NULL") == ["role_changed"]


async def test_the_same_role_again_ends_nothing(harness: ServiceHarness, users: Users, alice: User):
    tokens = await sign_in(harness, users)
    await set_role(harness, users, alice, "customer")

    await refresh(harness, users, tokens)


async def test_a_change_of_role_that_dies_before_its_commit_changed_nothing(
    harness: ServiceHarness, users: Users, alice: User
):
    tokens = await sign_in(harness, users)
    remove = faults.inject("users.set_role.before_commit", crash)
    with pytest.raises(Exception, match="failed"):
        await set_role(harness, users, alice, "staff")
    remove()

    assert (await refresh(harness, users, tokens)).user.role == "customer"
    assert (await ended(harness, users)).session_ids == ()


async def test_a_sign_in_that_meets_a_change_of_role_gets_the_new_one(
    harness: ServiceHarness, users: Users, alice: User
):
    """Its session would begin behind the back of the change that ends all sessions."""
    await set_role(harness, users, alice, "staff")
    connection = await connect(harness.dsns["users"])
    harness.closing.push_async_callback(connection.close)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("UPDATE users SET role = 'customer' WHERE id = $1", alice.id)
    signing_in = asyncio.create_task(sign_in(harness, users))
    await harness.until_blocked(of="users", by=[signing_in])
    await transaction.commit()

    assert part((await signing_in).access_token, 1)["role"] == "customer"


# --------------------------------------------------------------------------------------- own sessions, listed and ended


async def sessions(harness: ServiceHarness, users: Users, user: User, **details: Any) -> SessionPage:
    with harness.acting(Actor("customer", user.id)):
        return await users.sessions(ListSessions(user_id=user.id, **details))


async def end_session(harness: ServiceHarness, users: Users, actor: Actor, user: User, sid: str) -> Empty:
    with harness.acting(actor):
        return await users.end_session(EndSession(user_id=user.id, id=sid))


async def bob_of(harness: ServiceHarness, users: Users) -> User:
    with harness.acting(ANONYMOUS):
        return await users.register(Register(email="bob@example.com", name="Bob", password=PASSWORD))


async def test_own_sessions_are_listed_the_newest_first(harness: ServiceHarness, users: Users, alice: User):
    await bob_of(harness, users)
    first, gone, expired, last = [await sign_in(harness, users) for _ in range(4)]
    await sign_in(harness, users, email="bob@example.com")
    await sign_out(harness, users, gone.refresh_token)
    await make_it_so(harness, f"UPDATE sessions SET expires_at = now() WHERE sid = '{session_id(expired)}'")
    await make_it_so(harness, "UPDATE refresh_tokens SET issued_at = issued_at - interval '1 hour'")
    await make_it_so(harness, "UPDATE sessions SET created_at = created_at - interval '1 hour'")
    await refresh(harness, users, first)
    listed = (await sessions(harness, users, alice, current=session_id(first))).sessions

    assert [s.id for s in listed] == [session_id(last), session_id(first)]
    assert [s.is_current for s in listed] == [False, True]
    assert listed[1].last_used_at - listed[1].created_at > datetime.timedelta(minutes=59)
    assert listed[0].last_used_at - listed[0].created_at < datetime.timedelta(minutes=59)
    assert all(s.expires_at - s.created_at > datetime.timedelta(days=30) for s in listed)


async def test_own_sessions_are_listed_page_by_page(harness: ServiceHarness, users: Users, alice: User):
    bob = await bob_of(harness, users)
    await sign_in(harness, users, email="bob@example.com")
    made = [session_id(await sign_in(harness, users)) for _ in range(3)]
    first = await sessions(harness, users, alice, limit=2)
    second = await sessions(harness, users, alice, limit=2, after=first.next_after)

    assert [s.id for s in (*first.sessions, *second.sessions)] == made[::-1]
    assert (first.next_after, second.next_after) == (made[1], None)
    assert (await sessions(harness, users, alice, limit=3)).next_after is None
    assert (await sessions(harness, users, bob, after=made[1])).sessions == (), "not one of Bob's"


async def test_one_of_the_own_sessions_is_ended(harness: ServiceHarness, users: Users, alice: User):
    one, other = await sign_in(harness, users), await sign_in(harness, users)
    own = Actor("customer", alice.id)
    await end_session(harness, users, own, alice, session_id(one))

    with pytest.raises(SessionEnded):
        await refresh(harness, users, one)
    await refresh(harness, users, other)
    assert (await ended(harness, users)).session_ids == (session_id(one),)
    assert await look(harness, str, "SELECT end_reason FROM sessions WHERE ended_at IS NOT NULL") == ["ended_by_user"]
    for sid in (session_id(one), "0" * 32):
        with pytest.raises(SessionNotFound):
            await end_session(harness, users, own, alice, sid)


async def test_all_other_own_sessions_are_ended(harness: ServiceHarness, users: Users, alice: User):
    await bob_of(harness, users)
    one, own, two = [await sign_in(harness, users) for _ in range(3)]
    bobs = await sign_in(harness, users, email="bob@example.com")
    with harness.acting(Actor("customer", alice.id)):
        await users.end_other_sessions(EndOtherSessions(user_id=alice.id, id=session_id(own)))

    assert set((await ended(harness, users)).session_ids) == {session_id(one), session_id(two)}
    for tokens in (own, bobs):
        await refresh(harness, users, tokens)


async def test_sessions_of_another_are_neither_listed_nor_ended(harness: ServiceHarness, users: Users, alice: User):
    bob = await bob_of(harness, users)
    tokens = await sign_in(harness, users)
    bobs = Actor("customer", bob.id)
    with pytest.raises(SessionNotFound):
        await end_session(harness, users, bobs, bob, session_id(tokens))
    for actor, refused in ((bobs, UserNotFound), (Actor("staff", bob.id), Forbidden)):
        with pytest.raises(refused):
            await end_session(harness, users, actor, alice, session_id(tokens))
        with harness.acting(actor), pytest.raises(refused):
            await users.sessions(ListSessions(user_id=alice.id))
        with harness.acting(actor), pytest.raises(refused):
            await users.end_other_sessions(EndOtherSessions(user_id=alice.id, id="0" * 32))

    await refresh(harness, users, tokens)


# ------------------------------------------------------------------------------------------- the log of ended sessions


async def ended(
    harness: ServiceHarness, users: Users, page: EndedSessions | None = None, **details: Any
) -> EndedSessions:
    """What the log has behind a page that was read."""
    behind: dict[str, Any] = {} if page is None else {"after": page.position, "session_id": page.session_id}
    with harness.acting(ANONYMOUS):
        return await users.ended_sessions(EndedSessionsAfter(**behind, **details))


async def test_every_way_to_end_a_session_is_in_the_log(harness: ServiceHarness, users: Users, alice: User):
    out, reused, changed, demoted = [await sign_in(harness, users) for _ in range(4)]
    nothing = await ended(harness, users)
    await sign_out(harness, users, out.refresh_token)
    await refresh(harness, users, reused)
    await let_pass(harness, 31)
    with pytest.raises(SessionEnded):
        await refresh(harness, users, reused)
    own = Actor("customer", alice.id)
    await change_password(harness, users, own, alice.id, refresh_token=demoted.refresh_token)
    await set_role(harness, users, alice, "staff")

    assert (nothing.session_ids, nothing.position, nothing.session_id) == ((), 0, None)
    page = await ended(harness, users)
    assert page.session_ids == tuple(map(session_id, (out, reused, changed, demoted)))
    assert (page.position, page.session_id, page.is_full) == (4, session_id(demoted), False)


async def test_a_session_that_has_ended_is_in_the_log_once(harness: ServiceHarness, users: Users, alice: User):
    tokens = await sign_in(harness, users)
    for _ in range(2):
        await sign_out(harness, users, tokens.refresh_token)
    await change_password(harness, users, Actor("customer", alice.id), alice.id)

    assert (await ended(harness, users)).session_ids == (session_id(tokens),)


async def test_the_log_is_read_page_by_page_behind_a_position(harness: ServiceHarness, users: Users, alice: User):
    for _ in range(5):
        await sign_in(harness, users)
    await change_password(harness, users, Actor("customer", alice.id), alice.id)
    one_by_one = await ended(harness, users)
    first = await ended(harness, users, limit=2)
    second = await ended(harness, users, first, limit=2)
    third = await ended(harness, users, second, limit=2)

    assert [len(page.session_ids) for page in (first, second, third)] == [2, 2, 1]
    assert [page.is_full for page in (first, second, third)] == [True, True, False]
    assert one_by_one.session_ids == (*first.session_ids, *second.session_ids, *third.session_ids)
    assert len(set(one_by_one.session_ids)) == 5
    last = await ended(harness, users, third)
    assert (last.session_ids, last.position, last.session_id) == ((), 5, third.session_id)


async def test_a_reader_of_another_log_begins_anew(harness: ServiceHarness, users: Users, alice: User):
    """Of a database that was restored: positions come again, and stand for other sessions."""
    one, other = await sign_in(harness, users), await sign_in(harness, users)
    for tokens in (one, other):
        await sign_out(harness, users, tokens.refresh_token)
    both = tuple(map(session_id, (one, other)))

    ahead = EndedSessions(session_ids=(), position=3, session_id="f" * 32)
    elsewhere = EndedSessions(session_ids=(), position=1, session_id="f" * 32)
    for page in (ahead, elsewhere):
        read = await ended(harness, users, page)
        assert (read.session_ids, read.position, read.session_id) == (both, 2, both[1])
    await make_it_so(harness, "TRUNCATE ended_sessions, ended_sessions_last")
    read = await ended(harness, users, ahead)
    assert (read.session_ids, read.position, read.session_id) == ((), 0, None)


async def test_positions_of_the_log_are_in_the_order_of_commits(harness: ServiceHarness, users: Users, alice: User):
    """A reader that has seen an entry never misses one of a transaction that began earlier and commits later."""
    early, late = await sign_in(harness, users), await sign_in(harness, users)
    database = harness.host.services["users"].database
    ids = await look(harness, int, "SELECT id FROM sessions ORDER BY id")
    is_written, may_commit = asyncio.Event(), asyncio.Event()

    async def end_slowly() -> None:
        async with database.transaction() as tx:
            await store.end_sessions(tx, [ids[0]], "signed_out")
            is_written.set()
            await may_commit.wait()

    ending = asyncio.create_task(end_slowly())
    await is_written.wait()
    overtaking = asyncio.create_task(sign_out(harness, users, late.refresh_token))
    await harness.until_blocked(of="users", by=[overtaking])
    assert (await ended(harness, users)).session_ids == ()
    may_commit.set()
    await asyncio.gather(ending, overtaking)

    assert (await ended(harness, users)).session_ids == (session_id(early), session_id(late))


async def test_old_entries_are_deleted_and_positions_go_on(harness: ServiceHarness, users: Users, alice: User):
    first, second, third = [await sign_in(harness, users) for _ in range(3)]
    await sign_out(harness, users, first.refresh_token)
    read = await ended(harness, users)
    await sign_out(harness, users, second.refresh_token)
    await make_it_so(harness, "UPDATE ended_sessions SET ended_at = now() - interval '15 minutes'")
    database = harness.host.services["users"].database
    async with database.transaction() as tx:
        assert await store.delete_old_ended_sessions(tx) == 0, "their access tokens may still be shown"
    await make_it_so(harness, "UPDATE ended_sessions SET ended_at = now() - interval '21 minutes'")
    async with database.transaction() as tx:
        assert await store.delete_old_ended_sessions(tx) == 2
    await sign_out(harness, users, third.refresh_token)

    page = await ended(harness, users, read)
    assert (page.session_ids, page.position) == ((session_id(third),), 3)


# ------------------------------------------------------------------------------------------------------------ clean-up


async def clean_up(harness: ServiceHarness, sessions_left: int) -> None:
    """Runs the service's periodic task until so many sessions are left."""
    [task] = [task for task in harness.host.services["users"].tasks if task.name == "clean up"]
    running = asyncio.create_task(task.run("users", harness.host.clock, harness.host.telemetry))
    try:
        async with asyncio.timeout(BOUND_SECONDS):
            while len(await look(harness, int, "SELECT id FROM sessions")) > sessions_left:  # the event is a row
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.wait([running])


@pytest.mark.parametrize("table", ["refresh_tokens", "sessions"])
async def test_two_that_delete_old_sessions_do_not_wait_for_each_other(
    harness: ServiceHarness, users: Users, alice: User, table: str
):
    for _ in range(2):
        await sign_in(harness, users)
    await make_it_so(harness, "UPDATE sessions SET expires_at = now() - interval '8 days'")
    delete = store.delete_old_refresh_tokens
    if table == "sessions":
        await make_it_so(harness, "DELETE FROM refresh_tokens")
        delete = store.delete_old_sessions
    database = harness.host.services["users"].database

    async with database.transaction() as first, database.transaction() as second:
        assert await delete(first, 1) == 1
        assert await without_waiting(harness.dsns["users"], delete(second, 2)) == 1
    assert await look(harness, int, f"SELECT count(*) FROM {table}") == [0]


async def test_sessions_that_have_long_been_over_are_deleted(harness: ServiceHarness, users: Users, alice: User):
    expired, ended, recent, live = [await refresh(harness, users, await sign_in(harness, users)) for _ in range(4)]
    for tokens in (ended, recent):
        await sign_out(harness, users, tokens.refresh_token)
    long_ago = "now() - interval '8 days'"
    await make_it_so(harness, f"UPDATE sessions SET expires_at = {long_ago} WHERE sid = '{session_id(expired)}'")
    await make_it_so(harness, f"UPDATE sessions SET ended_at = {long_ago} WHERE sid = '{session_id(ended)}'")

    await clean_up(harness, sessions_left=2)

    kept = [session_id(recent), session_id(live)]
    assert [sid.hex for sid in await look(harness, uuid.UUID, "SELECT sid FROM sessions ORDER BY id")] == kept
    assert await look(harness, int, "SELECT count(DISTINCT session_id) FROM refresh_tokens") == [2]
    await refresh(harness, users, live)
