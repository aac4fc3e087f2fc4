"""What holds of the tables of orders at every moment, whatever clients and processes do at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any, Final

import msgspec
import pytest
import pytest_asyncio

from mercato.chassis.contract import Actor, ServiceError
from mercato.chassis.observability import faults
from mercato.contracts.orders import (
    CancelOrder,
    MoveOrder,
    Orders,
    PayOrder,
    PlaceLine,
    PlaceOrder,
    RefundOrder,
    ReturnLine,
    ReturnOrder,
)
from mercato.services.orders import rules
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.builders import LAMP, MUG
from mercato.testing.cluster import Cluster
from mercato.testing.tables import EVENTS
from mercato.testing.waiting import until
from services.orders.harness import PLENTY, OrdersHarness, mugs

STEPS: Final = 120
WORKERS: Final = 6
METHODS: Final = (*["sandbox:ok"] * 3, "sandbox:declined", "sandbox:lost_answer", "sandbox:capture_expired")
NO_ORDER: Final = 999_999


def emitted() -> str:
    """The query of the events of transitions that orders have emitted: order_id, version, type, a row for each."""
    return f"SELECT subject_id AS order_id, version, type FROM {EVENTS} WHERE subject = 'order' AND type LIKE 'order.%'"


LINES: Final = """
    SELECT o.id AS order_id, l.*, coalesce(o.returned[l.position], 0) AS returned
      FROM orders o
     CROSS JOIN LATERAL ROWS FROM (
            json_to_recordset(o.lines)
                AS (id bigint, product_id bigint, quantity bigint, unit_price_minor bigint, discount_minor bigint,
                    tax_minor bigint, total_minor bigint)
        ) WITH ORDINALITY
        AS l (id, product_id, quantity, unit_price_minor, discount_minor, tax_minor, total_minor, position)
"""

TRANSITIONS: Final = """
    SELECT h.*, lag(version) OVER w AS was_version, lag(at) OVER w AS was_at, lag(status) OVER w AS was_status,
           lag(payment) OVER w AS was_payment, lag(fulfilment) OVER w AS was_fulfilment
      FROM history h
    WINDOW w AS (PARTITION BY order_id ORDER BY version)
