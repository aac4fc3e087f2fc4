"""The two shops that are measured, each on a PostgreSQL of its own: started, filled, watched and stopped here."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from bench.throughput import plan, readings
from bench.throughput.figures import Audit, Cost, Counted, spent
from bench.throughput.plan import Case, Product, Subject
from bench.throughput.readings import Spending, connected
from mercato.embedded_postgres import EmbeddedPostgres, remove_cluster

ROOT: Final = Path(__file__).parents[2]
NO_SETTINGS: Final[Mapping[str, str]] = {}
READY_SECONDS: Final = 60.0
STOP_SECONDS: Final = 15.0
FINISHED_SECONDS: Final = 180.0
POLL_SECONDS: Final = 0.02
STOCK_PAGE: Final = 200
FILLERS: Final = 8
"""Connections that fill the catalogue."""
SERVER_CONNECTIONS: Final = 300
"""Enough for four workers; the same for both servers."""


class ShopFailed(Exception):
    """A shop did not start, did not finish its work, or did not keep what it answered."""


class Shop:
    """A running shop. `address` is HOST:PORT; its databases are named PREFIX and the name of the service."""

    subject: Subject
    prefix: str

    def __init__(self, server: EmbeddedPostgres, address: str, processes: Sequence[Process]) -> None:
        self.server = server
        self.address = address
        self.products: tuple[Product, ...] = ()
        self.list_paths: tuple[str, ...] = ()
        self._processes = tuple(processes)
        self._idle_since = time.monotonic()

    def name(self, pid: int) -> str:
        """What a process of the shop is called in the figures."""
        raise NotImplementedError

    async def before(self, case: Case) -> int:
        """What `finished` must know of the time before a load."""
        del case
        return await self.last_order()

    async def finished(self, case: Case, before: int, orders: int) -> None:
        """Waits until all that these orders asked for is done. Raises `ShopFailed` if it does not come to that."""
        raise NotImplementedError

    async def idle(self) -> None:
        """Waits until neither the shop nor its server works."""
        await readings.until_idle(lambda: [*self._tree(), *readings.tree(self.server.pid)])
        self._idle_since = time.monotonic()

    async def new_orders(self, last: int) -> int:
        """How many orders there are after that id."""
        return await self._orders("SELECT count(*) FROM orders WHERE id > $1", last)

    async def spending(self) -> tuple[Spending, Spending]:
        """CPU time so far: of the shop, and of its server."""
        return (
            readings.spent_by(self._tree(), self.name),
            await readings.spent_by_server(self.server.admin_dsn, self.server.pid),
        )

    def cost(self, orders: int, before: tuple[Spending, Spending], after: tuple[Spending, Spending]) -> Cost:
        """The CPU time between two spendings."""
        shop, postgres = (spent(b.ns, a.ns, {**b.names, **a.names}) for b, a in zip(before, after, strict=True))
        return Cost(orders, shop, {name.removeprefix(self.prefix): ns for name, ns in postgres.items()})

    async def counted(self) -> Counted:
        """What its databases have written so far. It has been `idle` since its last load: waits for its counts."""
        await asyncio.sleep(self._idle_since + readings.STATISTICS_SECONDS - time.monotonic())
        return await readings.counted(self.server.admin_dsn, self.prefix)

    async def last_order(self) -> int:
        """The highest id of an order."""
        return await self._orders("SELECT coalesce(max(id), 0) FROM orders")

    async def _orders(self, sql: str, *values: object) -> int:
        async with connected(self.server.admin_dsn, f"{self.prefix}orders") as connection:
            return await connection.fetchval(sql, *values)

    def _tree(self) -> list[int]:
        return [pid for process in self._processes for pid in readings.tree(process.pid)]


@contextlib.asynccontextmanager
async def server_in(folder: Path) -> AsyncGenerator[EmbeddedPostgres]:
    """A PostgreSQL as Mercato brings one, in a folder that is made for it and removed afterwards."""
    await asyncio.to_thread(folder.mkdir, 0o755)
    try:
        server = await EmbeddedPostgres.start(
            folder, password="bench", progress=lambda _line: None, max_connections=SERVER_CONNECTIONS
        )
        try:
            yield server
        finally:
            await server.stop()
    finally:
        remove_cluster(folder)


# ------------------------------------------------------------------------------------------------------------- Mercato


class Mercato(Shop):
    """`mercato up`, with the demo shop and the products of the benchmark."""

    subject: Subject = "mercato"
    prefix = "mercato_"

    def name(self, pid: int) -> str:
        line = readings.command_line(pid)
        if "mercato.cli.instance" in line:
            return line.split()[-1]
        return "worker" if "mercato.cli.worker" in line else "nats" if "nats-server" in line else "up"

    def pids(self, service: str) -> list[int]:
        """The processes that serve it, of a shop that is split."""
        return [pid for pid in self._tree() if self.name(pid).partition(".")[0] == service]

    async def before(self, case: Case) -> int:
        return await asyncio.to_thread(self._reserved) if case == "place" else await self.last_order()

    async def finished(self, case: Case, before: int, orders: int) -> None:
        """`place`: the stock of all of them is held. Paid orders: all of them are paid."""
        end = time.monotonic() + FINISHED_SECONDS
        done = 0
        while time.monotonic() < end:
            if case == "place":
                done = await asyncio.to_thread(self._reserved) - before
            else:
                sql = "SELECT count(*) FROM orders WHERE id > $1 AND payment = 'paid'"
                done = await self._orders(sql, before)
            if done >= orders:
                return
            await asyncio.sleep(POLL_SECONDS)
        what = "held" if case == "place" else "paid"
        raise ShopFailed(f"of {orders} orders, {done} are {what} after {FINISHED_SECONDS:.0f} s")

    async def fill(self) -> None:
        """Adds the products of the benchmark, with more stock than it can sell."""
        chosen = plan.catalogue()
        parts = [chosen[n::FILLERS] for n in range(FILLERS)]
        made = await asyncio.gather(*(asyncio.to_thread(_filled, self.address, part) for part in parts))
        self.products = tuple(sorted(itertools.chain(*made), key=lambda product: product.id))
        self.list_paths = await asyncio.to_thread(_pages, self.address)

    async def find(self) -> None:
        """Finds the products that an earlier start has added."""
        self.products = await asyncio.to_thread(_found, self.address)
        self.list_paths = await asyncio.to_thread(_pages, self.address)

    def _reserved(self) -> int:
        """Pieces that are held for orders, of all products."""
        with _client(self.address) as client:
            reserved, after = 0, 0
            while True:
                levels = client.call("GET", f"/stock?limit={STOCK_PAGE}" + (f"&after={after}" if after else ""))
                reserved += sum(level["reserved"] for level in levels)
                if len(levels) < STOCK_PAGE:
                    return reserved
                after = levels[-1]["product_id"]


@contextlib.asynccontextmanager
async def mercato(
    folder: Path,
    server: EmbeddedPostgres,
    *,
    workers: int = 1,
    transport: str | None = None,
    settings: Mapping[str, str] = NO_SETTINGS,
    module: str = "mercato.cli",
) -> AsyncGenerator[Mercato]:
    """A running `mercato up` on this server; `folder` keeps its data from one start to the next.

    `transport`: each service is a process of its own; None: `workers` processes with all of them. `module` is what runs
    as `mercato`.
    """
    placed = ["--workers", str(workers)] if transport is None else ["--split", "--transport", transport]
    # Settings of the person who runs this are none of the shop's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MERCATO_")}
    environment |= {
        "MERCATO_POSTGRES_DSN": server.admin_dsn,
        "MERCATO_AUDIT_SECONDS": "0",  # its own audit would fall on one load and not on another
        "MERCATO_INVENTORY_HOLD_SECONDS": "86400",  # no hold ends while something else is measured
        **settings,
    }
    with (folder / "mercato.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", module, "up", "--json", "--demo", "--port", "0"],
            *[*placed, "--data", str(folder / "data")],
            env=environment,
            cwd=ROOT,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=log,
            start_new_session=True,
        )
    try:
        address = await _ready(process, folder / "mercato.log")
        yield Mercato(server, address, [process])
    finally:
        await _stopped([process])


async def _ready(process: Process, log: Path) -> str:
    assert process.stdout is not None
    said = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_SECONDS):
            async for said in process.stdout:
                event = json.loads(said)
                if event["event"] == "ready":
                    return urlsplit(str(event["url"])).netloc
    raise ShopFailed(f"mercato up did not get ready: {_last_line(log) or said.decode(errors='replace').strip()}")


def _last_line(log: Path) -> str:
    return log.read_text(errors="replace").strip().rpartition("\n")[2]


class _Finding(msgspec.Struct, frozen=True):
    name: str
    violations: int


class _Report(msgspec.Struct, frozen=True):
    copied_rows: int
    invariants: tuple[_Finding, ...]


async def audited(server: EmbeddedPostgres, orders: int) -> Audit:
    """What `mercato audit` says of a shop that has come to rest. `orders`: how many it has been sent."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "mercato.cli", "audit", "--json", "--settled", "0", "--dsn", server.admin_dsn],
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
    )
    try:
        out, errors = await process.communicate()
    finally:
        await _stopped([process])
    if not out:
        raise ShopFailed(f"the audit could not be made: {errors.decode(errors='replace').strip()}")
    report = msgspec.json.decode(out, type=_Report)
    return Audit(
        invariants=len(report.invariants),
        violated=tuple(f"{one.name} ({one.violations})" for one in report.invariants if one.violations),
        rows=report.copied_rows,
        orders=orders,
    )


