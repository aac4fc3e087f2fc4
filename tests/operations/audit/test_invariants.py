"""Every invariant holds in the sample shop; each injected violation is found by its invariant and by no other."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio

from mercato.operations.audit.checking import check
from mercato.operations.audit.clients import CLIENTS
from mercato.operations.audit.invariants import SHOP
from mercato.operations.audit.tables import WANTED, prepare
from mercato.operations.copying import Copies, copied
from mercato.testing.cluster import Cluster
from operations.audit.sample_shop import build, client_history

pytestmark = pytest.mark.asyncio(loop_scope="session")

ALL = (*SHOP, *CLIENTS)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def copies(cluster: Cluster) -> AsyncGenerator[Copies]:
    """Copies of the sample shop, made once: a test injects a violation and rolls it back."""
    dsns = await build(cluster)
    async with copied(cluster.server.admin_dsn, dsns, WANTED, progress=print) as copies:
        await prepare(copies, settled_seconds=60, history=client_history())
        yield copies
    for dsn in dsns.values():
        await cluster.release_database(dsn)


async def violated(copies: Copies) -> list[str]:
    return [finding.name for finding in await check(copies, ALL) if finding.violations]


STAND_STILL = "UPDATE audit.clock SET settled_before = 'infinity'"


def bank_and_payments(n: int, order: int, kind: str, amount: int, *, payment: int, charge: int) -> str:
    """One more operation that succeeded, at the bank and in payments alike."""
    return f"""
        INSERT INTO sandbox.operations (id, key, kind, charge_id, order_id, amount_minor, currency, status, created_at)
        VALUES ({n}, 'injected {n}', '{kind}', {charge}, {order}, {amount}, 'USD', 'succeeded', '-infinity');
        INSERT INTO payments.operations (payment_id, kind, reference, key, amount_minor, currency, status, settled_at)
        VALUES ({payment}, '{kind}', 'injected {n}', 'injected {n}', {amount}, 'USD', 'succeeded', '-infinity');
    """


def charge(n: int, order: int, state: str, amount: int = 0) -> str:
    return f"""
        INSERT INTO sandbox.charges (id, order_id, currency, authorized_minor, captured_minor, refunded_minor, state,
                                     created_at)
        VALUES ({n}, {order}, 'USD', {amount}, 0, 0, '{state}', '-infinity');
    """


def transfer(payment: int, kind: str, amount: int, debit: str, credit: str, reference: str = "") -> str:
    """A transfer with its balances."""
    return f"""
        INSERT INTO payments.transfers
        VALUES ({payment}, '{kind}', '{reference}', '{debit}', '{credit}', {amount}, 'USD');
        UPDATE payments.accounts SET balance_minor = balance_minor + {amount} WHERE account = '{debit}';
        UPDATE payments.accounts SET balance_minor = balance_minor - {amount} WHERE account = '{credit}';
    """


def intent(payment: int, kind: str, key: str, asked_at: str = "-infinity", reference: str = "") -> str:
    return f"""
        INSERT INTO payments.intents
        VALUES ({payment}, '{kind}', '{reference}', '{key}', 500, 'USD', 'unknown', '{asked_at}');
    """


def stock_of_no_product(updated_at: str) -> str:
    """Pieces of a product whose database was restored."""
    return f"INSERT INTO inventory.levels VALUES (77, 5, 0, 1, '{updated_at}');" + movement(
        90, 77, "receipt", 5, version=1
    )


def payment(n: int, order: int, status: str) -> str:
    """Of nothing."""
    return f"INSERT INTO payments.payments VALUES ({n}, {order}, 9, '{status}', 0, 0, 0, 0, '-infinity');"


LATER = 900 << 12
"""The position of an event behind all others, in an outbox as well as in the feed."""


def move(order: int, version: int, axis: str, after: str, event: str | None = None) -> str:
    """A transition that is noted, and whose event was emitted, as any other."""
    event = event or f"order.{after}"
    return f"""
        UPDATE orders.orders SET {axis} = '{after}', version = {version} WHERE id = {order};
        INSERT INTO orders.history
        SELECT id, {version}, status, payment, fulfilment, '{{{event}}}', '-infinity' FROM orders.orders
         WHERE id = {order};
        INSERT INTO orders.outbox (id, type, subject, subject_id, version, at)
        VALUES ({LATER}, '{event}', 'order', {order}, {version}, '-infinity');
        UPDATE events.cursors SET position = {LATER} WHERE source = 'orders';
        INSERT INTO events.feed (position, source, event_id, type, subject, subject_id, version, at, received_at)
        VALUES ({LATER}, 'orders', {LATER}, '{event}', 'order', {order}, {version}, '-infinity', '-infinity');
    """


def line(order: int, **changes: int) -> str:
    """Another value in the first line of an order."""
    replaced = ", ".join(f"'{field}', {value}" for field, value in changes.items())
    return f"""
        UPDATE orders.orders
           SET lines = (SELECT json_build_array((lines -> 0)::jsonb || jsonb_build_object({replaced})))
         WHERE id = {order};
    """


def refund(order: int, amount: int, status: str) -> str:
    return f"INSERT INTO orders.refunds VALUES ({order}, 'injected', {amount}, '{status}', '-infinity');"


def saga(order: int, step: str, wake_at: str = "NULL", driver: str = "NULL", *, kind: str = "checkout",
         updated_at: str = "'-infinity'", tries: int = 0, reference: str = "") -> str:  # fmt: skip
    return f"""
        INSERT INTO orders.sagas (kind, subject_id, reference, step, tries, driver, wake_at, updated_at)
        VALUES ('{kind}', {order}, '{reference}', '{step}', {tries}, {driver}, {wake_at}, {updated_at});
    """


def parked(
    retry_at: str,
    *,
    dead_at: str = "NULL",
    replayed_at: str = "NULL",
    which: str = "source = 'orders' AND event_id = 3 << 12",
    stays: bool = False,
) -> str:
    """Events of the feed that its consumer could not process: they are not in the feed, unless they came later."""
    park = f"""
        INSERT INTO events.parked
        SELECT 'events.feed', source, event_id, type, subject, subject_id, 5, {retry_at}, {dead_at}, {replayed_at}
          FROM events.feed WHERE {which};
    """
    return park if stays else park + f"DELETE FROM events.feed WHERE {which};"


def hold(order: int, product: int = 1) -> str:
    """One piece of a product, with the level as it must be."""
    return f"""
        DELETE FROM inventory.reservations WHERE order_id = {order};
        INSERT INTO inventory.reservations VALUES ({order}, 'held', '-infinity', '{{{product}}}', '{{1}}', NULL, NULL);
        UPDATE inventory.levels SET reserved = reserved + 1 WHERE product_id = {product};
    """


def sell(order: int, product: int = 1) -> str:
    """One piece of a product, with the level as it must be."""
    return f"""
        DELETE FROM inventory.reservations WHERE order_id = {order};
        INSERT INTO inventory.reservations
        VALUES ({order}, 'committed', '-infinity', '{{{product}}}', '{{1}}', '{{6}}', NULL);
        UPDATE inventory.levels SET on_hand = on_hand - 1 WHERE product_id = {product};
    """


def movement(n: int, product: int, kind: str, delta: int, order: str = "NULL", version: int = 6) -> str:
    return f"""
        INSERT INTO inventory.movements VALUES ({n}, {product}, '{kind}', {delta}, {order}, 'injected', {version});
    """


def operation(op_id: str, based_on: str, **changes: str) -> str:
    """A copy of a client's operation with other values, as SQL."""
    columns = ("op_id", "principal", "user_id", "role", "route", "invoked_at", "outcome", "completed_at", "status",
               "idempotency_key", "fingerprint", "answer", "order_id", "version")  # fmt: skip
    values = {column: column for column in columns} | {"op_id": f"'{op_id}'"} | changes
    return f"INSERT INTO history.ops SELECT {', '.join(values.values())} FROM history.ops WHERE op_id = '{based_on}'"


