"""`mercato audit` as an operator uses it: beside a running shop, and on the folder of one that is stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest

from mercato import topology
from mercato.chassis.hosting.keys import key_deriver
from mercato.chassis.postgres.migrations import migrate
from mercato.chassis.postgres.provisioning import provision
from mercato.cli.databases import OWN_URL
from mercato.embedded_postgres import DataFolder, EmbeddedPostgres, processes
from mercato.operations.audit.invariants import SHOP
from mercato.testing.command import Command, clean_environment
from mercato.testing.process import cluster_of, data_folder
from mercato.testing.waiting import BOUND_SECONDS, wait_until
from operations.audit.sample_shop import fill


@asynccontextmanager
async def serving(data: Path) -> AsyncGenerator[EmbeddedPostgres]:
    """What `mercato up` holds on to while a shop runs: the folder and its server."""
    with DataFolder.open(data, "http://127.0.0.1:8080") as folder:
        password = key_deriver(folder.secret())("postgres/superuser").hex()
        server = await EmbeddedPostgres.start(folder.path, password=password, progress=print)
        try:
            yield server
        finally:
            await server.stop()


@pytest.fixture(scope="module")
def shop() -> Generator[Path]:
    """The data folder of a shop in which everything is right. Nothing runs on it."""
    with data_folder() as data:
        asyncio.run(make_shop(data))
        yield data


async def make_shop(data: Path) -> None:
    async with serving(data) as server:
        dsns = await provision(server.admin_dsn, list(topology.SERVICES), lambda role: f"password of {role}")
        for name, dsn in dsns.items():
            await migrate(dsn, topology.migrations(name))
        await fill(dsns)


async def execute(server: EmbeddedPostgres, service: str, statement: str) -> None:
    dsn = server.admin_dsn.replace("/postgres?", f"/mercato_{service}?")
    connection = await cast(Any, asyncpg).connect(dsn)
    await connection.execute(statement)
    await connection.close()


def start(*options: str, environment: Mapping[str, str] | None = None) -> Command:
    return Command(["audit", *options], environment={**clean_environment(), **(environment or {})})


def finished(running: Command) -> tuple[int, str, str]:
    """Its exit code and what it has said."""
    output, errors = running.communicate()
    return running.wait(), output, errors


def refused(*options: str, environment: Mapping[str, str] | None = None) -> str:
    """The one sentence of an audit that cannot be made."""
    code, output, errors = finished(start(*options, environment=environment))
    assert (code, output) == (2, ""), (output, errors)
    [sentence] = errors.splitlines()
    assert sentence.startswith("mercato: ")
    return sentence


def assert_untouched(data: Path) -> None:
    """Nothing serves the folder, and it is free."""
    assert processes.serving(cluster_of(data)) == []
    DataFolder.open(data, "a test").close()


def test_a_stopped_shop_is_audited_and_left_stopped(shop: Path):
    code, output, errors = finished(start("--data", str(shop)))

    assert (code, errors) == (0, "")
    assert f"All {len(SHOP)} invariants hold" in output
    assert "S4" in output
    assert_untouched(shop)


@pytest.mark.long
def test_a_stopped_shop_is_audited_as_of_its_last_sign_of_life(shop: Path):
    """An event that a consumer has not read within the hour would be a violation in a shop that runs."""
    asyncio.run(change(shop, "UPDATE cursors SET position = position - (1 << 12)", "events"))
    try:
        code, output, errors = finished(start("--data", str(shop)))
        document = json.loads(finished(start("--data", str(shop), "--json"))[1])
    finally:
        asyncio.run(change(shop, "UPDATE cursors SET position = position + (1 << 12)", "events"))

    assert (code, errors) == (0, ""), output
    assert "as of its last sign of life at" in output
    assert document["holds"]
    assert document["is_stopped"]
    assert document["as_of"] < document["taken_at"]


def test_json_is_one_document_and_a_violation_is_the_exit_code(shop: Path):
    asyncio.run(change(shop, "UPDATE levels SET on_hand = on_hand + 1"))
    try:
        code, output, errors = finished(start("--data", str(shop), "--json"))
        people = finished(start("--data", str(shop)))
    finally:
        asyncio.run(change(shop, "UPDATE levels SET on_hand = on_hand - 1"))

    assert (code, errors) == (1, "")
    found = json.loads(output)
    assert not found["holds"]
    assert {i["name"]: i["violations"] for i in found["invariants"] if i["violations"]} == {"S2": 2}
    [stock] = [i for i in found["invariants"] if i["name"] == "S2"]
    assert {"product_id": 1, "on_hand": 97, "sum": 96} in stock["rows"]
    assert people[0] == 1
    assert "product_id 1, on_hand 97, sum 96" in people[1]


async def change(data: Path, statement: str, service: str = "inventory") -> None:
    async with serving(data) as server:
        await execute(server, service, statement)


async def test_a_running_shop_is_audited_beside_itself(shop: Path):
    async with serving(shop) as server:
        code, _, errors = await asyncio.to_thread(lambda: finished(start("--data", str(shop))))

        assert (code, errors) == (0, "")
        await execute(server, "inventory", "SELECT 1")
        assert processes.postmaster_pid(cluster_of(shop)) == server.pid


async def test_a_server_is_named_by_option_or_environment(shop: Path):
    async with serving(shop) as server:
        by_option = await asyncio.to_thread(lambda: finished(start("--dsn", server.admin_dsn)))
        environment = {"MERCATO_POSTGRES_DSN": server.admin_dsn}
        by_environment = await asyncio.to_thread(lambda: finished(start("--data", "/nowhere", environment=environment)))

    assert (by_option[0], by_environment[0]) == (0, 0), (by_option, by_environment)


@pytest.mark.long
def test_two_audits_of_a_stopped_shop_wait_for_each_other(shop: Path):
    first, second = start("--data", str(shop)), start("--data", str(shop))

    ended = [finished(running) for running in (first, second)]
    assert [code for code, *_ in ended] == [0, 0], ended
    assert_untouched(shop)


def test_a_command_that_waits_for_another_names_it(shop: Path):
    with DataFolder.open(shop, OWN_URL):
        running = start("--data", str(shop))
        line = running.stdout.readline()
    code, _, errors = finished(running)

    assert f"waiting for another command that looks at these databases, with pid {os.getpid()}" in line
    assert (code, errors) == (0, "")


def test_an_interrupted_audit_stops_what_it_has_started(shop: Path):
    running = start("--data", str(shop))
    for line in running.stdout:
        if "copying" in line:
            break
    running.send_signal(signal.SIGINT)
    code, _, errors = finished(running)

    assert (code, errors) == (130, "mercato: stopped before it was done\n")
    wait_until(lambda: not processes.serving(cluster_of(shop)), BOUND_SECONDS)
    assert_untouched(shop)


def test_a_folder_without_a_shop_is_refused_and_not_made(tmp_path: Path):
    sentence = refused("--data", str(tmp_path / "data"))

    assert "there is no shop in" in sentence
    assert "--dsn" in sentence
    assert not (tmp_path / "data").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "letter").touch()

    assert "there is no shop in" in refused("--data", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]


def test_a_shop_whose_database_is_elsewhere_says_so(tmp_path: Path):
    DataFolder.open(tmp_path / "data", "http://127.0.0.1:8080").close()

    assert "name its server with --dsn" in refused("--data", str(tmp_path / "data"))


def test_a_server_that_is_not_there_is_refused_without_its_password(tmp_path: Path):
    sentence = refused("--dsn", f"postgresql://admin:hunter2@/postgres?host={tmp_path}&port=5432")

    assert "cannot be reached" in sentence
    assert "hunter2" not in sentence


@pytest.mark.parametrize("dsn", ["postgresql://[hunter2/x", "host=h password=hunter2"])
def test_what_is_no_dsn_is_refused_in_a_sentence(dsn: str):
    sentence = refused("--dsn", dsn)

    assert "the given DSN" in sentence
    assert "hunter2" not in sentence


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e300", "1e12", "-1"])
def test_seconds_that_no_clock_has_are_refused_in_a_sentence(seconds: str):
    code, output, errors = finished(start("--settled", seconds))

    assert (code, output) == (2, "")
    assert errors.startswith("mercato: Invalid value ")
    assert "for --settled. Must be " in errors
