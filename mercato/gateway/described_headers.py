"""The headers and query parameters that many operations have in common, as the API's description shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mercato.gateway import cursors

Json = dict[str, Any]

KEY_PATTERN: Final = r"""^([!#-~][!-~]{0,254}|"([!#-\[\]-~]|\\["\\]){1,255}")$"""
"""Bare, or a structured-field string (RFC 8941); `idempotency.py` reads both."""

HEADERS: Final[Mapping[str, Json]] = {
    "Allow": {
        "description": "The methods that the path takes.",
        "schema": {"type": "string", "examples": ["GET, HEAD, OPTIONS"]},
    },
    "ETag": {
        "description": "The version of the resource, for If-Match; of the catalogue, for If-None-Match as well.",
        "schema": {"type": "string", "pattern": '^(W/)?"[0-9a-z-]+"$', "examples": ['"1"']},
    },
    "Idempotent-Replayed": {
        "description": "Present when an earlier request with the same key has done this, and it was not done again. "
        "Idempotent operations that take no key, such as cancelling, are answered without it.",
        "schema": {"const": "true"},
    },
    "Link": {
        "description": "The next page; missing on the last.",
        "schema": {"type": "string", "pattern": '^<.+>; rel="next"$'},
    },
    "Location": {
        "description": "The path of the new resource. A refusal has it where the resource was created, and refused "
        "while the client waited for its result.",
        "schema": {"type": "string", "format": "uri-reference"},
    },
    "Preference-Applied": {
        "description": "Present when `Prefer: wait=N` was met, with the longest time in seconds. Missing where the "
        "wait ended early, as by a shop that stops: then the answer is the order as it is at that moment. Of a "
        "collection: present with Total-Count, when `Prefer: count=exact` was met.",
        "schema": {"type": "string", "pattern": "^(wait=[0-9]+|count=exact)$", "examples": ["wait=5"]},
    },
    "Retry-After": {
        "description": "Seconds after which trying again makes sense.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Total-Count": {
        "description": "How many entries the collection has with these filters, on all pages: present where "
        "`Prefer: count=exact` asked for it, and they could be counted in time.",
        "schema": {"type": "integer", "minimum": 0, "examples": [137]},
    },
    "WWW-Authenticate": {
        "description": "How to sign in.",
        "schema": {"type": "string", "examples": ['Bearer realm="mercato"']},
    },
    "X-Request-Id": {
        "description": "The X-Request-Id of the request, or a new one; it is in the logs of the shop.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 128},
    },
}

_IDEMPOTENCY_KEY: Final[Json] = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "pattern": KEY_PATTERN},
    "example": "0c5ce2f0-9d1c-4f0e-8f0b-6b7c1f8f4f57",
}

PARAMETERS: Final[Mapping[str, Json]] = {
    "AccessToken": {
        "name": "access_token",
        "in": "query",
        "description": "The access token of a guest's order, from the answer to its placing: with it, a caller without "
        "an account may do this for that order. It may come as `Authorization: Guest ACCESS_TOKEN` as well.",
        "schema": {"type": "string", "maxLength": 64},
    },
    "Cursor": {
        "name": cursors.CURSOR,
        "in": "query",
        "description": "Where the page begins: from the Link of the page before, for the same collection and filters.",
        "schema": {"type": "string", "maxLength": cursors.CURSOR_LENGTH},
    },
    "IdempotencyKey": {
        **_IDEMPOTENCY_KEY,
        "description": "A name of your own for this request: however often it is sent, it is done once, with the same "
        "answer. 1 to 255 printable ASCII characters without spaces; use a fresh UUID. A key creates one order, "
        "for ever.",
    },
    "RequiredIdempotencyKey": {
        **_IDEMPOTENCY_KEY,
        "required": True,
        "description": "A name of your own for this request: however often it is sent, it is done once, and never "
        "again. 1 to 255 printable ASCII characters without spaces; use a fresh UUID.",
    },
    "Prefer": {
        "name": "Prefer",
        "in": "header",
        "description": "`wait=N`: answer when the order is paid or refused, after N seconds at the latest, of which "
        "there can be 60. A refused order is answered as a problem with its Location; `details.payable_until` says "
        "until when it can be paid in another way. The key stays that of the order: a repetition gets the problem as "
        "long as the order is refused, and then the order. Without `wait`, the answer comes as soon as the order is "
        "durable: 201 says that it is accepted, not that it is paid or that there is enough in stock. "
        "Other preferences are ignored (RFC 7240).",
        "schema": {"type": "string"},  # any other preference is ignored (RFC 7240), not refused
        "example": "wait=5",
    },
    "PreferCount": {
        "name": "Prefer",
        "in": "header",
        "description": "`count=exact`: the answer says in Total-Count how many entries the collection has with these "
        "filters. Counting reads all of them: where that takes longer than two seconds, or too many requests count at "
        "once, the page comes without Total-Count and Preference-Applied. A request that counts has the low priority "
        "of a report. The number is counted right after the page. Other preferences are ignored (RFC 7240).",
        "schema": {"type": "string"},
        "example": "count=exact",
    },
    "IfNoneMatch": {
        "name": "If-None-Match",
        "in": "header",
        "description": "ETags of answers that you have: 304 without a body where one of them is still current.",
        "schema": {"type": "string"},
        "example": '"1"',
    },
    "LastEventId": {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "Of a stream: the `id` that you have seen last. The stream goes on after it, whichever process "
        "answers; browsers send it by themselves. 410 where the feed does not keep what follows any more.",
        "schema": {"type": "string", "pattern": r"^[0-9]{1,15}$"},
        "example": "69632",
    },
    "IfMatch": {
        "name": "If-Match",
        "in": "header",
        "description": "The ETag of the answer that you have seen: the change is made only if it is still current. "
        "`*`, or no header: the change is made to any version.",
        "schema": {"type": "string", "pattern": r'^(\*|(W/)?"[1-9][0-9]{0,8}(-in-stock)?")$'},
        "example": '"1"',
    },
}
