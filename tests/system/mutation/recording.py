"""The results of a run of pytest, written to a file: `-p system.mutation.recording --recording FILE`.

The exit code of pytest distinguishes a failed test from a file that cannot be imported, but not a safeguard that was
missed from a fixture that broke. So each test is noted with the part in which it failed, and with the error.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import pytest

import mercato

Part = Literal["none", "setup", "call", "teardown", "skipped"]


class Recorded(msgspec.Struct):
    """A test: in which part it failed first, with which kind of error, and the first line of what that said."""

    failed_in: Part = "none"
    error: str = ""
    said: str = ""
    seconds: float = 0.0
    """With its fixtures."""


class RecordedRun(msgspec.Struct):
    """`package` is the file of the package that was tested. Tests that never ran are not in it."""

    package: str
    tests: dict[str, Recorded]


class Recorder:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._tests: dict[str, Recorded] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        seen = self._tests.setdefault(item.nodeid, Recorded())
        seen.seconds += call.duration
        if seen.failed_in == "none" and not report.passed:
            seen.failed_in = "skipped" if report.skipped else report.when or "setup"
            seen.error = call.excinfo.typename if call.excinfo else ""
            seen.said = call.excinfo.exconly(tryshort=True).partition("\n")[0] if call.excinfo else ""
        return report

    def pytest_sessionfinish(self) -> None:
        recording = RecordedRun(str(mercato.__file__), self._tests)
        self._file.write_bytes(msgspec.json.encode(recording))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--recording", type=Path, required=True, help="where to write the results")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(cast(Any, config.getoption("--recording"))))
