"""How `mercato up` ends when it is asked to: what runs is finished, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from mercato.testing.caller import Caller
from mercato.testing.process import Process, command_line, data_folder
from mercato.testing.responses import Response
from mercato.testing.waiting import BOUND_SECONDS, POLL_SECONDS, wait_until

ATTEMPTS = 5
STOPPED_EARLY = ["mercato: stopped before it was ready"]


@pytest.mark.parametrize("workers", ["1", pytest.param("3", marks=pytest.mark.long)])
def test_a_request_that_is_half_received_is_answered(data: Path, workers: str):
    within_the_drain(lambda: stop_in_the_middle_of_a_request(data, workers))


def stop_in_the_middle_of_a_request(data: Path, workers: str) -> Response | None:
    body = json.dumps({"user_id": 1, "product_id": 100}).encode()
    with Process(data, "--workers", workers) as shop, shop.ready().caller() as caller:
        assert caller.get("/users?id=1").status == 200  # connected, and accepted by a worker
        connection = caller.connection
        connection.putrequest("POST", "/orders")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:9])
        assert what_was_sent_is_read(shop)

        shop.interrupt()
        wait_until(lambda: refuses_connections(shop.url))
        answer = None
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.send(body[9:])
            answer = caller.answer()
        assert shop.exit_code() == 0
        shop.assert_gone()
    return answer


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_a_request_that_waits_for_the_database_is_answered(data: Path, workers: str):
    within_the_drain(lambda: stop_while_the_database_is_locked(data, workers))


def stop_while_the_database_is_locked(data: Path, workers: str) -> Response | None:
    with Process(data, "--workers", workers) as shop:
        shop.ready()
        with locked(shop, "orders") as lock:
            order = InBackground(shop)
            lock.wait_for_a_waiter()
            shop.signal(signal.SIGTERM)
            wait_until(lambda: refuses_connections(shop.url))
        answer = order.answer()
        assert shop.exit_code() == 0
        shop.assert_gone()
    return answer


def within_the_drain(stop: Callable[[], Response | None]) -> None:
    """Stops a shop until its request is answered: a request that a busy machine does not finish in time is cut off."""
    answers: list[Response | None] = []
    while not (answers and answers[-1]) and len(answers) < ATTEMPTS:
        answers.append(stop())
    answer = answers[-1]
    assert answer is not None, f"in {ATTEMPTS} stops no answer came"
    assert answer.status == 201, answer.text


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_a_request_that_waits_for_its_order_is_answered_with_the_order_as_it_is(data: Path, workers: str):
    within_the_drain(lambda: stop_while_a_client_waits(data, workers))


def newest(caller: Caller) -> int:
    """The number of the newest order of the person who orders; 0 without one. The folder has those of other tests."""
    orders = caller.get("/orders?user_id=1&limit=1").json
    return orders[0]["id"] if orders else 0


def stop_while_a_client_waits(data: Path, workers: str) -> Response | None:
    with Process(data, "--workers", workers) as shop, shop.ready().caller() as caller:
        before = newest(caller)
        order = InBackground(shop, payment_method="sandbox:slow:60000", Prefer="wait=60")
        wait_until(lambda: newest(caller) > before)

        shop.signal(signal.SIGTERM)
        answer = order.answer()
        assert shop.exit_code() == 0
        shop.assert_gone()
    if answer is not None:
        assert (answer.json["status"], answer.json["payment"]) == ("pending", "unpaid")
        assert "preference-applied" not in answer.headers
    return answer


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_a_request_that_never_ends_does_not_hold_it_up(data: Path, workers: str):
    with Process(data, "--workers", workers) as shop:
        shop.ready()
        with locked(shop, "orders") as lock:
            InBackground(shop)
            lock.wait_for_a_waiter()
            shop.signal(signal.SIGTERM)

            assert shop.exit_code() == 0
        shop.assert_gone()
        assert shop.complaints == []


def test_ctrl_c_again_and_again_is_harmless(data: Path):
    with Process(data) as shop:
        shop.ready()
        while True:
            shop.interrupt()
            try:
                code = shop.exit_code(POLL_SECONDS)
                break
            except AssertionError:
                pass

        assert code == 0
        assert shop.complaints == []
        shop.assert_gone()


def test_a_closed_terminal_stops_it_too(data: Path):
    with Process(data) as shop:
        shop.ready().signal(signal.SIGHUP)

        assert shop.exit_code() == 0
        shop.assert_gone()


@pytest.mark.long
def test_ctrl_c_at_any_moment_of_a_start_ends_it_with_one_line():
    moments = ["", "starting PostgreSQL", "creating a database", "is running", "migrated the database of users"]
    with data_folder() as folder:
        for moment in moments:
            with Process(folder, as_json=False) as shop:
                wait_until(lambda: takes_signals(shop))
                shop.wait_for_line(moment) if moment else None
                shop.tree()
                shop.interrupt()

                assert shop.exit_code() == 130, (moment, shop.output)
                assert shop.complaints == STOPPED_EARLY, moment
                shop.assert_gone()
        with Process(folder) as shop:
            shop.ready().stop()


def test_a_first_start_writes_a_checkpoint_once_it_is_ready():
    with data_folder() as folder, Process(folder) as shop:
        log = folder / "postgres.log"
        shop.ready()
        wait_until(lambda: "checkpoint complete" in log.read_text(), BOUND_SECONDS)
        shop.stop()


def test_sigterm_while_workers_start_ends_it_with_one_line(data: Path):
    with Process(data, "--workers", "3") as shop:
        wait_until(lambda: len(shop.tree().workers) == 3)
        shop.signal(signal.SIGTERM)

        assert shop.exit_code() == 143, shop.output
        assert shop.complaints == STOPPED_EARLY
        shop.assert_gone()


def test_a_kill_while_workers_start_leaves_nothing(data: Path):
    with Process(data, "--workers", "3") as shop:
        wait_until(lambda: len(shop.tree().workers) == 3)
        metrics = Path(command_line(shop.tree().workers[0].pid).split()[-1])
        assert metrics.is_dir()
        shop.kill()

        shop.assert_gone()
    assert not metrics.exists()


def takes_signals(shop: Process) -> bool:
    """Whether the command has begun to listen to signals; before that it is the interpreter that is interrupted."""
    status = Path(f"/proc/{shop.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGHUP - 1) & 1)


def what_was_sent_is_read(shop: Process) -> bool:
    """Any answered request after something was sent means that it has been read by then, near enough."""
    with shop.caller() as other:
        return other.get("/health/live").status == 200


def refuses_connections(url: str) -> bool:
    try:
        with Caller(url) as caller:
            caller.connection.connect()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


class InBackground:
    """An order that is being placed by a thread."""

    def __init__(self, shop: Process, Prefer: str | None = None, **fields: str) -> None:  # noqa: N803  # a header
        self._body = {"user_id": 1, "product_id": 100, **fields}
        self._headers = {} if Prefer is None else {"Prefer": Prefer}
        self._answers: list[Response] = []
        self._caller = shop.caller()
        self._thread = threading.Thread(target=self._place, daemon=True)
        self._thread.start()

    def _place(self) -> None:
        try:
            with self._caller as caller:
                self._answers.append(caller.post("/orders", self._body, **self._headers))
        except (OSError, http.client.HTTPException):
            pass

    def answer(self) -> Response | None:
        self._thread.join(BOUND_SECONDS)
        return self._answers[0] if self._answers else None


class Lock:
    """A lock on a table that another connection holds, seen from a second connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: asyncpg.Connection) -> None:
        self._loop = loop
        self._connection = connection

    def wait_for_a_waiter(self) -> None:
        wait_until(lambda: bool(self._ask("SELECT true FROM pg_locks WHERE NOT granted LIMIT 1")))

    def _ask(self, sql: str) -> object:
        return self._loop.run_until_complete(self._connection.fetchval(sql))


@contextmanager
def locked(shop: Process, service: str) -> Generator[Lock]:
    """Locks the table of a service against all others for the time of the block."""
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(shop.dsn(service)))
    try:
        loop.run_until_complete(connection.execute(f"BEGIN; LOCK TABLE {service}"))
        yield Lock(loop, connection)
    finally:
        connection.terminate()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
