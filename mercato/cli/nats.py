"""NATS, for the processes of a shop: its users and their permissions, and the server of `up --split`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, urlsplit

import msgspec

from mercato import topology
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.keys import nats_password, service_secrets
from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.hosting.settings import ServeSettings, SettingsError
from mercato.chassis.messaging.bridge import BATCH, Bridge, FeedBehind, FeedMessage, FeedPurged, ReadFeed
from mercato.chassis.rpc.transports.nats import NatsConnection, NatsRemote
from mercato.cli.environment import require_encryption
from mercato.cli.keeping import kept
from mercato.cli.progress import Progress
from mercato.contracts.events import CursorAhead, CursorTooOld, Events, ListEvents
from mercato.embedded_nats import EmbeddedNats, NatsUser
from mercato.embedded_postgres.folder import write_atomically

SETTING: Final = "NATS_URL"
SUBSCRIBER_FILE: Final = "subscriber.env"


def users(shop_secret: bytes) -> Sequence[NatsUser]:
    """A user for each caller, and one that reads the stream of the feed; each with only the rights that it needs.

    Passwords are derived from the secrets.
    """
    known: list[NatsUser] = []
    for name, secret in service_secrets(shop_secret, topology.NATS_USERS).items():
        allowed = topology.nats_permissions(name)
        known.append(NatsUser(name, nats_password(secret), allowed.publish, allowed.subscribe))
    return known


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


@contextlib.asynccontextmanager
async def embedded(
    data: Path, shop_secret: bytes, progress: Progress, give_up: Callable[[str], None]
) -> AsyncGenerator[str]:
    """A server on this machine for the time of the block, restarted when it dies; gives its URL.

    Meanwhile a file has the URL and user by which external consumers read the stream of the feed.
    """
    folder = data / "nats"
    folder.mkdir(mode=0o700, exist_ok=True)
    known = users(shop_secret)
    progress.step("starting NATS")
    server = await EmbeddedNats.start(folder, users=known, streams=folder / "streams")

    async def again(died: EmbeddedNats) -> EmbeddedNats:
        return await EmbeddedNats.start(folder, users=known, port=died.port, streams=folder / "streams")

    async with kept(server, again, "NATS", progress, give_up):
        secret = service_secrets(shop_secret, [topology.SUBSCRIBER])[topology.SUBSCRIBER]
        where = f"{topology.SUBSCRIBER}:{nats_password(secret)}@{server.url.removeprefix('nats://')}"
        file = folder / SUBSCRIBER_FILE
        write_atomically(file, f"{SETTING}=nats://{where}\n".encode())
        try:
            yield server.url
        finally:
            file.unlink(missing_ok=True)
