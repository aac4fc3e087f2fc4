"""Every invariant holds in a right world, and finds what is planted against it: it, and no other."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio

from audit.world import build, client_history
from mercato.audit.checking import check
from mercato.audit.clients import CLIENTS
from mercato.audit.invariants import SHOP
from mercato.audit.tables import WANTED, prepare
from mercato.chassis.copying import Copies, copied
from mercato.chassis.testing import Cluster

pytestmark = pytest.mark.asyncio(loop_scope="session")

ALL = (*SHOP, *CLIENTS)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(cluster: Cluster) -> AsyncGenerator[Copies]:
    """Copies of the right world, made once: each test plants in them, and takes back what it has planted."""
    dsns = await build(cluster)
    async with copied(cluster.server.admin_dsn, dsns, WANTED, progress=print) as copies:
        await prepare(copies, settled_seconds=60, history=client_history())
        yield copies
    for dsn in dsns.values():
        await cluster.release_database(dsn)


async def violated(copies: Copies) -> list[str]:
    return [finding.name for finding in await check(copies, ALL) if finding.violations]


STAND_STILL = "UPDATE audit.clock SET settled_before = 'infinity'"


def bank_and_books(n: int, order: int, kind: str, amount: int, *, payment: int, charge: int) -> str:
    """One more operation that succeeded, at the bank and in our books alike."""
    return f"""
        INSERT INTO sandbox.operations (id, key, kind, charge_id, order_id, amount_minor, currency, status, created_at)
        VALUES ({n}, 'planted {n}', '{kind}', {charge}, {order}, {amount}, 'USD', 'succeeded', '-infinity');
        INSERT INTO payments.operations (id, payment_id, kind, reference, key, amount_minor, currency, status, began_at)
        VALUES ({n}, {payment}, '{kind}', 'planted {n}', 'planted {n}', {amount}, 'USD', 'succeeded', '-infinity');
    """


def charge(n: int, order: int, state: str, amount: int = 0) -> str:
    return f"""
        INSERT INTO sandbox.charges (id, order_id, currency, authorized_minor, captured_minor, refunded_minor, state,
                                     created_at)
        VALUES ({n}, {order}, 'USD', {amount}, 0, 0, '{state}', '-infinity');
    """


def move(order: int, version: int, axis: str, before: str, after: str) -> str:
    """A move that is noted and told as any other."""
    return f"""
        UPDATE orders.orders SET {axis} = '{after}', version = {version} WHERE id = {order};
        INSERT INTO orders.order_history VALUES ({order}, {version}, '{axis}', '{before}', '{after}', '-infinity');
        INSERT INTO orders.outbox (id, type, subject, subject_id, version, at, published_at)
        VALUES (900, 'order.{after}', 'order', {order}, {version}, '-infinity', '-infinity');
        INSERT INTO events.feed (position, source, event_id, type, subject, subject_id, version, at, received_at)
        VALUES (900, 'orders', 900, 'order.{after}', 'order', {order}, {version}, '-infinity', '-infinity');
    """


def hold(order: int) -> str:
    """One piece of product 1, with the level as it must be."""
    return f"""
        DELETE FROM inventory.reservations WHERE order_id = {order};
        DELETE FROM inventory.reservation_lines WHERE order_id = {order};
        INSERT INTO inventory.reservations VALUES ({order}, 'held', '-infinity');
        INSERT INTO inventory.reservation_lines VALUES ({order}, 1, 1, 0);
        UPDATE inventory.levels SET reserved = reserved + 1 WHERE product_id = 1;
    """


def movement(n: int, product: int, kind: str, delta: int, order: str = "NULL") -> str:
    return f"INSERT INTO inventory.movements VALUES ({n}, {product}, '{kind}', {delta}, {order}, 'planted');"


def operation(op_id: str, based_on: str, **changes: str) -> str:
    """A copy of a client's operation with other values, as SQL."""
    columns = ("op_id", "principal", "user_id", "role", "route", "invoked_at", "outcome", "completed_at", "status",
               "idempotency_key", "fingerprint", "answer", "order_id", "version")  # fmt: skip
    values = {column: column for column in columns} | {"op_id": f"'{op_id}'"} | changes
    return f"INSERT INTO history.ops SELECT {', '.join(values.values())} FROM history.ops WHERE op_id = '{based_on}'"


