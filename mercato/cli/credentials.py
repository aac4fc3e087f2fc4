"""`mercato credentials`: what `mercato migrate` gives each process, as Secrets of Kubernetes on standard output.

    PREFIX-orders     the variables of `environment.py`, for `envFrom`; one for each service, the gateway, the operator
    PREFIX-nats       mercato.conf: the users of NATS with what each may do
    PREFIX-admin      postgres-dsn and secret, for `mercato migrate` alone

Everything is derived from the secret of the shop and the address of the server, which is not asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from mercato import topology
from mercato.chassis.hosting import settings as config
from mercato.chassis.postgres.dsn import DSN_FORM, servers, shown, with_server
from mercato.cli import environment, preparing
from mercato.cli.migrating import address, nats_users
from mercato.cli.progress import fail
from mercato.cli.settings import load
from mercato.cli.starting import CannotStart, names_of

NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,200}[a-z0-9])?")
"""A name of Kubernetes with room for what is added to it, at most 253 characters."""


class Options(msgspec.Struct, frozen=True):
    """The options of `credentials`, as the command line gives them."""

    services: tuple[str, ...]
    dsn: str | None
    pooler: str | None
    prefix: str
    admin_secret: str | None


def run(options: Options) -> int:
    """Prints the Secrets; gives the exit code: 0, or 1 after one sentence."""
    try:
        secrets = _secrets(options, load())
    except (CannotStart, config.SettingsError) as error:
        fail(str(error))
        return 1
    document = {"apiVersion": "v1", "kind": "List", "items": secrets}
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document)).decode() + "\n")
    return 0


def _secrets(options: Options, settings: config.Settings) -> list[Mapping[str, Any]]:
    admin_dsn = options.dsn or (settings.postgres_dsn.get_secret_value() if settings.postgres_dsn else None)
    if admin_dsn is None:
        raise CannotStart("there is no server: name it by --dsn or MERCATO_POSTGRES_DSN, as the cluster reaches it")
    if not _is_dsn(admin_dsn):
        raise CannotStart(f"the DSN of the server ({shown(admin_dsn)}) cannot be used: {DSN_FORM}")
    if settings.secret is None:
        raise CannotStart(
            "the setting MERCATO_SECRET is missing: it is at least 32 characters, as `openssl rand -hex 32` prints "
            "them; keep it, for the databases cannot be opened without it"
        )
    if options.services and options.admin_secret is None:
        raise CannotStart(
            "--admin-secret is missing: with some of the services, it names the Secret of their server, "
            f"for {options.prefix}-admin is that of the others"
        )
    admin = options.admin_secret or f"{options.prefix}-admin"
    for name in (options.prefix, admin):
        if not NAME.fullmatch(name):
            raise CannotStart(f"{name!r} is not a name of Kubernetes: small letters, digits and hyphens")
    secret = settings.secret.get_secret_value()
    names = names_of(options.services, gateway=False) or tuple(topology.SERVICES)
    dsns = preparing.dsns(admin_dsn, secret.encode(), names)
    if options.pooler is not None:
        host, port = address(options.pooler)
        dsns = {name: with_server(dsn, host, port) for name, dsn in dsns.items()}
    own = environment.variables(secret.encode(), dsns)
    return [
        *(_secret(f"{options.prefix}-{name}", values) for name, values in own.items()),
        _secret(f"{options.prefix}-nats", {"mercato.conf": nats_users(secret.encode()).decode()}),
        _secret(admin, {"postgres-dsn": admin_dsn, "secret": secret}),
    ]


def _is_dsn(text: str) -> bool:
    try:
        servers(text)  # raises for one that the driver could not read
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("postgresql", "postgres") and bool(parts.netloc)


def _secret(name: str, values: Mapping[str, str]) -> Mapping[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "mercato"}},
        "type": "Opaque",
        "stringData": values,
    }
