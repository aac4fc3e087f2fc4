"""The rules of orders. Pure: no I/O, no clock.

The moves of an order are in `mercato/contracts/order_moves.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor, FieldError, InvalidRequest, RuleBroken, ServiceError
from mercato.chassis.mail import addresses
from mercato.contracts.money import MAX_MINOR, to_minor, written
from mercato.contracts.order_moves import AXES
from mercato.contracts.order_refusals import (
    Axis,
    HoldLimit,
    IllegalMove,
    MixedCurrencies,
    NothingToRefund,
    NotReturnable,
    OrderCancelled,
    OrderNotFound,
    OutOfStock,
    PriceChanged,
)
from mercato.contracts.orders import (
    PAID,
    QUANTITY_LIMIT,
    CapturePart,
    Order,
    OrderLine,
    PlaceLine,
    PlaceOrder,
    RefundOrder,
    ReturnLine,
)
from mercato.contracts.payments import CaptureAmountChanged, CaptureTooLarge, Payment as PaymentRecord
from mercato.contracts.products import Product, Quote
from mercato.contracts.roles import ANONYMOUS, CUSTOMER, GUEST, GUEST_USER, may_see

SHIPPABLE: Final = frozenset({"confirmed", "completed"})
"""Goods move only for an order that was confirmed and is not cancelled."""

CANCELLABLE: Final = frozenset({"unfulfilled"})
"""An order whose goods were sent is not cancelled: they are returned and refunded (`take_back`)."""

REFUNDABLE: Final = frozenset({"paid", "partially_refunded"})

AUTHORIZED_BLOCKS: Final = frozenset({"shipped", "returned", "completed"})
"""Until the authorized money is captured, no goods are sent or returned, and no order is completed."""

REFUNDED_BLOCKS: Final = frozenset({"shipped", "completed"})
"""Where all money was refunded before the goods were sent, they are not sent, and the order is to be cancelled. Goods
that were sent before are delivered or returned, and the order is completed."""

CLAIMED: Final = "order.claimed"
PARTIALLY_RETURNED: Final = "order.partially_returned"

PLACED: Final[Mapping[Axis, str]] = {"status": "pending", "payment": "unpaid", "fulfilment": "unfulfilled"}
"""The states of a new order."""


def as_placed(order: Order, principal: str) -> Order:
    """An order as it was when `principal` placed it. Lines, total and currency stay as they were written."""
    return msgspec.structs.replace(
        order,
        user_id=GUEST_USER if principal == ANONYMOUS else order.user_id,  # it may have been claimed since
        status=PLACED["status"],
        payment=PLACED["payment"],
        fulfilment=PLACED["fulfilment"],
        version=1,
        updated_at=order.created_at,
        refunded_minor=0,
        reason=None,
        waived_minor=0,
        lines=tuple(msgspec.structs.replace(line, returned=0) for line in order.lines),
    )


def sources(axis: Axis, wanted: str) -> list[str]:
    """The states from which `wanted` can be reached in one move."""
    return sorted(before for before, after in AXES[axis].items() if wanted in after)


def legal_moves(order: Order, axis: Axis) -> tuple[str, ...]:
    """The states that this order can move to on an axis."""
    if axis == "fulfilment" and order.status not in SHIPPABLE:
        return ()
    moves = AXES[axis][getattr(order, axis)]
    if order.payment == "authorized":
        moves = moves - AUTHORIZED_BLOCKS
    if _is_refunded_here(order):
        moves = moves - REFUNDED_BLOCKS
    if axis == "status" and order.fulfilment not in CANCELLABLE:
        moves = moves - {"cancelled"}
    return tuple(sorted(moves))


def _is_refunded_here(order: Order) -> bool:
    """Whether all that was paid was refunded, and the goods were not sent."""
    return order.payment == "refunded" and order.fulfilment == "unfulfilled"


def check_move(order: Order, axis: Axis, wanted: str) -> None:
    """Raises `IllegalMove`, which lists the legal ones."""
    if wanted not in legal_moves(order, axis):
        raise illegal(order, axis, wanted)


def illegal(order: Order, axis: Axis, wanted: str) -> IllegalMove:
    """The refusal of a move, with the legal moves, and the state of the order that forbids it."""
    return IllegalMove(
        order_id=order.id,
        axis=axis,
        current=getattr(order, axis),
        wanted=wanted,
        legal=legal_moves(order, axis),
        why=_why_not(order, axis, wanted),
    )


def _why_not(order: Order, axis: Axis, wanted: str) -> str:
    """What forbids a move: the state on its axis, or on another axis."""
    current: str = getattr(order, axis)
    if wanted not in AXES[axis].get(current, ()):
        return _why_not_from(axis, current, wanted)
    if axis == "fulfilment" and order.status not in SHIPPABLE:
        return f"the order is {order.status}"
    if order.payment == "authorized" and wanted in AUTHORIZED_BLOCKS:
        return "its payment is only authorized; capture it first"
    if _is_refunded_here(order) and wanted in REFUNDED_BLOCKS:
        why = "all that was paid was refunded"
        return f"{why}; cancel the order instead" if "cancelled" in legal_moves(order, "status") else why
    if axis == "status" and wanted == "cancelled" and order.fulfilment not in CANCELLABLE:
        return f"its goods are {order.fulfilment}; return them instead"
    return ""


def _why_not_from(axis: Axis, current: str, wanted: str) -> str:
    """Why an axis has no move from one state to another."""
    what = {"status": "it is", "payment": "its payment is", "fulfilment": "its goods are"}[axis]
    if current == wanted:
        return f"{what} {current} already"
    sources = [before for before, after in AXES[axis].items() if wanted in after]
    if not sources:
        return f"{what} {current}, and no order goes back to {wanted}"
    return f"{what} {current}, and only an order that is {' or '.join(sources)} can become {wanted}"


def check_declared(order: Order, status: str | None, payment: str | None, fulfilment: str | None) -> None:
    """Raises `RuleBroken` for a move that the tables do not declare: the last check before a move is written."""
    wanted_by_axis: Mapping[Axis, str | None] = {"status": status, "payment": payment, "fulfilment": fulfilment}
    for axis, wanted in wanted_by_axis.items():
        before: str = getattr(order, axis)
        declared = wanted is None or wanted in AXES[axis][before]
        if not declared:
            raise RuleBroken(f"order {order.id}: {axis} does not go from {before} to {wanted}")


States = tuple[str, str, str]
"""The states of an order, in the order of `AXES`."""


def events_between(before: States, after: States, again: Axis | None = None) -> list[str]:
    """The types of the events of a move: one for each axis that has changed, or reached the same state `again`."""
    emitted: list[str] = []
    for axis, was, now in zip(AXES, before, after, strict=True):
        if axis == again == "fulfilment":
            emitted.append(PARTIALLY_RETURNED)
        elif axis == again or was != now:
            emitted.append(f"order.{now}")
    if not emitted:
        raise RuleBroken("the order has not moved")
    return emitted


def events_of(before: Order, after: Order, again: Axis | None = None) -> list[str]:
    """The same, of an order before and after its move."""
    return events_between(
        (before.status, before.payment, before.fulfilment), (after.status, after.payment, after.fulfilment), again
    )


def axis_of(event: str) -> Axis:
    """The axis of the move that emitted this event."""
    if event == "order.placed":
        return "status"
    if event == PARTIALLY_RETURNED:
        return "fulfilment"
    return next(axis for axis, states in AXES.items() if event.removeprefix("order.") in states)


def check_refund(order: Order, request: RefundOrder, left_minor: int) -> int:
    """The amount to refund. Raises `IllegalMove`, `InvalidRequest` or `NothingToRefund`."""
    if order.payment not in REFUNDABLE:
        raise illegal(order, "payment", "refunded")
    check_currency(order, request.currency)
    wanted = minor_of("amount", request.amount, request.amount_minor, order.currency)
    amount = left_minor if wanted is None else wanted
    if not 0 < amount <= left_minor:
        raise NothingToRefund(order_id=order.id, wanted_minor=amount, left_minor=left_minor, currency=order.currency)
    return amount


def check_capture(order: Order, payment: PaymentRecord, request: CapturePart) -> int:
    """The amount to capture. Raises `InvalidRequest` or `CaptureTooLarge`."""
    check_currency(order, request.currency)
    wanted = minor_of("amount", request.amount, request.amount_minor, order.currency)
    if wanted is None:
        return payment.amount_minor
    if wanted == 0:
        message = "is nothing; to take nothing, void the payment"
        raise InvalidRequest(errors=(FieldError(field="amount", message=message),))
    if wanted > payment.amount_minor:
        raise CaptureTooLarge(
            payment_id=payment.id,
            wanted_minor=wanted,
            authorized_minor=payment.amount_minor,
            currency=order.currency,
        )
    return wanted


def check_captured(payment: PaymentRecord, wanted_minor: int, captured_minor: int) -> None:
    """Raises `CaptureAmountChanged` where a capture is no repetition of the one that was made."""
    if wanted_minor != captured_minor:
        raise CaptureAmountChanged(
            payment_id=payment.id,
            wanted_minor=wanted_minor,
            captured_minor=captured_minor,
            currency=payment.currency,
        )


def check_currency(order: Order, currency: str | None) -> None:
    """Raises `InvalidRequest` for a currency that is not the one of the order."""
    if currency is not None and currency != order.currency:
        wrong = FieldError(field="currency", message=f"is not that of the order, {order.currency}")
        raise InvalidRequest(errors=(wrong,))


def not_returned(order: Order) -> tuple[ReturnLine, ...]:
    """Everything that was sold and was not returned."""
    return tuple(
        ReturnLine(line_id=line.id, product_id=line.product_id, quantity=line.quantity - line.returned)
        for line in order.lines
        if line.quantity > line.returned
    )


def check_return(order: Order, lines: Sequence[ReturnLine]) -> tuple[ReturnLine, ...]:
    """The lines that are returned, each with the id and the product of its line.

    Raises `IllegalMove` where nothing was delivered, `InvalidRequest` or `NotReturnable` for a line.
    """
    check_move(order, "fulfilment", "returned")
    found: list[ReturnLine] = []
    errors: list[FieldError] = []
    for i, wanted in enumerate(lines):
        line = _line_of(order, wanted)
        if line is None and wanted.line_id is None and wanted.product_id is not None:
            raise NotReturnable(order_id=order.id, product_id=wanted.product_id, wanted=wanted.quantity, left=0)
        if line is None:
            errors.append(FieldError(field=f"items[{i}]", message=f"names no line of order {order.id}"))
        elif any(line.id == other.line_id for other in found):
            message = f"names line {line.id} again; give one item with the whole quantity"
            errors.append(FieldError(field=f"items[{i}]", message=message))
        else:
            found.append(ReturnLine(line_id=line.id, product_id=line.product_id, quantity=wanted.quantity))
            left = line.quantity - line.returned
            if wanted.quantity > left:
                raise NotReturnable(order_id=order.id, product_id=line.product_id, wanted=wanted.quantity, left=left)
    if errors:
        raise InvalidRequest(errors=tuple(errors))
    return tuple(found)


def _line_of(order: Order, wanted: ReturnLine) -> OrderLine | None:
    """The line that is named by its id, by its product, or by both."""
    for line in order.lines:
        if wanted.line_id in (None, line.id) and wanted.product_id in (None, line.product_id):
            return line if wanted.line_id or wanted.product_id else None
    return None


def returned_after(order: Order, lines: Sequence[ReturnLine]) -> list[int]:
    """The returned quantity of each line of the order, including these."""
    back = {line.line_id: line.quantity for line in lines}
    return [line.returned + back.get(line.id, 0) for line in order.lines]


def is_all(order: Order, lines: Sequence[ReturnLine]) -> bool:
    """Whether these lines are all that was not returned yet."""
    return sum(line.quantity for line in lines) == sum(line.quantity - line.returned for line in order.lines)


def refund_value(order: Order, lines: Sequence[ReturnLine]) -> int:
    """What was paid for these goods, in minor units: the refunds of a line add up to its total, to the last unit."""
    back = {line.line_id: line.quantity for line in lines}
    return sum(
        _share(line, line.returned + back[line.id]) - _share(line, line.returned)
        for line in order.lines
        if line.id in back
    )


def limit_reason(order: Order, asked_minor: int, given_minor: int) -> str:
    """Why less is refunded than was asked: no more is left of what was paid. Empty where the amounts are equal."""
    if given_minor == asked_minor:
        return ""
    paid_minor = payable_minor(order)
    asked, given, paid, before = (
        written(minor, order.currency) for minor in (asked_minor, given_minor, paid_minor, paid_minor - given_minor)
    )
    why = f", and {before} of it was refunded before" if paid_minor > given_minor else ""
    return f"asked for {asked}, refunded {given}: {paid} was paid for the order{why}"


def returned_value(lines: Sequence[OrderLine]) -> int:
    """The price of returned goods. It is not due where they were returned before the order was paid."""
    return sum(_share(line, line.returned) for line in lines if line.returned)


def _share(line: OrderLine, quantity: int) -> int:
    """What was paid for the first `quantity` pieces of a line."""
    return line.line_total_minor * quantity // line.quantity


def visible(order: Order | None, order_id: int, actor: Actor) -> Order | OrderNotFound:
    """The order, where the caller may see it: an order of another account is answered like one that does not exist."""
    if order is None:
        return OrderNotFound(order_id=order_id)
    is_guests = order.user_id == GUEST_USER and (actor.role, actor.id) == (GUEST, order.id)
    if not (is_guests or may_see(actor, order.user_id)):
        return OrderNotFound(order_id=order_id)
    return order


def cancelled_as(order: Order) -> ServiceError | None:
    """Why a cancelled order was refused; None where it was cancelled on request, or not paid in time.

    Also None where a payment was declined: the caller makes that refusal from the payment.
    """
    reason = order.reason
    if reason is None or reason.code in ("requested", "expired", "payment_declined"):
        return None
    if reason.code == "out_of_stock":
        return OutOfStock(order_id=order.id, items=reason.lines)
    if reason.code == "hold_limit":
        return HoldLimit(order_id=order.id, items=reason.lines, explanation=reason.message)
    return OrderCancelled(order_id=order.id, reason=reason.code)


def may_be_declined(order: Order) -> bool:
    """Whether the last payment of the order may have been declined, and the order is not paid since."""
    if order.status == "cancelled":
        return order.reason is not None and order.reason.code == "payment_declined"
    return (order.status, order.payment) == ("pending", "unpaid")


def with_products(request: PlaceOrder, found: Mapping[str, Product | ServiceError]) -> PlaceOrder | ServiceError:
    """The request with one line for each product, named by its id. `found`: the products, or refusals, by sku."""
    quantities: dict[int, int] = {}
    for line in request.lines:
        product = None if line.sku is None else found[line.sku]
        if isinstance(product, ServiceError):
            return product
        product_id = line.product_id if product is None else product.id
        quantities[product_id] = quantities.get(product_id, 0) + line.quantity
    if max(quantities.values()) > QUANTITY_LIMIT:
        wrong = FieldError(field="items", message=f"has more than {QUANTITY_LIMIT} pieces of a product")
        return InvalidRequest(errors=(wrong,))
    lines = (PlaceLine(product_id=product_id, quantity=quantity) for product_id, quantity in quantities.items())
    return msgspec.structs.replace(request, lines=tuple(lines))


def payable_minor(order: Order) -> int:
    """The amount that a payment takes, or has taken."""
    return order.total_minor - order.waived_minor


def due_minor(order: Order) -> int:
    """The amount that is still to be paid. The gateway shows it as well (`order_out`)."""
    return payable_minor(order) if order.payment == "unpaid" and order.status != "cancelled" else 0


def paid_minor(order: Order) -> int:
    """The amount that was taken, of which `refunded_minor` was refunded."""
    return payable_minor(order) if order.payment in PAID else 0


def is_buyer(actor: Actor) -> bool:
    """Whether the actor is a customer or a guest, who see neither internal notes nor the accounts of staff."""
    return actor.role in (ANONYMOUS, CUSTOMER, GUEST)


def shown_actor_id(role: str, account_id: int, actor: Actor) -> int:
    """The account that acted, as `actor` may see it: 0 where a buyer is another actor."""
    return account_id if not is_buyer(actor) or (role, account_id) == (actor.role, actor.id) else 0


def check_request(request: PlaceOrder) -> InvalidRequest | None:
    """A product is in one line of an order: stock is reserved by order and product. An e-mail address is valid."""
    errors = _repeated([line.product_id for line in request.lines])
    if request.guest_email is not None and (problem := addresses.problem(addresses.composed(request.guest_email))):
        errors = (*errors, FieldError(field="guest_email", message=problem))
    return InvalidRequest(errors=errors) if errors else None


def _repeated(product_ids: Sequence[int]) -> tuple[FieldError, ...]:
    first: dict[int, int] = {}
    errors: list[FieldError] = []
    for i, product_id in enumerate(product_ids):
        j = first.setdefault(product_id, i)
        if j != i:
            message = f"product {product_id} is in items[{j}] already; give one item with the whole quantity"
            errors.append(FieldError(field=f"items[{i}].product_id", message=message))
    return tuple(errors)


def priced(lines: Sequence[PlaceLine], quotes: Mapping[int, Quote]) -> tuple[OrderLine, ...]:
    """The lines as the order stores them: with the names and prices that the catalogue has now."""
    return tuple(
        OrderLine(
            id=i,
            product_id=line.product_id,
            sku=quote.sku,
            name=quote.name,
            quantity=line.quantity,
            unit_price_minor=quote.price_minor,
            discount_minor=0,
            tax_minor=0,
            line_total_minor=quote.price_minor * line.quantity,
        )
        for i, line in enumerate(lines, 1)
        for quote in (quotes[line.product_id],)
    )


def total(lines: Sequence[OrderLine]) -> int:
    return sum(line.line_total_minor for line in lines)


def currency_of(lines: Sequence[PlaceLine], quotes: Mapping[int, Quote]) -> str | MixedCurrencies:
    first = quotes[lines[0].product_id].currency
    if len(lines) > 1 and any(quotes[line.product_id].currency != first for line in lines):
        return MixedCurrencies(currencies=tuple(sorted({quotes[line.product_id].currency for line in lines})))
    return first


LARGEST_TOTAL_MINOR: Final = MAX_MINOR * QUANTITY_LIMIT


def minor_of(field: str, amount: str | None, minor: int | None, currency: str) -> int | None:
    """The amount of a request's field, in minor units of the currency of the order. Raises `InvalidRequest`."""
    if amount is None:
        return minor
    found = to_minor(amount, currency, LARGEST_TOTAL_MINOR)
    if isinstance(found, str):
        raise InvalidRequest(errors=(FieldError(field=field, message=found),))
    return found


