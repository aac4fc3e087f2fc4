"""Checkouts by hand: one path through the model (`checkout.py`) each; and its random walks."""

from __future__ import annotations

import datetime

import msgspec
import pytest
from hypothesis import HealthCheck, settings

from mercato.services.orders import rules, steps
from mercato.services.orders.steps import ATTEMPTS_LIMIT, Checkout, Decision
from models.checkout import (
    ANOTHER_NONCE,
    EPOCH,
    FINISHED,
    LOSSES,
    METHODS,
    PRICE_MINOR,
    RESTING,
    WINDOW_S,
    CheckoutMachine,
    Driver,
    Loss,
    held,
)

TestCheckout = CheckoutMachine.TestCase
TestCheckout.settings = settings(
    max_examples=200,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# ---------------------------------------------------------------------------------------------------- single scenarios


def placed(method: str | None, *, quantity: int = 1, price_minor: int = PRICE_MINOR) -> CheckoutMachine:
    """An order of one of five pieces, whose driver has made no call yet."""
    machine = CheckoutMachine()
    machine.place(on_hand=5, method=method, quantity=quantity, price_minor=price_minor)
    return machine


def on_account(quantity: int = 1) -> CheckoutMachine:
    """An order that staff have confirmed without a payment."""
    machine = placed(None, quantity=quantity)
    machine.go_on(calls=2)
    assert_at(machine, "awaiting", "pending", "unpaid")
    machine.confirm_on_account()
    machine.go_on(calls=3)
    assert_at(machine, FINISHED, "confirmed", "unpaid")
    return machine


def assert_at(machine: CheckoutMachine, step: str, status: str, payment: str) -> None:
    assert (machine.step, machine.order.status, machine.order.payment) == (step, status, payment)
    assert_invariants(machine)


def assert_invariants(machine: CheckoutMachine) -> None:
    machine.no_card_is_charged_twice()
    machine.stock_is_neither_lost_nor_invented()
    machine.order_and_bank_agree_about_money()
    machine.a_pending_order_has_a_saga()
    machine.a_parked_saga_is_parked_rightly()
    machine.an_order_at_rest_is_consistent()


def run_to_end(driver: Driver) -> None:
    while driver.go_on():
        pass


def test_a_paid_order_takes_three_calls_and_one_save():
    machine = placed("sandbox:ok")
    machine.go_on(calls=3)
    assert_at(machine, "reserve", "pending", "unpaid")
    assert machine.inventory.state == "committed"
    assert machine.bank.net_minor == PRICE_MINOR

    machine.go_on(calls=1)

    assert_at(machine, FINISHED, "confirmed", "paid")
    assert machine.drivers == []


def test_an_order_confirmed_on_account_can_be_paid_later():
    machine = on_account()

    machine.pay("sandbox:ok", then=7)

    assert_at(machine, FINISHED, "confirmed", "paid")


def test_what_came_back_from_an_order_on_account_is_not_taken():
    machine = on_account(quantity=3)
    machine.ship()
    machine.take_back_one()
    machine.pay("sandbox:ok", then=7)
    assert_at(machine, FINISHED, "confirmed", "paid")
    assert machine.bank.net_minor == 2 * PRICE_MINOR

    machine.take_back_one()
    assert_at(machine, FINISHED, "confirmed", "partially_refunded")
    machine.take_back_one()
    assert_at(machine, FINISHED, "confirmed", "refunded")
    assert machine.order.fulfilment == "returned"
    assert machine.bank.net_minor == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_charge_without_an_answer_is_repeated_with_the_same_key(loss: Loss):
    machine = placed("sandbox:ok")
    machine.lose(loss)
    machine.go_on(calls=1)  # saves that the outcome is not known
    assert machine.drivers == []
    assert_at(machine, "reserve", "pending", "unpaid")

    machine.take_over()
    machine.go_on(calls=4)

    assert_at(machine, FINISHED, "confirmed", "paid")
    machine.payments.deliver_late()
    assert (machine.bank.captures, machine.bank.requests, len(machine.bank.charges)) == (1, 2, 1)


def authorized(method: str = "sandbox:ok") -> CheckoutMachine:
    """An order whose payment staff will capture by hand."""
    machine = placed(None)
    machine.go_on(calls=2)
    machine.pay(method, capture=False, then=5)
    assert_at(machine, "authorized", "confirmed", "authorized")
    return machine


@pytest.mark.parametrize("loss", LOSSES)
def test_an_authorize_without_an_answer_is_repeated_with_the_same_key(loss: Loss):
    machine = placed(None)
    machine.go_on(calls=2)
    machine.pay("sandbox:ok", capture=False)
    machine.lose(loss)
    machine.go_on(calls=1)
    assert_at(machine, "reserve", "pending", "unpaid")

    machine.take_over()
    machine.go_on(calls=5)

    assert_at(machine, "authorized", "confirmed", "authorized")
    machine.payments.deliver_late()
    assert machine.bank.open_charges == 1


@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_a_part_is_captured_once_and_refunded_no_further(loss: Loss | None):
    machine = authorized()
    machine.capture(0.5)
    if loss is not None:
        machine.lose(loss)
        machine.go_on(calls=1)
        machine.take_over()
    machine.go_on(calls=3)
    assert_at(machine, FINISHED, "confirmed", "paid")
    assert machine.bank.net_minor == rules.paid_minor(machine.order) == PRICE_MINOR // 2

    machine.refund(is_rest=True)
    assert_at(machine, FINISHED, "confirmed", "refunded")
    assert machine.bank.net_minor == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_cancel_while_a_part_is_captured_gives_it_back(loss: Loss):
    machine = authorized()
    machine.capture(0.5)
    machine.lose(loss)
    machine.cancel()
    machine.go_on(calls=7)
    assert_at(machine, FINISHED, "cancelled", "refunded")
    assert machine.order.refunded_minor == rules.paid_minor(machine.order) == PRICE_MINOR // 2


@pytest.mark.parametrize("loss", LOSSES)
def test_a_capture_without_an_answer_is_repeated_with_the_same_key(loss: Loss):
    machine = authorized()
    machine.capture()
    machine.lose(loss)
    machine.go_on(calls=1)
    assert_at(machine, "settle", "confirmed", "authorized")

    machine.take_over()
    machine.go_on(calls=3)

    assert_at(machine, FINISHED, "confirmed", "paid")
    machine.payments.deliver_late()
    assert machine.bank.captures == 1


def test_an_authorization_that_expires_before_its_capture_cancels_the_order():
    machine = authorized("sandbox:capture_expired")
    machine.capture()
    machine.go_on(calls=7)

    assert_at(machine, FINISHED, "cancelled", "voided")
    assert machine.order.reason is not None
    assert (machine.order.reason.code, machine.order.reason.provider_code) == ("payment_lost", "authorization_expired")


def test_an_authorization_that_expires_leaves_an_order_on_account_sold_and_payable():
    machine = on_account()
    machine.pay("sandbox:capture_expired", capture=False, then=7)
    assert_at(machine, "authorized", "confirmed", "authorized")
    machine.capture()
    machine.go_on(calls=3)
    assert_at(machine, FINISHED, "confirmed", "unpaid")

    machine.pay("sandbox:ok", then=7)

    assert_at(machine, FINISHED, "confirmed", "paid")


@pytest.mark.parametrize("calls", range(1, 4))
@pytest.mark.parametrize("paid", ["when placed", "later"])
def test_a_hold_does_not_expire_while_a_payment_is_under_way(calls: int, paid: str):
    machine = placed("sandbox:ok" if paid == "when placed" else None)
    if paid == "later":
        machine.go_on(calls=2)
        machine.pay("sandbox:ok")
    machine.hold_runs_out(meanwhile=calls, is_ended=True)
    machine.go_on(calls=7)

    assert_at(machine, FINISHED, "confirmed", "paid")


def test_a_hold_that_has_expired_cancels_the_order_that_is_paid_too_late():
    machine = placed(None)
    machine.hold_runs_out(meanwhile=2, is_ended=True)
    machine.pay("sandbox:ok", then=7)

    assert_at(machine, FINISHED, "cancelled", "unpaid")
    assert machine.order.reason is not None
    assert machine.order.reason.code == "expired"


@pytest.mark.parametrize("way", ["when placed", "later"])
def test_a_declined_order_stays_pending_with_its_stock_held_and_can_be_paid(way: str):
    machine = placed("sandbox:declined" if way == "when placed" else None)
    if way == "later":
        machine.go_on(calls=2)
        machine.pay("sandbox:declined")
    machine.go_on(calls=3)
    assert_at(machine, "awaiting", "pending", "unpaid")
    assert machine.inventory.state == "held"

    machine.pay("sandbox:ok", then=7)

    assert_at(machine, FINISHED, "confirmed", "paid")


def test_a_declined_order_can_be_confirmed_on_account():
    machine = placed("sandbox:declined")
    machine.go_on(calls=3)
    machine.confirm_on_account()
    machine.go_on(calls=7)

    assert_at(machine, FINISHED, "confirmed", "unpaid")


def test_a_declined_payment_does_not_prolong_the_hold():
    machine = placed("sandbox:declined")
    machine.go_on(calls=2)
    [driver] = machine.drivers

    assert isinstance(driver.outcome, Decision)
    assert driver.outcome.wake_at == EPOCH + datetime.timedelta(seconds=WINDOW_S)


def test_a_declined_order_is_cancelled_when_its_hold_ends():
    machine = placed("sandbox:declined")
    machine.go_on(calls=3)
    machine.wake()
    machine.go_on(calls=7)

    assert_at(machine, FINISHED, "cancelled", "unpaid")
    assert machine.order.reason is not None
    assert machine.order.reason.code == "expired"


def test_the_tenth_declined_payment_cancels_the_order():
    machine = placed("sandbox:declined")
    machine.go_on(calls=3)
    machine.pay_with_declined_cards(times=ATTEMPTS_LIMIT - 2)
    assert_at(machine, "awaiting", "pending", "unpaid")

    machine.pay_with_declined_cards(times=1)

    assert_at(machine, FINISHED, "cancelled", "failed")
    assert machine.order.reason is not None
    assert (machine.order.reason.code, machine.order.reason.provider_code) == ("payment_declined", "card_declined")


@pytest.mark.parametrize("status", ["confirmed", "completed"])
def test_a_declined_payment_of_an_order_on_account_leaves_it_sold_and_unpaid(status: str):
    machine = on_account()
    if status == "completed":
        machine.complete()

    machine.pay("sandbox:declined", then=7)

    assert_at(machine, FINISHED, status, "unpaid")


def test_ten_declined_payments_of_an_order_on_account_leave_it_sold_and_payable():
    machine = on_account()

    machine.pay_with_declined_cards(times=ATTEMPTS_LIMIT)
    assert machine.payment_attempt == ATTEMPTS_LIMIT
    assert_at(machine, FINISHED, "confirmed", "unpaid")

    machine.pay("sandbox:ok", then=7)
    assert_at(machine, FINISHED, "confirmed", "paid")


@pytest.mark.parametrize("method", [None, *METHODS])
def test_an_order_that_costs_nothing_is_paid_without_the_provider(method: str | None):
    machine = placed(method, price_minor=0)
    machine.go_on(calls=4)

    assert_at(machine, FINISHED, "confirmed", "paid")
    assert machine.bank.requests == 0

    machine.cancel()
    machine.go_on(calls=7)

    assert_at(machine, FINISHED, "cancelled", "refunded")
    assert machine.bank.requests == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calls", range(8))
def test_a_cancel_between_any_two_calls_leaves_no_money_and_no_stock(calls: int, method: str):
    machine = placed(method)
    fenced = machine.drivers[0]
    machine.cancel(meanwhile=calls)
    while machine.drivers and machine.step not in RESTING:
        machine.go_on(calls=1, times=1 if isinstance(machine.drivers[-1].outcome, Decision) else 2)
    assert_at(machine, FINISHED, "cancelled", machine.order.payment)

    if fenced in machine.drivers:
        run_to_end(fenced)

    machine.assert_consistent()


def test_a_cancel_after_the_charge_and_before_the_save_refunds_what_was_taken():
    machine = placed("sandbox:ok")
    machine.cancel(meanwhile=2)
    assert_at(machine, "unwind", "cancelled", "unpaid")
    assert machine.bank.net_minor == PRICE_MINOR
    machine.go_on(calls=7)

    assert_at(machine, FINISHED, "cancelled", "unpaid")
    assert (machine.bank.captures, machine.bank.net_minor) == (1, 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_cancel_while_the_charge_has_no_answer_settles_it_and_refunds(loss: Loss):
    machine = placed("sandbox:ok")
    machine.lose(loss)
    machine.cancel()
    machine.go_on(calls=7)
    assert_at(machine, FINISHED, "cancelled", "unpaid")

    machine.payments.deliver_late()

    assert (machine.bank.captures, machine.bank.net_minor) == (1, 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_cancel_while_the_capture_has_no_answer_settles_it_and_refunds(loss: Loss):
    machine = authorized()
    machine.capture()
    machine.lose(loss)
    machine.cancel()
    machine.go_on(calls=7)
    assert_at(machine, FINISHED, "cancelled", "refunded")

    machine.payments.deliver_late()

    assert_at(machine, FINISHED, "cancelled", "refunded")
    assert machine.bank.captures == 1


@pytest.mark.parametrize("calls", range(2))
def test_tombstones_stop_a_fenced_driver_that_calls_after_the_unwind(calls: int):
    machine = placed("sandbox:ok")
    fenced = machine.drivers[0]
    machine.cancel(meanwhile=calls)
    machine.drivers.remove(fenced)
    machine.go_on(calls=7)
    assert_at(machine, FINISHED, "cancelled", "unpaid")
    assert machine.payments.payments[1].status == "voided"
    assert machine.inventory.state == "released"

    run_to_end(fenced)

    assert_at(machine, FINISHED, "cancelled", "unpaid")
    assert machine.bank.requests == 0


def test_a_fenced_driver_of_an_order_out_of_stock_holds_and_charges_nothing_later():
    machine = CheckoutMachine()
    machine.place(on_hand=2, method="sandbox:ok", quantity=3)
    fenced = machine.drivers[0]
    machine.take_over()
    while machine.step not in RESTING:
        machine.go_on(calls=1)
    assert machine.order.reason is not None
    assert machine.order.reason.code == "out_of_stock"
    machine.goods_arrive(pieces=3)

    run_to_end(fenced)

    assert_at(machine, FINISHED, "cancelled", "unpaid")
    assert machine.bank.requests == 0


@pytest.mark.parametrize("request_", ["pay", "cancel"])
def test_a_driver_of_a_finished_saga_cannot_save_in_the_saga_that_a_later_request_made(request_: str):
    machine = on_account()
    if request_ == "pay":
        machine.pay("sandbox:ok", then=0)
    else:
        machine.cancel()
    assert machine.saga is not None
    fenced = Driver(machine)
    fenced.epoch -= 1  # as the driver of the finished saga had it
    assert fenced.version == machine.saga.version

    before = machine.order
    run_to_end(fenced)

    assert machine.order == before
    assert machine.saga is not None


def test_a_paid_order_that_is_cancelled_is_refunded_and_its_goods_return():
    machine = placed("sandbox:ok", quantity=2)
    machine.go_on(calls=4)
    machine.refund()
    assert_at(machine, FINISHED, "confirmed", "partially_refunded")
    machine.cancel()
    machine.go_on(calls=7)

    assert_at(machine, FINISHED, "cancelled", "refunded")
    assert machine.order.refunded_minor == machine.order.total_minor


def test_a_refund_that_the_provider_declines_leaves_the_cancelled_order_paid_and_its_stock_free():
    machine = placed("sandbox:ok")
    machine.go_on(calls=2)
    machine.bank.declines_refunds = True
    machine.cancel()
    machine.go_on(calls=7)

    assert (machine.step, machine.order.status, machine.order.payment) == (FINISHED, "cancelled", "paid")
    assert machine.bank.net_minor == PRICE_MINOR
    assert (machine.inventory.level.on_hand, machine.inventory.level.reserved) == (5, 0)


def test_the_hold_of_another_order_with_the_same_id_is_left_alone():
    machine = placed("sandbox:ok")
    machine.inventory.reservation = held(1, ANOTHER_NONCE, None)
    machine.inventory.level = msgspec.structs.replace(machine.inventory.level, reserved=1, available=4)
    before = (machine.inventory.reservation, machine.inventory.level)
    machine.go_on(calls=7)

    assert (machine.step, machine.order.status, machine.order.payment) == (FINISHED, "cancelled", "unpaid")
    assert (machine.inventory.reservation, machine.inventory.level) == before
    assert machine.bank.requests == 0


def test_the_payment_of_another_order_with_the_same_id_is_left_alone():
    machine = placed("sandbox:ok")
    machine.payments.nonce = ANOTHER_NONCE
    machine.go_on(calls=7)

    assert_at(machine, FINISHED, "cancelled", "unpaid")
    assert machine.order.reason is not None
    assert machine.order.reason.code == "payment_lost"
    assert machine.bank.requests == 0


@pytest.mark.parametrize("state", [Checkout(), Checkout(True, "sandbox:ok", 3, False, True, 9)])
def test_the_state_of_a_checkout_is_decoded_as_it_was_encoded(state: Checkout):
    assert msgspec.json.decode(steps.encoded(state), type=Checkout) == state
