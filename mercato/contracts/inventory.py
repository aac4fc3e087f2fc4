"""Inventory: the stock of each product, its reservations, and the reasons of its changes.

Every request about an order carries `order_nonce` beside `order_id`. A request whose nonce is not the one stored with
the reservation is about another order with the same id: it is refused with `AnotherOrder`, and nothing changes.
"""

from __future__ import annotations

import datetime
from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta

from mercato.chassis.contract import (
    MAX_ID,
    Contract,
    Kind,
    Message,
    Open,
    Retry,
    ServiceError,
    batched,
    filled,
    single,
    worded,
)

from .roles import ALL_ROLES, SERVICES_ONLY, STAFF_ONLY

OrderId = Annotated[int, Meta(ge=1, le=MAX_ID)]
ProductId = Annotated[int, Meta(ge=1, le=MAX_ID)]
Version = Annotated[int, Meta(ge=1, le=MAX_ID)]
"""Rises with every batch that changes a level: hundreds of times a second for a product in high demand."""

OrderNonce = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""The random part of an order. After a restore ids are given again; the nonce distinguishes the new order."""

ReservationState = Literal["held", "committed", "released", "expired"]
MovementKind = Literal["receipt", "adjustment", "return"]
"""The kind of a change of `on_hand`. A sale is no movement: the committed reservation is the sale."""

ON_HAND_LIMIT: Final = 10**9
"""Pieces of one product: below 2^31, and far above the stock of one shop."""
QUANTITY_LIMIT: Final = 10_000
LINES_LIMIT: Final = 100
PAGE_LIMIT: Final = 200

OnHand = Annotated[int, Meta(ge=0, le=ON_HAND_LIMIT)]
NO_NUL: Final = worded("must not contain the character U+0000")
Reason = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00]*\Z", extra=NO_NUL)]


GUEST_SHARE_PERCENT: Final = 20
"""Of the pieces on hand, without sold ones, rounded down; at least one piece where one is on hand."""


class StockLine(Message):
    """So many pieces of a product. A request has at most one line of a product."""

    product_id: ProductId
    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_LIMIT)]


class CustomerBound(Message):
    """How much of a product the open orders of one customer may hold together: the larger of the two."""

    units: Annotated[int, Meta(ge=0, le=ON_HAND_LIMIT)]
    share_percent: Annotated[int, Meta(ge=0, le=100)]
    """Of the pieces on hand, without sold ones, rounded down."""
    before: Annotated[tuple[int, ...], Meta(max_length=LINES_LIMIT)]
    """Element n: pieces of line n's product in orders of the customer that were open when this one was placed."""


class ReserveStock(Message):
    """Holds all lines of an order, or none.

    Done once for each order: a repeated request gets the reservation as it is by now. `for_payment` removes the expiry:
    the payment begins, and from then on only a commit or a release ends the reservation. A repeated request with it
    also removes the expiry of a held reservation; its lines must be those of the first request.
    """

    order_id: OrderId
    lines: Annotated[tuple[StockLine, ...], Meta(min_length=1, max_length=LINES_LIMIT)]
    for_payment: bool
    idempotency_key: str
    """For the retries of the transport; the order id makes the operation happen once."""
    order_nonce: OrderNonce = 0
    guest: bool = False
    """Whether it is a guest's order: all of these together hold at most `GUEST_SHARE_PERCENT` of a product's pieces."""
    customer_bound: CustomerBound | None = None
    """None: the customer's other orders do not bound this one."""


class Reservation(Message):
    """All lines of an order are in the same state."""

    order_id: OrderId
    state: Open[ReservationState]
    lines: tuple[StockLine, ...]
    expires_in_s: float | None
    """By the clock of inventory's database, when the answer was made; None where it does not expire."""


class CommitStock(Message):
    """The goods of a held reservation are sold: they leave `on_hand`. Done once for each order."""

    order_id: OrderId
    idempotency_key: str
    order_nonce: OrderNonce = 0


class ReleaseStock(Message):
    """Releases the held stock of an order. Done once for each order; a reservation that is not held does not change.

    For an order without a reservation it inserts a released one, a tombstone, which rejects a reserve that arrives
    later, from a fenced process.
    """

    order_id: OrderId
    idempotency_key: str
    order_nonce: OrderNonce = 0


