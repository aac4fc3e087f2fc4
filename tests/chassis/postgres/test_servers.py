"""A DSN that names several servers: which of them a connection is made to, and what the other readers of DSNs see."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final, Literal

import asyncpg
import pytest
from asyncpg import connect_utils

from mercato.chassis.contract import Unavailable
from mercato.chassis.hosting.settings import ServeSettings, SettingsError
from mercato.chassis.postgres import connections, sessions
from mercato.chassis.postgres.dsn import NO_SECRETS, servers, shown, with_server
from mercato.chassis.postgres.provisioning import service_dsn
from mercato.chassis.postgres.sessions import NoPrimary, Servers
from mercato.cli import environment
from mercato.testing.cluster import Cluster
from mercato.testing.databases import opened
from mercato.testing.proxy import TcpProxy

Kind = Literal["primary", "standby", "read-only", "silent", "slow", "starting", "refusing", "unknown database"]

SSL_REQUEST: Final = 80877103
SLOW_SECONDS: Final = 0.5


class Server:
    """As much of PostgreSQL's protocol as the start of a session needs. `kind` may change."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.sessions = 0
        """How many clients have come."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._listener.sockets[0].getsockname()[1]

    def stop_listening(self) -> None:
        self._listener.close()

    async def close(self) -> None:
        self.stop_listening()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.sessions += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            code = 0
            while code != 3 << 16:
                length, code = struct.unpack("!ii", await reader.readexactly(8))
                await reader.readexactly(length - 8)
                if code == SSL_REQUEST:
                    writer.write(b"N")
            if self.kind == "slow":
                await asyncio.sleep(SLOW_SECONDS)
            if self.kind != "silent":
                writer.write(self._answer())
            await reader.read()
        writer.transport.abort()
        self._tasks.discard(task)

    def _answer(self) -> bytes:
        match self.kind:
            case "starting":
                return _refusal("57P03")
            case "refusing":
                return _refusal("28P01")
            case "unknown database":
                return _refusal("3D000")
            case _:
                states = {
                    "server_version": "18.0",
                    "client_encoding": "UTF8",
                    "in_hot_standby": "on" if self.kind == "standby" else "off",
                    "default_transaction_read_only": "on" if self.kind == "read-only" else "off",
                }
                said = [_message(b"S", f"{name}\0{value}\0".encode()) for name, value in states.items()]
                return b"".join([
                    _message(b"R", struct.pack("!i", 0)),
                    *said,
                    _message(b"K", struct.pack("!ii", 1, 1)),
                    _message(b"Z", b"I"),
                ])  # fmt: skip


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def _refusal(code: str) -> bytes:
    return _message(b"E", f"SFATAL\0VFATAL\0C{code}\0Mrefused\0\0".encode())


@contextlib.asynccontextmanager
async def running(*kinds: Kind) -> AsyncGenerator[tuple[str, list[Server]]]:
    """Servers of these kinds, and the DSN that names them in this order."""
    made = [Server(kind) for kind in kinds]
    for server in made:
        await server.open()
    try:
        yield f"postgresql://u:p@{','.join(f'127.0.0.1:{server.port}' for server in made)}/d", made
    finally:
        for server in made:
            await server.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sessions, "SERVER_SECONDS", 0.1)


async def connected(named: Servers, dsn: str, seconds: float = 5.0) -> int:
    """The port of the server that a connection is made to."""
    connection = await named.connect(dsn, timeout=seconds)
    try:
        return connection._addr[1]
    finally:
        connection.terminate()


# -------------------------------------------------------------------------------------------- which one is connected to


@pytest.mark.parametrize("other", ["standby", "silent", "starting", "refusing", "unknown database"])
async def test_the_primary_is_found_wherever_it_stands(other: Kind):
    both: tuple[tuple[Kind, Kind], ...] = ((other, "primary"), ("primary", other))
    for kinds in both:
        async with running(*kinds) as (dsn, made):
            assert await connected(Servers(dsn), dsn) == made[kinds.index("primary")].port


async def test_a_server_that_does_not_run_is_passed_over():
    async with running("primary", "primary") as (dsn, made):
        made[0].stop_listening()
        assert await connected(Servers(dsn), dsn) == made[1].port


async def test_the_server_that_has_served_is_tried_first_from_then_on():
    async with running("silent", "primary") as (dsn, made):
        named = Servers(dsn)
        for _ in range(3):
            assert await connected(named, dsn) == made[1].port
        assert made[0].sessions == 1
        made[0].kind, made[1].kind = "primary", "standby"
        assert await connected(named, dsn) == made[0].port


async def test_of_two_primaries_the_one_that_is_put_last_is_tried_last():
    async with running("primary", "primary") as (dsn, made):
        named = Servers(dsn)
        named.put_last(("127.0.0.1", made[1].port))
        assert await connected(named, dsn) == made[0].port
        for _ in range(2):  # several connections to it may fail at once
            named.put_last(("127.0.0.1", made[0].port))
        assert await connected(named, dsn) == made[1].port


async def test_a_primary_that_is_busy_gets_the_rest_of_the_time():
    async with running("slow", "standby") as (dsn, made):
        assert await connected(Servers(dsn), dsn) == made[0].port
        with pytest.raises((TimeoutError, NoPrimary)):
            await connected(Servers(dsn), dsn, SLOW_SECONDS / 2)


async def test_a_server_that_stays_silent_costs_no_more_than_the_given_time():
    async with running("silent", "silent") as (dsn, made):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await Servers(dsn).connect(dsn, timeout=0.4)
        assert 0.3 < time.monotonic() - began < 3
        assert [server.sessions for server in made] == [2, 1]


async def test_one_server_is_waited_for_as_long_as_before():
    async with running("slow") as (dsn, made):
        assert await connected(Servers(dsn), dsn) == made[0].port


@pytest.mark.parametrize(
    ("kinds", "error"),
    [
        (("standby", "standby"), NoPrimary),
        (("standby", "starting"), NoPrimary),
        (("starting", "standby"), NoPrimary),
        (("refusing", "standby"), asyncpg.InvalidPasswordError),
        (("standby", "refusing"), asyncpg.InvalidPasswordError),
        (("silent", "starting"), asyncpg.CannotConnectNowError),
    ],
)
async def test_the_failure_is_the_one_that_says_most(kinds: tuple[Kind, ...], error: type[Exception]):
    async with running(*kinds) as (dsn, _):
        with pytest.raises(error):
            await Servers(dsn).connect(dsn, timeout=0.5)


async def test_a_dsn_may_ask_for_another_kind_of_server():
    async with running("primary", "standby", "read-only") as (dsn, made):
        for wanted, found in (("standby", made[1]), ("any", made[0]), ("read-write", made[0])):
            asked = f"{dsn}?target_session_attrs={wanted}"
            assert await connected(Servers(asked), asked) == found.port
        made[0].kind = "standby"
        # An operator who stops all writes still has a primary: its reads go on.
        assert await connected(Servers(dsn), dsn) == made[2].port


async def test_a_promotion_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    async with running("standby", "standby") as (dsn, made):
        promotion = asyncio.get_running_loop().call_later(0.3, setattr, made[1], "kind", "primary")
        connection = await sessions.connect(dsn)
        assert connection._addr[1] == made[1].port
        connection.terminate()
        promotion.cancel()
        made[1].kind = "standby"
        monkeypatch.setattr(sessions, "CONNECT_SECONDS", 0.2)
        with pytest.raises(NoPrimary):
            await sessions.connect(dsn)


async def test_a_service_without_a_primary_is_unavailable():
    async with running("standby", "standby") as (dsn, _):
        with pytest.raises(Unavailable):
            async with opened(dsn):
                pass


async def test_a_dsn_that_the_driver_cannot_read_is_a_value_error():
    for dsn in ("nonsense", "postgresql://u@one:x,two/d", "postgresql://u@/d?host=one,two&port=1,2,3"):
        with pytest.raises(ValueError):  # noqa: PT011  # each has another text
            await sessions.connect(dsn)


# ------------------------------------------------------------------------------------------------------ a dead machine


async def test_a_connection_notices_that_the_machine_at_its_other_end_is_dead(cluster: Cluster):
    proxy = TcpProxy(cluster.server.admin_dsn.replace("/postgres?", "/postgres?sslmode=disable&"))
    await proxy.open()
    try:
        async with opened(proxy.dsn) as database, database.read() as tx:
            end = tx._lease.connection._transport.get_extra_info("socket")
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                idle, interval, count, unanswered_ms = (
                    end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
                )
                assert idle + interval * count == connections.DEAD_SECONDS
                assert unanswered_ms == connections.DEAD_SECONDS * 1_000
    finally:
        await proxy.close()


# -------------------------------------------------------------------------------------------------- readers of the DSN


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        ("postgresql://u:p@one/d", [("one", None)]),
        ("postgresql://u:p@one:1,two:2/d", [("one", 1), ("two", 2)]),
        ("postgresql://u:p@one,two:2/d", [("one", None), ("two", 2)]),
        ("postgresql://u:p@[::1]:1,[::2]/d", [("::1", 1), ("::2", None)]),
        ("postgresql://u:p@%2Frun%2Fx:1/d", [("/run/x", 1)]),
        ("postgresql://u:p@/d?host=one,two&port=1,2", [("one", 1), ("two", 2)]),
        ("postgresql://u:p@/d?host=one,two&port=1", [("one", 1), ("two", 1)]),
        ("postgresql://u:p@/d?host=/run/x&port=1", [("/run/x", 1)]),
        ("postgresql://u:p@one:1/d?host=two&port=2", [("one", 1)]),
        ("postgresql:///d", [("localhost", None)]),
        ("postgresql://u:p@:5433/d", [("localhost", 5433)]),
    ],
)
def test_the_servers_of_a_dsn_are_those_that_the_driver_connects_to(dsn: str, expected: list[tuple[str, int | None]]):
    assert list(servers(dsn)) == expected
    given: Callable[..., Any] = connect_utils._parse_connect_dsn_and_args
    nothing = dict.fromkeys(
        (
            "host", "port", "passfile", "database", "ssl", "service", "servicefile", "direct_tls", "server_settings",
            "target_session_attrs", "krbsrvname", "gsslib",
        )
    )  # fmt: skip
    addresses = given(dsn=dsn, user="u", password="p", **nothing)[0]
    if all(isinstance(address, tuple) and address[0] for address in addresses) and "///" not in dsn:
        assert [tuple(address) for address in addresses] == [(host, port or 5432) for host, port in expected]


def test_a_dsn_with_several_servers_is_shown_without_its_secrets():
    assert shown("postgresql://u:hunter2@one:1,two:2/d") == "one:1,two:2/d"
    assert shown("postgresql://u:hunter2@/d?host=one,two&port=1") == "one:1,two:1/d"
    assert shown("postgresql://u:hun,ter/2@one:1,two:2/d") == NO_SECRETS


def test_a_pooler_takes_the_place_of_several_servers():
    dsn = "postgresql://r:p@one:1,two:2/d?target_session_attrs=primary"
    assert with_server(dsn, "new", 6432) == "postgresql://r:p@new:6432/d?target_session_attrs=primary"


def test_the_dsn_of_a_service_names_the_servers_of_the_administrator():
    dsn = "postgresql://admin:a@one:1,two:2/postgres?target_session_attrs=primary"
    assert service_dsn(dsn, "r", "p") == "postgresql://r:p@one:1,two:2/r?target_session_attrs=primary"


@pytest.mark.parametrize(
    ("dsn", "named"),
    [
        ("postgresql://u:p@127.0.0.1:1,db.example.com:2/d", "db.example.com"),
        ("postgresql://u:p@/d?host=127.0.0.1,db.example.com", "db.example.com"),
        ("postgresql://u:p@db.example.com/d?host=127.0.0.1", "db.example.com"),
        ("postgresql://u:p@127.0.0.1:1,localhost:2/d", ""),
        ("postgresql://u:p@/d?host=127.0.0.1,/run/x", ""),
        (f"postgresql://u:p@127.0.0.1:1,db.example.com:2/d?sslmode=verify-full&sslrootcert={__file__}", ""),
    ],
)
def test_every_server_on_another_machine_needs_encryption(dsn: str, named: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATABASE_URL", dsn)
    if not named:
        assert environment._dsn("orders", ServeSettings(), alone=True) == dsn
        return
    with pytest.raises(SettingsError, match=f"names the host {named} without encryption"):
        environment._dsn("orders", ServeSettings(), alone=True)
