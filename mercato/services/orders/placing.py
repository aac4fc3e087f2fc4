"""Placing orders, a batch at a time: a keyed batch (`chassis/idempotency/batch.py`) with these steps.

recall    A key that has an order is answered with it, as it was when it was placed. The answer is made from the order,
          which stays: no stored answer can expire.
prepare   Refuses what needs no other service: another account's order, a product in two lines. Then one call to
          payments for methods that are not cached, one to users and one to products for the whole batch: whether the
          buyers exist, and the prices.
write     One transaction, one statement: orders with their lines, keys and history, the sagas that continue them, and
          the events `order.placed`. It leaves out an order of a customer who has as many open ones as a customer may.
          It locks each limited customer until the commit: the open orders of a customer are counted by one batch after
          another. It also leaves out an order that may have been lost in a restore: `lost_orders.py` checks it, and a
          second transaction writes it.
          After the commit the sagas are driven (`checkout.py`). Of two concurrent requests with one key, the second
          waits for the end of the first transaction, at most two seconds, at the lock of their customer or at the
          unique index of orders, and then answers with its order.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import ANONYMOUS_ACTOR, ServiceError, concern, trace_of
from mercato.chassis.idempotency.batch import KeyedAttempt, KeyedBatch, StoredAnswer, unsettled
from mercato.chassis.idempotency.keys import Identity, Keyed
from mercato.chassis.mail import addresses
from mercato.chassis.observability import faults
from mercato.chassis.observability.clock import Randomness
from mercato.chassis.postgres.database import Database
from mercato.chassis.sagas.runner import Runner
from mercato.chassis.sagas.store import Saga
from mercato.contracts.order_refusals import TooManyOpenOrders
from mercato.contracts.orders import Order, OrderLine, PlacedOrder, PlaceOrder
from mercato.contracts.products import FindProduct, Products, Quote, QuoteProduct
from mercato.contracts.roles import CUSTOMER, GUEST_USER, may_see
from mercato.contracts.users import GetUser, User, UserNotFound, Users

from . import read_store, rules, store
from .guests import Guests, without_email
from .lost_orders import LostOrders
from .payment_methods import PaymentMethods
from .read_store import OrderRecord
from .rules import BuyerLimits, Limits
from .steps import CHECKOUT, Checkout, encoded
from .store import NewOrder

QUOTED_AT_ONCE: Final = 4_096
"""A batch of long orders can name more products than the queue of an operation holds; two lanes of this fit."""

NONCES_PURPOSE: Final = "nonces"
NONCE_BYTES: Final = 8

NO_ID: Final = 0
NO_TIME: Final = datetime.datetime.fromtimestamp(0, datetime.UTC)
"""The id and the time of an order that is not written yet: the database assigns both."""

faults.declare("orders.place.before_commit", "orders.place.after_commit")

Placement = KeyedAttempt[PlaceOrder, PlacedOrder, NewOrder]


class Placing(KeyedBatch[PlaceOrder, PlacedOrder, NewOrder]):
    """Places orders: calls users, products and payments, and writes to the database of orders."""

    def __init__(
        self,
        database: Database,
        runner: Runner,
        *,
        users: Users,
        products: Products,
        methods: PaymentMethods,
        randomness: Randomness,
        nonce_key: bytes,
        lost: LostOrders,
        guests: Guests,
        limits: Limits,
    ) -> None:
        self._database = database
        self._runner = runner
        self._users = users
        self._products = products
        self._methods = methods
        self._randomness = randomness
        self._nonce_key = nonce_key
        self._lost = lost
        self._guests = guests
        self._limits = limits

    async def recall(self, attempts: Sequence[Placement]) -> Mapping[Identity, StoredAnswer[PlacedOrder]]:
        async with self._database.read() as tx:
            found = await read_store.by_keys(tx, [attempt.identity for attempt in attempts])
        return {
            attempt.identity: StoredAnswer(
                old.fingerprint, self._answer(old.order, old.nonce), _differing(attempt.request, old.order)
            )
            for attempt in attempts
            if (old := found.get(attempt.identity))
        }

    async def prepare(self, attempts: Sequence[Placement]) -> None:
        """Makes a priced order of each request, or answers it with the refusal."""
        await self._find_skus(attempts)
        _validate(unsettled(attempts))
        await self._check_methods(unsettled(attempts))
        await self._look_up(unsettled(attempts))

    async def write(self, attempts: Sequence[Placement]) -> None:
        left = await self._insert([(a, a.prepared) for a in attempts if a.prepared])
        if left:
            await self._insert_lost(left)

    async def _insert(self, orders: Sequence[tuple[Placement, NewOrder]]) -> Sequence[tuple[Placement, NewOrder]]:
        """Writes orders, answers their requests and drives their sagas; gives those that the statement left out."""
        await self._runner.acquire_slot()
        async with self._database.transaction() as tx:
            rows = await store.insert(tx, [new for _, new in orders], CHECKOUT, "reserve", self._runner.driver)
            written = [(*orders[row.n - 1], row) for row in rows]
            placed = [_written(new, row) for _, new, row in written]
            for attempt, _, row in written:
                concern(attempt.context, row.id)
            if placed:
                await store.emit_placed(tx, placed)
            await faults.point("orders.place.before_commit")
        for (attempt, new, _), order in zip(written, placed, strict=True):
            attempt.answer = self._answer(order, new.nonce)
        await faults.point("orders.place.after_commit")
        self._runner.drive([_checkout(new, row, order) for (_, new, row), order in zip(written, placed, strict=True)])
        return [one for one in orders if one[0].answer is None] if len(placed) < len(orders) else ()

    async def _insert_lost(self, left: Sequence[tuple[Placement, NewOrder]]) -> None:
        """Writes the lost orders among those left out, and refuses the rest: their buyers have too many open orders."""
        lost = await self._lost.recognise([new for _, new in left])
        found: list[tuple[Placement, NewOrder]] = []
        for attempt, new in left:
            answer = lost.get(new.nonce)
            if isinstance(answer, ServiceError):
                attempt.answer = answer
            elif answer is not None:
                found.append((attempt, answer))
        refused = await self._insert(found) if found else ()
        await self._refuse([*(one for one in left if one[1].nonce not in lost), *refused])

    async def _refuse(self, orders: Sequence[tuple[Placement, NewOrder]]) -> None:
        """Refuses orders of buyers with too many open ones. A key that has an order by now is answered with it."""
        for attempt, new in orders:
            attempt.answer = TooManyOpenOrders(user_id=new.order.user_id, limit=new.limits.open_orders)
        await self._recall([attempt for attempt, _ in orders])

    # --------------------------------------------------------------------------------- payments, users and products

    def _answer(self, order: Order, nonce: int) -> PlacedOrder:
        if order.user_id != GUEST_USER:
            return PlacedOrder(order=order)
        return PlacedOrder(order=without_email(order), access_token=self._guests.access_token(order.id, nonce))

    async def _find_skus(self, attempts: Sequence[Placement]) -> None:
        """Puts the id of the product into each line that names a sku; refuses requests with an unknown sku."""
        naming = [a for a in attempts if any(line.sku is not None for line in a.request.lines)]
        if not naming:
            return
        skus = list({line.sku for a in naming for line in a.request.lines if line.sku is not None})
        products = await self._products.find.many([FindProduct(sku=sku) for sku in skus])
        found = dict(zip(skus, products, strict=True))
        for attempt in naming:
            request = rules.with_products(attempt.request, found)
            if isinstance(request, ServiceError):
                attempt.answer = request.copy()
            else:
                attempt.request = request

    async def _check_methods(self, attempts: Sequence[Placement]) -> None:
        """Refuses requests with a payment method that payments does not accept."""
        paying = [attempt for attempt in attempts if attempt.request.payment_method is not None]
        if not paying:
            return
        checked = await self._methods.check(attempt.request.payment_method for attempt in paying)
        for attempt in paying:
            if isinstance(refusal := checked[attempt.request.payment_method], ServiceError):
                attempt.answer = refusal.copy()

    async def _look_up(self, attempts: Sequence[Placement]) -> None:
        if not attempts:
            return
        user_ids = list({a.request.user_id for a in attempts if not a.request.guest})
        product_ids = list({line.product_id for a in attempts for line in a.request.lines})
        users, quotes = await asyncio.gather(
            self._users.get.many([GetUser(id=i) for i in user_ids]), self._quotes(product_ids)
        )
        users_by_id: dict[int, User | ServiceError | None] = {
            GUEST_USER: None,
            **dict(zip(user_ids, users, strict=True)),
        }
        quotes_by_id = dict(zip(product_ids, quotes, strict=True))
        nonces = self._nonces([attempt.keyed for attempt in attempts])
        for attempt, nonce in zip(attempts, nonces, strict=True):
            limits = self._limits.of(_buyer(attempt.request), attempt.actor)
            order = _prepare(attempt, users_by_id, quotes_by_id, nonce, limits)
            if isinstance(order, ServiceError):
                attempt.answer = order
            else:
                attempt.prepared = order

    def _nonces(self, orders: Sequence[Keyed | None]) -> list[int]:
        """The random part of each order, of 63 bits; all random bytes of a batch are drawn at once.

        With a key it is an HMAC (SHA-256) of the key and its principal: after a restore the same request derives the
        same nonce, by which payments finds the payments of the former order. It is indistinguishable from a random one.
        """
        drawn = self._randomness.token(NONCE_BYTES * sum(keyed is None for keyed in orders))
        random = iter([drawn[i : i + NONCE_BYTES] for i in range(0, len(drawn), NONCE_BYTES)])
        return [int.from_bytes(next(random) if keyed is None else self._derived(keyed)) >> 1 for keyed in orders]

    def _derived(self, keyed: Keyed) -> bytes:
        named = f"{keyed.principal}\0{keyed.key}".encode()  # neither has a zero byte
        return hmac.digest(self._nonce_key, named, hashlib.sha256)[:NONCE_BYTES]

    async def _quotes(self, product_ids: Sequence[int]) -> Sequence[Quote | ServiceError]:
        wanted = [QuoteProduct(id=i) for i in product_ids]
        quotes: list[Quote | ServiceError] = []
        for start in range(0, len(wanted), QUOTED_AT_ONCE):
            quotes += await self._products.quote.many(wanted[start : start + QUOTED_AT_ONCE])
        return quotes


def _differing(request: PlaceOrder, order: Order) -> str:
    """The field in which a request differs from an order; empty where no difference is known."""
    if order.user_id != (GUEST_USER if request.guest else request.user_id):
        return "user_id"
    asked = {line.product_id: line.quantity for line in request.lines}
    is_named = all(line.sku is None for line in request.lines)
    return "lines" if is_named and asked != {line.product_id: line.quantity for line in order.lines} else ""


def _checkout(new: NewOrder, row: store.PlacedRow, order: Order) -> Saga:
    """The saga of a new order, at its first step."""
    open_units = None if row.open_units is None else tuple(row.open_units)
    record = OrderRecord(
        order, new.nonce, new.payment_attempt, on_account=False, refund_pending_minor=0, open_units=open_units
    )
    return Saga((row.id, CHECKOUT, ""), "reserve", new.state, epoch=row.epoch, memo=record, trace=new.trace or "")


# ----------------------------------------------------------------------------------------------------------- details


def _buyer(request: PlaceOrder) -> int:
    return GUEST_USER if request.guest else request.user_id


def _validate(attempts: Sequence[Placement]) -> None:
    for attempt in attempts:
        request = attempt.request
        if may_see(attempt.actor, _buyer(request)) or (request.guest and attempt.actor == ANONYMOUS_ACTOR):
            attempt.answer = rules.check_request(request)
        else:
            attempt.answer = UserNotFound(user_id=request.user_id)


def _prepare(
    attempt: Placement,
    users: dict[int, User | ServiceError | None],
    quotes: dict[int, Quote | ServiceError],
    nonce: int,
    limits: BuyerLimits,
) -> NewOrder | ServiceError:
    """The order as it will be written, or the first reason why it will not be."""
    request = attempt.request
    user = users[_buyer(request)]
    if isinstance(user, ServiceError):
        return user.copy()
    known: dict[int, Quote] = {}
    for line in request.lines:
        quote = quotes[line.product_id]
        if isinstance(quote, ServiceError):
            return quote.copy()
        known[line.product_id] = quote
    currency = rules.currency_of(request.lines, known)
    if isinstance(currency, ServiceError):
        return currency
    lines = rules.priced(request.lines, known)
    if changed := rules.check_total(request, rules.total(lines), currency):
        return changed
    return _new_order(attempt, lines, currency, nonce, limits)


def _new_order(
    attempt: Placement, lines: tuple[OrderLine, ...], currency: str, nonce: int, limits: BuyerLimits
) -> NewOrder:
    """An order as it will be written, with its checkout: at its first payment where the request names a method."""
    request = attempt.request
    is_paying = request.payment_method is not None
    state = Checkout(
        paying=is_paying,
        method=request.payment_method,
        attempt=1 if is_paying else 0,
        by_staff=limits.bounds_units and attempt.actor.role != CUSTOMER,
    )
    return NewOrder(
        order=Order(
            id=NO_ID,
            user_id=_buyer(request),
            status="pending",
            payment="unpaid",
            fulfilment="unfulfilled",
            currency=currency,
            total_minor=rules.total(lines),
            lines=lines,
            created_at=NO_TIME,
            updated_at=NO_TIME,
            version=1,
            customer_note=request.customer_note,
            guest_email=addresses.canonical(request.guest_email) if request.guest and request.guest_email else None,
        ),
        nonce=nonce,
        payment_attempt=state.attempt,
        state=encoded(state),
        actor=attempt.actor,
        keyed=attempt.keyed,
        limits=limits,
        trace=trace_of(attempt.context) or None,
    )


def _written(new: NewOrder, row: store.PlacedRow) -> Order:
    return msgspec.structs.replace(new.order, id=row.id, created_at=row.created_at, updated_at=row.created_at)
