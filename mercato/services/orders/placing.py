"""Placing orders, a batch at a time.

One batch runs through these steps; each settles some of its requests, and the next sees what is left:

1. recall    A key that was used before has its answer already, or belongs to another request.
2. look up   One call to users and one to products for the whole batch: does the buyer exist, what does it cost.
3. write     One transaction: claim the keys, write orders, lines and history, store the answers under the keys.
4. echo      Further requests with a key of this same batch hear what the first with that key heard.

Refusals of step 2 (unknown user or product, another price) are not stored: nothing was begun, and the same key may be
sent again when the reason is gone. What step 3 commits is the order; a crash before leaves nothing at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from mercato.chassis import faults, idempotency
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
from mercato.contracts.orders import Order, PlacedOrder, PlaceOrder
from mercato.contracts.products import Products, Quote, QuoteProduct
from mercato.contracts.users import GetUser, User, UserNotFound, Users

from . import rules, store

OPERATION: Final = "orders.place"

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


class Placing:
    """Places orders. Asks users and products by their contracts, and writes to the database of orders."""

    def __init__(self, database: Database, users: Users, products: Products) -> None:
        self._database = database
        self._users = users
        self._products = products

    async def place(self, batch: Batch[PlaceOrder]) -> Sequence[Outcome]:
        attempts = [Attempted(request, actor) for request, actor in zip(batch, batch.actors, strict=True)]
        firsts, echoes = _split_twins(attempts)
        await self._recall(firsts)
        await self._look_up(_open(firsts))
        await self._write(_open(firsts))
        for attempted, first in echoes:
            attempted.outcome = _echo(attempted, first)
        return [attempted.outcome for attempted in attempts if attempted.outcome is not None]

    # ------------------------------------------------------------------------------------------------- 1. recall

    async def _recall(self, attempts: Sequence[Attempted]) -> None:
        if keyed := [a for a in attempts if a.keyed]:
            async with self._database.read() as tx:
                await _settle_from_store(tx, keyed)

    # ------------------------------------------------------------------------------------------------ 2. look up

    async def _look_up(self, attempts: Sequence[Attempted]) -> None:
        """Turns each request into a priced order, or settles it with the reason why not."""
        if not attempts:
            return
        user_ids = list({a.request.user_id for a in attempts})
        product_ids = list({line.product_id for a in attempts for line in a.request.lines})
        users, quotes = await asyncio.gather(
            self._users.get.many([GetUser(id=i) for i in user_ids]),
            self._products.quote.many([QuoteProduct(id=i) for i in product_ids]),
        )
        users_by_id = dict(zip(user_ids, users, strict=True))
        quotes_by_id = dict(zip(product_ids, quotes, strict=True))
        for attempted in attempts:
            order = _prepare(attempted, users_by_id, quotes_by_id)
            if isinstance(order, ServiceError):
                attempted.outcome = order
            else:
                attempted.order = order

    # -------------------------------------------------------------------------------------------------- 3. write

    async def _write(self, attempts: Sequence[Attempted]) -> None:
        if not attempts:
            return
        try:
            async with self._database.transaction() as tx:
                await self._claim(tx, [a for a in attempts if a.keyed])
                if claimed := _open(attempts):
                    await _insert(tx, claimed)
                await faults.point("orders.place.before_commit")
        except (LockTimeout, UniqueViolation) as error:
            if len(attempts) > 1:
                raise  # the chassis runs each alone; then it is clear whose key it was
            await self._settle_collision(attempts[0], error)
        await faults.point("orders.place.after_commit")

    async def _claim(self, tx: Tx, keyed: Sequence[Attempted]) -> None:
        """Takes the keys. Who comes second, waited for the first here, and hears its answer."""
        if not keyed:
            return
        ours = await idempotency.claim(tx, OPERATION, [a.keyed for a in keyed if a.keyed])
        if taken := [a for a in keyed if a.keyed and a.keyed.identity not in ours]:
            await _settle_from_store(tx, taken)

    async def _settle_collision(self, attempted: Attempted, error: LockTimeout | UniqueViolation) -> None:
        keyed = attempted.keyed
        assert keyed is not None, f"only keys collide: {error}"
        if isinstance(error, LockTimeout):
            attempted.outcome = RequestInProgress()
            return
        # The stored answer is past its day, the order is not: the key finds it for ever.
        async with self._database.read() as tx:
            row = await store.by_key(tx, keyed.principal, keyed.key)
            assert row is not None, f"not a key of an order: {error}"
            if row.fingerprint != keyed.fingerprint:
                attempted.outcome = IdempotencyKeyReused()
            else:
                order = (await store.get(tx, [row.id]))[row.id]
                attempted.outcome = PlacedOrder(order=order, replayed=True)


async def _settle_from_store(tx: Tx, attempts: Sequence[Attempted]) -> None:
    found = await idempotency.recall(tx, OPERATION, [a.keyed for a in attempts if a.keyed])
    for attempted, stored in zip(attempts, found, strict=True):
        if isinstance(stored, bytes):
            attempted.outcome = _replayed(decode_outcome(PlacedOrder, stored))
        elif stored is not None:
            attempted.outcome = stored


async def _insert(tx: Tx, attempts: Sequence[Attempted]) -> None:
    orders = [a.order for a in attempts if a.order]
    placed = await store.insert(tx, orders)
    for attempted, order, row in zip(attempts, orders, placed, strict=True):
        attempted.outcome = PlacedOrder(order=_as_placed(order, row))
    if done := [a for a in attempts if a.keyed]:
        answers = [encode_outcome(a.outcome) for a in done if a.outcome]
        await idempotency.remember(tx, OPERATION, [a.keyed for a in done if a.keyed], answers)


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


def _echo(attempted: Attempted, first: Attempted) -> Outcome:
    assert attempted.keyed and first.keyed and first.outcome is not None
    if attempted.keyed.fingerprint != first.keyed.fingerprint:
        return IdempotencyKeyReused()
    return _replayed(first.outcome)


def _replayed(outcome: Outcome) -> Outcome:
    return outcome if isinstance(outcome, ServiceError) else PlacedOrder(order=outcome.order, replayed=True)


def _prepare(
    attempted: Attempted, users: dict[int, User | ServiceError], quotes: dict[int, Quote | ServiceError]
) -> store.NewOrder | ServiceError:
    """The order as it will be written, or the first reason why it will not be."""
    request, actor = attempted.request, attempted.actor
    if not rules.may_see(actor, request.user_id):
        return UserNotFound(user_id=request.user_id)
    user = users[request.user_id]
    if isinstance(user, ServiceError):
        return user.copy()
    if wrong := rules.check_lines(request.lines):
        return wrong
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
        actor=actor,
        principal=keyed.principal if keyed else None,
        idempotency_key=keyed.key if keyed else None,
        fingerprint=keyed.fingerprint if keyed else None,
    )


def _as_placed(order: store.NewOrder, row: store.PlacedRow) -> Order:
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
