"""The security log: for staff, and for each account its own entries."""

from __future__ import annotations

import datetime
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mercato.chassis.contract import MAX_ID, Open
from mercato.contracts import users as contract
from mercato.contracts.roles import SIGNED_IN, STAFF_ONLY
from mercato.contracts.users import SecurityLogPage, Users
from mercato.gateway.problems import SignInFirst
from mercato.gateway.route import Input, Output, Page, Route, RouteRequest
from mercato.gateway.routes.users import me


class OwnLogQuery(Input):
    limit: Annotated[int, Meta(ge=1, le=contract.PAGE_LIMIT, description="How many at most.")] = 50
    before: Annotated[int, Meta(ge=1, le=MAX_ID, description="Only ids below this one.")] | None = None


class LogQuery(OwnLogQuery):
    account_id: (
        Annotated[int, Meta(ge=1, le=MAX_ID, description="Only what is about this account, or done by it.")] | None
    ) = None


class LogEntryOut(Output):
    """An id of 0: no account, or an unknown one."""

    id: int
    at: datetime.datetime
    kind: Open[contract.SecurityKind]
    account_id: Annotated[int, Meta(description="The account that it is about; of a refund, the owner of the order.")]
    actor_role: str
    actor_id: Annotated[int, Meta(description="The account that did it. In one's own entries, 0 for another account.")]
    address: Annotated[
        str, Meta(description="The address of the client; empty where it is not known, as of prices and refunds.")
    ]
    subject: Annotated[str, Meta(description="What else it is about: `product 100`, `order 1001`.")]
    detail: Annotated[
        str,
        Meta(
            description="What was changed: `99.99 USD to 89.99 USD`. Of a refund its id, and the total refunded of"
            " the order before and after it."
        ),
    ]


def _list(request: RouteRequest) -> contract.ListSecurityLog:
    query: LogQuery = request.query
    return contract.ListSecurityLog(account_id=query.account_id, before=query.before, limit=query.limit)


def _list_own(request: RouteRequest) -> contract.ListOwnSecurityLog:
    query: OwnLogQuery = request.query
    return contract.ListOwnSecurityLog(user_id=me(request), before=query.before, limit=query.limit)


def page_of_log(page: SecurityLogPage) -> Page:
    following = None if page.next_before is None else {"before": str(page.next_before)}
    return Page([LogEntryOut(**msgspec.structs.asdict(entry)) for entry in page.entries], following)


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="GET",
        path="/security-log",
        operation=Users.security_log,
        summary="Sign-ins, changes of accounts and prices, and refunds of the last 90 days, the newest first",
        roles=STAFF_ONLY,
        query=LogQuery,
        request=_list,
        answer=page_of_log,
        output=list[LogEntryOut],
    ),
    Route(
        method="GET",
        path="/users/me/security-log",
        operation=Users.own_security_log,
        summary="The entries of the security log about your own account, or about what it did; the newest first",
        roles=SIGNED_IN,
        query=OwnLogQuery,
        request=_list_own,
        answer=page_of_log,
        output=list[LogEntryOut],
        errors=(SignInFirst,),
    ),
)
