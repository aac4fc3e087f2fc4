"""Builds the users service: the only place that constructs its objects."""

from __future__ import annotations

import functools
import os
from typing import Final
from urllib.parse import urlsplit

import msgspec

from mercato.chassis.hosting.options import OptionError
from mercato.chassis.hosting.periodic import PeriodicTask, cleaning
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.mail.letters import MailSettingError, sending
from mercato.chassis.rpc.server import Server
from mercato.contracts.users import Users

from . import letter_store, log_store, store
from .consumers import SECURITY_LOG
from .demo import seed_demo
from .erasing import Erasing
from .letters import KEY_PURPOSE as LINKS_PURPOSE, SENT_AT_ONCE, Letters
from .passwords import Argon2Hasher, Hasher, Passwords, threads_for
from .proving import Proving
from .security_log import SecurityLog
from .service import UsersService
from .tokens import KEY_PURPOSE, REFRESH_KEY_PURPOSE, AccessTokens

CLEAN_UP_SECONDS: Final = 60.0
LETTERS_SECONDS: Final = 2.0
DEFAULT_SENDER: Final = "Mercato <shop@localhost.localdomain>"
DEFAULT_ADDRESS: Final = "http://127.0.0.1:8080"


class Options(msgspec.Struct, frozen=True):
    """`MERCATO_USERS_*`."""

    mail: str = ""
    """The target of letters: `smtp://USER:PASSWORD@HOST:PORT`, `smtps://...`, `folder:/path`. Empty: they wait."""
    mail_sender: str = DEFAULT_SENDER
    """The sender of letters."""
    address: str = DEFAULT_ADDRESS
    """The public address of the shop, for the links in letters."""


def build(env: Env, hasher: Hasher | None = None, threads: int | None = None) -> Service:
    """The users service. Tests pass a `hasher`, and the number of its threads."""
    threads = threads or threads_for(os.cpu_count())
    passwords = Passwords(hasher or Argon2Hasher(), env.clock, env.randomness, threads=threads)
    tokens = AccessTokens(env.derive_key(KEY_PURPOSE), env.clock, env.randomness)
    letters = _letters(env)
    refresh_key, log = env.derive_key(REFRESH_KEY_PURPOSE), SecurityLog(env.database)
    service = UsersService(env.database, passwords, tokens, letters, log, refresh_key, env.randomness)
    return Service(
        server=_server(
            env, service, Proving(env.database, passwords, letters), Erasing(env.database, passwords, log), log
        ),
        database=env.database,
        tasks=(
            PeriodicTask(
                "clean up",
                cleaning(
                    env.database,
                    store.delete_old_refresh_tokens,
                    store.delete_old_sessions,
                    letter_store.delete_old_letters,
                    store.delete_old_ended_sessions,
                    log_store.delete_old_entries,
                ),
                CLEAN_UP_SECONDS,
                limit=store.CLEANED_AT_ONCE,
            ),
            PeriodicTask("send letters", letters.send_due, LETTERS_SECONDS, limit=SENT_AT_ONCE, round_seconds=300.0),
        ),
        subscriptions=(SECURITY_LOG,),
        seed_demo=functools.partial(seed_demo, env.database, passwords),
        close=passwords.close,
    )


def _letters(env: Env) -> Letters:
    """Raises `OptionError`."""
    options = env.options(Options)
    address = urlsplit(options.address)
    if address.scheme not in ("http", "https") or not address.netloc or address.query or address.fragment:
        raise OptionError("The setting MERCATO_USERS_ADDRESS is not valid: write it as https://shop.example.com.")
    target = None
    if options.mail:
        try:
            target = sending(options.mail, options.mail_sender, env.clock)
        except MailSettingError as error:
            raise OptionError(f"The setting MERCATO_USERS_MAIL is not valid: {error}.") from None
    key = env.derive_key(LINKS_PURPOSE)
    return Letters(env.database, key, target, options.address.rstrip("/"), env.randomness, env.telemetry)


def _server(env: Env, service: UsersService, proving: Proving, erasing: Erasing, log: SecurityLog) -> Server:
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
    server.register(Users.forgot_password, proving.forgot_password)
    server.register(Users.reset_password, proving.reset_password)
    server.register(Users.prove_email, proving.prove_email)
    server.register(Users.set_password, proving.set_password)
    server.register(Users.send_proof, proving.send_proof)
    server.register(Users.ended_sessions, service.ended_sessions)
    server.register(Users.sessions, service.sessions)
    server.register(Users.end_session, service.end_session)
    server.register(Users.end_other_sessions, service.end_other_sessions)
    server.register(Users.security_log, log.list)
    server.register(Users.own_security_log, log.list_own)
    server.register(Users.erase, erasing.erase)
    server.register(Users.register_without_password, service.register_without_password)
    server.register(Users.sign_in_named, service.sign_in_named)
    return server.complete()
