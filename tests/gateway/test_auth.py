"""Who asks: access tokens to actors, and the addresses that an open shop answers to."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
from collections.abc import Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jwt
from joserfc.jwk import OctKey, OKPKey

from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor, Unauthenticated, Unavailable
from mercato.contracts.users import EndedSessions, EndedSessionsAfter, PublicKeys
from mercato.gateway.auth import (
    ALGORITHMS,
    KEYS_PAUSE_SECONDS,
    OPEN_ACTOR,
    REMEMBERED_TOKENS,
    Authenticator,
    Verifier,
    own_hosts,
)
from mercato.gateway.ended_sessions import BEHIND_SECONDS, HELD_SECONDS, EndedSessionsLog
from mercato.gateway.problems import HostNotAllowed, SessionsNotKnown
from mercato.services.users import rules
from mercato.services.users.tokens import ACCESS_TOKEN_LIFE

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
LIFE_SECONDS = 900
SID = "0123456789abcdef" * 2


BEGAN_AT_SECONDS = 86_400.75
"""Of the clock that only goes forward: not 0, or a sum of times could stand for their difference."""


class FakeClock:
    def __init__(self) -> None:
        self.seconds = BEGAN_AT_SECONDS

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime.datetime:
        return START + datetime.timedelta(seconds=self.seconds - BEGAN_AT_SECONDS)


class Signer:
    """Keys of a users service. `keys` is what it publishes."""

    def __init__(self) -> None:
        self.key = self._new_key()
        self.published = [self.key]
        self.asked = 0
        self.away = False

    def _new_key(self) -> OKPKey:
        return OKPKey.import_key(Ed25519PrivateKey.generate())

    def rotate(self) -> None:
        self.key = self._new_key()
        self.published.append(self.key)

    async def fetch(self) -> PublicKeys:
        self.asked += 1
        if self.away:
            raise Unavailable(service="users")
        keys = tuple(
            {**{n: str(v) for n, v in key.as_dict(private=False).items()}, "kid": key.thumbprint()}
            for key in self.published
        )
        return PublicKeys(keys=keys, issuer="mercato", audience="shop")

    def sign(self, header: Mapping[str, Any] | None = None, key: OKPKey | None = None, **claims: Any) -> str:
        key = key or self.key
        headers = {"alg": "EdDSA", "typ": "at+jwt", "kid": key.thumbprint(), **(header or {})}
        exp = int(START.timestamp()) + LIFE_SECONDS
        content = {"iss": "mercato", "aud": "shop", "sub": "7", "role": "customer", "sid": SID, "exp": exp, **claims}
        headers = {name: value for name, value in headers.items() if value is not None}
        content = {name: value for name, value in content.items() if value is not None}
        return jwt.encode(headers, content, key, registry=ALGORITHMS)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def signer() -> Signer:
    return Signer()


class Log:
    """The log of ended sessions of a users service, two entries a page."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.asked: list[EndedSessionsAfter] = []
        self.away = False
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def read(self, request: EndedSessionsAfter) -> EndedSessions:
        self.asked.append(request)
        await self.may_answer.wait()
        if self.away:
            raise Unavailable(service="users")
        after = request.after
        if after > len(self.entries) or (after and self.entries[after - 1] != request.session_id):
            after = 0
        found = self.entries[after : after + 2]
        position = after + len(found)
        return EndedSessions(
            session_ids=tuple(found),
            position=position,
            session_id=self.entries[position - 1] if position else None,
            is_full=len(self.entries) > position,
        )


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def ended(log: Log, clock: FakeClock) -> EndedSessionsLog:
    return EndedSessionsLog(log.read, clock)


@pytest.fixture
def verifier(signer: Signer, ended: EndedSessionsLog, clock: FakeClock) -> Verifier:
    return Verifier(signer.fetch, ended, clock)


def plain(part: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


async def test_a_token_of_this_shop_says_who_asks(verifier: Verifier, signer: Signer) -> None:
    assert await verifier.actor(signer.sign()) == Actor("customer", 7)
    assert await verifier.actor(signer.sign(role="staff", sub="8")) == Actor("staff", 8)


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "another"},
        {"aud": "another"},
        {"aud": ["shop"]},
        {"aud": None},
        {"iss": None},
        {"sub": None},
        {"sub": "seven"},
        {"sub": ""},
        {"sub": "-7"},
        {"sub": "7\n"},
        {"sub": 7},
        {"role": "service"},
        {"role": "anonymous"},
        {"role": None},
        {"sid": None},
        {"sid": "1001"},
        {"sid": 1001},
        {"sid": SID.upper()},
        {"sid": SID + "\n"},
        {"exp": None},
        {"exp": "tomorrow"},
        {"exp": True},
    ],
    ids=str,
)
async def test_a_token_with_other_claims_is_refused(verifier: Verifier, signer: Signer, claims: dict[str, Any]) -> None:
    token = signer.sign(**claims)
    with pytest.raises(Unauthenticated):
        await verifier.actor(token)


