"""The decisions of checkout: which step is next for an order. Pure: no I/O, no clock.

    reserve    hold the stock; charge the payment, if there is one; sell the stock; then the order is confirmed and paid
       ├─ no method ──────► awaiting    the stock is held until the order is paid (► reserve) or expires (► unwind)
       ├─ declined ───────► awaiting    the order can be paid in another way; after ten declines ► unwind
       ├─ out of stock ───► unwind      cancelled
       ├─ capture later ──► settle      authorized instead of charged: confirmed before the money is taken
       ▼
    finished   paid, or sold on account

    settle     sell the stock, capture the payment
       ├─ manual capture ─► authorized  captured (► settle) or cancelled (► unwind) by staff
       └─ not captured ───► unwind      cancelled: the authorization has expired

    unwind     void or refund the payment, release or restock the goods. From any step, when the order is cancelled.

The pivot is the charge (with manual capture: confirming the order). Before it, a step that fails is compensated. After
it the order goes forward only; a request to cancel that arrives in between undoes all of it, the charge included.

Each function takes an order, the state of its saga and the answer of a service, and decides. The same answer gives the
same decision, so that a step that runs again after a crash has the same result.
"""

from __future__ import annotations

import datetime
from typing import Final, Literal

import msgspec

from mercato.chassis.contract import ServiceError
from mercato.contracts.inventory import (
    AnotherOrder as StockOfAnotherOrder,
    HoldLimitReached,
    OutOfStock,
    Reservation,
    ReservationClosed,
    ShortLine,
)
from mercato.contracts.orders import CancelCode, CancelReason, Order, Payment, Status
from mercato.contracts.payments import (
    AnotherOrder as PaymentOfAnotherOrder,
    OutcomePending,
    Payment as PaymentRecord,
)

from . import rules

CHECKOUT: Final = "checkout"

Step = Literal["reserve", "awaiting", "settle", "authorized", "unwind"]

ATTEMPTS_LIMIT: Final = 10
"""Payments that may be declined before an order is cancelled: each holds its stock for a while."""

NAMED_PRODUCTS: Final = 5
"""Products that the message of a cancelled order names at most; the lines of its reason have all of them."""

UNKNOWN_STATE: Final = "unknown_state"
"""The code of a retry after an answer with a state that this version does not know: a newer service sent it."""

WAITING: Final = ("awaiting",)
"""The steps at which a checkout waits for its buyer until a set time. At `authorized` it waits without a time."""


