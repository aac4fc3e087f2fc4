"""What comes next for an order: the decisions of checkout. Pure: no I/O, no clock.

    reserve    hold the stock; with a payment method, authorize; then confirm, which is the pivot
       ├─ no method ──────► awaiting    the stock is held until it is paid (► reserve) or the time is over (► unwind)
       ├─ out of stock ───► unwind      cancelled: nothing was done, and whoever comes late shall do nothing either
       ├─ declined ───────► unwind      cancelled, if the payment was part of the order; else awaiting
       ▼
    settle     sell the stock, capture the payment
       ├─ by hand ────────► authorized  captured (► settle) or cancelled (► unwind) when staff say so
       ├─ not captured ───► unwind      cancelled: the authorization ran out
       ▼
    done       paid, or cancelled

    unwind     void or refund the payment, give the stock back, then done. From anywhere, when the order is cancelled.

Before the pivot, which confirms the order, a step that cannot be done is undone. After it, the way is only forward; the
one thing that can still go wrong, an authorization that ran out before it was captured, cancels the order.

Each function takes an order, what its saga remembers, and what a service has answered, and decides. The same answer
always gives the same decision, so that a step that runs a second time after a crash comes to the same end.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from mercato.chassis.contract import ServiceError
from mercato.contracts.inventory import OutOfStock, Reservation, ReservationClosed, ShortLine
from mercato.contracts.orders import CancelCode, CancelReason, Order, Payment, Status
from mercato.contracts.payments import Payment as PaymentRecord

CHECKOUT: Final = "checkout"

Step = Literal["reserve", "awaiting", "settle", "authorized", "unwind", "done"]

ATTEMPTS_LIMIT: Final = 10
"""Payments that may be declined before an order is given up: each keeps its stock from others for a while."""

RESTING: Final = ("awaiting",)
"""Where a checkout waits for a person, though a time is set for it. `authorized` and `done` wait without one."""


class Checkout(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a checkout remembers from step to step."""

    paying: bool = False
    """Whether there is a payment to make."""
    method: str | None = None
    """Of that payment, or of the last one."""
    attempt: int = 0
    """The number of that payment, or of the last one; 0: none was made yet."""
    capture: bool = True
    with_order: bool = False
    """The payment was asked for together with the order: without it, there is no order."""
    on_account: bool = False
    """Staff confirmed the order without a payment."""
    confirmed_by: int = 0
    """Which of them, where it is known."""


def encoded(state: Checkout) -> str:
    """As the saga keeps it."""
    return msgspec.json.encode(state).decode()


class Decision(msgspec.Struct, frozen=True):
    """What becomes of a saga (`step`, `state`; see `saga.Next`) and of its order (the axes that move)."""

    step: Step
    outcome: str
    state: Checkout
    running: bool = False
    wake_s: float | None = None
    status: Status | None = None
    payment: Payment | None = None
    reason: CancelReason | None = None
    refunded_minor: int = 0


class TryAgain(msgspec.Struct, frozen=True):
    """The answer does not say what became of the call: the same step, with the same keys, a little later."""

    outcome: str


def after_reserve(
    order: Order, state: Checkout, answer: Reservation | ServiceError, window_s: float
) -> Decision | TryAgain | None:
    """None: the stock is held, and now the payment is to be authorized."""
    match answer:
        case OutOfStock():
            # Not at its end yet: one that was taken for dead may ask again, when there is stock once more. What unwind
            # leaves behind keeps it from holding stock, and money, for an order that is cancelled.
            return _cancelled(order, state, "out_of_stock", lines=answer.lines)
        case ReservationClosed():
            return _cancelled(order, state, "expired" if answer.state == "expired" else "stock_lost")
        case ServiceError():
            return TryAgain(answer.code)
        case Reservation():
            pass
    if state.paying:  # also an order that was confirmed on account, and is paid later
        return None
    if state.on_account:
        return Decision("settle", "confirmed", state, running=True, status="confirmed")
    return Decision("awaiting", "held", state, wake_s=answer.expires_in_s or window_s)


def after_authorize(
    order: Order, state: Checkout, answer: PaymentRecord | ServiceError, window_s: float
) -> Decision | TryAgain:
    if isinstance(answer, ServiceError):
        return TryAgain(answer.code)
    if answer.status == "pending":
        return TryAgain("payments.outcome_pending")
    if answer.status in ("failed", "voided"):
        return _declined(order, state, answer.code or answer.status, window_s)
    confirmed: Status | None = "confirmed" if order.status == "pending" else None
    return Decision("settle", "authorized", state, running=True, status=confirmed, payment="authorized")


