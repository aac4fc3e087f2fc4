"""These tests start the real command, and look into /proc."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from system.crash.crashing import Crash, sample
from system.crash.scenarios import TABLES

collect_ignore_glob = [] if sys.platform.startswith("linux") else ["test_*.py"]

HERE = Path(__file__).parent
SAMPLE = {crash.point for table in TABLES for crash in sample(table)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and HERE / "mutation" not in item.path.parents:
            item.add_marker(pytest.mark.postgres)
            if _is_crash_beyond_the_sample(item):
                item.add_marker(pytest.mark.long)


def _is_crash_beyond_the_sample(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    crash = callspec.params.get("crash") if callspec is not None else None
    return isinstance(crash, Crash) and crash.point not in SAMPLE
