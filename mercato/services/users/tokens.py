"""Access tokens (signed, short-lived, verified with the public key) and refresh tokens (read by this service).

An access token is a JWT of RFC 9068: `typ: at+jwt`, so that no other JWT signed with this key is accepted as one.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import uuid
from typing import Final

from joserfc import jwt

from mercato.chassis.observability.clock import Clock, Randomness
from mercato.chassis.rpc.signatures import ALGORITHM, ALGORITHMS, signing_key
from mercato.contracts.users import PublicKeys, User

KEY_PURPOSE: Final = "users/access-token/1"
REFRESH_KEY_PURPOSE: Final = "users/refresh-token/1"
"""The numbers allow a change of the keys."""

ISSUER: Final = "mercato"
AUDIENCE: Final = "mercato"
TOKEN_TYPE: Final = "Bearer"  # noqa: S105  # RFC 6750
ACCESS_TOKEN_LIFE: Final = datetime.timedelta(minutes=15)
REFRESH_TOKEN_BYTES: Final = 32
TOKEN_ID_BYTES: Final = 16
SESSION_ID_BYTES: Final = 16


class AccessTokens:
    """Signs access tokens with the Ed25519 key of a seed (32 bytes)."""

    def __init__(self, seed: bytes, clock: Clock, randomness: Randomness) -> None:
        self._key = signing_key(seed)
        self._key_id = self._key.thumbprint()  # RFC 7638
        self._clock = clock
        self._randomness = randomness

    def sign(self, user: User, sid: uuid.UUID) -> str:
        header = {"alg": ALGORITHM, "typ": "at+jwt", "kid": self._key_id}
        issued_at = int(self._clock.now().timestamp())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(user.id),
            "role": user.role,
            "sid": sid.hex,
            "iat": issued_at,
            "exp": issued_at + int(ACCESS_TOKEN_LIFE.total_seconds()),
            "jti": _url_safe(self._randomness.token(TOKEN_ID_BYTES)),
        }
        return jwt.encode(header, claims, self._key, registry=ALGORITHMS)

    def public_keys(self) -> PublicKeys:
        public = {name: str(value) for name, value in self._key.as_dict(private=False).items()}
        described = {**public, "kid": self._key_id, "use": "sig", "alg": ALGORITHM}
        return PublicKeys(keys=(described,), issuer=ISSUER, audience=AUDIENCE)


def new_session_id(randomness: Randomness) -> uuid.UUID:
    """All its bits are random: it is no UUID of a standard version."""
    return uuid.UUID(bytes=randomness.token(SESSION_ID_BYTES))


def new_refresh_token(randomness: Randomness) -> str:
    return _url_safe(randomness.token(REFRESH_TOKEN_BYTES))


def next_refresh_token(key: bytes, refresh_token: str) -> str:
    """The successor of a refresh token: always the same, so that a repeated refresh gets it although it is not stored.

    Without the key, a token reveals neither its successor nor its predecessor.
    """
    return _url_safe(hmac.digest(key, _as_bytes(refresh_token), hashlib.sha256))


def refresh_token_hash(refresh_token: str) -> bytes:
    """The stored hash of a refresh token. A fast hash is enough for 256 random bits."""
    return hashlib.sha256(_as_bytes(refresh_token)).digest()


def _as_bytes(refresh_token: str) -> bytes:
    return refresh_token.encode("utf-8", "surrogatepass")


def _url_safe(random: bytes) -> str:
    return base64.urlsafe_b64encode(random).rstrip(b"=").decode()
