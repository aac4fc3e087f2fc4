"""The callers that tests act as."""

from __future__ import annotations

from typing import Final

from mercato.chassis.contract import SERVICE_ROLE, Actor

SERVICE: Final = Actor(SERVICE_ROLE)
STAFF: Final = Actor("staff", 9)
ALICE: Final = Actor("customer", 1)
BOB: Final = Actor("customer", 2)
