"""A server that takes no writes, or no connections, under a shop that runs: it says so, reads go on, it recovers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from pathlib import Path

import asyncpg
import pytest

from mercato.testing.caller import Caller
from mercato.testing.process import Process
from mercato.testing.waiting import BOUND_SECONDS, wait_until


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_a_server_that_becomes_read_only_is_reported_and_reads_continue(data: Path, workers: str):
    with Process(data, "--workers", workers) as shop, shop.ready().caller() as caller:
        order_id = caller.order().json["id"]
        with administrator(shop) as server:
            server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            server.execute("SELECT pg_reload_conf()")
            wait_until(lambda: caller.get("/health/ready").status == 503, BOUND_SECONDS)
            reasons = caller.get("/health/ready").json["reasons"]
            assert set(reasons.values()) == {"its database is read-only"}

            assert caller.order().status == 503
            assert caller.get(f"/orders/{order_id}").status == 200
            assert caller.get("/products").status == 200

            server.execute("ALTER SYSTEM RESET default_transaction_read_only")
            server.execute("SELECT pg_reload_conf()")
        wait_until(lambda: caller.get("/health/ready").status == 200, BOUND_SECONDS)
        wait_until(lambda: caller.order().status == 201, BOUND_SECONDS)
        shop.stop()


def test_a_server_without_a_free_connection_is_reported_and_reads_continue(data: Path):
    with Process(data) as shop, shop.ready().caller() as caller:
        assert caller.order().status == 201
        with administrator(shop) as server:
            wait_until(lambda: is_starved(server, caller), BOUND_SECONDS, lambda: str(reasons_of(caller)))

            assert caller.order().status == 503
            assert caller.get("/products").status == 200
        wait_until(lambda: caller.get("/health/ready").status == 200, BOUND_SECONDS)
        wait_until(lambda: caller.order().status == 201, BOUND_SECONDS)
        shop.stop()


def is_starved(server: Administrator, caller: Caller) -> bool:
    """Takes the connections of orders, which may get some again meanwhile; whether it has none, and says so."""
    server.take_all_connections()
    # What a service has, it keeps; orders has to connect anew.
    closed = server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'mercato_orders'")
    server.take_all_connections()
    reason = "its database has no connection left, for others have all of them"
    return closed == "SELECT 0" and reasons_of(caller).get("orders") == reason


def reasons_of(caller: Caller) -> dict[str, str]:
    return caller.get("/health/ready").json.get("reasons", {})


class Administrator:
    """A superuser of the server of a shop, whose sessions write even where the default is read-only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, dsn: str) -> None:
        self._loop = loop
        self._dsn = dsn
        self._connections: list[asyncpg.Connection] = []
        self._connect()

    def _connect(self) -> None:
        self._connections.append(self._loop.run_until_complete(asyncpg.connect(self._dsn)))

    def execute(self, statement: str) -> str:
        """Its command tag, such as `SELECT 2`."""
        return self._loop.run_until_complete(self._connections[0].execute(statement))

    def take_all_connections(self) -> None:
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            while True:
                self._connect()

    def close(self) -> None:
        for connection in self._connections:
            self._loop.run_until_complete(connection.close())


@contextlib.contextmanager
def administrator(shop: Process) -> Generator[Administrator]:
    loop = asyncio.new_event_loop()
    server = Administrator(loop, shop.admin_dsn)
    try:
        yield server
    finally:
        server.close()
        loop.close()
