"""`mercato up --split` publishes the feed to JetStream, and says how to read it."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest

from embedded_nats.subscriber import delete_store, read_stream, subscriber_file
from mercato.testing.caller import Buyers, everything
from mercato.testing.process import Process
from mercato.testing.waiting import BOUND_SECONDS, until, wait_until

ORDERS = 10


@pytest.fixture(scope="module")
def shop(data: Path) -> Iterator[Process]:
    with Process(data, "--split", "--replicas", "events=2") as made:
        yield made.ready()
        made.stop()
        assert not subscriber_file(data).exists()


def placed_more(buyers: Buyers) -> None:
    before = len(buyers.placed)
    wait_until(lambda: len(buyers.placed) >= before + ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))


async def assert_same(shop: Process) -> None:
    """When nothing happens any more, the stream has what `GET /events` shows."""
    feed: list[Any] = []
    stream: list[Any] = []

    async def is_same() -> bool:
        nonlocal feed, stream
        with shop.caller() as caller:
            feed = everything(caller, "/events?limit=500")
        stream = list(await read_stream(shop.data))
        return [body for _, _, body in stream] == feed

    await until(is_same, "the stream has what the feed has")
    assert [(subject, id_) for subject, id_, _ in stream] == [
        (f"mercato.events.{entry['type']}", str(entry["position"])) for entry in feed
    ]


async def test_the_stream_has_the_feed_whatever_ends(shop: Process):
    assert stat.S_IMODE(subscriber_file(shop.data).stat().st_mode) == 0o600
    with Buyers(shop.caller) as buyers:
        placed_more(buyers)
        shop.kill(shop.tree().instances["events.1"])
        placed_more(buyers)
        delete_store(shop)
        placed_more(buyers)
    await assert_same(shop)


async def test_the_password_of_the_subscriber_opens_nothing_else(shop: Process):
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error))

    url = subscriber_file(shop.data).read_text().strip().removeprefix("NATS_URL=")
    client = await nats.connect(url, inbox_prefix="_INBOX.subscriber", error_cb=note)
    try:
        with pytest.raises(nats.errors.TimeoutError):
            await client.request("mercato.events.list", b"", timeout=1)
        assert ["mercato.events.list" in error for error in refused] == [True]
    finally:
        await client.close()
