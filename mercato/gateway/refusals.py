"""Refusals as the API's description shows them: errors of operations, and what the server answers before the API."""

from __future__ import annotations

from typing import Any

import msgspec

from mercato.chassis.contract import ServiceError
from mercato.gateway import examples, problems


class Shown(msgspec.Struct, frozen=True):
    """A refusal with the body of its answer.

    `retries`: whether it has Retry-After; `is_located`: whether it has Location; `is_replayed`: whether it may be the
    answer of an earlier request with the same key.
    """

    status: int
    title: str
    code: str
    sentence: str
    body: dict[str, Any]
    retries: bool
    is_located: bool = False
    is_replayed: bool = False


def of_error(kind: type[ServiceError], *, is_located: bool = False) -> Shown:
    error = examples.error(kind)
    status, body = problems.status_of(error), examples.problem(error)
    retries = error.retry_after_s is not None
    is_replayed = problems.REPLAYED in error.fields
    return Shown(status, problems.TITLES[status], error.code, str(error), body, retries, is_located, is_replayed)


def of_server(*, takes_body: bool) -> list[Shown]:
    """The refusals of the server that any request can get. Only operations with a body can get 413."""
    found = [
        Shown(
            refusal.status,
            problems.TITLES.get(refusal.status, refusal.title),
            refusal.code,
            refusal.detail,
            msgspec.json.decode(refusal.answer(()).partition(b"\r\n\r\n")[2]) | {"trace_id": examples.TRACE_ID},
            refusal.retry_after_seconds is not None,
        )
        for refusal in examples.server_refusals()
    ]
    return [refusal for refusal in found if takes_body or refusal.status != 413]
