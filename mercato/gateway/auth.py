"""Authentication: from the headers of a request to an `Actor`.

With `--auth required` a request carries an access token (`Authorization: Bearer ...`), or its caller is anonymous. With
`--auth open`, which exists on loopback only, a caller without a token acts as staff; then Host, and Origin and
Sec-Fetch-Site where a browser sends them, must name this shop, so that no web page can call it.

Tokens are verified with the public keys of the users service (RFC 9068 tokens, EdDSA). A verified token is cached until
it expires: looking it up costs a fraction of verifying it. Whether its session has ended is looked up each time, in
memory (`ended_sessions.py`).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor, Unauthenticated, current
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.signatures import ALGORITHMS
from mercato.contracts.roles import CUSTOMER, STAFF
from mercato.contracts.users import PublicKeys
from mercato.gateway import guests
from mercato.gateway.ended_sessions import EndedSessionsLog
from mercato.gateway.headers import RequestHeaders
from mercato.gateway.problems import HostNotAllowed, SessionsNotKnown

REMEMBERED_TOKENS: Final = 10_000
TOKEN_TYPE: Final = "at+jwt"  # noqa: S105  # RFC 9068
KEYS_PAUSE_SECONDS: Final = 10.0
"""The shortest time between two fetches of the keys because of an unknown one."""

SESSION_ID: Final = re.compile("[0-9a-f]{32}")

OPEN_ACTOR: Final = Actor(STAFF, 0)
OTHER_SITES: Final = frozenset({b"cross-site", b"same-site"})
"""Of Sec-Fetch-Site. `same-site` is another origin as well: a site is a host with all its ports."""


class Claims(msgspec.Struct):
    """The claims that are read from a token. `exp` is a time in seconds since 1970, `sid` the id of the session."""

    iss: str
    aud: str
    sub: str
    role: str
    sid: str
    exp: float


class Verifier:
    """Verifies access tokens, and gives their actors. `fetch_keys` calls the users service."""

    def __init__(self, fetch_keys: Callable[[], Awaitable[PublicKeys]], ended: EndedSessionsLog, clock: Clock) -> None:
        self._fetch_keys = fetch_keys
        self._ended = ended
        self._clock = clock
        self._keys: PublicKeys | None = None
        self._key_set: KeySet | None = None
        self._fetched_at = float("-inf")
        self._known: dict[str, tuple[Actor, float, str]] = {}

    def remembered(self, token: str) -> Actor | None:
        """The actor of a cached token that has not expired and whose session has not ended."""
        known = self._known.get(token)
        if known is None:
            return None
        actor, expires_at, session_id = known
        if expires_at <= self._clock.now().timestamp() or session_id in self._ended.ids:
            return None
        return None if actor.role == STAFF and self._ended.is_behind else actor

    def session_id(self, token: str) -> str:
        """The session of a token that has just been verified."""
        return self._known[token][2]

    def validity(self, token: str) -> Callable[[], bool]:
        """Says whether a token that has just been verified is still valid, as `remembered` does."""
        actor, expires_at, session_id = self._known[token]

        def is_valid() -> bool:
            if expires_at <= self._clock.now().timestamp() or session_id in self._ended.ids:
                return False
            return actor.role != STAFF or not self._ended.is_behind

        return is_valid

    async def actor(self, token: str, *, takes_ended: bool = False) -> Actor:
        """Raises `Unauthenticated` for a token that is forged, foreign, expired, of an ended session or not a token.

        `takes_ended`: a token of an ended session is accepted too.

        Raises `SessionsNotKnown` for staff while it is not known which sessions have ended.
        """
        if (known := self.remembered(token)) is not None:
            return known
        if not self._ended.is_loaded:
            await self._ended.load()
        actor, expires_at, session_id = self._read(await self._verified(token))
        if session_id in self._ended.ids and not takes_ended:
            self._known.pop(token, None)
            raise Unauthenticated(reason=ENDED)
        if actor.role == STAFF and self._ended.is_behind:
            raise SessionsNotKnown
        if len(self._known) >= REMEMBERED_TOKENS:
            self._known.clear()
        self._known[token] = (actor, expires_at, session_id)
        return actor

    async def jwks(self) -> PublicKeys:
        """The public keys, with which other programs can verify tokens."""
        if self._keys is None:
            await self._fetch()
        assert self._keys is not None
        return self._keys

    async def _verified(self, token: str) -> Claims:
        if self._key_set is None:
            await self._fetch()
        try:
            return self._decode(token)
        except _UnknownKeyError:
            # Another process may sign with a new key by now. Forged tokens must not cause a fetch each.
            if self._clock.monotonic() - self._fetched_at < KEYS_PAUSE_SECONDS:
                raise Unauthenticated(reason=FORGED) from None
            await self._fetch()
            try:
                return self._decode(token)
            except _UnknownKeyError:
                raise Unauthenticated(reason=FORGED) from None

    async def _fetch(self) -> None:
        self._keys = await self._fetch_keys()
        self._key_set = KeySet.import_key_set({"keys": [dict(key) for key in self._keys.keys]})
        self._fetched_at = self._clock.monotonic()

    def _decode(self, token: str) -> Claims:
        assert self._key_set is not None
        try:
            decoded = jwt.decode(token, self._key_set, registry=ALGORITHMS)
            if decoded.header.get("typ") != TOKEN_TYPE:
                raise Unauthenticated(reason=FORGED)
            return msgspec.convert(decoded.claims, Claims)
        except JoseError as error:
            if error.error in ("invalid_key_id", "missing_key"):
                raise _UnknownKeyError from error
            raise Unauthenticated(reason=FORGED) from error
        except (ValueError, TypeError, KeyError, msgspec.ValidationError) as error:
            raise Unauthenticated(reason=FORGED) from error

    def _read(self, claims: Claims) -> tuple[Actor, float, str]:
        keys = self._keys
        assert keys is not None
        if claims.iss != keys.issuer or claims.aud != keys.audience or claims.role not in (CUSTOMER, STAFF):
            raise Unauthenticated(reason=FORGED)
        if not claims.sub.isascii() or not claims.sub.isdigit() or not SESSION_ID.fullmatch(claims.sid):
            raise Unauthenticated(reason=FORGED)
        if claims.exp <= self._clock.now().timestamp():
            raise Unauthenticated(reason="The access token has expired; refresh it, or sign in again.")
        return Actor(claims.role, int(claims.sub)), claims.exp, claims.sid


ENDED: Final = "The session of this access token has ended; sign in again."
FORGED: Final = "This shop did not issue the access token."


class _UnknownKeyError(Exception):
    """A token is signed with a key that is not among the fetched ones."""


class Authenticator:
    """Gives the actor of a request. `own_hosts` are the Host values of an open shop; None where tokens are required.

    `cors_origins`: origins whose pages may call an open shop besides its own; without a token they act as staff.
    """

    def __init__(self, verifier: Verifier, own_hosts: Sequence[str] | None, cors_origins: Sequence[str] = ()) -> None:
        self._verifier = verifier
        self._hosts = frozenset(host.encode() for host in own_hosts) if own_hosts is not None else None
        self._allowed = frozenset(origin.encode() for origin in cors_origins)
        self._origins = self._allowed | {b"http://" + host for host in self._hosts or ()}
        self.anonymous_actor = ANONYMOUS_ACTOR if own_hosts is None else OPEN_ACTOR
        """The actor of a caller without a token."""

    @property
    def open(self) -> bool:
        return self._hosts is not None

    def check_address(self, host: bytes | None, origin: bytes | None, forwarded: bytes | None = None) -> None:
        """Raises `HostNotAllowed` in an open shop for a request to another host, or from another origin."""
        if self._hosts is None:
            return
        if forwarded is not None:  # a proxy on this machine would make staff of every caller
            raise HostNotAllowed(header="what a proxy has added")
        if host is None or host.lower() not in self._hosts:
            raise HostNotAllowed(header="Host")
        if origin is not None and origin.lower() not in self._origins:
            raise HostNotAllowed(header="Origin")

    def check_source(self, headers: RequestHeaders, method: str) -> None:
        """As `check_address`; also for requests of a page of another site, or of another port of this machine.

        Also for reads: the page does not see the answer, but it sees how long it takes. A link may lead here.
        """
        if self._hosts is None:
            return
        self.check_address(headers.host, headers.origin, headers.forwarded)
        if headers.origin in self._allowed:
            return
        if headers.fetch_site in OTHER_SITES and not (
            method in ("GET", "HEAD") and headers.fetch_mode == b"navigate" and headers.fetch_dest == b"document"
        ):
            raise HostNotAllowed(header="Sec-Fetch-Site")

    def check_call(self, headers: RequestHeaders) -> None:
        """As `check_source`, for calls over gRPC: no web page can make one, but a proxy on this machine can."""
        if self._hosts is not None and headers.forwarded is not None:
            raise HostNotAllowed(header="what a proxy has added")
        if self._hosts is not None and headers.origin is not None:
            raise HostNotAllowed(header="Origin")

    def remembered(self, authorization: bytes) -> Actor | None:
        """The actor of an Authorization header whose token is cached; None where `actor` has to verify it."""
        scheme, _, token = authorization.partition(b" ")
        return self._verifier.remembered(token.decode("latin-1")) if scheme == b"Bearer" else None

    def session_id(self, authorization: bytes) -> str:
        """The session of an Authorization header whose token has just been verified."""
        return self._verifier.session_id(_token_of(authorization))

    def validity(self, authorization: bytes | None, actor: Actor) -> Callable[[], bool]:
        """Says whether a caller who has just been identified is still this actor: one without an account is."""
        return self._verifier.validity(_token_of(authorization)) if authorization and actor.id else lambda: True

    async def verified(
        self, authorization: bytes, headers: RequestHeaders, deadline: float, *, takes_ended: bool
    ) -> Actor:
        """The actor of a token that is not cached. Verifying it may call the users service for its keys."""
        if guests.is_guest_scheme(authorization):
            return ANONYMOUS_ACTOR
        current.set(headers.context(self.anonymous_actor, deadline))
        return await self.actor(authorization, takes_ended=takes_ended)

    async def actor(self, authorization: bytes, *, takes_ended: bool = False) -> Actor:
        """Raises `Unauthenticated`."""
        scheme, _, token = authorization.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated(reason="The Authorization header must be: Bearer TOKEN.")
        return await self._verifier.actor(token.strip(), takes_ended=takes_ended)


def _token_of(authorization: bytes) -> str:
    return authorization.decode("latin-1").partition(" ")[2].strip()


def own_hosts(host: str, port: int) -> list[str]:
    """The Host values of a shop on loopback."""
    names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}
    with_port = [f"{name}:{port}" for name in sorted(names)]
    return with_port + (sorted(names) if port == 80 else [])
