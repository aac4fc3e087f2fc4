"""The types of options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

DataFolder = Annotated[Path, Parameter(env_var="MERCATO_DATA")]
ListenHost = Annotated[str, Parameter(env_var="MERCATO_LISTEN_HOST")]
ListenPort = Annotated[int, Parameter(env_var="MERCATO_LISTEN_PORT", validator=validators.Number(gte=0, lte=65_535))]
Authorization = Annotated[Literal["open", "required"] | None, Parameter(env_var="MERCATO_AUTH")]
Origins = Annotated[tuple[str, ...], Parameter(negative="")]
Servers = Annotated[
    tuple[str, ...],
    Parameter(
        help="An administrator's DSN of the shop's server, where that is not the embedded one; SERVICE,SERVICE=DSN for "
        "each of several. [env: MERCATO_POSTGRES_DSN, with spaces between]",
        show_default=False,
        negative="",
    ),
]
LogLevel = Literal["debug", "info", "warning", "error"]

Carrier = Literal["nats", "http", "grpc"]
"""How processes call each other."""

Who = Annotated[str, Parameter(help="The account's e-mail address, or its id.")]
AccountsData = Annotated[
    Path, Parameter(env_var="MERCATO_DATA", help="The folder of the shop's data, of a shop that runs or not.")
]
AsJson = Annotated[bool, Parameter(negative="", help="Print one JSON document.")]


@Parameter(name="*")
@dataclass(frozen=True)
class GrpcOptions:
    """The port for clients over gRPC."""

    grpc_port: Annotated[
        int | None,
        Parameter(
            env_var="MERCATO_GRPC_PORT",
            validator=validators.Number(gte=0, lte=65_535),
            help="The port for the public operations over gRPC; 0 takes a free one. [default: none]",
        ),
    ] = None
    grpc_cert: Annotated[
        Path | None,
        Parameter(
            env_var="MERCATO_GRPC_CERT",
            help="The certificate (PEM) of that port, for TLS. [default: without encryption]",
        ),
    ] = None
    grpc_key: Annotated[
        Path | None, Parameter(env_var="MERCATO_GRPC_KEY", help="The key (PEM) of that certificate.")
    ] = None