def _declined(order: Order, state: Checkout, code: str, window_s: float) -> Decision:
    if order.status == "pending" and (state.with_order or state.attempt >= ATTEMPTS_LIMIT):
        return _cancelled(order, state, "payment_declined", payment="failed", provider_code=code)
    # The stock stays held, so that the buyer can pay in another way.
    left = msgspec.structs.replace(state, paying=False)
    if order.status != "pending":  # it was sold on account, and stays sold
        return Decision("done", f"declined {code}", left)
    return Decision("awaiting", f"declined {code}", left, wake_s=window_s)


def after_commit(order: Order, state: Checkout, answer: Reservation | ServiceError) -> Decision | TryAgain | None:
    """None: the stock is sold, and now the payment is to be captured."""
    match answer:
        case ReservationClosed():
            return _cancelled(order, state, "stock_lost")
        case ServiceError():
            return TryAgain(answer.code)
        case Reservation():
            pass
    if order.payment != "authorized":
        return Decision("done", "committed", state)
    if not state.capture:
        return Decision("authorized", "committed", state)
    return None


def after_capture(order: Order, state: Checkout, answer: PaymentRecord | ServiceError) -> Decision | TryAgain:
    if isinstance(answer, ServiceError):
        return TryAgain(answer.code)
    if answer.status in ("voided", "failed"):
        if state.on_account:
            # It was sold before it was paid, and perhaps sent: it stays sold, and unpaid.
            left = msgspec.structs.replace(state, paying=False)
            return Decision("done", f"declined {answer.code or answer.status}", left, payment="unpaid")
        return _cancelled(order, state, "payment_lost", payment="voided", provider_code=answer.code)
    if answer.captured_minor < order.total_minor:
        return TryAgain("payments.outcome_pending")
    return Decision("done", "captured", state, payment="paid")


def after_waiting(order: Order, state: Checkout) -> Decision:
    """The time is over, and nobody has paid."""
    return _cancelled(order, state, "expired")


def cancelled_by(order: Order, state: Checkout, message: str) -> Decision:
    """Somebody who may has asked for it."""
    reason = CancelReason(code="requested", message=message)
    return Decision("unwind", "cancelled", state, running=True, status="cancelled", reason=reason)


def after_unwind(order: Order, state: Checkout, payment: PaymentRecord | None) -> Decision:
    """Everything is undone; `payment` is the one that was made, as it is now."""
    if payment and payment.captured_minor > payment.refunded_minor:
        # The provider does not give it back, and has said so for good: that is for people to settle.
        captured: Payment | None = "paid" if order.payment == "authorized" else None
        return Decision("done", "refund declined", state, payment=captured)
    became: Payment | None = None
    refunded_minor = 0
    if order.payment in ("authorized", "paid", "partially_refunded"):
        refunded_minor = payment.refunded_minor - order.refunded_minor if payment else 0
        became = "refunded" if payment and payment.captured_minor else "voided"
    if order.payment in ("paid", "partially_refunded") and order.total_minor == 0:
        became = "refunded"
    return Decision("done", "undone", state, payment=became, refunded_minor=refunded_minor)


def resumed(kind: str, step: str, status: Status, payment: Payment) -> str | None:
    """Where a saga has to go on that nobody will wake, by where it and its order are. None: it rests rightly.

    A step that was left in the middle is done again. An order that is not at rest goes on at the step that its state
    calls for: each begins by hearing what was done already.
    """
    if kind != CHECKOUT or step in ("reserve", "settle", "unwind"):
        return step if step != "done" else None
    if status == "pending":
        return "reserve"
    if payment == "authorized" and status == "cancelled":
        return "unwind"
    if payment == "authorized" and step != "authorized":
        return "settle"
    return None


def _cancelled(
    order: Order,
    state: Checkout,
    code: CancelCode,
    *,
    payment: Payment | None = None,
    provider_code: str | None = None,
    lines: tuple[ShortLine, ...] = (),
) -> Decision:
    reason = CancelReason(code=code, provider_code=provider_code, lines=lines)
    outcome = f"cancelled {code}"
    return Decision("unwind", outcome, state, running=True, status="cancelled", payment=payment, reason=reason)
