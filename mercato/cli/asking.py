"""Asks each process of a running shop, at the address that it has for the operator.

The addresses are given (`--at`), else they stand in the data folder of a shop that `mercato up` runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from mercato import __version__, topology
from mercato.chassis.contract import Actor, ServiceError, current
from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.keys import signing_seed
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.client import Connector, acting
from mercato.chassis.rpc.discovery.static import StaticRegistry
from mercato.chassis.rpc.transports.http.client import HttpTransport
from mercato.chassis.rpc.trust import TokenSigner
from mercato.cli import environment
from mercato.cli.operator import operator_secret
from mercato.cli.settings import load
from mercato.cli.split import read_record
from mercato.cli.starting import CannotStart
from mercato.contracts.processes import Processes
from mercato.contracts.roles import STAFF

A = TypeVar("A")

ANSWER_SECONDS: Final = 5.0


class AskedProcess(msgspec.Struct, frozen=True):
    """One process, as the operator calls it."""

    name: str
    client: Processes


@contextlib.asynccontextmanager
async def asking(data: Path, at: Sequence[str] = ()) -> AsyncGenerator[Sequence[AskedProcess]]:
    """The processes of a shop for the time of the block. Raises `CannotStart` without one, or `SettingsError`."""
    settings = load(config.ServeSettings)
    where = {_checked(address): address for address in at} or _recorded(data)
    clock, telemetry = SystemClock(), Telemetry()
    signer = TokenSigner(topology.OPERATOR, signing_seed(operator_secret(data, settings)), clock)
    tls, _ = environment.contexts(settings)
    connector = Connector(clock, telemetry)
    transports: list[HttpTransport] = []
    try:
        asked: list[AskedProcess] = []
        for name, address in where.items():
            registry = StaticRegistry.of({Processes.service: address}, setting="--at")
            transport = HttpTransport(registry, signer, clock, version=__version__, tls=tls)
            transports.append(transport)
            asked.append(AskedProcess(name, connector.client(Processes, transport)))
        yield asked
    finally:
        await connector.close()
        for transport in transports:
            await transport.close()


def _checked(address: str) -> str:
    if environment.host_and_port(address) is None:
        raise CannotStart(f"--at has {address!r}: write it as in 127.0.0.1:9190")
    return address


def _recorded(data: Path) -> Mapping[str, str]:
    record = read_record(data)
    if record is None or not record.diagnostics:
        raise CannotStart(
            f"no shop runs on {data}: start it with `mercato up`, or name with --at the addresses of its processes "
            "(MERCATO_DIAGNOSTICS_ADDRESS)"
        )
    return record.diagnostics


async def each(
    asked: Sequence[AskedProcess], ask: Callable[[Processes], Awaitable[A]]
) -> tuple[Mapping[str, A], Mapping[str, str]]:
    """The answer of each process that gives one, by name; and why the others do not."""
    given: dict[str, A] = {}
    missing: dict[str, str] = {}

    async def one(process: AskedProcess) -> None:
        token = current.set(acting(Actor(STAFF), clock=SystemClock(), seconds=ANSWER_SECONDS))
        try:
            given[process.name] = await ask(process.client)
        except ServiceError as error:
            missing[process.name] = str(error)
        finally:
            current.reset(token)

    await asyncio.gather(*map(one, asked))
    return given, missing