"""


class Invariant(msgspec.Struct, frozen=True):
    """`violations` selects what contradicts it; `injected` are changes that do, each by itself."""

    violations: str
    injected: tuple[str, ...]
    only_at_rest: bool = False


def _with_line(**changed: int) -> str:
    """Changes the first line of all orders."""
    lines = "lines::jsonb"
    for field, value in changed.items():
        lines = f"jsonb_set({lines}, '{{0,{field}}}', '{value}')"
    return f"UPDATE orders SET lines = ({lines})::json"


def _with_history(change: str) -> str:
    """A change of the history, which its trigger would refuse."""
    return f"ALTER TABLE history DISABLE TRIGGER history_stay; {change}"


INVARIANTS: Final[Mapping[str, Invariant]] = {
    "M7 the total of an order is the sum of the totals of its lines": Invariant(
        f"""
        SELECT o.id
          FROM orders o
          LEFT JOIN (SELECT order_id, sum(total_minor) AS sum_minor FROM ({LINES}) l GROUP BY order_id) l
            ON l.order_id = o.id
         WHERE o.total_minor IS DISTINCT FROM l.sum_minor
        """,
        ("UPDATE orders SET total_minor = total_minor + 1", "UPDATE orders SET lines = '[]'"),
    ),
    "M7 the total of a line is that of its pieces, less its discount, plus its tax": Invariant(
        f"""
        SELECT order_id
          FROM ({LINES}) l
         WHERE (total_minor = quantity * unit_price_minor - discount_minor + tax_minor) IS NOT TRUE
        """,
        (
            _with_line(quantity=99),
            _with_line(unit_price_minor=1),
            _with_line(discount_minor=1),
            _with_line(tax_minor=1),
        ),
    ),
    "the lines of an order are numbered from 1": Invariant(
        f"SELECT order_id FROM ({LINES}) l WHERE id IS DISTINCT FROM position",
        (_with_line(id=0), _with_line(id=2)),
    ),
    "an order stands under each product of its lines, and under no other": Invariant(
        f"""
        SELECT coalesce(l.order_id, p.order_id)
          FROM ({LINES}) l
          FULL JOIN order_products p ON p.order_id = l.order_id AND p.product_id = l.product_id
         WHERE l.order_id IS NULL OR p.order_id IS NULL
        """,
        ("DELETE FROM order_products", _with_line(product_id=LAMP)),
    ),
    "no more of a line is returned than was sold": Invariant(
        f"""
        SELECT order_id FROM ({LINES}) l WHERE returned NOT BETWEEN 0 AND quantity
        UNION ALL
        SELECT id FROM orders WHERE returned IS NOT NULL AND cardinality(returned) <> json_array_length(lines)
        """,
        (
            "UPDATE orders SET returned = '{99}'",
            "UPDATE orders SET returned = '{-1}'",
            "UPDATE orders SET returned = '{0,0,0}'",
        ),
    ),
    "of each line is returned what the returns of its order say": Invariant(
        f"""
        SELECT coalesce(l.order_id, r.order_id)
          FROM ({LINES}) l
          FULL JOIN (
            SELECT order_id, line_id, sum(quantity) AS quantity
              FROM refunds
             CROSS JOIN LATERAL json_to_recordset(lines) AS back (line_id bigint, quantity bigint)
             GROUP BY order_id, line_id
          ) r ON r.order_id = l.order_id AND r.line_id = l.id
         WHERE coalesce(l.returned, 0) <> coalesce(r.quantity, 0)
        """,
        ("UPDATE refunds SET lines = '[]'", "UPDATE orders SET returned = NULL"),
    ),
    "O1 every order begins where orders begin": Invariant(
        """
        SELECT o.id
          FROM orders o
          LEFT JOIN history h ON h.order_id = o.id AND h.version = 1
         WHERE (h.status, h.payment, h.fulfilment) IS DISTINCT FROM ('pending', 'unpaid', 'unfulfilled')
        """,
        (
            _with_history("UPDATE history SET status = 'confirmed' WHERE version = 1"),
            _with_history("UPDATE history SET payment = 'paid' WHERE version = 1"),
            _with_history("UPDATE history SET fulfilment = 'shipped' WHERE version = 1"),
            _with_history("DELETE FROM history WHERE version = 1"),
        ),
    ),
    "O1 each transition makes legal moves": Invariant(
        f"""
        SELECT t.order_id
          FROM ({TRANSITIONS}) t
         CROSS JOIN LATERAL (
            VALUES ('status', t.was_status, t.status), ('payment', t.was_payment, t.payment),
                   ('fulfilment', t.was_fulfilment, t.fulfilment)
         ) AS moved (axis, before, after)
          LEFT JOIN unnest($1::text[], $2::text[], $3::text[]) AS legal (axis, before, after)
            ON (legal.axis, legal.before, legal.after) = (moved.axis, moved.before, moved.after)
         WHERE t.was_version IS NOT NULL AND moved.before <> moved.after AND legal.axis IS NULL
        """,
        (
            _with_history("UPDATE history SET status = 'completed' WHERE version = 2"),
            _with_history("UPDATE history SET payment = 'refunded' WHERE version = 2"),
            _with_history("UPDATE history SET fulfilment = 'delivered' WHERE version = 2"),
        ),
    ),
    "O2 a history has no gap": Invariant(
        f"SELECT order_id FROM ({TRANSITIONS}) t WHERE version <> coalesce(was_version, 0) + 1",
        (
            _with_history("UPDATE history SET version = 99 WHERE version = 2"),
            _with_history("DELETE FROM history WHERE version = 1"),
        ),
    ),
    "O2 each transition names the events of the axes that moved": Invariant(
        f"""
        SELECT order_id
          FROM (
            SELECT *, CASE WHEN was_version IS NULL THEN ARRAY['order.placed'] ELSE array_remove(ARRAY[
                        CASE WHEN status <> was_status THEN 'order.' || status END,
                        CASE WHEN payment <> was_payment THEN 'order.' || payment END,
                        CASE WHEN fulfilment <> was_fulfilment THEN 'order.' || fulfilment END], NULL) END AS moved
              FROM ({TRANSITIONS}) t
          ) t
         WHERE events <> moved
           -- One more part that was refunded or returned moves no axis.
           AND NOT (moved = '{{}}' AND payment = 'partially_refunded' AND events = '{{order.partially_refunded}}')
           AND NOT (moved = '{{}}' AND fulfilment = 'delivered' AND events = '{{order.partially_returned}}')
        """,
        (
            _with_history("UPDATE history SET events = '{}'"),
            _with_history("UPDATE history SET events = '{order.paid}' WHERE version = 1"),
            _with_history("UPDATE history SET events = events || '{order.partially_returned}'"),
        ),
    ),
    "O2 time goes forward": Invariant(
        f"SELECT order_id FROM ({TRANSITIONS}) t WHERE at < was_at",
        (_with_history("UPDATE history SET at = at - interval '1 hour' WHERE version = 2"),),
    ),
    "O3 an order is where its history ends": Invariant(
        """
        SELECT o.id
          FROM orders o
          LEFT JOIN (
            SELECT DISTINCT ON (order_id) order_id, version, status, payment, fulfilment, at
              FROM history
             ORDER BY order_id, version DESC
          ) h ON h.order_id = o.id
         WHERE (o.version, o.status, o.payment, o.fulfilment, o.updated_at)
               IS DISTINCT FROM (h.version, h.status, h.payment, h.fulfilment, h.at)
        """,
        (
            "UPDATE orders SET version = 99",
            "UPDATE orders SET status = 'completed'",
            "UPDATE orders SET payment = 'failed'",
            "UPDATE orders SET fulfilment = 'returned'",
            "UPDATE orders SET updated_at = now() + interval '1 second'",
        ),
    ),
    "goods move only for orders that are confirmed": Invariant(
        """
        SELECT id FROM orders WHERE fulfilment <> 'unfulfilled' AND status NOT IN ('confirmed', 'completed')
        """,
        (
            "UPDATE orders SET fulfilment = 'shipped' WHERE status = 'pending'",
            "UPDATE orders SET fulfilment = 'shipped' WHERE status = 'cancelled'",
        ),
    ),
    "a cancelled order says why, and no other does": Invariant(
        "SELECT id FROM orders WHERE (status = 'cancelled') <> (reason IS NOT NULL)",
        ("UPDATE orders SET reason = NULL", "UPDATE orders SET reason = '{}' WHERE status = 'pending'"),
    ),
    "an order that is not paid is confirmed only on account": Invariant(
        "SELECT id FROM orders WHERE status IN ('confirmed', 'completed') AND payment = 'unpaid' AND NOT on_account",
        ("UPDATE orders SET on_account = false", "UPDATE orders SET payment = 'unpaid' WHERE payment = 'paid'"),
    ),
    "O6 one key of one principal has made one order": Invariant(
        """
        SELECT min(id)
          FROM orders
         WHERE idempotency_key IS NOT NULL
         GROUP BY principal, idempotency_key
        HAVING count(*) > 1
        """,
        (
            """
            DROP INDEX orders_principal_idempotency_key;
            INSERT INTO orders (nonce, user_id, currency, total_minor, lines, principal, idempotency_key, fingerprint)
            SELECT nonce, user_id, currency, total_minor, lines, principal, idempotency_key, fingerprint
              FROM orders
             WHERE idempotency_key IS NOT NULL
            """,
        ),
    ),
    "each order has a nonce of its own": Invariant(
        """
        SELECT id FROM orders WHERE nonce <= 0
        UNION ALL
        SELECT min(id) FROM orders GROUP BY nonce HAVING count(*) > 1
        """,
        ("UPDATE orders SET nonce = 0 WHERE id = (SELECT min(id) FROM orders)", "UPDATE orders SET nonce = 7"),
    ),
    "E7 each transition has emitted its events, once": Invariant(
        f"""
        SELECT coalesce(h.order_id, e.order_id)
          FROM (
            SELECT order_id, version::bigint, type, count(*) AS times
              FROM history
             CROSS JOIN LATERAL unnest(events) AS type
             GROUP BY 1, 2, 3
          ) h
          FULL JOIN (SELECT order_id, version::bigint, type, count(*) AS times FROM ({emitted()}) e GROUP BY 1, 2, 3) e
            ON (e.order_id, e.version, e.type) = (h.order_id, h.version, h.type)
         WHERE e.times IS DISTINCT FROM 1 OR h.times IS DISTINCT FROM 1
        """,
        (
            _with_history("UPDATE history SET events = '{}'"),
            _with_history("UPDATE history SET events = events || '{order.completed}'"),
            _with_history("UPDATE history SET events = events || events"),
        ),
    ),
    "M9 no more is refunded than was paid": Invariant(
        """
        SELECT id
          FROM orders
         WHERE refunded_minor + refund_pending_minor > total_minor - waived_minor
            OR CASE payment WHEN 'refunded' THEN refunded_minor <> total_minor - waived_minor
                            WHEN 'partially_refunded'
                            THEN refunded_minor NOT BETWEEN 1 AND total_minor - waived_minor - 1
                            ELSE refunded_minor <> 0 END
        """,
        (
            """
            ALTER TABLE orders DROP CONSTRAINT orders_refunds_within_total;
            ALTER TABLE orders DROP CONSTRAINT orders_refunds_within_paid;
            UPDATE orders SET refund_pending_minor = total_minor + 1
            """,
            "UPDATE orders SET refunded_minor = 1",
            "UPDATE orders SET refunded_minor = 0",
            "UPDATE orders SET refunded_minor = total_minor WHERE payment = 'partially_refunded'",
        ),
    ),
    "O9 an order reserves what its pending refunds add up to": Invariant(
        """
        SELECT o.id
          FROM orders o
          LEFT JOIN (
            SELECT order_id, sum(amount_minor) AS pending_minor FROM refunds WHERE status = 'pending' GROUP BY order_id
          ) r ON r.order_id = o.id
         WHERE o.refund_pending_minor <> coalesce(r.pending_minor, 0)
        """,
        (
            "UPDATE refunds SET status = 'pending', settled_at = NULL",
            "UPDATE orders SET refund_pending_minor = 1 WHERE refunded_minor < total_minor",
        ),
    ),
    "O9 an order has refunded what its refunds add up to": Invariant(
        # A cancelled order gives back what is left as well, without a refund of its own.
        """
        SELECT o.id
          FROM orders o
          LEFT JOIN (
            SELECT order_id, sum(amount_minor) AS refunded_minor
              FROM refunds
             WHERE status = 'succeeded'
             GROUP BY order_id
          ) r ON r.order_id = o.id
         WHERE o.refunded_minor < coalesce(r.refunded_minor, 0)
            OR (o.status <> 'cancelled' AND o.refunded_minor <> coalesce(r.refunded_minor, 0))
        """,
        (
            "UPDATE refunds SET status = 'declined'",
            "UPDATE refunds SET amount_minor = amount_minor - 1, asked_minor = asked_minor - 1",
            "UPDATE orders SET refunded_minor = refunded_minor - 1 WHERE refunded_minor > 0",
            """
            INSERT INTO refunds (order_id, reference, lines, amount_minor, currency, payment_attempt, status,
                                 actor_role, actor_id, settled_at)
            SELECT id, 'too much', '[]', total_minor + 1, currency, 1, 'succeeded', 'staff', 9, now()
              FROM orders
             WHERE status = 'cancelled'
            """,
        ),
    ),
    "keys and refunds name payments that were begun": Invariant(
        """
        SELECT o.id
          FROM orders o
          JOIN (
            SELECT order_id, payment_attempt, 1 AS least FROM payment_keys
            UNION ALL
            SELECT order_id, payment_attempt, CASE WHEN amount_minor > 0 THEN 1 ELSE 0 END FROM refunds
          ) named ON named.order_id = o.id
         WHERE named.payment_attempt NOT BETWEEN named.least AND o.payment_attempt
        """,
        (
            "UPDATE payment_keys SET payment_attempt = 99",
            "UPDATE refunds SET payment_attempt = 0",
            "UPDATE orders SET payment_attempt = 0",
        ),
    ),
    "an order that is pending or authorized has its checkout": Invariant(
        """
        SELECT o.id
          FROM orders o
          LEFT JOIN sagas s ON s.subject_id = o.id AND s.kind = 'checkout' AND s.reference = ''
         WHERE (o.status = 'pending' OR o.payment = 'authorized') AND s.step IS NULL
        """,
        (
            "DELETE FROM sagas WHERE step = 'awaiting'",
            "DELETE FROM sagas WHERE step = 'authorized'",
            "UPDATE sagas SET reference = 'another'",
        ),
    ),
    "an order that is paid and not cancelled has no checkout": Invariant(
        """
        SELECT o.id
          FROM orders o
          JOIN sagas s ON s.subject_id = o.id AND s.kind = 'checkout'
         WHERE o.payment IN ('paid', 'partially_refunded', 'refunded') AND o.status <> 'cancelled'
        """,
        (
            """
            INSERT INTO sagas (subject_id, kind, reference, step, state)
            SELECT id, 'checkout', 'another', 'reserve', '' FROM orders
            """,
        ),
    ),
    "a refund has a saga as long as it is pending": Invariant(
        """
        SELECT coalesce(r.order_id, s.subject_id)
          FROM (SELECT order_id, reference FROM refunds WHERE status = 'pending') r
          FULL JOIN (SELECT subject_id, reference FROM sagas WHERE kind = 'refund') s
            ON (s.subject_id, s.reference) = (r.order_id, r.reference)
         WHERE r.order_id IS NULL OR s.subject_id IS NULL
        """,
        (
            "UPDATE refunds SET status = 'pending', settled_at = NULL",
            """
            INSERT INTO sagas (subject_id, kind, reference, step, state)
            SELECT order_id, 'refund', reference, 'refund', '' FROM refunds
            """,
        ),
    ),
    "O10 history, products, refunds, keys of payments and sagas have their order": Invariant(
        """
        SELECT part.order_id
          FROM (
            SELECT order_id FROM history
            UNION ALL SELECT order_id FROM order_products
            UNION ALL SELECT order_id FROM refunds
            UNION ALL SELECT order_id FROM payment_keys
            UNION ALL SELECT subject_id FROM sagas
          ) part
          LEFT JOIN orders o ON o.id = part.order_id
         WHERE o.id IS NULL
        """,
        (
            f"""
            INSERT INTO history (order_id, version, status, payment, fulfilment, events, actor_role, actor_id)
            VALUES ({NO_ORDER}, 1, 'pending', 'unpaid', 'unfulfilled', '{{order.placed}}', 'staff', 9)
            """,
            f"INSERT INTO order_products (product_id, order_id) VALUES ({MUG}, {NO_ORDER})",
            f"UPDATE refunds SET order_id = {NO_ORDER} WHERE reference = (SELECT min(reference) FROM refunds)",
            f"UPDATE payment_keys SET order_id = {NO_ORDER}",
            f"UPDATE sagas SET subject_id = {NO_ORDER} WHERE subject_id = (SELECT min(subject_id) FROM sagas)",
        ),
    ),
    "at rest the only sagas are of orders that wait for a payment or a capture": Invariant(
        """
        SELECT s.subject_id
          FROM sagas s
          JOIN orders o ON o.id = s.subject_id
         WHERE (s.kind, s.step, s.driver IS NULL, s.wake_at IS NULL, o.status, o.payment) NOT IN (
            ('checkout', 'awaiting', true, false, 'pending', 'unpaid'),
            ('checkout', 'authorized', true, true, 'confirmed', 'authorized'))
        """,
        (
            """
            INSERT INTO sagas (subject_id, kind, reference, step, state)
            SELECT id, 'checkout', '', 'reserve', '' FROM orders WHERE payment = 'paid'
            """,
            "UPDATE sagas SET driver = 1, wake_at = NULL",
            "UPDATE sagas SET wake_at = NULL WHERE step = 'awaiting'",
            "UPDATE sagas SET step = 'unwind'",
        ),
        only_at_rest=True,
    ),
}
"""M, O and E as the reliability document numbers them, for the tables of orders alone."""


async def violations(connection: Any, *, at_rest: bool) -> dict[str, int]:
    """How many violations there are, by invariant.

    On a connection of the test's own: those of a service have plans for few rows, and end a statement after 10 seconds.
    """
    legal = [(axis, before, after) for axis, moves in rules.AXES.items() for before in moves for after in moves[before]]
    columns = [list(column) for column in zip(*legal, strict=True)]
    found: dict[str, int] = {}
    for name, invariant in INVARIANTS.items():
        if at_rest or not invariant.only_at_rest:
            rows = await connection.fetch(invariant.violations, *(columns if "$1" in invariant.violations else ()))
            if rows:
                found[name] = len(rows)
    return found


# ------------------------------------------------------------------------------------------------- injected violations


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(cluster: Cluster) -> AsyncGenerator[OrdersHarness]:
    """Orders in every kind of state, with no work under way."""
    async with OrdersHarness(cluster, "local").running() as harness:  # the transport makes no difference in tables
        await _fill(harness)
        yield harness


async def _fill(harness: OrdersHarness) -> None:
    on_account = await harness.place(mugs(key="key"))
    refunded = await harness.checked_out(None, (MUG, 1), (LAMP, 1))
    payment = await harness.pay(refunded.id, idempotency_key="pay", fingerprint=b"pay")
    returned = await harness.delivered("sandbox:ok", (MUG, 3))
    await harness.checked_out("sandbox:ok", (LAMP, 2))
    cancelled = await harness.checked_out("sandbox:ok", (MUG, 1))
    await harness.checked_out("sandbox:declined", (MUG, 1))
    authorized = await harness.checked_out(None, (MUG, 1))
    await harness.pay(authorized.id, actor=STAFF, capture=False)
    with harness.acting(STAFF):
        await harness.orders.move(MoveOrder(id=on_account.id, status="confirmed"))
        for key in ("refund-1", "refund-2"):
            await harness.orders.refund(
                RefundOrder(payment_id=payment.payment.id, amount_minor=100, idempotency_key=key)
            )
        for key in ("return-1", "return-2"):
            await harness.orders.take_back(
                ReturnOrder(id=returned.id, lines=(ReturnLine(line_id=1, quantity=1),), idempotency_key=key)
            )
        await harness.orders.cancel(CancelOrder(id=cancelled.id))
    await at_rest(harness)


INJECTED: Final = [
    pytest.param(name, injected, id=f"{name} {i}")
    for name, invariant in INVARIANTS.items()
    for i, injected in enumerate(invariant.injected, 1)
]


@pytest.mark.asyncio(loop_scope="session")
async def test_no_invariant_is_violated_by_orders_in_every_kind_of_state(shop: OrdersHarness):
    assert await violations(await shop.connection(), at_rest=True) == {}
    assert set(await shop.values("SELECT DISTINCT status FROM orders")) == {"pending", "confirmed", "cancelled"}


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(("name", "injected"), INJECTED)
async def test_each_invariant_finds_each_violation_that_is_planted(shop: OrdersHarness, name: str, injected: str):
    connection = await shop.connection()

    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(injected)
        assert name in await violations(connection, at_rest=True)
    finally:
        await transaction.rollback()
        await connection.close()


# --------------------------------------------------------------------------------------------------------- random days


class Clients:
    """A random day: clients place, repeat, pay, move, cancel, refund and return, through several processes."""

    def __init__(self, processes: list[Orders], harness: OrdersHarness, seed: int) -> None:
        self.processes = processes
        self.harness = harness
        self.seed = seed
        self.answers: dict[tuple[Actor, str, bytes], set[int]] = {}
        """The orders that were answered to each request with a key."""
        self.ids: list[int] = [1001]

    async def work(self, worker: int) -> None:
        rng = random.Random(self.seed * 1_000 + worker)
        for _ in range(STEPS // WORKERS):
            orders, actor = rng.choice(self.processes), rng.choice((ALICE, BOB, STAFF))
            # Refusals and injected faults are part of the day: what matters is what the tables say.
            with self.harness.acting(actor), contextlib.suppress(ServiceError):
                await self._request(rng, orders, actor)

    async def _request(self, rng: random.Random, orders: Orders, actor: Actor) -> None:
        order_id = rng.choice(self.ids[-8:])
        match rng.randrange(10):
            case 0:
                await orders.cancel(CancelOrder(id=order_id, reason="no more"))
            case 1:
                status = rng.choice(("confirmed", "completed", "cancelled", None))
                fulfilment = rng.choice(("shipped", "delivered", "returned", None))
                await orders.move(MoveOrder(id=order_id, status=status, fulfilment=fulfilment))
            case 2 | 3:
                key = rng.choice((None, f"pay-{order_id}"))
                method, capture = rng.choice(METHODS), rng.random() < 0.9
                await orders.pay(PayOrder(id=order_id, method=method, capture=capture, idempotency_key=key))
            case 4 | 5:
                with self.harness.acting(STAFF):
                    await self._refund(rng, orders, order_id)
            case 6:
                with self.harness.acting(STAFF):
                    await self._return(rng, orders, order_id)
            case _:
                await self._place(rng, orders, actor)

    async def _refund(self, rng: random.Random, orders: Orders, order_id: int) -> None:
        await self.harness.settled(order_id)
        key = f"refund-{order_id}-{rng.randrange(3)}"
        for payment in await self.harness.payments(order_id):
            await orders.refund(RefundOrder(payment_id=payment.id, amount_minor=700, idempotency_key=key))

    async def _return(self, rng: random.Random, orders: Orders, order_id: int) -> None:
        """Sends the goods first, where that has not been done."""
        await self.harness.settled(order_id)
        for fulfilment in ("shipped", "delivered"):
            with contextlib.suppress(ServiceError):
                await orders.move(MoveOrder(id=order_id, fulfilment=fulfilment))
        key, lines = f"return-{order_id}-{rng.randrange(3)}", (ReturnLine(line_id=1, quantity=1),)
        await orders.take_back(ReturnOrder(id=order_id, lines=lines, idempotency_key=key))

    async def _place(self, rng: random.Random, orders: Orders, actor: Actor) -> None:
        key, fingerprint = f"key-{rng.randrange(40)}", rng.choice((b"one", b"two"))
        products = rng.sample((MUG, LAMP), rng.randint(1, 2))
        lines = tuple(PlaceLine(product_id=i, quantity=1 + i) for i in sorted(products))
        user_id = 1 if actor == STAFF else actor.id
        method = rng.choice((None, *METHODS))
        request = PlaceOrder(
            user_id=user_id, lines=lines, idempotency_key=key, fingerprint=fingerprint, payment_method=method
        )
        for outcome in await orders.place.many([request] * rng.randint(1, 3)):
            if not isinstance(outcome, ServiceError):
                self.answers.setdefault((actor, key, fingerprint), set()).add(outcome.order.id)
                self.ids.append(outcome.order.id)


@pytest.mark.options(orders_lease_seconds=0.5, orders_sweep_seconds=0.05)
@pytest.mark.long
@pytest.mark.parametrize("transport", ["local"])
@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_a_random_day_with_crashes_violates_no_invariant(harness: OrdersHarness, seed: int):
    day = Clients([harness.orders, await harness.another_process()], harness, seed)
    looking = await harness.connection()
    with crashes(random.Random(seed)):
        working = asyncio.gather(*(asyncio.create_task(day.work(n)) for n in range(WORKERS)))
        while not working.done():
            assert await violations(looking, at_rest=False) == {}
            await asyncio.wait([working], timeout=0.5)
        await working
    await at_rest(harness)

    assert await violations(looking, at_rest=True) == {}
    await assert_money_and_stock_agree(harness)
    assert all(len(ids) == 1 for ids in day.answers.values())  # K1: one key and request, one answer
    owners = [(actor, key) for actor, key, _ in day.answers]
    assert len(owners) == len(set(owners))  # K2: no other request has that answer
    seen = await harness.values("SELECT unnest(events) AS event FROM history")
    assert {"order.placed", "order.paid"} <= set(seen)


@contextlib.contextmanager
def crashes(rng: random.Random) -> Generator[None]:
    """Fails now and then at each fault point of orders."""

    async def sometimes(_point: str) -> None:
        await asyncio.sleep(rng.random() / 500)
        if rng.random() < 0.03:
            raise RuntimeError("an injected crash")

    points = [point for point in faults.POINTS if point.startswith(("orders.", "checkout.", "refund."))]
    removals = [faults.inject(point, sometimes) for point in points]
    try:
        yield
    finally:
        for remove in removals:
            remove()


async def at_rest(harness: OrdersHarness) -> None:
    async def is_at_rest() -> bool:
        running = """
            SELECT count(*) FROM sagas WHERE driver IS NOT NULL OR (wake_at IS NOT NULL AND step <> 'awaiting')
        """
        return (await harness.values(running)) == [0]

    await until(is_at_rest)


async def assert_money_and_stock_agree(harness: OrdersHarness) -> None:
    """M3, M5, M8, S3, S5, S6: the bank and the shelf have what the orders say."""
    reserved = {MUG: 0, LAMP: 0}
    gone = {MUG: 0, LAMP: 0}
    for order_id in await harness.values("SELECT id FROM orders"):
        order, bank = await harness.settled(order_id), await harness.bank(order_id)
        kept = order.payment in ("paid", "partially_refunded", "refunded") and order.status != "cancelled"
        assert bank.captures <= 1
        assert bank.net_minor == (rules.payable_minor(order) - order.refunded_minor if kept else 0), order
        assert bank.open_charges == (order.payment == "authorized"), order
        for line in order.lines:
            reserved[line.product_id] += line.quantity * (order.status == "pending")
            gone[line.product_id] += (line.quantity - line.returned) * (order.status in ("confirmed", "completed"))
    for product_id in (MUG, LAMP):
        assert await harness.shelf(product_id) == (PLENTY - gone[product_id], reserved[product_id])
