"""Orders."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mercato.chassis.contract import (
    MAX_ID,
    FieldError,
    Forbidden,
    IdempotencyKeyReused,
    Open,
    RequestInProgress,
    ServiceError,
    StaleVersion,
)
from mercato.contracts import orders as contract
from mercato.contracts.inventory import NO_NUL, ShortLine
from mercato.contracts.order_refusals import (
    HoldLimit,
    IllegalMove,
    MixedCurrencies,
    OrderCancelled,
    OrderLost,
    OrderNotFound,
    OutOfStock,
    PaymentDeclined,
    PaymentInProgress,
    PriceChanged,
    TooManyOpenOrders,
)
from mercato.contracts.orders import CancelReason, Order, OrderLine, OrderPage, Orders, PlacedOrder, PlaceLine
from mercato.contracts.products import ProductArchived, ProductNotFound
from mercato.contracts.roles import SIGNED_IN, STAFF_ONLY
from mercato.contracts.users import UserNotFound
from mercato.gateway.fields import Email, PaymentMethod
from mercato.gateway.money import (
    Amount,
    AmountIn,
    Currency,
    Money,
    amount_errors,
    body_currency_errors,
    currency_errors,
    currency_of,
    minor_of,
    money,
    text_of,
)
from mercato.gateway.route import Input, Output, Page, Route, RouteRequest, Wait
from mercato.gateway.validation import copier, refuse_wrong

Id = Annotated[int, Meta(ge=1, le=MAX_ID)]
Quantity = Annotated[int, Meta(ge=1, le=contract.QUANTITY_LIMIT)]
Reason = Annotated[str, Meta(max_length=500, pattern=r"^[^\x00]*\Z", extra=NO_NUL)]
PublicReason = Annotated[Reason, Meta(description="The customer reads it.")]
InternalNote = Annotated[Reason, Meta(description="Of staff, for staff: no customer reads it.")]


class ItemIn(Input):
    product_id: Id
    quantity: Quantity = 1


class PlaceOrderIn(Input):
    """`items`, or the short form of one item: `product_id` and `quantity`."""

    user_id: Annotated[
        Id | None, Meta(description="Without it, that of the access token; without a token, a guest orders.")
    ] = None
    items: Annotated[tuple[ItemIn, ...], Meta(min_length=1, max_length=contract.LINES_LIMIT)] | None = None
    product_id: Id | None = None
    quantity: Quantity | None = None
    amount: (
        Annotated[
            AmountIn,
            Meta(description="The total that was shown to the buyer; another one is refused.", examples=["99.99"]),
        ]
        | None
    ) = None
    currency: Annotated[Currency | None, Meta(description="Of `amount`; without it, that of the products.")] = None
    payment_method: PaymentMethod | None = None
    customer_note: contract.Note = ""
    email: Annotated[Email | None, Meta(description="Of a guest; staff see it.")] = None

    @classmethod
    def wrong_members(cls, given: Collection[str]) -> Iterable[tuple[str, str]]:
        if "items" in given:
            if "product_id" in given or "quantity" in given:
                yield "items", "is one form, product_id and quantity the other; give one"
        elif "product_id" not in given:
            yield "items", "is missing; or give product_id for an order of one item"


class MoveOrderIn(Input):
    """`status`, `fulfilment` or both."""

    status: contract.Status | None = None
    fulfilment: contract.Fulfilment | None = None

    @classmethod
    def wrong_members(cls, given: Collection[str]) -> Iterable[tuple[str, str]]:
        if not {"status", "fulfilment"} & set(given):
            yield "status", "is missing; give status, fulfilment or both"


class CancelIn(Input):
    reason: PublicReason = ""
    internal_note: InternalNote = ""


TOTAL_FILTER: Final = "In major units of `currency`, or of the shop's own. Orders in other currencies are left out."


class OrdersQuery(Input):
    user_id: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None
    product_id: Annotated[int, Meta(ge=1, le=MAX_ID, description="Only orders of this product.")] | None = None
    status: contract.Status | None = None
    payment: contract.Payment | None = None
    fulfilment: contract.Fulfilment | None = None
    limit: Annotated[int, Meta(ge=1, le=contract.PAGE_LIMIT, description="How many at most.")] = 50
    before: Annotated[int, Meta(ge=1, le=MAX_ID, description="Only ids below this one.")] | None = None
    created_from: Annotated[contract.Time | None, Meta(description="Placed at this time or later.")] = None
    created_to: Annotated[contract.Time | None, Meta(description="Placed before this time.")] = None
    currency: Currency | None = None
    min_total: Annotated[Amount, Meta(description=TOTAL_FILTER)] | None = None
    max_total: Annotated[Amount, Meta(description=TOTAL_FILTER)] | None = None
    q: (
        Annotated[
            str,
            Meta(
                max_length=200,
                pattern=r"^[^\x00]*\Z",
                extra=NO_NUL,
                description="An id, or a part of a `customer_note`. Pages by time, total or text may be short, or "
                "empty: follow the Link to the last.",
            ),
        ]
        | None
    ) = None


class ItemOut(Output):
    id: int
    product_id: int
    sku: str
    name: str
    quantity: int
    unit_price: Money
    discount: Money
    tax: Money
    line_total: Money
    returned: int


AVAILABLE_SHOWN: Final = 10
"""The largest number of available pieces that a customer sees who orders too much."""


class ShortItemOut(Output):
    product_id: int
    requested: int
    available: Annotated[
        int,
        Meta(
            description=f"Of `out_of_stock`: how many there were, or {AVAILABLE_SHOWN} where there were more. Of "
            "`hold_limit`: how many the order could hold."
        ),
    ]


class ReasonOut(Output):
    """Why an order was cancelled. `items`: the products with too little stock."""

    code: Open[contract.CancelCode]
    message: str
    provider_code: str | None
    items: list[ShortItemOut]


class OrderOut(Output):
    """`customer_id` is the `user_id`, and `amount` that of the `total`: the names of the reference systems.

    A guest's order has no user. The answer to its placing has its `access_token`; staff see the `email` that the guest
    has given.
    """

    id: int
    user_id: int | None
    status: Open[contract.Status]
    payment: Open[contract.Payment]
    fulfilment: Open[contract.Fulfilment]
    items: list[ItemOut]
    total: Money
    refunded: Money
    reason: ReasonOut | None
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int
    customer_note: str
    due: Annotated[Money, Meta(description="Still to be paid: the total, less goods that came back unpaid.")]
    paid: Annotated[Money, Meta(description="Taken, of which `refunded` was given back.")]
    customer_id: int | None
    amount: str
    email: str | None
    access_token: str | None


_order_out: Final = copier(
    *(Order, OrderOut),
    *("user_id", "customer_id", "items", "total", "amount", "refunded", "due", "paid"),
    *("reason", "email", "access_token"),
)
_item_out: Final = copier(OrderLine, ItemOut, "unit_price", "discount", "tax", "line_total")
_placing: Final = copier(
    *(PlaceOrderIn, contract.PlaceOrder),
    *("user_id", "guest", "guest_email", "lines", "expected_total", "expected_currency"),
    *("idempotency_key", "fingerprint"),
)


def order_out(order: Order, access_token: str | None = None) -> OrderOut:
    currency, payable = order.currency, order.total_minor - order.waived_minor
    user_id = order.user_id or None
    total = money(order.total_minor, currency)
    return _order_out(
        order,
        user_id=user_id,
        customer_id=user_id,
        items=[
            _item_out(
                line,
                unit_price=money(line.unit_price_minor, currency),
                discount=money(line.discount_minor, currency),
                tax=money(line.tax_minor, currency),
                line_total=money(line.line_total_minor, currency),
            )
            for line in order.lines
        ],
        total=total,
        amount=total.amount,
        refunded=money(order.refunded_minor, currency),
        due=money(payable if order.payment == "unpaid" and order.status != "cancelled" else 0, currency),
        paid=money(payable if order.payment in contract.PAID else 0, currency),
        reason=None if order.reason is None else _reason_out(order.reason),
        email=order.guest_email,
        access_token=access_token,
    )


def _reason_out(reason: CancelReason) -> ReasonOut:
    shown = reason_shown(reason)
    return ReasonOut(
        code=shown.code,
        message=shown.message,
        provider_code=shown.provider_code,
        items=[ShortItemOut(**msgspec.structs.asdict(line)) for line in shown.lines],
    )


def reason_shown(reason: CancelReason) -> CancelReason:
    """The reason as clients see it."""
    if reason.code != "out_of_stock":
        return reason
    return msgspec.structs.replace(reason, lines=_lines_shown(reason.lines))


def _lines_shown(lines: tuple[ShortLine, ...]) -> tuple[ShortLine, ...]:
    return tuple(msgspec.structs.replace(line, available=min(line.available, AVAILABLE_SHOWN)) for line in lines)


def refusal_shown(error: ServiceError) -> ServiceError:
    """The error as clients see it."""
    if not isinstance(error, OutOfStock):
        return error
    return OutOfStock(order_id=error.order_id, items=_lines_shown(error.items))


def placed_out(placed: PlacedOrder) -> OrderOut:
    return order_out(placed.order, placed.access_token)


def _guest_details(placed: PlacedOrder) -> dict[str, str]:
    """A guest whose payment was declined needs the access token to pay in another way."""
    return {} if placed.access_token is None else {"access_token": placed.access_token}


def page_of(page: OrderPage) -> Page:
    following = None if page.next_before is None else {"before": str(page.next_before)}
    return Page([order_out(order) for order in page.orders], following)


def _place(request: RouteRequest) -> contract.PlaceOrder:
    body: PlaceOrderIn = request.body
    has_price = body.amount is not None or body.currency is not None  # most orders have none
    refuse_wrong([*_items_errors(body), *(body_currency_errors(body.amount, body.currency) if has_price else ())])
    user_id, is_guest = buyer(request, body.user_id)
    return _placing(
        body,
        user_id=user_id,
        guest=is_guest,
        guest_email=body.email,
        lines=_lines(body),
        expected_total=text_of(body.amount) if has_price else None,
        expected_currency=currency_of(body.amount, body.currency) if has_price else None,
        idempotency_key=request.idempotency_key,
        fingerprint=request.fingerprint,
    )


def _items_errors(body: PlaceOrderIn) -> list[FieldError]:
    # The forms that most orders have need no look at all members.
    if body.items is None and body.product_id is not None:
        return []
    if body.items is not None and body.product_id is None and body.quantity is None:
        return []
    return members_errors(body)


def _lines(body: PlaceOrderIn) -> tuple[PlaceLine, ...]:
    if body.items is None and body.product_id is not None:
        return (PlaceLine(product_id=body.product_id, quantity=body.quantity or 1),)
    return tuple(PlaceLine(product_id=item.product_id, quantity=item.quantity) for item in body.items or ())


def members_errors(body: Input) -> list[FieldError]:
    """Errors in the combination of members that a body has."""
    given = {name for name in body.__struct_fields__ if getattr(body, name) is not None}
    return [FieldError(field=name, message=message) for name, message in body.wrong_members(given)]


def placing(
    request: RouteRequest, user_id: int | None, lines: Sequence[PlaceLine], amount: Amount | None = None
) -> contract.PlaceOrder:
    """The request that places an order from a reference form. Without a user, it is that of the token."""
    user_id, is_guest = buyer(request, user_id)
    return contract.PlaceOrder(
        user_id=user_id,
        guest=is_guest,
        lines=tuple(lines),
        expected_total=text_of(amount),
        idempotency_key=request.idempotency_key,
        fingerprint=request.fingerprint,
    )


def buyer(request: RouteRequest, user_id: int | None) -> tuple[int, bool]:
    """The user that the request names, or whose token it carries, and whether it is a guest, where there is neither."""
    found = user_id or request.actor.id
    return found or contract.NO_USER, not found


def is_guest(placing: contract.PlaceOrder) -> bool:
    return placing.guest


def _list(request: RouteRequest) -> contract.ListOrders:
    query: OrdersQuery = request.query
    priced = query.min_total is not None or query.max_total is not None
    currency = query.currency or (request.currency if priced else None)
    totals = (("?min_total", query.min_total), ("?max_total", query.max_total))
    errors = currency_errors("?currency", currency)
    errors += () if errors else [error for field, total in totals for error in amount_errors(field, total, currency)]
    errors += _time_errors("?created_from", query.created_from) + _time_errors("?created_to", query.created_to)
    refuse_wrong(errors)
    return contract.ListOrders(
        user_id=query.user_id,
        product_id=query.product_id,
        status=query.status,
        payment=query.payment,
        fulfilment=query.fulfilment,
        before=query.before,
        limit=query.limit,
        created_from=query.created_from and query.created_from.astimezone(datetime.UTC),
        created_to=query.created_to and query.created_to.astimezone(datetime.UTC),
        currency=currency,
        min_total_minor=minor_of(query.min_total, currency),
        max_total_minor=minor_of(query.max_total, currency),
        text=query.q if query.q and not query.q.isspace() else None,
    )


def _time_errors(field: str, time: datetime.datetime | None) -> list[FieldError]:
    """A time must be at least a day within the limits of `datetime`, or its conversion to UTC can fail."""
    if time is None or 1 < time.year < datetime.MAXYEAR:
        return []
    return [FieldError(field=field, message="must be in a year from 2 to 9998")]


def _move(request: RouteRequest) -> contract.MoveOrder:
    body: MoveOrderIn = request.body
    refuse_wrong(members_errors(body))
    return contract.MoveOrder(
        id=request.path["id"], status=body.status, fulfilment=body.fulfilment, version=request.if_match
    )


def _version(order: Order) -> int:
    return order.version


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="POST",
        path="/orders",
        operation=Orders.place,
        summary="Place an order",
        roles=SIGNED_IN,
        body=PlaceOrderIn,
        examples={
            "several products": {
                "user_id": 1,
                "items": [{"product_id": 100, "quantity": 2}, {"product_id": 2, "quantity": 1}],
            },
            "one product, with the total that was shown": {"user_id": 1, "product_id": 100, "amount": 99.99},
            "of a guest": {"product_id": 100, "email": "guest@example.com"},
            "paid at once": {"user_id": 1, "product_id": 100, "payment_method": "sandbox:ok"},
        },
        request=_place,
        answer=placed_out,
        output=OrderOut,
        status=201,
        idempotency=True,
        wait=Wait(
            operation=Orders.settled,
            request=lambda placed, wait_ms: contract.AwaitOrder(
                id=placed.order.id, wait_ms=wait_ms, access_token=placed.access_token, refusals=True
            ),
            answer=lambda placed, order: msgspec.structs.replace(placed, order=order),
            refusals=(OutOfStock, HoldLimit, PaymentDeclined, OrderCancelled),
            details=_guest_details,
            shown=refusal_shown,
        ),
        etag=lambda placed: placed.order.version,
        location=lambda placed: f"/orders/{placed.order.id}",
        replayed=lambda placed: placed.replayed,
        fields={"expected_total": "amount", "guest_email": "email"},
        is_guest=is_guest,
        errors=(
            UserNotFound,
            ProductNotFound,
            ProductArchived,
            PriceChanged,
            MixedCurrencies,
            TooManyOpenOrders,
            OrderLost,
            IdempotencyKeyReused,
            RequestInProgress,
        ),
    ),
    Route(
        method="GET",
        path="/orders",
        operation=Orders.list,
        summary="Orders, the newest first: your own, or all for staff",
        roles=SIGNED_IN,
        query=OrdersQuery,
        request=_list,
        answer=page_of,
        output=list[OrderOut],
    ),
    Route(
        method="GET",
        path="/orders/{id}",
        operation=Orders.get,
        summary="One order",
        roles=SIGNED_IN,
        takes_access_token=True,
        request=lambda request: contract.GetOrder(id=request.path["id"], access_token=request.access_token),
        answer=order_out,
        output=OrderOut,
        etag=_version,
        errors=(OrderNotFound,),
    ),
    Route(
        method="PATCH",
        path="/orders/{id}",
        operation=Orders.move,
        summary="Move an order to its next status or fulfilment",
        roles=STAFF_ONLY,
        body=MoveOrderIn,
        examples={"confirm": {"status": "confirmed"}, "ship": {"fulfilment": "shipped"}},
        request=_move,
        answer=order_out,
        output=OrderOut,
        etag=_version,
        if_match=True,
        errors=(
            OrderNotFound,
            IllegalMove,
            OrderCancelled,
            PaymentInProgress,
            StaleVersion,
        ),
    ),
    Route(
        method="POST",
        path="/orders/{id}/cancel",
        operation=Orders.cancel,
        summary="Cancel an order: your own before it is shipped, or any for staff",
        roles=SIGNED_IN,
        body=CancelIn,
        body_optional=True,
        examples={"with a reason": {"reason": "ordered by mistake"}},
        request=lambda request: contract.CancelOrder(
            id=request.path["id"],
            reason=request.body.reason,
            version=request.if_match,
            access_token=request.access_token,
            internal_note=request.body.internal_note,
        ),
        takes_access_token=True,
        answer=order_out,
        output=OrderOut,
        etag=_version,
        if_match=True,
        errors=(
            OrderNotFound,
            IllegalMove,
            PaymentInProgress,
            StaleVersion,
            Forbidden,
        ),
    ),
)
