"""Who asks: access tokens to actors, and the addresses that an open shop answers to."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jwt
from joserfc.jwk import OctKey, OKPKey

from mercato.chassis.contract import ANONYMOUS, Actor, Unauthenticated, Unavailable
from mercato.contracts.users import PublicKeys
from mercato.gateway.auth import (
    ALGORITHMS,
    KEYS_PAUSE_SECONDS,
    OPEN_ACTOR,
    REMEMBERED_TOKENS,
    Authenticator,
    Verifier,
    own_hosts,
)
from mercato.gateway.problems import HostNotAllowed

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


@pytest.fixture
def verifier(signer: Signer, clock: FakeClock) -> Verifier:
    return Verifier(signer.fetch, clock)


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
    stranger = Signer()
    with pytest.raises(Unauthenticated):
        await verifier.actor(stranger.sign())
    with pytest.raises(Unauthenticated):
        await verifier.actor(signer.sign({"kid": signer.key.thumbprint()}, key=stranger.key))


async def test_a_token_that_nobody_signed_is_refused(verifier: Verifier, signer: Signer) -> None:
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


async def test_forged_tokens_do_not_make_us_ask_for_keys_again_and_again(verifier: Verifier) -> None:
    users = Signer()
    verifier = Verifier(users.fetch, FakeClock())
    await verifier.actor(users.sign())
    for _ in range(20):
        with pytest.raises(Unauthenticated):
            await verifier.actor(Signer().sign())
    assert users.asked == 1


async def test_without_the_users_service_nobody_is_let_in_and_nobody_is_blamed(
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
    known.update({str(i): (Actor("customer", i), 0.0) for i in range(REMEMBERED_TOKENS)})
    await verifier.actor(signer.sign(sub="8"))
    assert len(known) <= REMEMBERED_TOKENS
    assert await verifier.actor(token) == Actor("customer", 7)


# -------------------------------------------------------------------------------------------------------- authenticator


@pytest.mark.parametrize("header", [b"Bearer", b"Bearer ", b"Basic abc", b"abc", b"", b"\xff\xfe", b"Bearer\tabc"])
async def test_the_header_must_be_a_bearer_token(verifier: Verifier, header: bytes) -> None:
    with pytest.raises(Unauthenticated):
        await Authenticator(verifier, None).actor(header)


async def test_the_scheme_is_not_case_sensitive(verifier: Verifier, signer: Signer) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert await Authenticator(verifier, None).actor(f"{scheme} {signer.sign()}".encode()) == Actor("customer", 7)


def test_nobody_is_anonymous_or_in_an_open_shop_staff(verifier: Verifier) -> None:
    assert Authenticator(verifier, None).anonymous_actor == ANONYMOUS
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
