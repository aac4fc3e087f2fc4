"""Examples of streams, for the descriptions of the API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec

from mercato.gateway import examples
from mercato.gateway.route import Route

from .entries import message

EXAMPLE_POSITION = 69_632


def streamed_example(route: Route) -> str:
    """The beginning of the stream of a route: its snapshot, or an event."""
    assert route.stream is not None, "the route has a stream"
    body: Any = examples.answer(route)
    if isinstance(body, list):
        body = cast(list[Any], body)[0]
        name, position = str(body["type"]), int(body["position"])
    else:
        name, position = route.stream.kind, EXAMPLE_POSITION
    return message(position, name, msgspec.json.encode(cast(Mapping[str, Any], body))).decode()