# ----------------------------------------------------------------------------------------------------------- reference

_TABLES: Final[Mapping[str, str]] = {
    "users": """
        CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL);
        INSERT INTO users SELECT n, 'user ' || n FROM generate_series(1, 10000) n;
        ANALYZE;
    """,
    "products": """
        CREATE TABLE products (
            id bigint PRIMARY KEY,
            sku text NOT NULL UNIQUE,
            name text NOT NULL,
            description text NOT NULL,
            price_minor bigint NOT NULL,
            currency text NOT NULL DEFAULT 'USD',
            category text NOT NULL,
            status text NOT NULL DEFAULT 'active',
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now(),
            search tsvector GENERATED ALWAYS AS (to_tsvector('english', name || ' ' || description)) STORED
        );
        CREATE INDEX products_search ON products USING gin (search);
    """,
    "orders": """
        CREATE TABLE orders (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            user_id bigint NOT NULL,
            product_id bigint NOT NULL,
            amount bigint NOT NULL,
            status text NOT NULL,
            created_at timestamptz NOT NULL
        );
    """,
}
_SERVICES: Final = ("users", "products", "orders", "gateway")


class Reference(Shop):
    """The four processes in Go (`bench/reference/main.go`)."""

    subject: Subject = "reference"
    prefix = "reference_"

    def name(self, pid: int) -> str:
        return readings.command_line(pid).rpartition(" ")[2] or "(ended)"

    async def finished(self, case: Case, before: int, orders: int) -> None:
        """It does nothing after its answer."""

    async def fill(self, products: Sequence[Product]) -> None:
        """Takes over the products of Mercato, with their ids."""
        async with connected(self.server.admin_dsn, f"{self.prefix}products") as connection:
            await connection.executemany(
                """
                INSERT INTO products (id, sku, name, description, price_minor, category)
                VALUES ($1, $2, $3, $4, $5, $6)
                """,
                [msgspec.structs.astuple(product) for product in products],
            )
            await connection.execute("ANALYZE")
        self.products = tuple(products)
        lasts = [products[n].id for n in range(plan.PAGE - 1, len(products) - plan.PAGE, plan.PAGE)]
        self.list_paths = tuple(f"/products?limit={plan.PAGE}&after={last}" for last in (0, *lasts))


