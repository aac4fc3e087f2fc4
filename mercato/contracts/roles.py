"""Who calls. Everybody who is signed in is a customer or staff; who is not is anonymous."""

from __future__ import annotations

from typing import Final, Literal

Role = Literal["customer", "staff"]

ANONYMOUS: Final = "anonymous"
CUSTOMER: Final = "customer"
STAFF: Final = "staff"

EVERYBODY: Final = frozenset({ANONYMOUS, CUSTOMER, STAFF})
SIGNED_IN: Final = frozenset({CUSTOMER, STAFF})
STAFF_ONLY: Final = frozenset({STAFF})
SERVICES_ONLY: Final[frozenset[str]] = frozenset()
"""Nobody from outside: what services ask of each other."""