@pytest.mark.parametrize(
    "header", [{"typ": "JWT"}, {"typ": None}, {"kid": "another"}, {"typ": "application/at+jwt"}], ids=str
)
async def test_a_token_with_another_header_is_refused(
    verifier: Verifier, signer: Signer, header: dict[str, Any]
) -> None:
    with pytest.raises(Unauthenticated):
        await verifier.actor(signer.sign(header))


async def test_a_token_of_another_key_is_refused_also_under_our_key_id(verifier: Verifier, signer: Signer) -> None:
    other = Signer()
    with pytest.raises(Unauthenticated):
        await verifier.actor(other.sign())
    with pytest.raises(Unauthenticated):
        await verifier.actor(signer.sign({"kid": signer.key.thumbprint()}, key=other.key))


async def test_an_unsigned_token_is_refused(verifier: Verifier, signer: Signer) -> None:
    header, claims, _ = signer.sign().split(".")
    unsigned = plain({"alg": "none", "typ": "at+jwt", "kid": signer.key.thumbprint()})
    for token in (
        f"{unsigned}.{claims}.",
        f"{unsigned}.{claims}.{'A' * 86}",
        f"{header}.{claims}.",
        f"{header}.{claims}",
    ):
        with pytest.raises(Unauthenticated):
            await verifier.actor(token)


async def test_a_token_signed_with_the_public_key_as_a_secret_is_refused(verifier: Verifier, signer: Signer) -> None:
    secret = OctKey.import_key(str(signer.key.as_dict(private=False)["x"]))
    header = {"alg": "HS256", "typ": "at+jwt", "kid": signer.key.thumbprint()}
    exp = int(START.timestamp()) + LIFE_SECONDS
    claims = {"iss": "mercato", "aud": "shop", "sub": "7", "role": "staff", "sid": SID, "exp": exp}
    with pytest.raises(Unauthenticated):
        await verifier.actor(jwt.encode(header, claims, secret))


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "...", "é.é.é", "null", "e30.e30.e30", "A" * 10_000])
async def test_what_is_no_token_is_refused(verifier: Verifier, token: str) -> None:
    with pytest.raises(Unauthenticated):
        await verifier.actor(token)


async def test_one_changed_character_is_noticed(verifier: Verifier, signer: Signer) -> None:
    token = signer.sign()
    for i in (5, token.index(".") + 5, len(token) - 5):
        forged = token[:i] + ("A" if token[i] != "A" else "B") + token[i + 1 :]
        with pytest.raises(Unauthenticated):
            await verifier.actor(forged)


async def test_a_token_ends_with_its_time_also_when_it_is_remembered(
    verifier: Verifier, signer: Signer, clock: FakeClock
) -> None:
    token = signer.sign()
    clock.seconds = BEGAN_AT_SECONDS + LIFE_SECONDS - 1
    assert await verifier.actor(token) == Actor("customer", 7)
    clock.seconds = BEGAN_AT_SECONDS + LIFE_SECONDS
    with pytest.raises(Unauthenticated, match="expired"):
        await verifier.actor(token)


async def test_a_new_key_is_fetched_when_a_token_names_it(verifier: Verifier, signer: Signer, clock: FakeClock) -> None:
    old = signer.sign()
    await verifier.actor(old)
    signer.rotate()
    clock.seconds += KEYS_PAUSE_SECONDS
    assert await verifier.actor(signer.sign(sub="9")) == Actor("customer", 9)
    assert await verifier.actor(old) == Actor("customer", 7)


async def test_forged_tokens_do_not_make_us_ask_for_keys_again_and_again(ended: EndedSessionsLog) -> None:
    users = Signer()
    verifier = Verifier(users.fetch, ended, FakeClock())
    await verifier.actor(users.sign())
    for _ in range(20):
        with pytest.raises(Unauthenticated):
            await verifier.actor(Signer().sign())
    assert users.asked == 1


async def test_without_the_users_service_a_token_is_answered_as_unavailable_and_not_as_invalid(
    verifier: Verifier, signer: Signer
) -> None:
    signer.away = True
    with pytest.raises(Unavailable):
        await verifier.actor(signer.sign())
    signer.away = False
    assert await verifier.actor(signer.sign()) == Actor("customer", 7)


