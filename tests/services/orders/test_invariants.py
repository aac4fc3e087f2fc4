"""What must hold of the tables of orders at every moment, whoever does whatever at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Generator
from typing import Final

import pytest

from mercato.chassis import faults
from mercato.chassis.contract import Actor, ServiceError
from mercato.chassis.testing import Rig
from mercato.contracts.orders import CancelOrder, MoveOrder, Orders, PayOrder, PlaceLine, PlaceOrder, RefundOrder
from mercato.services.orders import rules
from services.orders.world import ALICE, BOB, LAMP, MUG, PLENTY, STAFF, World, mugs, opened

STEPS: Final = 90
WORKERS: Final = 6
METHODS: Final = ("sandbox:ok", "sandbox:declined", "sandbox:lost_answer", "sandbox:capture_expired")

INVARIANTS: Final = {
    "M7 the total of an order is the sum of its lines": """
        SELECT o.id FROM orders o
          LEFT JOIN (SELECT order_id, sum(quantity * unit_price_minor) AS s FROM order_lines GROUP BY 1) l
            ON l.order_id = o.id
         WHERE o.total_minor IS DISTINCT FROM l.s
        """,
    "lines are numbered from 0 without a gap": """
        SELECT order_id FROM order_lines GROUP BY 1
        HAVING min(position) <> 0 OR max(position) <> count(*) - 1 OR count(DISTINCT position) <> count(*)
        """,
    "O1 only legal moves": """
        SELECT h.order_id FROM order_history h
         WHERE version > 1 AND NOT EXISTS (
            SELECT FROM unnest($1::text[], $2::text[], $3::text[]) AS m (axis, before, after)
             WHERE m.axis = h.axis AND m.before = h.before AND m.after = h.after)
        """,
    "O1 each order begins where orders begin": """
        SELECT o.id FROM orders o LEFT JOIN order_history h ON h.order_id = o.id AND h.version = 1
         WHERE (h.axis, h.after) IS DISTINCT FROM ('status', 'pending') OR h.before IS NOT NULL
        """,
    "O2 versions have no gap": """
        SELECT order_id FROM (
            SELECT order_id, version, lag(version, 1, 0) OVER (PARTITION BY order_id ORDER BY version) AS previous
              FROM (SELECT DISTINCT order_id, version FROM order_history) v) h
         WHERE version <> previous + 1
        """,
    "O2 each axis is a chain from where it begins": """
        SELECT order_id FROM (
            SELECT order_id, version, axis, before,
                   lag(after, 1, CASE axis WHEN 'payment' THEN 'unpaid' WHEN 'fulfilment' THEN 'unfulfilled' END)
                       OVER (PARTITION BY order_id, axis ORDER BY version) AS previous
              FROM order_history) h
         WHERE before IS DISTINCT FROM previous
        """,
    "O2 time goes forward": """
        SELECT order_id FROM (
            SELECT order_id, at, lag(at) OVER (PARTITION BY order_id ORDER BY version) AS previous FROM order_history) h
         WHERE at < previous
        """,
    "O3 the head of the chain is the row": """
        SELECT o.id FROM orders o
         CROSS JOIN LATERAL (
            SELECT max(version) AS version, max(at) AS at,
                   (array_agg(after ORDER BY version DESC) FILTER (WHERE axis = 'status'))[1] AS status,
                   (array_agg(after ORDER BY version DESC) FILTER (WHERE axis = 'payment'))[1] AS payment,
                   (array_agg(after ORDER BY version DESC) FILTER (WHERE axis = 'fulfilment'))[1] AS fulfilment
              FROM order_history h WHERE h.order_id = o.id) h
         WHERE (o.version, o.status, o.updated_at) IS DISTINCT FROM (h.version, h.status, h.at)
            OR o.payment <> coalesce(h.payment, 'unpaid') OR o.fulfilment <> coalesce(h.fulfilment, 'unfulfilled')
        """,
    "goods move only for confirmed orders": """
        SELECT id FROM orders WHERE fulfilment <> 'unfulfilled' AND status = 'pending'
        """,
    "O6 one key, one order": """
        SELECT min(id) FROM orders WHERE idempotency_key IS NOT NULL
         GROUP BY principal, idempotency_key HAVING count(*) > 1
        """,
    "K3 no key is left without an answer": """
        SELECT count(*) FROM idempotency WHERE answer IS NULL HAVING count(*) > 0
        """,
    "K1 each stored answer has its order": """
        SELECT 1 FROM idempotency i LEFT JOIN orders o
            ON (o.principal, o.idempotency_key, o.fingerprint) = (i.principal, i.key, i.fingerprint)
         WHERE o.id IS NULL AND i.operation = 'orders.place'
        """,
    "E7 each move was told, once": """
        SELECT order_id, version, type
          FROM (SELECT order_id, version,
                       CASE WHEN before IS NULL THEN 'order.placed'
                            WHEN axis = 'fulfilment' AND before = after THEN 'order.partially_returned'
                            ELSE 'order.' || after END AS type
                  FROM order_history) h
          FULL JOIN (SELECT subject_id AS order_id, version, type, count(*) AS told FROM outbox GROUP BY 1, 2, 3) e
         USING (order_id, version, type)
         WHERE e.told IS DISTINCT FROM 1 OR h.version IS NULL
        """,
    "each order has its checkout": """
        SELECT o.id FROM orders o LEFT JOIN sagas s ON s.subject_id = o.id AND s.kind = 'checkout'
         WHERE s.step IS NULL
        """,
    "each step of a saga was noted": """
        SELECT s.subject_id FROM sagas s
         WHERE s.version - 1 <> (
            SELECT count(*) FROM saga_steps t
             WHERE (t.subject_id, t.kind, t.reference) = (s.subject_id, s.kind, s.reference))
        """,
    "M9 no more is given back than was to be paid": """
        SELECT o.id FROM orders o
         WHERE o.refunded_minor + o.refund_pending_minor > o.total_minor
            OR (o.payment = 'refunded' AND o.refunded_minor <> o.total_minor)
            OR (o.payment IN ('unpaid', 'authorized', 'paid', 'failed', 'voided') AND o.refunded_minor > 0)
        """,
}
"""Each finds what contradicts it (reliability: M7, O1-O3, O6, K1, K3, as orders has them)."""

PLANTED: Final = {
    "M7 the total of an order is the sum of its lines": "UPDATE orders SET total_minor = total_minor + 1",
    "lines are numbered from 0 without a gap": "UPDATE order_lines SET position = 1",
    "O1 only legal moves": "UPDATE order_history SET after = 'completed' WHERE version = 2",
    "O1 each order begins where orders begin": "UPDATE order_history SET after = 'confirmed' WHERE version = 1",
    "O2 versions have no gap": "UPDATE order_history SET version = 3 WHERE version = 2",
    "O2 each axis is a chain from where it begins": "UPDATE order_history SET before = 'confirmed' WHERE version = 2",
    "O2 time goes forward": "UPDATE order_history SET at = at - interval '1 hour' WHERE version = 2",
    "O3 the head of the chain is the row": "UPDATE orders SET version = 9",
    "goods move only for confirmed orders": "UPDATE orders SET status = 'pending', fulfilment = 'shipped'",
    "O6 one key, one order": """
        DROP INDEX orders_principal_idempotency_key;
        INSERT INTO orders (user_id, currency, total_minor, principal, idempotency_key, fingerprint)
        SELECT user_id, currency, total_minor, principal, idempotency_key, fingerprint FROM orders
        """,
    "K3 no key is left without an answer": "UPDATE idempotency SET answer = NULL",
    "K1 each stored answer has its order": "UPDATE idempotency SET key = 'of-nothing'",
    "E7 each move was told, once": "DELETE FROM outbox WHERE version = 2",
    "each order has its checkout": "DELETE FROM sagas",
    "each step of a saga was noted": "DELETE FROM saga_steps WHERE version = 2",
    "M9 no more is given back than was to be paid": "UPDATE orders SET refunded_minor = 1",
}


async def violations(world: World) -> dict[str, int]:
    legal = [(axis, before, after) for axis, moves in rules.AXES.items() for before in moves for after in moves[before]]
    found: dict[str, int] = {}
    for name, sql in INVARIANTS.items():
        values = [list(column) for column in zip(*legal, strict=True)] if "$1" in sql else []
        if rows := await world.values(sql, *values):
            found[name] = len(rows)
    return found


@pytest.mark.parametrize("rig", ["local"], indirect=True)  # tables are the same, whatever carried the calls
@pytest.mark.parametrize("name", INVARIANTS)
async def test_each_invariant_sees_what_contradicts_it(world: World, name: str):
    with world.acting(ALICE):
        order = (await world.orders.place(mugs(key="key"))).order
    with world.acting(STAFF):
        await world.orders.move(MoveOrder(id=order.id, status="confirmed"))
    assert await violations(world) == {}

    connection = await world.connection()
    await connection.execute(PLANTED[name])

    assert name in await violations(world)


class Shoppers:
    """A random day: places, repeats, moves and cancels, by several actors through several processes."""

    def __init__(self, clients: list[Orders], world: World, seed: int) -> None:
        self.clients = clients
        self.world = world
        self.seed = seed
        self.heard: dict[tuple[Actor, str, bytes], set[int]] = {}
        self.ids: list[int] = [1001]

    async def work(self, worker: int) -> None:
        rng = random.Random(self.seed * 1_000 + worker)
        for _ in range(STEPS // WORKERS):
            client, actor = rng.choice(self.clients), rng.choice((ALICE, BOB, STAFF))
            # A refusal, or a planted fault: what matters is what the tables say.
            with self.world.acting(actor), contextlib.suppress(ServiceError):
                await self._step(rng, client, actor)

    async def _step(self, rng: random.Random, client: Orders, actor: Actor) -> None:
        order_id = rng.choice(self.ids[-8:])
        match rng.randrange(7):
            case 0:
                await client.cancel(CancelOrder(id=order_id, reason="no more"))
            case 2 | 3:
                method = rng.choice(
                    ("sandbox:ok", "sandbox:declined", "sandbox:lost_answer", "sandbox:capture_expired")
                )
                await client.pay(PayOrder(id=order_id, method=method, capture=rng.random() < 0.9))
            case 4:
                await self._give_back(rng, client, order_id)
            case 1:
                status = rng.choice(("confirmed", "completed", "cancelled", None))
                fulfilment = rng.choice(("shipped", "delivered", "returned", None))
                await client.move(MoveOrder(id=order_id, status=status, fulfilment=fulfilment))
            case _:
                await self._place(rng, client, actor)

    async def _give_back(self, rng: random.Random, client: Orders, order_id: int) -> None:
        key = f"refund-{rng.randrange(30)}"
        for payment in await self.world.payments(order_id):
            await client.refund(RefundOrder(payment_id=payment.id, amount_minor=700, idempotency_key=key))

    async def _place(self, rng: random.Random, client: Orders, actor: Actor) -> None:
        key, fingerprint = f"key-{rng.randrange(12)}", rng.choice((b"one", b"two"))
        products = rng.sample((MUG, LAMP), rng.randint(1, 2))
        lines = tuple(PlaceLine(product_id=i, quantity=1 + i) for i in sorted(products))
        user_id = 1 if actor == STAFF else actor.id
        request = PlaceOrder(user_id=user_id, lines=lines, idempotency_key=key, fingerprint=fingerprint)
        many = await client.place.many([request] * rng.randint(1, 3))
        for outcome in many:
            if not isinstance(outcome, ServiceError):
                self.heard.setdefault((actor, key, fingerprint), set()).add(outcome.order.id)
                self.ids.append(outcome.order.id)


@pytest.mark.parametrize("seed", range(2))
async def test_a_random_day_with_crashes_leaves_nothing_that_contradicts_itself(rig: Rig, seed: int):
    async with opened(rig, orders_lease_seconds=0.5, orders_sweep_seconds=0.05) as world:
        day = Shoppers([world.orders, await world.another_process()], world, seed)
        with stumbling(random.Random(seed)):
            await asyncio.gather(*(asyncio.create_task(day.work(n)) for n in range(WORKERS)))
        assert await violations(world) == {}
        await at_rest(world)

        assert await violations(world) == {}
        await assert_money_and_stock_agree(world)
        assert all(len(ids) == 1 for ids in day.heard.values())  # K1: one key and request, one answer
        owners = [(actor, key) for actor, key, _ in day.heard]
        assert len(owners) == len(set(owners))  # K2: and no other request heard one
        assert len(day.heard) > 5
        moves = await world.values("SELECT count(*) FROM order_history WHERE version > 1")
        assert moves[0] > 5


@contextlib.contextmanager
def stumbling(rng: random.Random) -> Generator[None]:
    """Fails now and then at every point that orders pass."""

    async def sometimes(_point: str) -> None:
        await asyncio.sleep(rng.random() / 500)
        if rng.random() < 0.06:
            raise RuntimeError("the power fails here")

    points = [point for point in faults.POINTS if point.startswith(("orders.", "checkout.", "refund."))]
    lifts = [faults.plant(point, sometimes) for point in points]
    try:
        yield
    finally:
        for lift in lifts:
            lift()


async def at_rest(world: World) -> None:
    async def is_at_rest() -> bool:
        running = "SELECT count(*) FROM sagas WHERE wake_at IS NOT NULL AND step <> 'awaiting'"
        return (await world.values(running)) == [0]

    await world.until(is_at_rest)


async def assert_money_and_stock_agree(world: World) -> None:
    """M3, M5, M8, S3, S5, S6: what the bank and the shelf have is what the orders say."""
    reserved = {MUG: 0, LAMP: 0}
    gone = {MUG: 0, LAMP: 0}
    for order_id in await world.values("SELECT id FROM orders"):
        order, bank = await world.settled(order_id), await world.bank(order_id)
        kept = order.payment in ("paid", "partially_refunded", "refunded") and order.status != "cancelled"
        assert bank.captures <= 1
        assert bank.net_minor == (order.total_minor - order.refunded_minor if kept else 0), order
        assert bank.open_charges == (order.payment == "authorized"), order
        for line in order.lines:
            reserved[line.product_id] += line.quantity * (order.status == "pending")
            gone[line.product_id] += (line.quantity - line.returned) * (order.status in ("confirmed", "completed"))
    for product_id in (MUG, LAMP):
        assert await world.shelf(product_id) == (PLENTY - gone[product_id], reserved[product_id])
