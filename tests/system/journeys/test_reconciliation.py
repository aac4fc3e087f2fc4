"""One case of each kind that a reconciliation puts right, injected in the databases of a running shop.

The shop itself causes none of them, as far as is known; each is repaired while it runs, and counted. What it cannot
repair by itself is reported (`tests/operations/audit`, `tests/services/payments/test_reconciling.py`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import pytest

from mercato.testing.caller import Caller
from mercato.testing.process import used_folder
from system.crash import scenarios
from system.crash.crashing import CONVERGED_SECONDS, POLL_SECONDS, Shop

SETTINGS: Final = {
    # What is left alone for so long counts as left: longer than the bank takes for what is slow here.
    "MERCATO_ORDERS_QUIET_SECONDS": "3",
    # The statement gives the result of an operation, not the sweep.
    "MERCATO_PAYMENTS_SWEEP_SECONDS": "3600",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    with used_folder() as data, Shop(data, SETTINGS) as made:
        assert made.start()
        yield made


def an_outcome_without_a_waiting_request(shop: Shop, caller: Caller) -> Callable[[], None]:
    # Slow enough that the bank has not finished when the order is left alone, also where this machine stands still for
    # some seconds.
    order_id = scenarios.place(caller, "unknown", "sandbox:slow:15000")
    asked = "SELECT 1 FROM intents i JOIN payments p ON p.id = i.payment_id WHERE p.order_id = $1 AND i.calls > 0"
    shop.until("payments", asked, order_id)
    left = """
        UPDATE sagas SET wake_at = 'infinity', epoch = nextval('saga_epochs')
         WHERE subject_id = $1 AND tries > 0 AND wake_at IS NOT NULL
        RETURNING 1
    """
    # Neither a sweep nor the scan for parked sagas finds it: the outcome is read from the statement, or not at all.
    shop.until("orders", left, order_id)

    def healed() -> None:
        shop.execute("orders", "UPDATE sagas SET wake_at = now() WHERE subject_id = $1", order_id)
        scenarios.await_order(caller, order_id, status="confirmed", payment="paid")

    return healed


def an_unwanted_authorization(shop: Shop, caller: Caller) -> Callable[[], None]:
    begun = scenarios.unwanted_authorization(shop, "unwanted")
    scenarios.read_statement_again(caller, begun)

    def healed() -> None:
        shop.until("sandbox", "SELECT 1 FROM charges WHERE order_id = $1 AND state = 'voided'", begun.order_id)
        scenarios.settled(caller, begun)

    return healed


def a_forgotten_order(shop: Shop, caller: Caller) -> Callable[[], None]:
    order_id = scenarios.forgotten_order(shop, "forgotten")

    def healed() -> None:
        scenarios.carried_on(caller, order_id)

    return healed


def a_hold_of_a_cancelled_order(shop: Shop, caller: Caller) -> Callable[[], None]:
    order_id = scenarios.place(caller, "held")
    scenarios.cancel(caller, order_id)
    shop.until("inventory", "SELECT 1 FROM reservations WHERE order_id = $1 AND state = 'released'", order_id)
    held = """
        WITH held AS (
            UPDATE reservations SET state = 'held', ended_at = NULL WHERE order_id = $1
            RETURNING product_ids, quantities
        )
        UPDATE levels l SET reserved = reserved + n.quantity
          FROM held, unnest(product_ids, quantities) AS n (product_id, quantity) WHERE n.product_id = l.product_id
    """
    shop.execute("inventory", held, order_id)

    def healed() -> None:
        shop.until("inventory", "SELECT 1 FROM reservations WHERE order_id = $1 AND state = 'released'", order_id)

    return healed


INJECTED: Final[Mapping[str, Callable[[Shop, Caller], Callable[[], None]]]] = {
    "outcome_recorded": an_outcome_without_a_waiting_request,
    "authorization_voided": an_unwanted_authorization,
    "order_resumed": a_forgotten_order,
    "hold_released": a_hold_of_a_cancelled_order,
}


@pytest.mark.parametrize("kind", INJECTED)
def test_an_injected_difference_is_repaired_and_counted(shop: Shop, kind: str):
    with shop.caller() as caller:
        before = repaired(caller, kind)

        healed = INJECTED[kind](shop, caller)

        end = time.monotonic() + CONVERGED_SECONDS
        while repaired(caller, kind) == before:
            assert time.monotonic() < end, f"nothing of the kind {kind} was repaired"
            time.sleep(POLL_SECONDS)
        healed()
    assert shop.comes_to_rest()
    assert shop.fetch("payments", "SELECT key FROM mismatches WHERE resolved_at IS NULL") == []
    shop.assert_correct()


def repaired(caller: Caller, kind: str) -> float:
    found = re.findall(
        rf'^mercato_reconciliation_repaired_total{{kind="{kind}"}} (\S+)', caller.get("/metrics").text, re.M
    )
    return float(found[0]) if found else 0.0
