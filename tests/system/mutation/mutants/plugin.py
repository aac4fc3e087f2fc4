"""What a run of pytest is asked for here: `-p system.mutation.mutants.plugin --chosen FILE` or `--record FILE`.

`--chosen` runs the tests of a list alone, in its order. `--record` writes which lines of the package each test runs.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import coverage
import msgspec
import pytest

Lines = dict[str, dict[str, list[int]]]
"""By test and file, which lines ran."""


class Recorded(msgspec.Struct, frozen=True):
    """`lines` of the package. `support`: the files that tests share and that ran, also where they were imported."""

    lines: Lines
    support: tuple[str, ...]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chosen", type=Path, help="the tests to run, as a list in JSON")
    parser.addoption("--record", type=Path, help="where to write which lines each test runs")


def pytest_configure(config: pytest.Config) -> None:
    if (chosen := cast(Any, config.getoption("--chosen"))) is not None:
        config.pluginmanager.register(Chooser(msgspec.json.decode(chosen.read_bytes(), type=list[str])))
    if (record := cast(Any, config.getoption("--record"))) is not None:
        config.pluginmanager.register(Recorder(record, config.rootpath))


class Chooser:
    def __init__(self, tests: list[str]) -> None:
        self._rank = {test: n for n, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        others = [item for item in items if item.nodeid not in self._rank]
        items[:] = sorted((i for i in items if i.nodeid in self._rank), key=lambda item: self._rank[item.nodeid])
        config.hook.pytest_deselected(items=others)


class Recorder:
    def __init__(self, file: Path, root: Path) -> None:
        self._file = file
        self._root = root
        sources = [str(root / "mercato"), str(root / "tests")]
        self._coverage = coverage.Coverage(data_file=None, config_file=False, source=sources)
        self._coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, bool | None, bool | None]:
        self._coverage.switch_context(item.nodeid)
        result = yield
        self._coverage.switch_context("")
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        lines: Lines = {}
        support: list[str] = []
        for file in sorted(data.measured_files()):
            name = Path(file).relative_to(self._root).as_posix()
            if name.startswith(("tests/", "mercato/testing/")):
                support.append(name)
                continue
            for line, contexts in data.contexts_by_lineno(file).items():
                for test in filter(None, contexts):
                    lines.setdefault(test, {}).setdefault(name, []).append(line)
        self._file.write_bytes(msgspec.json.encode(Recorded(lines, tuple(support))))
