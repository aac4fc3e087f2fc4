"""The description of the shop's events (AsyncAPI 3), derived from the contracts that declare them.

An event that is added to a contract is described without a change here: its type, its message, and where it comes: the
streams over HTTP, and the stream of the bridge to JetStream.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from mercato import __version__
from mercato.chassis.contract import MAX_ID, Contract, Message
from mercato.contracts.inventory import Inventory
from mercato.contracts.orders import Orders
from mercato.contracts.payments import Payments
from mercato.contracts.products import Products
from mercato.gateway import schemas
from mercato.gateway.routes.orders import OrderOut
from mercato.gateway.streams.entries import EventOut
from mercato.gateway.streams.opening import MEDIA_TYPE

Json = dict[str, Any]

VERSION: Final = "3.0.0"
SOURCES: Final[tuple[type[Contract], ...]] = (Products, Inventory, Orders, Payments)
"""The contracts that declare events."""
SUBJECT_OF_NATS: Final = "mercato.events"
"""The subject of an event of the bridge begins with it (`chassis/messaging/stream.py`; a test compares)."""
SNAPSHOT: Final = "order"
JSON: Final = "application/json"


class Described(msgspec.Struct, frozen=True):
    """A type of events."""

    type: str
    service: str
    message: type[Message]

    @property
    def about(self) -> str:
        """The docstring of its message."""
        return inspect.cleandoc(self.message.__dict__.get("__doc__") or "")


def events() -> Sequence[Described]:
    """All types of events, by service."""
    return [Described(name, source.service, message) for source in SOURCES for name, message in source.events.items()]


def document() -> Json:
    """The AsyncAPI document."""
    found = events()
    models = [*dict.fromkeys(one.message for one in found), EventOut, OrderOut]
    references, named = schemas.components(models)
    by_model = dict(zip(models, references, strict=True))
    of_orders = [one for one in found if one.service == Orders.service]
    channels: dict[str, Json] = {
        "feed": _channel(
            "/events", "All events, in the order in which the feed received them.", [one.type for one in found]
        ),
        "order": _channel(
            "/orders/{id}/events",
            "The order as it is, then its events.",
            [SNAPSHOT, *(one.type for one in of_orders)],
            parameters={"id": {"description": f"The id of the order, from 1 to {MAX_ID}."}},
        ),
        **{f"jetstream.{one.type}": _subject(one) for one in found},
    }
    return {
        "asyncapi": VERSION,
        "info": {
            "title": "Mercato: events",
            "version": __version__,
            "description": INTRODUCTION,
            "license": {"name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": JSON,
        "servers": SERVERS,
        "channels": channels,
        "operations": {name: _sending(name, channel) for name, channel in channels.items()},
        "components": {
            "messages": {
                SNAPSHOT: _snapshot(by_model[OrderOut]),
                **{one.type: _message(one, by_model[EventOut], by_model[one.message]) for one in found},
            },
            "schemas": dict(sorted(named.items())),
        },
    }


INTRODUCTION: Final = f"""\
What has happened in the shop, as events. Over HTTP they come as Server-Sent Events to a client that sends \
`Accept: {MEDIA_TYPE}`: `id` is the position in the feed, `event` the type, `data` the payload described here. \
A client that comes back sends the last `id` as `Last-Event-ID`, and misses nothing; browsers do so by themselves. \
A shop with NATS publishes the same payloads to the JetStream stream `MERCATO_EVENTS`, with the position as \
`Nats-Msg-Id`.

Delivery is at least once, in order for each subject; `id` in the payload is the same at every delivery, and `version` \
says where an event belongs. Amounts are integers of minor units. New fields and types may be added: ignore those that \
you do not know."""

SERVERS: Final[Mapping[str, Json]] = {
    "shop": {"host": "localhost:8080", "protocol": "http", "description": "The API; the port is the default one."},
    "nats": {
        "host": "localhost:4222",
        "protocol": "nats",
        "description": "JetStream, where the shop runs with NATS. The credentials are those of the subscriber.",
    },
}


def _channel(address: str, about: str, types: Sequence[str], **more: Any) -> Json:
    return {"address": address, "description": about, "servers": [_at("servers", "shop")], **more, **_messages(types)}


def _subject(event: Described) -> Json:
    return {
        "address": f"{SUBJECT_OF_NATS}.{event.type}",
        "servers": [_at("servers", "nats")],
        **_messages([event.type]),
    }


def _messages(types: Sequence[str]) -> Json:
    return {"messages": {name: _at("components/messages", name) for name in types}}


def _sending(name: str, channel: Json) -> Json:
    return {
        "action": "send",
        "channel": _at("channels", name),
        "messages": [_at(f"channels/{name}/messages", kind) for kind in channel["messages"]],
    }


def _message(event: Described, envelope: Json, data: Json) -> Json:
    payload = {
        "allOf": [
            envelope,
            {"type": "object", "properties": {"type": {"const": event.type}, "data": data}},
        ]
    }
    about = {"description": event.about} if event.about else {}
    return {
        "name": event.type,
        "title": event.type,
        "contentType": JSON,
        **about,
        "tags": [{"name": event.service}],
        "payload": payload,
    }


def _snapshot(order: Json) -> Json:
    about = "The first message of the stream of an order: the order, as GET /orders/{id} answers it."
    return {"name": SNAPSHOT, "title": SNAPSHOT, "contentType": JSON, "description": about, "payload": order}


def _at(place: str, name: str) -> Json:
    return {"$ref": f"#/{place}/{name}"}
