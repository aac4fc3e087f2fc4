"""Journeys start the real command, and look into /proc."""

from __future__ import annotations

import sys

import pytest

from journeys.crash_stories import TABLES
from support.crashing import Crash, sample

collect_ignore_glob = [] if sys.platform.startswith("linux") else ["test_*.py"]

SAMPLE = {crash.point for table in TABLES for crash in sample(table)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/journeys/" in str(item.path):
            item.add_marker(pytest.mark.postgres)
            if _is_crash_beyond_the_sample(item):
                item.add_marker(pytest.mark.long)


def _is_crash_beyond_the_sample(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    crash = callspec.params.get("crash") if callspec is not None else None
    return isinstance(crash, Crash) and crash.point not in SAMPLE
