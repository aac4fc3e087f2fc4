"""The NATS server that `up --split` brings along: its users and their permissions, and where others find it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Final

from mercato import topology
from mercato.chassis.hosting.keys import nats_password, service_secrets
from mercato.cli.keeping import kept
from mercato.cli.nats import SETTING
from mercato.cli.progress import Progress
from mercato.embedded_nats import EmbeddedNats, NatsUser
from mercato.embedded_postgres.folder import write_atomically

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
