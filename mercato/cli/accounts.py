"""`mercato users`: reads and changes accounts if no member of staff can sign in. The shop may run or not."""

from __future__ import annotations

import getpass
import json
import secrets
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from mercato import topology
from mercato.chassis.contract import MAX_ID, InvalidRequest, ServiceError
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.keys import SECRET_BYTES
from mercato.cli.databases import reached, run
from mercato.cli.hosting import hosted
from mercato.cli.progress import fail, note, show, table
from mercato.cli.starting import CannotStart
from mercato.contracts.roles import Role
from mercato.contracts.users import (
    PAGE_LIMIT,
    EraseAccount,
    ListSecurityLog,
    ListUsers,
    SecurityEntry,
    SetPassword,
    SetRole,
    User,
    Users,
)

SERVICE: Final = "users"


class ShopLocation(msgspec.Struct, frozen=True):
    """The location of the accounts, from the command line."""

    data: Path
    dsns: tuple[str, ...]
    json: bool


def list_accounts(place: ShopLocation, role: Role | None) -> int:
    """Prints all accounts, or those of one role; gives the exit code."""
    return run(lambda: _with_users(place, lambda users: _list(users, place, role)))


def set_password(place: ShopLocation, who: str) -> int:
    """Sets a password, which it prompts for, or reads from standard input; gives the exit code."""
    password = _asked_password()
    if password is None:
        fail("the two are not the same: nothing was changed")
        return 1

    async def change(users: Users) -> None:
        user = await _found(users, who)
        await users.set_password(SetPassword(id=user.id, new_password=password))
        _say(place, user, f"{user.email} (user {user.id}) has another password; its sessions have ended")

    return run(lambda: _with_users(place, change))


def set_role(place: ShopLocation, who: str, role: Role) -> int:
    """Gives an account a role; gives the exit code."""

    async def change(users: Users) -> None:
        user = await _found(users, who)
        changed = await users.set_role(SetRole(id=user.id, role=role))
        _say(place, changed, f"{user.email} (user {user.id}) is {role}; it was {user.role}")

    return run(lambda: _with_users(place, change))


def erase(place: ShopLocation, who: str) -> int:
    """Erases an account; gives the exit code. By its id, it may be repeated."""

    async def change(users: Users) -> None:
        user_id = int(who) if _is_id(who) else (await _found(users, who)).id
        await users.erase(EraseAccount(id=user_id))
        sentence = f"user {user_id} is erased; orders and payments stay, without the person"
        show(json.dumps({"erased": user_id}) if place.json else sentence)

    return run(lambda: _with_users(place, change))


def show_log(place: ShopLocation, who: str | None, limit: int) -> int:
    """Prints the newest entries of the security log, the newest first; gives the exit code."""

    async def read(users: Users) -> None:
        account_id = None
        if who is not None:
            account_id = int(who) if _is_id(who) else (await _found(users, who)).id
        found: list[SecurityEntry] = []
        before: int | None = MAX_ID
        while before is not None and len(found) < limit:
            page = await users.security_log(
                ListSecurityLog(account_id=account_id, before=before, limit=min(PAGE_LIMIT, limit - len(found)))
            )
            found += page.entries
            before = page.next_before
        if place.json:
            show(json.dumps({"entries": [msgspec.to_builtins(entry) for entry in found]}))
            return
        rows = [
            (
                f"{entry.at:%Y-%m-%dT%H:%M:%SZ}",
                entry.kind,
                str(entry.account_id or "-"),
                f"{entry.actor_role} {entry.actor_id}" if entry.actor_id else entry.actor_role,
                entry.address or "-",
                f"{entry.subject} {entry.detail}".strip(),
            )
            for entry in found
        ]
        for line in table([("time", "what", "account", "by", "from", "about"), *rows]):
            show(line)

    return run(lambda: _with_users(place, read))


async def _with_users(place: ShopLocation, work: Callable[[Users], Coroutine[Any, Any, None]]) -> int:
    def print_step(line: str) -> None:
        if not place.json:
            note(line)

    async with reached(place.data, place.dsns, print_step) as databases, _service(databases.dsns[SERVICE]) as host:
        try:
            await topology.as_the_shop(host, lambda: work(host.client(Users)))
        except ServiceError as error:
            if place.json:
                show(json.dumps({"error": {"code": error.code, "message": str(error)}}))
            else:
                fail(_sentence(error))
            return 1
    return 0


@asynccontextmanager
async def _service(dsn: str) -> AsyncGenerator[Host]:
    """A users service besides those that may run. It signs and sends nothing, so that any secret works."""
    builds = {SERVICE: topology.builds()[SERVICE]}
    async with hosted(Host(builds, {SERVICE: dsn}, secrets={SERVICE: secrets.token_bytes(SECRET_BYTES)})) as host:
        yield host


def _sentence(error: ServiceError) -> str:
    """What is wrong, with every field of a request that is not valid."""
    if isinstance(error, InvalidRequest):
        return "; ".join(f"{wrong.field} {wrong.message}" for wrong in error.errors)
    return str(error)


async def _list(users: Users, place: ShopLocation, role: Role | None) -> None:
    found: list[User] = []
    after: int | None = 0
    while after is not None:
        page = await users.list(ListUsers(role=role, after=after, limit=200))
        found += page.users
        after = page.next_after
    if place.json:
        show(json.dumps({"users": [_document(user) for user in found]}))
        return
    rows = [
        (
            str(user.id),
            user.email,
            "yes" if user.email_proven else "no",
            user.role,
            f"{user.created_at:%Y-%m-%d}",
            user.name,
        )
        for user in found
    ]
    for line in table([("id", "e-mail", "proven", "role", "since", "name"), *rows]):
        show(line)


async def _found(users: Users, who: str) -> User:
    """The account with this id, or this e-mail address. Raises `CannotStart`."""
    wanted = ListUsers(id=int(who)) if _is_id(who) else ListUsers(email=who)
    page = await users.list(wanted)
    if not page.users:
        raise CannotStart(f"there is no account {who}: `mercato users list` shows all")
    return page.users[0]


def _is_id(who: str) -> bool:
    return who.isascii() and who.isdigit()


def _asked_password() -> str | None:
    """The password that a person types twice; None if the two differ."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    first = getpass.getpass("New password: ")
    return first if getpass.getpass("Once more: ") == first else None


def _say(place: ShopLocation, user: User, sentence: str) -> None:
    show(json.dumps({"user": _document(user)}) if place.json else sentence)


def _document(user: User) -> Any:
    return msgspec.to_builtins(user)
