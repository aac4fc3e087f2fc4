"""`mercato trace`, over a shop in one process; over several processes: `tests/system/tracing`."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from pathlib import Path

import pytest

from mercato.testing.command import run_command
from mercato.testing.process import Process, data_folder, used_folder

ORDER = {"user_id": 1, "product_id": 100, "payment_method": "sandbox:ok"}


@pytest.fixture(scope="module")
def shop() -> Generator[tuple[Path, int]]:
    """A shop with an order, which was placed and then read."""
    with used_folder() as data, Process(data) as shop, shop.ready().caller() as caller:
        placed = caller.post("/orders", ORDER, Prefer="wait=20")
        assert placed.status == 201, placed.text
        assert caller.get(f"/orders/{placed.json['id']}").status == 200
        assert caller.get("/orders/987654321").status == 404
        yield data, placed.json["id"]
        shop.stop()


def printed(*arguments: str, environment: Mapping[str, str] | None = None) -> list[str]:
    done = run_command("trace", *arguments, environment=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("columns", [80, 160])
def test_the_traces_of_an_order_fit_the_terminal(shop: tuple[Path, int], columns: int):
    data, order_id = shop
    lines = printed(str(order_id), "--data", str(data), environment={"COLUMNS": str(columns)})
    headings = [line for line in lines if f" of order {order_id}: " in line]
    assert [heading.split(": ")[1].partition(" at ")[0] for heading in headings] == [
        "POST /orders",
        "GET /orders/{id}",
    ]
    rows = [line for line in lines if line and line not in headings]
    assert {len(row) for row in rows} == {columns}
    assert [row.split()[0] for row in rows if " checkout.reserve " in row] == ["orders"]
    assert not any("\033" in line for line in lines), "colours are for terminals"


def test_a_trace_is_found_by_its_id_and_the_latest_are_listed(shop: tuple[Path, int]):
    data, _ = shop
    lines = printed("--data", str(data), "--limit", "100")
    assert lines[0].split() == ["TRACE", "REQUEST", "TOOK", "SPANS", "FAILED"]
    rows = [line.split() for line in lines[1:]]
    assert [row[1:3] for row in rows] == [["POST", "/orders"], ["GET", "/orders/{id}"], ["GET", "/orders/{id}"]]
    assert rows[2][-1] == "orders.not_found"
    assert printed(rows[1][0], "--data", str(data))[0].startswith(f"{rows[1][0]} of order ")


def test_only_the_latest_traces_are_printed_and_the_number_of_others(shop: tuple[Path, int]):
    data, order_id = shop
    lines = printed(str(order_id), "--data", str(data), "--limit", "1")
    assert "GET /orders/{id}" in lines[0]
    assert lines[-1] == "1 older trace is left out: --limit shows more."


def test_json_has_all_spans_with_their_attributes(shop: tuple[Path, int]):
    data, order_id = shop
    document = json.loads("\n".join(printed(str(order_id), "--data", str(data), "--json")))
    assert document["missing"] == {}
    placing, reading = document["traces"]
    assert len(placing["spans"]) > 30
    [root] = [span for span in reading["spans"] if not span["parent_id"]]
    assert root["attributes"]["http.route"] == "/orders/{id}"
    assert root["order_id"] == order_id


@pytest.mark.parametrize("wanted", ["987654", "0af7651916cd43dd8448eb211c80319c"])
def test_what_no_process_has_is_said_with_the_reason(shop: tuple[Path, int], wanted: str):
    done = run_command("trace", wanted, "--data", shop[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"mercato: no process has a trace of {wanted}: traces are kept for an hour")
    assert json.loads(run_command("trace", wanted, "--data", shop[0], "--json").stdout) == {"traces": [], "missing": {}}


@pytest.mark.parametrize("wanted", ["x", "-1", "1.5", "0" * 31])
def test_what_is_no_id_is_refused_in_a_sentence(shop: tuple[Path, int], wanted: str):
    done = run_command("trace", "--data", shop[0], "--", wanted)
    assert done.returncode == 1
    assert done.stderr == (
        f"mercato: {wanted!r} is neither the id of an order, as in 1001, nor that of a trace, of 32 digits\n"
    )


def test_without_a_shop_it_says_how_to_start_one():
    with data_folder() as data:
        done = run_command("trace", "1001", "--data", data)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no shop runs on" in done.stderr


def test_an_address_where_no_process_answers_is_named(shop: tuple[Path, int]):
    done = run_command("trace", "1001", "--data", shop[0], "--at", "127.0.0.1:1")
    assert done.returncode == 1
    assert "127.0.0.1:1 does not answer" in done.stderr


def test_an_address_that_is_none_is_refused(shop: tuple[Path, int]):
    done = run_command("trace", "1001", "--data", shop[0], "--at", "somewhere")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "--at" in done.stderr


def test_the_operator_of_another_shop_is_refused(shop: tuple[Path, int]):
    with data_folder() as other, Process(other) as another:
        another.ready()
        [address] = json.loads((shop[0] / "processes.json").read_text())["diagnostics"].values()
        done = run_command("trace", "1001", "--data", other, "--at", address)
        another.stop()
    assert done.returncode == 1
    assert f"{address} does not answer" in done.stderr
