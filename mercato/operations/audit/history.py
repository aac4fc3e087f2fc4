"""The requests of clients and the answers that they got: the record that is in no database of the shop.

A load generator that records a `ClientOperation` for each request lets the audit check every answer.
"""

from __future__ import annotations

import datetime
from typing import Final, Literal

import msgspec

Outcome = Literal["final", "retryable", "unknown"]
"""`retryable`: 409 while another is in progress, 429, 502, 503, 504. `unknown`: there was no answer."""


class ClientOperation(msgspec.Struct, frozen=True):
    """One request, and what its client knows of its result."""

    op_id: str
    principal: str
    """As the shop stores it with a key: `user:17`, or the role of a caller without an account."""
    user_id: int
    """0 for a caller without an account."""
    role: str
    route: str
    """Method and template: `POST /orders`, `GET /orders/{id}`."""
    invoked_at: datetime.datetime
    outcome: Outcome
    completed_at: datetime.datetime | None = None
    status: int | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None
    """Equal for equal requests."""
    answer: str | None = None
    """A digest of the answer's body."""
    order_id: int | None = None
    """The order in the answer."""
    version: int | None = None
    """The version of that order in the answer."""


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
"""The columns of the table `history.ops`: the fields, in their order."""


def as_row(operation: ClientOperation) -> tuple[object, ...]:
    return msgspec.structs.astuple(operation)
