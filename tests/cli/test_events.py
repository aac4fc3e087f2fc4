"""`mercato events` as an operator uses it beside a running shop, by its folder and by its DSN."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar, cast

import asyncpg
import pytest

from mercato import topology
from mercato.chassis.hosting.keys import key_deriver
from mercato.chassis.postgres.migrations import migrate
from mercato.chassis.postgres.provisioning import provision
from mercato.embedded_postgres import DataFolder, EmbeddedPostgres
from mercato.embedded_postgres.record import note_initialized
from mercato.services.events.app import CONSUMER
from mercato.services.products.consumers import IN_STOCK
from mercato.testing.command import COMMAND, Command, clean_environment, run_command
from mercato.testing.process import data_folder
from mercato.testing.waiting import BOUND_SECONDS

T = TypeVar("T")

STOCK_CONSUMER = IN_STOCK.consumer
ORDER = {"subject": "order", "subject_id": 1001, "version": 1, "data": {"order_id": 1001}}
AT = "2026-01-15T09:30:00+00:00"


def place(id: int) -> int:
    """The position of the first event of a row."""
    return id * 4096


def name(id: int, source: str = "inventory") -> str:
    return f"{source}:{place(id)}"


class RunningShop:
    """What `mercato up` holds on to while a shop runs: the folder and its server, in an event loop of their own."""

    def __init__(self, data: Path, runner: asyncio.Runner, server: EmbeddedPostgres) -> None:
        self.data = data
        self.dsn = server.admin_dsn
        self._runner = runner

    def execute(self, service: str, statement: str, *values: object) -> list[Any]:
        async def run() -> list[Any]:
            connection = await cast(Any, asyncpg).connect(self.dsn.replace("/postgres?", f"/mercato_{service}?"))
            try:
                return await connection.fetch(statement, *values)
            finally:
                await connection.close()

        return self._runner.run(run())

    def put_entry(self, id: int, type: str = "order.placed") -> None:
        self.execute(
            "events",
            f"""
            WITH entry AS (
                INSERT INTO feed (source, outbox_id, place, count, at, events)
                VALUES ('orders', $1, 0, 1, '{AT}', $2)
                RETURNING position
            )
            INSERT INTO feed_types (type, position, count, last) SELECT $3, position, 1, 0 FROM entry
            """,
            id,
            json.dumps([{**ORDER, "type": type}]),
            type,
        )

    def put_dead_letter(self, service: str, consumer: str, id: int, data: str = "{}") -> None:
        self.execute(
            service,
            f"""
            INSERT INTO parked (
                consumer, source, position, type, subject, subject_id, version, data, event_at, error, tries, retry_at,
                dead_at)
            VALUES ($1, 'inventory', $2, 'stock.available', 'product', 7, 1, $3, '{AT}', E'Cannot: of two\\nlines', 5,
                    now(), now())
            """,
            consumer,
            place(id),
            data,
        )

    def feed_ids(self) -> list[str]:
        rows = self.execute("events", "SELECT source, outbox_id FROM feed ORDER BY position")
        return [name(row_id, source) for source, row_id in rows]

    def clear(self) -> None:
        self.execute("events", "TRUNCATE feed, feed_types, parked RESTART IDENTITY")
        self.execute("products", "TRUNCATE parked")


def following(*options: str) -> Command:
    return Command(["events", "tail", "--follow", *options], environment=clean_environment())


def run(*options: str) -> tuple[int, list[str], str]:
    """The exit code, the lines of the output, and what was said on standard error."""
    done = run_command("events", *options)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture(scope="module")
def made() -> Generator[RunningShop]:
    with data_folder() as data, asyncio.Runner() as runner, DataFolder.open(data, "http://127.0.0.1:8080") as folder:
        password = key_deriver(folder.secret())("postgres/superuser").hex()
        server = runner.run(EmbeddedPostgres.start(folder.path, password=password, progress=print))
        try:
            runner.run(make_databases(server.admin_dsn))
            yield RunningShop(data, runner, server)
        finally:
            runner.run(server.stop())


async def make_databases(admin_dsn: str) -> None:
    dsns = await provision(admin_dsn, list(topology.SERVICES), lambda role: f"password of {role}")
    for name, dsn in dsns.items():
        await migrate(dsn, topology.migrations(name))


@pytest.fixture
def shop(made: RunningShop) -> RunningShop:
    made.clear()
    return made


def test_tail_shows_the_last_entries_for_people_and_for_programs(shop: RunningShop):
    for n in range(1, 26):
        shop.put_entry(n, "order.paid" if n % 5 == 0 else "order.placed")
    code, lines, said = run("tail", "--data", str(shop.data))
    assert (code, said, len(lines)) == (0, "", 20)
    assert lines[0].split() == [
        str(place(6)),
        "2026-01-15",
        "09:30:00",
        "order.placed",
        "order",
        "1001",
        "v1",
        '{"order_id":',
        "1001}",
    ]
    code, lines, _ = run("tail", "--after", str(place(10)), "--types", "order.paid", "--json", "--dsn", shop.dsn)
    assert code == 0
    entries = [json.loads(line) for line in lines]
    assert [(entry["position"], entry["id"]) for entry in entries] == [
        (place(15), name(15, "orders")),
        (place(20), name(20, "orders")),
        (place(25), name(25, "orders")),
    ]
    assert entries[0]["data"] == {"order_id": 1001}
    _, lines, _ = run("tail", "--types", "order.paid", "--json", "--dsn", shop.dsn)
    assert len(lines) == 5


def test_tail_follows_until_it_is_interrupted(shop: RunningShop):
    shop.put_entry(1)
    with following("--json", "--data", str(shop.data)) as running:
        assert json.loads(running.stdout.readline())["id"] == name(1, "orders")
        shop.put_entry(2)
        assert json.loads(running.stdout.readline())["id"] == name(2, "orders")
        running.send_signal(signal.SIGINT)
        _, said = running.communicate()
        assert (running.returncode, said) == (0, "")


def test_tail_says_where_to_go_on_from_after_what_was_deleted(shop: RunningShop):
    shop.execute("events", "INSERT INTO feed_purged VALUES ('order.placed', 7)")
    try:
        code, lines, said = run("tail", "--after", "6", "--data", str(shop.data))
    finally:
        shop.execute("events", "TRUNCATE feed_purged")
    assert (code, lines) == (1, [])
    assert said.endswith("is not in the feed any more: go on with --after 7\n")


def test_a_shop_that_does_not_run_is_not_followed(tmp_path: Path):
    """It would be read for ever, and no other command could read its databases."""
    with DataFolder.open(tmp_path / "data", "http://127.0.0.1:8080") as folder:
        folder.secret()
        note_initialized(folder.path)

    code, lines, said = run("tail", "--follow", "--data", str(tmp_path / "data"))

    assert (code, lines) == (1, [])
    assert "no shop runs on" in said
    DataFolder.open(tmp_path / "data", "a test").close()


def test_following_ends_without_an_error_when_its_output_is_closed(shop: RunningShop):
    """As in `mercato events tail --follow | head -1`."""
    shop.put_entry(1)
    with following("--data", str(shop.data)) as running:
        assert "order.placed" in running.stdout.readline()
        running.stdout.close()
        shop.put_entry(2)
        assert running.wait(BOUND_SECONDS) == 0
        assert running.stderr.read() == ""


@pytest.mark.parametrize("command", ["dead", "tail"])
def test_a_full_disk_is_a_sentence(shop: RunningShop, command: str):
    shop.put_entry(1)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "events", command, "--data", str(shop.data)],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=BOUND_SECONDS, cwd="/", env=clean_environment(),
            check=False,
        )  # fmt: skip
    sentence = "mercato: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, sentence)


def test_dead_letters_are_listed_with_their_reason(shop: RunningShop):
    assert run("dead", "--data", str(shop.data)) == (0, ["there are no dead letters"], "")
    assert run("dead", "--json", "--data", str(shop.data)) == (0, [], "")
    shop.put_dead_letter("events", CONSUMER, 3)
    shop.put_dead_letter("products", STOCK_CONSUMER, 4)
    code, lines, _ = run("dead", "--data", str(shop.data))
    assert (code, len(lines)) == (0, 2)
    assert name(3) in "".join(lines)
    assert all("after 5 tries: Cannot: of two lines" in line for line in lines)
    _, lines, _ = run("dead", "--json", "--data", str(shop.data))
    letters = {letter["id"]: letter for letter in map(json.loads, lines)}
    assert letters[name(4)]["consumer"] == STOCK_CONSUMER
    assert letters[name(3)]["error"] == "Cannot: of two\nlines"


def test_a_replay_takes_what_it_can_and_keeps_the_rest(shop: RunningShop):
    shop.put_dead_letter("events", CONSUMER, 3)
    shop.put_dead_letter("events", CONSUMER, 5)
    shop.put_dead_letter("products", STOCK_CONSUMER, 4, data="not even JSON")
    code, lines, said = run("replay", name(3), "inventory:99", "--data", str(shop.data))
    assert (code, lines[-1]) == (1, "1 taken, 0 failed again")
    assert said.strip() == "mercato: there is no dead letter inventory:99: `mercato events dead` lists them"
    assert shop.feed_ids() == [name(3)]
    code, lines, said = run("replay", "--all", "--data", str(shop.data))
    assert (code, lines[-1]) == (1, "1 taken, 1 failed again")
    assert f"{STOCK_CONSUMER} still cannot take {name(4)}" in said
    assert shop.feed_ids() == [name(3), name(5)]
    _, lines, _ = run("dead", "--json", "--data", str(shop.data))
    assert [json.loads(line)["id"] for line in lines] == [name(4)]
    code, lines, said = run("replay", name(3), "--data", str(shop.data))
    assert (code, lines[-1]) == (1, "0 taken, 0 failed again")
    assert f"there is no dead letter {name(3)}" in said
    assert shop.feed_ids() == [name(3), name(5)]


@pytest.mark.long
def test_events_that_another_process_replays_meanwhile_are_not_counted(shop: RunningShop):
    shop.put_dead_letter("events", CONSUMER, 3)
    code, lines, said = asyncio.run(replay_beside_another(shop))
    assert (code, said) == (0, "")
    assert lines == [f"{name(3)}  {CONSUMER}  another process replayed it meanwhile", "0 taken, 0 failed again"]


async def replay_beside_another(shop: RunningShop) -> tuple[int, list[str], str]:
    """What a replay says that has seen the letter before another one, which commits while it waits."""
    connection = await cast(Any, asyncpg).connect(shop.dsn.replace("/postgres?", "/mercato_events?"))
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("UPDATE parked SET replayed_at = now()")
        replay = asyncio.create_task(asyncio.to_thread(run, "replay", "--all", "--data", str(shop.data)))
        async with asyncio.timeout(BOUND_SECONDS):
            while not await connection.fetch("SELECT FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.05)
        await transaction.commit()
        return await replay
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("replay",), "name the events to replay"),
        (("tail", "--types", "Order"), "are not types of events"),
        (("tail", "--types", ",".join(f"a.{chr(97 + n)}" for n in range(21))), "at most 20 types"),
        (("dead", "--data", "/nowhere"), "there is no shop in /nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(options: tuple[str, ...], sentence: str):
    code, lines, said = run(*options)
    assert (code, lines) == (1, [])
    assert said.count("\n") == 1
    assert sentence in said


def test_a_position_that_there_cannot_be_is_refused_in_a_sentence():
    code, lines, said = run("tail", "--after", "99999999999999999999")
    assert (code, lines) == (2, [])
    assert said.startswith('mercato: Invalid value "99999999999999999999" for --after. Must be ')
