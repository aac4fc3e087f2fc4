"""The operator at the command line as a caller of the processes of a running shop.

Their addresses are in the environment (NATS_URL or MERCATO_SERVICES, with the variables that `mercato migrate` wrote to
`operator.env`), else in the data folder of a shop that `mercato up --split` runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import msgspec
from pydantic import SecretStr

from mercato import __version__, topology
from mercato.chassis.contract import Unavailable
from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.keys import service_secrets, signing_seed
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.discovery.leased import StoreRefused
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports import Remote
from mercato.chassis.rpc.trust import TokenSigner, Trust
from mercato.cli import environment
from mercato.cli.databases import shop_secret
from mercato.cli.registries import ETCD_ROOT
from mercato.cli.settings import load
from mercato.cli.split import read_record
from mercato.cli.starting import CannotStart

FROM_ENVIRONMENT: Final = "the environment"
ONE_REGISTRY: Final = (
    "MERCATO_REGISTRY={}, a MERCATO_REGISTRY_URL of the same cluster, and the same MERCATO_PUBLIC_KEYS"
)
LIST_ETCD: Final = f"etcdctl get --prefix {ETCD_ROOT}"
REGISTRIES: Final = {
    "static": ("a static list", "add its address to MERCATO_SERVICES"),
    "dns": ("DNS", "look whether its name in MERCATO_SERVICES has addresses"),
    "mdns": (
        "mDNS",
        "look whether its process has MERCATO_REGISTRY=mdns, the same MERCATO_PUBLIC_KEYS, and a MERCATO_RPC_ADDRESS "
        "on the network of this one",
    ),
    "etcd": ("etcd", f"look whether its process has {ONE_REGISTRY.format('etcd')}; `{LIST_ETCD}` shows all"),
    "consul": ("Consul", f"look whether its process has {ONE_REGISTRY.format('consul')}"),
}
"""The name of a registry in messages, and what to check if it does not list a service."""
WAY_OUT: Final = "where its processes are by NATS_URL or MERCATO_SERVICES"


class Operator(msgspec.Struct, frozen=True):
    """The connection of the operator to the processes of a shop."""

    remote: Remote
    registry: str
    """The source of their addresses, in messages."""
    missing: str
    """Where to look if a service is not seen there, as the end of a sentence."""


@contextlib.asynccontextmanager
async def operating(data: Path) -> AsyncGenerator[Operator]:
    """The connection of the operator for the time of the block.

    Raises `CannotStart` if no process can be reached, or `SettingsError`.
    """
    settings = load(config.ServeSettings)
    source = FROM_ENVIRONMENT
    if settings.nats_url is None and not settings.services and settings.registry in ("static", "dns"):
        source = f"the shop in {data}"
        settings = _of_folder(data, settings)
    secret = operator_secret(data, settings)
    registry, remote, missing = _remote(settings, secret)
    try:
        await remote.open()
        yield Operator(remote, f"{registry}, by {source}", missing)
    except StoreRefused as error:
        raise CannotStart(str(error)) from error
    except Unavailable as error:
        raise CannotStart(f"{error} Is it running, and is it the one that {source} names?") from error
    finally:
        await remote.close()


def _of_folder(data: Path, settings: config.ServeSettings) -> config.ServeSettings:
    record = read_record(data)
    if record is None or not (record.nats_url or record.services):
        raise CannotStart(
            f"no shop that is split runs on {data}: start it with `mercato up --split`, or name {WAY_OUT}"
        )
    nats_url = SecretStr(record.nats_url) if record.nats_url else None
    found = {"nats_url": nats_url, "services": record.services, "rpc_transport": record.transport or "auto"}
    return settings.model_copy(update=found)


def operator_secret(data: Path, settings: config.ServeSettings) -> bytes:
    """The secret of the operator: from the environment, else derived from the secret of the shop."""
    with contextlib.suppress(config.SettingsError):
        return environment.secret_of(topology.OPERATOR, alone=True)
    return service_secrets(shop_secret(data, settings), [topology.OPERATOR])[topology.OPERATOR]


def _remote(settings: config.ServeSettings, secret: bytes) -> tuple[str, Remote, str]:
    """The connection: its name in messages, the `Remote`, and what to check if a service is not listed."""
    clock, name = SystemClock(), topology.OPERATOR
    signers = {name: TokenSigner(name, signing_seed(secret), clock)}
    stats = Stats(name, __version__)

    def no_trust(services: object) -> Trust:
        return Trust([], {}, {}, clock, Telemetry())

    if settings.carrier == "nats":
        from mercato.chassis.rpc.transports.nats import NatsRemote
        from mercato.cli import nats

        connections = nats.connections({name: secret}, settings)
        where = f"NATS at {connections[name].address}"
        remote = NatsRemote(connections, signers, no_trust, clock, stats, metadata={})
        return where, remote, "look into its log for `nats_not_connected` or `nats_refused`"
    if settings.carrier == "grpc":
        from mercato.cli import over_grpc

        by, missing = REGISTRIES[settings.registry]
        remote = over_grpc.connected(settings, signers, no_trust, clock, stats, serves=False)
        return f"{by} over gRPC", remote, missing
    from mercato.chassis.rpc.transports.http.remote import HttpRemote

    tls, _ = environment.contexts(settings)
    by, missing = REGISTRIES[settings.registry]
    registry, _ = environment.registry(settings)
    names = environment.server_name_of(settings)
    remote = HttpRemote(registry, signers, no_trust, clock, stats, tls=tls, server_name=names)
    return f"{by} over HTTP", remote, missing
