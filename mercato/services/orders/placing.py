"""Placing orders, a batch at a time.

One batch runs through these steps; each settles some of its requests, and the next sees what is left:

1. recall    A key that was used within a day has its answer already, or belongs to another request.
2. judge     What is refused without asking anybody: another's order, a product twice.
3. look up   One call to users and one to products for the whole batch: does the buyer exist, what does it cost.
4. write     One transaction: claim the keys, write orders, lines, history, the sagas that will carry them on and the
             events that tell of them, store the answers under the keys. Then the sagas are driven (`checkout.py`).
5. echo      Further requests with a key of this same batch hear what the first with that key heard, or that it belongs
             to that other request.

Refusals of steps 2 and 3 (unknown user or product, another price) are not stored: nothing was begun, and the same key
may be sent again when the reason is gone. What step 4 commits is the order; a crash before leaves nothing at all.

A key whose stored answer is past its day still has its order. Nobody looks for it on the way of a new order: it shows
where a request with a key is refused, or where the unique key of orders refuses the write. Only then is it looked up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from mercato.chassis import faults, idempotency, saga
from mercato.chassis.codec import decode_outcome, encode_outcome
from mercato.chassis.contract import (
    Actor,
    Batch,
    IdempotencyKeyReused,
    RequestInProgress,
    ServiceError,
)
from mercato.chassis.db import Database, LockTimeout, Tx, UniqueViolation
from mercato.chassis.idempotency import Keyed
from mercato.chassis.runner import Runner
from mercato.chassis.saga import Saga
from mercato.contracts.orders import Order, PlacedOrder, PlaceOrder
from mercato.contracts.products import Products, Quote, QuoteProduct
from mercato.contracts.users import GetUser, User, UserNotFound, Users

from . import rules, store
from .steps import CHECKOUT, Checkout, encoded

OPERATION: Final = "orders.place"
QUOTED_AT_ONCE: Final = 4_096
"""A batch of long orders can name more products than the queue of an operation holds; two lanes of this fit."""

faults.declare("orders.place.before_commit", "orders.place.after_commit")

Outcome = PlacedOrder | ServiceError


class Attempted:
    """One request on its way through the steps. `outcome` is None until a step settles it."""

    __slots__ = ("actor", "keyed", "order", "outcome", "request")

    def __init__(self, request: PlaceOrder, actor: Actor) -> None:
        self.request = request
        self.actor = actor
        self.keyed: Keyed | None = None
        if request.idempotency_key is not None:
            self.keyed = Keyed(idempotency.principal_of(actor), request.idempotency_key, request.fingerprint)
        self.order: store.NewOrder | None = None
        self.outcome: Outcome | None = None

    def replay(self, order: Order, fingerprint: bytes) -> None:
        """Settles it with what its key did, for the request with `fingerprint`."""
        assert self.keyed
        mine = self.keyed.fingerprint == fingerprint
        self.outcome = PlacedOrder(order=order, replayed=True) if mine else IdempotencyKeyReused()

    def settled(self) -> Outcome:
        assert self.outcome is not None, "a step left a request without an answer"
        return self.outcome


class Placing:
    """Places orders. Asks users and products by their contracts, and writes to the database of orders."""

    def __init__(self, database: Database, runner: Runner, *, users: Users, products: Products) -> None:
        self._database = database
        self._runner = runner
        self._users = users
        self._products = products

    async def place(self, batch: Batch[PlaceOrder]) -> Sequence[Outcome]:
        attempts = [Attempted(request, actor) for request, actor in zip(batch, batch.actors, strict=True)]
        firsts, echoes = _split_twins(attempts)
        await self._recall(firsts)
        _judge(_open(firsts))
        await self._look_up(_open(firsts))
        await self._recall_orders([a for a in firsts if isinstance(a.outcome, ServiceError)])
        await self._write(_open(firsts))
        await self._echo(echoes)
        return [attempted.settled() for attempted in attempts]

    # ------------------------------------------------------------------------------------------------- 1. recall

    async def _recall(self, attempts: Sequence[Attempted]) -> None:
        if keyed := [a for a in attempts if a.keyed]:
            async with self._database.read() as tx:
                await _settle_from_store(tx, keyed)

    async def _recall_orders(self, attempts: Sequence[Attempted]) -> None:
        """Settles those whose key has made an order already, though its answer is past its day."""
        keys = [a.keyed for a in attempts if a.keyed and not isinstance(a.outcome, IdempotencyKeyReused)]
        if not keys:
            return
        async with self._database.read() as tx:
            found = await store.by_keys(tx, [k.principal for k in keys], [k.key for k in keys])
        for attempted in attempts:
            if attempted.keyed and (old := found.get(attempted.keyed.identity)):
                attempted.replay(old.order, old.fingerprint)

    # ------------------------------------------------------------------------------------------------ 3. look up

    async def _look_up(self, attempts: Sequence[Attempted]) -> None:
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
        for attempted in attempts:
            order = _prepare(attempted, users_by_id, quotes_by_id)
            if isinstance(order, ServiceError):
                attempted.outcome = order
            else:
                attempted.order = order

    async def _quotes(self, product_ids: Sequence[int]) -> Sequence[Quote | ServiceError]:
        wanted = [QuoteProduct(id=i) for i in product_ids]
        quotes: list[Quote | ServiceError] = []
        for start in range(0, len(wanted), QUOTED_AT_ONCE):
            quotes += await self._products.quote.many(wanted[start : start + QUOTED_AT_ONCE])
        return quotes

    # -------------------------------------------------------------------------------------------------- 4. write

    async def _write(self, attempts: Sequence[Attempted]) -> None:
        try:
            await self._try_to_write(attempts)
        except UniqueViolation:
            await self._recall_orders(_open(attempts))
            left = _open(attempts)
            if len(left) == len(attempts):
                raise  # it was not the key of an old order
            await self._try_to_write(left)
        except LockTimeout:
            if len(attempts) > 1:
                raise  # the chassis runs each alone; then it is clear whose key is held
            attempts[0].outcome = RequestInProgress()

    async def _try_to_write(self, attempts: Sequence[Attempted]) -> None:
        if not attempts:
            return
        await self._runner.room()
        async with self._database.transaction() as tx:
            await self._claim(tx, [a for a in attempts if a.keyed])
            placed = _open(attempts)
            answers = await _insert(tx, placed) if placed else []
            checkouts = [_checkout(a.request, answer.order) for a, answer in zip(placed, answers, strict=True)]
            if checkouts:
                await saga.start(tx, checkouts, self._runner.lease_seconds)
            await faults.point("orders.place.before_commit")
        for attempted, answer in zip(placed, answers, strict=True):
            attempted.outcome = answer
        await faults.point("orders.place.after_commit")
        self._runner.drive(checkouts)

    async def _claim(self, tx: Tx, keyed: Sequence[Attempted]) -> None:
        """Takes the keys. Who comes second, waited for the first here, and hears its answer."""
        if not keyed:
            return
        ours = await idempotency.claim(tx, OPERATION, [a.keyed for a in keyed if a.keyed])
        if taken := [a for a in keyed if a.keyed and a.keyed.identity not in ours]:
            await _settle_from_store(tx, taken)

    # --------------------------------------------------------------------------------------------------- 5. echo

    async def _echo(self, echoes: Sequence[tuple[Attempted, Attempted]]) -> None:
        for attempted, first in echoes:
            _echo_one(attempted, first)
        # Where the first was refused because its key is another request's, a further one may be that request.
        if asking := _open([attempted for attempted, _ in echoes]):
            await self._recall(asking)
            await self._recall_orders(_open(asking))


async def _settle_from_store(tx: Tx, attempts: Sequence[Attempted]) -> None:
    found = await idempotency.recall(tx, OPERATION, [a.keyed for a in attempts if a.keyed])
    for attempted, stored in zip(attempts, found, strict=True):
        if isinstance(stored, bytes):
            placed = decode_outcome(PlacedOrder, stored)
            assert isinstance(placed, PlacedOrder), "refusals are not stored"
            attempted.outcome = PlacedOrder(order=placed.order, replayed=True)
        elif stored is not None:
            attempted.outcome = stored


async def _insert(tx: Tx, attempts: Sequence[Attempted]) -> list[PlacedOrder]:
    orders = [a.order for a in attempts if a.order]
    rows = await store.insert(tx, orders)
    answers = [PlacedOrder(order=_written(order, row)) for order, row in zip(orders, rows, strict=True)]
    await store.tell_placed(tx, [answer.order for answer in answers])
    done = [(a.keyed, answer) for a, answer in zip(attempts, answers, strict=True) if a.keyed]
    if done:
        stored = [encode_outcome(answer) for _, answer in done]
        await idempotency.remember(tx, OPERATION, [keyed for keyed, _ in done], stored)
    return answers


def _checkout(request: PlaceOrder, order: Order) -> Saga:
    """The saga of a new order, at its first step."""
    state = Checkout()
    if request.payment_method is not None:
        state = Checkout(paying=True, method=request.payment_method, attempt=1, with_order=True)
    return Saga((order.id, CHECKOUT, ""), "reserve", encoded(state), memo=order)


# ----------------------------------------------------------------------------------------------------------- details


def _open(attempts: Sequence[Attempted]) -> list[Attempted]:
    return [a for a in attempts if a.outcome is None]


def _split_twins(attempts: Sequence[Attempted]) -> tuple[list[Attempted], list[tuple[Attempted, Attempted]]]:
    """Those that are tried, and those whose key an earlier one of this batch has, each with that earlier one."""
    firsts: list[Attempted] = []
    echoes: list[tuple[Attempted, Attempted]] = []
    by_identity: dict[tuple[str, str], Attempted] = {}
    for attempted in attempts:
        if attempted.keyed is None:
            firsts.append(attempted)
            continue
        first = by_identity.setdefault(attempted.keyed.identity, attempted)
        if first is attempted:
            firsts.append(attempted)
        else:
            echoes.append((attempted, first))
    return firsts, echoes


def _echo_one(attempted: Attempted, first: Attempted) -> None:
    assert attempted.keyed
    assert first.keyed
    heard = first.settled()
    if isinstance(heard, PlacedOrder):
        attempted.replay(heard.order, first.keyed.fingerprint)
    elif attempted.keyed.fingerprint == first.keyed.fingerprint:
        attempted.outcome = heard.copy()
    elif not isinstance(heard, IdempotencyKeyReused):
        attempted.outcome = IdempotencyKeyReused()  # it ran at the same time with another request


def _judge(attempts: Sequence[Attempted]) -> None:
    for attempted in attempts:
        request = attempted.request
        if rules.may_see(attempted.actor, request.user_id):
            attempted.outcome = rules.check_lines(request.lines)
        else:
            attempted.outcome = UserNotFound(user_id=request.user_id)


def _prepare(
    attempted: Attempted, users: dict[int, User | ServiceError], quotes: dict[int, Quote | ServiceError]
) -> store.NewOrder | ServiceError:
    """The order as it will be written, or the first reason why it will not be."""
    request = attempted.request
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
    keyed = attempted.keyed
    return store.NewOrder(
        user_id=request.user_id,
        currency=currency,
        total_minor=total_minor,
        lines=lines,
        actor=attempted.actor,
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
