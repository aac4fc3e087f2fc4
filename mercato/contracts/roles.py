"""Who calls, and what a caller may see. A caller that is signed in is a customer or staff; the others are anonymous."""

from __future__ import annotations

from typing import Final, Literal

from mercato.chassis.contract import Actor

Role = Literal["customer", "staff"]

ANONYMOUS: Final = "anonymous"
CUSTOMER: Final = "customer"
STAFF: Final = "staff"

EVERYBODY: Final = frozenset({ANONYMOUS, CUSTOMER, STAFF})
SIGNED_IN: Final = frozenset({CUSTOMER, STAFF})
STAFF_ONLY: Final = frozenset({STAFF})
SERVICES_ONLY: Final[frozenset[str]] = frozenset()
"""Nobody from outside: what services ask of each other."""


def may_see(actor: Actor, user_id: int) -> bool:
    """Customers see what is theirs; staff, and services on behalf of the shop, see all."""
    return actor.role != CUSTOMER or actor.id == user_id