def check_total(request: PlaceOrder, actual_minor: int, currency: str) -> PriceChanged | None:
    """The amount and currency that the client showed to the buyer must be those of the catalogue.

    Raises `InvalidRequest` where it is no amount of that currency.
    """
    shown_currency = request.expected_currency
    shown = minor_of("expected_total", request.expected_total, request.expected_total_minor, shown_currency or currency)
    if (shown is None or shown == actual_minor) and (shown_currency is None or shown_currency == currency):
        return None
    return PriceChanged(
        expected_minor=actual_minor if shown is None else shown,
        expected_currency=shown_currency or currency,
        actual_minor=actual_minor,
        actual_currency=currency,
    )


# ------------------------------------------------------------------------------------------- bounds of one customer


class BuyerLimits(msgspec.Struct, frozen=True):
    """The bounds of all open orders of one customer together; 0: no bound.

    `held_units` and `held_percent` of the pieces on hand: the larger of the two; no bound where both are 0.
    """

    open_orders: int = 0
    held_units: int = 0
    held_percent: int = 0

    @property
    def bounds_units(self) -> bool:
        return self.held_units > 0 or self.held_percent > 0


UNLIMITED: Final = BuyerLimits()
ANY_NUMBER: Final = 2**31 - 1
"""More open orders than there can be."""


