"""Secrets and keys: all are derived from the secret of the shop, and a service gets only its own.

    the shop's secret ──► the secret of a service ──► the key that signs its calls, and keys for its own purposes

From the secret of one service, neither that of another service nor that of the shop can be derived.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping
from typing import Final

SECRET_BYTES: Final = 32
CALLS_PURPOSE: Final = "rpc/signing-key/1"
NATS_PURPOSE: Final = "nats/password/1"


def key_deriver(secret: bytes) -> Callable[[str], bytes]:
    """Keys for many purposes out of one secret (HMAC-SHA256 of the purpose; RFC 5869 calls this step expand)."""
    return lambda purpose: hmac.digest(secret, f"mercato/{purpose}".encode(), hashlib.sha256)


def service_secrets(shop_secret: bytes, names: Iterable[str]) -> Mapping[str, bytes]:
    """The secret of each service, of 32 bytes, by name."""
    derive = key_deriver(shop_secret)
    return {name: derive(f"services/{name}") for name in names}


def signing_seed(service_secret: bytes) -> bytes:
    """The private key, an Ed25519 seed, with which a service signs its calls to others."""
    return key_deriver(service_secret)(CALLS_PURPOSE)


def nats_password(service_secret: bytes) -> str:
    """The password of a service at NATS, where its user has its name."""
    return key_deriver(service_secret)(NATS_PURPOSE).hex()
