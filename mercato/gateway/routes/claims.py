"""Claims: an account takes over an order that its owner placed as a guest."""

from __future__ import annotations

from typing import Final

from mercato.contracts import order_refusals, orders as contract
from mercato.contracts.orders import Orders
from mercato.contracts.roles import SIGNED_IN
from mercato.gateway.problems import SignInFirst
from mercato.gateway.route import Input, Route, RouteRequest
from mercato.gateway.routes.orders import OrderOut, order_out


class ClaimIn(Input):
    access_token: contract.AccessToken


def _claim(request: RouteRequest) -> contract.ClaimOrder:
    if not request.actor.id:
        raise SignInFirst
    body: ClaimIn = request.body
    return contract.ClaimOrder(id=request.path["id"], access_token=body.access_token)


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="POST",
        path="/orders/{id}/claim",
        operation=Orders.claim,
        summary="Claim a guest's order for your account; its access token is not valid any more",
        roles=SIGNED_IN,
        body=ClaimIn,
        examples={"the token of the order": {"access_token": "p3uXUp0P0nbYt5Cc2iGqj4o5SgqUuGzX5mUe2E7rYtA"}},
        request=_claim,
        answer=order_out,
        output=OrderOut,
        etag=lambda order: order.version,
        errors=(
            SignInFirst,
            order_refusals.OrderNotFound,
            order_refusals.EmailNotProven,
            order_refusals.AnotherEmail,
            order_refusals.AlreadyClaimed,
            order_refusals.PaymentInProgress,
        ),
    ),
)