class Limits(msgspec.Struct, frozen=True):
    """Limits of orders that customers place themselves, and of those that staff or programs of staff place for them."""

    customers: BuyerLimits
    staff: BuyerLimits

    def of(self, user_id: int, actor: Actor) -> BuyerLimits:
        """Guests have no limits here: inventory bounds what all guests hold together."""
        if user_id == GUEST_USER:
            return UNLIMITED
        return self.customers if actor.role == CUSTOMER else self.staff


class Limited(msgspec.Struct, frozen=True, gc=False):
    """The bounds of one order of a batch."""

    buyer: int = 0
    """The position of its user among those whose open orders are counted, from 1; 0: not among them."""
    most_open: int = 0
    """The open orders that the buyer may have before the batch for this one to be within the limit."""
    before: tuple[int, ...] | None = None
    """Element n: pieces of line n's product in the buyer's orders before this one in the batch."""


_FREE: Final = Limited()


def limited(orders: Sequence[tuple[Order, BuyerLimits]]) -> tuple[list[int], list[Limited]]:
    """The users whose open orders are counted; and the bounds of each order."""
    users = sorted({order.user_id for order, limits in orders if limits != UNLIMITED})
    if not users:
        return [], [_FREE] * len(orders)
    places = {user_id: place for place, user_id in enumerate(users, 1)}
    counts, units = Counter[int](), Counter[tuple[int, int]]()
    bounds = [_FREE] * len(orders)
    # The highest limit first: an order that is refused must not count against one that would be written.
    ordered = sorted(enumerate(orders), key=lambda one: one[1][1].open_orders or ANY_NUMBER, reverse=True)
    for i, (order, limits) in ordered:
        user_id = order.user_id
        if limits != UNLIMITED:
            most_open = limits.open_orders - counts[user_id] - 1 if limits.open_orders else ANY_NUMBER
            before = tuple([units[user_id, line.product_id] for line in order.lines]) if limits.bounds_units else None
            bounds[i] = Limited(places[user_id], most_open, before)
        counts[user_id] += 1
        for line in order.lines:
            units[user_id, line.product_id] += line.quantity
    return users, bounds
