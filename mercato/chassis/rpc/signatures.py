"""Ed25519 signatures of JWTs: the one algorithm of this shop, and its keys."""

from __future__ import annotations

import copy
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # what joserfc makes keys from
from joserfc.jwk import OKPKey
from joserfc.jws import JWSRegistry

ALGORITHM: Final = "EdDSA"


class _Algorithms(JWSRegistry):
    """Ed25519 under both of its names; every other algorithm is refused, `none` among them.

    joserfc warns at each use of the older name, that of RFC 8037, because it does not say which curve; our keys do. We
    write the older one, which every JWT library knows.
    """

    algorithms = {name: copy.copy(JWSRegistry.algorithms[name]) for name in (ALGORITHM, "Ed25519")}  # noqa: RUF012
    algorithms[ALGORITHM].security_warning = None


ALGORITHMS: Final = _Algorithms(algorithms=[ALGORITHM, "Ed25519"])


def public_key(seed: bytes) -> dict[str, str]:
    """The public key (a JWK) that belongs to the private key of a seed."""
    return {name: str(value) for name, value in signing_key(seed).as_dict(private=False).items()}


def signing_key(seed: bytes) -> OKPKey:
    """The private key of a seed of 32 bytes."""
    return OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(seed))
