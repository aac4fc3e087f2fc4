"""What happened to an order: its moves, and its timeline."""

from __future__ import annotations

import datetime
from typing import Annotated, Final

from msgspec import Meta

from mercato.chassis.contract import Open
from mercato.contracts import orders as contract
from mercato.contracts.order_history import History, HistoryAxis, HistoryEntry, Timeline, TimelineEntry
from mercato.contracts.order_refusals import OrderNotFound
from mercato.contracts.orders import Orders
from mercato.contracts.roles import SIGNED_IN
from mercato.gateway.cursors import SliceQuery
from mercato.gateway.route import Output, Page, Route
from mercato.gateway.validation import copier


class HistoryOut(Output):
    version: int
    axis: Open[HistoryAxis]
    before: str | None
    after: str
    reason: str
    by: str
    at: datetime.datetime
    internal_note: str
    limit_reason: Annotated[
        str, Meta(description="Of a refund or return that gave less than was asked: how much, and why.")
    ]


class TimelineOut(Output):
    at: datetime.datetime
    part: str
    what: str
    outcome: str
    attempts: int
    took_ms: int | None
    by: str
    detail: str
    internal_note: str


_timeline_entry_out: Final = copier(TimelineEntry, TimelineOut)
_history_entry_out: Final = copier(HistoryEntry, HistoryOut, "by")


def by(role: str, account_id: int) -> str:
    """`staff 7`; a role alone where the account is unknown, not shown, or none."""
    return f"{role} {account_id}" if account_id else role


def _timeline_out(timeline: Timeline) -> Page:
    return Page([_timeline_entry_out(entry) for entry in timeline.entries])


def _history_out(history: History) -> Page:
    return Page([_history_entry_out(entry, by=by(entry.actor_role, entry.actor_id)) for entry in history.entries])


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="GET",
        path="/orders/{id}/timeline",
        operation=Orders.timeline,
        summary="What happened to an order: its moves, its stock, its money, by time",
        roles=SIGNED_IN,
        takes_access_token=True,
        query=SliceQuery,
        request=lambda request: contract.GetTimeline(id=request.path["id"], access_token=request.access_token),
        answer=_timeline_out,
        output=list[TimelineOut],
        errors=(OrderNotFound,),
    ),
    Route(
        method="GET",
        path="/orders/{id}/history",
        operation=Orders.history,
        summary="Every move of an order, in order",
        roles=SIGNED_IN,
        takes_access_token=True,
        query=SliceQuery,
        request=lambda request: contract.GetHistory(id=request.path["id"], access_token=request.access_token),
        answer=_history_out,
        output=list[HistoryOut],
        errors=(OrderNotFound,),
    ),
)