TRIED_IN_VAIN = "UPDATE orders.sagas SET updated_at = now() + interval '1 day', tries = 10"

PLANTED: dict[str, dict[str, str]] = {
    "M1": {
        "entries do not add up": """
            UPDATE payments.ledger_entries SET amount_minor = amount_minor + 1
             WHERE operation_id = 2 AND account = 'sales';
            UPDATE payments.accounts SET balance_minor = balance_minor - 1 WHERE account = 'sales';
        """,
        "a capture has no entries": """
            UPDATE payments.accounts SET balance_minor = balance_minor - 1000 WHERE account = 'provider';
            UPDATE payments.accounts SET balance_minor = balance_minor + 1000 WHERE account = 'sales';
            DELETE FROM payments.ledger_entries WHERE operation_id = 2;
        """,
        "entries of nothing that happened": """
            UPDATE payments.accounts SET balance_minor = balance_minor + 1 WHERE account = 'provider';
            UPDATE payments.accounts SET balance_minor = balance_minor - 1 WHERE account = 'sales';
            INSERT INTO payments.ledger_entries
            VALUES (1, 'provider', 'debit', 1, 'USD'), (1, 'sales', 'credit', 1, 'USD');
        """,
    },
    "M2": {
        "a balance is off": "UPDATE payments.accounts SET balance_minor = balance_minor + 1 WHERE account = 'sales'",
        "an account is missing": "DELETE FROM payments.accounts WHERE account = 'refunds'",
        "a payment claims a refund": "UPDATE payments.payments SET refunded_minor = 1 WHERE id = 1",
    },
    "M3": {
        "two charges captured": charge(90, 1, "captured")
        + bank_and_books(90, 1, "authorize", 0, payment=1, charge=90)
        + bank_and_books(91, 1, "capture", 0, payment=1, charge=90),
        "two charges open": charge(90, 4, "open", 100)
        + charge(91, 4, "open", 100)
        + bank_and_books(90, 4, "authorize", 100, payment=4, charge=90)
        + bank_and_books(91, 4, "authorize", 100, payment=4, charge=91),
        "one charge captured twice": bank_and_books(90, 1, "capture", 0, payment=1, charge=1),
    },
    "M4": {
        "the bank knows more": "DELETE FROM payments.operations WHERE key = '3:void'",
        "we know more": "DELETE FROM sandbox.operations WHERE key = '3:void'",
        "we wait for ever": "UPDATE payments.operations SET status = 'unknown' WHERE key = '3:void'",
        "another amount": "UPDATE sandbox.operations SET amount_minor = 1 WHERE key = '1:authorize'",
        "another currency": "UPDATE sandbox.operations SET currency = 'EUR' WHERE key = '1:authorize'",
    },
    "M5": {
        "an order claims a refund": "UPDATE orders.orders SET refunded_minor = 50 WHERE id = 1",
        "kept for an order that is cancelled": """
            UPDATE orders.orders SET payment = 'paid', refunded_minor = 0 WHERE id = 5;
            DELETE FROM orders.order_history WHERE order_id = 5 AND after = 'paid';
            UPDATE orders.order_history SET after = 'paid', before = 'authorized' WHERE after = 'refunded';
            UPDATE orders.order_history SET version = 3 WHERE order_id = 5 AND version = 4;
            UPDATE orders.orders SET version = 3 WHERE id = 5;
            UPDATE orders.outbox SET version = 3 WHERE subject_id = 5 AND type = 'order.cancelled';
            DELETE FROM sandbox.operations WHERE order_id = 5 AND kind = 'refund';
            DELETE FROM payments.ledger_entries WHERE operation_id IN (
                SELECT id FROM payments.operations WHERE payment_id = 5 AND kind = 'refund');
            DELETE FROM payments.operations WHERE payment_id = 5 AND kind = 'refund';
            UPDATE payments.payments SET refunded_minor = 0 WHERE id = 5;
            UPDATE payments.accounts SET balance_minor = balance_minor - 100 WHERE account = 'refunds';
            UPDATE payments.accounts SET balance_minor = balance_minor + 100 WHERE account = 'provider';
        """,
        "an order does not know what was refunded": "UPDATE orders.orders SET refunded_minor = 99 WHERE id = 5",
    },
    "M6": {
        "at the bank and in our books": charge(90, 999, "voided")
        + "INSERT INTO payments.payments VALUES (90, 999, 1, 'voided', 0, 0, 0, 0, '-infinity');"
        + bank_and_books(90, 999, "authorize", 0, payment=90, charge=90)
        + bank_and_books(91, 999, "void", 0, payment=90, charge=90),
        "at the bank": charge(90, 999, "voided") + bank_and_books(90, 999, "authorize", 0, payment=3, charge=90),
        "in our books": "INSERT INTO payments.payments VALUES (90, 999, 1, 'voided', 0, 0, 0, 0, '-infinity')",
    },
    "M7": {
        "another total": "UPDATE orders.orders SET total_minor = total_minor + 1 WHERE id = 6",
        "a price was changed": "UPDATE orders.order_lines SET unit_price_minor = 1 WHERE order_id = 6",
    },
    "M8": {
        "cancelled": charge(90, 3, "open", 500) + bank_and_books(90, 3, "authorize", 500, payment=3, charge=90),
        "paid": charge(90, 1, "open", 9) + bank_and_books(90, 1, "authorize", 9, payment=1, charge=90),
    },
    "M9": {
        "everywhere": bank_and_books(90, 2, "refund", 710, payment=2, charge=2)
        + """
            INSERT INTO payments.ledger_entries
            VALUES (90, 'refunds', 'debit', 710, 'USD'), (90, 'provider', 'credit', 710, 'USD');
            UPDATE payments.accounts SET balance_minor = balance_minor + 710 WHERE account = 'refunds';
            UPDATE payments.accounts SET balance_minor = balance_minor - 710 WHERE account = 'provider';
            UPDATE payments.payments SET refunded_minor = refunded_minor + 710 WHERE id = 2;
            UPDATE orders.orders SET refunded_minor = refunded_minor + 710 WHERE id = 2;
        """,
        "more is authorized than asked for": "UPDATE payments.payments SET authorized_minor = 501 WHERE id = 3",
        "more is about to be refunded": """
            UPDATE orders.orders SET refund_pending_minor = 501 WHERE id = 6;
            INSERT INTO orders.sagas (kind, subject_id, reference, step, tries, wake_at, created_at, updated_at)
            VALUES ('refund', 6, 'r', 'refund', 0, 'infinity', 'infinity', 'infinity');
        """,
    },
    "S1": {
        "more is reserved than there is": "UPDATE inventory.levels SET on_hand = 0 WHERE product_id = 2;"
        + movement(90, 2, "adjustment", -48),
    },
    "S2": {
        "a piece from nowhere": "UPDATE inventory.levels SET on_hand = on_hand + 1 WHERE product_id = 1",
        "a movement of no level": movement(90, 77, "receipt", 1),
    },
    "S3": {
        "nobody holds it": "UPDATE inventory.levels SET reserved = reserved + 1 WHERE product_id = 1",
        "it is held and not reserved": "UPDATE inventory.levels SET reserved = 0 WHERE product_id = 2",
    },
    "S4": {
        "sold before it came": movement(0, 1, "adjustment", -1) + movement(90, 1, "receipt", 1),
    },
    "S5": {
        "more was ordered than sold": """
            UPDATE orders.order_lines SET quantity = 2, unit_price_minor = 250 WHERE order_id = 6
        """,
        "nothing was sold": """
            DELETE FROM inventory.reservations WHERE order_id = 6;
            DELETE FROM inventory.reservation_lines WHERE order_id = 6;
            DELETE FROM inventory.movements WHERE order_id = 6;
            UPDATE inventory.levels SET on_hand = on_hand + 1 WHERE product_id = 1;
        """,
        "sold to who has cancelled": "UPDATE inventory.reservations SET state = 'committed' WHERE order_id = 3;"
        + movement(90, 1, "sale", -1, "3")
        + "UPDATE inventory.levels SET on_hand = on_hand - 1 WHERE product_id = 1",
        "came back and is not on the shelf": "UPDATE orders.order_lines SET returned = 1 WHERE order_id = 1",
        "sold to nobody": "INSERT INTO inventory.reservations VALUES (999, 'committed', '-infinity');"
        + "INSERT INTO inventory.reservation_lines VALUES (999, 1, 1, 0);"
        + movement(90, 1, "sale", -1, "999")
        + "UPDATE inventory.levels SET on_hand = on_hand - 1 WHERE product_id = 1",
    },
    "S6": {
        "for a cancelled order": hold(3),
        "for nobody": hold(999),
    },
    "S7": {
        "not sold": "UPDATE inventory.movements SET kind = 'adjustment' WHERE order_id = 6",
        "sold without a reservation": movement(90, 1, "sale", -1, "4") + movement(91, 1, "receipt", 1),
        "sold twice": movement(90, 1, "sale", -1, "6") + movement(91, 1, "receipt", 1),
        "sold in part": """
            UPDATE inventory.movements SET delta = -1 WHERE order_id = 1;
            UPDATE inventory.levels SET on_hand = on_hand + 1 WHERE product_id = 1;
        """,
        "not come back": "UPDATE inventory.movements SET kind = 'adjustment' WHERE order_id = 2 AND kind = 'return'",
    },
    "O1": {
        "delivered before it was shipped": move(6, 3, "fulfilment", "unfulfilled", "delivered"),
        "back from delivered": move(1, 7, "fulfilment", "delivered", "shipped"),
    },
    "O2": {
        "a move from elsewhere": """
            UPDATE orders.order_history SET after = 'failed' WHERE order_id = 1 AND version = 2 AND axis = 'payment';
            UPDATE orders.outbox SET type = 'order.failed' WHERE subject_id = 1 AND type = 'order.authorized';
        """,
        "a version is missing": """
            UPDATE orders.order_history SET version = 3 WHERE order_id = 6 AND version = 2;
            UPDATE orders.orders SET version = 3 WHERE id = 6;
            UPDATE orders.outbox SET version = 3 WHERE subject_id = 6 AND version = 2;
            UPDATE events.feed SET version = 3 WHERE source = 'orders' AND subject_id = 6 AND version = 2;
        """,
    },
    "O3": {
        "moved without a note": "UPDATE orders.orders SET fulfilment = 'shipped' WHERE id = 6",
        "another version": "UPDATE orders.orders SET version = version + 1 WHERE id = 6",
    },
    "O4": {
        "its time is over": "UPDATE orders.sagas SET wake_at = '-infinity' WHERE subject_id = 4",
        "nobody goes on with it": "UPDATE orders.sagas SET step = 'reserve' WHERE subject_id = 4",
        "nobody ever begins": "DELETE FROM orders.sagas WHERE subject_id = 4",
        "tried in vain": f"{TRIED_IN_VAIN}, step = 'reserve' WHERE subject_id = 4",
        "confirmed and not captured": "UPDATE orders.sagas SET step = 'capture', wake_at = now() WHERE subject_id = 6",
        "sold, and waiting": "UPDATE orders.sagas SET step = 'awaiting', wake_at = 'infinity' WHERE subject_id = 6",
        "left in the middle": "UPDATE orders.sagas SET step = 'settle' WHERE subject_id = 6",
        "authorized, and left": """
            UPDATE orders.orders SET payment = 'authorized', version = 3 WHERE id = 6;
            INSERT INTO orders.order_history VALUES (6, 3, 'payment', 'unpaid', 'authorized', '-infinity');
        """,
        "captured in vain": f"{TRIED_IN_VAIN}, step = 'capture', wake_at = now() WHERE subject_id = 6",
        "a refund is forgotten": "UPDATE orders.orders SET refund_pending_minor = 10 WHERE id = 1",
    },
    "O6": {
        "two orders of one key": "UPDATE orders.orders SET idempotency_key = 'k1' WHERE id = 2;"
        "UPDATE history.ops SET idempotency_key = 'k1', fingerprint = 'request 1', answer = 'order 1' "
        "WHERE order_id = 2 AND idempotency_key IS NOT NULL",
    },
    "K3": {
        "of orders": "INSERT INTO orders.idempotency VALUES ('user:1', 'orders.place', 'k9', false)",
        "of inventory": "INSERT INTO inventory.idempotency VALUES ('staff', 'inventory.adjust', 'k9', false)",
    },
    "E1": {
        "never published": "UPDATE orders.outbox SET published_at = NULL WHERE id = 3",
        "its retry is long over": """
            UPDATE orders.outbox SET published_at = NULL WHERE id = 3;
            INSERT INTO orders.outbox_retries VALUES (3, 'events.feed', 2, '-infinity');
        """,
    },
    "E2": {
        "not in the feed": "DELETE FROM events.feed WHERE source = 'payments' AND event_id = 2",
        "not in an inbox": "DELETE FROM products.inbox WHERE event_id = 1",
    },
    "E3": {
        "in the feed": """
            INSERT INTO events.feed SELECT 900, source, 900, type, 'order', 900, 1, at, received_at
              FROM events.feed LIMIT 1
        """,
        "in an inbox": """
            INSERT INTO products.inbox SELECT consumer, source, 900, subject, 900, version, 900, at
              FROM products.inbox LIMIT 1
        """,
    },
    "E4": {
        "in the feed": """
            INSERT INTO events.feed SELECT 900, source, event_id, type, subject, subject_id, version, at, received_at
              FROM events.feed ORDER BY position DESC LIMIT 1
        """,
        "in an inbox": "INSERT INTO products.inbox SELECT * FROM products.inbox LIMIT 1",
    },
    "E5": {
        "the feed goes backwards": """
            UPDATE events.feed SET position = -position WHERE source = 'orders' AND subject_id = 1
        """,
    },
    "E6": {
        "of the feed": """
            INSERT INTO events.dead_letters VALUES ('events.feed', 'orders', 1, 'order.placed', 'order', 1, 5, now())
        """,
        "of products": """
            INSERT INTO products.dead_letters
            VALUES ('products.in_stock', 'inventory', 1, 'stock.available', 'product', 1, 5, now())
        """,
    },
    "E7": {
        "a move was not told": """
            DELETE FROM orders.outbox WHERE subject_id = 6 AND version = 2;
            DELETE FROM events.feed WHERE source = 'orders' AND subject_id = 6 AND version = 2;
        """,
        "one of its axes was not told": """
            DELETE FROM orders.outbox WHERE subject_id = 1 AND type = 'order.authorized';
            DELETE FROM events.feed WHERE source = 'orders' AND subject_id = 1 AND type = 'order.authorized';
        """,
    },
    "O5": {
        "answered and not there": operation("planted", "place 6", order_id="999"),
        "answered without saying which": operation("planted", "place 6", order_id="NULL"),
    },
    "O7": {
        "with a key": "DELETE FROM history.ops WHERE idempotency_key = 'k2'",
        "without a key": "DELETE FROM history.ops WHERE op_id = 'place 6'",
    },
    "O8": {
        "an older version": operation(
            "planted", "look 1", invoked_at="invoked_at + interval '1 min'", completed_at="NULL", version="5"
        ),
    },
    "K1": {
        "another body": "UPDATE history.ops SET answer = 'another' WHERE op_id = 'again 1'",
        "another status": "UPDATE history.ops SET status = 200 WHERE op_id = 'again 1'",
    },
    "K2": {
        "it was taken": operation(
            "planted", "again 1", fingerprint="'another'", invoked_at="completed_at", answer="'another'", status="409"
        ),
    },
    "X1": {
        "shown to a stranger": operation("planted", "look 1", user_id="2", principal="'user:2'"),
    },
}

