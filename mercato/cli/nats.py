"""How a process of a shop uses NATS: the connections of its services, and the feed that it publishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import SplitResult, urlsplit

import msgspec

from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.keys import nats_password
from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.hosting.settings import ServeSettings, SettingsError
from mercato.chassis.messaging.bridge import BATCH, Bridge, FeedBehind, FeedMessage, FeedPurged, ReadFeed
from mercato.chassis.rpc.transports.nats import NatsConnection, NatsRemote
from mercato.cli.environment import require_encryption
from mercato.contracts.events import CursorAhead, CursorTooOld, Events, ListEvents

SETTING: Final = "NATS_URL"


def connections(secrets: Mapping[str, bytes], settings: ServeSettings) -> Mapping[str, NatsConnection]:
    """A connection for each caller of this process, by NATS_URL: with the user that it names, else with its own.

    Raises `SettingsError`.
    """
    assert settings.nats_url is not None
    url = settings.nats_url.get_secret_value()
    parts = _parsed(url)
    host = parts.hostname if parts else None
    if parts is None or host is None or parts.scheme not in ("nats", "tls"):
        form = "nats://127.0.0.1:4222, or tls://HOST:4222"
        raise SettingsError(f"The setting {SETTING} is not valid: write it as {form}.")
    require_encryption(f"The setting {SETTING}", host, settings, is_encrypted=parts.scheme == "tls")
    bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return {
        name: NatsConnection(
            bare,
            parts.username or name,
            parts.password or nats_password(secret),
            name,
            tls_ca=settings.tls_ca,
        )
        for name, secret in secrets.items()
    }


def _parsed(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for a wrong port
    except ValueError:
        return None
    return parts


def feed_reader(events: Events) -> ReadFeed:
    """Reads the feed for the bridge: each entry as `GET /events` shows it."""

    async def read(after: int) -> Sequence[FeedMessage]:
        try:
            page = await events.list(ListEvents(after=after, limit=BATCH))
        except CursorTooOld as error:
            raise FeedPurged(error.oldest) from error
        except CursorAhead as error:
            raise FeedBehind(error.last) from error
        return [
            FeedMessage(entry.position, entry.type, msgspec.json.encode(entry), entry.traceparent)
            for entry in page.entries
        ]

    return read


async def bridge_events(host: Host, remote: NatsRemote) -> None:
    """If this process serves the feed, it also publishes it to JetStream. Called before `host` is opened."""
    name = Events.service
    if name not in host.services:
        return
    bridge = Bridge(feed_reader(host.client(Events, name)), remote.connection(name), host.clock, host.telemetry)
    await bridge.open()
    host.services[name].database.on_commit.append(bridge.wake)
    # `follow` has its own pause, which a wake-up ends.
    host.also_run(name, PeriodicTask("bridge", bridge.follow, 0.0, limit=0, on_failure=bridge.note_failure))
