"""The roles of callers, and what they may see. A signed-in caller is a customer or staff; the others are anonymous.

An anonymous caller may order as a guest. A guest's order has the user `GUEST_USER`, and an access token: a caller with
the token may see, pay and cancel this order.
"""

from __future__ import annotations

from typing import Final, Literal

from mercato.chassis.contract import GUEST_ROLE, Actor

Role = Literal["customer", "staff"]

ANONYMOUS: Final = "anonymous"
CUSTOMER: Final = "customer"
STAFF: Final = "staff"
GUEST: Final = GUEST_ROLE
GUEST_USER: Final = 0
"""The user id of a guest's order."""

ALL_ROLES: Final = frozenset({ANONYMOUS, CUSTOMER, STAFF})
SIGNED_IN: Final = frozenset({CUSTOMER, STAFF})
STAFF_ONLY: Final = frozenset({STAFF})
SERVICES_ONLY: Final[frozenset[str]] = frozenset()
"""No caller of the API: operations that only services call."""


def may_see(actor: Actor, user_id: int) -> bool:
    """Customers see their own data; staff, and services on behalf of the shop, see all; others see nothing."""
    if actor.role == CUSTOMER:
        return actor.id == user_id
    return actor.role not in (ANONYMOUS, GUEST)


def is_staff_account(actor: Actor) -> bool:
    """True for an actor whose access token says staff; the role of its account may have changed since."""
    return actor.role == STAFF and actor.id != 0