async def test_memory_of_tokens_is_bounded(verifier: Verifier, signer: Signer) -> None:
    token = signer.sign()
    await verifier.actor(token)
    known = verifier._known
    known.update({str(i): (Actor("customer", i), 0.0, SID) for i in range(REMEMBERED_TOKENS)})
    await verifier.actor(signer.sign(sub="8"))
    assert len(known) <= REMEMBERED_TOKENS
    assert await verifier.actor(token) == Actor("customer", 7)


# ------------------------------------------------------------------------------------------------------- ended sessions


def sid(number: int) -> str:
    return f"{number:032x}"


async def test_a_token_ends_with_its_session_also_when_it_is_remembered(
    verifier: Verifier, signer: Signer, ended: EndedSessionsLog, log: Log
) -> None:
    one, fresh, other = signer.sign(sid=sid(1)), signer.sign(sid=sid(1), sub="8"), signer.sign(sid=sid(2))
    for token in (one, other):
        await verifier.actor(token)
    log.entries.append(sid(1))
    assert await ended.follow() == 1

    assert verifier.remembered(one) is None
    for token in (one, fresh):
        with pytest.raises(Unauthenticated, match="has ended"):
            await verifier.actor(token)
    assert verifier.remembered(other) == await verifier.actor(other) == Actor("customer", 7)


async def test_a_process_that_has_just_started_knows_what_ended_before(
    verifier: Verifier, signer: Signer, ended: EndedSessionsLog, log: Log
) -> None:
    log.entries += [sid(i) for i in range(1, 6)]

    assert ended.problem() == "it has not read which sessions have ended"
    for number in range(1, 6):
        with pytest.raises(Unauthenticated, match="has ended"):
            await verifier.actor(signer.sign(sid=sid(number)))
    assert await verifier.actor(signer.sign(sid=sid(6))) == Actor("customer", 7)
    assert ended.problem() == ""
    assert [(r.after, r.session_id) for r in log.asked] == [(0, None), (2, sid(2)), (4, sid(4))]


async def test_before_the_log_is_read_no_token_is_accepted(
    verifier: Verifier, signer: Signer, ended: EndedSessionsLog, log: Log
) -> None:
    log.away = True
    for _ in range(2):
        with pytest.raises(Unavailable):
            await verifier.actor(signer.sign())
    assert ended.problem()
    log.away = False
    assert await verifier.actor(signer.sign()) == Actor("customer", 7)


async def test_those_that_come_at_once_wait_for_one_read(
    verifier: Verifier, signer: Signer, ended: EndedSessionsLog, log: Log
) -> None:
    log.may_answer.clear()
    tokens = [signer.sign(sub=str(i)) for i in range(1, 6)]
    waiting = [asyncio.create_task(verifier.actor(token)) for token in tokens]
    following = asyncio.create_task(ended.follow())
    while not log.asked:
        await asyncio.sleep(0)
    waiting[0].cancel()  # a client that goes away takes the read from no other
    await asyncio.wait([waiting[0]])
    log.may_answer.set()

    assert await asyncio.gather(*waiting[1:]) == [Actor("customer", i) for i in range(2, 6)]
    assert await following == 0
    assert len(log.asked) == 1


async def test_staff_are_refused_while_the_log_is_not_followed_and_customers_go_on(
    verifier: Verifier, signer: Signer, ended: EndedSessionsLog, log: Log, clock: FakeClock
) -> None:
    staff, fresh, customer = signer.sign(role="staff"), signer.sign(role="staff", sub="8"), signer.sign()
    for token in (staff, customer):
        await verifier.actor(token)
    log.away = True
    clock.seconds += BEHIND_SECONDS
    with pytest.raises(Unavailable):
        await ended.follow()
    assert verifier.remembered(staff) == Actor("staff", 7)

    clock.seconds += 0.5
    assert verifier.remembered(staff) is None
    for token in (staff, fresh):
        with pytest.raises(SessionsNotKnown):
            await verifier.actor(token)
    assert verifier.remembered(customer) == Actor("customer", 7)
    assert await verifier.actor(signer.sign(sub="9")) == Actor("customer", 9)
    assert ended.problem() == "", "customers go on: the process is ready"

    log.away = False
    await ended.follow()
    assert verifier.remembered(staff) == Actor("staff", 7)
    assert await verifier.actor(fresh) == Actor("staff", 8)


