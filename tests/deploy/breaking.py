"""What breaks a running shop, for each alert: a `Scenario` breaks what the alert watches, and undoes it at its end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Literal

import msgspec

from mercato.chassis.postgres.outbox_row import end_of_row
from mercato.operations.copying import SCRATCH
from mercato.services.events.app import CONSUMER
from mercato.services.products.consumers import IN_STOCK
from mercato.services.users.consumers import SECURITY_LOG
from mercato.testing.caller import Caller, Clients
from mercato.testing.command import run_command
from mercato.testing.process import Process
from mercato.testing.tables import connect, rows
from mercato.testing.waiting import wait_until

KNOWN_PRODUCT: Final = 100
REQUESTS_IN_WORK: Final = 40
MINIMUM_CALLS: Final = 30
"""A breaker stays closed while fewer requests of a scenario are under way."""
SETTINGS: Final[Mapping[str, str]] = {
    "MERCATO_AUDIT_SECONDS": "1",
    "MERCATO_PAYMENTS_RECONCILE_SECONDS": "0.5",
    "MERCATO_SANDBOX_STATEMENT_DELAY_SECONDS": "0",
    "MERCATO_REQUESTS_IN_WORK": str(REQUESTS_IN_WORK),
    "MERCATO_BREAKER_MINIMUM_CALLS": str(MINIMUM_CALLS),
}
"""Of the shops: what happens every few minutes happens every second, and limits are within reach of a test."""

_numbers: Final = itertools.count(1)

Kind = Literal["together", "split"]
"""All services in one process, or each in its own."""


class Scenario(msgspec.Struct, frozen=True):
    """`alerts`: those that fire while it is broken, each with the labels that it must have."""

    name: str
    alerts: Mapping[str, Mapping[str, str]]
    broken: Callable[[Process], AbstractContextManager[None]]
    kind: Kind = "together"
    is_undone: bool = True

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})"


# --------------------------------------------------------------------------------------------------------------- means


class Repeating(Clients):
    """So many clients that send a request again and again, until the block ends."""

    def __init__(
        self, shop: Process, send: Callable[[Caller], object], *, count: int = 1, pause_seconds: float = 0.1
    ) -> None:
        super().__init__(count)
        self._callers = [shop.caller() for _ in range(count)]
        self._send = send
        self._pause_seconds = pause_seconds

    def work(self, number: int) -> None:
        with self._callers[number] as caller:
            while not self.stopped.is_set():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    self._send(caller)
                self.stopped.wait(self._pause_seconds)


def look(caller: Caller) -> None:
    caller.get(f"/products/{KNOWN_PRODUCT}")


def sql(dsn: str, *statements: str) -> list[tuple[Any, ...]]:
    """Executes statements, each for itself; gives the rows of the last."""
    found: list[tuple[Any, ...]] = []
    for statement in statements:
        found = asyncio.run(rows(dsn, statement))
    return found


async def executed(dsn: str, script: str) -> None:
    """Executes several statements as one transaction."""
    connection = await connect(dsn)
    try:
        await connection.execute(script)
    finally:
        await connection.close()


@contextlib.contextmanager
def changed(dsn: str, do: str, undo: str) -> Generator[None]:
    """A statement in a database, and for the end one that undoes it."""
    sql(dsn, do)
    try:
        yield
    finally:
        sql(dsn, undo)


@contextlib.contextmanager
def renamed(dsn: str, what: str) -> Generator[None]:
    """A table, or a column as `products.name`, has another name."""
    table, _, column = what.partition(".")
    if column:
        do, undo = (
            f"ALTER TABLE {table} RENAME COLUMN {column} TO other",
            f"ALTER TABLE {table} RENAME other TO {column}",
        )
    else:
        do, undo = f"ALTER TABLE {table} RENAME TO other", f"ALTER TABLE other RENAME TO {table}"
    with changed(dsn, do, undo):
        yield


@contextlib.contextmanager
def locked(dsn: str, table: str) -> Generator[None]:
    """Another session holds a lock with which no statement reads or writes the table."""
    with asyncio.Runner() as runner:
        connection = runner.run(connect(dsn))
        try:
            runner.run(connection.execute(f"BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
            yield
        finally:
            runner.run(connection.close())


@contextlib.contextmanager
def unreachable(shop: Process, database: str) -> Generator[None]:
    """A database that ends its sessions and takes no others."""
    sessions = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
    sql(shop.admin_dsn, f"ALTER DATABASE {database} ALLOW_CONNECTIONS false", sessions)
    try:
        yield
    finally:
        sql(shop.admin_dsn, f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")


def answers(shop: Process, path: str) -> None:
    """Waits until a request succeeds again."""
    with shop.caller() as caller:
        wait_until(lambda: caller.get(path).status == 200)


def register(caller: Caller) -> None:
    """A new account, whose address gets a letter."""
    address = f"alert-{next(_numbers)}@example.com"
    reply = caller.post("/register", {"email": address, "name": "Alert", "password": "a password of some length"})
    assert reply.status == 201, reply.text


# ----------------------------------------------------------------------------------------------------------- breakages


@contextlib.contextmanager
def statement_fails(shop: Process) -> Generator[None]:
    with renamed(shop.dsn("products"), "products.description"), Repeating(shop, look):
        yield
    answers(shop, f"/products/{KNOWN_PRODUCT}")


@contextlib.contextmanager
def table_is_locked(shop: Process) -> Generator[None]:
    """Reads wait for all connections but one, and changes for the last: too few of both to open a breaker."""

    def search(caller: Caller) -> None:
        caller.get("/products?limit=5")

    def change(caller: Caller) -> None:
        caller.call("PATCH", f"/products/{KNOWN_PRODUCT}", {"description": "Changed."})

    with (
        Repeating(shop, search, count=6),
        Repeating(shop, change, count=3),
        locked(shop.dsn("products"), "products"),  # released first: their last requests wait for it
    ):
        yield
    answers(shop, f"/products/{KNOWN_PRODUCT}")


@contextlib.contextmanager
def too_many_requests(shop: Process) -> Generator[None]:
    """They wait for a lock, so that all places are taken."""
    with (
        Repeating(shop, look, count=2 * REQUESTS_IN_WORK, pause_seconds=0.5),
        locked(shop.dsn("products"), "products"),
    ):
        yield
    answers(shop, f"/products/{KNOWN_PRODUCT}")


@contextlib.contextmanager
def database_is_away(shop: Process) -> Generator[None]:
    with unreachable(shop, "mercato_products"), Repeating(shop, look, pause_seconds=0.02):
        yield
    answers(shop, f"/products/{KNOWN_PRODUCT}")


@contextlib.contextmanager
def task_fails(shop: Process) -> Generator[None]:
    with renamed(shop.dsn("users"), "letters"):
        yield


@contextlib.contextmanager
def consumer_is_blocked(shop: Process) -> Generator[None]:
    with locked(shop.dsn("events"), "feed"), shop.caller() as caller:
        assert caller.order(f"alert-{next(_numbers)}").status == 201
        yield


@contextlib.contextmanager
def event_is_poison(shop: Process) -> Generator[None]:
    """A trigger refuses what the consumer writes. The pauses between its tries are cut short."""
    dsn = shop.dsn("products")
    refuse = """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE OF in_stock ON products EXECUTE FUNCTION refuse()
    """
    stock = f"/products/{KNOWN_PRODUCT}/stock"

    def set_stock(caller: Caller, pieces: int) -> None:
        reply = caller.call("PUT", stock, {"on_hand": pieces})
        assert reply.status == 200, reply.text

    def try_again(_: Caller) -> None:
        sql(dsn, "UPDATE parked SET retry_at = now() WHERE dead_at IS NULL AND retry_at < 'infinity'")

    with shop.caller() as caller:
        before = caller.get(stock).json
        asyncio.run(executed(dsn, refuse))
        try:
            set_stock(caller, before["on_hand"] - before["available"])
            with Repeating(shop, try_again):
                yield
        finally:
            sql(dsn, "DROP FUNCTION refuse CASCADE")
            set_stock(caller, before["on_hand"])
            done = run_command("events", "replay", "--all", "--data", shop.data)
            assert done.returncode == 0, done.stdout


@contextlib.contextmanager
def log_is_another(shop: Process) -> Generator[None]:
    """The consumer has read more than its source has, as after a restore of the source."""
    dsn, consumer = shop.dsn("users"), SECURITY_LOG.consumer
    which = f"consumer = '{consumer}' AND source = 'products'"
    [(before,)] = sql(dsn, f"SELECT position FROM cursors WHERE {which}")
    ahead = end_of_row(1_000_000)
    with changed(
        dsn,
        f"UPDATE cursors SET position = {ahead} WHERE {which}",
        f"UPDATE cursors SET position = {before} WHERE {which}",
    ):
        yield


@contextlib.contextmanager
def stock_is_wrong(shop: Process) -> Generator[None]:
    update = f"UPDATE levels SET on_hand = on_hand %s 1 WHERE product_id = {KNOWN_PRODUCT}"
    with changed(shop.dsn("inventory"), update % "+", update % "-"):
        yield


@contextlib.contextmanager
def audit_is_impossible(shop: Process) -> Generator[None]:
    with unreachable(shop, SCRATCH):
        yield


@contextlib.contextmanager
def bank_has_more(shop: Process) -> Generator[None]:
    with changed(
        shop.dsn("sandbox"),
        """
        INSERT INTO operations (key, kind, order_id, amount_minor, currency, method, status)
        VALUES ('alert', 'authorize', 7, 500, 'USD', 'sandbox:ok', 'succeeded')
        """,
        "DELETE FROM operations WHERE key = 'alert'",
    ):
        yield


@contextlib.contextmanager
def keys_are_reused(shop: Process) -> Generator[None]:
    """All within one scrape, by a client that has sent no such key before."""
    key = f"alert-{next(_numbers)}"
    with shop.caller() as caller:
        assert caller.order(key).status == 201
        for quantity in range(2, 14):
            body = {"user_id": 1, "items": [{"product_id": KNOWN_PRODUCT, "quantity": quantity}]}
            assert caller.post("/orders", body, Idempotency_Key=key).status == 422
    yield


@contextlib.contextmanager
def mail_is_refused(shop: Process) -> Generator[None]:
    """Where the folder of letters was, there is a file."""
    folder, kept = shop.data / "letters", shop.data / "letters-kept"
    folder.mkdir(mode=0o700, exist_ok=True)  # the first letter would make it
    folder.rename(kept)
    folder.touch()
    try:
        with shop.caller() as caller:
            register(caller)
        yield
    finally:
        folder.unlink()
        kept.rename(folder)


@contextlib.contextmanager
def caller_has_no_token(shop: Process) -> Generator[None]:
    """One call, of a program that is not ours, at the address where the others call orders."""
    record = json.loads((shop.data / "processes.json").read_text())
    [address] = [place for entry in record["services"].split("; ") if (place := entry.removeprefix("orders=")) != entry]
    with Caller(f"http://{address}") as caller:
        assert caller.get("/rpc/orders").status == 401
    yield


@contextlib.contextmanager
def shop_is_killed(shop: Process) -> Generator[None]:
    shop.kill()
    yield


# ------------------------------------------------------------------------------------------------------------ the table

ROUTE: Final = {"http_request_method": "GET", "http_route": "/products/{id}"}

SCENARIOS: Final[Sequence[Scenario]] = (
    Scenario(
        "statement_fails",
        {"MercatoErrors": ROUTE, "MercatoCallsFail": {"rpc_method": "products.get"}},
        statement_fails,
    ),
    Scenario(
        "table_is_locked",
        {"MercatoSlow": {}, "MercatoConnectionsBusy": {"db_client_connection_pool_name": "products"}},
        table_is_locked,
    ),
    Scenario("too_many_requests", {"MercatoOverloaded": {}}, too_many_requests),
    Scenario(
        "database_is_away", {"MercatoBreakerOpen": {"service": "products", "operations": "reads"}}, database_is_away
    ),
    Scenario("task_fails", {"MercatoTasksFail": {"service": "users", "task": "send letters"}}, task_fails),
    Scenario(
        "consumer_is_blocked", {"MercatoEventsLag": {"consumer": CONSUMER, "source": "orders"}}, consumer_is_blocked
    ),
    Scenario("event_is_poison", {"MercatoEventsDead": {"consumer": IN_STOCK.consumer}}, event_is_poison),
    Scenario(
        "log_is_another",
        {"MercatoEventsRefused": {"consumer": SECURITY_LOG.consumer, "source": "products"}},
        log_is_another,
    ),
    Scenario("stock_is_wrong", {"MercatoAuditViolated": {"invariant": "S2"}}, stock_is_wrong),
    Scenario("audit_is_impossible", {"MercatoAuditOld": {}}, audit_is_impossible),
    Scenario("bank_has_more", {"MercatoMoneyDiffers": {"kind": "not_in_our_books"}}, bank_has_more),
    Scenario("keys_are_reused", {"MercatoKeysRefused": {"operation": "orders.place"}}, keys_are_reused),
    Scenario("mail_is_refused", {"MercatoLettersFail": {"kind": "proof"}}, mail_is_refused),
    Scenario("shop_is_killed", {"MercatoDown": {"job": "mercato"}}, shop_is_killed, is_undone=False),
    Scenario("caller_has_no_token", {"MercatoUntrusted": {"reason": "missing"}}, caller_has_no_token, kind="split"),
    Scenario("stock_is_wrong", {"MercatoAuditViolated": {"invariant": "S2"}}, stock_is_wrong, kind="split"),
)
