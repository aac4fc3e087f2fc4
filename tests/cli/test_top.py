"""`mercato top`: rates and percentiles from two looks at the metrics of each process."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from mercato.cli.top import CALL_SECONDS, Row, percentiles, rows_of, samples_of
from mercato.testing.command import Command, clean_environment, run_command
from mercato.testing.process import Process, used_folder

MS = 1_000_000

CALLS = """
rpc_server_call_duration_seconds_bucket{{le="0.001",rpc_method="orders.get"}} {fast}
rpc_server_call_duration_seconds_bucket{{le="0.01",rpc_method="orders.get"}} {slow}
rpc_server_call_duration_seconds_bucket{{le="+Inf",rpc_method="orders.get"}} {all}
mercato_requests_total{{rpc_method="orders.get"}} {requests}
mercato_requests_failed_total{{rpc_method="orders.get"}} {failed}
mercato_calls_in_flight{{operations="reads",service="orders"}} {in_flight}
mercato_breaker_open{{operations="reads",service="orders"}} {is_open}
http_server_request_duration_seconds_count{{http_response_status_code="200",http_route="/orders"}} {requests}
http_server_request_duration_seconds_count{{http_response_status_code="500",http_route="/orders"}} {failed}
"""


def process(
    *, fast: int = 0, slow: int = 0, requests: int = 0, failed: int = 0, in_flight: int = 0, is_open: int = 0
) -> str:
    return CALLS.format(
        fast=fast, slow=slow, all=slow, requests=requests, failed=failed, in_flight=in_flight, is_open=is_open
    )


def rows(before: dict[str, str], after: dict[str, str], seconds: float = 2.0) -> dict[str, Row]:
    earlier, later = ({name: samples_of(text) for name, text in each.items()} for each in (before, after))
    return {row.service: row for row in rows_of(earlier, later, seconds)}


def test_rates_are_changes_over_all_processes():
    before = {"a": process(requests=10), "b": process(requests=100)}
    after = {"a": process(requests=30, failed=4), "b": process(requests=110, in_flight=3)}
    found = rows(before, after)
    assert list(found) == ["gateway", "orders"]
    orders = found["orders"]
    assert (orders.processes, orders.calls, orders.errors, orders.in_flight) == (2, 15.0, 2.0, 3)
    assert (found["gateway"].calls, found["gateway"].errors) == (17.0, 2.0)


def test_a_process_that_has_started_again_counts_from_zero():
    found = rows({"a": process(requests=1_000)}, {"a": process(requests=6)})
    assert found["orders"].calls == 3.0


def test_a_breaker_that_one_process_has_opened_is_shown():
    found = rows({}, {"a": process(), "b": process(is_open=1)})
    assert found["orders"].breaker == "open"
    assert rows({}, {"a": process()})["orders"].breaker == "closed"


def test_percentiles_are_interpolated_between_the_bounds():
    samples = samples_of(process(fast=50, slow=100))
    assert percentiles(samples, CALL_SECONDS, "orders.") == (1 * MS, round(9.82 * MS))
    assert percentiles(samples_of(process(fast=100, slow=100)), CALL_SECONDS, "orders.")[0] == MS // 2
    assert percentiles(samples, CALL_SECONDS, "users.") == (None, None)
    assert percentiles(samples_of(process()), CALL_SECONDS, "orders.") == (None, None)


def test_what_is_above_the_last_bound_is_shown_as_that():
    text = process(fast=0, slow=1).replace(
        'le="+Inf",rpc_method="orders.get"} 1', 'le="+Inf",rpc_method="orders.get"} 100'
    )
    assert percentiles(samples_of(text), CALL_SECONDS, "orders.") == (10 * MS, 10 * MS)


def test_it_shows_a_running_shop():
    with used_folder() as data, Process(data) as shop, shop.ready().caller() as caller:
        assert caller.get("/products?limit=1").status == 200
        shown = run_command("top", "--data", data, "--every", "0.1", "--count", "2")
        one = run_command("top", "--data", data, "--every", "0.1", "--count", "1", "--json")
        shop.stop()
        gone = run_command("top", "--data", data, "--count", "1")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert sum(line.startswith("SERVICE ") for line in lines) == 2
    assert {line.split()[0] for line in lines if line} >= {"SERVICE", "gateway", "products"}
    [document] = one.stdout.splitlines()
    services = {row["service"]: row for row in json.loads(document)["services"]}
    assert services["products"]["processes"] == 1
    assert (gone.returncode, gone.stderr.count("\n")) == (1, 1)


def test_ctrl_c_is_how_watching_ends():
    with used_folder() as data, Process(data) as shop:
        shop.ready()
        with watching(data) as command:
            assert command.stdout.readline().startswith("SERVICE ")
            command.send_signal(signal.SIGINT)
            assert command.wait() == 0
            assert command.stderr.read() == ""
        shop.stop()


def watching(data: Path) -> Command:
    return Command(["top", "--data", data, "--every", "0.1"], environment=clean_environment())


@pytest.mark.parametrize("arguments", [("--every", "0"), ("--count", "0"), ("--every", "x")])
def test_numbers_out_of_bounds_are_refused(arguments: tuple[str, str]):
    done = run_command("top", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
