"""All data of an account: its owner can export it, or erase it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Final

from msgspec import Meta

from mercato.contracts import users as contract
from mercato.contracts.orders import ListOrders, Orders
from mercato.contracts.payments import ListPayments, Payments
from mercato.contracts.roles import SIGNED_IN
from mercato.contracts.users import ListOwnSecurityLog, ListSessions, SessionPage, User, Users
from mercato.gateway.problems import SignInFirst
from mercato.gateway.route import Gathered, Input, Output, Page, Part, Route, RouteRequest
from mercato.gateway.routes.orders import OrderOut, page_of as page_of_orders
from mercato.gateway.routes.payments import PaymentOut, page_of as page_of_payments
from mercato.gateway.routes.security_log import LogEntryOut, page_of_log
from mercato.gateway.routes.users import CREDENTIALS, UserOut, me, nothing, own, user_out

PAGE: Final = 200


class EraseIn(Input):
    password: contract.Password


class ExportedSessionOut(Output):
    id: contract.SessionId
    created_at: datetime.datetime
    last_used_at: datetime.datetime
    expires_at: datetime.datetime


class ExportOut(Output):
    """Dates, amounts and names have the forms of the other answers of the API."""

    account: UserOut
    sessions: list[ExportedSessionOut]
    orders: list[OrderOut]
    payments: list[PaymentOut]
    security_log: list[LogEntryOut]
    next: Annotated[
        Mapping[str, str], Meta(description="Of each list that has more entries: the path that gives the next ones.")
    ]


def _export(gathered: Gathered) -> ExportOut:
    return ExportOut(account=user_out(gathered.answer), next=gathered.next, **gathered.parts)


def _no_filter(_: User) -> Mapping[str, str]:
    return {}


def _of_user(user: User) -> Mapping[str, str]:
    """A filter by owner: without it, the lists of staff have those of all accounts."""
    return {"user_id": str(user.id)}


def _sessions(user: User, query: Mapping[str, str]) -> ListSessions:
    return ListSessions(user_id=user.id, after=query.get("after"), limit=PAGE)


def _page_of_sessions(page: SessionPage) -> Page:
    shown = [
        ExportedSessionOut(id=s.id, created_at=s.created_at, last_used_at=s.last_used_at, expires_at=s.expires_at)
        for s in page.sessions
    ]
    return Page(shown, None if page.next_after is None else {"after": page.next_after})


def _orders(user: User, query: Mapping[str, str]) -> ListOrders:
    return ListOrders(user_id=user.id, before=_before(query), limit=PAGE)


def _payments(user: User, query: Mapping[str, str]) -> ListPayments:
    return ListPayments(user_id=user.id, before=_before(query), limit=PAGE)


def _security_log(user: User, query: Mapping[str, str]) -> ListOwnSecurityLog:
    return ListOwnSecurityLog(user_id=user.id, before=_before(query), limit=PAGE)


def _before(query: Mapping[str, str]) -> int | None:
    return int(query["before"]) if "before" in query else None


def _erase(request: RouteRequest) -> contract.EraseAccount:
    body: EraseIn = request.body
    return contract.EraseAccount(
        id=me(request), password=body.password, session_id=request.session_id or None, address=request.address
    )


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="GET",
        path="/users/me/export",
        operation=Users.get,
        summary="All data of your account: itself, its sessions, orders, payments, and its security log",
        roles=SIGNED_IN,
        request=lambda request: contract.GetUser(id=me(request)),
        parts=(
            Part("sessions", "/users/me/sessions", Users.sessions, _no_filter, _sessions, _page_of_sessions),
            Part("orders", "/orders", Orders.list, _of_user, _orders, page_of_orders),
            Part("payments", "/payments", Payments.list, _of_user, _payments, page_of_payments),
            Part(
                "security_log",
                "/users/me/security-log",
                Users.own_security_log,
                _no_filter,
                _security_log,
                page_of_log,
            ),
        ),
        answer=_export,
        output=ExportOut,
        limits=CREDENTIALS,
        errors=(SignInFirst,),
    ),
    Route(
        method="DELETE",
        path="/users/me",
        operation=Users.erase,
        summary="Erase your own account for ever; orders and payments stay, without the person. It may be repeated",
        roles=SIGNED_IN,
        knows_session=True,
        knows_address=True,
        takes_ended_session=True,
        body=EraseIn,
        examples={"with the password": {"password": "demo-password"}},
        request=_erase,
        tries=own,
        answer=nothing,
        output=None,
        status=204,
        limits=CREDENTIALS,
        errors=(
            SignInFirst,
            contract.SessionEnded,
            contract.WrongCredentials,
            contract.LastStaffMember,
            contract.TooManyHashes,
        ),
    ),
)
