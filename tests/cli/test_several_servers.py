"""`mercato audit`, `backup` and `restore` of a shop whose databases are on two servers, of different versions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import asyncpg
import pytest

from cli.test_backup import place
from cli.test_serve import SECRET, SERVICES, given
from mercato.testing.caller import Buyers, Caller
from mercato.testing.command import run_command
from mercato.testing.foreign_server import ADMIN, PASSWORD, ForeignServer
from mercato.testing.served import Served
from mercato.testing.waiting import BOUND_SECONDS, wait_until

__all__ = ["place"]

pytestmark = pytest.mark.long

SALES: Final = ("orders", "inventory", "payments")
"""The services on the second server; users, products, events and sandbox are on the first."""
PIECES: Final = 10_000


class Shop(NamedTuple):
    """A shop that runs, and the servers of its databases."""

    first: str
    second: str
    served: Served
    product_id: int
    user_id: int

    @property
    def servers(self) -> tuple[str, ...]:
        """As options."""
        return ("--dsn", self.first, "--dsn", f"{','.join(SALES)}={self.second}")


def migrated(folder: Path, first: str, second: str) -> Path:
    """The variables of all services, whose databases `mercato migrate` has prepared on both servers."""
    for names, dsn in ((set(SERVICES) - set(SALES), first), (SALES, second)):
        done = run_command(
            "migrate", *names, "--dsn", dsn, "--data", folder / "data", environment={"MERCATO_SECRET": SECRET}
        )
        assert done.returncode == 0, done.stderr
    return folder / "data/environment"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with ExitStack() as stack:
        first, second = (stack.enter_context(ForeignServer({}, version)).admin_dsn for version in (18, 16))
        names = (*SERVICES, "gateway")
        variables = given(migrated(tmp_path_factory.mktemp("shop"), first, second), *names)
        served = stack.enter_context(Served(*names, environment=variables)).ready()
        with served.caller() as caller:
            price = {"amount": "99.99", "currency": "USD"}
            made = caller.post("/products", {"name": "Lamp", "sku": "LAMP-1", "price": price, "category": "things"})
            assert made.status == 201, made.text
            product_id = made.json["id"]
            assert caller.call("PUT", f"/products/{product_id}/stock", {"on_hand": PIECES}).status == 200
            registered = caller.post(
                "/register", {"name": "Ada", "email": "ada@example.com", "password": "long-enough-1"}
            )
            assert registered.status == 201, registered.text
        yield Shop(first, second, served, product_id, registered.json["id"])


class PayingBuyers(Buyers):
    """Buyers whose orders are paid at once."""

    def __init__(self, shop: Shop, count: int = 2) -> None:
        super().__init__(shop.served.caller, count)
        self._shop = shop

    def order(self, caller: Caller, key: str) -> Any:
        of = {"user_id": self._shop.user_id, "product_id": self._shop.product_id}
        return caller.post("/orders", {**of, "amount": 99.99, "payment_method": "sandbox:ok"}, Idempotency_Key=key)


def document(*command: str | Path, code: int = 0, environment: Mapping[str, str] | None = None) -> Any:
    """What a command prints as JSON."""
    done = run_command(*command, "--json", environment=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def refused(*command: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """The one sentence of a command that fails."""
    done = run_command(*command, environment=environment)
    assert done.returncode == 2, done.stdout + done.stderr
    [sentence] = done.stderr.splitlines()
    assert PASSWORD not in sentence
    return sentence


def execute(dsn: str, database: str, *statements: str) -> list[Any]:
    """The rows of the last statement."""

    async def executed() -> list[Any]:
        connection = await cast(Any, asyncpg).connect(dsn.replace("/postgres?", f"/{database}?"))
        try:
            rows: list[Any] = []
            for statement in statements:
                rows = [tuple(row) for row in await connection.fetch(statement)]
            return rows
        finally:
            await connection.close()

    return asyncio.run(executed())


def databases(dsn: str) -> set[str]:
    found = execute(dsn, "postgres", "SELECT datname FROM pg_database WHERE datname LIKE 'mercato%'")
    return {str(name) for (name,) in found}


def violated(report: Any) -> dict[str, int]:
    return {each["name"]: each["violations"] for each in report["invariants"] if each["violations"]}


def settle(shop: Shop) -> None:
    """Waits until all orders are paid for, and all events read."""

    def is_settled() -> bool:
        done = run_command("audit", *shop.servers, "--settled", "0", "--json")
        return done.returncode == 0

    wait_until(is_settled, BOUND_SECONDS)


def test_the_audit_holds_beside_orders_that_are_paid_and_again_when_all_work_is_finished(shop: Shop):
    with PayingBuyers(shop) as buyers:
        wait_until(lambda: len(buyers.placed) > 20, BOUND_SECONDS)
        for _ in range(3):
            report = document("audit", *shop.servers, "--settled", "5")
            assert (report["holds"], violated(report)) == (True, {})
    with shop.served.caller() as caller:
        buyers.assert_nothing_lost(caller)
    settle(shop)
    report = document("audit", *shop.servers, "--settled", "0")
    assert report["copied_rows"] > 200
    assert 0 <= report["clock_difference_seconds"] < BOUND_SECONDS
    assert "mercato_audit" in databases(shop.first)
    assert "mercato_audit" not in databases(shop.second)


def test_the_copies_are_made_on_the_server_of_choice_and_the_servers_come_from_the_environment(shop: Shop):
    environment = {"MERCATO_POSTGRES_DSN": f"{','.join(SALES)}={shop.second} {shop.first}"}
    with ForeignServer({}, 18) as other:
        assert document("audit", "--scratch", other.admin_dsn, environment=environment)["holds"]
        assert databases(other.admin_dsn) == {"mercato_audit"}
    listed = run_command("users", "list", "--json", environment=environment)
    assert (listed.returncode, "ada@example.com" in listed.stdout) == (0, True), listed.stderr


@pytest.mark.parametrize(
    ("server", "database", "plant", "repair", "name"),
    [
        # A held reservation, on the second server, for an order of another nonce: as after a restore of orders.
        (
            "second",
            "mercato_inventory",
            "UPDATE reservations SET nonce = nonce + 1 WHERE order_id = (SELECT min(order_id) FROM reservations)",
            "UPDATE reservations SET nonce = nonce - 1 WHERE order_id = (SELECT min(order_id) FROM reservations)",
            "O11",
        ),
        # The bank, on the first server, has taken less than payments says.
        (
            "first",
            "mercato_sandbox",
            "UPDATE operations SET amount_minor = amount_minor - 1 WHERE id = (SELECT min(id) FROM operations)",
            "UPDATE operations SET amount_minor = amount_minor + 1 WHERE id = (SELECT min(id) FROM operations)",
            "M4",
        ),
        # The feed, on the first server, has an event that orders has not emitted.
        (
            "second",
            "mercato_orders",
            "CREATE TABLE kept AS SELECT * FROM outbox WHERE id = (SELECT min(id) FROM outbox); "
            "DELETE FROM outbox WHERE id IN (SELECT id FROM kept)",
            "INSERT INTO outbox SELECT * FROM kept; DROP TABLE kept",
            "E3",
        ),
    ],
    ids=["a-reservation-of-another-order", "a-charge-of-another-amount", "an-event-that-was-not-emitted"],
)
def test_a_violation_between_services_on_different_servers_is_found(
    shop: Shop, server: str, database: str, plant: str, repair: str, name: str
):
    with PayingBuyers(shop, 1) as buyers:
        wait_until(lambda: len(buyers.placed) > 2, BOUND_SECONDS)
    settle(shop)
    dsn = getattr(shop, server)
    execute(dsn, database, *plant.split("; "))
    try:
        report = document("audit", *shop.servers, "--settled", "0", code=1)
        assert name in violated(report)
    finally:
        execute(dsn, database, *repair.split("; "))
    settle(shop)


def test_a_backup_beside_orders_is_of_one_moment_and_restored_onto_two_servers(shop: Shop, place: Path):
    with PayingBuyers(shop) as buyers:
        wait_until(lambda: len(buyers.placed) > 10, BOUND_SECONDS)
        taken = document("backup", place / "shop", *shop.servers)
        placed = set(buyers.placed.values())
        assert taken["holds"]
    with ForeignServer({}, 16) as first, ForeignServer({}, 18) as second, ExitStack() as stack:
        new = ("--dsn", f"{','.join(SALES)}={second.admin_dsn}", "--dsn", first.admin_dsn)
        restored = document("restore", place / "shop", *new)
        assert (restored["holds"], restored["rows"]) == (True, taken["rows"])
        assert databases(second.admin_dsn) == {*(f"mercato_{name}" for name in SALES), "mercato_audit"}
        assert databases(first.admin_dsn) == {f"mercato_{name}" for name in SERVICES if name not in SALES}
        assert "has databases of a shop already" in refused("restore", place / "shop", *new)

        folder = migrated(place, first.admin_dsn, second.admin_dsn)
        names = (*SERVICES, "gateway")
        served = stack.enter_context(Served(*names, environment=given(folder, *names))).ready()
        again = Shop(first.admin_dsn, second.admin_dsn, served, shop.product_id, shop.user_id)
        with PayingBuyers(again) as new_buyers:
            wait_until(lambda: len(new_buyers.placed) > 5, BOUND_SECONDS)
        with served.caller() as caller:
            new_buyers.assert_nothing_lost(caller)
            kept = {order_id for order_id in placed if caller.get(f"/orders/{order_id}").status == 200}
        assert len(kept) > 10
        assert not set(new_buyers.placed.values()) & set(buyers.placed.values()), "an id of the lost time came again"
        settle(again)


def test_a_restore_that_fails_on_one_server_leaves_nothing_on_the_other(shop: Shop, place: Path):
    settle(shop)
    document("backup", place / "shop", *shop.servers)
    with ForeignServer({}, 18) as first:
        onto = ("--dsn", first.admin_dsn, "--dsn", f"{','.join(SALES)}={shop.second}")
        sentence = refused("restore", place / "shop", *onto)
        assert "has databases of a shop already, and a shop is never written over" in sentence
        assert databases(first.admin_dsn) == set()


def test_a_role_that_may_not_restore_is_named(shop: Shop, place: Path):
    settle(shop)
    document("backup", place / "shop", *shop.servers)
    with ForeignServer({}, 18) as first, ForeignServer({}, 16) as second:
        execute(second.admin_dsn, "postgres", "CREATE ROLE maker LOGIN CREATEDB CREATEROLE PASSWORD 'a-password'")
        maker = second.admin_dsn.replace(f"//{ADMIN}:", "//maker:")
        onto = ("--dsn", first.admin_dsn, "--dsn", f"{','.join(SALES)}={maker}")
        sentence = refused("restore", place / "shop", *onto)
        assert "may not be used by the role of its DSN: permission denied to set parameter" in sentence
        assert "take the DSN of a superuser" in sentence
        assert databases(first.admin_dsn) | databases(second.admin_dsn) == set()


def test_what_cannot_be_reached_is_named(shop: Shop, tmp_path: Path):
    away = f"postgresql://{ADMIN}:{PASSWORD}@/postgres?host={tmp_path}&port=5432"
    sales = f"{','.join(SALES)}="
    assert "cannot be reached at" in refused("audit", "--dsn", shop.first, "--dsn", sales + away)
    swapped = refused("audit", "--dsn", f"{sales}{shop.first}", "--dsn", shop.second)
    assert "has no database mercato_" in swapped
    assert "name the one that has it, as in --dsn " in swapped
    one = refused("backup", tmp_path / "shop", "--dsn", shop.first)
    assert "has no database mercato_inventory" in one
    wrong = shop.second.replace(PASSWORD, "hunter2")
    sentence = refused("audit", "--dsn", shop.first, "--dsn", sales + wrong)
    assert "check that the shop or its server is running and that host, user and password are right" in sentence
    assert "hunter2" not in sentence
    assert "hunter2" not in refused("audit", *shop.servers, "--scratch", shop.first.replace(PASSWORD, "hunter2"))

    execute(shop.second, "postgres", "CREATE ROLE reader LOGIN PASSWORD 'a-password'")
    reader = shop.second.replace(f"//{ADMIN}:", "//reader:")
    assert "permission denied" in refused("audit", "--dsn", shop.first, "--dsn", sales + reader)
    scratch = refused("audit", *shop.servers, "--scratch", reader)
    assert "the database mercato_audit may not be used by the role of its DSN: permission denied to create" in scratch