class Checkout(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of a checkout while its saga exists."""

    paying: bool = False
    """Whether there is a payment to make."""
    method: str | None = None
    """The method of the payment that this checkout has begun; None: it has begun none."""
    attempt: int = 0
    """The number of that payment, or of the last one of the order; 0: there was none."""
    capture: bool = True
    on_account: bool = False
    """Staff confirm the order without a payment."""
    confirmed_by: int = 0
    """The account of that member of staff; 0: not known."""
    capture_minor: int | None = None
    """The part of the authorized amount that staff capture; None: all of it."""
    by_staff: bool = False
    """The bounds of orders that staff place apply to what this order holds."""


def encoded(state: Checkout) -> str:
    """The state as the saga stores it."""
    return msgspec.json.encode(state).decode()


decoded: Final = msgspec.json.Decoder(Checkout).decode
"""The state of a saga."""


class Decision(msgspec.Struct, frozen=True):
    """The next step of a saga (`step` to `finished`; see `sagas/store.py`), and the move of its order (the rest)."""

    step: Step
    note: str
    """The note of the move, for the history."""
    state: Checkout
    running: bool = False
    wake_s: float | None = None
    wake_at: datetime.datetime | None = None
    finished: bool = False
    status: Status | None = None
    payment: Payment | None = None
    reason: CancelReason | None = None
    refunded_minor: int = 0
    waived_minor: int | None = None
    """The part of the total that was not taken; None: as before."""
    internal_note: str = ""


class RetryLater(msgspec.Struct, frozen=True):
    """The result of the call is not known: run the same step again, with the same keys, after a pause."""

    code: str
    not_before: datetime.datetime | None = None
    """When the result will be known, as the answer says; None: it does not say so."""


def after_reserve(
    order: Order, state: Checkout, answer: Reservation | ServiceError, window_s: float
) -> Decision | RetryLater | None:
    """None: the stock is held; continue with the payment, if there is one, and the commit."""
    match answer:
        case OutOfStock():
            # Continue with unwind: a fenced driver may still reserve, once there is stock again. The tombstones that
            # unwind leaves keep it from holding stock, and money, for an order that is cancelled.
            return _cancelled(state, "out_of_stock", lines=answer.lines)
        case HoldLimitReached():
            return _cancelled(state, "hold_limit", lines=answer.lines, message=_hold_limit(answer))
        case ReservationClosed():
            return _cancelled(state, "expired" if answer.state == "expired" else "stock_lost")
        case StockOfAnotherOrder():
            return _cancelled(state, "stock_lost")
        case ServiceError():
            return RetryLater(answer.code)
        case Reservation(state="held" | "committed"):
            pass
        case _:
            return RetryLater(UNKNOWN_STATE)
    if is_final(order, state):
        return None
    if answer.expires_in_s is None:
        return Decision("awaiting", "held", state, wake_at=_end_of_hold(order, window_s))
    return Decision("awaiting", "held", state, wake_s=answer.expires_in_s)


def is_final(order: Order, state: Checkout) -> bool:
    """Whether the stock of an order is held to be sold: it is being paid, confirmed on account, or costs nothing."""
    return state.paying or state.on_account or order.total_minor == 0


def after_charge(
    order: Order, state: Checkout, answer: PaymentRecord | ServiceError, window_s: float
) -> Decision | RetryLater | None:
    """None: the money is taken; continue with the commit of the stock."""
    refused = _refused(order, state, answer, window_s)
    if refused is not None or isinstance(answer, ServiceError):
        return refused
    return None if answer.captured_minor >= rules.payable_minor(order) else RetryLater("payments.outcome_pending")


def after_authorize(
    order: Order, state: Checkout, answer: PaymentRecord | ServiceError, window_s: float
) -> Decision | RetryLater:
    refused = _refused(order, state, answer, window_s)
    if refused is not None:
        return refused
    confirmed: Status | None = "confirmed" if order.status == "pending" else None
    return Decision("settle", "authorized", state, running=True, status=confirmed, payment="authorized")


def _refused(
    order: Order, state: Checkout, answer: PaymentRecord | ServiceError, window_s: float
) -> Decision | RetryLater | None:
    """None: the payment was made."""
    match answer:
        case PaymentOfAnotherOrder():
            return _cancelled(state, "payment_lost")
        case OutcomePending():
            return RetryLater(answer.code, answer.settles_at)
        case ServiceError():
            return RetryLater(answer.code)
        case PaymentRecord(status="pending"):
            return RetryLater("payments.outcome_pending")
        case PaymentRecord(status="failed" | "voided"):
            return _declined(order, state, answer.code or answer.status, window_s)
        case PaymentRecord(status="authorized" | "captured" | "partially_refunded" | "refunded"):
            return None
        case _:
            return RetryLater(UNKNOWN_STATE)


def _declined(order: Order, state: Checkout, code: str, window_s: float) -> Decision:
    """The order stays payable until its hold ends, at most `ATTEMPTS_LIMIT` times."""
    left = msgspec.structs.replace(state, paying=False)
    if order.status != "pending":  # sold on account: it stays sold
        return Decision("reserve", f"declined {code}", left, finished=True)
    if state.attempt >= ATTEMPTS_LIMIT:
        return _cancelled(state, "payment_declined", payment="failed", provider_code=code)
    return Decision("awaiting", f"declined {code}", left, wake_at=_end_of_hold(order, window_s))


def _end_of_hold(order: Order, window_s: float) -> datetime.datetime:
    """A declined payment does not prolong the hold; a payment under way at this time does, until its answer."""
    return order.created_at + datetime.timedelta(seconds=window_s)


def after_commit(order: Order, state: Checkout, answer: Reservation | ServiceError) -> Decision | RetryLater | None:
    """None: the stock is sold; continue with the capture."""
    match answer:
        case ReservationClosed() | StockOfAnotherOrder():
            return _cancelled(state, "stock_lost")
        case ServiceError():
            return RetryLater(answer.code)
        case Reservation(state="committed"):
            pass
        case _:
            return RetryLater(UNKNOWN_STATE)
    if order.payment == "authorized":
        return None if state.capture else Decision("authorized", "committed", state)
    confirmed: Status | None = "confirmed" if order.status == "pending" else None
    if state.paying or order.total_minor == 0:
        note = "charged" if state.paying else "nothing to pay"
        return Decision("reserve", note, state, finished=True, status=confirmed, payment="paid")
    return Decision("reserve", "confirmed", state, finished=True, status=confirmed)


def after_capture(order: Order, state: Checkout, answer: PaymentRecord | ServiceError) -> Decision | RetryLater:
    if isinstance(answer, ServiceError):
        return RetryLater(answer.code, answer.settles_at if isinstance(answer, OutcomePending) else None)
    if answer.status in ("voided", "failed"):
        if state.on_account:
            # It was sold before it was paid, and perhaps shipped: it stays sold, and unpaid.
            left = msgspec.structs.replace(state, paying=False)
            note = f"declined {answer.code or answer.status}"
            return Decision("settle", note, left, finished=True, payment="unpaid")
        return _cancelled(state, "payment_lost", payment="voided", provider_code=answer.code)
    if answer.captured_minor == 0:
        return RetryLater("payments.outcome_pending")
    waived_minor = order.total_minor - answer.captured_minor
    return Decision("settle", "captured", state, finished=True, payment="paid", waived_minor=waived_minor)


def after_awaiting(state: Checkout) -> Decision:
    """The time of the hold is over, and the order is not paid."""
    return _cancelled(state, "expired")


def cancelled_by(state: Checkout, message: str, internal_note: str = "") -> Decision:
    """A client that may cancel the order has requested it."""
    reason = CancelReason(code="requested", message=message)
    return Decision(
        "unwind", message, state, running=True, status="cancelled", reason=reason, internal_note=internal_note
    )


def after_release(answer: Reservation) -> RetryLater | None:
    """None: the stock is no longer held. It is released, or it was sold and has to be restocked."""
    return None if answer.state in ("released", "expired", "committed") else RetryLater(UNKNOWN_STATE)


def after_unwind(order: Order, state: Checkout, payment: PaymentRecord | None, *, is_kept: bool = False) -> Decision:
    """Everything is undone. `payment` is the one that was undone, as it is now; `is_kept`: its refund was declined."""
    waived_minor = order.total_minor - payment.captured_minor if payment and payment.captured_minor else None
    if is_kept or (payment and payment.captured_minor > payment.refunded_minor):
        # The provider has declined the refund, which is final: staff settle it.
        kept: Payment | None = "paid" if order.payment in ("authorized", "unpaid") else None
        return Decision("unwind", "refund declined", state, finished=True, payment=kept, waived_minor=waived_minor)
    became: Payment | None = None
    refunded_minor = 0
    if order.payment in ("authorized", "paid", "partially_refunded"):
        refunded_minor = payment.refunded_minor - order.refunded_minor if payment else 0
        became = "refunded" if payment and payment.captured_minor else "voided"
    if order.payment in ("paid", "partially_refunded") and order.total_minor == 0:
        became = "refunded"
    return Decision(
        "unwind",
        "undone",
        state,
        finished=True,
        payment=became,
        refunded_minor=refunded_minor,
        waived_minor=waived_minor if became else None,
    )


def resumed(step: str, status: Status, payment: Payment) -> str | None:
    """The step with which a parked checkout has to continue, by its own step and its order. None: it waits rightly.

    A step that was interrupted runs again: each call answers with what was already done.
    """
    if step == "authorized" and payment == "authorized":
        return "unwind" if status == "cancelled" else None
    if step == "awaiting":
        return "reserve" if status == "pending" else "unwind"
    return step


def _cancelled(
    state: Checkout,
    code: CancelCode,
    *,
    payment: Payment | None = None,
    provider_code: str | None = None,
    lines: tuple[ShortLine, ...] = (),
    message: str = "",
) -> Decision:
    reason = CancelReason(code=code, message=message, provider_code=provider_code, lines=lines)
    note = f"cancelled {code}"
    return Decision("unwind", note, state, running=True, status="cancelled", payment=payment, reason=reason)


def _hold_limit(answer: HoldLimitReached) -> str:
    held = ", ".join(
        f"{bound} pieces of product {line.product_id}"
        for line, bound in zip(answer.lines[:NAMED_PRODUCTS], answer.bounds, strict=False)
    )
    more = ", ..." if len(answer.lines) > NAMED_PRODUCTS else ""
    return f"Open orders of one customer may hold at most {held}{more}. Pay or cancel open orders, or order less."
