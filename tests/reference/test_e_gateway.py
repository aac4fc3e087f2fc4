"""Reference system E: an API gateway with users, products and orders, each with a database of its own."""

from __future__ import annotations

import asyncio
import datetime
import json
import shlex
import shutil

import pytest

from mercato.chassis.contract import Unavailable
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database
from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.snapshots import state_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

# The words of its documentation; only the port is the test's.
GET_USER = "curl 'http://localhost:8080/users?id=1'"
PLACE_ORDER = """curl -X POST http://localhost:8080/orders -H 'Content-Type: application/json' \\
     -d '{"user_id": 1, "product_id": 100, "amount": 99.99}'"""


async def curl(shop: Shop, line: str) -> tuple[int, object]:
    """Runs a command line of curl; gives the status and the JSON of the answer."""
    port = shop.url.rpartition(":")[2]
    words = shlex.split(line.replace("\\\n", "").replace("localhost:8080", f"localhost:{port}"))
    words[1:1] = ["--silent", "--show-error", "--noproxy", "*", "--max-time", "30", "--write-out", "\\n%{http_code}"]
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    answer, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    body, _, status = answer.decode().rpartition("\n")
    return int(status), json.loads(body)


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")


@needs_curl
async def test_the_first_curl_line_finds_the_user(open_shop: Shop) -> None:
    status, users = await curl(open_shop, GET_USER)
    assert status == 200
    assert isinstance(users, list)
    [user] = users
    assert (user["id"], user["name"], user["email"]) == (1, "Alice", "alice@example.com")


@needs_curl
async def test_the_second_curl_line_places_an_order(open_shop: Shop) -> None:
    status, order = await curl(open_shop, PLACE_ORDER)
    assert status == 201
    assert isinstance(order, dict)
    [item] = order["items"]
    assert (order["user_id"], item["product_id"], item["quantity"]) == (1, 100, 1)
    assert order["total"] == {"amount": "99.99", "currency": "USD"}
    assert order["status"] == "pending"
    assert (await open_shop.get(f"/orders/{order['id']}")).json == order


async def test_a_user_is_asked_for_by_a_number(open_shop: Shop) -> None:
    reply = await open_shop.get("/users?id=one")
    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {"?id"}
    assert (await open_shop.get("/users?id=999999")).json == []


async def test_an_order_of_one_product_and_an_amount_is_placed(open_shop: Shop) -> None:
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=1)
    reply = await open_shop.post("/orders", {"user_id": 1, "product_id": 100, "quantity": 2, "amount": 199.98})
    assert reply.status == 201
    assert (reply.json["status"], reply.json["payment"], reply.json["version"]) == ("pending", "unpaid", 1)
    assert datetime.datetime.fromisoformat(reply.json["created_at"]) > before
    assert reply.json["created_at"].endswith("Z")


async def test_the_client_does_not_name_the_price(open_shop: Shop) -> None:
    before = await state_of(open_shop)
    reply = await open_shop.post("/orders", {"user_id": 1, "product_id": 100, "amount": 0.01})
    assert_problem(reply, 409, "orders.price_changed")
    assert reply.json["details"] == {
        "expected": {"amount": "0.01", "currency": "USD"},
        "actual": {"amount": "99.99", "currency": "USD"},
    }
    assert await state_of(open_shop) == before


@pytest.mark.parametrize(
    ("order", "code", "names"),
    [
        ({"user_id": 999_999, "product_id": 100}, "users.not_found", {"user_id": 999_999}),
        ({"user_id": 1, "product_id": 999_999}, "products.not_found", {"product_id": 999_999}),
    ],
)
async def test_an_unknown_user_or_product_is_named(
    open_shop: Shop, order: dict[str, int], code: str, names: dict[str, int]
) -> None:
    reply = await open_shop.post("/orders", order)
    assert_problem(reply, 404, code)
    assert reply.json["details"] == names
    assert "999999" in reply.json["detail"]


async def test_broken_json_is_answered_with_its_position(open_shop: Shop) -> None:
    reply = await open_shop.post("/orders", raw=b'{"user_id": 1,', headers={"Content-Type": "application/json"})
    assert_problem(reply, 400, "malformed_json")
    assert (reply.json["details"]["line"], reply.json["details"]["column"]) == (1, 15)


async def test_each_service_owns_its_database(open_shop: Shop) -> None:
    names = {service: dsn.partition("?")[0].rpartition("/")[2] for service, dsn in open_shop.harness.dsns.items()}
    assert len(set(names.values())) == len(names)
    for service, dsn in open_shop.harness.dsns.items():
        for other in names.keys() - {service}:
            foreign = Database(dsn.replace(f"/{names[service]}?", f"/{names[other]}?"), service, Telemetry(), size=1)
            with pytest.raises(Exception, match="permission denied for database"):
                await opened_in_the_end(foreign)


async def opened_in_the_end(database: Database) -> None:
    """Opens it, again where the server was too busy to answer in time."""
    async with asyncio.timeout(120):
        while True:
            try:
                return await database.open()
            except Unavailable:
                await asyncio.sleep(0.1)


async def test_health_metrics_and_trace_ids_are_there(open_shop: Shop) -> None:
    assert (await open_shop.get("/health/live")).status == 200
    metrics = (await open_shop.get("/metrics")).body.decode()
    for name in (
        "http_server_request_duration_seconds",
        "db_client_connection_max",
        "mercato_queue_wait_seconds_bucket",
    ):
        assert name in metrics
    reply = await open_shop.get("/orders/999999", headers={"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"})
    assert reply.json["trace_id"] == "ab" * 16
