"""Changes of prices, and refunds, come into the security log by the events of products and orders: once each."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import pytest
import pytest_asyncio

from mercato import topology
from mercato.chassis.contract import Actor, Message
from mercato.chassis.messaging.events import Event
from mercato.contracts.products import CreateProduct, Products, UpdateProduct
from mercato.contracts.refunds import OrderRefunded
from mercato.contracts.users import ListSecurityLog, SecurityEntry, Users
from mercato.services.products.app import build as build_products
from mercato.services.users import log_store
from mercato.services.users.consumers import SECURITY_LOG
from mercato.testing.builds import build_users
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import FailAt, Inject
from mercato.testing.waiting import until

MEMBER: Final = Actor("staff", 9)
AT: Final = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
"""Yesterday: the task that deletes entries older than 90 days runs beside the tests."""
_skus = itertools.count(1)


@pytest_asyncio.fixture
async def shop(harness: ServiceHarness) -> ServiceHarness:
    """Users with products, whose events it reads."""
    return await harness.open({"users": build_users, "products": build_products})


async def product(harness: ServiceHarness) -> int:
    """Costs 10 dollars."""
    request = CreateProduct(sku=f"S{next(_skus)}", name="Thing", price_minor=1_000, currency="USD", category="things")
    with harness.acting(MEMBER):
        return (await harness.client(Products).create(request)).id


async def change(harness: ServiceHarness, product_id: int, **changes: Any) -> None:
    with harness.acting(MEMBER):
        await harness.client(Products).update(UpdateProduct(id=product_id, **changes))


async def entries(harness: ServiceHarness, account_id: int | None = None) -> list[SecurityEntry]:
    """The oldest first."""
    users = harness.client(Users)
    request = ListSecurityLog(account_id=account_id, limit=200)
    page = await topology.as_the_shop(harness.host, lambda: users.security_log(request))
    return list(reversed(page.entries))


async def details(harness: ServiceHarness) -> list[str]:
    return [entry.detail for entry in await entries(harness)]


async def read_everything(harness: ServiceHarness) -> None:
    """Waits until the consumer has read all events of products."""

    async def is_read() -> bool:
        [last] = await harness.values("SELECT coalesce(max(id), 0) FROM outbox", of="products")
        sql = "SELECT position >> 12 FROM cursors WHERE consumer = 'users.security_log' AND source = 'products'"
        return (await harness.values(sql, of="users") or [-1])[0] >= last

    await until(is_read, "the security log has all events of products")


async def test_a_change_of_price_is_written_with_its_actor_its_time_and_both_prices(shop: ServiceHarness):
    product_id = await product(shop)
    await change(shop, product_id, price="12.50")
    await read_everything(shop)

    [entry] = await entries(shop)
    [at] = await shop.values("SELECT at FROM outbox", of="products")
    assert msgspec.structs.asdict(entry) == {
        "id": entry.id,
        "at": at,
        "kind": "price_changed",
        "account_id": 0,
        "actor_role": "staff",
        "actor_id": MEMBER.id,
        "address": "",
        "subject": f"product {product_id}",
        "detail": "10.00 USD to 12.50 USD",
    }
    assert await entries(shop, MEMBER.id) == [entry]
    assert await entries(shop, MEMBER.id + 1) == []


async def test_what_leaves_the_price_as_it_is_writes_no_entry(shop: ServiceHarness):
    product_id = await product(shop)
    await change(shop, product_id, name="Another", price_minor=1_000)
    await change(shop, product_id, currency="EUR")
    await read_everything(shop)
    assert await details(shop) == ["10.00 USD to 10.00 EUR"]


async def test_many_changes_are_written_in_their_order(shop: ServiceHarness):
    product_ids = [await product(shop) for _ in range(3)]
    for price_minor in range(1, 31):
        await change(shop, product_ids[price_minor % 3], price_minor=price_minor)
    await read_everything(shop)

    found = await entries(shop)
    assert [entry.subject for entry in found] == [f"product {product_ids[n % 3]}" for n in range(1, 31)]
    assert [entry.detail.partition(" to ")[2] for entry in found] == [f"0.{n:02d} USD" for n in range(1, 31)]


@pytest.mark.parametrize("point", ["consumer.batch.before_commit", "consumer.batch.after_commit"])
async def test_a_consumer_that_fails_around_its_commit_writes_each_entry_once(
    shop: ServiceHarness, inject: Inject, point: str
):
    product_id = await product(shop)
    crash = FailAt(1)
    inject(point, crash)
    for price_minor in (900, 800):
        await change(shop, product_id, price_minor=price_minor)
    await read_everything(shop)
    assert crash.arrived >= 1
    assert await details(shop) == ["10.00 USD to 9.00 USD", "9.00 USD to 8.00 USD"]


async def test_a_process_that_starts_anew_goes_on_where_the_one_before_ended(shop: ServiceHarness):
    product_id = await product(shop)
    await change(shop, product_id, price_minor=900)
    await read_everything(shop)
    await shop.host.close()
    await shop.open({"products": build_products})
    await change(shop, product_id, price_minor=800)  # while no process of users runs
    await shop.host.close()
    await shop.open({"users": build_users, "products": build_products})
    await read_everything(shop)
    assert await details(shop) == ["10.00 USD to 9.00 USD", "9.00 USD to 8.00 USD"]


async def test_two_processes_write_each_entry_once(shop: ServiceHarness):
    await shop.another_host()
    product_id = await product(shop)
    for price_minor in range(1, 21):
        await change(shop, product_id, price_minor=price_minor)
    await read_everything(shop)
    assert [detail.partition(" to ")[2] for detail in await details(shop)] == [f"0.{n:02d} USD" for n in range(1, 21)]


async def test_an_event_that_cannot_be_read_is_written_when_it_is_tried_again(shop: ServiceHarness):
    product_id = await product(shop)
    await shop.host.close()
    await shop.open({"products": build_products})
    await change(shop, product_id, price_minor=900)
    broken = "UPDATE outbox SET events = replace(events, '\"currency\"', '\"curency\"')"
    await shop.rows(broken, of="products")
    await shop.host.close()
    await shop.open({"users": build_users, "products": build_products})

    async def is_parked() -> bool:
        return await shop.count("parked", of="users") == 1

    await until(is_parked, "the event is parked")
    assert await details(shop) == []
    mend = """UPDATE parked SET data = replace(data, '"curency"', '"currency"'), retry_at = now()"""
    await shop.rows(mend, of="users")

    async def is_written() -> bool:
        return await details(shop) == ["10.00 USD to 9.00 USD"]

    await until(is_written, "the entry is written")
    assert await shop.count("parked", of="users") == 0


# ------------------------------------------------------------------------------------------------------------- refunds


def refunded(order_id: int, data: Message, at: datetime.datetime = AT) -> Event:
    return Event("orders", order_id << 12, "refund.succeeded", "order", order_id, 7, _json(data), at)


def _json(data: Message) -> str:
    return msgspec.json.encode(data).decode()


def a_refund(**fields: Any) -> OrderRefunded:
    values: Mapping[str, Any] = {
        "order_id": 1, "user_id": 5, "refund_id": "r1", "amount_minor": 500, "refunded_minor": 1_500,
        "currency": "USD", "version": 7, "actor_role": "staff", "actor_id": MEMBER.id, **fields,
    }  # fmt: skip
    return OrderRefunded(**values)


async def test_refunds_are_written_with_who_asked_for_them_and_the_account_of_the_order(shop: ServiceHarness):
    given = (
        a_refund(),
        a_refund(order_id=2, refund_id="cancel", amount_minor=1_500, actor_role="customer", actor_id=5),
        a_refund(order_id=3, user_id=0, currency="JPY", actor_role="service", actor_id=0),
    )
    async with shop.host.services["users"].database.transaction() as tx:
        await SECURITY_LOG.handle(tx, [refunded(data.order_id, data) for data in given])

    found = await entries(shop)
    assert {(entry.kind, entry.at, entry.address) for entry in found} == {("refunded", AT, "")}
    assert [(e.account_id, e.actor_role, e.actor_id, e.subject, e.detail) for e in found] == [
        (5, "staff", MEMBER.id, "order 1", "refund r1: 10.00 USD to 15.00 USD"),
        (5, "customer", 5, "order 2", "refund cancel: 0.00 USD to 15.00 USD"),
        (0, "service", 0, "order 3", "refund r1: 1000 JPY to 1500 JPY"),
    ]
    assert await entries(shop, 5) == found[:2]


async def test_entries_of_events_are_deleted_after_90_days(shop: ServiceHarness):
    now = datetime.datetime.now(datetime.UTC)
    events = [
        refunded(order_id, a_refund(order_id=order_id), now - datetime.timedelta(days=days))
        for order_id, days in ((1, 91), (2, 89))
    ]
    async with shop.host.services["users"].database.transaction() as tx:
        await SECURITY_LOG.handle(tx, events)

    async def is_clean() -> bool:
        async with shop.host.services["users"].database.transaction() as tx:
            await log_store.delete_old_entries(tx)
        return [entry.subject for entry in await entries(shop)] == ["order 2"]

    await until(is_clean, "the old entry is deleted")
