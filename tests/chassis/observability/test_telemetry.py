"""The log: one JSON object a line, and traces only where they help."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import msgspec
import pytest
import structlog

from mercato.chassis.observability.telemetry import LogStream, configure_logging

RETRIEVED = (
    "Task exception was never retrieved\n"
    "future: <Task finished name='Task-7' coro=<Connection.close() done, defined at /lib/asyncpg/connection.py:1476> "
    "exception=ConnectionDoesNotExistError('connection was closed')>"
)


@pytest.fixture
def stream() -> Generator[io.BytesIO]:
    made = io.BytesIO()
    root = logging.getLogger()
    handlers = root.handlers[:]
    for handler in handlers:
        root.removeHandler(handler)  # or they would be closed
    configure_logging("info", made)
    try:
        yield made
    finally:
        root.handlers[:] = handlers


def said(stream: io.BytesIO, logger: str, message: str) -> dict[str, Any]:
    """The line that a library's warning about an error makes."""
    try:
        raise ConnectionResetError("connection\nlost")
    except ConnectionResetError:
        logging.getLogger(logger).warning(message, exc_info=True)
    [line] = stream.getvalue().splitlines()
    return msgspec.json.decode(line)


@pytest.mark.parametrize(
    ("logger", "message"),
    [("asyncpg.pool", "Failed to restore the pool connection floor"), ("asyncio", RETRIEVED)],
)
def test_the_driver_says_that_its_server_went_away_without_a_trace(stream: io.BytesIO, logger: str, message: str):
    line = said(stream, logger, message)

    assert (line["level"], line["event"], line["logger"]) == ("warning", message, logger)
    assert line["reason"] == "ConnectionResetError: connection lost"
    assert "exception" not in line


@pytest.mark.parametrize("logger", ["asyncio", "uvicorn.error"])
def test_records_of_other_loggers_have_their_traceback(stream: io.BytesIO, logger: str):
    line = said(stream, logger, "Task exception was never retrieved")

    assert "Traceback" in line["exception"]
    assert "reason" not in line


# ------------------------------------------------------------------------------------------ nothing raises, no secret


class Closed(io.BytesIO):
    """The end of a pipe without a reader, until it is `open`."""

    is_open = False

    def write(self, line: Any) -> int:
        if not self.is_open:
            raise BrokenPipeError
        return super().write(line)


def test_a_log_that_cannot_be_written_raises_nothing_and_goes_on_later(stream: io.BytesIO):
    closed, lost = Closed(), LogStream.lost_lines
    configure_logging("info", closed)
    log = structlog.stdlib.get_logger("tests")

    log.warning("lost")
    logging.getLogger("library").warning("lost too")
    closed.is_open = True
    log.warning("written")

    assert LogStream.lost_lines - lost == 2
    assert [msgspec.json.decode(line)["event"] for line in closed.getvalue().splitlines()] == ["written"]


def test_a_log_whose_file_is_closed_raises_nothing(stream: io.BytesIO):
    stream.close()

    structlog.stdlib.get_logger("tests").warning("lost")


def test_a_line_that_is_taken_in_parts_is_written_whole(stream: io.BytesIO):
    class Slow(io.BytesIO):
        def write(self, line: Any) -> int:
            return super().write(bytes(line[:5]))

    slow = Slow()
    configure_logging("info", slow)
    structlog.stdlib.get_logger("tests").warning("whole")

    assert msgspec.json.decode(slow.getvalue())["event"] == "whole"


def test_a_closed_pipe_makes_no_other_exit_code():
    program = (
        "import structlog; from mercato.chassis.observability.telemetry import LogStream, configure_logging;"
        "configure_logging('info'); [structlog.stdlib.get_logger('a').warning('lost') for _ in range(500)]"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        ended = subprocess.run([sys.executable, "-c", program], stderr=pipe, check=False)

    assert ended.returncode == 0


def test_a_traceback_has_no_password_and_no_values_of_a_row(stream: io.BytesIO):
    try:
        raise ValueError("postgresql://shop:hunter2@db/x\nDETAIL:  Failing row contains (1, alice, $argon2).")
    except ValueError as error:
        structlog.stdlib.get_logger("tests").error("failed", exc_info=error)

    trace = msgspec.json.decode(stream.getvalue())["exception"]
    assert "ValueError: postgresql://shop:***@db/x" in trace
    assert "DETAIL: (left out)" in trace
    assert "hunter2" not in trace
    assert "alice" not in trace
