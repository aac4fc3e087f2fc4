"""Placing orders, a batch at a time.

One batch runs through these steps; each settles some of its requests, and the next sees what is left:

1. replay    A key that has an order answers with it, as it was when it was placed, or belongs to another request.
2. validate  What is refused without asking another service: another account's order, a product in two lines.
3. look up   One call to users and one to products for the whole batch: does the buyer exist, what does it cost.
4. write     One transaction, one statement: orders with their lines, keys and history, the sagas that will carry them
             on, and the events `order.placed`. Then the sagas are driven (`checkout.py`).
5. repeat    Further requests with a key of this same batch get the answer of the first one with that key, or hear that
             the key belongs to that other request.

The order is what its key stores, for ever: there is no stored answer that could expire. Two requests with one key at
the same moment meet at the unique index of orders: the second waits for the end of the first transaction, at most two
seconds, and then answers with its order.

Refusals of steps 2 and 3 (unknown user or product, another price) are not stored: nothing was begun, and the same key
may be sent again when the reason is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from mercato.chassis.contract import (
    Actor,
    Batch,
    IdempotencyKeyReused,
    RequestInProgress,
    ServiceError,
)
from mercato.chassis.idempotency import keys as idempotency
from mercato.chassis.idempotency.keys import Keyed
from mercato.chassis.observability import faults
from mercato.chassis.observability.clock import Randomness
from mercato.chassis.postgres.database import Database, LockTimeout, UniqueViolation
from mercato.chassis.sagas.runner import Runner
from mercato.chassis.sagas.store import Saga
from mercato.contracts.orders import Order, PlacedOrder, PlaceOrder
from mercato.contracts.products import Products, Quote, QuoteProduct
from mercato.contracts.users import GetUser, User, UserNotFound, Users

from . import rules, store
from .steps import CHECKOUT, Checkout, encoded
from .store import OrderRecord

OPERATION: Final = "orders.place"
QUOTED_AT_ONCE: Final = 4_096
"""A batch of long orders can name more products than the queue of an operation holds; two lanes of this fit."""

WITHOUT_PAYMENT: Final = encoded(Checkout())

faults.declare("orders.place.before_commit", "orders.place.after_commit")

Answer = PlacedOrder | ServiceError


class PlacementAttempt:
    """One request on its way through the steps. `answer` is None until a step settles it."""

    __slots__ = ("actor", "answer", "keyed", "order", "request")

    def __init__(self, request: PlaceOrder, actor: Actor) -> None:
        self.request = request
        self.actor = actor
        self.keyed: Keyed | None = None
        if request.idempotency_key is not None:
            self.keyed = Keyed(idempotency.principal_of(actor), request.idempotency_key, request.fingerprint)
        self.order: store.NewOrder | None = None
        self.answer: Answer | None = None

    def replay(self, order: Order, fingerprint: bytes) -> None:
        """Answers with what its key did, for the request with `fingerprint`."""
        assert self.keyed
        is_same = self.keyed.fingerprint == fingerprint
        self.answer = PlacedOrder(order=order, replayed=True) if is_same else IdempotencyKeyReused()

    def settled(self) -> Answer:
        assert self.answer is not None, "a step left a request without an answer"
        return self.answer


class Placing:
    """Places orders. Asks users and products by their contracts, and writes to the database of orders."""

    def __init__(
        self, database: Database, runner: Runner, *, users: Users, products: Products, randomness: Randomness
    ) -> None:
        self._database = database
        self._runner = runner
        self._users = users
        self._products = products
        self._randomness = randomness

    async def place(self, batch: Batch[PlaceOrder]) -> Sequence[Answer]:
        attempts = [PlacementAttempt(request, actor) for request, actor in zip(batch, batch.actors, strict=True)]
        firsts, duplicates = _split_duplicates(attempts)
        await self._replay(firsts)
        _validate(_unsettled(firsts))
        await self._look_up(_unsettled(firsts))
        # A request with the same key may have placed its order since the first look.
        await self._replay([a for a in firsts if _is_refused(a.answer)])
        await self._write(_unsettled(firsts))
        await self._repeat(duplicates)
        return [attempt.settled() for attempt in attempts]

    # ------------------------------------------------------------------------------------------------- 1. replay

    async def _replay(self, attempts: Sequence[PlacementAttempt]) -> None:
        """Settles those whose key has an order already."""
        keys = [a.keyed for a in attempts if a.keyed]
        if not keys:
            return
        async with self._database.read() as tx:
            found = await store.by_keys(tx, [k.principal for k in keys], [k.key for k in keys])
        for attempt in attempts:
            if attempt.keyed and (old := found.get(attempt.keyed.identity)):
                attempt.replay(old.order, old.fingerprint)

    # ------------------------------------------------------------------------------------------------ 3. look up

    async def _look_up(self, attempts: Sequence[PlacementAttempt]) -> None:
        """Turns each request into a priced order, or settles it with the reason why not."""
        if not attempts:
            return
        user_ids = list({a.request.user_id for a in attempts})
        product_ids = list({line.product_id for a in attempts for line in a.request.lines})
        users, quotes = await asyncio.gather(
            self._users.get.many([GetUser(id=i) for i in user_ids]), self._quotes(product_ids)
        )
        users_by_id = dict(zip(user_ids, users, strict=True))
        quotes_by_id = dict(zip(product_ids, quotes, strict=True))
        nonces = self._nonces(len(attempts))
        for attempt, nonce in zip(attempts, nonces, strict=True):
            order = _prepare(attempt, users_by_id, quotes_by_id, nonce)
            if isinstance(order, ServiceError):
                attempt.answer = order
            else:
                attempt.order = order

    def _nonces(self, count: int) -> list[int]:
        """Random numbers of 63 bits, all bytes of a batch drawn at once."""
        drawn = self._randomness.token(8 * count)
        return [int.from_bytes(drawn[i : i + 8]) >> 1 for i in range(0, 8 * count, 8)]

    async def _quotes(self, product_ids: Sequence[int]) -> Sequence[Quote | ServiceError]:
        wanted = [QuoteProduct(id=i) for i in product_ids]
        quotes: list[Quote | ServiceError] = []
        for start in range(0, len(wanted), QUOTED_AT_ONCE):
            quotes += await self._products.quote.many(wanted[start : start + QUOTED_AT_ONCE])
        return quotes

    # -------------------------------------------------------------------------------------------------- 4. write

    async def _write(self, attempts: Sequence[PlacementAttempt]) -> None:
        try:
            await self._try_to_write(attempts)
        except UniqueViolation:
            # Another transaction has placed an order with one of the keys at this moment.
            await self._replay(attempts)
            left = _unsettled(attempts)
            if len(left) == len(attempts):
                raise  # it was not a key
            await self._write(left)
        except LockTimeout:
            if len(attempts) > 1:
                raise  # the chassis runs each alone; then it is clear whose key is in use
            attempts[0].answer = RequestInProgress()

    async def _try_to_write(self, attempts: Sequence[PlacementAttempt]) -> None:
        orders = [a.order for a in attempts if a.order]
        if not orders:
            return
        await self._runner.acquire_slot()
        async with self._database.transaction() as tx:
            rows = await store.insert(tx, orders, CHECKOUT, "reserve", self._runner.driver)
            placed = [_written(order, row) for order, row in zip(orders, rows, strict=True)]
            await store.emit_placed(tx, placed)
            await faults.point("orders.place.before_commit")
        for attempt, order in zip(attempts, placed, strict=True):
            attempt.answer = PlacedOrder(order=order)
        await faults.point("orders.place.after_commit")
        self._runner.drive([_checkout(new, row, order) for new, row, order in zip(orders, rows, placed, strict=True)])

    # -------------------------------------------------------------------------------------------------- 5. repeat

    async def _repeat(self, duplicates: Sequence[tuple[PlacementAttempt, PlacementAttempt]]) -> None:
        for attempt, first in duplicates:
            _repeat_one(attempt, first)
        # Where the first was refused because its key is another request's, a further one may be that request.
        await self._replay(_unsettled([attempt for attempt, _ in duplicates]))


def _checkout(new: store.NewOrder, row: store.PlacedRow, order: Order) -> Saga:
    """The saga of a new order, at its first step."""
    record = OrderRecord(order, new.nonce, new.payment_attempt, on_account=False, refund_pending_minor=0)
    return Saga((row.id, CHECKOUT, ""), "reserve", new.state, epoch=row.epoch, memo=record)


# ----------------------------------------------------------------------------------------------------------- details


def _is_refused(answer: Answer | None) -> bool:
    return isinstance(answer, ServiceError) and not isinstance(answer, IdempotencyKeyReused)


def _unsettled(attempts: Sequence[PlacementAttempt]) -> list[PlacementAttempt]:
    return [a for a in attempts if a.answer is None]


def _split_duplicates(
    attempts: Sequence[PlacementAttempt],
) -> tuple[list[PlacementAttempt], list[tuple[PlacementAttempt, PlacementAttempt]]]:
    """Those that are tried, and those whose key an earlier one of this batch has, each with that earlier one."""
    firsts: list[PlacementAttempt] = []
    duplicates: list[tuple[PlacementAttempt, PlacementAttempt]] = []
    by_identity: dict[tuple[str, str], PlacementAttempt] = {}
    for attempt in attempts:
        first = by_identity.setdefault(attempt.keyed.identity, attempt) if attempt.keyed else attempt
        if first is attempt:
            firsts.append(attempt)
        else:
            duplicates.append((attempt, first))
    return firsts, duplicates


def _repeat_one(attempt: PlacementAttempt, first: PlacementAttempt) -> None:
    assert attempt.keyed
    assert first.keyed
    answer = first.settled()
    if isinstance(answer, PlacedOrder):
        attempt.replay(answer.order, first.keyed.fingerprint)
    elif attempt.keyed.fingerprint == first.keyed.fingerprint:
        attempt.answer = answer.copy()
    elif not isinstance(answer, IdempotencyKeyReused):
        attempt.answer = IdempotencyKeyReused()  # it ran at the same time with another request


def _validate(attempts: Sequence[PlacementAttempt]) -> None:
    for attempt in attempts:
        request = attempt.request
        if rules.may_see(attempt.actor, request.user_id):
            attempt.answer = rules.check_lines(request.lines)
        else:
            attempt.answer = UserNotFound(user_id=request.user_id)


def _prepare(
    attempt: PlacementAttempt,
    users: dict[int, User | ServiceError],
    quotes: dict[int, Quote | ServiceError],
    nonce: int,
) -> store.NewOrder | ServiceError:
    """The order as it will be written, or the first reason why it will not be."""
    request = attempt.request
    user = users[request.user_id]
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
    total_minor = rules.total(lines)
    if changed := rules.check_total(request, total_minor, currency):
        return changed
    keyed, method = attempt.keyed, request.payment_method
    return store.NewOrder(
        user_id=request.user_id,
        currency=currency,
        total_minor=total_minor,
        lines=lines,
        nonce=nonce,
        payment_attempt=0 if method is None else 1,
        state=WITHOUT_PAYMENT if method is None else encoded(Checkout(paying=True, method=method, attempt=1)),
        actor=attempt.actor,
        principal=keyed.principal if keyed else None,
        idempotency_key=keyed.key if keyed else None,
        fingerprint=keyed.fingerprint if keyed else None,
    )


def _written(order: store.NewOrder, row: store.PlacedRow) -> Order:
    return Order(
        id=row.id,
        user_id=order.user_id,
        status="pending",
        payment="unpaid",
        fulfilment="unfulfilled",
        currency=order.currency,
        total_minor=order.total_minor,
        lines=order.lines,
        created_at=row.created_at,
        updated_at=row.created_at,
        version=1,
    )
