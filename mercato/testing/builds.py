"""The services as the tests host them: as in a shop, but passwords are hashed in no time.

A hash that is slow by design runs on a thread of low priority: on a busy machine, a caller that signs in would wait for
longer than it has.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from mercato import topology
from mercato.chassis.hosting.service import Build, Env, Service
from mercato.services.users.app import build
from mercato.services.users.passwords import Argon2Hasher

QUICK: Final = Argon2Hasher(memory_kib=64, iterations=1)


@functools.wraps(build)
def build_users(env: Env) -> Service:
    return build(env, QUICK)


def builds(names: Sequence[str] = tuple(topology.SERVICES)) -> dict[str, Build]:
    """The `build` of each service, by its name."""
    return {name: build_users if name == "users" else found for name, found in topology.builds(names).items()}
