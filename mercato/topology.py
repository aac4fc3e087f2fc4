"""Which services there are, what this process hosts, and how it reaches the rest.

Only this module knows all services. A service is added by a line in `SERVICES`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from mercato import __version__
from mercato.chassis.contract import SERVICE_ROLE, Actor, Contract, Empty as EmptyRequest, Operation, current
from mercato.chassis.hosting.host import GATEWAY, Hosting
from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.hosting.service import Build
from mercato.chassis.http import HttpLimits, HttpServer, LoadLimits, allow_descriptors
from mercato.chassis.messaging.outbox import event_log
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.client import acting
from mercato.chassis.rpc.trust import Grant
from mercato.contracts.events import Events
from mercato.contracts.inventory import Inventory
from mercato.contracts.money import DEFAULT_CURRENCY
from mercato.contracts.orders import Orders
from mercato.contracts.payments import Payments
from mercato.contracts.processes import Processes
from mercato.contracts.products import Products
from mercato.contracts.roles import ALL_ROLES, STAFF_ONLY
from mercato.contracts.users import Users
from mercato.gateway import access_log
from mercato.gateway.app import Gateway
from mercato.gateway.asgi import Asgi
from mercato.gateway.auth import Authenticator, Verifier, own_hosts
from mercato.gateway.cross_origin import CrossOrigin
from mercato.gateway.early import EarlyRefusals
from mercato.gateway.ended_sessions import READ_EVERY_SECONDS, READ_SECONDS, RETRY_SECONDS, EndedSessionsLog
from mercato.gateway.pages import Pages
from mercato.gateway.route import Route
from mercato.gateway.routes import ROUTES
from mercato.gateway.shared_counts import SharedCounts
from mercato.gateway.streams.limits import StreamLimits
from mercato.simulators.bank.contract import Sandbox

if TYPE_CHECKING:
    from mercato.chassis.grpc import GrpcLimits
    from mercato.chassis.rpc.transports.nats import Permissions

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
"""The contracts by name, which is also that of the database, of the role, and of the folder in `services/`."""

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
        Products.find,
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
        Payments.capture_part,
        Payments.void,
        Payments.refund,
        Payments.get,
        Payments.list,
        Payments.trace,
        Payments.assign,
    ),
    "events": (),
}
"""The operations of others that each service may call: its clients, and the called servers, refuse all others.

