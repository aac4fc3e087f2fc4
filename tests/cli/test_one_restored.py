"""The drill of docs/operations.md: one of the seven databases is restored from an older dump, and the others are not.

Each database is copied twice while the shop is stopped: early, and at the end of the time that gets lost. A drill puts
all back to the end, but one to the early copy, and starts the shop as documented.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Final

import msgspec
import pytest

from cli.test_audit import serving
from cli.test_backup import finished, start
from mercato import topology
from mercato.embedded_postgres import EmbeddedPostgres
from mercato.testing.caller import Caller, everything
from mercato.testing.process import Process, data_folder
from mercato.testing.tables import connected
from mercato.testing.waiting import wait_until

pytestmark = pytest.mark.long

PASSWORD: Final = "demo-password"
SERVICES: Final = tuple(topology.SERVICES)
OPTIONS: Final = ("--auth", "required")


# What of the lost time is odd afterwards; docs/operations.md says what to do about each.
ODD: Final[Mapping[str, set[str]]] = {
    "users": set(),
    "products": {"S9", "E3"},
    "inventory": {"S5", "E3"},
    "sandbox": {"M4", "M5"},
    "payments": {"M4", "E3"},
    "orders": {"M6", "S5", "S6", "E3", "E5"},
    "events": set(),
}
UNREAD: Final = """
    SELECT coalesce(max(id) << 12 > (SELECT position FROM outbox_readers WHERE consumer = 'events.feed'), false)
      FROM outbox
