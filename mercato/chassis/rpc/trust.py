"""Authenticates and authorizes services that call each other.

Each service has its own private key (32 bytes, Ed25519), and all have the public keys of all. A caller sends a token
that it has signed: a JWT of the type `mercato-service+jwt` with its name (`iss`), the called service (`aud`), and an
expiry a minute away (`exp`). An attacker who reads a token can use it for a minute, for that one service; idempotency
keys make requests that are repeated with it harmless.

A verified caller may call the operations that it has declared, and name the actor: the gateway customers, staff
and anonymous callers, another service also the shop itself. Everything else is refused before it reaches a handler,
and counted in `mercato_rpc_untrusted_total{reason}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from mercato.chassis.contract import Context, Forbidden, Operation, ServiceError, Unauthenticated
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry

from .signatures import ALGORITHM, ALGORITHMS, signing_key

TOKEN_TYPE: Final = "mercato-service+jwt"  # noqa: S105  # no secret
LIFE_SECONDS: Final = 60.0
SKEW_SECONDS: Final = 5.0
"""How much the clocks of two machines may differ."""
REASONS: Final = ("missing", "malformed", "signature", "expired", "times", "audience", "operation", "role")
"""Why a call is refused."""
REMEMBERED_TOKENS: Final = 1_000
"""A token that was verified is remembered until it expires: verifying is slow."""

log = structlog.stdlib.get_logger("mercato.trust")


class Grant(msgspec.Struct, frozen=True):
    """What one service may do when it calls others."""

    operations: frozenset[str]
    """By full name: `orders.get`."""
    roles: frozenset[str] | None = None
    """The roles for which it may call; None: all."""


class ServiceClaims(msgspec.Struct):
    """The claims of a service token. Times are in seconds since 1970."""

    iss: str
    aud: str
    iat: float
    exp: float


class TokenSigner:
    """Signs the tokens of one service. `seed`: its private key."""

    def __init__(self, service: str, seed: bytes, clock: Clock) -> None:
        self._service = service
        self._key = signing_key(seed)
        self._clock = clock
        self._tokens: dict[str, tuple[str, float]] = {}

    def token(self, audience: str) -> str:
        """The token for calls to a service. Each is used for half of its lifetime."""
        now = self._clock.now().timestamp()
        token, renewed_at = self._tokens.get(audience, ("", 0.0))
        if now >= renewed_at:
            claims = {"iss": self._service, "aud": audience, "iat": int(now), "exp": int(now + LIFE_SECONDS)}
            header = {"alg": ALGORITHM, "typ": TOKEN_TYPE, "kid": self._service}
            token = jwt.encode(header, claims, self._key, registry=ALGORITHMS)
            self._tokens[audience] = (token, now + LIFE_SECONDS / 2)
        return token


class Trust:
    """Verifies the callers of the services of one process.

    `public_keys` (JWKs) and `grants` are by the name of the caller. `services` are those that this process serves: a
    token is for one of them.
    """

    def __init__(
        self,
        services: Sequence[str],
        public_keys: Mapping[str, Mapping[str, str]],
        grants: Mapping[str, Grant],
        clock: Clock,
        telemetry: Telemetry,
    ) -> None:
        self._services = frozenset(services)
        self._keys = KeySet.import_key_set({"keys": [{**key, "kid": name} for name, key in public_keys.items()]})
        self._grants = grants
        self._clock = clock
        self._verified: dict[str, ServiceClaims] = {}
        about = "Batches and requests of callers that were not believed, by reason."
        refused = telemetry.counter("mercato_rpc_untrusted", about, ["reason"])
        # All from the start, with 0: of a series that begins with 1, Prometheus sees no increase.
        self._refused = {reason: refused.labels(reason).inc for reason in REASONS}

    def caller(self, token: str | None, service: str) -> str:
        """The service that signed a token for a call to `service`. Raises `Unauthenticated`."""
        try:
            claims = self._read(token)
            now = self._clock.now().timestamp()
            if claims.exp <= now:
                raise _UntrustedError("expired")
            if claims.iat > now + SKEW_SECONDS or claims.exp - claims.iat > LIFE_SECONDS + SKEW_SECONDS:
                raise _UntrustedError("times")
            if claims.aud != service or service not in self._services:
                raise _UntrustedError("audience")
        except _UntrustedError as error:
            self._count(error.reason, service)
            raise Unauthenticated(reason=f"The service token is not valid ({error.reason}).") from None
        return claims.iss

    def refusals(
        self, caller: str, operation: Operation[Any, Any], contexts: Sequence[Context]
    ) -> Mapping[int, ServiceError]:
        """The refusals of a batch, by index: of all requests, or of those for a role that `caller` may not act for."""
        grant = self._grants.get(caller)
        name = operation.full_name
        if grant is None or name not in grant.operations:
            self._count("operation", name, caller)
            return {place: Forbidden(operation=name, role=caller) for place in range(len(contexts))}
        if grant.roles is None:
            return {}
        wrong = [place for place, context in enumerate(contexts) if context.actor.role not in grant.roles]
        if wrong:
            self._count("role", name, caller)
        return {place: Forbidden(operation=name, role=contexts[place].actor.role) for place in wrong}

    def _read(self, token: str | None) -> ServiceClaims:
        if not token:
            raise _UntrustedError("missing")
        if token not in self._verified:
            if len(self._verified) >= REMEMBERED_TOKENS:
                self._verified.clear()
            self._verified[token] = self._decode(token)
        return self._verified[token]

    def _decode(self, token: str) -> ServiceClaims:
        try:
            decoded = jwt.decode(token, self._keys, registry=ALGORITHMS)
            claims = msgspec.convert(decoded.claims, ServiceClaims)
        except JoseError as error:
            raise _UntrustedError("signature") from error
        except (ValueError, TypeError, KeyError, msgspec.ValidationError) as error:
            raise _UntrustedError("malformed") from error
        # The key is named by its service: no service signs in the name of another.
        if (decoded.header.get("typ"), decoded.header.get("kid")) != (TOKEN_TYPE, claims.iss):
            raise _UntrustedError("signature")
        return claims

    def _count(self, reason: str, what: str, caller: str = "") -> None:
        self._refused[reason]()
        log.warning("untrusted_call", reason=reason, called=what, caller=caller)


class _UntrustedError(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