The event logs that a service reads are in `READS`. The gateway calls the operations of its routes.
"""

READS: Final[Mapping[str, tuple[str, ...]]] = {
    "users": ("orders", "products"),
    "products": ("inventory",),
    "events": ("inventory", "orders", "payments", "products"),
}
"""The services whose event logs a service reads."""

SIMULATORS: Final[Mapping[str, str]] = {"sandbox": "bank"}
"""The services that simulate an external system, with their folder in `simulators/`."""

VERIFYING: Final = (Users.keys, Users.ended_sessions)
"""The operations that every process with routes calls, to verify access tokens."""

OPERATOR: Final = "operator"
"""The caller for a person at the command line, in the role of staff."""

CALLERS: Final = (GATEWAY, OPERATOR, *SERVICES)

SUBSCRIBER: Final = "subscriber"
"""The user of NATS that is no caller: it only reads the stream of the feed."""

NATS_USERS: Final = (*CALLERS, SUBSCRIBER)

OTHER_DESCRIPTORS: Final = 512
"""Files and sockets of a process besides the connections of its clients: databases, other processes, logs."""

DRAIN_SECONDS: Final = 2.0
"""How long running requests may take at the end of a process, which as a whole has five seconds."""


def builds(names: Sequence[str] = tuple(SERVICES)) -> dict[str, Build]:
    """The `build` of each service, imported here, so that a process imports only the services that it hosts."""
    return {name: importlib.import_module(f"{package(name)}.app").build for name in names}


def may_call(service: str) -> Collection[str]:
    """The operations of others that a service calls, by full name."""
    return frozenset(operation.full_name for operation in CALLS[service])


def called_by(caller: str) -> Sequence[Operation[Any, Any]]:
    """All operations that the gateway, the operator or a service calls in other processes, event logs among them.

    Every process with routes verifies access tokens by operations of users (`VERIFYING`).
    """
    if caller == OPERATOR:
        contracts = (*SERVICES.values(), Processes)
        return [operation for contract in contracts for operation in contract.operations.values()]
    if caller == GATEWAY:
        return [*(operation for route in ROUTES for operation in route.operations), Events.follow, *VERIFYING]
    own = () if caller == Users.service else VERIFYING
    return [*CALLS[caller], *own, *(event_log(source).read for source in READS.get(caller, ()))]


def grants() -> Mapping[str, Grant]:
    """What each caller may do, by its name; only services call for the shop itself."""
    roles = {GATEWAY: ALL_ROLES, OPERATOR: STAFF_ONLY}
    return {
        caller: Grant(frozenset(operation.full_name for operation in called_by(caller)), roles.get(caller))
        for caller in CALLERS
    }


def nats_permissions(user: str) -> Permissions:
    """The permissions of one of `NATS_USERS`."""
    # Imported here: it imports a client library that a shop in one process does not need.
    from mercato.chassis.messaging.stream import BRIDGE_PUBLISHES, subscriber_permissions
    from mercato.chassis.rpc.transports.nats import permissions

    if user == SUBSCRIBER:
        return subscriber_permissions(user)
    caller = user
    serves = (SERVICES[caller], event_log(caller)) if caller in SERVICES else ()
    reads = READS.get(caller, ())
    return permissions(
        caller,
        serves=serves,
        calls=called_by(caller),
        reads=reads,
        watches=caller == OPERATOR,
        besides=BRIDGE_PUBLISHES if caller == Events.service else (),
    )


def package(name: str) -> str:
    """The package that holds a service."""
    return f"mercato.simulators.{SIMULATORS[name]}" if name in SIMULATORS else f"mercato.services.{name}"


def migrations(name: str) -> Path:
    """The folder with the migrations of a service."""
    return Path(__file__).parent.joinpath(*package(name).split(".")[1:], "migrations")


def _services_of(route: Route) -> Iterator[str]:
    """The services that a route needs."""
    yield route.operation.service
    yield from (part.operation.service for part in route.parts)
    if route.stream:
        yield Events.service


def _offered(route: Route, services: Collection[str]) -> Route:
    """A route as a process with these services has it: without guests, where another service knows theirs."""
    if route.guest_operation is None or route.guest_operation.service in services:
        return route
    return msgspec.structs.replace(route, guest_operation=None, takes_access_token=False)


def gateway(
    host: Hosting,
    *,
    open_to: tuple[str, int] | None,
    log_requests: bool = False,
    slow_seconds: float = access_log.SLOW_SECONDS,
    details: Callable[[], Mapping[str, Any]] = dict,
    services: Collection[str] = tuple(SERVICES),
    caller: str = GATEWAY,
    problems: Callable[[], Awaitable[Mapping[str, str]]] | None = None,
    own_problems: Callable[[], Awaitable[Mapping[str, str]]] | None = None,
    currency: str = DEFAULT_CURRENCY,
    load: LoadLimits | None = None,
    cors_origins: Sequence[str] = (),
    metrics_token: str = "",
    counts: int | None = None,
    streams: StreamLimits | None = None,
) -> Gateway:
    """The routes of the public API that need only `services`. `open_to`: the address of a shop that requires no tokens.

    `/health/ready` shows `details` and `problems`, by default those of the databases, `/health/self` `own_problems`;
    with a problem, or while it does not know which sessions have ended, the process is not ready. `caller` is the name
    under which the gateway calls services. `cors_origins`: the origins whose pages may call the API from a browser.
    `metrics_token` gives access to `/metrics`. `counts`: the file in which the gateways of a machine count together.
    """
    host.telemetry.describe_process(__version__)
    routes = [_offered(route, services) for route in ROUTES if set(_services_of(route)) <= set(services)]
    ended = _followed_sessions(host, caller)
    verifier = Verifier(lambda: host.client(Users, caller).keys(EmptyRequest()), ended, host.clock)
    authenticator = Authenticator(verifier, own_hosts(*open_to) if open_to else None, cors_origins)
    pages = Pages(
        routes=routes,
        authenticator=authenticator,
        verifier=verifier,
        telemetry=host.telemetry,
        problems=functools.partial(_problems, problems or host.problems, ended, caller),
        own_problems=functools.partial(_problems, own_problems or host.problems, ended, caller),
        details=details,
        metrics_token=metrics_token,
    )
    return Gateway(
        routes,
        client=lambda operation: getattr(host.client(SERVICES[operation.service], caller), operation.name),
        authenticator=authenticator,
        telemetry=host.telemetry,
        clock=host.clock,
        fallback=pages,
        currency=currency,
        log_requests=log_requests,
        slow_seconds=slow_seconds,
        load=load,
        cross_origin=CrossOrigin(cors_origins) if cors_origins else None,
        counts=SharedCounts(host.clock.monotonic, counts),
        streams=streams,
    )


def _followed_sessions(host: Hosting, caller: str) -> EndedSessionsLog:
    """The ended sessions, which a periodic task of `host` reads from users."""
    ended = EndedSessionsLog(lambda request: host.client(Users, caller).ended_sessions(request), host.clock)
    follow = PeriodicTask(
        "follow ended sessions",
        ended.follow,
        READ_EVERY_SECONDS,
        round_seconds=READ_SECONDS,
        longest_retry_seconds=RETRY_SECONDS,
    )
    host.also_run(caller, follow)
    return ended


async def _problems(
    find: Callable[[], Awaitable[Mapping[str, str]]], ended: EndedSessionsLog, caller: str
) -> Mapping[str, str]:
    """The problems of the process, and of `caller` if it does not know which sessions have ended."""
    found = await find()
    reason = ended.problem()
    return {**found, caller: reason} if reason and not found.get(caller) else found


def server(
    app: Asgi,
    listener: socket.socket,
    telemetry: Telemetry,
    on_ready: Callable[[], None],
    *,
    drain_seconds: float = DRAIN_SECONDS,
    limits: HttpLimits | None = None,
) -> HttpServer:
    """An HTTP server for `app` on a listening socket."""

    limits = limits or HttpLimits(drain_seconds=drain_seconds)
    places = limits.connections + (app.stream_limits.streams if isinstance(app, Gateway) else 0)
    allow_descriptors(places + OTHER_DESCRIPTORS)
    refused = "Requests refused before they reached a route."
    refusals = telemetry.counter("mercato_http_requests_refused", refused, ["code"])
    cross_origin = app.cross_origin if isinstance(app, Gateway) else None

    return HttpServer(
        app,
        sockets=[listener],
        limits=limits,
        on_ready=on_ready,
        on_refused=lambda code: refusals.labels(code).inc(),
        early=EarlyRefusals(app) if isinstance(app, Gateway) else None,
        headers=[(b"x-content-type-options", b"nosniff")],
        refusal_headers=cross_origin.lines_of_refusal if cross_origin else None,
    )


@contextlib.asynccontextmanager
async def public_grpc(
    gateway: Gateway,
    telemetry: Telemetry,
    host: str,
    port: int,
    *,
    services: Collection[str] = tuple(SERVICES),
    certificate: tuple[Path, Path] | None = None,
    reuse_port: bool = False,
    limits: GrpcLimits | None = None,
) -> AsyncGenerator[str]:
    """Serves the public operations of `services` over gRPC as `gateway` does over HTTP; gives the address.

    `certificate`: the files of a certificate and its key, for TLS. Raises `CannotListen`, `OSError` or `ValueError` for
    files that are no certificate, and `ModuleNotFoundError` where gRPC is not installed.
    """
    # Imported here: it is slow, and most processes have no port for gRPC.
    from mercato.chassis.grpc import GrpcTls
    from mercato.gateway.grpc.serving import serving

    tls = GrpcTls.read(*certificate) if certificate else None
    answering = serving(
        gateway,
        host,
        port,
        contracts=SERVICES,
        services=services,
        telemetry=telemetry,
        tls=tls,
        reuse_port=reuse_port,
        limits=limits,
    )
    async with answering as address:
        yield address


async def as_the_shop(host: Hosting, call: Callable[[], Awaitable[T]], seconds: float = 30.0) -> T:
    """Runs a call that serves no request, such as a step of the start, with the rights of a service."""
    token = current.set(acting(Actor(SERVICE_ROLE), clock=host.clock, seconds=seconds))
    try:
        return await call()
    finally:
        current.reset(token)
