"""Who calls, and what a caller may see. A caller that is signed in is a customer or staff; the others are anonymous.

An anonymous caller may order as a guest. A guest's order has the user `GUEST_USER`, and an access token: who sends that
may see, pay and cancel this order.
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
"""Instead of the id of a user: the order is a guest's."""

EVERYBODY: Final = frozenset({ANONYMOUS, CUSTOMER, STAFF})
SIGNED_IN: Final = frozenset({CUSTOMER, STAFF})
STAFF_ONLY: Final = frozenset({STAFF})
SERVICES_ONLY: Final[frozenset[str]] = frozenset()
"""Nobody from outside: what services ask of each other."""


def may_see(actor: Actor, user_id: int) -> bool:
    """Customers see what is theirs; staff, and services on behalf of the shop, see all; the others nothing."""
    if actor.role == CUSTOMER:
        return actor.id == user_id
    return actor.role not in (ANONYMOUS, GUEST)


def is_staff_account(actor: Actor) -> bool:
    """True for an actor whose access token says that its account is staff; the account may say otherwise by now."""
    return actor.role == STAFF and actor.id != 0