"""


class Customer(msgspec.Struct, frozen=True):
    """An account with what it has bought, as the customer remembers it."""

    id: int
    email: str
    access_token: str
    refresh_token: str
    paid_id: int
    open_id: int
    guest_order_id: int
    guest_token: str
    keyed: Mapping[str, Any]
    """A request that was paid, and is repeated with its key."""
    keyed_id: int


class Lost(msgspec.Struct, frozen=True):
    """A shop with its copies, and who became a customer before the first of them and between the two."""

    data: Any
    staff: Mapping[str, str]
    early: Customer
    late: Customer
    product_id: int
    """Made in the lost time, with pieces on hand."""
    position: int
    """In the feed, of the last order that was paid in the lost time."""


def customer(shop: Process, email: str, product_id: int = 100) -> Customer:
    """A new account that pays an order, and leaves another one open; and the order of a guest."""
    caller = shop.caller()
    registered = caller.post("/register", {"email": email, "name": email, "password": PASSWORD})
    assert registered.status == 201, registered.text
    tokens = caller.sign_in(email, PASSWORD).json
    user_id = registered.json["id"]
    price = caller.get(f"/products/{product_id}").json["price"]
    paid = ordered(
        caller, {"user_id": user_id, "product_id": product_id, "amount": price, "payment_method": "sandbox:ok"}
    )
    open_ = ordered(caller, {"user_id": user_id, "product_id": product_id})
    guest = ordered(shop.caller(), {"product_id": product_id, "email": email})
    body = {"user_id": user_id, "product_id": product_id, "quantity": 2, "payment_method": "sandbox:ok"}
    keyed = ordered(caller, body, key=email)
    wait_until(lambda: status(caller, paid["id"]) != ("pending", "unpaid"), explain=lambda: str(paid))
    wait_until(lambda: status(caller, keyed["id"]) != ("pending", "unpaid"), explain=lambda: str(keyed))
    assert status(caller, keyed["id"]) == ("confirmed", "paid"), caller.get(f"/orders/{keyed['id']}").text
    assert status(caller, paid["id"]) == ("confirmed", "paid"), caller.get(f"/orders/{paid['id']}").text
    assert status(caller, open_["id"]) == ("pending", "unpaid"), caller.get(f"/orders/{open_['id']}").text
    return Customer(
        user_id,
        email,
        tokens["access_token"],
        tokens["refresh_token"],
        paid["id"],
        open_["id"],
        guest["id"],
        guest["access_token"],
        body,
        keyed["id"],
    )


def ordered(caller: Caller, order: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
    placed = caller.post("/orders", order) if key is None else caller.post("/orders", order, Idempotency_Key=key)
    assert placed.status == 201, placed.text
    return placed.json


def status(caller: Caller, order_id: int) -> tuple[str, str]:
    order = caller.get(f"/orders/{order_id}").json
    return order["status"], order["payment"]


def new_product(staff: Caller, sku: str) -> int:
    price = {"amount": "9.90", "currency": "USD"}
    made = staff.post("/products", {"sku": sku, "name": sku, "category": "drill", "price": price})
    assert made.status == 201, made.text
    counted = staff.post(
        f"/products/{made.json['id']}/stock/adjustments",
        {"delta": 50, "reason": "count"},
        Idempotency_Key=f"{sku}-{made.json['id']}",
    )
    assert counted.status in (200, 201), counted.text
    return made.json["id"]


def reprice(staff: Caller, amount: str) -> None:
    """Changes the price of a product, and waits until the security log and the feed have it."""
    price = {"price": {"amount": amount, "currency": "USD"}}
    changed = staff.call("PATCH", "/products/101", price)
    assert changed.status == 200, changed.text
    wait_until(lambda: any(f"to {amount} USD" in each["detail"] for each in staff.get("/security-log?limit=200").json))
    wait_until(lambda: amount_in_feed(staff) == int(amount.replace(".", "")))


def amount_in_feed(staff: Caller) -> int | None:
    entries = staff.get("/events?types=product.price_changed&limit=200").json
    return entries[-1]["data"]["price_minor"] if entries else None


async def copy(server: EmbeddedPostgres, source: str, target: str, owner: str) -> None:
    async with connected(server.admin_dsn) as connection:
        await connection.execute(f"DROP DATABASE IF EXISTS {target} WITH (FORCE)")
        await connection.execute(f"CREATE DATABASE {target} TEMPLATE {source} OWNER {owner} STRATEGY FILE_COPY")


async def keep(data: Any, moment: str) -> None:
    async with serving(data) as server:
        for name in SERVICES:
            await copy(server, f"mercato_{name}", f"{moment}_{name}", f"mercato_{name}")


async def restore(data: Any, alone: str) -> float:
    """All as at the end, but one as it was early; gives the seconds that the restore of that one took."""
    async with serving(data) as server:
        for name in SERVICES:
            if name != alone:
                await copy(server, f"late_{name}", f"mercato_{name}", f"mercato_{name}")
        began = time.monotonic()
        await copy(server, f"early_{alone}", f"mercato_{alone}", f"mercato_{alone}")
        return time.monotonic() - began


@pytest.fixture(scope="module")
def lost() -> Generator[Lost]:
    with data_folder() as data:
        with Process(data, *OPTIONS) as shop:
            shop.ready()
            staff = next(event for event in shop.events if event["event"] == "staff")
            early = customer(shop, "early@example.com")
            shop.stop()
        asyncio.run(keep(data, "early"))
        with Process(data, *OPTIONS) as shop:
            caller = shop.ready().caller()
            caller.sign_in(staff["email"], staff["password"])
            product_id = new_product(caller, "LATE")
            reprice(caller, "71.00")
            late = customer(shop, "late@example.com")
            last = customer(shop, "late-too@example.com", product_id)
            wait_until(lambda: f"order {last.paid_id}" in paid_in_feed(caller))
            wait_until(lambda: not asyncio.run(value(shop.dsn("orders"), UNREAD)))
            position = paid_in_feed(caller)[f"order {last.paid_id}"]
            shop.stop()
        asyncio.run(keep(data, "late"))
        yield Lost(data, staff, early, late, product_id, position)


@pytest.mark.parametrize("alone", SERVICES)
def test_after_one_database_alone_was_restored_the_shop_goes_on(
    lost: Lost, alone: str, record_property: Callable[[str, object], None]
):
    took_s = asyncio.run(restore(lost.data, alone))
    began = time.monotonic()
    with Process(lost.data, *OPTIONS) as shop:
        shop.ready()
        record_property("restored_s", round(took_s, 1))
        record_property("ready_s", round(time.monotonic() - began, 1))
        staff = shop.caller()
        staff.sign_in(lost.staff["email"], lost.staff["password"])
        product_id = new_product(staff, "NEW")
        reprice(staff, "72.00")
        new = customer(shop, "new@example.com", product_id)

        assert product_id != lost.product_id
        assert_nothing_is_anothers(shop, lost, new)
        assert_tokens_open_nothing_new(shop, lost, new)
        if alone == "users":
            assert shop.caller().post("/token/refresh", {"refresh_token": lost.late.refresh_token}).status == 401
        if alone != "users":  # it has forgotten the account
            repeated = repeat(shop, lost.late)
            assert repeated == (lost.late.keyed_id, "confirmed", "paid")
        asyncio.run(assert_charged_once(shop, new))
        assert_cancels(shop, lost.early)
        wait_until(lambda: f"order {new.paid_id}" in paid_in_feed(staff), explain=lambda: str(paid_in_feed(staff)))
        wait_until(lambda: f"order {lost.early.open_id}" in in_feed(staff, "order.cancelled"))
        wait_until(lambda: f"reservation {lost.early.open_id}" in in_feed(staff, "stock.released"))
        assert paid_in_feed(staff)[f"order {new.paid_id}"] > lost.position
        if alone == "events":  # it reads the lost time again, and gives it positions that were never seen
            assert paid_in_feed(staff)[f"order {lost.late.paid_id}"] > lost.position
        assert not any("log_refuses_consumer" in line for line in shop.errors), shop.errors
        shop.stop()
    assert odd(lost.data) == ODD[alone]


def assert_nothing_is_anothers(shop: Process, lost: Lost, new: Customer) -> None:
    """Each sees what is its own: a new account, and one from before."""
    known = {who.email: {who.paid_id, who.open_id, who.keyed_id} for who in (new, lost.early)}
    for who in (new, lost.early):
        own = known[who.email]
        caller = shop.caller()
        caller.sign_in(who.email, PASSWORD)
        assert {order["id"] for order in everything(caller, "/orders")} == own
        assert {payment["order_id"] for payment in everything(caller, "/payments")} <= {who.paid_id, who.keyed_id}
        for order_id in (lost.late.paid_id, lost.late.open_id, lost.late.guest_order_id):
            assert caller.get(f"/orders/{order_id}").status == 404
    assert new.id != lost.late.id
    late = lost.late
    assert not {*known[new.email], new.guest_order_id} & {late.paid_id, late.open_id, late.guest_order_id}


def assert_tokens_open_nothing_new(shop: Process, lost: Lost, new: Customer) -> None:
    old = shop.caller(lost.late.access_token)
    for path in (f"/users/{new.id}", f"/orders/{new.paid_id}", f"/orders/{new.open_id}"):
        assert old.get(path).status == 404, path
    for token, status_ in ((lost.late.guest_token, 404), (new.guest_token, 200)):
        assert shop.caller().get(f"/orders/{new.guest_order_id}?access_token={token}").status == status_


def repeat(shop: Process, who: Customer) -> tuple[int, str, str]:
    """The request that was paid, once more with its key: its order, when its checkout is over."""
    caller = shop.caller()
    caller.sign_in(who.email, PASSWORD)
    order_id = ordered(caller, who.keyed, key=who.email)["id"]
    wait_until(lambda: status(caller, order_id) != ("pending", "unpaid"))
    return (order_id, *status(caller, order_id))


async def assert_charged_once(shop: Process, new: Customer) -> None:
    """Of the bank's own ledger: no order has two charges, and what is paid has one."""
    async with connected(shop.dsn("sandbox")) as connection:
        charges = await connection.fetch("SELECT order_id, count(*) AS n FROM charges GROUP BY order_id")
    counts = {charge["order_id"]: charge["n"] for charge in charges}
    assert set(counts.values()) == {1}
    assert new.paid_id in counts
    assert new.open_id not in counts


def assert_cancels(shop: Process, early: Customer) -> None:
    caller = shop.caller()
    caller.sign_in(early.email, PASSWORD)
    assert caller.post(f"/orders/{early.open_id}/cancel", {}).status == 200
    wait_until(lambda: status(caller, early.open_id)[0] == "cancelled")


def paid_in_feed(staff: Caller) -> dict[str, int]:
    """The positions of orders that were paid."""
    return in_feed(staff, "order.paid")


def in_feed(staff: Caller, type_: str) -> dict[str, int]:
    entries = staff.get(f"/events?types={type_}&limit=200").json
    return {entry["subject"]: entry["position"] for entry in entries}


async def value(dsn: str, query: str) -> Any:
    async with connected(dsn) as connection:
        return await connection.fetchval(query)


def odd(data: Any) -> set[str]:
    """The invariants that the audit finds violated, of a shop that has come to rest."""
    _, output, _ = finished(start("audit", "--data", data, "--json", "--settled", "0"))
    return {each["name"] for each in json.loads(output)["invariants"] if each["violations"]}
