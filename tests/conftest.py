"""Fixtures for all tests: one PostgreSQL a run, services and whole shops on it, injected faults."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog

from mercato.chassis.hosting.host import TransportName
from mercato.embedded_postgres import remove_cluster
from mercato.testing.cluster import Cluster
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import Inject, injecting
from mercato.testing.process import RUN_FOLDER
from mercato.testing.shop import Shop
from mercato.testing.transports import TRANSPORTS

LOGGER_CLASS = structlog.get_config()["wrapper_class"]


def _log_with_plain_tracebacks() -> None:
    """The formatter that structlog takes by itself needs half a second of CPU for a traceback."""
    structlog.reset_defaults()
    renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], renderer])


_log_with_plain_tracebacks()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster() -> AsyncGenerator[Cluster]:
    started = await Cluster.start()
    yield started
    await started.stop()


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> TransportName:
    return request.param


@pytest.fixture
def options(request: pytest.FixtureRequest) -> Mapping[str, object]:
    """Of `@pytest.mark.options(orders_sweep_seconds=0.05)`, as `ServiceHarness.configure` takes them."""
    marker = request.node.get_closest_marker("options")
    return marker.kwargs if marker else {}


@pytest.fixture
def harness_class() -> type[ServiceHarness]:
    """The tests of a service override it with a subclass, which starts what they need; here a test opens services."""
    return ServiceHarness


@pytest_asyncio.fixture
async def harness(
    harness_class: type[ServiceHarness], cluster: Cluster, transport: TransportName, options: Mapping[str, object]
) -> AsyncGenerator[ServiceHarness]:
    async with harness_class(cluster, transport).running(**options) as made:
        yield made


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Takes back what a test sets for the logs of this process: a later one would find its lines filtered."""
    yield
    if structlog.get_config()["wrapper_class"] is not LOGGER_CLASS:
        _log_with_plain_tracebacks()
        root = logging.getLogger()
        for handler in [handler for handler in root.handlers if type(handler).__module__.startswith("mercato.")]:
            root.removeHandler(handler)


@pytest.fixture
def inject() -> Iterator[Inject]:
    """Injects faults for the time of a test; gives what removes them earlier."""
    with injecting() as inject:
        yield inject


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=TRANSPORTS)
async def open_shop(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Shop]:
    """A shop without tokens, shared by all tests of a run: a test makes the data that it changes.

    Tests that use it run in the session's event loop: `pytestmark = pytest.mark.asyncio(loop_scope="session")`.
    """
    shop = await Shop.start(cluster, request.param)
    yield shop
    await shop.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=TRANSPORTS)
async def guarded_shop(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Shop]:
    """The same with tokens required: `await shop.alice()`, `.bob()` and `.staff()` give some."""
    shop = await Shop.start(cluster, request.param, is_open=False)
    yield shop
    await shop.close()


RULES = tuple(f"tests/{name}/" for name in ("architecture", "contracts", "docs"))
"""Tests of the source: `make check` runs those that are fast and need no database."""
LONG = (
    *("tests/docs/test_adding_a_service.py", "tests/system", "tests/cli", "tests/embedded_postgres"),
    *("tests/services/orders", "tests/chassis", "tests/bench", "tests/models", "tests/services", "tests/gateway"),
)
"""Files that take longest, whatever the number of their tests."""


def pytest_configure(config: pytest.Config) -> None:
    """Under `nohup`, or behind `&` in a script, signals are ignored, and what is started inherits that: but tests send
    them to the processes that they start."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        folder = Path(tempfile.mkdtemp(prefix="mercato-test-"))
        folder.chmod(0o755)  # the account that PostgreSQL runs as where tests are root's
        os.environ[RUN_FOLDER] = str(folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and RUN_FOLDER in os.environ:
        folder = Path(os.environ.pop(RUN_FOLDER))
        for data in folder.iterdir():
            if data.is_dir():
                remove_cluster(data)
        shutil.rmtree(folder)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is collected stays until the end: to look for garbage in it takes three seconds of CPU of each worker."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: a long file that begins last makes the whole run wait (with `--no-loadscope-reorder`).
    rank = {name: n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: next((n for name, n in rank.items() if item.nodeid.startswith(name)), len(LONG)))
    for item in items:
        if {"cluster", "open_shop", "guarded_shop"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.postgres)
        if (
            item.nodeid.startswith(RULES)
            and not any(item.iter_markers("slow"))
            and not any(item.iter_markers("postgres"))
        ):
            item.add_marker(pytest.mark.rules)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what each task waits for, where a test took too long: the stack itself ends in the event loop."""
    report = yield
    if call.excinfo is not None and str(call.excinfo.value).startswith("Timeout"):
        report.sections.append(("Tasks that had not ended", _stacks_of_tasks()))
    return report


def _stacks_of_tasks() -> str:
    tasks = [task for task in gc.get_objects() if isinstance(task, asyncio.Task) and not task.done()]
    return "\n".join(f"{task.get_name()}\n" + "\n".join(_awaited_from(task.get_coro())) for task in tasks)


def _awaited_from(waiting: Any) -> Iterator[str]:
    """Where a coroutine stands, then what it waits for, down to the future."""
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is not None:
            yield f"  {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