class ReturnStock(Message):
    """Adds returned goods of a committed reservation to `on_hand`. Done once for each `reference`, for ever.

    A repeated request with other lines raises `ReturnReferenceReused`.
    """

    order_id: OrderId
    lines: Annotated[tuple[StockLine, ...], Meta(min_length=1, max_length=LINES_LIMIT)]
    reference: Annotated[str, Meta(min_length=1, max_length=100)]
    """Names the return: unique within the order."""
    idempotency_key: str
    order_nonce: OrderNonce = 0


class Level(Message):
    product_id: ProductId
    on_hand: int
    """All pieces in stock, the reserved ones included."""
    reserved: int
    available: int
    """`on_hand - reserved`: the pieces that can be reserved."""
    updated_at: datetime.datetime | None
    """None for a product that was never counted."""
    version: int
    """0 for a product that was never counted. Each count makes a new version, and so does each batch of orders."""


class SeenLevel(Message):
    """A level as clients of the API see it.

    All callers see `in_stock`, and staff the rest: a version and a time would reveal how much is sold, and when.
    """

    product_id: int
    in_stock: bool
    on_hand: int | None = None
    reserved: int | None = None
    available: int | None = None
    updated_at: datetime.datetime | None = None
    version: int | None = None
    """0 for a product that was never counted."""


class GetLevel(Message):
    product_id: ProductId


class SetLevel(Message):
    """Sets the counted pieces. With `version`, only if the level still has it. The answer is the new level."""

    product_id: ProductId
    on_hand: OnHand
    reason: Reason = "counted"
    version: Version | None = None


class AdjustLevel(Message):
    """Adds or removes pieces. Once for each `idempotency_key`, for ever; after a refusal the key can be used again."""

    product_id: ProductId
    delta: Annotated[int, Meta(ge=-ON_HAND_LIMIT, le=ON_HAND_LIMIT)]
    reason: Reason
    idempotency_key: str
    fingerprint: Annotated[bytes, Meta(extra=filled("fingerprint"))] = b""


class AdjustedLevel(Message):
    level: Level
    """The level right after this adjustment, also in an answer that is replayed within a day; later the current one."""
    replayed: bool = False


class ListLevels(Message):
    """Levels by ascending product, those after `after`; with `below`, those with fewer available pieces than that."""

    below: Annotated[int, Meta(ge=1, le=ON_HAND_LIMIT)] | None = None
    after: ProductId | None = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 50
    count: bool = False
    """Whether the page must have its `total`."""


class LevelPage(Message):
    levels: tuple[Level, ...]
    next_after: int | None = None
    """The `after` of the next page; None on the last."""
    total: int | None = None
    """All entries that the filters match, on all pages; None where it is not requested, or takes too long to count."""


class TraceStock(Message):
    """Lists the changes of an order's stock; the answer is empty where the reservation belongs to another order."""

    order_id: OrderId
    order_nonce: OrderNonce = 0


StockStepKind = Literal["held", "committed", "released", "expired", "returned"]


class StockStep(Message):
    """A change of the stock of an order."""

    what: Open[StockStepKind]
    lines: tuple[StockLine, ...]
    at: datetime.datetime


class StockTrace(Message):
    """The steps in the order in which they happened."""

    steps: tuple[StockStep, ...]


class ListHolds(Message):
    """A scan of all reservations, a page at a time, the newest first: it gives the holds without an expiry.

    `before` is the order before which the page begins; None: at the newest.
    """

    before: OrderId | None = None
    quiet_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 600.0
    """Only holds that have not changed for so long."""


class Hold(Message):
    """Stock that is held without an expiry, until its order is paid or cancelled."""

    order_id: int
    order_nonce: int


class HoldPage(Message):
    holds: tuple[Hold, ...]
    """May be empty: most reservations of a page have ended."""
    next_before: int | None = None
    """The `before` of the next page; None on the last."""


class ShortLine(Message):
    product_id: int
    requested: int
    available: int


class OutOfStock(ServiceError, code="inventory.out_of_stock", kind=Kind.CONFLICT):
    """Nothing was reserved. `lines` has the lines with too little stock, and how much is available."""

    sentence = "There is not enough in stock for order {order_id}."
    order_id: int
    lines: tuple[ShortLine, ...]


