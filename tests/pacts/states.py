"""Provider states: what the examples of pacts are about, made in a real shop by its own operations.

A state is a function with the state's parameters. One that is not here, or with other parameters, fails the
verification of the interaction. An id that an example names is
given by moving the sequence of its table there, and back.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec

from mercato import topology
from mercato.chassis.contract import Call, Message
from mercato.contracts.inventory import (
    CommitStock,
    GetLevel,
    Inventory,
    ReleaseStock,
    ReserveStock,
    SetLevel,
    StockLine,
)
from mercato.contracts.orders import (
    AwaitOrder,
    CancelOrder,
    MoveOrder,
    Order,
    Orders,
    PlaceLine,
    PlaceOrder,
    RefundOrder,
)
from mercato.contracts.payments import (
    AuthorizePayment,
    ChargePayment,
    ListPayments,
    Payments,
    RefundPayment,
)
from mercato.contracts.products import ArchiveProduct, CreateProduct, Products, UpdateProduct
from mercato.contracts.users import Register, Users
from mercato.simulators.bank.contract import AuthorizeCharge, ChargeCard, Sandbox
from mercato.testing.shop import Shop
from mercato.testing.waiting import until

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

METHOD: Final = "sandbox:ok"
PASSWORD: Final = "a password of the pacts"
ANOTHER_NONCE: Final = 1
STAFF_ID: Final = 9
SETTLED_MS: Final = 20_000

_numbers = itertools.count(1)


def email_of(user_id: int) -> str:
    return f"pact-{user_id}@example.com"


class UnknownState(Exception):
    """A pact names a state that the provider does not know."""


class ProviderStates:
    """The states of one shop."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self.makers: dict[str, Callable[..., Awaitable[None]]] = {
            "a product": self._product,
            "a product that is archived": self._archived_product,
            "pieces in stock": self._pieces,
            "an account": self._account,
            "an account with a proven address": self._proven_account,
            "stock is held": self._held,
            "stock is held for a payment": self._held_for_payment,
            "stock is sold": self._sold,
            "stock is released": self._released,
            "stock of another order is held": self._held_by_another,
            "a payment is authorized": self._authorized,
            "a payment is captured": self._captured,
            "a payment is refunded": self._refunded,
            "a payment has failed": self._failed,
            "a charge is authorized": self._charge_authorized,
            "a charge is captured": self._charge_captured,
            "a charge is on the statement": self._charge_on_statement,
            "the bank knows a key": self._known_key,
            "an event": self._event,
            "an order waits for its payment": self._waiting_order,
            "an order is paid": self._paid_order,
            "an entry of the feed": self._entry,
        }

    async def make(self, name: str, parameters: Mapping[str, Any]) -> None:
        maker = self.makers.get(name)
        if maker is None:
            raise UnknownState(f"{name!r} is not in tests/pacts/states.py, which knows {sorted(self.makers)}")
        await maker(**parameters)

    async def message(self, name: str, parameters: Mapping[str, Any]) -> bytes:
        """The newest message that the state of an interaction has made."""
        if name == "an entry of the feed":
            return await self._newest_entry(parameters["type"])
        return await self.newest_event(parameters["source"], parameters["type"])

    async def newest_event(self, source: str, type_: str) -> bytes:
        """The last event of a type in the outbox of a service, as its event log carries it."""
        newest = """
            SELECT event::text FROM outbox, json_array_elements(events::json) WITH ORDINALITY AS e (event, place)
             WHERE event ->> 'type' = $1 ORDER BY id DESC, place DESC LIMIT 1
        """
        found = await self._shop.harness.values(newest, type_, of=source)
        if not found:
            raise UnknownState(f"{source} has emitted no {type_}")
        return found[0].encode()

    async def token_of(self, authorization: str) -> str:
        """The access token for one that a pact has as an example, such as `Bearer token-of-7001`: of that account."""
        name = authorization.rpartition("token-of-")[2]
        if name == "staff":
            return await self._shop.staff()
        return await self._shop.token(email_of(int(name)), PASSWORD)

    # -------------------------------------------------------------------------------------------------------- products

    async def _product(self, product_id: int, price_minor: int) -> None:
        if await self._has("products", "products", product_id):
            return
        made = CreateProduct(
            sku=f"PACT-{product_id}", name="Mug", price_minor=price_minor, currency="USD", category="things"
        )
        async with self._id("products", "products", product_id):
            await self._call(self._client(Products).create, made)

    async def _archived_product(self, product_id: int, price_minor: int) -> None:
        await self._product(product_id, price_minor)
        await self._call(self._client(Products).archive, ArchiveProduct(id=product_id))

    async def _pieces(self, product_id: int, pieces: int) -> None:
        await self._product(product_id, 1_250)
        level = await self._call(self._client(Inventory).levels, GetLevel(product_id=product_id))
        await self._call(self._client(Inventory).set, SetLevel(product_id=product_id, on_hand=level.reserved + pieces))

    # ----------------------------------------------------------------------------------------------------------- users

    async def _account(self, user_id: int) -> None:
        if await self._has("users", "users", user_id):
            return
        account = Register(email=email_of(user_id), name="Buyer", password=PASSWORD)
        async with self._id("users", "users", user_id):
            await self._call(self._client(Users).register, account)

    async def _proven_account(self, user_id: int) -> None:
        await self._account(user_id)
        await self._values("users", "UPDATE users SET email_proven_at = now() WHERE id = $1 RETURNING id", user_id)

    # ------------------------------------------------------------------------------------------------------- inventory

    async def _held(self, order_id: int, order_nonce: int, product_id: int, quantity: int) -> None:
        await self._reserve(order_id, order_nonce, product_id, quantity, for_payment=False)

    async def _held_for_payment(self, order_id: int, order_nonce: int, product_id: int, quantity: int) -> None:
        await self._reserve(order_id, order_nonce, product_id, quantity, for_payment=True)

    async def _held_by_another(self, order_id: int, product_id: int, quantity: int) -> None:
        await self._reserve(order_id, ANOTHER_NONCE, product_id, quantity, for_payment=True)

    async def _sold(self, order_id: int, order_nonce: int, product_id: int, quantity: int) -> None:
        await self._held(order_id, order_nonce, product_id, quantity)
        sale = CommitStock(order_id=order_id, idempotency_key=f"state:{order_id}:sold", order_nonce=order_nonce)
        await self._call(self._client(Inventory).commit, sale)

    async def _released(self, order_id: int, order_nonce: int, product_id: int, quantity: int) -> None:
        await self._held(order_id, order_nonce, product_id, quantity)
        release = ReleaseStock(order_id=order_id, idempotency_key=f"state:{order_id}:gone", order_nonce=order_nonce)
        await self._call(self._client(Inventory).release, release)

    async def _reserve(
        self, order_id: int, order_nonce: int, product_id: int, quantity: int, *, for_payment: bool
    ) -> None:
        await self._pieces(product_id, quantity + 10)
        held = ReserveStock(
            order_id=order_id,
            lines=(StockLine(product_id=product_id, quantity=quantity),),
            for_payment=for_payment,
            idempotency_key=f"state:{order_id}:held",
            order_nonce=order_nonce,
        )
        await self._call(self._client(Inventory).reserve, held)

    # -------------------------------------------------------------------------------------------------------- payments

    async def _authorized(self, **payment: int) -> None:
        await self._pay(AuthorizePayment, self._client(Payments).authorize, METHOD, **payment)

    async def _captured(self, **payment: int) -> None:
        await self._pay(ChargePayment, self._client(Payments).charge, METHOD, **payment)

    async def _failed(self, **payment: int) -> None:
        await self._pay(ChargePayment, self._client(Payments).charge, "sandbox:declined", **payment)

    async def _refunded(self, **payment: int) -> None:
        await self._captured(**payment)
        refund = RefundPayment(
            order_id=payment["order_id"],
            attempt=1,
            amount_minor=payment["amount_minor"],
            reference="state",
            idempotency_key=f"state:{payment['order_id']}:refund",
            order_nonce=payment["order_nonce"],
        )
        await self._call(self._client(Payments).refund, refund)

    async def _pay(
        self,
        message: Any,
        call: Call[Any, Any],
        method: str,
        *,
        order_id: int,
        order_nonce: int,
        user_id: int,
        amount_minor: int,
        payment_id: int | None = None,
    ) -> None:
        wanted = message(
            order_id=order_id,
            attempt=1,
            user_id=user_id,
            amount_minor=amount_minor,
            currency="USD",
            method=method,
            idempotency_key=f"state:{order_id}:{method}",
            order_nonce=order_nonce,
        )
        if payment_id is None:
            await self._call(call, wanted)
        elif not await self._has("payments", "payments", payment_id):
            async with self._id("payments", "payments", payment_id):
                await self._call(call, wanted)

    # -------------------------------------------------------------------------------------------------------- the bank

    async def _charge_authorized(self, charge_id: int, order_id: int, amount_minor: int, currency: str) -> None:
        await self._open_charge(AuthorizeCharge, self._client(Sandbox).authorize, charge_id, order_id, amount_minor)

    async def _charge_captured(self, charge_id: int, order_id: int, amount_minor: int, currency: str) -> None:
        await self._open_charge(ChargeCard, self._client(Sandbox).charge, charge_id, order_id, amount_minor)

    async def _charge_on_statement(self, operation_id: int, order_id: int, amount_minor: int, currency: str) -> None:
        charge = ChargeCard(
            idempotency_key="state:statement",
            order_id=order_id,
            amount_minor=amount_minor,
            currency=currency,
            method=METHOD,
        )
        async with self._id("sandbox", "operations", operation_id):
            await self._call(self._client(Sandbox).charge, charge)

    async def _known_key(self, key: str) -> None:
        charge = ChargeCard(idempotency_key=key, order_id=7_001, amount_minor=1, currency="USD", method=METHOD)
        await self._call(self._client(Sandbox).charge, charge)

    async def _open_charge(
        self, message: Any, call: Call[Any, Any], charge_id: int, order_id: int, amount_minor: int
    ) -> None:
        opening = message(
            idempotency_key=f"state:charge:{charge_id}",
            order_id=order_id,
            amount_minor=amount_minor,
            currency="USD",
            method=METHOD,
        )
        async with self._id("sandbox", "charges", charge_id):
            await self._call(call, opening)

    # ---------------------------------------------------------------------------------------------------------- events

    async def _event(self, source: str, type: str) -> None:
        """A new event of this type is in the outbox of a service."""
        emitters = {
            "stock.held": self._emit_held,
            "stock.available": self._emit_availability,
            "stock.exhausted": self._emit_availability,
            "product.price_changed": self._emit_price,
            "order.paid": self._new_paid_order,
            "payment.captured": self._new_paid_order,
            "refund.succeeded": self._emit_refund,
        }
        if type not in emitters:
            raise UnknownState(f"no state emits {type}: add it to tests/pacts/states.py")
        await emitters[type]()
        await self.newest_event(source, type)

    async def _emit_held(self) -> None:
        order_id = 7_900_000 + next(_numbers)
        await self._held(order_id, order_id, 7_500, 1)

    async def _emit_availability(self) -> None:
        """Out of stock, and in stock again."""
        await self._pieces(7_501, 1)
        await self._pieces(7_501, 0)
        await self._pieces(7_501, 1)

    async def _emit_price(self) -> None:
        await self._product(7_502, 1_000)
        price = UpdateProduct(id=7_502, price_minor=1_000 + next(_numbers))
        await self._call(self._client(Products).update, price)

    async def _new_paid_order(self) -> Order:
        await self._account(7_001)
        await self._pieces(7_500, 10)
        line = PlaceLine(product_id=7_500, quantity=2)
        order = PlaceOrder(user_id=7_001, lines=(line,), payment_method=METHOD)
        placed = await self._call(self._client(Orders).place, order)
        return await self._call(self._client(Orders).settled, AwaitOrder(id=placed.order.id, wait_ms=SETTLED_MS))

    async def _emit_refund(self) -> None:
        order = await self._new_paid_order()
        page = await self._call(self._client(Payments).list, ListPayments(order_id=order.id))
        wanted = RefundOrder(payment_id=page.payments[0].id, idempotency_key=f"state:{order.id}")
        await self._call(self._client(Orders).refund, wanted)

    # ------------------------------------------------------------------------------------------------- orders, the feed

    async def _waiting_order(self, **order: int) -> None:
        await self._order(None, **order)

    async def _paid_order(self, **order: int) -> None:
        await self._order(METHOD, **order)

    async def _order(self, method: str | None, *, order_id: int, user_id: int, product_id: int, quantity: int) -> None:
        if await self._has("orders", "orders", order_id):
            return
        await self._account(user_id)
        await self._pieces(product_id, quantity + 10)
        line = PlaceLine(product_id=product_id, quantity=quantity)
        async with self._id("orders", "orders", order_id):
            await self._call(
                self._client(Orders).place, PlaceOrder(user_id=user_id, lines=(line,), payment_method=method)
            )
        await self._call(self._client(Orders).settled, AwaitOrder(id=order_id, wait_ms=SETTLED_MS))

    async def _entry(self, type: str) -> None:
        """A new event of this type has reached the feed."""
        order = await self._new_paid_order()
        if type == "order.shipped":
            await self._call(self._client(Orders).move, MoveOrder(id=order.id, fulfilment="shipped"))
        elif type == "order.cancelled":
            await self._call(self._client(Orders).cancel, CancelOrder(id=order.id))
        elif type != "order.paid":
            raise UnknownState(f"no state makes an entry of {type}: add it to tests/pacts/states.py")

        async def has_arrived() -> bool:
            subject = msgspec.json.decode(await self._newest_entry(type) or b"{}").get("subject")
            return subject == f"order {order.id}"

        await until(has_arrived)

    async def _newest_entry(self, type: str) -> bytes:
        """As the API shows it; empty where there is none."""
        url, after = f"/events?types={type}&limit=500", 0
        newest: Any = None
        while page := (await self._shop.get(f"{url}&after={after}", token=await self._shop.staff())).json:
            newest, after = page[-1], page[-1]["position"]
        return b"" if newest is None else msgspec.json.encode(newest)

    # --------------------------------------------------------------------------------------------------------- details

    def _client(self, contract: Any) -> Any:
        return self._shop.harness.client(contract)

    async def _call(self, call: Call[Q, A], request: Q) -> A:
        async def made() -> A:
            return await call(request)

        return await topology.as_the_shop(self._shop.harness.host, made)

    async def _values(self, service: str, sql: str, *values: object) -> list[Any]:
        return await self._shop.harness.values(sql, *values, of=service)

    async def _has(self, service: str, table: str, id_: int) -> bool:
        return bool(await self._values(service, f"SELECT id FROM {table} WHERE id = $1", id_))

    @contextlib.asynccontextmanager
    async def _id(self, service: str, table: str, id_: int) -> AsyncGenerator[None]:
        """The row that is made in this block gets this id; later ones get those that they would have had."""
        sequence = f"pg_get_serial_sequence('{table}', 'id')"
        [last] = await self._values(service, f"SELECT pg_sequence_last_value({sequence}::regclass)")
        await self._values(service, f"SELECT setval({sequence}, $1, false)", id_)
        try:
            yield
        finally:
            start = f"(SELECT seqstart FROM pg_sequence WHERE seqrelid = {sequence}::regclass)"
            await self._values(service, f"SELECT setval({sequence}, coalesce($1, {start}), $1 IS NOT NULL)", last)
