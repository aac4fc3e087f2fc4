"""The parts of a service: `build(env)` in its `app.py` takes an `Env` and gives a `Service`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from mercato.chassis.contract import Contract
from mercato.chassis.messaging.events import Subscription
from mercato.chassis.observability.clock import Clock, Randomness
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database
from mercato.chassis.rpc.client import Clients
from mercato.chassis.rpc.server import Server

from .options import OptionsReader
from .periodic import PeriodicTask

C = TypeVar("C", bound=Contract)


class Env(msgspec.Struct, frozen=True):
    """Everything that a service gets from its host. It uses nothing else of the process."""

    database: Database
    client: Clients
    clock: Clock
    randomness: Randomness
    telemetry: Telemetry
    derive_key: Callable[[str], bytes]
    """32 secret bytes for a purpose, the same in every process of this service, and known to no other service."""
    options: OptionsReader
    """`env.options(Options)`: what the operator has set for this service."""


class Service(msgspec.Struct, frozen=True):
    """A built service, ready to be opened."""

    server: Server
    database: Database
    tasks: tuple[PeriodicTask, ...] = ()
    """Run for as long as the service is open, and cancelled before it closes."""
    has_outbox: bool = False
    """Whether its database has an outbox, whose event log the host then serves."""
    subscriptions: tuple[Subscription, ...] = ()
    """Its consumers. Their names are unique in the whole shop."""
    seed_demo: Callable[[], Awaitable[bool]] | None = None
    """Puts the demo data into an empty database. Does nothing, and gives False, if the database has data."""
    close: Callable[[], None] | None = None
    """Frees what the service itself holds, such as threads."""
    drain: Callable[[], None] | None = None
    """Makes operations that wait answer soon: the process accepts no more calls, and ends when all are answered."""


Build = Callable[[Env], Service]