class HoldLimitReached(ServiceError, code="inventory.hold_limit_reached", kind=Kind.CONFLICT):
    """Nothing was reserved. `lines` has the products; `available` is what this order could hold of each.

    `bounds` has, for each of them, how much open orders of one customer may hold together.
    """

    sentence = "Open orders of one customer cannot hold as much as order {order_id} asks for."
    order_id: int
    lines: tuple[ShortLine, ...]
    bounds: tuple[int, ...]


class ReservationClosed(ServiceError, code="inventory.reservation_closed", kind=Kind.CONFLICT):
    """The operation needs a held reservation (a return needs a committed one), and this one has another state.

    `state` is None where there is no reservation.
    """

    sentence = "The stock of order {order_id} is {state}."
    order_id: int
    state: Open[ReservationState] | None


class AnotherOrder(ServiceError, code="inventory.another_order", kind=Kind.CONFLICT):
    """Final: the stored reservation has another nonce. Nothing was changed; a retry gets the same error."""

    sentence = "The stock of order {order_id} belongs to another order that had the same id."
    key_field = "order_nonce"
    order_id: int
    newest_order_id: int = 0
    """The highest order id that inventory knows; 0: not given."""


class ReturnReferenceReused(ServiceError, code="inventory.return_reference_reused", kind=Kind.CONFLICT):
    """A reference of an order names one return. Nothing was changed; another return needs another reference."""

    sentence = "A return of order {order_id} with this reference was made with other {field}."
    key_field = "lines"
    order_id: int
    field: str = "lines"


class BelowReserved(ServiceError, code="inventory.below_reserved", kind=Kind.CONFLICT):
    """A level cannot be lower than its reserved pieces."""

    sentence = "Product {product_id} cannot have {wanted} pieces: {reserved} are reserved for orders."
    product_id: int
    wanted: int
    reserved: int


class ReturnTooLarge(ServiceError, code="inventory.return_too_large", kind=Kind.CONFLICT):
    sentence = "Order {order_id} cannot return {quantity} of product {product_id}: {left} of what was sold are left."
    order_id: int
    product_id: int
    quantity: int
    left: int


class StockMoved(Message):
    """`stock.held`, `stock.committed`, `stock.released`, `stock.expired`, `stock.returned`: the stock of one order."""

    order_id: int
    lines: tuple[StockLine, ...]
    about_field: ClassVar = "order_id"


class StockLevelSet(Message):
    """`stock.adjusted`: pieces were counted, received or written off."""

    product_id: int
    delta: int
    on_hand: int
    reason: str


class StockAvailability(Message):
    """`stock.exhausted`, `stock.available`: the last available piece was reserved, or one is available again."""

    product_id: int
    version: int
    """The version of the level: a consumer that has seen a later one ignores this event."""


class Inventory(Contract, name="inventory"):
    """Stock. Orders reserves, commits and releases; staff count and adjust; all callers may read."""

    reserve = batched(ReserveStock, Reservation, allow=SERVICES_ONLY, size=256, retry=Retry.KEYED)
    commit = batched(CommitStock, Reservation, allow=SERVICES_ONLY, size=256, retry=Retry.KEYED)
    release = batched(ReleaseStock, Reservation, allow=SERVICES_ONLY, size=256, retry=Retry.KEYED)
    restock = batched(ReturnStock, Reservation, allow=SERVICES_ONLY, size=256, retry=Retry.KEYED)
    set = batched(SetLevel, Level, allow=STAFF_ONLY, size=256)
    adjust = batched(AdjustLevel, AdjustedLevel, allow=STAFF_ONLY, size=256, retry=Retry.KEYED)
    levels = batched(GetLevel, Level, allow=ALL_ROLES, retry=Retry.SAFE)
    list = single(ListLevels, LevelPage, allow=STAFF_ONLY, retry=Retry.SAFE)
    holds = single(ListHolds, HoldPage, allow=SERVICES_ONLY, retry=Retry.SAFE)
    trace = single(TraceStock, StockTrace, allow=STAFF_ONLY, retry=Retry.SAFE)

    views: ClassVar = (SeenLevel,)

    events: ClassVar = {
        "stock.held": StockMoved,
        "stock.committed": StockMoved,
        "stock.released": StockMoved,
        "stock.expired": StockMoved,
        "stock.returned": StockMoved,
        "stock.adjusted": StockLevelSet,
        "stock.available": StockAvailability,
        "stock.exhausted": StockAvailability,
    }