@contextlib.asynccontextmanager
async def reference(program: Path, server: EmbeddedPostgres) -> AsyncGenerator[Reference]:
    """The running reference, with its tables."""
    async with connected(server.admin_dsn) as connection:
        for service in _TABLES:
            await connection.execute(f"CREATE DATABASE reference_{service}")
    for service, tables in _TABLES.items():
        async with connected(server.admin_dsn, f"reference_{service}") as connection:
            await connection.execute(tables)
    addresses = dict(zip(_SERVICES, _free_addresses(len(_SERVICES)), strict=True))
    processes: list[Process] = []
    try:
        for service in _SERVICES:
            environment = {
                **os.environ,
                **{name.upper(): address for name, address in addresses.items()},
                "DSN": server.admin_dsn.replace("/postgres?", f"/reference_{service}?") + "&sslmode=disable",
            }
            processes.append(
                # Each ends when its input does: none outlives us, however we end.
                await asyncio.create_subprocess_exec(
                    str(program), service, env=environment, stdin=PIPE, start_new_session=True
                )
            )
        for service in _SERVICES:
            await _listens(addresses[service], service)
        yield Reference(server, addresses["gateway"], processes)
    finally:
        await _stopped(processes)


async def _listens(address: str, service: str) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            return
        await asyncio.sleep(POLL_SECONDS)
    raise ShopFailed(f"the {service} of the reference does not listen")


