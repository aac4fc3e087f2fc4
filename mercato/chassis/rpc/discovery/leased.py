"""A registry of records that expire: the common part of etcd and Consul.

The parts
    A process has one `ProcessRecord`, with all contracts that it serves. A `Store` (`etcd.py`, `consul.py`) keeps the
    records of all processes, each until its TTL is over. `LeasedRegistry` has the memory and the listeners, and two
    tasks: one follows the records of all, one renews the record of this process.

Guaranteed
    - A process that dies is out of the list when its TTL is over; one that closes or drains, at once.
    - While the store does not answer, the instances known last stay in use, and `problem` says so.
    - A record that was lost, because the process was paused for longer than its TTL or the store was emptied, is
      written again with the next renewal.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

import msgspec
import structlog

from . import Instance
from .static import ADDRESS, SERVICE_NAME

TTL_SECONDS: Final = 10
RENEWALS: Final = 4
"""Renewals in a TTL. One that fails is repeated soon, so that a record outlives an endpoint that does not answer."""
HOLD_SECONDS: Final = 3.0
"""The deadline of one renewal, with all its requests."""
CLOSE_SECONDS: Final = 1.0
"""The deadline of `close`, which deregisters what `drain` could not: a process ends within ten seconds."""
FIRST_SECONDS: Final = 3.0
"""`open` waits so long for the first answer of a store."""
RETRY_SECONDS: Final = 1.0
REFUSED_SECONDS: Final = 5.0
"""The pause before a store that refuses is asked again: each time it has to check a password."""
JITTER_SHARE: Final = 0.25
"""The part of a pause that may be cut at random, so that many processes do not all retry at one moment."""

log = structlog.stdlib.get_logger("mercato.discovery")


class ProcessRecord(msgspec.Struct, frozen=True):
    """The address at which one process accepts calls, and the contracts that it serves."""

    id: str
    address: str
    services: tuple[str, ...]
    version: str = ""


class StoreUnavailable(Exception):
    """A store does not answer, or not as expected. The message is a sentence without its full stop."""


class StoreRefused(StoreUnavailable):
    """A store does not accept the user, the password or the token of this process; an operator must fix it."""


class Store(Protocol):
    """Keeps records, each until its TTL is over. The other methods are called one at a time while `follow` runs."""

    async def open(self) -> None:
        """Prepares the store; it does not connect yet."""
        ...

    async def close(self) -> None: ...

    async def hold(self, records: Sequence[ProcessRecord]) -> None:
        """Stores exactly these records of this process for the next TTL; others of it end. Raises as `follow`."""
        ...

    def follow(self) -> AsyncGenerator[Sequence[ProcessRecord]]:
        """Yields the records of all processes: at once, and again after each change.

        Raises `StoreUnavailable`, or `StoreRefused`.
        """
        ...


class LeasedRegistry:
    """A `Registry` and a `Registrar`. It belongs to one event loop."""

    def __init__(self, store: Store, *, ttl_seconds: float = TTL_SECONDS, first_seconds: float = FIRST_SECONDS) -> None:
        self._store = store
        self._renew_seconds = ttl_seconds / RENEWALS
        self._first_seconds = first_seconds
        self._instances: Mapping[str, tuple[Instance, ...]] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._wanted: frozenset[Instance] = frozenset()
        self._attempted: frozenset[Instance] = frozenset()
        """The records that were last sent to the store, with or without an answer."""
        self._holding = asyncio.Lock()
        self._first = asyncio.Event()
        """Set by the first answer, or the first failure, of `Store.follow`."""
        self._find_error: StoreUnavailable | None = None
        self._hold_error: StoreUnavailable | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Returns when the instances are known, or without any if the store does not answer in time.

        Raises `StoreRefused`.
        """
        await self._store.open()
        self._tasks = [
            asyncio.create_task(self._follow(), name="follow instances"),
            asyncio.create_task(self._renew(), name="renew the record of this process"),
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._first_seconds):
                await self._first.wait()
        if isinstance(self._find_error, StoreRefused):
            raise self._find_error

    async def close(self) -> None:
        """Deregisters what is still registered."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._wanted = frozenset()
        if self._attempted or self._hold_error is not None:
            await self._hold(CLOSE_SECONDS)
        await self._store.close()

    def instances(self, service: str) -> Sequence[Instance]:
        return self._instances.get(service, ())

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        self._listeners.append(changed)

        def end() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(changed)

        return end

    def problem(self) -> str:
        if self._find_error is not None:
            return f"{self._find_error}; the instances that were known last stay in use."
        if self._hold_error is not None:
            return f"{self._hold_error}; others may not find this process."
        return ""

    async def register(self, instance: Instance) -> None:
        """As in `Registrar`; if the store does not answer, other processes find it as soon as the store does."""
        self._wanted |= {instance}
        await self._publish()

    async def deregister(self, instance: Instance) -> None:
        self._wanted -= {instance}
        await self._publish()

    # -------------------------------------------------------------------------------------------------- this process

    async def _publish(self) -> None:
        # After one turn of the loop, so that all registrations of this turn are one request.
        await asyncio.sleep(0)
        async with self._holding:
            if self._attempted != self._wanted:
                await self._hold()

    async def _renew(self) -> None:
        while True:
            failed = self._hold_error is not None
            await asyncio.sleep(_jittered(min(RETRY_SECONDS, self._renew_seconds) if failed else self._renew_seconds))
            async with self._holding:
                await self._hold()

    async def _hold(self, seconds: float = HOLD_SECONDS) -> None:
        self._attempted = self._wanted
        try:
            async with asyncio.timeout(seconds):
                await self._store.hold(_records(self._wanted))
        except StoreUnavailable as error:
            self._not_held(error)
        except TimeoutError:
            self._not_held(StoreUnavailable("the registry does not answer in time"))
        except Exception:
            log.exception("instance_not_registered")
            self._not_held(StoreUnavailable("the registry cannot be understood"))
        else:
            if self._hold_error is not None:
                log.info("instance_registered_again")
            self._hold_error = None

    def _not_held(self, error: StoreUnavailable) -> None:
        if self._hold_error is None:
            log.warning("instance_not_registered", reason=str(error))
        self._hold_error = error

    # --------------------------------------------------------------------------------------------------- all processes

    async def _follow(self) -> None:
        while True:
            try:
                async with contextlib.aclosing(self._store.follow()) as states:
                    async for records in states:
                        self._found(records)
            except StoreUnavailable as error:
                self._lost(error)
            except Exception:
                log.exception("registry_not_understood")
                self._lost(StoreUnavailable("the registry cannot be understood"))
            self._first.set()
            refused = isinstance(self._find_error, StoreRefused)
            await asyncio.sleep(_jittered(REFUSED_SECONDS if refused else RETRY_SECONDS))

    def _lost(self, error: StoreUnavailable) -> None:
        if self._find_error is None:
            log.warning("registry_not_reached", reason=str(error))
        self._find_error = error

    def _found(self, records: Iterable[ProcessRecord]) -> None:
        if self._find_error is not None:
            log.info("registry_reached_again")
        self._find_error = None
        before, self._instances = self._instances, _by_service(records)
        self._first.set()
        for service in sorted(before.keys() | self._instances.keys()):
            now = self._instances.get(service, ())
            if now != before.get(service, ()):
                log.info("instances_changed", service=service, addresses=[instance.address for instance in now])
                for listener in tuple(self._listeners):
                    listener(service)


def _records(instances: Iterable[Instance]) -> Sequence[ProcessRecord]:
    services: dict[tuple[str, str, str], list[str]] = {}
    for instance in instances:
        services.setdefault((instance.id, instance.address, instance.version), []).append(instance.service)
    return [
        ProcessRecord(id_, at, tuple(sorted(names)), version) for (id_, at, version), names in sorted(services.items())
    ]


def _by_service(records: Iterable[ProcessRecord]) -> Mapping[str, tuple[Instance, ...]]:
    """The valid instances by service. Records are checked, because this process connects to their addresses."""
    found: dict[str, set[Instance]] = {}
    for record in records:
        if not record.id or not ADDRESS.fullmatch(record.address):
            log.warning("service_not_resolved", name=record.address, reason="malformed")
            continue
        for name in filter(SERVICE_NAME.fullmatch, record.services):
            found.setdefault(name, set()).add(Instance(name, record.address, record.id, record.version))
    return {name: tuple(sorted(some, key=lambda one: (one.address, one.id))) for name, some in found.items()}


def _jittered(seconds: float) -> float:
    return seconds * (1.0 - JITTER_SHARE * random.random())
