"""`mercato logs`: the logs of all processes as one."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mercato.chassis.observability.telemetry import LogFile, LogStream
from mercato.cli.logs import Readers, Wanted, line_of, log_file
from mercato.testing.command import Command, clean_environment, run_command
from mercato.testing.process import Process, used_folder
from mercato.testing.waiting import wait_until


def entry(second: int, event: str = "request", **values: Any) -> dict[str, Any]:
    return {"event": event, "level": "info", "timestamp": f"2026-11-30T06:00:{second:02d}.123456Z", **values}


def write(file: Path, *entries: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as stream:
        stream.writelines(json.dumps(each) + "\n" for each in entries)


# ----------------------------------------------------------------------------------------------------------- the files


def test_the_lines_of_all_processes_are_in_the_order_of_time(tmp_path: Path):
    write(log_file(tmp_path, "orders.1"), entry(1), entry(4))
    write(log_file(tmp_path, "gateway"), entry(2), entry(3), entry(5))
    found = Readers(tmp_path / "logs").read()
    assert [each["process"] for each in found] == ["orders.1", "gateway", "gateway", "orders.1", "gateway"]


def test_only_what_was_appended_is_read_and_only_whole_lines(tmp_path: Path):
    file = log_file(tmp_path, "shop")
    write(file, entry(1))
    readers = Readers(tmp_path / "logs")
    assert len(readers.read()) == 1
    assert readers.read() == []
    with file.open("a") as stream:
        stream.write('{"event": "half')
    assert readers.read() == []
    with file.open("a") as stream:
        stream.write(' a line"}\n')
    assert [each["event"] for each in readers.read()] == ["half a line"]
    write(log_file(tmp_path, "started.later"), entry(2))
    assert [each["process"] for each in readers.read()] == ["started.later"]


def test_a_file_that_becomes_the_older_one_is_read_to_its_end(tmp_path: Path):
    file = log_file(tmp_path, "shop")
    write(file, entry(1))
    readers = Readers(tmp_path / "logs")
    readers.read()
    write(file, entry(2))
    file.rename(file.with_name("shop.log.1"))
    write(file, entry(3))
    assert [each["timestamp"][17:19] for each in readers.read()] == ["02", "03"]
    assert len(Readers(tmp_path / "logs").read()) == 3, "the older file comes first"


def test_what_is_no_entry_is_shown_as_it_is(tmp_path: Path):
    file = log_file(tmp_path, "shop")
    file.parent.mkdir()
    file.write_bytes(b"Fatal Python error\n\xff\n[1]\n")
    assert [each["event"] for each in Readers(tmp_path / "logs").read()] == ["Fatal Python error", "\ufffd"]


def test_a_log_file_keeps_one_older_file_and_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = LogFile(tmp_path / "shop.log")
    monkeypatch.setattr(file, "maxBytes", 1_000)
    for n in range(100):
        file.write(json.dumps(entry(n % 60, number=n)).encode() + b"\n")
    file.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["shop.log", "shop.log.1"]
    assert all(each.stat().st_size <= 1_000 for each in tmp_path.iterdir())
    lines = [*(tmp_path / "shop.log.1").read_text().splitlines(), *(tmp_path / "shop.log").read_text().splitlines()]
    assert [json.loads(line)["number"] for line in lines] == [*range(100 - len(lines), 100)]


def test_a_line_that_a_log_file_cannot_take_is_counted_and_raises_nothing(tmp_path: Path):
    file, before = LogFile(tmp_path / "missing" / "shop.log"), LogStream.lost_lines
    file.write(b"{}\n")
    assert LogStream.lost_lines == before + 1


# ------------------------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (Wanted(), True),
        (Wanted(service="orders"), True),
        (Wanted(service="gateway"), True),
        (Wanted(service="users"), False),
        (Wanted(level="info"), True),
        (Wanted(level="warning"), False),
        (Wanted(trace_id="a"), True),
        (Wanted(trace_id="b"), False),
        (Wanted(order_id=1001), True),
        (Wanted(order_id=1002), False),
        (Wanted("orders", "info", "a", 1001), True),
        (Wanted("orders", "info", "a", 1002), False),
    ],
)
def test_a_line_is_shown_if_all_that_is_wanted_fits(wanted: Wanted, fits: bool):
    assert wanted.fits(entry(1, service="orders", process="gateway.2", trace_id="a", order_id=1001)) is fits


def test_a_line_for_people_has_time_level_process_and_event_first():
    shown = line_of(entry(1, process="shop", service="orders", reason="no stock", count=2, trace_id=""))
    assert shown == '2026-11-30 06:00:01.123 info     shop/orders        request  reason="no stock" count=2'
    failed = line_of(entry(1, "failed", process="orders.1", service="orders", exception="Traceback:\n  here\n"))
    assert failed == "2026-11-30 06:00:01.123 info     orders.1           failed\nTraceback:\n  here"


def test_without_a_log_it_says_so(tmp_path: Path):
    done = run_command("logs", "--data", tmp_path)
    assert (done.returncode, done.stderr) == (
        1,
        f"mercato: no shop has written a log in {tmp_path}: `mercato up` does\n",
    )


def test_the_log_of_a_shop_is_followed_and_still_there_after_its_end():
    environment = {"MERCATO_LOG_LEVEL": "debug"}
    with used_folder() as data, Process(data, "--workers", "2", environment=environment) as shop:
        with shop.ready().caller() as caller, following_logs(data) as following:
            found: list[dict[str, Any]] = []

            def is_there() -> bool:
                caller.get("/orders/987654321")
                found.append(json.loads(following.stdout.readline()))
                return found[-1]["event"] == "request"

            wait_until(is_there)
            following.send_signal(signal.SIGINT)
            assert following.wait() == 0
        shop.stop()
        last = run_command("logs", "--data", data, "--order", "987654321", "--last", "1")
    assert found[-1]["process"] in ("worker.1", "worker.2")
    assert " request " in last.stdout
    assert "order_id=987654321" in last.stdout


def following_logs(data: Path) -> Command:
    return Command(["logs", "--data", data, "--follow", "--json"], environment=clean_environment())