def _free_addresses(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


# --------------------------------------------------------------------------------------------------------------- parts


async def _stopped(processes: Sequence[Process]) -> None:
    """Ends them as a person would; those that are still there after a while, by SIGKILL with all below them."""
    for process in processes:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            for pid in readings.tree(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await process.wait()


class _Client:
    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self.link = ""

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The decoded answer. Raises `ShopFailed` for one that is none of 200 and 201."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        self._connection.request(method, path, msgspec.json.encode(body) if body is not None else None, headers)
        answer = self._connection.getresponse()
        said = answer.read()
        if answer.status not in (200, 201):
            raise ShopFailed(f"{method} {path} was answered {answer.status}: {said[:300]!r}")
        self.link = answer.headers.get("Link", "")
        return json.loads(said)


@contextlib.contextmanager
def _client(address: str) -> Any:
    connection = http.client.HTTPConnection(address, timeout=READY_SECONDS)
    try:
        yield _Client(connection)
    finally:
        connection.close()


def _filled(address: str, products: Sequence[Product]) -> list[Product]:
    made: list[Product] = []
    with _client(address) as client:
        for product in products:
            price = {"amount": f"{product.price_minor // 100}.{product.price_minor % 100:02d}", "currency": "USD"}
            body = {
                "sku": product.sku,
                "name": product.name,
                "description": product.description,
                "price": price,
                "category": product.category,
            }
            created = client.call("POST", "/products", body)
            client.call("PUT", f"/products/{created['id']}/stock", {"on_hand": plan.PIECES, "reason": "bench"})
            made.append(msgspec.structs.replace(product, id=created["id"]))
    return made


def _found(address: str) -> tuple[Product, ...]:
    by_sku = {product.sku: product for product in plan.catalogue()}
    found: list[Product] = []
    path = f"/products?limit={STOCK_PAGE}"
    with _client(address) as client:
        while path:
            found += [
                msgspec.structs.replace(by_sku[shown["sku"]], id=shown["id"])
                for shown in client.call("GET", path)
                if shown["sku"] in by_sku
            ]
            path = _following(client.link)
    return tuple(found)


def _pages(address: str) -> tuple[str, ...]:
    """The paths of the first pages of the catalogue."""
    paths = [f"/products?limit={plan.PAGE}"]
    with _client(address) as client:
        while len(paths) < plan.PAGES:
            client.call("GET", paths[-1])
            if not (following := _following(client.link)):
                break
            paths.append(following)
    return tuple(paths)


def _following(link: str) -> str:
    """The path of the next page; empty on the last one."""
    found = re.search(r'<([^>]+)>; rel="next"', link)
    return found[1] if found else ""
