"""Which services there are, what this process hosts, and how it reaches the rest.

Everything that knows all services is here. A service is added by a line in `SERVICES`.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from mercato.chassis.contract import SERVICE_ROLE, Actor, Call, Contract, Empty as EmptyRequest, Operation, current
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.service import Build
from mercato.chassis.http import HttpLimits, HttpServer
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.client import acting
from mercato.contracts.events import Events
from mercato.contracts.inventory import Inventory
from mercato.contracts.orders import Orders
from mercato.contracts.payments import Payments
from mercato.contracts.products import Products
from mercato.contracts.users import PublicKeys, Users
from mercato.gateway.app import Asgi, Gateway
from mercato.gateway.auth import Authenticator, Verifier, own_hosts
from mercato.gateway.pages import Pages
from mercato.gateway.routes import ROUTES
from mercato.simulators.bank.contract import Sandbox

T = TypeVar("T")

SERVICES: Final[Mapping[str, type[Contract]]] = {
    "users": Users,
    "products": Products,
    "inventory": Inventory,
    "sandbox": Sandbox,
    "payments": Payments,
    "orders": Orders,
    "events": Events,
}
"""By name; the name is that of the database and of the role, and of the folder in `services/`."""

CALLS: Final[Mapping[str, tuple[Operation[Any, Any], ...]]] = {
    "users": (),
    "products": (),
    "inventory": (Products.get,),
    "sandbox": (),
    "payments": (
        Sandbox.authorize,
        Sandbox.charge,
        Sandbox.capture,
        Sandbox.void,
        Sandbox.refund,
        Sandbox.look_up,
        Sandbox.statement,
    ),
    "orders": (
        Users.get,
        Products.quote,
        Inventory.reserve,
        Inventory.commit,
        Inventory.release,
        Inventory.restock,
        Inventory.holds,
        Inventory.trace,
        Payments.check_method,
        Payments.authorize,
        Payments.charge,
        Payments.capture,
        Payments.void,
        Payments.refund,
        Payments.get,
        Payments.list,
        Payments.trace,
    ),
    "events": (),
}
"""The operations of others that each service calls, and no more: a client refuses the rest, and a server its caller.

The event logs that a service reads are those of its subscriptions. The gateway calls what its routes name.
"""

SIMULATORS: Final[Mapping[str, str]] = {"sandbox": "bank"}
"""Those of them that stand in for a system that is not ours, with their folder in `simulators/`."""

DRAIN_SECONDS: Final = 2.0
"""Running requests get so long at the end of a process, which as a whole has five seconds."""


def builds(names: Sequence[str] = tuple(SERVICES)) -> dict[str, Build]:
    """The `build` of each service, imported only now: a process imports what it hosts."""
    return {name: importlib.import_module(f"{package(name)}.app").build for name in names}


def may_call(service: str) -> Collection[str]:
    """The operations of others that a service calls, by full name."""
    return frozenset(operation.full_name for operation in CALLS[service])


def package(name: str) -> str:
    """The package that holds a service."""
    return f"mercato.simulators.{SIMULATORS[name]}" if name in SIMULATORS else f"mercato.services.{name}"


def migrations(name: str) -> Path:
    """The folder with the migrations of a service."""
    return Path(__file__).parent.joinpath(*package(name).split(".")[1:], "migrations")


def gateway(
    host: Host,
    *,
    open_to: tuple[str, int] | None,
    log_requests: bool = False,
    details: Callable[[], Mapping[str, Any]] = dict,
) -> Asgi:
    """The public API over the services of `host`. `open_to`: the address of a shop that asks for no tokens.

    `details` is told by `/health/ready` besides.
    """

    async def fetch_keys() -> PublicKeys:
        return await host.client(Users).keys(EmptyRequest())

    verifier = Verifier(fetch_keys, host.clock)
    authenticator = Authenticator(verifier, own_hosts(*open_to) if open_to else None)
    pages = Pages(
        routes=ROUTES,
        authenticator=authenticator,
        verifier=verifier,
        telemetry=host.telemetry,
        ready=host.ready,
        details=details,
    )

    def client(operation: Operation[Any, Any]) -> Call[Any, Any]:
        return getattr(host.client(SERVICES[operation.service]), operation.name)

    return Gateway(
        ROUTES,
        client=client,
        authenticator=authenticator,
        telemetry=host.telemetry,
        clock=host.clock,
        fallback=pages,
        log_requests=log_requests,
    )


def server(app: Asgi, listener: socket.socket, telemetry: Telemetry, on_ready: Callable[[], None]) -> HttpServer:
    """An HTTP server for `app` on a socket that listens already."""

    refused = "Requests refused before any route saw them."
    refusals = telemetry.counter("mercato_http_requests_refused", refused, ["code"])

    return HttpServer(
        app,
        sockets=[listener],
        limits=HttpLimits(drain_seconds=DRAIN_SECONDS),
        on_ready=on_ready,
        on_refused=lambda code: refusals.labels(code).inc(),
    )


async def as_the_shop(host: Host, call: Callable[[], Awaitable[T]], seconds: float = 30.0) -> T:
    """Runs a call that nobody asked for, such as a step of the start, with the rights of a service."""
    token = current.set(acting(Actor(SERVICE_ROLE), clock=host.clock, seconds=seconds))
    try:
        return await call()
    finally:
        current.reset(token)