CASES = [(name, case) for name, cases in PLANTED.items() for case in cases]


async def test_every_invariant_has_a_planted_case():
    assert list(PLANTED) == [invariant.name for invariant in ALL]


@pytest.mark.parametrize("still", [False, True], ids=["running", "standing still"])
async def test_a_right_world_violates_nothing(world: Copies, still: bool):
    async with world.undone():
        if still:
            await world.execute(STAND_STILL)

        assert await violated(world) == []


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}: {case}" for name, case in CASES])
async def test_what_is_planted_is_found_and_nothing_else(world: Copies, name: str, case: str):
    async with world.undone():
        await world.execute(PLANTED[name][case])

        assert await violated(world) == [name]


FRESH = {
    "M4": "UPDATE payments.operations SET status = 'unknown', asked_at = 'now' WHERE key = '3:void'",
    "M5": "UPDATE orders.orders SET refunded_minor = 50, updated_at = 'now' WHERE id = 1",
    "M8": PLANTED["M8"]["paid"] + "UPDATE orders.orders SET updated_at = 'now' WHERE id = 1",
    "S5": PLANTED["S5"]["more was ordered than sold"] + ";UPDATE orders.orders SET updated_at = 'now' WHERE id = 6",
    "S6": hold(3) + "UPDATE orders.sagas SET updated_at = 'now' WHERE subject_id = 3",
    "O4": "UPDATE orders.sagas SET step = 'reserve', updated_at = 'now' WHERE subject_id = 4",
    "E1": PLANTED["E1"]["never published"]
    + ";INSERT INTO orders.outbox_retries VALUES (3, 'events.feed', 2, now() + interval '1 min')",
    "E2": PLANTED["E2"]["not in the feed"] + ";UPDATE payments.outbox SET published_at = 'now' WHERE id = 2",
    "M6": PLANTED["M6"]["at the bank"] + "UPDATE sandbox.operations SET created_at = 'now' WHERE order_id = 999",
}


