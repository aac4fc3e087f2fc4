"""The stream of the feed of a running shop that is split, as a subscriber reads it, and the store below it."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

import msgspec
import nats
import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig

from mercato.testing.process import Process, command_line
from mercato.testing.served import variables
from mercato.testing.waiting import BOUND_SECONDS

STREAM = "MERCATO_EVENTS"
PAGE = 200


def subscriber_file(data: Path) -> Path:
    return data / "nats" / "subscriber.env"


async def read_stream(data: Path) -> list[tuple[str, str, Any]]:
    """Subject, message id and body of all messages of the stream, in order, by a consumer that is made for it.

    None where there is no stream, or it goes away meanwhile.
    """
    url = variables(subscriber_file(data))["NATS_URL"]
    client = await nats.connect(url, inbox_prefix="_INBOX.subscriber", connect_timeout=int(BOUND_SECONDS))
    try:
        jetstream = client.jetstream(timeout=BOUND_SECONDS)
        name = f"reader-{secrets.token_hex(4)}"
        config = ConsumerConfig(durable_name=name, ack_policy=AckPolicy.NONE)
        left = (await jetstream.add_consumer(STREAM, config)).num_pending or 0
        reads = await jetstream.pull_subscribe_bind(name, STREAM)
        found: list[tuple[str, str, Any]] = []
        while len(found) < left:
            for message in await reads.fetch(min(PAGE, left - len(found)), timeout=BOUND_SECONDS):
                assert message.headers
                found.append((message.subject, message.headers["Nats-Msg-Id"], msgspec.json.decode(message.data)))
        await jetstream.delete_consumer(STREAM, name)
        return found
    except (nats.js.errors.APIError, nats.errors.TimeoutError, nats.errors.NoRespondersError):
        return []
    finally:
        await client.close()


def delete_store(shop: Process) -> None:
    """Kills the NATS server, which its owner starts again, and finds no stream any more."""
    store = shop.data / "nats" / "streams"
    away = store.with_name("streams.deleted")
    # Moved first: the server that is started again must not find it.
    store.rename(away)
    running = shop.count_lines("NATS is running again")
    shop.kill(next(p for p in shop.tree().others if _is_nats(p.pid)))
    shop.wait_for(lambda: shop.count_lines("NATS is running again") > running, "NATS is running again")
    shutil.rmtree(away)


def _is_nats(pid: int) -> bool:
    line = command_line(pid)
    return "nats-server" in line and "guard.py" not in line
