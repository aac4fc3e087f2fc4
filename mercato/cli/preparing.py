"""Prepares a shop before it serves: a migrated database for each service, demo data, and staff.

This needs an administrator's DSN and the secret of the shop; a process that only serves needs neither.
"""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mercato import topology
from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.keys import key_deriver, service_secrets
from mercato.chassis.postgres.migrations import migrate, missing_revisions
from mercato.chassis.postgres.provisioning import connections_taken, provision, provisioned, service_dsn
from mercato.cli.progress import Progress
from mercato.cli.starting import CannotStart, explained
from mercato.contracts.roles import STAFF
from mercato.contracts.users import EmailTaken, ListUsers, Register, Users
from mercato.operations.ids import advance
from mercato.operations.rejoining import rejoin

STAFF_EMAIL: Final = "staff@mercato.local"
PREFIX: Final = "mercato_"
"""What the names of roles and databases begin with."""
SPARE_CONNECTIONS: Final = 20
"""Besides those of the pools: for the administrator, audits, migrations and a person with psql."""


async def databases(
    admin_dsn: str, secret: bytes, progress: Progress, names: Sequence[str] = tuple(topology.SERVICES)
) -> Mapping[str, str]:
    """Migrates a database for each service; no service gives an id again that another one knows. Gives the DSNs.

    Raises `CannotStart`, `ProvisionError` or `MigrationError`, the last before any database is changed.
    """
    derive = key_deriver(secret)
    complete = await _complete(admin_dsn, names)
    made = await provision(admin_dsn, names, lambda role: _password(derive, role), prefix=PREFIX)
    for name in names:
        if name not in complete and (revisions := await _migrated(name, made[name])):
            progress.step(f"migrated the database of {name} to {revisions[-1]}")
    with explained("the next ids cannot be compared"):
        moved = await advance(made)
        parted = await rejoin(made)
    for each in moved:
        progress.step(
            f"{each.by} knows ids up to {each.newest} of {each.sequence.owner}, whose database was restored and would "
            f"have given {each.next_id} again: it goes on behind them"
        )
    for each in parted:
        restored = each.source if each.is_source else each.consumer
        progress.step(
            f"the database of {restored} was restored: {each.consumer} goes on with the events of {each.source}"
        )
    return made


def dsns(admin_dsn: str, secret: bytes, names: Sequence[str]) -> Mapping[str, str]:
    """The DSNs of services on a server, whether their databases exist yet or not."""
    derive = key_deriver(secret)
    return {name: service_dsn(admin_dsn, f"{PREFIX}{name}", _password(derive, f"{PREFIX}{name}")) for name in names}


def _password(derive: Callable[[str], bytes], role: str) -> str:
    return derive(f"postgres/{role}").hex()


async def warn_of_too_few_connections(admin_dsn: str, pools: int, progress: Progress) -> None:
    """Warns if a server accepts fewer connections than all processes of a shop may open.

    `pools` is the sum of the sizes of their pools. Raises `ProvisionError`.
    """
    taken, needed = await connections_taken(admin_dsn), pools + SPARE_CONNECTIONS
    if taken < needed:
        progress.step(
            f"the server takes {taken} connections of ordinary roles, and this shop may need {needed}: {pools} for its "
            f"processes, {SPARE_CONNECTIONS} for audits, migrations and people; raise max_connections, or lower "
            "MERCATO_POOL_SIZE"
        )


def host_of(dsns: Mapping[str, str], secret: bytes, settings: config.Settings) -> Host:
    """A host of the services of `dsns`."""
    return Host(
        topology.builds(tuple(dsns)),
        dsns,
        secrets=service_secrets(secret, topology.SERVICES),
        transport="loopback" if settings.transport == "loopback" else "local",
        pool_size=settings.pool_size,
        options=config.service_options(dsns),
        may_call=topology.may_call,
        limits=settings.call_limits,
    )


async def populate(host: Host, secret: bytes, progress: Progress, *, has_demo: bool, has_staff: bool) -> None:
    """Puts demo data into an empty shop (`has_demo`), and makes the first staff account (`has_staff`)."""
    if has_demo:
        for name, service in host.services.items():
            if service.seed_demo and await service.seed_demo():
                progress.step(f"put demo data into {name}")
    if has_staff:
        password = urlsafe_b64encode(key_deriver(secret)("users/first-staff-password")).decode()[:22]

        def show_password() -> None:
            progress.say(f"Staff account  {STAFF_EMAIL}  password {password}  (shown this once)")
            progress.event("staff", email=STAFF_EMAIL, password=password)

        await topology.as_the_shop(host, lambda: _ensure_staff(host, password, show_password))


async def _complete(admin_dsn: str, names: Sequence[str]) -> set[str]:
    """The services whose databases have all revisions. Raises `MigrationError` before any of them is changed."""
    existing = await provisioned(admin_dsn, names)
    with explained("the databases cannot be read"):
        missing = await asyncio.gather(
            *(missing_revisions(dsn, topology.migrations(name)) for name, dsn in existing.items())
        )
    return {name for name, revisions in zip(existing, missing, strict=True) if revisions == []}


async def _migrated(name: str, dsn: str) -> Sequence[str]:
    """Brings the database of a service to the newest revision; gives the revisions that were run."""
    with explained(f"the database of {name} cannot be migrated"):
        return await migrate(dsn, topology.migrations(name))


async def _ensure_staff(host: Host, password: str, show_password: Callable[[], None]) -> None:
    """Makes the first staff account, unless there is staff already.

    The password is shown before the account is made: otherwise a crash in between would leave an account that cannot
    be used. It is derived from the shop's secret, so that two machines that start at once show the same.
    """
    if await _has_staff(host):
        return
    show_password()
    try:
        await host.client(Users).register(Register(email=STAFF_EMAIL, name="Staff", password=password, role=STAFF))
    except EmailTaken:
        # Another machine that starts on the same server has made it, and has printed the same password.
        if await _has_staff(host):
            return
        raise CannotStart(
            f"there is no staff account, and {STAFF_EMAIL}, which it would get, is the e-mail address of a customer: "
            "start with --auth open on loopback, and give an account the role staff (PUT /users/ID/role)"
        ) from None


async def _has_staff(host: Host) -> bool:
    return bool((await host.client(Users).list(ListUsers(role=STAFF, limit=1))).users)