async def test_every_invariant_that_waits_is_shown_to_wait():
    assert set(FRESH) == {invariant.name for invariant in ALL if invariant.when == "settled"}


@pytest.mark.parametrize("name", FRESH)
async def test_what_is_under_way_is_no_violation_until_the_shop_stands_still(world: Copies, name: str):
    async with world.undone():
        await world.execute(FRESH[name])
        assert await violated(world) == []

        await world.execute(STAND_STILL)
        assert await violated(world) == [name]


async def test_an_event_that_waits_behind_one_that_is_tried_again_is_no_violation(world: Copies):
    async with world.undone():
        await world.execute("UPDATE orders.outbox SET published_at = NULL WHERE subject_id = 1 AND version >= 3")
        assert await violated(world) == ["E1"]

        await world.execute(
            """
            INSERT INTO orders.outbox_retries SELECT id, 'events.feed', 4, now() + interval '2 min'
              FROM orders.outbox WHERE subject_id = 1 AND version = 3
            """
        )
        assert await violated(world) == []


REPLAYED = """
    INSERT INTO events.dead_letters
    SELECT 'events.feed', source, event_id, type, subject, subject_id, 5, at, at FROM events.feed WHERE {which};
"""


async def test_a_dead_letter_that_was_replayed_may_come_out_of_order_and_after_its_outbox_row_is_gone(world: Copies):
    async with world.undone():
        await world.execute(
            """
            UPDATE events.feed SET position = 900 WHERE source = 'orders' AND subject_id = 1 AND version = 4;
            UPDATE events.feed SET position = 901, event_id = 901, version = 0
             WHERE source = 'orders' AND subject_id = 6 AND version = 1;
            UPDATE orders.outbox SET published_at = NULL WHERE subject_id = 6 AND version = 1;
            """
        )
        assert await violated(world) == ["E1", "E3", "E5"]

        await world.execute("UPDATE orders.outbox SET published_at = 'now' WHERE published_at IS NULL")
        await world.execute(REPLAYED.format(which="position >= 900"))
        assert await violated(world) == []


