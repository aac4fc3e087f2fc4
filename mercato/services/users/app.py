"""Builds the users service: the only place that constructs its objects."""

from __future__ import annotations

import functools
from typing import Final

from mercato.chassis.hosting.periodic import PeriodicTask, cleaning
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.rpc.server import Server
from mercato.contracts.users import Users

from . import store
from .demo import seed_demo
from .passwords import Argon2Hasher, Hasher, Passwords
from .service import UsersService
from .tokens import KEY_PURPOSE, AccessTokens

CLEAN_UP_SECONDS: Final = 60.0


def build(env: Env, hasher: Hasher | None = None) -> Service:
    """The users service. Tests pass a `hasher` of their own."""
    passwords = Passwords(hasher or Argon2Hasher(), env.clock, env.randomness)
    tokens = AccessTokens(env.derive_key(KEY_PURPOSE), env.clock, env.randomness)
    service = UsersService(env.database, passwords, tokens, env.randomness)
    return Service(
        server=_server(env, service),
        database=env.database,
        tasks=(
            PeriodicTask(
                "clean up",
                cleaning(env.database, store.delete_old_refresh_tokens, store.delete_old_sessions),
                CLEAN_UP_SECONDS,
                limit=store.CLEANED_AT_ONCE,
            ),
        ),
        seed_demo=functools.partial(seed_demo, env.database, passwords),
        close=passwords.close,
    )


def _server(env: Env, service: UsersService) -> Server:
    server = Server(Users, env.clock)
    server.register(Users.register, service.register)
    server.register(Users.sign_in, service.sign_in)
    server.register(Users.refresh, service.refresh)
    server.register(Users.sign_out, service.sign_out)
    server.register(Users.get, service.get)
    server.register(Users.list, service.list)
    server.register(Users.update_profile, service.update_profile)
    server.register(Users.change_password, service.change_password)
    server.register(Users.set_role, service.set_role)
    server.register(Users.keys, service.keys)
    return server.complete()
