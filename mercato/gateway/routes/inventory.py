"""Stock: whether a product is in stock, for all callers, and how much, for staff."""

from __future__ import annotations

import datetime
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mercato.chassis.contract import MAX_ID, Actor, IdempotencyKeyReused, RequestInProgress, StaleVersion
from mercato.contracts import inventory as contract
from mercato.contracts.inventory import AdjustedLevel, Inventory, Level, LevelPage, SeenLevel
from mercato.contracts.products import ProductNotFound
from mercato.contracts.roles import ALL_ROLES, STAFF, STAFF_ONLY
from mercato.gateway.route import Input, Output, Page, Route, RouteRequest

Delta = Annotated[
    int,
    Meta(
        ge=-contract.ON_HAND_LIMIT,
        le=contract.ON_HAND_LIMIT,
        description="The number of pieces to add, or to take away where it is negative. Not 0.",
        examples=[12],
        extra_json_schema={"not": {"const": 0}},
    ),
]


class SetStockIn(Input):
    on_hand: contract.OnHand
    reason: contract.Reason = "counted"


class AdjustStockIn(Input):
    delta: Delta
    reason: contract.Reason


class StockQuery(Input):
    below: (
        Annotated[
            int,
            Meta(ge=1, le=contract.ON_HAND_LIMIT, description="Only products with fewer available pieces than this."),
        ]
        | None
    ) = None
    limit: Annotated[int, Meta(ge=1, le=contract.PAGE_LIMIT, description="How many at most.")] = 50
    after: Annotated[int, Meta(ge=1, le=MAX_ID, description="Only products with ids above this one.")] | None = None


class StockOut(Output):
    product_id: int
    on_hand: int
    reserved: int
    available: int
    updated_at: datetime.datetime | None
    version: int


class StockSeenOut(Output):
    """Callers other than staff get only `in_stock`; the rest is null for them."""

    product_id: int
    in_stock: bool
    on_hand: int | None
    reserved: int | None
    available: int | None
    updated_at: datetime.datetime | None
    version: int | None


def _seen(level: Level, actor: Actor) -> SeenLevel:
    if actor.role != STAFF:
        return SeenLevel(product_id=level.product_id, in_stock=level.available > 0)
    return SeenLevel(in_stock=level.available > 0, **msgspec.structs.asdict(level))


def _seen_out(level: SeenLevel) -> StockSeenOut:
    return StockSeenOut(**msgspec.structs.asdict(level))


def stock_out(level: Level) -> StockOut:
    return StockOut(
        product_id=level.product_id,
        on_hand=level.on_hand,
        reserved=level.reserved,
        available=level.available,
        updated_at=level.updated_at,
        version=level.version,
    )


def _page(page: LevelPage) -> Page:
    following = None if page.next_after is None else {"after": str(page.next_after)}
    return Page([stock_out(level) for level in page.levels], following)


def _adjusted_out(adjusted: AdjustedLevel) -> StockOut:
    return stock_out(adjusted.level)


def _version(level: Level | SeenLevel) -> int | None:
    return level.version or None  # 0: it was never counted


def _set(request: RouteRequest) -> contract.SetLevel:
    body: SetStockIn = request.body
    return contract.SetLevel(
        product_id=request.path["id"], on_hand=body.on_hand, reason=body.reason, version=request.if_match
    )


def _adjust(request: RouteRequest) -> contract.AdjustLevel:
    body: AdjustStockIn = request.body
    assert request.idempotency_key is not None, "the route requires one"
    return contract.AdjustLevel(
        product_id=request.path["id"],
        delta=body.delta,
        reason=body.reason,
        idempotency_key=request.idempotency_key,
        fingerprint=request.fingerprint,
    )


def _list(request: RouteRequest) -> contract.ListLevels:
    query: StockQuery = request.query
    return contract.ListLevels(below=query.below, after=query.after, limit=query.limit)


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="GET",
        path="/products/{id}/stock",
        operation=Inventory.levels,
        summary="Whether a product is in stock; for staff, how much",
        roles=ALL_ROLES,
        request=lambda request: contract.GetLevel(product_id=request.path["id"]),
        seen=_seen,
        answer=_seen_out,
        output=StockSeenOut,
        etag=_version,
        errors=(ProductNotFound,),
    ),
    Route(
        method="PUT",
        path="/products/{id}/stock",
        operation=Inventory.set,
        summary="Record how many pieces of a product were counted",
        roles=STAFF_ONLY,
        body=SetStockIn,
        examples={"counted": {"on_hand": 240}},
        request=_set,
        answer=stock_out,
        output=StockOut,
        etag=_version,
        if_match=True,
        errors=(ProductNotFound, contract.BelowReserved, StaleVersion),
    ),
    Route(
        method="POST",
        path="/products/{id}/stock/adjustments",
        operation=Inventory.adjust,
        summary="Receive pieces of a product, or write them off",
        roles=STAFF_ONLY,
        body=AdjustStockIn,
        examples={
            "received": {"delta": 12, "reason": "delivery 4711"},
            "written off": {"delta": -1, "reason": "broken in transit"},
        },
        request=_adjust,
        answer=_adjusted_out,
        output=StockOut,
        idempotency=True,
        idempotency_required=True,
        etag=lambda adjusted: adjusted.level.version,
        replayed=lambda adjusted: adjusted.replayed,
        errors=(ProductNotFound, contract.BelowReserved, IdempotencyKeyReused, RequestInProgress),
    ),
    Route(
        method="GET",
        path="/stock",
        operation=Inventory.list,
        summary="The stock of each product, or of those that run out (?below=)",
        roles=STAFF_ONLY,
        query=StockQuery,
        request=_list,
        answer=_page,
        output=list[StockOut],
    ),
)
