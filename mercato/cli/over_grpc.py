"""Connects the processes of a shop to each other over gRPC. Its libraries are imported here, where it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from mercato.chassis.hosting.settings import ServeSettings
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports import Remote
from mercato.chassis.rpc.trust import TokenSigner, Trust
from mercato.cli import environment

CHOSEN_BY = "The setting MERCATO_RPC_TRANSPORT=grpc"


def connected(
    settings: ServeSettings,
    signers: Mapping[str, TokenSigner],
    trust_of: Callable[[Collection[str]], Trust],
    clock: Clock,
    stats: Stats,
    *,
    serves: bool,
) -> Remote:
    """The connection of this process. Without `serves`, it accepts no calls. Raises `SettingsError`."""
    environment.require_grpc(CHOSEN_BY)
    from mercato.chassis.grpc import GrpcTls
    from mercato.chassis.rpc.transports.grpc.remote import GrpcRemote

    files = environment.pem_files(settings)
    registry, registrar = environment.registry(settings)
    listen_at = None
    if serves:
        listen_at = environment.rpc_address(settings)
        what = "The setting MERCATO_RPC_ADDRESS"
        environment.require_encryption(what, listen_at[0], settings, is_encrypted=files is not None)
    return GrpcRemote(
        registry,
        signers,
        trust_of,
        clock,
        stats,
        registrar=registrar if serves else None,
        listen_at=listen_at,
        ca=files and files[0],
        tls=files and GrpcTls(files[1], files[2]),
        server_name=environment.server_name_of(settings),
    )
