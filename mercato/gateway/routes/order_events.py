"""The events of one order, as a stream."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from mercato.chassis.contract import MAX_ID
from mercato.contracts import orders as contract
from mercato.contracts.events import CursorAhead, CursorTooOld
from mercato.contracts.order_refusals import OrderNotFound
from mercato.contracts.orders import Orders
from mercato.contracts.roles import SIGNED_IN
from mercato.gateway.route import Input, Route, RouteRequest, Streamed
from mercato.gateway.routes.events import EventTypes, types_of
from mercato.gateway.routes.orders import OrderOut, order_out


class OrderEventsQuery(Input):
    after: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=MAX_ID,
                description="Begin after this position, and not with the order as it is; 0: with its first event that "
                "is kept. Last-Event-ID counts more, so that a browser that comes back continues.",
            ),
        ]
        | None
    ) = None
    types: EventTypes | None = None


def _get(request: RouteRequest) -> contract.GetOrder:
    types_of(request.query)
    return contract.GetOrder(id=request.path["id"], access_token=request.access_token)


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="GET",
        path="/orders/{id}/events",
        operation=Orders.get,
        summary="The events of an order as they happen, and first the order as it is",
        roles=SIGNED_IN,
        takes_access_token=True,
        query=OrderEventsQuery,
        request=_get,
        answer=order_out,
        output=OrderOut,
        errors=(OrderNotFound, CursorAhead, CursorTooOld),
        stream=Streamed(
            kind="order",
            operation=Orders.get,
            request=_get,
            query=OrderEventsQuery,
            subject=lambda request: f"order {request.path['id']}",
            snapshot=order_out,
            is_only=True,
        ),
    ),
)
