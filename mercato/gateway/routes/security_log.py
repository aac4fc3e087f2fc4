"""The security log, for staff."""

from __future__ import annotations

import datetime
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mercato.chassis.contract import MAX_ID, Open
from mercato.contracts import users as contract
from mercato.contracts.roles import STAFF_ONLY
from mercato.contracts.users import SecurityLogPage, Users
from mercato.gateway.route import Input, Output, Page, Route, RouteRequest


class LogQuery(Input):
    account_id: (
        Annotated[int, Meta(ge=1, le=MAX_ID, description="Only what is about this account, or done by it.")] | None
    ) = None
    limit: Annotated[int, Meta(ge=1, le=contract.PAGE_LIMIT, description="How many at most.")] = 50
    before: Annotated[int, Meta(ge=1, le=MAX_ID, description="Only ids below this one.")] | None = None


class LogEntryOut(Output):
    """0 as an id: there is no account, or none is known."""

    id: int
    at: datetime.datetime
    kind: Open[contract.SecurityKind]
    account_id: int
    actor_role: str
    actor_id: int
    address: str
    subject: str
    detail: str


def _list(request: RouteRequest) -> contract.ListSecurityLog:
    query: LogQuery = request.query
    return contract.ListSecurityLog(account_id=query.account_id, before=query.before, limit=query.limit)


def _page(page: SecurityLogPage) -> Page:
    following = None if page.next_before is None else {"before": str(page.next_before)}
    return Page([LogEntryOut(**msgspec.structs.asdict(entry)) for entry in page.entries], following)


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="GET",
        path="/security-log",
        operation=Users.security_log,
        summary="Sign-ins and changes of the last 90 days: who, to which account, when, from where; the newest first",
        roles=STAFF_ONLY,
        query=LogQuery,
        request=_list,
        answer=_page,
        output=list[LogEntryOut],
    ),
)
