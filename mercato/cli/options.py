"""The types of options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

DataFolder = Annotated[Path, Parameter(env_var="MERCATO_DATA")]
ListenHost = Annotated[str, Parameter(env_var="MERCATO_LISTEN_HOST")]
ListenPort = Annotated[int, Parameter(env_var="MERCATO_LISTEN_PORT", validator=validators.Number(gte=0, lte=65_535))]
Authorization = Annotated[Literal["open", "required"] | None, Parameter(env_var="MERCATO_AUTH")]
Origins = Annotated[tuple[str, ...], Parameter(negative="")]
LogLevel = Literal["debug", "info", "warning", "error"]

Carrier = Literal["nats", "http", "grpc"]
"""How processes call each other."""