async def test_how_old_a_read_is_counts_from_its_beginning(ended: EndedSessionsLog, log: Log, clock: FakeClock) -> None:
    log.may_answer.clear()
    reading = asyncio.create_task(ended.follow())
    while not log.asked:
        await asyncio.sleep(0)
    clock.seconds += BEHIND_SECONDS + 0.5
    log.may_answer.set()
    await reading

    assert ended.is_behind, "what ended while it waited for the answer may be missing"


async def test_what_was_read_of_a_log_that_is_replaced_is_still_refused(
    verifier: Verifier, signer: Signer, ended: EndedSessionsLog, log: Log
) -> None:
    log.entries += [sid(1), sid(2), sid(3)]
    await ended.follow()
    log.entries[:] = [sid(4)]
    await ended.follow()

    for number in range(1, 5):
        with pytest.raises(Unauthenticated, match="has ended"):
            await verifier.actor(signer.sign(sid=sid(number)))


async def test_an_ended_session_is_held_for_longer_than_its_tokens_live(
    ended: EndedSessionsLog, log: Log, clock: FakeClock
) -> None:
    log.entries.append(sid(1))
    await ended.follow()
    clock.seconds += ACCESS_TOKEN_LIFE.total_seconds() + 60
    log.entries.append(sid(2))
    await ended.follow()
    assert list(ended.ids) == [sid(1), sid(2)]
    clock.seconds += HELD_SECONDS - ACCESS_TOKEN_LIFE.total_seconds() - 60
    await ended.follow()
    assert list(ended.ids) == [sid(2)]
    assert rules.ENDED_KEPT.total_seconds() == HELD_SECONDS, "what the log has deleted need not be held"


# -------------------------------------------------------------------------------------------------------- authenticator


@pytest.mark.parametrize("header", [b"Bearer", b"Bearer ", b"Basic abc", b"abc", b"", b"\xff\xfe", b"Bearer\tabc"])
async def test_the_header_must_be_a_bearer_token(verifier: Verifier, header: bytes) -> None:
    with pytest.raises(Unauthenticated):
        await Authenticator(verifier, None).actor(header)


async def test_the_scheme_is_not_case_sensitive(verifier: Verifier, signer: Signer) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert await Authenticator(verifier, None).actor(f"{scheme} {signer.sign()}".encode()) == Actor("customer", 7)


def test_a_request_without_a_token_is_anonymous_or_in_an_open_shop_staff(verifier: Verifier) -> None:
    assert Authenticator(verifier, None).anonymous_actor == ANONYMOUS_ACTOR
    assert Authenticator(verifier, ["localhost:1"]).anonymous_actor == OPEN_ACTOR


@pytest.mark.parametrize("host", [b"localhost:8080", b"LOCALHOST:8080", b"127.0.0.1:8080", b"[::1]:8080"])
def test_an_open_shop_answers_to_its_own_names(verifier: Verifier, host: bytes) -> None:
    authenticator = Authenticator(verifier, own_hosts("127.0.0.1", 8080))
    authenticator.check_address(host, None)
    authenticator.check_address(host, b"http://" + host.lower())


@pytest.mark.parametrize(
    "host",
    [
        None,
        b"",
        b"evil.example",
        b"evil.example:8080",
        b"localhost",
        b"localhost:80",
        b"localhost:8080.evil.example",
        b"127.0.0.2:8080",
    ],
)
def test_an_open_shop_answers_to_no_other_name(verifier: Verifier, host: bytes | None) -> None:
    with pytest.raises(HostNotAllowed):
        Authenticator(verifier, own_hosts("127.0.0.1", 8080)).check_address(host, None)


@pytest.mark.parametrize(
    "origin",
    [
        b"",
        b"null",
        b"http://evil.example",
        b"https://localhost:8080",
        b"http://localhost:3000",
        b"http://localhost:8080.evil",
        b"localhost:8080",
    ],
)
def test_an_open_shop_takes_nothing_from_a_page_of_another_origin(verifier: Verifier, origin: bytes) -> None:
    with pytest.raises(HostNotAllowed):
        Authenticator(verifier, own_hosts("127.0.0.1", 8080)).check_address(b"localhost:8080", origin)


def test_a_shop_with_tokens_answers_to_any_name(verifier: Verifier) -> None:
    Authenticator(verifier, None).check_address(b"shop.example", b"https://shop.example")


def test_on_port_80_the_port_may_be_left_out() -> None:
    assert {"localhost", "localhost:80"} <= set(own_hosts("127.0.0.1", 80))
    assert "[::1]:8080" in own_hosts("::1", 8080)
