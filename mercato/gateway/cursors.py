"""Cursors: where the next page of a collection begins, in the same form for all collections.

A cursor encodes the parameters of the next page (`after`, `before`), which mean something else in each collection. It
belongs to its path and filters: with others it is refused, instead of giving a page that begins anywhere. It is no
secret, and gives no access that its parameters would not give.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final
from urllib.parse import parse_qsl, urlencode

import msgspec
from msgspec import Meta

from mercato.chassis.contract import MAX_ID, InvalidRequest
from mercato.gateway.asgi import Scope
from mercato.gateway.route import Input, Page, Route
from mercato.gateway.validation import QUERY_FIELDS_LIMIT, invalid

CURSOR: Final = "cursor"
CURSOR_LENGTH: Final = 4_096
SLICE_LIMIT: Final = 200

_POSITIONS: Final = frozenset({"after", "before"})
_NO_FILTERS: Final = _POSITIONS | {CURSOR, "limit", "access_token"}
_MARK: Final = CURSOR.encode() + b"="


class SliceQuery(Input):
    """The query of a collection whose operation gives all entries: the gateway answers with a part of them."""

    limit: Annotated[int, Meta(ge=1, le=SLICE_LIMIT, description="How many at most; all without it.")] | None = None
    after: Annotated[int, Meta(ge=0, le=MAX_ID, description="Without so many at the beginning.")] = 0


class _Token(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    filters: str
    position: dict[str, str]


_decode: Final = msgspec.json.Decoder(_Token).decode


def is_paged(route: Route) -> bool:
    """Whether a route answers a collection in pages."""
    return route.query is not None and "limit" in route.query.__struct_fields__


def opened(path: str, query: bytes) -> bytes:
    """A query with the parameters that its cursor encodes. Raises `InvalidRequest` for a cursor of another list."""
    if _MARK not in query:
        return query
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=QUERY_FIELDS_LIMIT)
    except ValueError:
        return query  # `decode_query` refuses it as a whole
    tokens = [value for name, value in pairs if name == CURSOR]
    rest = [(name, value) for name, value in pairs if name != CURSOR]
    if len(tokens) != 1:
        if not tokens:
            return query
        raise _refusal("is given more than once")
    if any(name in _POSITIONS for name, _ in rest):
        raise _refusal("stands for after and before; give it alone")
    position = _position(tokens[0], _filters(path, rest))
    if position is None:
        raise _refusal("is not a cursor of this collection with these filters; begin without it")
    return urlencode([*rest, *position.items()]).encode()


def link(scope: Scope, position: Mapping[str, str]) -> bytes:
    """The Link field of the page at this position."""
    pairs = parse_qsl(str(scope["query_string"], "ascii"), keep_blank_values=True)
    rest = [(name, value) for name, value in pairs if name != CURSOR and name not in _POSITIONS]
    token = msgspec.json.encode(_Token(_filters(scope["path"], rest), dict(position)))
    cursor = base64.urlsafe_b64encode(token).rstrip(b"=").decode()
    return f'link: <{scope["path"]}?{urlencode([*rest, (CURSOR, cursor)])}>; rel="next"'.encode()


def sliced(page: Page, query: Any) -> Page:
    """The part of a whole collection that `query` asks for, where it is a `SliceQuery`."""
    if not isinstance(query, SliceQuery) or (query.limit is None and not query.after):
        return page
    end = None if query.limit is None else query.after + query.limit
    is_last = end is None or end >= len(page.items)
    return Page(page.items[query.after : end], None if is_last else {"after": str(end)})


def _filters(path: str, pairs: Iterable[tuple[str, str]]) -> str:
    """A short digest of the path and filters."""
    kept = sorted((name, value) for name, value in pairs if name not in _NO_FILTERS)
    return hashlib.blake2b(msgspec.json.encode((path, kept)), digest_size=6).hexdigest()


def _position(token: str, filters: str) -> Mapping[str, str] | None:
    try:
        if len(token) > CURSOR_LENGTH:
            return None
        found = _decode(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return None
    return found.position if found.filters == filters and found.position.keys() <= _POSITIONS else None


def _refusal(message: str) -> InvalidRequest:
    return invalid((f"?{CURSOR}", message))
