"""The stream of the bridge: its name, its limits, and what users of NATS need to write and to read it."""

from __future__ import annotations

import datetime
from typing import Any, Final

from mercato.chassis.rpc.transports.nats import Permissions, inbox_prefix

from .jetstream import API

STREAM: Final = "MERCATO_EVENTS"
SUBJECT: Final = "mercato.events"
SUBJECTS: Final = f"{SUBJECT}.*.*"

NANOSECONDS: Final = 1_000_000_000
KEPT_SECONDS: Final = 8 * 86_400
"""A day longer than the feed keeps its entries. In an empty stream the bridge begins with the oldest entry of the
feed: if the stream deleted entries first, the bridge would publish them again."""
DUPLICATES_SECONDS: Final = 1
"""The server keeps the id of each message in memory for so long, by default for two minutes: a million ids of a busy
shop. The bridge does not need them, for each batch names the number that it follows."""
STREAM_BYTES_MAX: Final = 4 * 1024**3
"""About six million events. A stream that is full refuses new messages, and does not delete what is still unread."""
SEQUENCES_A_MILLISECOND: Final = 2_048
"""More than can be stored. JavaScript represents the numbers of streams that are created before 2109 exactly."""

CONFIGURATION: Final[dict[str, Any]] = {
    "name": STREAM,
    "description": "The feed of events of the shop, in order. The message id is the position.",
    "subjects": [SUBJECTS],
    "storage": "file",
    "retention": "limits",
    "discard": "new",
    "max_age": KEPT_SECONDS * NANOSECONDS,
    "max_bytes": STREAM_BYTES_MAX,
    "duplicate_window": DUPLICATES_SECONDS * NANOSECONDS,
    "num_replicas": 1,
    "allow_atomic": True,
}


def configuration(now: datetime.datetime) -> dict[str, Any]:
    """The configuration of a new stream: its sequence numbers are higher than those of any earlier one of its name."""
    return {**CONFIGURATION, "first_seq": int(now.timestamp() * 1_000) * SEQUENCES_A_MILLISECOND}


BRIDGE_PUBLISHES: Final = (
    SUBJECTS,
    f"{API}.STREAM.INFO.{STREAM}",
    f"{API}.STREAM.CREATE.{STREAM}",
    f"{API}.STREAM.MSG.GET.{STREAM}",
)
"""The subjects to which the user of a bridge publishes."""


def subscriber_permissions(user: str) -> Permissions:
    """The permissions of a user that only reads the stream, by its own consumers."""
    consumer = f"{API}.CONSUMER"
    return Permissions(
        publish=(
            f"{API}.STREAM.INFO.{STREAM}",
            f"{consumer}.CREATE.{STREAM}.>",
            f"{consumer}.DURABLE.CREATE.{STREAM}.*",
            f"{consumer}.INFO.{STREAM}.*",
            f"{consumer}.NAMES.{STREAM}",
            f"{consumer}.LIST.{STREAM}",
            f"{consumer}.DELETE.{STREAM}.*",
            f"{consumer}.MSG.NEXT.{STREAM}.*",
            f"$JS.ACK.{STREAM}.>",
        ),
        subscribe=(f"{inbox_prefix(user)}.>",),
    )
