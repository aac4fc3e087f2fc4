"""Guests: callers who order without an account. The access token of an order identifies its guest.

The token is an HMAC (SHA-256) of the order's id and nonce under a key of this service: nothing is stored, a replay
answers with the same token. Where a restored database gives an id to another order, that one gets another token, since
its nonce is another (`placing.py`). With another secret of the shop all tokens are void.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
from collections.abc import AsyncGenerator
from typing import Final

import msgspec

from mercato.chassis.contract import Actor, acting_as
from mercato.chassis.postgres.database import Database
from mercato.contracts.order_refusals import OrderNotFound
from mercato.contracts.orders import Order
from mercato.contracts.roles import GUEST, GUEST_USER

from . import read_store
from .read_store import OrderRecord

KEY_PURPOSE: Final = "guests"


class Guests:
    """`key`: 32 secret bytes, the same in every process of this service."""

    def __init__(self, database: Database, key: bytes) -> None:
        self._database = database
        self._key = key

    def access_token(self, order_id: int, nonce: int) -> str:
        """43 letters, digits, `-` and `_`."""
        digest = hmac.digest(self._key, order_id.to_bytes(8) + nonce.to_bytes(8), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

    def admits(self, record: OrderRecord | None, access_token: str | None) -> bool:
        """Whether the order exists and is a guest's, and this is its token."""
        if record is None or access_token is None or record.order.user_id != GUEST_USER:
            return False
        return self.is_token_of(record, access_token)

    def is_token_of(self, record: OrderRecord, access_token: str) -> bool:
        """Whether the token was made for the order, which an account may own by now. Compares in constant time."""
        return hmac.compare_digest(self.access_token(record.id, record.nonce).encode(), access_token.encode())

    async def admitted(self, order_id: int, access_token: str) -> OrderRecord:
        """The order that the token opens. Raises `OrderNotFound` for a wrong token."""
        async with self._database.read() as tx:
            record = (await read_store.get(tx, [order_id])).get(order_id)
        if record is None or not self.admits(record, access_token):
            raise OrderNotFound(order_id=order_id)
        return record

    @contextlib.asynccontextmanager
    async def acting(self, order_id: int, access_token: str | None) -> AsyncGenerator[None]:
        """Calls in this block are made by the guest of an order; without a token, by their caller.

        Raises `OrderNotFound` for a wrong token. A token is valid until the order is claimed; a caller that was
        admitted before does not find the order after that (`rules.visible`).
        """
        if access_token is None:
            yield
            return
        await self.admitted(order_id, access_token)
        with acting_as(Actor(GUEST, order_id)):
            yield


def without_email(order: Order) -> Order:
    """The order as callers other than staff see it."""
    return order if order.guest_email is None else msgspec.structs.replace(order, guest_email=None)
