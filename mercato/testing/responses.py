"""An HTTP response of the clients of tests, and an assertion for problems."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import msgspec

RETRYABLE: Final = frozenset({409, 429, 503, 504})
"""Statuses that may ask the client to send the same request again."""


class Response(msgspec.Struct, frozen=True):
    """The names of `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The decoded body; None where it is empty or not JSON."""
        return json.loads(self.body) if self.body and "json" in self.headers.get("content-type", "") else None

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def code(self) -> str:
        """The code of a problem."""
        return self.json["code"]

    @property
    def wrong_fields(self) -> set[str]:
        return {error["field"] for error in self.json.get("errors", [])}

    @property
    def is_final(self) -> bool:
        """False when the shop asks for the same request again, or its outcome is unknown (504)."""
        return self.status != 504 and not (self.status in RETRYABLE and "retry-after" in self.headers)


def assert_problem(response: Response, status: int, code: str) -> None:
    """Asserts that a response is a complete RFC 9457 problem with this status and code."""
    assert response.status == status, response.body
    assert response.headers["content-type"] == "application/problem+json", response.headers
    assert response.code == code, response.body
    assert response.json["status"] == status
    # The problems of the server, which it answers before the API sees a request, have no page.
    assert response.json["type"] in (f"/docs/problems#{code}", "about:blank")
    assert response.json["title"]
    assert response.json["detail"]
    assert len(response.json["trace_id"]) == 32
    assert int(response.json["trace_id"], 16), "a trace id of zeros names no trace"