async def test_a_dead_letter_that_was_replayed_and_had_no_effect_is_a_violation(world: Copies):
    async with world.undone():
        await world.execute(REPLAYED.format(which="source = 'payments' AND event_id = 2"))
        await world.execute(PLANTED["E2"]["not in the feed"])

        assert await violated(world) == ["E2"]


async def test_an_event_that_is_held_back_behind_nothing_is_a_violation(world: Copies):
    """It would be held back for ever: its turn comes when the one before it is taken, and there is none."""
    async with world.undone():
        await world.execute(
            """
            UPDATE orders.outbox SET published_at = NULL WHERE id = 3;
            INSERT INTO orders.outbox_retries VALUES (3, 'events.feed', 0, 'infinity');
            """
        )

        assert await violated(world) == ["E1"]


async def test_orders_from_before_there_were_checkouts_have_no_stock_and_no_events(world: Copies):
    async with world.undone():
        await world.execute(
            """
            UPDATE orders.orders SET created_at = created_at - interval '1 day' WHERE id = 6;
            DELETE FROM orders.sagas WHERE subject_id = 6;
            """
        )
        await world.execute(PLANTED["S5"]["nothing was sold"] + PLANTED["E7"]["a move was not told"])

        assert await violated(world) == []


async def test_what_was_cleaned_up_is_no_violation(world: Copies):
    async with world.undone():
        await world.execute(
            """
            UPDATE orders.orders SET created_at = created_at - interval '7 days';
            UPDATE orders.sagas SET created_at = created_at - interval '7 days';
            UPDATE orders.order_history SET at = at - interval '7 days' WHERE order_id = 1;
            DELETE FROM orders.outbox WHERE subject_id = 1 AND version = 1;
            UPDATE events.feed SET received_at = received_at - interval '7 days' WHERE subject_id = 1;
            """
        )

        assert await violated(world) == []


async def test_a_refund_under_way_may_have_happened_at_the_bank_already(world: Copies):
    """The bank has given 100 back for order 2; the order has only announced it."""
    async with world.undone():
        await world.execute(
            """
            UPDATE orders.orders SET refunded_minor = 0, refund_pending_minor = 100 WHERE id = 2;
            UPDATE orders.sagas SET wake_at = now() WHERE subject_id = 2;
            """
        )

        assert await violated(world) == ["O4"]


async def test_a_violation_is_counted_whole_and_shown_in_part(world: Copies):
    async with world.undone():
        await world.execute("UPDATE orders.orders SET total_minor = total_minor + 1")
        await world.execute("INSERT INTO orders.order_lines SELECT id, 99, 1, 0, 5 FROM orders.orders")

        [finding] = [found for found in await check(world, ALL) if found.name == "M7"]

        assert finding.violations == 6
        assert len(finding.rows) == 5
        assert set(finding.rows[0]) == {"order_id", "total_minor", "sum_minor"}


async def test_no_secret_is_copied():
    copied_columns = {column for tables in WANTED.values() for table in tables for column in table.columns}

    assert "users" not in WANTED
    assert not {"data", "answer", "fingerprint", "method", "name", "sku", "reason", "error"} & copied_columns
