"""A storefront: a client of the REST API as another team would write it, which reads only what it shows.

Its messages are its own, not those of the shop: what it does not name it does not need.
"""

from __future__ import annotations

from typing import Any, TypeVar

import aiohttp
import msgspec

T = TypeVar("T")


class Money(msgspec.Struct, frozen=True):
    amount: str
    currency: str


class Account(msgspec.Struct, frozen=True):
    id: int
    email: str


class SignedIn(msgspec.Struct, frozen=True):
    access_token: str
    refresh_token: str
    expires_in: int
    user: Account


class FoundProduct(msgspec.Struct, frozen=True):
    id: int
    name: str
    price: Money
    in_stock: bool


class Item(msgspec.Struct, frozen=True):
    product_id: int
    name: str
    quantity: int
    line_total: Money


class ShownOrder(msgspec.Struct, frozen=True):
    id: int
    status: str
    payment: str
    fulfilment: str
    items: list[Item]
    total: Money


class ShownPayment(msgspec.Struct, frozen=True):
    id: int
    status: str
    captured: Money


class Refusal(Exception):
    """A request that the shop refuses: `details` by the `code`."""

    def __init__(self, status: int, code: str, details: Any) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.details = details


class _Code(msgspec.Struct, frozen=True):
    code: str


class ShortItem(msgspec.Struct, frozen=True):
    product_id: int
    available: int


class OutOfStockDetails(msgspec.Struct, frozen=True):
    items: list[ShortItem]


class DeclinedDetails(msgspec.Struct, frozen=True):
    order_id: int
    provider_code: str


class _OutOfStock(msgspec.Struct, frozen=True):
    details: OutOfStockDetails


class _Declined(msgspec.Struct, frozen=True):
    details: DeclinedDetails


DETAILS: dict[str, Any] = {"orders.out_of_stock": _OutOfStock, "orders.payment_declined": _Declined}


class Storefront:
    """Calls a shop at `url`; with `token`, for the customer who is signed in."""

    def __init__(self, session: aiohttp.ClientSession, url: str, token: str | None = None) -> None:
        self._session = session
        self._url = url
        self._headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    async def register(self, email: str, name: str, password: str) -> Account:
        return await self._send("POST", "/register", Account, {"email": email, "name": name, "password": password})

    async def sign_in(self, email: str, password: str) -> SignedIn:
        return await self._send("POST", "/login", SignedIn, {"email": email, "password": password})

    async def search(self, text: str) -> list[FoundProduct]:
        return await self._send("GET", f"/products?q={text}", list[FoundProduct])

    async def place(self, product_id: int, quantity: int, key: str, *, wait_seconds: int = 0) -> ShownOrder:
        more = {"Idempotency-Key": key} | ({"Prefer": f"wait={wait_seconds}"} if wait_seconds else {})
        items = [{"product_id": product_id, "quantity": quantity}]
        return await self._send("POST", "/orders", ShownOrder, {"items": items}, more)

    async def pay(self, order_id: int, method: str, key: str) -> ShownPayment:
        wanted = {"order_id": order_id, "payment_method": method}
        return await self._send("POST", "/payments", ShownPayment, wanted, {"Idempotency-Key": key})

    async def order(self, order_id: int) -> ShownOrder:
        return await self._send("GET", f"/orders/{order_id}", ShownOrder)

    async def cancel(self, order_id: int) -> ShownOrder:
        return await self._send("POST", f"/orders/{order_id}/cancel", ShownOrder, {})

    async def _send(
        self, method: str, path: str, answer: type[T], body: Any = None, more: dict[str, str] | None = None
    ) -> T:
        headers = {**self._headers, **(more or {})}
        async with self._session.request(method, self._url + path, json=body, headers=headers) as response:
            content = await response.read()
            if response.status >= 400:
                code = msgspec.json.decode(content, type=_Code).code
                known = DETAILS.get(code)
                details = msgspec.json.decode(content, type=known).details if known else None
                raise Refusal(response.status, code, details)
            return msgspec.json.decode(content, type=answer)
