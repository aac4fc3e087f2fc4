"""The log: one JSON object a line, and traces only where they help."""

from __future__ import annotations

import io
import logging
from collections.abc import Generator
from typing import Any

import msgspec
import pytest
import structlog

from mercato.chassis.observability.telemetry import configure_logging

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
        structlog.reset_defaults()
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
def test_what_others_say_has_its_trace(stream: io.BytesIO, logger: str):
    line = said(stream, logger, "Task exception was never retrieved")

    assert "Traceback" in line["exception"]
    assert "reason" not in line
