"""What clients have asked for and were told: the one witness that no database of the shop is.

A load generator that keeps one `ClientOperation` for each request lets the audit ask whether every answer was true.
"""

from __future__ import annotations

import datetime
from typing import Final, Literal

import msgspec

Outcome = Literal["final", "retryable", "unknown"]
"""`retryable`: 409 while another is in progress, 429, 502, 503, 504. `unknown`: there was no answer."""


class ClientOperation(msgspec.Struct, frozen=True):
    """One request, and what its client knows about it."""

    op_id: str
    principal: str
    """As the shop keeps it with a key: `user:17`, or the role of who has no account."""
    user_id: int
    """0 for who has no account."""
    role: str
    route: str
    """Method and template: `POST /orders`, `GET /orders/{id}`."""
    invoked_at: datetime.datetime
    outcome: Outcome
    completed_at: datetime.datetime | None = None
    status: int | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None
    """The same for requests that are the same."""
    answer: str | None = None
    """A digest of the body."""
    order_id: int | None = None
    """The order that the answer shows."""
    version: int | None = None
    """Of that order, as the answer shows it."""


COLUMNS: Final = {
    "op_id": "text",
    "principal": "text",
    "user_id": "bigint",
    "role": "text",
    "route": "text",
    "invoked_at": "timestamptz",
    "outcome": "text",
    "completed_at": "timestamptz",
    "status": "integer",
    "idempotency_key": "text",
    "fingerprint": "text",
    "answer": "text",
    "order_id": "bigint",
    "version": "integer",
}
"""Of the table `history.ops`: the fields, in their order."""


def as_row(operation: ClientOperation) -> tuple[object, ...]:
    return msgspec.structs.astuple(operation)
