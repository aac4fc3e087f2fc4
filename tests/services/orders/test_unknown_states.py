"""A state that a newer service has is no reason to sell, to charge or to let go: the step is tried again later."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec
import pytest

from mercato.chassis.contract import ServiceError
from mercato.contracts.inventory import Reservation
from mercato.contracts.orders import Order
from mercato.contracts.payments import OutcomePending, Payment
from mercato.services.orders import steps
from mercato.services.orders.steps import UNKNOWN_STATE, Checkout, Decision, RetryLater

NEWER = "newer_than_you"
AT = datetime.datetime(2026, 1, 15, 9, 30, tzinfo=datetime.UTC)
WINDOW_S = 900.0
TOTAL_MINOR = 100


def order() -> Order:
    return Order(
        id=1,
        user_id=1,
        status="pending",
        payment="unpaid",
        fulfilment="unfulfilled",
        currency="USD",
        total_minor=TOTAL_MINOR,
        lines=(),
        created_at=AT,
        updated_at=AT,
        version=1,
    )


def reservation(state: str) -> Reservation:
    """As it was decoded: a reader takes any state."""
    return msgspec.convert({"order_id": 1, "state": state, "lines": [], "expires_in_s": None}, Reservation)


def payment(status: str) -> Payment:
    """With all the money that is due: only its status is not known."""
    money = dict.fromkeys(("amount_minor", "authorized_minor", "captured_minor"), TOTAL_MINOR)
    ids = dict.fromkeys(("id", "order_id", "attempt", "user_id", "version"), 1)
    rest: dict[str, Any] = {"refunded_minor": 0, "code": None, "created_at": AT, "updated_at": AT}
    text = {"method": "sandbox:ok", "currency": "USD", "status": status}
    return msgspec.convert({**money, **ids, **rest, **text}, Payment)


PAYING = Checkout(paying=True, method="sandbox:ok", attempt=1)


@pytest.mark.parametrize("state", [Checkout(), PAYING], ids=["not paying", "paying"])
@pytest.mark.parametrize(("known", "unknown"), [("held", NEWER)])
def test_a_reservation_of_an_unknown_state_is_not_charged(state: Checkout, known: str, unknown: str):
    assert steps.after_reserve(order(), state, reservation(unknown), WINDOW_S) == RetryLater(UNKNOWN_STATE)
    assert not isinstance(steps.after_reserve(order(), state, reservation(known), WINDOW_S), RetryLater)


def test_a_payment_of_an_unknown_status_is_not_taken_for_a_charge():
    assert steps.after_charge(order(), PAYING, payment(NEWER), WINDOW_S) == RetryLater(UNKNOWN_STATE)
    assert steps.after_charge(order(), PAYING, payment("captured"), WINDOW_S) is None


def test_a_payment_that_is_processed_is_asked_for_again_when_its_provider_says():
    pending = OutcomePending(operation="charge", order_id=1, settles_at=AT)
    later = RetryLater("payments.outcome_pending", AT)
    assert steps.after_charge(order(), PAYING, pending, WINDOW_S) == later
    assert steps.after_authorize(order(), PAYING, pending, WINDOW_S) == later
    assert steps.after_capture(order(), PAYING, pending) == later


def test_a_payment_of_an_unknown_status_is_not_taken_for_an_authorization():
    assert steps.after_authorize(order(), PAYING, payment(NEWER), WINDOW_S) == RetryLater(UNKNOWN_STATE)
    assert isinstance(steps.after_authorize(order(), PAYING, payment("authorized"), WINDOW_S), Decision)


def test_stock_of_an_unknown_state_is_not_taken_for_sold():
    assert steps.after_commit(order(), PAYING, reservation(NEWER)) == RetryLater(UNKNOWN_STATE)
    assert isinstance(steps.after_commit(order(), PAYING, reservation("committed")), Decision)


def test_stock_of_an_unknown_state_is_not_taken_for_released():
    assert steps.after_release(reservation(NEWER)) == RetryLater(UNKNOWN_STATE)
    assert [steps.after_release(reservation(state)) for state in ("released", "expired", "committed")] == [None] * 3


def test_an_error_keeps_its_own_reason():
    assert steps.after_commit(order(), PAYING, ServiceError()) == RetryLater("internal")
