"""`mercato migrate`: prepares the databases of the services, and the environment variables of their processes.

Besides `up`, the one command with an administrator's DSN. It makes a role and a database for each service, migrates
it, makes the first staff account, and writes a file of environment variables for each service (`environment.py`). It
can be repeated at any time, and changes only what is missing or differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from mercato import topology
from mercato.chassis.contract import ServiceError
from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.options import OptionError
from mercato.chassis.observability.telemetry import configure_logging
from mercato.chassis.postgres.dsn import with_server
from mercato.chassis.postgres.migrations import MigrationError
from mercato.chassis.postgres.provisioning import ProvisionError
from mercato.cli import environment, nats_server, preparing, stopping
from mercato.cli.hosting import hosted
from mercato.cli.progress import Progress, fail
from mercato.cli.settings import load
from mercato.cli.starting import CannotStart, names_of
from mercato.contracts.users import Users
from mercato.embedded_nats import authorization
from mercato.embedded_postgres import DataFolder, SupervisorError, require_known_format
from mercato.embedded_postgres.folder import explained, write_atomically

FOLDER: Final = "environment"
EXPECTED: Final = (CannotStart, MigrationError, ProvisionError, OptionError, SupervisorError, config.SettingsError)
"""Failures whose message is all that the operator needs."""


class Options(msgspec.Struct, frozen=True):
    """The options of `migrate`, as the command line gives them."""

    services: tuple[str, ...]
    data: Path
    dsn: str | None
    pooler: str | None
    demo: bool
    credentials: Path | None
    """The folder for the files of variables."""
    folders: bool
    """Whether each of them gets a folder of its own in it."""
    json: bool


def run(options: Options) -> int:
    """Migrates; gives the exit code: 0, or 1 after one sentence."""
    try:
        stopping.leave_at_once()  # each step is one transaction, or the next run repeats it
        settings = load()
        configure_logging(settings.log_level)
        asyncio.run(_migrate(options, settings))
    except EXPECTED as error:
        fail(str(error))
    except ServiceError as error:
        fail(f"the databases could not be migrated: {error}")
    else:
        return 0
    return 1


async def _migrate(options: Options, settings: config.Settings) -> None:
    admin_dsn = options.dsn or (settings.postgres_dsn.get_secret_value() if settings.postgres_dsn else None)
    if admin_dsn is None:
        raise CannotStart(
            "there is no server to migrate: name it by --dsn or MERCATO_POSTGRES_DSN; "
            "a shop with a PostgreSQL of its own migrates when `mercato up` starts it"
        )
    pooler = address(options.pooler) if options.pooler is not None else None
    progress = Progress(as_json=options.json)
    names = names_of(options.services, gateway=False) or tuple(topology.SERVICES)
    require_known_format(options.data)
    with DataFolder.open(options.data, "(mercato migrate)") as folder:
        secret = settings.secret.get_secret_value().encode() if settings.secret else folder.secret()
        dsns = await preparing.databases(admin_dsn, secret, progress, names)
        await preparing.warn_of_too_few_connections(admin_dsn, settings.pool_size * len(topology.SERVICES), progress)
        has_all = dsns.keys() == topology.SERVICES.keys()
        if Users.service in dsns:
            host = preparing.host_of(dsns, secret, settings)
            async with hosted(host):
                await preparing.populate(host, secret, progress, has_demo=options.demo and has_all, has_staff=True)
        if pooler is not None:
            dsns = {name: with_server(dsn, *pooler) for name, dsn in dsns.items()}
        written = options.credentials or folder.path / FOLDER
        with explained(written):
            _write(written, environment.variables(secret, dsns), nats_users(secret), in_folders=options.folders)
    progress.say(f"Each service has its variables in a file of {written}: give it that one alone")
    progress.event("migrated", services=names, environment=str(written))


def address(pooler: str) -> tuple[str, int]:
    address = environment.host_and_port(pooler)
    if address is None:
        raise CannotStart(f"--pooler {pooler} is not the address of a pooler: it is HOST:PORT, as in 127.0.0.1:6432")
    return address


def nats_users(secret: bytes) -> bytes:
    """The users of NATS with what each may do, as a file that the configuration of a server includes."""
    return authorization(nats_server.users(secret))


def _write(folder: Path, variables: Mapping[str, Mapping[str, str]], nats: bytes, *, in_folders: bool) -> None:
    """Writes a file for each service, and one for NATS. Only the owner may read them."""
    files = {f"{name}.env": environment.as_file(values) for name, values in variables.items()}
    for name, content in {**files, "nats.conf": nats}.items():
        own = folder / name.partition(".")[0] if in_folders else folder
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(own / name, content)
