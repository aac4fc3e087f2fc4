"""`mercato up --workers 3`: three processes, one shop."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mercato.gateway.rates import FREE_FAILURES
from mercato.testing.caller import Buyers, all_order_ids
from mercato.testing.process import Identity, Process
from mercato.testing.waiting import wait_until

ORDERS = 300
PAGE = "https://pages.example"
LISTED_HERE_ALONE = "/stock"
"""No other test asks for it: a request of theirs may be counted late, for its answer comes first."""


@pytest.fixture(scope="module")
def shop(data: Path) -> Iterator[Process]:
    options = ("--workers", "3", "--cors-origin", PAGE, "--cors-origin", "http://localhost:3000")
    with Process(data, *options, environment={"MERCATO_REQUESTS_IN_WORK": "100"}) as process:
        yield process.ready()
        process.stop()


def test_three_workers_run(shop: Process):
    assert len(shop.tree().workers) == 3


def test_requests_spread_over_all_of_them(shop: Process):
    with Buyers(shop.caller, count=24) as buyers:
        wait_until(lambda: len(buyers.placed) >= ORDERS, 60.0)
        clients = client_sockets(int(shop.url.rpartition(":")[2]))
        connected = [len(clients & descriptors(worker)) for worker in shop.tree().workers]

    assert sum(connected) >= 24
    assert sum(count > 0 for count in connected) >= 2, connected


def test_the_metrics_are_those_of_all_together(shop: Process):
    for _ in range(20):
        with shop.caller() as caller:  # each on a connection of its own, so that several workers answer
            assert caller.get(f"{LISTED_HERE_ALONE}?limit=1").status == 200
    # A request is counted when its answer has been sent.
    wait_until(lambda: requests_counted(shop) >= 20)
    counts = {requests_counted(shop) for _ in range(10)}

    assert counts == {20}


def test_each_has_the_limit_of_requests_that_is_set(shop: Process):
    with shop.caller() as caller:
        assert "\nmercato_http_limit 300.0\n" in caller.get("/metrics").text


def test_pages_of_the_origins_that_are_set_may_call_each(shop: Process):
    for _ in range(10):
        with shop.caller() as caller:  # each on a connection of its own, so that several workers answer
            for origin in (PAGE, "http://localhost:3000"):
                answer = caller.get("/products?limit=1", Origin=origin)
                assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, origin)
            assert caller.get("/products?limit=1", Origin="http://localhost:3001").status == 403


def test_all_show_the_same_orders(shop: Process):
    callers = [shop.caller() for _ in range(12)]
    for caller in callers:
        caller.get("/health/live")  # all connected at once, hence by several workers
    order_id = callers[0].order().json["id"]

    assert all(caller.get(f"/orders/{order_id}").status == 200 for caller in callers)
    assert len({tuple(all_order_ids(caller)) for caller in callers[:4]}) == 1
    for caller in callers:
        caller.connection.close()


def test_all_refuse_the_token_of_a_session_that_has_ended(shop: Process):
    callers = [shop.caller() for _ in range(12)]
    tokens = callers[0].sign_in("bob@example.com", "demo-password").json
    for caller in callers:
        caller.token = callers[0].token
        assert caller.get("/users/me").status == 200
    callers[0].post("/logout", {"refresh_token": tokens["refresh_token"]})

    for caller in callers:
        wait_until(lambda caller=caller: caller.get("/users/me").status == 401)


def test_wrong_passwords_are_counted_by_all_of_them_together(shop: Process):
    callers = [shop.caller() for _ in range(24)]
    for caller in callers:
        caller.get("/health/live")  # all connected at once, hence by several workers
    began = time.monotonic()
    wrong = {"email": "alice@example.com", "password": "a wrong password"}
    statuses = [caller.post("/login", wrong).status for caller in callers]
    seconds = time.monotonic() - began
    for caller in callers:
        caller.connection.close()

    assert set(statuses) == {401, 429}
    # After the free ones, one more may fail after 1 s, the next after 2 s more, and so on.
    delayed = sum(2**n - 1 <= seconds for n in range(1, 8))
    assert FREE_FAILURES <= statuses.count(401) <= FREE_FAILURES + delayed


def requests_counted(shop: Process) -> int:
    with shop.caller() as caller:
        text = caller.get("/metrics").text
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in text.splitlines()
        if line.startswith("http_server_request_duration_seconds_count") and f'http_route="{LISTED_HERE_ALONE}"' in line
    )


def descriptors(process: Identity) -> set[str]:
    found: set[str] = set()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(entry))
    return found


def client_sockets(port: int) -> set[str]:
    """The connections that were accepted on a port."""
    found: set[str] = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "01":
            found.add(f"socket:[{fields[9]}]")
    return found
