"""`mercato up` and `mercato migrate` on a server with defaults of its own: they change nothing, or are named."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from mercato.chassis.hosting.keys import key_deriver
from mercato.chassis.postgres.provisioning import service_dsn
from mercato.chassis.postgres.sessions import SETTINGS
from mercato.testing.command import run_command
from mercato.testing.foreign_server import ForeignServer
from mercato.testing.process import Process
from mercato.testing.waiting import wait_until

SECRET = "a secret of at least thirty-two characters"
DEFAULTS = {
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "timezone": "Asia/Tokyo",
    "search_path": "nowhere",
    "datestyle": "German, DMY",
    "max_connections": "50",
}
OF_A_SHELL = {
    "PGOPTIONS": "-c default_transaction_isolation=serializable -c search_path=nowhere",
    "PGTZ": "Asia/Tokyo",
    "PGAPPNAME": "a shell",
    "PGSSLMODE": "no such mode",
    "PGTARGETSESSIONATTRS": "standby",
    "PGSERVICE": "no such service",
    "PGPASSFILE": "/no/such/file",
    "PGHOST": "/no/such/folder",
    "PGPORT": "1",
    "PGUSER": "someone",
    "PGDATABASE": "nothing",
}


@pytest.fixture(scope="module")
def server() -> Iterator[ForeignServer]:
    with ForeignServer(DEFAULTS) as made:
        yield made


@pytest.fixture
def environment(server: ForeignServer) -> Mapping[str, str]:
    return {"MERCATO_POSTGRES_DSN": server.admin_dsn, "MERCATO_SECRET": SECRET, **OF_A_SHELL}


def ask(dsn: str, query: str) -> list[Any]:
    async def asked() -> list[Any]:
        connection = await asyncpg.connect(dsn)
        try:
            return [tuple(row) for row in await connection.fetch(query)]
        finally:
            await connection.close()

    return asyncio.run(asked())


def test_a_database_in_another_encoding_is_refused_before_anything_is_made(
    tmp_path: Path, server: ForeignServer, environment: Mapping[str, str]
):
    ask(server.admin_dsn, "CREATE DATABASE mercato_users TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    try:
        with Process(tmp_path / "data", environment=environment) as shop:
            sentence = shop.refusal()
        assert "the database mercato_users has the encoding LATIN1 instead of UTF8" in sentence
        made = ask(server.admin_dsn, "SELECT datname FROM pg_database WHERE datname LIKE 'mercato%'")
        assert made == [("mercato_users",)]
    finally:
        ask(server.admin_dsn, "DROP DATABASE mercato_users")


def test_the_defaults_of_the_server_and_of_the_shell_change_nothing(
    tmp_path: Path, server: ForeignServer, environment: Mapping[str, str]
):
    with Process(tmp_path / "data", environment=environment) as shop, shop.ready().caller() as caller:
        assert shop.has_line("the server takes 47 connections of ordinary roles, and this shop may need 62: 42 for its")
        order = caller.order()
        assert order.status == 201
        wait_until(lambda: "order.placed" in caller.read("/events").text)
        assert order.json["created_at"].endswith("Z")
        body = {"name": "Zoë", "email": "zoe@example.com", "password": "a long enough password"}
        assert caller.post("/register", body).status == 201

        sessions = "SELECT DISTINCT application_name FROM pg_stat_activity WHERE usename LIKE 'mercato%'"
        assert all(name.startswith("mercato-") for (name,) in ask(server.admin_dsn, sessions))
        shop.stop()

    databases = """
        SELECT pg_encoding_to_char(encoding), datcollate FROM pg_database
        WHERE datname LIKE 'mercato\\_%' AND datname <> 'mercato_audit'
    """
    assert set(ask(server.admin_dsn, databases)) == {("UTF8", "C")}
    password = key_deriver(SECRET.encode())("postgres/mercato_orders").hex()
    values = ", ".join(f"current_setting('{name}')" for name in SETTINGS)
    found = ask(service_dsn(server.admin_dsn, "mercato_orders", password), f"SELECT {values}")
    assert found == [tuple(SETTINGS.values())]


def test_the_other_commands_work_on_that_server_too(
    tmp_path: Path, server: ForeignServer, environment: Mapping[str, str]
):
    for command, words in (
        (("migrate", "--data", str(tmp_path / "data")), "the server takes 47 connections of ordinary roles"),
        (("audit",), ""),
        (("users", "list"), "alice@example.com"),
        (("events", "tail"), "order.placed"),
        (("backup", str(tmp_path / "backup")), ""),
    ):
        ended = run_command(*command, environment=environment)
        assert ended.returncode == 0, (command, ended.stdout + ended.stderr)
        assert words in ended.stdout

    for (name,) in ask(server.admin_dsn, "SELECT datname FROM pg_database WHERE datname LIKE 'mercato%'"):
        ask(server.admin_dsn, f"DROP DATABASE {name} WITH (FORCE)")
    restored = run_command("restore", str(tmp_path / "backup"), environment=environment)
    assert restored.returncode == 0, restored.stdout + restored.stderr


def test_a_setting_that_overrides_that_of_a_role_is_named(
    tmp_path: Path, server: ForeignServer, environment: Mapping[str, str]
):
    override = "ALTER ROLE mercato_orders IN DATABASE mercato_orders {} default_transaction_isolation"
    ask(server.admin_dsn, override.format("SET") + " = 'serializable'")
    try:
        with Process(tmp_path / "data", environment=environment) as shop:
            assert "have other settings (default_transaction_isolation) than their role" in shop.refusal()
    finally:
        ask(server.admin_dsn, override.format("RESET"))
