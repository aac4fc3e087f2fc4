"""The embedded NATS server: who may connect, how it is started again, and that it ends with its owner."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import nats
import nats.errors
import pytest

from embedded_nats.broker import PASSWORD, user
from mercato.chassis.rpc.transports.nats.nats_py import NatsClient
from mercato.embedded_nats import EmbeddedNats, NatsUser
from mercato.embedded_postgres import SupervisorError, processes
from mercato.testing.waiting import until_true

OWNER = """
import asyncio, pathlib, sys
from mercato.embedded_nats import EmbeddedNats, NatsUser

async def own():
    server = await EmbeddedNats.start(pathlib.Path(sys.argv[1]), users=[NatsUser("one", "password", (), ())])
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(own())
"""


USERS = [user("one")]


async def is_accepted(url: str, name: str = "one", password: str = PASSWORD) -> bool:
    async def ignore(_: Exception) -> None:
        """The error is also raised."""

    client = NatsClient(needs_tls=False)
    try:
        await client.connect(url, user=name, password=password, error_cb=ignore)
    except nats.errors.Error:
        return False
    finally:
        await client.end(0.0)  # nats-py leaves the connection of a refused client open
    return True


async def test_a_client_needs_a_name_and_its_password(tmp_path: Path):
    server = await EmbeddedNats.start(tmp_path, users=[user("one"), NatsUser("two", "another-one", (), ())])
    try:
        assert await is_accepted(server.url)
        assert not await is_accepted(server.url, password="wrong")
        assert not await is_accepted(server.url, name="two")
        assert not await is_accepted(server.url, name="three")
        assert (tmp_path / "nats-server.conf").stat().st_mode & 0o777 == 0o600
    finally:
        await server.stop()
    assert processes.process_at(server.pid) is None


async def test_a_user_without_subjects_may_not_publish_nor_subscribe_any(tmp_path: Path):
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error))

    server = await EmbeddedNats.start(tmp_path, users=[NatsUser("one", PASSWORD, (), ())])
    try:
        client = await nats.connect(server.url, user="one", password=PASSWORD, error_cb=note)
        await client.publish("subject", b"")
        await client.subscribe("subject")
        await until_true(lambda: len(refused) == 2)
        await client.close()
    finally:
        await server.stop()
    assert [' for publish to "subject"' in refused[0], ' for subscription to "subject"' in refused[1]] == [True, True]


async def test_a_password_is_not_shown(tmp_path: Path):
    assert PASSWORD not in repr(user("one"))


async def test_a_killed_server_starts_again_on_the_same_port(tmp_path: Path):
    first = await EmbeddedNats.start(tmp_path, users=USERS)
    os.kill(first.pid, signal.SIGKILL)
    assert await first.died() == f"NATS (pid {first.pid}) is gone: it was killed by SIGKILL."
    await first.stop()
    second = await EmbeddedNats.start(tmp_path, users=USERS, port=first.port)
    try:
        assert second.port == first.port
        assert await is_accepted(first.url)
    finally:
        await second.stop()


async def test_a_taken_port_is_named(tmp_path: Path):
    (tmp_path / "second").mkdir()
    server = await EmbeddedNats.start(tmp_path, users=USERS)
    try:
        with pytest.raises(SupervisorError, match="address already in use"):
            await EmbeddedNats.start(tmp_path / "second", users=USERS, port=server.port)
    finally:
        await server.stop()


async def test_streams_are_available_only_with_a_folder_for_them(tmp_path: Path):
    server = await EmbeddedNats.start(tmp_path, users=USERS, streams=tmp_path / "streams")
    try:
        client = await nats.connect(server.url, user="one", password=PASSWORD)
        assert (await client.jetstream().account_info()).streams == 0
        await client.close()
    finally:
        await server.stop()
    assert (tmp_path / "streams").is_dir()


async def test_the_server_ends_when_its_owner_is_killed(tmp_path: Path):
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    pid = int(await owner.stdout.readline())
    server = processes.process_at(pid)
    assert server is not None
    owner.kill()
    await owner.wait()
    await until_true(lambda: processes.process_at(pid) != server, "the server ends")
