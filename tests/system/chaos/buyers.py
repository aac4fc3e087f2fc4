"""What clients do in the shop while faults are injected: the same for the same seed, whatever the answers.

One `Scenario` is a few requests of one client that belong together. `SCENARIO_WEIGHTS` says how often each kind comes.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

from system.chaos.clients import Clients, Reply, Who

STAFF: Final = Who("staff", 0, "staff")
PLENTY: Final = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 100, 101, 102, 103, 104, 105, 200)
SHORT: Final = (201, 202, 203, 204)
"""Products of which there is never enough."""
SHORT_PIECES: Final = 25
GOOD: Final = ("sandbox:ok", "sandbox:ok", "sandbox:lost_answer", "sandbox:error_then_ok", "sandbox:slow:200")
BAD: Final = ("sandbox:declined", "sandbox:insufficient_funds", "sandbox:capture_expired")
LOOKS: Final = 8
"""How often a client reads an order before it gives up waiting for the result."""


def people() -> list[Who]:
    """Two customers with tokens. A client without a token is staff."""
    return [
        Who("user:1", 1, "customer", "alice@example.com"),
        Who("user:2", 2, "customer", "bob@example.com"),
    ]


async def stock_up(clients: Clients) -> None:
    """Takes most of what there is of some products away."""
    for product_id in SHORT:
        reply = await clients.insist(
            STAFF,
            "PUT",
            "/products/{id}/stock",
            {"on_hand": SHORT_PIECES, "reason": "counted"},
            rng=random.Random(product_id),
            id=product_id,
        )
        assert reply is not None, "the shop has not answered"
        assert reply.status == 200, reply


class Scenario:
    """A sequence of requests. `number` and the seed decide everything about it."""

    def __init__(self, clients: Clients, customers: list[Who], seed: int, number: int) -> None:
        self._clients = clients
        self._customers = customers
        self._rng = random.Random(f"{seed}:scenario:{number}")
        self._name = f"{seed}-{number}"
        self._keys = itertools.count(1)
        customer = self._rng.choice(customers)
        # Most orders are placed by staff on behalf of a customer, as in a shop without sign-in.
        self._user_id = customer.user_id
        self._who = customer if self._rng.random() < 0.4 else STAFF

    async def run(self) -> None:
        [steps] = self._rng.choices(list(SCENARIO_WEIGHTS), list(SCENARIO_WEIGHTS.values()))
        await steps(self)

    # -------------------------------------------------------------------------------------------------------- scenarios

    async def pays_with_the_order(self) -> None:
        order = await self._order(self._rng.choice(GOOD))
        await self._aftermath(await self._settled(order))

    async def is_declined(self) -> None:
        await self._settled(await self._order(self._rng.choice(BAD)))

    async def pays_later(self) -> None:
        order = await self._settled(await self._order(None), looks=2)
        if order is None:
            return
        if self._rng.random() < 0.3:
            await self._pay(order, self._rng.choice(BAD))
        await self._pay(order, self._rng.choice(GOOD))
        await self._aftermath(await self._settled(order))

    async def reserves_the_amount_first(self) -> None:
        order = await self._settled(await self._order(None), looks=2)
        if order is None:
            return
        # Staff alone may put off the capture: goods that are sold and not paid for are theirs to risk.
        paid = await self._pay(order, "sandbox:ok", who=STAFF, capture=False)
        if paid is None or paid.status != 201:
            return
        verb = self._rng.choice(("capture", "void"))
        await self._insist(STAFF, "POST", f"/payments/{{id}}/{verb}", id=paid.json["id"])
        await self._settled(order)

    async def never_pays(self) -> None:
        order = await self._order(None)
        if order and self._rng.random() < 0.5:
            await self._cancel(order)

    async def sends_everything_twice(self) -> None:
        body, key = self._basket(self._rng.choice((*GOOD, None))), self._key()
        duplicates = [self._insist(self._who, "POST", "/orders", body, key=key) for _ in range(self._rng.randint(2, 4))]
        if self._rng.random() < 0.3:
            other = {**body, "user_id": body["user_id"], "items": [{"product_id": 9, "quantity": 9}]}
            duplicates.append(self._insist(self._who, "POST", "/orders", other, key=key))
        replies = await asyncio.gather(*duplicates)
        await self._settled(_shown(next((r for r in replies if r and r.status == 201), None)))

    async def uses_a_key_again(self) -> None:
        body, key = self._basket(self._rng.choice(GOOD)), self._key()
        first = await self._insist(self._who, "POST", "/orders", body, key=key)
        other = {**body, "items": [{"product_id": 1, "quantity": 7}]}
        await self._insist(self._who, "POST", "/orders", other, key=key)
        await self._insist(self._who, "POST", "/orders", body, key=key)
        await self._settled(_shown(first))

    async def places_many_orders_at_once(self) -> None:
        """Several at once, so that what the shop does becomes batches."""
        methods = [self._rng.choice((*GOOD, *BAD)) for _ in range(self._rng.randint(5, 15))]
        bodies = [(self._basket(method), self._key()) for method in methods]
        orders = await asyncio.gather(
            *(self._insist(self._who, "POST", "/orders", body, key=key) for body, key in bodies)
        )
        await self._settled(_shown(orders[-1]), looks=3)

    async def counts_stock(self) -> None:
        product_id, key = self._rng.choice(SHORT), self._key()
        body = {"delta": self._rng.choice((-1, 1, 2, 3)), "reason": "chaos"}
        for _ in range(self._rng.choice((1, 1, 2))):
            await self._insist(STAFF, "POST", "/products/{id}/stock/adjustments", body, key=key, id=product_id)

    async def looks_at_what_is_not_theirs(self) -> None:
        mine, other = self._rng.sample(self._customers, 2)
        body = {**self._basket("sandbox:ok"), "user_id": mine.user_id}
        order = _shown(await self._insist(mine, "POST", "/orders", body, key=self._key()))
        if order:
            await self._insist(other, "GET", "/orders/{id}", id=order["id"])
            await self._insist(other, "POST", "/orders/{id}/cancel", id=order["id"])
            await self._insist(mine, "GET", "/orders/{id}", id=order["id"])

    # -------------------------------------------------------------------------------------------------------- aftermath

    async def _aftermath(self, order: dict[str, Any] | None) -> None:
        """What becomes of an order that is paid, as far as that is: some come back in one way or another."""
        fate = self._rng.choices(("kept", "cancelled", "refunded", "returned"), (50, 15, 20, 15))[0]
        if order is None or fate == "kept":
            return
        if fate == "cancelled":
            await self._cancel(order)
        elif fate == "refunded":
            await self._refund(order)
        else:
            await self._return(order)
        await self._settled(order, looks=3)

    async def _cancel(self, order: dict[str, Any]) -> None:
        await self._insist(self._who, "POST", "/orders/{id}/cancel", {"reason": "chaos"}, id=order["id"])

    async def _refund(self, order: dict[str, Any]) -> None:
        reply = await self._insist(STAFF, "GET", "/payments?order_id={id}", id=order["id"])
        if reply is None or not reply.json:
            return
        key = self._key()
        body = self._rng.choice(({}, {"amount": "1.00"}, {"amount": "2.50", "reason": "scratched"}))
        times = self._rng.choice((1, 2))
        duplicates = (
            self._insist(STAFF, "POST", "/payments/{id}/refunds", body, key=key, id=reply.json[0]["id"])
            for _ in range(times)
        )
        await asyncio.gather(*duplicates)
        if self._rng.random() < 0.3:
            await self._insist(STAFF, "POST", "/payments/{id}/refunds", {}, key=self._key(), id=reply.json[0]["id"])

    async def _return(self, order: dict[str, Any]) -> None:
        for fulfilment in ("shipped", "delivered"):
            await self._insist(STAFF, "PATCH", "/orders/{id}", {"fulfilment": fulfilment}, id=order["id"])
        product_id = order["items"][0]["product_id"]
        body = self._rng.choice(({}, {"items": [{"product_id": product_id, "quantity": 1}]}))
        await self._insist(STAFF, "POST", "/orders/{id}/returns", body, key=self._key(), id=order["id"])

    # ------------------------------------------------------------------------------------------------------------ parts

    def _key(self) -> str:
        return f"chaos-{self._name}-{next(self._keys)}"

    def _basket(self, method: str | None) -> dict[str, Any]:
        """An order of one or two products, some of which there is never enough of."""
        product_ids = [self._rng.choice(PLENTY if self._rng.random() < 0.8 else SHORT)]
        if self._rng.random() < 0.3:
            other = self._rng.choice([i for i in (*PLENTY, *SHORT) if i not in product_ids])
            product_ids.append(other)
        items = [{"product_id": i, "quantity": self._rng.randint(1, 3)} for i in product_ids]
        body: dict[str, Any] = {"user_id": self._user_id, "items": items}
        return body if method is None else {**body, "payment_method": method}

    async def _order(self, method: str | None) -> dict[str, Any] | None:
        wait, hasty = self._rng.random() < 0.15, self._rng.random() < 0.1
        body = self._basket(method)
        return _shown(await self._insist(self._who, "POST", "/orders", body, key=self._key(), wait=wait, hasty=hasty))

    async def _pay(
        self, order: dict[str, Any], method: str, *, who: Who | None = None, capture: bool = True
    ) -> Reply | None:
        body = {"order_id": order["id"], "payment_method": method, "capture": capture}
        hasty = self._rng.random() < 0.1
        return await self._insist(who or self._who, "POST", "/payments", body, key=self._key(), hasty=hasty)

    async def _settled(self, order: dict[str, Any] | None, looks: int = LOOKS) -> dict[str, Any] | None:
        """Looks at an order until something has come of it; gives it as it was seen last."""
        for look in range(looks if order else 0):
            assert order is not None
            reply = await self._insist(self._who, "GET", "/orders/{id}", id=order["id"])
            order = _shown(reply) or order
            if order["status"] == "cancelled" or order["payment"] not in ("unpaid", "authorized"):
                break
            await asyncio.sleep(self._rng.uniform(0.05, 0.1) * (look + 1))
        return order

    async def _insist(self, who: Who, method: str, route: str, body: Any = None, **options: Any) -> Reply | None:
        await asyncio.sleep(self._rng.uniform(0, 0.03))
        # A generator of its own: how often a request is repeated must not change what comes after it.
        rng = random.Random(self._rng.random())
        return await self._clients.insist(who, method, route, body, rng=rng, **options)


def _shown(reply: Reply | None) -> dict[str, Any] | None:
    return reply.json if reply is not None and reply.status < 300 else None


SCENARIO_WEIGHTS: Final[dict[Callable[[Scenario], Awaitable[None]], int]] = {
    Scenario.pays_with_the_order: 40,
    Scenario.is_declined: 10,
    Scenario.pays_later: 14,
    Scenario.reserves_the_amount_first: 6,
    Scenario.never_pays: 8,
    Scenario.places_many_orders_at_once: 25,
    Scenario.sends_everything_twice: 8,
    Scenario.uses_a_key_again: 4,
    Scenario.counts_stock: 6,
    Scenario.looks_at_what_is_not_theirs: 4,
}