TRIED_IN_VAIN = "UPDATE orders.sagas SET updated_at = now() + interval '1 day', tries = 10"

VIOLATIONS: dict[str, dict[str, str]] = {
    "M1": {
        "another amount": """
            UPDATE payments.transfers SET amount_minor = amount_minor + 1 WHERE payment_id = 1;
            UPDATE payments.accounts SET balance_minor = balance_minor + 1 WHERE account = 'provider';
            UPDATE payments.accounts SET balance_minor = balance_minor - 1 WHERE account = 'sales';
        """,
        "a capture without a transfer": """
            UPDATE payments.accounts SET balance_minor = balance_minor - 1000 WHERE account = 'provider';
            UPDATE payments.accounts SET balance_minor = balance_minor + 1000 WHERE account = 'sales';
            DELETE FROM payments.transfers WHERE payment_id = 1;
        """,
        "a charge without a transfer": """
            UPDATE payments.accounts SET balance_minor = balance_minor - 100 WHERE account = 'provider';
            UPDATE payments.accounts SET balance_minor = balance_minor + 100 WHERE account = 'sales';
            DELETE FROM payments.transfers WHERE payment_id = 5 AND kind = 'charge';
        """,
        "a transfer of nothing that happened": transfer(1, "refund", 1, "refunds", "provider", "never"),
        "a transfer of an authorize": transfer(3, "authorize", 500, "provider", "sales"),
        "between other accounts": """
            UPDATE payments.transfers SET credit = 'refunds' WHERE payment_id = 1;
            UPDATE payments.accounts SET balance_minor = balance_minor - 1000 WHERE account = 'refunds';
            UPDATE payments.accounts SET balance_minor = balance_minor + 1000 WHERE account = 'sales';
        """,
    },
    "M2": {
        "a balance is off": "UPDATE payments.accounts SET balance_minor = balance_minor + 1 WHERE account = 'sales'",
        "an account is missing": "DELETE FROM payments.accounts WHERE account = 'refunds'",
        "a payment claims a refund": "UPDATE payments.payments SET refunded_minor = 1 WHERE id = 1",
    },
    "M3": {
        "two charges captured": charge(90, 1, "captured")
        + bank_and_payments(90, 1, "authorize", 0, payment=1, charge=90)
        + bank_and_payments(91, 1, "capture", 0, payment=1, charge=90),
        "two charges open": charge(90, 4, "open", 100)
        + charge(91, 4, "open", 100)
        + bank_and_payments(90, 4, "authorize", 100, payment=4, charge=90)
        + bank_and_payments(91, 4, "authorize", 100, payment=4, charge=91),
        "one charge captured twice": bank_and_payments(90, 1, "capture", 0, payment=1, charge=1),
        "two charges of one order": payment(90, 5, "captured")
        + charge(90, 5, "captured")
        + charge(91, 5, "captured")
        + bank_and_payments(90, 5, "charge", 0, payment=90, charge=90)
        + bank_and_payments(91, 5, "charge", 0, payment=90, charge=91),
    },
    "M4": {
        "the bank knows more": "DELETE FROM payments.operations WHERE key = '3:void'",
        "we know more": "DELETE FROM sandbox.operations WHERE key = '3:void'",
        "we wait for ever": "DELETE FROM payments.operations WHERE key = '3:void';" + intent(3, "void", "3:void"),
        "another amount": "UPDATE sandbox.operations SET amount_minor = 1 WHERE key = '1:authorize'",
        "another currency": "UPDATE sandbox.operations SET currency = 'EUR' WHERE key = '1:authorize'",
    },
    "M5": {
        "an order claims a refund": "UPDATE orders.orders SET refunded_minor = 50 WHERE id = 1;"
        + refund(1, 50, "succeeded"),
        "kept for an order that is cancelled": """
            UPDATE orders.orders SET payment = 'paid', refunded_minor = 0 WHERE id = 5;
            UPDATE orders.history SET payment = 'paid', events = '{order.cancelled}' WHERE order_id = 5 AND version = 4;
            DELETE FROM orders.outbox WHERE subject_id = 5 AND type = 'order.refunded';
            DELETE FROM events.feed WHERE source = 'orders' AND subject_id = 5 AND type = 'order.refunded';
            DELETE FROM sandbox.operations WHERE order_id = 5 AND kind = 'refund';
            DELETE FROM payments.transfers WHERE payment_id = 5 AND kind = 'refund';
            DELETE FROM payments.operations WHERE payment_id = 5 AND kind = 'refund';
            UPDATE payments.payments SET refunded_minor = 0 WHERE id = 5;
            UPDATE payments.accounts SET balance_minor = balance_minor - 100 WHERE account = 'refunds';
            UPDATE payments.accounts SET balance_minor = balance_minor + 100 WHERE account = 'provider';
        """,
        "an order says that less was taken": "UPDATE orders.orders SET waived_minor = 1 WHERE id = 1",
        "an order does not know what was refunded": "UPDATE orders.orders SET refunded_minor = 99 WHERE id = 5",
    },
    "M6": {
        "at the bank and in payments": charge(90, 999, "voided")
        + payment(90, 999, "voided")
        + bank_and_payments(90, 999, "authorize", 0, payment=90, charge=90)
        + bank_and_payments(91, 999, "void", 0, payment=90, charge=90),
        "at the bank": charge(90, 999, "voided") + bank_and_payments(90, 999, "authorize", 0, payment=3, charge=90),
        "in payments": payment(90, 999, "voided"),
    },
    "M7": {
        "another total": "UPDATE orders.orders SET total_minor = total_minor + 1 WHERE id = 6",
        "a price was changed": line(6, unit_price_minor=1),
        "a discount was not taken off": line(6, discount_minor=1),
    },
    "M8": {
        "cancelled": charge(90, 3, "open", 500) + bank_and_payments(90, 3, "authorize", 500, payment=3, charge=90),
        "paid": charge(90, 1, "open", 9) + bank_and_payments(90, 1, "authorize", 9, payment=1, charge=90),
    },
    "M9": {
        "everywhere": bank_and_payments(90, 2, "refund", 710, payment=2, charge=2)
        + transfer(2, "refund", 710, "refunds", "provider", "injected 90")
        + """
            UPDATE payments.payments SET refunded_minor = refunded_minor + 710 WHERE id = 2;
            UPDATE orders.orders SET refunded_minor = refunded_minor + 710 WHERE id = 2;
        """
        + refund(2, 710, "succeeded"),
        "more is not taken than there is": "UPDATE orders.orders SET waived_minor = 501 WHERE id = 6",
        "more is authorized than asked for": "UPDATE payments.payments SET authorized_minor = 501 WHERE id = 3",
        "more is about to be refunded": "UPDATE orders.orders SET refund_pending_minor = 501 WHERE id = 6;"
        + refund(6, 501, "pending")
        + saga(6, "refund", "'infinity'", kind="refund", reference="injected", updated_at="'infinity'"),
    },
    "M10": {
        "an operation without a payment": charge(90, 3, "voided")
        + bank_and_payments(90, 3, "authorize", 0, payment=99, charge=90),
        "an intent without a payment": intent(99, "void", "of nothing"),
        "a transfer without a payment": charge(90, 4, "captured")
        + bank_and_payments(90, 4, "charge", 100, payment=99, charge=90)
        + bank_and_payments(91, 4, "refund", 100, payment=99, charge=90)
        + transfer(99, "charge", 100, "provider", "sales", "injected 90")
        + transfer(99, "refund", 100, "refunds", "provider", "injected 91"),
        "pending without an intent": payment(90, 4, "pending"),
        "an open charge of a payment that is not pending": intent(3, "charge", "3:charge"),
        "settled, and an intent": intent(3, "void", "injected"),
        "authorized and charged": bank_and_payments(90, 3, "charge", 0, payment=3, charge=3),
    },
    "S1": {
        "more is reserved than there is": "UPDATE inventory.levels SET on_hand = 0 WHERE product_id = 2;"
        + movement(90, 2, "adjustment", -48),
    },
    "S2": {
        "a piece from nowhere": "UPDATE inventory.levels SET on_hand = on_hand + 1 WHERE product_id = 1",
        "sold and still there": "UPDATE inventory.levels SET on_hand = on_hand + 1 WHERE product_id = 2",
        "a movement of nothing": movement(90, 1, "receipt", 1),
    },
    "S3": {
        "reserved for no order": "UPDATE inventory.levels SET reserved = reserved + 1 WHERE product_id = 1",
        "held and not reserved": "UPDATE inventory.levels SET reserved = 0 WHERE product_id = 2",
    },
    "S4": {
        "written off before it came": movement(90, 1, "adjustment", -101, version=2)
        + movement(91, 1, "receipt", 101, version=4),
        "sold before it came": """
            UPDATE inventory.reservations SET level_versions = '{1}' WHERE order_id = 6;
            UPDATE inventory.movements SET level_version = 2 WHERE product_id = 1;
        """,
        "the last piece was sold twice in one batch": """
            UPDATE inventory.movements SET delta = 2 WHERE id = 1;
        """
        + movement(90, 1, "receipt", 98, version=4),
    },
    "S5": {
        "more was ordered than sold": line(6, quantity=2, unit_price_minor=250),
        "not sold": """
            DELETE FROM inventory.reservations WHERE order_id = 6;
            UPDATE inventory.levels SET on_hand = on_hand + 1 WHERE product_id = 1;
        """,
        "sold for a cancelled order": sell(3),
        "came back and is not on the shelf": "UPDATE orders.orders SET returned = '{1}' WHERE id = 1",
        "sold for an order that does not exist": sell(999),
    },
    "S6": {
        "for a cancelled order": hold(3),
        "for an order that does not exist": hold(999),
    },
    "S7": {
        "a sold line has no version": """
            UPDATE inventory.reservations SET level_versions = NULL WHERE order_id = 6
        """,
        "one line of two has no version": """
            UPDATE inventory.reservations SET level_versions = '{3}' WHERE order_id = 2
        """,
        "a version that the level has not reached": """
            UPDATE inventory.reservations SET level_versions = '{7}' WHERE order_id = 6
        """,
        "a movement of a version that the level has not reached": """
            UPDATE inventory.movements SET level_version = 8 WHERE id = 4
        """,
        "a held line has a version": """
            UPDATE inventory.reservations SET level_versions = '{6}' WHERE order_id = 4
        """,
        "came back and is not on the shelf": """
            UPDATE inventory.movements SET kind = 'adjustment' WHERE order_id = 2 AND kind = 'return'
        """,
        "came back without a reservation": movement(90, 1, "return", 1, "999") + movement(91, 1, "adjustment", -1),
        "came back of what was not sold": movement(90, 1, "return", 1, "3") + movement(91, 1, "adjustment", -1),
    },
    "S8": {
        "a movement": movement(90, 77, "receipt", 1),
        "a held line": """
            INSERT INTO inventory.reservations VALUES (4, 'held', '-infinity', '{77}', '{1}', NULL, NULL)
        """,
        "a sold line": movement(90, 77, "receipt", 4, version=1)
        + line(6, product_id=77)
        + """
            UPDATE orders.order_products SET product_id = 77 WHERE order_id = 6;
            UPDATE inventory.reservations SET product_ids = '{77}' WHERE order_id = 6;
            UPDATE inventory.levels SET on_hand = on_hand + 1 WHERE product_id = 1;
        """,
    },
    "S9": {"of a product that is lost": stock_of_no_product("-infinity")},
    "S10": {
        "another quantity": "UPDATE inventory.guest_holds SET quantity = 2 WHERE order_id = 7",
        "another product": """
            INSERT INTO inventory.guest_holds (product_id, order_id, quantity) VALUES (2, 7, 1)
        """,
        "a line is missing": """
            INSERT INTO inventory.reservations VALUES (999, 'held', 'now', '{1,2}', '{1,1}', NULL, NULL);
            INSERT INTO inventory.guest_holds (product_id, order_id, quantity) VALUES (1, 999, 1);
            UPDATE inventory.levels SET reserved = reserved + 1;
        """,
    },
    "S11": {
        "a guest's hold does not count": "DELETE FROM inventory.guest_holds WHERE order_id = 7",
        "the hold of an account counts": """
            INSERT INTO inventory.guest_holds (product_id, order_id, quantity) VALUES (2, 4, 1)
        """,
    },
    "O1": {
        "delivered before it was shipped": move(6, 3, "fulfilment", "delivered"),
        "back from delivered": move(1, 7, "fulfilment", "shipped"),
    },
    "O2": {
        "an event is not named": """
            UPDATE orders.history SET events = '{order.confirmed}' WHERE order_id = 1 AND version = 2
        """,
        "no event is named": "UPDATE orders.history SET events = '{}' WHERE order_id = 6 AND version = 2",
        "a version is missing": """
            UPDATE orders.history SET version = 3 WHERE order_id = 6 AND version = 2;
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
        "no process continues it": "UPDATE orders.sagas SET step = 'reserve' WHERE subject_id = 4",
        "it has no checkout": "DELETE FROM orders.sagas WHERE subject_id = 4",
        "tried in vain": f"{TRIED_IN_VAIN}, step = 'reserve' WHERE subject_id = 4",
        "confirmed and not captured": saga(6, "settle", "now()"),
        "its process is gone": saga(6, "settle", driver="7"),
        "sold, and waiting": saga(6, "awaiting", "'infinity'"),
        "left in the middle": saga(6, "settle"),
        "authorized, and left": move(6, 3, "payment", "authorized"),
        "captured in vain": saga(6, "settle", "now()", updated_at="now() + interval '1 day'", tries=10),
        "a refund is forgotten": "UPDATE orders.orders SET refund_pending_minor = 10 WHERE id = 1;"
        + refund(1, 10, "pending"),
    },
    "O6": {
        "two orders of one key": "UPDATE orders.orders SET idempotency_key = 'k1' WHERE id = 2;"
        "UPDATE history.ops SET idempotency_key = 'k1', fingerprint = 'request 1', answer = 'order 1' "
        "WHERE order_id = 2 AND idempotency_key IS NOT NULL",
    },
    "O9": {
        "reserved for no refund": "UPDATE orders.orders SET refund_pending_minor = 10 WHERE id = 1",
        "refunded without a refund": "DELETE FROM orders.refunds WHERE order_id = 2",
    },
    "O10": {
        "a history": """
            INSERT INTO orders.history
            VALUES (999, 1, 'pending', 'unpaid', 'unfulfilled', '{order.placed}', '-infinity')
        """,
        "a refund": refund(999, 0, "succeeded"),
        "a key of a payment": "INSERT INTO orders.payment_keys VALUES ('user:1', 'k9', 999)",
        "a saga": saga(999, "reserve", "'infinity'", updated_at="'infinity'"),
        "not listed under its product": "DELETE FROM orders.order_products WHERE order_id = 1",
        "listed under a product that it does not have": "INSERT INTO orders.order_products VALUES (77, 1)",
    },
    "O11": {
        "stock": "UPDATE inventory.reservations SET nonce = nonce + 1 WHERE order_id = 6",
        "a payment": "UPDATE payments.payments SET nonce = nonce + 1 WHERE order_id = 1",
    },
    "O12": {
        "an order that inventory knows": "UPDATE orders.orders_id_seq SET last_value = 6, is_called = false",
        "an account that orders knows": "UPDATE users.users_id_seq SET last_value = 1",
        "a product that inventory knows": "UPDATE products.products_id_seq SET last_value = 1",
        "a payment that events knows": "UPDATE payments.payments_id_seq SET last_value = 1",
    },
    "K3": {
        "of inventory": "INSERT INTO inventory.idempotency VALUES ('staff', 'inventory.adjust', 'k9', false)",
    },
    "E1": {
        "not read": "UPDATE events.cursors SET position = (3 << 12) - 1 WHERE source = 'orders'",
        "no cursor": "DELETE FROM products.cursors",
        "not read by users": "DELETE FROM users.cursors WHERE source = 'products'",
        "its retry is long over": parked("'-infinity'"),
        "it waits behind nothing": parked("'infinity'"),
    },
    "E2": {
        "not in the feed": "DELETE FROM events.feed WHERE source = 'payments' AND event_id = 2 << 12",
        "otherwise in the feed": """
            UPDATE events.feed SET type = 'payment.other' WHERE source = 'payments' AND event_id = 2 << 12
        """,
        "not noted with its product": "UPDATE products.products SET stock_version = 0 WHERE id = 1",
        "a change of price not in the security log": "DELETE FROM users.security_log WHERE kind = 'price_changed'",
        "a refund in the security log with another order": "UPDATE users.security_log SET subject = 'order 5' "
        "WHERE kind = 'refunded'",
    },
    "E3": {
        "in the feed": f"""
            INSERT INTO events.feed SELECT {LATER}, source, {LATER}, type, 'order', 900, 1, at, received_at
              FROM events.feed LIMIT 1
        """,
    },
    "E4": {
        "in the feed": f"""
            INSERT INTO events.feed
            SELECT {LATER}, source, event_id, type, subject, subject_id, version, at, received_at
              FROM events.feed ORDER BY position DESC LIMIT 1
        """,
    },
    "E5": {
        "the feed goes backwards": """
            UPDATE events.feed SET position = -position WHERE source = 'orders' AND subject_id = 1
        """,
    },
    "E6": {
        "of the feed": parked("now()", dead_at="now()"),
        "of products": """
            INSERT INTO products.parked
            VALUES ('products.in_stock', 'inventory', 1 << 12, 'stock.available', 'product', 1, 5, now(), now())
        """,
        "of users": """
            INSERT INTO users.parked
            VALUES ('users.security_log', 'products', 1 << 12, 'product.price_changed', 'product', 1, 5, now(), now())
        """,
    },
    "E7": {
        "a move was not emitted": """
            DELETE FROM orders.outbox WHERE subject_id = 6 AND version = 2;
            DELETE FROM events.feed WHERE source = 'orders' AND subject_id = 6 AND version = 2;
        """,
        "one of its axes was not emitted": """
            DELETE FROM orders.outbox WHERE subject_id = 1 AND type = 'order.authorized';
            DELETE FROM events.feed WHERE source = 'orders' AND subject_id = 1 AND type = 'order.authorized';
        """,
    },
    "E8": {
        "nothing is left, they say": """
            UPDATE inventory.outbox SET type = 'stock.exhausted' WHERE id = 2 << 12;
            UPDATE events.feed SET type = 'stock.exhausted' WHERE source = 'inventory' AND event_id = 2 << 12;
            UPDATE products.products SET in_stock = false WHERE id = 2;
        """,
    },
    "E9": {
        "a refund": "INSERT INTO users.security_log SELECT * FROM users.security_log WHERE kind = 'refunded'",
        "a change of price": "INSERT INTO users.security_log SELECT * FROM users.security_log WHERE kind LIKE 'price%'",
    },
    "O5": {
        "answered and not there": operation("injected", "place 6", order_id="999"),
        "answered without saying which": operation("injected", "place 6", order_id="NULL"),
    },
    "O7": {
        "with a key": "DELETE FROM history.ops WHERE idempotency_key = 'k2'",
        "without a key": "DELETE FROM history.ops WHERE op_id = 'place 6'",
    },
    "O8": {
        "an older version": operation(
            "injected", "look 1", invoked_at="invoked_at + interval '1 min'", completed_at="NULL", version="5"
        ),
    },
    "K1": {
        "another body": "UPDATE history.ops SET answer = 'another' WHERE op_id = 'again 1'",
        "another status": "UPDATE history.ops SET status = 200 WHERE op_id = 'again 1'",
    },
    "K2": {
        "it was taken": operation(
            "injected", "again 1", fingerprint="'another'", invoked_at="completed_at", answer="'another'", status="409"
        ),
    },
    "X1": {
        "shown to another customer": operation("injected", "look 1", user_id="2", principal="'user:2'"),
        "shown to a guest": operation("injected", "look 1", user_id="0", principal="'guest:1'", role="'guest'"),
    },
}

CLAIMED_ORDER = """
    UPDATE orders.orders SET user_id = 2 WHERE id = 7;
    UPDATE orders.history SET events = events || '{order.claimed}' WHERE order_id = 7;
"""

CASES = [(name, case) for name, cases in VIOLATIONS.items() for case in cases]


async def test_every_invariant_has_a_planted_case():
    assert list(VIOLATIONS) == [invariant.name for invariant in ALL]


@pytest.mark.parametrize("still", [False, True], ids=["running", "standing still"])
async def test_a_consistent_shop_violates_nothing(copies: Copies, still: bool):
    async with copies.undone():
        if still:
            await copies.execute(STAND_STILL)

        assert await violated(copies) == []


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}: {case}" for name, case in CASES])
async def test_what_is_planted_is_found_and_nothing_else(copies: Copies, name: str, case: str):
    async with copies.undone():
        await copies.execute(VIOLATIONS[name][case])

        assert await violated(copies) == [name]


async def test_the_hold_of_a_claimed_order_counts_as_a_guests(copies: Copies):
    async with copies.undone():
        await copies.execute(CLAIMED_ORDER)
        assert not {"S10", "S11"} & {*await violated(copies)}


async def test_a_guests_hold_that_has_ended_may_still_have_a_row(copies: Copies):
    async with copies.undone():
        await copies.execute("INSERT INTO inventory.guest_holds (product_id, order_id, quantity) VALUES (1, 3, 9)")
        assert await violated(copies) == []


FRESH = {
    "M4": "DELETE FROM payments.operations WHERE key = '3:void';" + intent(3, "void", "3:void", "now"),
    "M5": VIOLATIONS["M5"]["an order claims a refund"] + "UPDATE orders.orders SET updated_at = 'now' WHERE id = 1",
    "M8": VIOLATIONS["M8"]["paid"] + "UPDATE orders.orders SET updated_at = 'now' WHERE id = 1",
    "S5": VIOLATIONS["S5"]["more was ordered than sold"] + ";UPDATE orders.orders SET updated_at = 'now' WHERE id = 6",
    "S6": hold(3) + "UPDATE orders.orders SET updated_at = 'now' WHERE id = 3",
    "S9": stock_of_no_product("now"),
    "O4": "UPDATE orders.sagas SET step = 'reserve', updated_at = 'now' WHERE subject_id = 4",
    "E1": VIOLATIONS["E1"]["not read"]
    + ";UPDATE orders.outbox SET at = 'now';UPDATE users.security_log SET at = 'now' WHERE kind = 'refunded'",
    "M6": VIOLATIONS["M6"]["at the bank"] + "UPDATE sandbox.operations SET created_at = 'now' WHERE order_id = 999",
}


async def test_every_invariant_that_waits_is_shown_to_wait():
    assert set(FRESH) == {invariant.name for invariant in ALL if invariant.when == "settled"}


@pytest.mark.parametrize("name", FRESH)
async def test_what_is_under_way_is_no_violation_until_the_shop_stands_still(copies: Copies, name: str):
    async with copies.undone():
        await copies.execute(FRESH[name])
        assert await violated(copies) == []

        await copies.execute(STAND_STILL)
        assert await violated(copies) == [name]


async def test_an_event_that_waits_behind_one_that_is_tried_again_is_no_violation(copies: Copies):
    async with copies.undone():
        await copies.execute(parked("'infinity'", which="source = 'orders' AND subject_id = 1 AND version > 3"))
        assert await violated(copies) == ["E1"]

        await copies.execute(
            parked("now() + interval '2 min'", which="source = 'orders' AND subject_id = 1 AND version = 3")
        )
        assert await violated(copies) == []


async def test_a_dead_event_that_was_replayed_may_come_out_of_order_and_after_its_outbox_row_is_gone(copies: Copies):
    async with copies.undone():
        await copies.execute(
            f"""
            UPDATE events.feed SET position = {LATER} WHERE source = 'orders' AND subject_id = 1 AND version = 4;
            INSERT INTO events.feed
            SELECT {LATER} + 1, source, {LATER} + 1, type, subject, subject_id, 0, at, received_at
              FROM events.feed WHERE source = 'orders' AND subject_id = 6 AND version = 1;
            """
        )
        assert await violated(copies) == ["E3", "E5"]

        await copies.execute(
            parked("now()", dead_at="now()", replayed_at="now()", which=f"position >= {LATER}", stays=True)
        )
        assert await violated(copies) == []


async def test_a_dead_event_that_was_replayed_and_had_no_effect_is_a_violation(copies: Copies):
    async with copies.undone():
        which = "source = 'payments' AND event_id = 2 << 12"
        await copies.execute(parked("now()", dead_at="now()", replayed_at="now()", which=which))

        assert await violated(copies) == ["E2"]


async def test_what_was_cleaned_up_is_no_violation(copies: Copies):
    async with copies.undone():
        await copies.execute(
            """
            UPDATE orders.orders SET created_at = created_at - interval '7 days';
            UPDATE orders.history SET at = at - interval '7 days' WHERE order_id = 1;
            DELETE FROM orders.outbox WHERE subject_id = 1 AND version = 1;
            UPDATE events.feed SET received_at = received_at - interval '7 days' WHERE subject_id = 1;
            """
        )

        assert await violated(copies) == []


async def test_a_refund_under_way_may_have_happened_at_the_bank_already(copies: Copies):
    """The bank has given 100 back for order 2; the order has only reserved it."""
    async with copies.undone():
        await copies.execute(
            """
            UPDATE orders.orders SET refunded_minor = 0, refund_pending_minor = 100 WHERE id = 2;
            UPDATE orders.refunds SET status = 'pending' WHERE order_id = 2;
            """
        )
        await copies.execute(saga(2, "refund", "now()", kind="refund", reference="r1", updated_at="now()"))

        assert await violated(copies) == []


async def test_a_violation_is_counted_whole_and_shown_in_part(copies: Copies):
    async with copies.undone():
        await copies.execute("UPDATE orders.orders SET total_minor = total_minor + 1")

        [finding] = [found for found in await check(copies, ALL) if found.name == "M7"]

        assert finding.violations == 7
        assert len(finding.rows) == 5
        assert set(finding.rows[0]) == {"order_id", "total_minor", "sum_minor", "wrong_lines"}


async def test_no_secret_is_copied():
    copied_columns = {column for tables in WANTED.values() for table in tables for column in table.columns}

    # Of accounts nothing but which id comes next; of the security log no account, no actor and no address.
    assert {table.name: table.columns for table in WANTED["users"] if table.name not in ("cursors", "parked")} == {
        "users_id_seq": ("last_value", "is_called"),
        "security_log": ("e.kind", "e.subject", "e.at"),
    }
    assert not {"data", "answer", "fingerprint", "method", "name", "sku", "reason", "error"} & copied_columns
